"""Test Q-CNN: codes by hand and by definition, correction against explicit responses, published sizes and speeds."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import numpy as np
import oracle_qcnn as oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.data import digits
from qbench.data.loader import Loader
from qbench.methods import qcnn
from qbench.models import resnet
from qbench.quant import product_quantization as product
from qbench.quant.graph import eval_mode_keeping_rng, recorded_calls
from qbench.quant.install import install
from qbench.quant.layers import QLayer, effective_weight, float_mode, quantized_layers
from qbench.quant.method import Method, Unsupported
from qbench.quant.policy import Policy
from qbench.quant.probe import Probe
from qbench.quant.verify import verify

Quantize = Callable[[Tensor, int, int], Tensor]
ALL = Policy(first="same", last="same")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Codes


def sub_vectors(w: np.ndarray, subspace: int) -> list[np.ndarray]:
    """Return for each subspace of the input channels the sub-vectors of all outputs and kernel positions."""
    channels = -(-w.shape[1] // subspace) * subspace
    padded = np.zeros((w.shape[0], channels, *w.shape[2:]))
    padded[:, : w.shape[1]] = w
    blocks = np.split(padded, channels // subspace, 1)
    return [np.moveaxis(block, 1, -1).reshape(-1, subspace) for block in blocks]


def check_codes(quantize: Quantize) -> None:
    """Every sub-vector becomes the nearest of at most K codewords; a codeword is the mean of its sub-vectors."""
    for shape, subspace, codewords in [((12, 8), 4, 4), ((10, 6, 3, 3), 2, 8), ((10, 5, 2, 3), 4, 4), ((40, 3), 1, 5)]:
        w = random(*shape)
        out = quantize(w, subspace, codewords)
        assert out.shape == w.shape
        for before, after in zip(sub_vectors(w.numpy(), subspace), sub_vectors(out.numpy(), subspace), strict=True):
            words, codes = np.unique(after, axis=0, return_inverse=True)
            assert len(words) == codewords
            for k, word in enumerate(words):
                np.testing.assert_allclose(before[codes.ravel() == k].mean(0), word, atol=1e-12)
            distance = ((before[:, None] - words) ** 2).sum(-1)
            np.testing.assert_array_equal(distance.argmin(1), codes.ravel())


def test_the_codes_are_those_of_k_means() -> None:
    check_codes(qcnn.product_quantize)


def along_outputs(w: Tensor, subspace: int, codewords: int) -> Tensor:
    return qcnn.product_quantize(w.transpose(0, 1), subspace, codewords).transpose(0, 1)


def book_per_position(w: Tensor, subspace: int, codewords: int) -> Tensor:
    flat = w.flatten(2).unbind(2) if w.dim() > 2 else [w]
    return torch.stack([qcnn.product_quantize(v, subspace, codewords) for v in flat], 2).reshape(w.shape)


def one_book(w: Tensor, subspace: int, codewords: int) -> Tensor:
    rows = product.subvectors(w, subspace)
    vectors = qcnn.product_quantize(rows.reshape(-1, subspace), subspace, codewords).reshape(rows.shape)
    return vectors.flatten(-2)[..., : w.shape[1]].movedim(-1, 1)


def scalars(w: Tensor, subspace: int, codewords: int) -> Tensor:
    return qcnn.product_quantize(w, 1, codewords)


def first_as_codewords(w: Tensor, subspace: int, codewords: int) -> Tensor:
    rows = product.subvectors(w, subspace)
    books = rows.flatten(0, -3).transpose(0, 1)[:, :codewords]
    return product.decode(books, (rows.unsqueeze(-2) - books).square().sum(-1).argmin(-1), w.shape[1])


@pytest.mark.parametrize("mutant", [along_outputs, book_per_position, one_book, scalars, first_as_codewords])
def test_the_check_rejects_wrong_codes(mutant: Quantize) -> None:
    with pytest.raises(AssertionError):
        check_codes(mutant)


def test_the_codes_are_those_computed_by_hand() -> None:
    w = torch.tensor([[0.0, 0, 5], [0, 2, 5], [10, 0, 7], [10, 2, 7]])
    near = [[0.0, 1, 5], [0, 1, 5], [10, 1, 7], [10, 1, 7]]
    assert qcnn.product_quantize(w, 2, 2).tolist() == near, "means of the two pairs; the third channel is padded"
    books, codes = qcnn.product_codes(w, 2, 2)
    assert sorted(books[0].tolist()) == [[0, 1], [10, 1]]
    assert sorted(books[1].tolist()) == [[5, 0], [7, 0]], "zeros after the last channel"
    assert codes.shape == (4, 2)
    conv = w.reshape(2, 2, 3, 1).movedim(2, 1)  # the four rows as outputs and positions
    assert torch.equal(qcnn.product_quantize(conv, 2, 2).movedim(1, 2).reshape(4, 3), torch.tensor(near))
    assert qcnn.product_codes(conv, 2, 2)[1].shape == (2, 2, 1, 2)


def test_sub_vectors_fewer_than_codewords_stay_the_same() -> None:
    w = torch.tensor([[1.0, 2.0, 7.0], [3.0, 4.0, 7.0], [1.0, 2.0, 8.0]])
    books, codes = qcnn.product_codes(w, 1, 16)
    assert books.shape == (3, 3, 1)
    assert books.isnan().sum() == 3, "two distinct values in each column"
    assert torch.equal(qcnn.product_quantize(w, 1, 16), w)
    assert int(codes.max()) == 1


def test_the_function_keeps_its_input_dtype_and_random_state() -> None:
    w = random(6, 4, 3, 3)
    copied, state = w.clone(), torch.get_rng_state()
    out = qcnn.product_quantize(w, 2, 4)
    assert out.dtype == torch.float64
    assert torch.equal(w, copied)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(qcnn.product_quantize(w, 2, 4), out), "codes depend on the weights alone"
    half = qcnn.product_quantize(w.half(), 2, 4)
    assert half.dtype == torch.float16
    assert torch.equal(half, qcnn.product_quantize(w.half().float(), 2, 4).half())


# Correction


def task(groups: int, kernel: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return codebooks, codes, weights (6, 5, kernel, 1), inputs and targets; 5 channels, 3 subspaces of 2."""
    w = random(6, 5, kernel, 1, seed=1)
    books, codes = qcnn.product_codes(w, 2, 3)
    inputs = random(40, groups, kernel, 5, seed=2) + random(40, 1, 1, 1, seed=3)
    targets = torch.einsum("ngpc,gtcp->ngt", inputs, w.reshape(groups, -1, 5, kernel)).flatten(1)
    return books, codes, w, inputs + 0.2 * random(*inputs.shape, seed=4), targets


