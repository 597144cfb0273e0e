"""LSQ: equally spaced levels with a learned step, for weights and activations.

Paper
    Esser, McKinstry, Bablani, Appuswamy, Modha, "Learned Step Size Quantization", ICLR 2020,
    arXiv 1902.08153.

Idea
    The step between levels is a parameter, trained by gradient descent. Rounded values and clipped
    values contribute to the gradient of the step. This gradient is scaled so that steps and weights
    change at comparable rates.

Forward
    v_hat = s round(clip(v / s, -Qn, Qp)).
    Weights of b bits: Qn = 2^(b-1), Qp = 2^(b-1) - 1.
    Activations: Qn = 0, Qp = 2^b - 1.

Backward
    dL/dv = dL/dv_hat where -Qn < v / s < Qp, else 0.
    dv_hat/ds = round(v / s) - v / s for -Qn < v / s < Qp, -Qn for smaller v, and Qp for larger v.
    dL/ds is multiplied by 1 / sqrt(N Qp), where N is the number of weights of the layer, or the
    number of activations of one sample.

Schedule
    Training has one phase and starts from a float network.

Sites
    weight, input.

State
    step (scalar): the step. A layer has one step for its weights and another step for its input.
    With channel=true, the weights have one step per output channel, (O, 1, ...). signed (bool):
    whether the levels of the input include negative values (never with 1 bit). ready (bool):
    whether the step of the input has been set from data.

Bits
    w 2-16 or 32, a 1-16 or 32, g 32; by default w2a2g32.

Protocol
    The paper trains on ImageNet for 90 epochs, from a float network, by SGD with momentum 0.9 and a
    cosine schedule. The first and last layers have 8 bits.

Choices
    channel: `false` (default) is one step per layer, as in the paper. `true` is one step per output
    channel, as in many later papers and libraries. With `true`, N is the number of weights in one
    channel.
    Steps start at 2 mean|v| / sqrt(Qp). For activations, the mean is taken over 256 training images
    (the probe). The paper uses the first batch. If the input of a layer has negative values on the
    probe, its levels are positive and negative, like the levels of weights.

Deviations
    qbench keeps steps at 1e-8 or more.

Results
    docs/results.md (digits).
"""

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.quant.fused_kernels import grad_between
from qbench.quant.layers import FloatLayer, clamp_min_, float_mode, quantized_layers
from qbench.quant.method import Method, Requires
from qbench.quant.ops import fused_quantizer, on_backward, round_ste
from qbench.quant.probe import Probe
from qbench.quant.quantizer import Grid, Quantizer, Storage

SMALLEST = 1e-8


