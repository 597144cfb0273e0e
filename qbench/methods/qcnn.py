"""Q-CNN: product quantization, a code for several weights at a time, corrected by the float network's responses.

Paper
    Wu, Leng, Wang, Hu, Cheng, "Quantized Convolutional Neural Networks for Mobile Devices", CVPR 2016, arXiv
    1512.06473. Authors' code: jiaxiang-wu/quantized-cnn (C++, forward pass alone).

Idea
    Weights side by side along the inputs become one of a few learned codewords, responses sums of table look-ups. What
    counts is the error of responses, not of weights: codes are fitted to it, layer by layer.

Forward
    Input channels are parted into M subspaces of Cs' (zeros appended where they do not divide), each with a codebook of
    K codewords by k-means; all kernel positions and groups share it. w_hat is decoded in each pass.
    Error correction: min over D, B of sum_n |T_n - sum_m (D_m B_m)^T S_nm|^2, T the float network's response, S the
    layer's input behind layers quantized already; subspace by subspace, least squares for each codeword, then the best
    codeword for each output and kernel position.

Backward
    None to quantized weights: they are fixed. Inputs get the gradient of the decoded weights.

Schedule
    Quantized in `prepare`, from a float network; then biases, batch normalization and float layers are trained.

Sites
    weight.

State
    codebooks (M, K, Cs'), NaN where there are fewer distinct sub-vectors than K; codes, int16, (Ct, kh, kw, M) or
    (Ct, M): which codeword. Both zero until `prepare`.

Bits
    w 1-8 or 32: log2(K) / Cs' rounded up, a code having 10 bits at most; a and g 32; by default w1a32g32, K = 16 for
    Cs' = 4. Levels reported are codewords.

Protocol
    ImageNet networks: Cs'/K 8/128 for convolutions (VGG-16 6/128), 3/32 or 4/32 for linear layers, 1/16 for the last;
    biases float. Convolutions first, linear layers fine-tuned, then quantized. Correction on 250-500 images for
    convolutions, 25,000 for linear layers (author). VGG-16's 6/128 is remembered; it gives the reported speed-up.

Choices
    k-means' start and length are not in the paper: k-means++ from one fixed seed in float64, so that codes follow from
    the weights alone, up to 50 steps; single weights (Cs' = 1) exactly. Correction: 3 sweeps, on all outputs of linear
    layers and about 4,096 places of convolutions, spread over the Probe. The formulas of operations and bytes are
    derived; they give 4.16 where the authors' README has 4.15, and the paper's other speed-ups as remembered.

Deviations
    The correction also weighs |w_hat - w|^2, by 0.1 of the inputs' mean square: the Probe has 256 images where the
    paper took 25,000, and what it does not excite would fit nothing.
    All layers are quantized in one round, the rest trained afterwards. First and last stay float by the layer policy.

Results
    README (digits).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import FLOAT, Bits
from qbench.quant.graph import eval_mode_keeping_rng, recorded_calls
from qbench.quant.layers import FloatLayer, QLayer, float_mode, quantized_layers
from qbench.quant.method import Method, Unsupported
from qbench.quant.ops import in_float32
from qbench.quant.probe import Probe
from qbench.quant.product_quantization import decode, error_corrected, product_codes, subvectors
from qbench.quant.quantizer import Grid, Quantizer, Storage

# Ct outputs, Cs inputs, M subspaces, K codewords, G groups, P kernel positions, N responses.

CODE_BITS, POSITIONS = 10, 4096
Take = Callable[[QLayer, Tensor, int], Tensor]


@in_float32
def product_quantize(w: Tensor, subspace: int, codewords: int) -> Tensor:
    """Return weights (Ct, Cs) or (Ct, Cs, kh, kw) with every `subspace` input channels replaced by a codeword."""
    return decode(*product_codes(w, subspace, codewords), w.shape[1])


def fc_flops(inputs: int, outputs: int, subspace: int, codewords: int) -> int:
    """Return a linear layer's multiply-adds and look-ups, Cs K + Ct M."""
    return conv_flops(inputs, outputs, 1, 1, 1, subspace, codewords)