Correct = Callable[..., tuple[Tensor, Tensor]]


def check_correction(correct: Correct) -> None:
    for groups, kernel, ridge in [(1, 1, 0.1), (1, 4, 0.1), (2, 3, 0.01)]:
        books, codes, w, inputs, targets = task(groups, kernel)
        copies = [t.clone() for t in (books, codes, w, inputs, targets)]
        corrected, chosen = correct(books, codes, w, inputs, targets, ridge)
        assert all(torch.equal(a, b) for a, b in zip(copies, (books, codes, w, inputs, targets), strict=True))
        expected, best, errors = oracle.correct(
            books.numpy(),
            codes.reshape(6, kernel, 3).numpy(),
            product.subvectors(w, 2).reshape(6, kernel, 3, 2).numpy(),
            product.subvectors(inputs.flatten(0, 2), 2).reshape(40, groups, kernel, 6).numpy(),
            targets.numpy(),
            ridge * 6 / 5,  # the reference averages over 6 channels, of which one is padding
            product.SWEEPS,
        )
        assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors)), "the error never rises"
        assert errors[-1] < 0.95 * errors[0]
        np.testing.assert_array_equal(chosen.reshape(best.shape), best)
        np.testing.assert_allclose(corrected, expected, atol=1e-8)
        assert (corrected[2, :, 1] == 0).all(), "the padded channel stays zero"


