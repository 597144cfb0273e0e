"""Estimates training times on GPUs from their published peak speeds. Nothing is measured.

The peak speeds of dense operations come from NVIDIA's data sheets of the V100 (SXM2), the A100 (SXM) and the H100
(SXM). A network reaches only a fraction of the peak speed. The fractions here are assumptions: half of the float32
peak, and a fifth of the tensor-core peak, because memory limits the speed of tensor cores. The estimates do not include
quantizers, whose speed is also limited by memory.
"""

PEAKS = {
    "fp32": {"V100": 15.7e12, "A100": 19.5e12, "H100": 67e12},
    "tf32": {"A100": 156e12, "H100": 494e12},
    "bf16": {"A100": 312e12, "H100": 989e12},
    "fp16": {"V100": 125e12, "A100": 312e12, "H100": 989e12},
}
"""Precision -> GPU -> published floating-point operations per second."""
SHARES = {"fp32": 0.5, "tf32": 0.2, "bf16": 0.2, "fp16": 0.2}
"""Precision -> assumed fraction of the peak speed that a network reaches."""
PASSES = 3
"""Cost of a training step, in forward passes.

The backward pass costs about twice the forward pass, because it computes the gradients of the input and of the weights.
"""


def training_seconds(macs: float, precision: str) -> dict[str, float]:
    """Return an estimate of the training time in seconds on one GPU of each kind.

    Args:
        macs: multiply-accumulates of all forward passes of the training.
        precision: `fp32`, `tf32`, `bf16` or `fp16`.
    """
    share = SHARES[precision]
    return {name: 2 * PASSES * macs / (share * peak) for name, peak in PEAKS[precision].items()}