def conv_flops(
    inputs: int, outputs: int, kernel: int, size_in: int, size_out: int, subspace: int, codewords: int, groups: int = 1
) -> int:
    """Return a convolution's multiply-adds and look-ups, ds^2 Cs K + dt^2 Ct dk^2 M; sizes are heights of maps."""
    return size_in**2 * inputs * codewords + size_out**2 * outputs * kernel**2 * -(-inputs // groups // subspace)


def fc_bytes(inputs: int, outputs: int, subspace: int, codewords: int) -> float:
    """Return a linear layer's bytes without bias, 4 Cs K + Ct M log2(K) / 8."""
    return conv_bytes(inputs, outputs, 1, subspace, codewords)


def conv_bytes(inputs: int, outputs: int, kernel: int, subspace: int, codewords: int, groups: int = 1) -> float:
    """Return a convolution's bytes without bias, 4 Cs K + dk^2 Ct M log2(K) / 8, Cs being a group's inputs."""
    codes = kernel**2 * outputs * -(-inputs // groups // subspace)
    return 4 * inputs // groups * codewords + codes * (codewords - 1).bit_length() / 8


class QCNNWeight(Quantizer):
    """A layer's weights as codes; all zero until `encode`, since to find them takes minutes in a large network."""

    codebooks: Tensor
    codes: Tensor

    def __init__(self, weight: Tensor, subspace: int, codewords: int) -> None:
        super().__init__()
        self.subspace, self.codewords = subspace, codewords
        outputs, parts = weight.movedim(1, -1).shape[:-1], -(-weight.shape[1] // subspace)
        self.register_buffer("codebooks", weight.new_zeros(parts, min(codewords, outputs.numel()), subspace))
        self.register_buffer("codes", weight.new_zeros(*outputs, parts, dtype=torch.int16))

    def forward(self, w: Tensor) -> Tensor:
        """Return the decoded weights; the latent ones get no gradient."""
        return decode(self.codebooks, self.codes, w.shape[1]).to(w.dtype)

    def encode(self, w: Tensor) -> None:
        """Take the codes that k-means finds."""
        self._take(*product_codes(w, self.subspace, self.codewords))

    def correct(self, w: Tensor, inputs: Tensor, targets: Tensor) -> None:
        """Fit the codes to responses; see `error_corrected`."""
        self._take(*error_corrected(self.codebooks, self.codes, w, inputs, targets))

    def _take(self, codebooks: Tensor, codes: Tensor) -> None:
        self.codebooks.copy_(codebooks)
        self.codes.copy_(codes)

    def grid(self, w: Tensor) -> Grid:
        """One group per subspace: its codewords."""
        return Grid(self.codebooks, lambda t: subvectors(t, self.subspace).flatten(0, -3).transpose(0, 1))

    def bytes(self, w: Tensor) -> Storage:
        """A code for several weights, and the codebooks."""
        bits = max(1, (self.codebooks.shape[1] - 1).bit_length())
        return Storage(self.codes.numel(), bits, 4 * self.codebooks.numel())


def patches(layer: QLayer, x: Tensor, limit: int) -> Tensor:
    """Return what about `limit` of a layer's responses, spread over all, see of its input x: (N, G, P, Cs)."""
    if not isinstance(layer, nn.Conv2d):
        return _spread(x.flatten(0, -2), limit)[:, None, None]
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if isinstance(layer.padding, str):
        high, wide = ((r // 2, r - r // 2) if layer.padding == "same" else (0, 0) for r in reach)
    else:
        high, wide = ((p, p) for p in layer.padding)
    x = F.pad(x, (*wide, *high)).unfold(2, reach[0] + 1, layer.stride[0]).unfold(3, reach[1] + 1, layer.stride[1])
    windows = x[..., :: layer.dilation[0], :: layer.dilation[1]].movedim(1, -1)  # a view (N, H, W, kh, kw, G Cs)
    places = _spread(torch.arange(windows.shape[:3].numel(), device=x.device), limit)
    seen = windows[torch.unravel_index(places, windows.shape[:3])]
    return seen.reshape(len(seen), -1, layer.groups, seen.shape[-1] // layer.groups).transpose(1, 2)


def responses(layer: QLayer, y: Tensor, limit: int) -> Tensor:
    """Return those responses without bias, (N, Ct), of a layer's output y."""
    rows = _spread((y.movedim(1, -1) if isinstance(layer, nn.Conv2d) else y).flatten(0, -2), limit)
    return rows if layer.bias is None else rows - layer.bias


def _spread(rows: Tensor, limit: int) -> Tensor:
    return rows[:: -(-len(rows) // limit) | 1]  # an odd step meets other columns in every image


@torch.no_grad()
def _over(model: nn.Module, probe: Probe, layers: dict[str, QLayer], take: Take) -> dict[str, Tensor]:
    """Return what `take` keeps of the outputs of modules over the Probe, in the order in which they run.

    Args:
        layers: by a module's name, the layer that it is or belongs to.
    """
    found: dict[str, list[Tensor]] = {}
    limit = -(-POSITIONS // len(probe.batches))
    with eval_mode_keeping_rng(model), recorded_calls(model, list(layers)) as calls:
        for images, _ in probe.batches:
            model(images)
            for name, _, y in calls:
                found.setdefault(name, []).append(take(layers[name], y, limit))
            calls.clear()
    return {name: torch.cat(parts) for name, parts in found.items()}


def encode(model: nn.Module, probe: Probe, correct: bool) -> None:
    """Encode the weights of a network's layers as they run."""
    layers = quantized_layers(model)
    sites = {name: layer.weight_q for name, layer in layers.items() if isinstance(layer.weight_q, QCNNWeight)}
    layers = {name: layers[name] for name in sites}
    for name, layer in layers.items():
        sites[name].encode(layer.weight)  # which may have been loaded since the quantizer was made
    if not correct:
        return
    with float_mode(model):
        targets = _over(model, probe, layers, responses)
    for name, target in targets.items():
        source = f"{name}.input_q"
        seen = _over(model, probe, {source: layers[name]}, patches)[source]
        sites[name].correct(layers[name].weight, seen, target)


def _codewords(bits: int, subspace: int, codewords: int, prefix: str) -> int:
    """Return K of a layer, checked against its width."""
    if not codewords and bits * subspace > CODE_BITS:
        raise Unsupported(
            f"bits.w={bits} for {subspace} weights a code is {bits * subspace} bits, {CODE_BITS} are the most; "
            f"set method.{prefix}subspace={CODE_BITS // bits} or less"
        )
    if codewords and bits != (width := -(-(codewords - 1).bit_length() // subspace)):
        fix = f"set bits.w={width}, or method.{prefix}codewords=0 for as many as the width allows"
        raise Unsupported(f"bits.w={bits}: {codewords} codewords for {subspace} weights are nominally {width}; {fix}")
    return codewords or 2 ** (bits * subspace)


def build(
    *,
    w: int = 1,
    subspace: int = 4,
    codewords: int = 0,
    fc_subspace: int = 4,
    fc_codewords: int = 0,
    error_correction: bool = True,
) -> Method:
    """Return Q-CNN; `codewords` 0 follows the width, fc_ is for linear layers."""
    options = {"subspace": subspace, "fc_subspace": fc_subspace, "codewords": codewords, "fc_codewords": fc_codewords}
    for key, value in options.items():
        if key.endswith("subspace") and value < 1:
            raise ValueError(f"{key}={value}: allowed is 1 or more")
        if key.endswith("codewords") and value and not 2 <= value <= 2**CODE_BITS:
            raise ValueError(f"{key}={value}: allowed are 2 to {2**CODE_BITS}, and 0 for as many as bits.w allows")

    def site(name: str, layer: FloatLayer, bits: int) -> QCNNWeight:
        prefix = "fc_" if isinstance(layer, nn.Linear) else ""
        size, count = options[f"{prefix}subspace"], options[f"{prefix}codewords"]
        quantizer = QCNNWeight(layer.weight, size, _codewords(bits, size, count, prefix))
        layer.weight.requires_grad_(False)  # before the optimizer exists, and on a resume too
        return quantizer

    return Method(
        name="qcnn",
        bits=Bits(w),
        supported_bits={"w": (*range(1, 9), FLOAT)},
        weight=site,
        prepare=lambda model, probe: encode(model, probe, error_correction),
    )