def test_the_correction_is_block_coordinate_descent() -> None:
    check_correction(qcnn.error_corrected)


def none_at_all(books: Tensor, codes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return books, codes


def codebooks_only(books: Tensor, codes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return product.error_corrected(books, codes, *rest)[0], codes


def of_weights(books: Tensor, codes: Tensor, w: Tensor, inputs: Tensor, targets: Tensor, ridge: float) -> Any:
    return product.error_corrected(books, codes, w, inputs, targets, 1e6)


def one_group(books: Tensor, codes: Tensor, w: Tensor, inputs: Tensor, targets: Tensor, ridge: float) -> Any:
    return product.error_corrected(books, codes, w, inputs[:, :1].expand_as(inputs), targets, ridge)


@pytest.mark.parametrize("mutant", [none_at_all, codebooks_only, of_weights, one_group])
def test_the_check_rejects_wrong_corrections(mutant: Correct) -> None:
    with pytest.raises(AssertionError):
        check_correction(mutant)


def test_the_correction_leaves_unused_codewords_unused() -> None:
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]], dtype=torch.float64)
    books, codes = qcnn.product_codes(w, 2, 8)
    x = random(20, 1, 1, 2)
    corrected, chosen = qcnn.error_corrected(books, codes, w, x, x.flatten(1) @ w.T)
    torch.testing.assert_close(product.decode(corrected, chosen, 2), w)
    assert torch.equal(corrected.isnan(), books.isnan())


