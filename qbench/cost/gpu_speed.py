"""Estimates training times on GPUs from their published peak speeds. Nothing is measured.

Peaks are those of dense operations in NVIDIA's data sheets of the V100 (SXM2), the A100 (SXM) and the H100 (SXM). A
network reaches only a share of them. The shares here are assumptions: half of the float32 peak, and a fifth of the peak
of tensor cores, which are limited by memory. Quantizers are limited by memory too, and are not counted.
"""

PEAKS = {
    "fp32": {"V100": 15.7e12, "A100": 19.5e12, "H100": 67e12},
    "tf32": {"A100": 156e12, "H100": 494e12},
    "bf16": {"A100": 312e12, "H100": 989e12},
}
"""Precision -> GPU -> published floating-point operations per second."""
SHARES = {"fp32": 0.5, "tf32": 0.2, "bf16": 0.2}
"""Precision -> assumed share of the peak."""
PASSES = 3
"""The backward pass costs about twice the forward pass: gradients of the input and of the weights."""


def training_seconds(macs: float, precision: str) -> dict[str, float]:
    """Return an estimate of the training time in seconds on one GPU of each kind.

    Args:
        macs: multiply-accumulates of all forward passes of the training.
        precision: `fp32`, `tf32` or `bf16`.
    """
    share = SHARES[precision]
    return {name: 2 * PASSES * macs / (share * peak) for name, peak in PEAKS[precision].items()}