def limits(bits: int, signed: bool) -> tuple[int, int]:
    """Return (Qn, Qp). The codes are the integers from -Qn to Qp."""
    return (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def quantize(x: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """Quantize x (any shape) to `step` times an integer from -Qn to Qp (see `limits`). Eq. 1-3.

    `step` must be above 0 and gets the gradient of eq. 3. It is a scalar, or a tensor (O, 1, ...,
    1) with one step per output channel. With 32 bits, return x itself.
    """
    if bits == FLOAT:
        return x
    low, high = limits(bits, signed)

    def plain(x: Tensor, step: Tensor) -> Tensor:
        v = x / step
        # autograd gives eq. 3: round(v) - v inside, -Qn or Qp at the ends
        ends = torch.where(v >= high, float(high), torch.full_like(v, -low))
        return torch.where((v > -low) & (v < high), round_ste(v), ends) * step

    def value(x: Tensor, step: Tensor) -> Tensor:
        return x.div(step).clamp_(-low, high).round_().mul_(step)

    def backward(grad: Tensor, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        v = x / step
        # derivative with respect to the step: round(v) - v where -Qn < v < Qp, and -Qn or Qp where v is clipped
        slope = v.clamp(-low, high).round_().sub_(grad_between(v, v, -low, high))
        # gradient of x: passes where -Qn < v < Qp
        return grad_between(grad, v, -low, high), _sum_to(slope.mul_(grad), step)

    return fused_quantizer(x, step, plain=plain, value=value, backward=backward)


def _sum_to(values: Tensor, step: Tensor) -> Tensor:
    """Sum all values that share a step. The result has the shape of the step."""
    return values.sum() if step.dim() == 0 else values.sum(tuple(range(1, values.dim())), keepdim=True)


def initial_step(x: Tensor, bits: int, signed: bool, channel: bool = False) -> Tensor:
    """Return the initial step 2 mean|x| / sqrt(Qp), or 1 if x is zero. With `channel`, return one step per channel."""
    magnitude = x.detach().abs()
    mean = magnitude.mean(tuple(range(1, x.dim())), keepdim=True) if channel else magnitude.mean()
    start = 2 * mean / max(limits(bits, signed)[1], 1) ** 0.5
    return torch.where(start > 0, start, torch.ones_like(start))


def scale_gradient(step: Tensor, count: int, bits: int, signed: bool) -> Tensor:
    """Return the step unchanged. The backward pass multiplies the gradient of the step by `gradient_scale`."""
    factor = gradient_scale(count, bits, signed)
    return on_backward(step, lambda grad: grad * factor)


def gradient_scale(count: int, bits: int, signed: bool) -> float:
    """Return 1 / sqrt(count Qp), the factor by which a step's gradient is multiplied. Section 2.2."""
    return float((count * max(limits(bits, signed)[1], 1)) ** -0.5)


def _grid(step: Tensor, bits: int, signed: bool) -> Grid:
    """Return the allowed values: each step times each integer from -Qn to Qp. There is one scale group per step."""
    low, high = limits(bits, signed)
    points = (torch.arange(-low, high + 1, device=step.device) * step.reshape(-1, 1)).unsqueeze(2)
    return Grid(points) if step.dim() == 0 else Grid(points, lambda t: t.reshape(len(t), -1, 1))


class LSQWeight(Quantizer):
    """Quantizer of one layer's weights. The step is learned."""

    positive_parameters: tuple[str, ...] = ("step",)

    def __init__(self, layer: FloatLayer, bits: int, channel: bool = False) -> None:
        super().__init__()
        self.bits = bits
        self.step = nn.Parameter(initial_step(layer.weight, bits, True, channel))

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights."""
        count = w.numel() // self.step.numel()
        return quantize(w, scale_gradient(self.step, count, self.bits, signed=True), self.bits, True)

    def gradient_factor(self, w: Tensor) -> float:
        """Return the factor by which the step's gradient is multiplied."""
        return gradient_scale(w.numel() // self.step.numel(), self.bits, signed=True)

    def grid(self, w: Tensor) -> Grid:
        """Return the allowed values: each step times each integer from -Qn to Qp. There is one scale group per step."""
        return _grid(self.step, self.bits, signed=True)

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of the codes and of the steps."""
        return Storage(w.numel(), self.bits, 4 * self.step.numel())


class LSQActivation(Quantizer):
    """Quantizer of one layer's input. The step is learned."""

    positive_parameters: tuple[str, ...] = ("step",)

    signed: Tensor
    ready: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.step = nn.Parameter(torch.ones(()))
        self.register_buffer("signed", torch.tensor(False))
        self.register_buffer("ready", torch.tensor(False))
        # `signed` as a Python bool, or None if unknown. Reading the buffer in every step would make
        # the CPU wait for a GPU.
        self.is_signed: bool | None = None
        self.register_load_state_dict_post_hook(_reset_sign)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set `signed` and the initial step from the layer's inputs x."""
        self.is_signed = bool((x < 0).any()) and self.bits > 1
        self.signed.fill_(self.is_signed)
        self.step.copy_(initial_step(x, self.bits, self.is_signed))
        self.ready.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized activations. If `prepare` has not set the step, the first batch sets it."""
        if not len(x):
            return x
        if self.is_signed is None:
            if not self.ready:
                self.fit(x)
            self.is_signed = bool(self.signed)
        step = scale_gradient(self.step, x[0].numel(), self.bits, self.is_signed)
        return quantize(x, step, self.bits, self.is_signed)

    def gradient_factor(self, x: Tensor) -> float:
        """Return the factor by which the step's gradient is multiplied."""
        return gradient_scale(x[0].numel(), self.bits, bool(self.signed))

    def grid(self, x: Tensor) -> Grid:
        """Return the allowed values: the step times -Qn, ..., Qp. The whole tensor is one scale group."""
        return _grid(self.step, self.bits, bool(self.signed))


def _reset_sign(module: nn.Module, keys: object) -> None:
    """Reset the cached `is_signed` after a state_dict has been loaded."""
    assert isinstance(module, LSQActivation)
    module.is_signed = None


def prepare(model: nn.Module, probe: Probe) -> None:
    """Set the step of every input quantizer from the layer's inputs in the float network, on the probe images."""
    for name, layer in quantized_layers(model).items():
        if isinstance(layer.input_q, LSQActivation):
            with float_mode(model):
                inputs, _ = probe.responses(model, name)
            layer.input_q.fit(inputs)


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Step the optimizer, then keep the quantizers' steps above zero."""
    optimizer.step()
    clamp_min_(model, {LSQWeight: ("step",), LSQActivation: ("step",)}, SMALLEST)


def build(*, w: int = 2, a: int = 2, channel: bool = False) -> Method:
    """Return the `Method` for LSQ. The method card (module docstring) explains the option `channel`."""
    return Method(
        name="lsq",
        bits=Bits(w, a),
        supported_bits={"w": (*range(2, 17), FLOAT), "a": (*range(1, 17), FLOAT)},
        option_slots={"channel": "w"},
        requires=Requires(act="keep"),
        traits=frozenset({"monotone", "idempotent", "monotone_input", "idempotent_input", "clipped_input"}),
        weight=lambda name, layer, bits: LSQWeight(layer, bits, channel),
        input=lambda name, layer, bits: LSQActivation(bits),
        prepare=prepare,
        step=optimizer_step,
    )
