"""Q-CNN: product quantization, with codes that are fitted to the layer outputs of the float network.

Paper
    Wu, Leng, Wang, Hu, Cheng, "Quantized Convolutional Neural Networks for Mobile Devices", CVPR
    2016, arXiv 1512.06473. Authors' code: jiaxiang-wu/quantized-cnn (C++, forward pass only).

Idea
    One code represents several weights. Each group of neighbouring weights along the input channels
    is replaced by one of a few learned codewords. The responses (outputs) of a layer are then sums
    of table look-ups. Accuracy depends on the error of the responses, not on the error of the
    weights. The codes are therefore fitted to the responses, layer by layer.

Forward
    Input channels are divided into M subspaces of Cs' channels. If Cs' does not divide the number
    of channels, zero channels are appended. Each subspace has a codebook of K codewords, found by
    k-means. All kernel positions and groups of a convolution share this codebook. w_hat is decoded
    in each forward pass.
    Error correction fits the codewords D and the codes B to the responses T of the float network.
    It minimizes sum_n |T_n - sum_m (D_m B_m)^T S_nm|^2. B_m selects one codeword of subspace m for
    each output. S is the layer's input, computed with the earlier layers already quantized. The
    subspaces are corrected one after another. In each subspace, the codewords are first fitted by
    least squares. Then every output and kernel position gets the codeword that fits best.

Backward
    Quantized weights are fixed and get no gradient. The gradient of the inputs is computed with the
    decoded weights.

Schedule
    Weights are quantized in `prepare`, from a float network. Then biases, batch normalization and
    float layers are trained.

Sites
    weight.

State
    codebooks (M, K, Cs'): the codewords. If there are fewer than K distinct sub-vectors, unused
    codewords are NaN.
    codes (int16): the indices of the codewords. Their shape is (Ct, kh, kw, M) for a convolution
    with Ct outputs and kernels of kh x kw, and (Ct, M) for a linear layer with Ct outputs.
    Before `prepare`, codebooks and codes are zero.

Bits
    w 1-8 or 32, a and g 32; by default w1a32g32. The width w is log2(K) / Cs', rounded up. A code
    has at most 10 bits. By default, K = 16 and Cs' = 4. In result tables, the column `levels` is
    the number of codewords.

Protocol
    The paper quantizes ImageNet networks. Convolutions have Cs' = 8 and K = 128 (VGG-16: Cs' = 6
    and K = 128). Linear layers have Cs' = 3 or 4 and K = 32. The last layer has Cs' = 1 and K = 16.
    Biases are float. Convolutions are quantized first. Then linear layers are fine-tuned and
    quantized. According to one of the authors, error correction uses 250 to 500 images for
    convolutions and 25,000 images for linear layers. The values for VGG-16 are from memory. They
    agree with the reported speed-up.

Choices
    The paper does not state the initial centroids of k-means or the number of iterations. qbench
    uses k-means++ in float64, with up to 50 iterations. The random seed is fixed, so that the codes
    depend only on the weights. For Cs' = 1, qbench finds the optimal clusters.
    Error correction passes 3 times over the subspaces. It uses all outputs of linear layers on 256
    training images (the probe). For convolutions, it uses about 4,096 output positions, spread over
    these images.
    We derived the formulas for operations and bytes ourselves. The formulas give 4.16 for a
    speed-up that the authors' README states as 4.15. They also agree with the paper's other
    speed-ups, as far as we remember them.

Deviations
    The error correction also penalizes |w_hat - w|^2. The factor of this penalty is 0.1 times the
    mean square of the inputs. The penalty is needed because qbench uses 256 images, which alone
    would not determine all weights. The paper uses 25,000 images.
    qbench first quantizes all layers, and then trains the other parameters. By default, the first
    and last layers stay float (`layers.first`, `layers.last`).

Results
    docs/results.md (digits).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import FLOAT, Bits
from qbench.quant.graph import eval_mode_keeping_rng, recorded_calls
from qbench.quant.layers import FloatLayer, QLayer, float_mode, quantized_layers
from qbench.quant.method import Method, Unsupported, check_kind
from qbench.quant.ops import in_float32
from qbench.quant.probe import Probe
from qbench.quant.product_quantization import decode, error_corrected, product_codes, subvectors
from qbench.quant.quantizer import Grid, Quantizer, Storage

# Shapes: Ct outputs, Cs inputs, M subspaces, K codewords, G groups, P positions, N responses.

CODE_BITS = 10
"""Largest width of a code in bits."""
MAX_RESPONSES = 4096
"""Approximate number of responses of a layer that the error correction uses."""

Sampler = Callable[[QLayer, Tensor, int], Tensor]
"""Function from (layer, recorded tensor, approximate number of rows) to the sampled rows."""


@in_float32
def product_quantize(w: Tensor, subspace: int, codewords: int) -> Tensor:
    """Replace every `subspace` consecutive input channels of weights (Ct, Cs) or (Ct, Cs, kh, kw) by a codeword."""
    return decode(*product_codes(w, subspace, codewords), w.shape[1])


def fc_flops(inputs: int, outputs: int, subspace: int, codewords: int) -> int:
    """Return the number of multiply-adds and look-ups in a linear layer: Cs K + Ct M."""
    return conv_flops(inputs, outputs, 1, 1, 1, subspace, codewords)


def conv_flops(
    inputs: int, outputs: int, kernel: int, size_in: int, size_out: int, subspace: int, codewords: int, groups: int = 1
) -> int:
    """Return the number of multiply-adds and look-ups in a convolution: ds^2 Cs K + dt^2 Ct dk^2 M.

    Args:
        kernel: height and width dk of the kernel.
        size_in, size_out: height and width ds and dt of the input and output maps.
    """
    return size_in**2 * inputs * codewords + size_out**2 * outputs * kernel**2 * -(-inputs // groups // subspace)


def fc_bytes(inputs: int, outputs: int, subspace: int, codewords: int) -> float:
    """Return the size in bytes of a linear layer without its bias: 4 Cs K + Ct M log2(K) / 8."""
    return conv_bytes(inputs, outputs, 1, subspace, codewords)


def conv_bytes(inputs: int, outputs: int, kernel: int, subspace: int, codewords: int, groups: int = 1) -> float:
    """Return the bytes of a convolution (Cs inputs per group) without bias: 4 Cs K + dk^2 Ct M log2(K) / 8."""
    codes = kernel**2 * outputs * -(-inputs // groups // subspace)
    return 4 * inputs // groups * codewords + codes * (codewords - 1).bit_length() / 8


class QCNNWeight(Quantizer):
    """Quantizer that replaces one layer's weights by codewords. All codes are zero until `encode` is called."""

    codebooks: Tensor
    codes: Tensor

    def __init__(self, weight: Tensor, subspace: int, codewords: int) -> None:
        super().__init__()
        self.subspace, self.codewords = subspace, codewords
        outputs, subspaces = weight.movedim(1, -1).shape[:-1], -(-weight.shape[1] // subspace)
        self.register_buffer("codebooks", weight.new_zeros(subspaces, min(codewords, outputs.numel()), subspace))
        self.register_buffer("codes", weight.new_zeros(*outputs, subspaces, dtype=torch.int16))

    def forward(self, w: Tensor) -> Tensor:
        """Return the weights, decoded from codes and codebooks. The latent weights get no gradient."""
        return decode(self.codebooks, self.codes, w.shape[1]).to(w.dtype)

    def encode(self, w: Tensor) -> None:
        """Compute the codebooks and codes by k-means on the weights w. This may take minutes."""
        self._set_codes(*product_codes(w, self.subspace, self.codewords))

    def correct(self, w: Tensor, inputs: Tensor, targets: Tensor) -> None:
        """Fit the codebooks and codes to the responses `targets`, as `error_corrected` does."""
        self._set_codes(*error_corrected(self.codebooks, self.codes, w, inputs, targets))

    def _set_codes(self, codebooks: Tensor, codes: Tensor) -> None:
        self.codebooks.copy_(codebooks)
        self.codes.copy_(codes)

    def grid(self, w: Tensor) -> Grid:
        """Return the allowed values, with one scale group per subspace. A group has the codewords of the subspace."""
        return Grid(self.codebooks, lambda t: subvectors(t, self.subspace).flatten(0, -3).transpose(0, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of the codes and codebooks. One code represents several weights."""
        bits = max(1, (self.codebooks.shape[1] - 1).bit_length())
        return Storage(self.codes.numel(), bits, 4 * self.codebooks.numel())


def patches(layer: QLayer, x: Tensor, limit: int) -> Tensor:
    """Return (N, G, P, Cs), the patches of a layer's input x from which N responses are computed. N is about `limit`.

    G is the number of groups of the layer, and P is the number of positions of its kernel. The
    responses are evenly sampled. The function `responses` samples the same positions.
    """
    if not isinstance(layer, nn.Conv2d):
        return _spread(x.flatten(0, -2), limit)[:, None, None]
    # pad as the layer does; `reach` is the extent of the dilated kernel minus one
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if isinstance(layer.padding, str):
        vertical, horizontal = ((r // 2, r - r // 2) if layer.padding == "same" else (0, 0) for r in reach)
    else:
        vertical, horizontal = ((p, p) for p in layer.padding)
    x = F.pad(x, (*horizontal, *vertical))
    # a view of all windows: (N, H, W, kh, kw, G Cs)
    x = x.unfold(2, reach[0] + 1, layer.stride[0]).unfold(3, reach[1] + 1, layer.stride[1])
    windows = x[..., :: layer.dilation[0], :: layer.dilation[1]].movedim(1, -1)
    # copy only the sampled windows
    positions = _spread(torch.arange(windows.shape[:3].numel(), device=x.device), limit)
    sampled = windows[torch.unravel_index(positions, windows.shape[:3])]
    return sampled.reshape(len(sampled), -1, layer.groups, sampled.shape[-1] // layer.groups).transpose(1, 2)


def responses(layer: QLayer, y: Tensor, limit: int) -> Tensor:
    """Return (N, Ct), evenly sampled responses of a layer's output y, without the bias. N is about `limit`."""
    rows = _spread((y.movedim(1, -1) if isinstance(layer, nn.Conv2d) else y).flatten(0, -2), limit)
    return rows if layer.bias is None else rows - layer.bias


def _spread(rows: Tensor, limit: int) -> Tensor:
    """Return at most `limit` of the rows, evenly sampled."""
    return rows[:: -(-len(rows) // limit) | 1]  # an odd step takes different columns from each image


@torch.no_grad()
def _sample_outputs(model: nn.Module, probe: Probe, layers: dict[str, QLayer], sample: Sampler) -> dict[str, Tensor]:
    """Return samples of the modules' outputs on the probe images, in the order in which the modules run.

    Args:
        layers: maps the name of a module to a layer. The layer is this module or contains it.
    """
    outputs: dict[str, list[Tensor]] = {}
    limit = -(-MAX_RESPONSES // len(probe.batches))
    with eval_mode_keeping_rng(model), recorded_calls(model, list(layers)) as calls:
        for images, _ in probe.batches:
            model(images)
            for name, _, y in calls:
                outputs.setdefault(name, []).append(sample(layers[name], y, limit))
            calls.clear()  # frees the recorded tensors of this batch
    return {name: torch.cat(parts) for name, parts in outputs.items()}


def encode(model: nn.Module, probe: Probe, correct: bool) -> None:
    """Encode the weights of all layers. If `correct` is true, also fit the codes to the float network's responses."""
    layers: dict[str, QLayer] = {}
    sites: dict[str, QCNNWeight] = {}
    for name, layer in quantized_layers(model).items():
        if isinstance(layer.weight_q, QCNNWeight):
            layers[name], sites[name] = layer, layer.weight_q
            layer.weight_q.encode(layer.weight)  # the weights may have been loaded after the quantizer was created
    if not correct:
        return
    # targets: the responses of the float network
    with float_mode(model):
        targets = _sample_outputs(model, probe, layers, responses)
    # in execution order: a layer's inputs come from layers that are already quantized and corrected
    for name, target in targets.items():
        source = f"{name}.input_q"
        inputs = _sample_outputs(model, probe, {source: layers[name]}, patches)[source]
        sites[name].correct(layers[name].weight, inputs, target)


def _codewords(bits: int, subspace: int, codewords: int, prefix: str) -> int:
    """Return the number of codewords K of a layer.

    Raises:
        Unsupported: a code would have more than `CODE_BITS` bits, or the number `codewords` does
            not fit the width.
    """
    if not codewords and bits * subspace > CODE_BITS:
        raise Unsupported(
            f"bits.w={bits}: a code for {subspace} weights would have {bits * subspace} bits; the maximum is "
            f"{CODE_BITS}\ntype method.{prefix}subspace={CODE_BITS // bits} or less"
        )
    if codewords and bits != (width := -(-(codewords - 1).bit_length() // subspace)):
        fix = f"type bits.w={width}, or method.{prefix}codewords=0 for the maximum that bits.w allows"
        raise Unsupported(f"bits.w={bits}: {codewords} codewords of {subspace} weights each need bits.w={width}; {fix}")
    return codewords or 2 ** (bits * subspace)


def unused_options(model: nn.Module) -> dict[str, str]:
    """Return the options for convolutions or linear layers if the network has no such quantized layer."""
    layers = [layer for layer in quantized_layers(model).values() if layer.bits.w < FLOAT]
    linear = [isinstance(layer, nn.Linear) for layer in layers]
    unused: dict[str, str] = {}
    if all(linear):
        unused |= dict.fromkeys(("subspace", "codewords"), "no convolution is quantized")
    if not any(linear):
        unused |= dict.fromkeys(("fc_subspace", "fc_codewords"), "no linear layer is quantized")
    return unused


def build(
    *,
    w: int = 1,
    subspace: int = 4,
    codewords: int = 0,
    fc_subspace: int = 4,
    fc_codewords: int = 0,
    error_correction: bool = True,
) -> Method:
    """Return the `Method` for Q-CNN. The method card (module docstring) explains the options.

    Args:
        subspace, codewords: for convolutions, the number of input channels per subspace (Cs') and
            of codewords per codebook (K). If `codewords` is 0, K is the largest number that the
            width allows.
        fc_subspace, fc_codewords: the same numbers for linear layers.
        error_correction: true fits the codes to the responses. False keeps the codes of k-means.
    """
    options = {"subspace": subspace, "fc_subspace": fc_subspace, "codewords": codewords, "fc_codewords": fc_codewords}
    for key, value in options.items():
        if key.endswith("subspace") and value < 1:
            raise ValueError(f"{key}={value}: must be 1 or more")
        if key.endswith("codewords") and value and not 2 <= value <= 2**CODE_BITS:
            raise ValueError(f"{key}={value}: must be 2 to {2**CODE_BITS}, or 0 for the maximum that bits.w allows")

    def weight(name: str, layer: FloatLayer, bits: int) -> QCNNWeight:
        check_kind("qcnn", name, layer)
        prefix = "fc_" if isinstance(layer, nn.Linear) else ""
        size, count = options[f"{prefix}subspace"], options[f"{prefix}codewords"]
        quantizer = QCNNWeight(layer.weight, size, _codewords(bits, size, count, prefix))
        layer.weight.requires_grad_(False)  # set here, because this function also runs when training is resumed
        return quantizer

    return Method(
        name="qcnn",
        bits=Bits(w),
        supported_bits={"w": (*range(1, 9), FLOAT)},
        weight=weight,
        unused_options=unused_options,
        prepare=lambda model, probe: encode(model, probe, error_correction),
    )