LAYERS = [
    (nn.Conv2d(4, 6, 3, 1, 1), (2, 4, 5, 7)),
    (nn.Conv2d(4, 6, (3, 2), (2, 1), (0, 1), dilation=(1, 2), groups=2), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 4), padding="same", dilation=2, bias=False), (2, 4, 6, 7)),
    (nn.Conv2d(4, 4, 3, 2, "valid", groups=4), (3, 4, 7, 7)),
    (nn.Linear(4, 6), (5, 4)),
    (nn.Linear(4, 6, bias=False), (5, 3, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
@pytest.mark.parametrize("limit", [10_000, 9])
def test_the_patches_are_the_inputs_of_the_responses(layer: nn.Module, shape: tuple[int, ...], limit: int) -> None:
    layer = copy.deepcopy(layer).double()
    x, one = random(*shape), cast(QLayer, layer)
    with torch.no_grad():
        inputs, wanted = qcnn.patches(one, x, limit), qcnn.responses(one, layer(x), limit)
        w = product.subvectors(one.weight, 1).reshape(inputs.shape[1], -1, *inputs.shape[2:])
        torch.testing.assert_close(torch.einsum("ngpc,gtpc->ngt", inputs, w).flatten(1), wanted)
    assert len(inputs) <= limit


def trained_network() -> tuple[nn.Module, Tensor]:
    """Return a small network after two epochs on digits, and its training images."""
    loader = Loader(digits.build(), 64, 0, torch.device("cpu"))
    torch.manual_seed(0)
    model = resnet.build((1, 8, 8), 10, depth=8, width=8, stem_stride=1, form="pre", shortcut="B", norm="affine")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(2):
        for x, y in loader.train(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval(), torch.cat([x for x, _ in loader.unaugmented("train")])


def response_errors(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return each quantized layer's relative squared error against the response of the float network."""
    names = list(quantized_layers(model))
    with torch.no_grad(), eval_mode_keeping_rng(model), recorded_calls(model, names) as calls:
        model(images)
        quantized = {name: y for name, _, y in calls}
        calls.clear()
        with float_mode(model):
            model(images)
        wanted = {name: y for name, _, y in calls}
    return {n: ((quantized[n] - wanted[n]).square().sum() / wanted[n].square().sum()).item() for n in names}


def test_the_correction_lowers_the_response_errors_on_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    float_model, images = trained_network()
    other_images = images[512:1024]
    probe = Probe([(images[:256], torch.zeros(256))], F.cross_entropy)
    errors, calls = {}, []

    def spy(books: Tensor, codes: Tensor, w: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        calls.append((w, inputs, targets))
        return product.error_corrected(books, codes, w, inputs, targets)

    monkeypatch.setattr(qcnn, "error_corrected", spy)
    for correction in (False, True):
        method = qcnn.build(error_correction=correction)
        model = install(method, copy.deepcopy(float_model))
        assert method.prepare is not None
        method.prepare(model, probe)
        errors[correction] = response_errors(model, other_images)
        assert all(layer["w"].found == 16 for layer in verify(model, other_images[:64]).values())
    assert all(errors[True][name] < 0.6 * errors[False][name] for name in errors[True]), errors
    # Each layer gets its float response, and its input after the layers quantized before.
    order = [
        n for n, _ in sorted(quantized_layers(model).items(), key=lambda item: execution_index(model, images, item[0]))
    ]
    assert len(calls) == len(order) == 8
    for name, (w, inputs, targets) in zip(order, calls, strict=True):
        layer = quantized_layers(model)[name]
        assert w is layer.weight
        x, _ = probe.responses(model, name)
        limit = qcnn.MAX_RESPONSES
        torch.testing.assert_close(inputs, qcnn.patches(layer, x, limit), msg=name)
        with float_mode(model):
            float_x, y = probe.responses(model, name)
        torch.testing.assert_close(targets, qcnn.responses(layer, y, limit), msg=name)
        assert name in order[:2] or not torch.allclose(x, float_x), "its inputs contain the errors of earlier layers"


def execution_index(model: nn.Module, images: Tensor, name: str) -> int:
    names = list(quantized_layers(model))
    with torch.no_grad(), eval_mode_keeping_rng(model), recorded_calls(model, names) as calls:
        model(images[:2])
    return [n for n, _, _ in calls].index(name)


def prepared(method: Method, net: nn.Module, policy: Policy | None = None) -> nn.Module:
    """Return a network whose weights are the codes of k-means."""
    model = install(method, net, policy)
    qcnn.encode(model, Probe([], F.cross_entropy), correct=False)
    return model


def test_installing_computes_no_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, dtypes, bytes and the shape of the grid are those after `prepare`, also with few weights."""

    def reject(*_: Any) -> None:
        raise AssertionError("k-means while installing")

    net = nn.Sequential(nn.Conv2d(5, 4, (3, 2)), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(6, 40), nn.Linear(40, 3))
    method = qcnn.build(w=2, subspace=3, fc_subspace=2)
    with monkeypatch.context() as patch:
        patch.setattr(qcnn, "product_codes", reject)
        fresh = install(method, copy.deepcopy(net), ALL)
    model = prepared(method, copy.deepcopy(net), ALL)
    for one, other in zip(quantized_layers(fresh).values(), quantized_layers(model).values(), strict=True):
        early, late = (cast(qcnn.QCNNWeight, layer.weight_q) for layer in (one, other))
        for key, tensor in late.state_dict().items():
            assert (early.state_dict()[key].shape, early.state_dict()[key].dtype) == (tensor.shape, tensor.dtype)
        assert early.bytes(one.weight) == late.bytes(other.weight)
        assert early.grid(one.weight).points.shape == late.grid(other.weight).points.shape
        assert not effective_weight(one).any()
    fresh.load_state_dict(model.state_dict())
    for one, other in zip(quantized_layers(fresh).values(), quantized_layers(model).values(), strict=True):
        assert torch.equal(effective_weight(one), effective_weight(other))


def test_the_codes_stay_fixed_and_the_rest_trains() -> None:
    torch.manual_seed(0)
    model = prepared(qcnn.build(subspace=2), resnet.build((1, 8, 8), 10, depth=8, width=4, norm="affine"))
    layers = quantized_layers(model)
    before = {name: effective_weight(layer).clone() for name, layer in layers.items()}
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    latent = {f"{name}.weight" for name in layers}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == latent
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8)).backward()
        optimizer.step()
    assert all(torch.equal(effective_weight(layer), before[name]) for name, layer in layers.items())
    for name, p in model.named_parameters():
        assert torch.equal(p, state[name]) == (name in latent), name


def test_prepare_uses_weights_loaded_after_installing() -> None:
    torch.manual_seed(0)
    method, net = qcnn.build(error_correction=False), nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    model = install(method, copy.deepcopy(net), ALL)
    with torch.no_grad():
        cast(Tensor, model[0].weight).copy_(random(6, 8))  # type: ignore[index]
    assert method.prepare is not None
    method.prepare(model, Probe([(torch.randn(4, 8), torch.zeros(4))], F.cross_entropy))
    layer = quantized_layers(model)["0"]
    assert torch.equal(effective_weight(layer), qcnn.product_quantize(layer.weight.detach(), 4, 16))


# Bits, bytes, operations

ALEXNET = [(227, 3, 55, 96, 11, 1), (27, 96, 27, 256, 5, 2), (13, 256, 13, 384, 3, 1), (13, 384, 13, 384, 3, 2),
           (13, 384, 13, 256, 3, 2)]  # fmt: skip
ALEXNET_FC = [(9216, 4096), (4096, 4096), (4096, 1000)]
VGG16 = [(224, 3, 64), (224, 64, 64), (112, 64, 128), (112, 128, 128), (56, 128, 256), (56, 256, 256), (56, 256, 256),
         (28, 256, 512), (28, 512, 512), (28, 512, 512), (14, 512, 512), (14, 512, 512), (14, 512, 512)]  # fmt: skip
VGG16_FC = [(25088, 4096), (4096, 4096), (4096, 1000)]


def conv_operations(subspace: int, codewords: int) -> tuple[int, int]:
    whole = quantized = 0
    for size_in, inputs, size_out, outputs, kernel, groups in ALEXNET:
        whole += size_out**2 * outputs * kernel**2 * inputs // groups
        quantized += qcnn.conv_flops(inputs, outputs, kernel, size_in, size_out, subspace, codewords, groups)
    return whole, quantized


@pytest.mark.parametrize(
    ("subspace", "codewords", "speedup"), [(4, 64, 3.32), (6, 64, 4.32), (6, 128, 3.71), (8, 128, 4.27)]
)
def test_the_speedups_of_convolutions_are_the_published_ones(subspace: int, codewords: int, speedup: float) -> None:
    """AlexNet, convolutions alone."""
    whole, quantized = conv_operations(subspace, codewords)
    assert round(whole / quantized, 2) == speedup


@pytest.mark.parametrize(("size", "speedup", "megabytes"), [((3, 32), 4.05, 16.03), ((4, 32), 4.16, 13.19)])
def test_the_speedups_and_sizes_of_alexnet_are_the_published_ones(
    size: tuple[int, int], speedup: float, megabytes: float
) -> None:
    """Convolutions 8/128, the last layer 1/16, biases float."""
    sizes = (size, size, (1, 16))
    whole, quantized = conv_operations(8, 128)
    whole += sum(inputs * outputs for inputs, outputs in ALEXNET_FC)
    quantized += sum(qcnn.fc_flops(*layer, *one) for layer, one in zip(ALEXNET_FC, sizes, strict=True))
    assert round(whole / quantized, 2) == speedup
    total = sum(qcnn.conv_bytes(layer[1], layer[3], layer[4], 8, 128, layer[5]) for layer in ALEXNET)
    total += sum(qcnn.fc_bytes(*layer, *one) for layer, one in zip(ALEXNET_FC, sizes, strict=True))
    biases = 4 * (sum(layer[3] for layer in ALEXNET) + sum(outputs for _, outputs in ALEXNET_FC))
    assert round((total + biases) / 1e6, 2) == megabytes
    wrong = qcnn.fc_flops(4096, 1000, *size)
    assert wrong != qcnn.fc_flops(4096, 1000, 1, 16), "the last layer has its own Cs' and K"


@pytest.mark.parametrize(("size", "speedup", "megabytes"), [((3, 32), 4.05, 35.1), ((4, 32), 4.06, 28.8)])
def test_the_speedups_and_sizes_of_vgg16_are_the_published_ones(
    size: tuple[int, int], speedup: float, megabytes: float
) -> None:
    """Convolutions 6/128."""
    sizes = (size, size, (1, 16))
    whole = sum(9 * n**2 * inputs * outputs for n, inputs, outputs in VGG16) + sum(i * o for i, o in VGG16_FC)
    quantized = sum(qcnn.conv_flops(inputs, outputs, 3, n, n, 6, 128) for n, inputs, outputs in VGG16)
    quantized += sum(qcnn.fc_flops(*layer, *one) for layer, one in zip(VGG16_FC, sizes, strict=True))
    assert round(whole / quantized, 2) == speedup
    total = sum(qcnn.conv_bytes(inputs, outputs, 3, 6, 128) for _, inputs, outputs in VGG16)
    total += sum(qcnn.fc_bytes(*layer, *one) for layer, one in zip(VGG16_FC, sizes, strict=True))
    biases = 4 * (sum(layer[2] for layer in VGG16) + sum(outputs for _, outputs in VGG16_FC))
    assert round((total + biases) / 1e6, 1) == megabytes


@pytest.mark.parametrize("layer", [nn.Conv2d(16, 32, 3, groups=2), nn.Linear(16, 40)])
def test_the_stored_bytes_are_those_of_the_formula(layer: nn.Conv2d | nn.Linear) -> None:
    site = qcnn.QCNNWeight(layer.weight.detach(), 4, 16)
    if isinstance(layer, nn.Conv2d):
        expected = qcnn.conv_bytes(16, 32, 3, 4, 16, 2)
        assert expected == 4 * 8 * 16 + 9 * 32 * 2 * 4 / 8
    else:
        expected = qcnn.fc_bytes(16, 40, 4, 16)
        assert expected == 4 * 16 * 16 + 40 * 4 * 4 / 8
    assert site.bytes(layer.weight).ideal == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w": 3}, r"(?s)bits\.w=3.*method\.subspace=3 or less"),
        ({"w": 8, "subspace": 2}, r"(?s)bits\.w=8.*method\.subspace=1 or less"),
        ({"w": 1, "codewords": 64}, r"bits\.w=1: 64 codewords .* type bits\.w=2"),
        ({"w": 1, "fc_codewords": 32}, r"bits\.w=1: 32 codewords .* type bits\.w=2, or method\.fc_codewords=0"),
    ],
)
def test_widths_that_disagree_with_the_codes_are_unsupported(options: dict[str, int], message: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(Unsupported, match=message):
        install(qcnn.build(**options), net)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("w", "subspace", "codewords", "count"),
    [(1, 4, 0, 16), (2, 4, 0, 256), (1, 8, 128, 128), (2, 4, 32, 32), (2, 3, 32, 32), (4, 1, 16, 16), (4, 1, 0, 16)],
)
def test_the_nominal_widths_of_codes(w: int, subspace: int, codewords: int, count: int) -> None:
    """The paper's 8/128 is 1 bit per weight, 4/32 and 3/32 are 2, 1/16 is 4."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(24, 400), nn.Linear(4, 4))
    model = prepared(qcnn.build(w=w, fc_subspace=subspace, fc_codewords=codewords), net)
    site = quantized_layers(model)["1"].weight_q
    assert isinstance(site, qcnn.QCNNWeight)
    assert site.codebooks.shape == (24 // subspace, count, subspace)
    assert int(site.codes.max()) == count - 1


@pytest.mark.parametrize(
    "options", [{"subspace": 0}, {"fc_subspace": -1}, {"codewords": 1}, {"fc_codewords": 2048}, {"codewords": -4}]
)
def test_invalid_options_raise(options: dict[str, int]) -> None:
    (key,) = options
    with pytest.raises(ValueError, match=rf"{key}=.*must be"):
        qcnn.build(**options)  # type: ignore[arg-type]
