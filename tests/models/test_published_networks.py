"""Test the papers' networks: sizes, order of layers, torchvision's names, and methods applied to them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, Configure
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.config import registry
from qbench.config.identity import run_identity
from qbench.cost.count import count_macs
from qbench.methods import dorefa, hwgq, xnor
from qbench.models import (
    dorefa_alexnet,
    dorefa_resnet,
    dorefa_svhn,
    gupta,
    hwgq_alexnet,
    hwgq_resnet,
    imagenet_resnet,
    polino,
    resnet,
    wide_resnet,
)
from qbench.models import torchvision as zoo
from qbench.quant.install import install
from qbench.quant.layers import BypassedActivation, quantized_layers
from qbench.quant.method import Unsupported
from qbench.quant.policy import Policy, quantizable
from qbench.system import torchvision as vision

Shape = tuple[int, int, int]
Build = Callable[..., nn.Module]
CONF = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "conf" / "model").glob("*.yaml"))}
CIFAR, MNIST, SVHN, IMAGENET, CAFFE = (3, 32, 32), (1, 28, 28), (3, 40, 40), (3, 224, 224), (3, 227, 227)

THIN: dict[str, tuple[Build, Shape, dict[str, Any]]] = {
    "svhn": (dorefa_svhn.build, SVHN, {"width": 2}),
    "svhn clip": (dorefa_svhn.build, (3, 44, 37), {"width": 1, "last_act": "clip"}),
    "dorefa_alexnet": (dorefa_alexnet.build, (3, 44, 61), {"width_mult": 0.05}),
    "dorefa_resnet18": (dorefa_resnet.build, (3, 33, 32), {"width": 4}),
    "hwgq_alexnet": (hwgq_alexnet.build, (3, 39, 43), {"width_mult": 0.05}),
    "hwgq_resnet18": (hwgq_resnet.build, (3, 33, 30), {"width": 4}),
    "hwgq_resnet50": (hwgq_resnet.build, CIFAR, {"width": 4, "depth": 50}),
    "resnet18": (imagenet_resnet.build, (3, 33, 30), {"width": 4}),
    "resnet50": (imagenet_resnet.build, CIFAR, {"width": 4, "depth": 50}),
    "preresnet18": (imagenet_resnet.build, (3, 33, 30), {"width": 4, "form": "pre"}),
    "preresnet50": (imagenet_resnet.build, CIFAR, {"width": 4, "depth": 50, "form": "pre"}),
    "gupta_mlp": (gupta.build, MNIST, {"hidden": (20, 20), "std": 0.1}),
    "gupta_mnist": (gupta.build, MNIST, {"convs": (4, 8), "hidden": (16,), "std": 0.1}),
    "gupta_cifar": (gupta.build, (3, 31, 33), {"convs": (8, 8, 8), "hidden": (), "pad": 2, "pool": 3, "std": 0.1}),
    "polino": (polino.build, (3, 17, 18), {"convs": (8, 6, 6, 4), "hidden": (20,)}),
    "wrn": (wide_resnet.build, (3, 18, 17), {"depth": 10, "widen": 1}),
}
NORMED = [name for name in THIN if not name.startswith("gupta")]
FED = [name for name in THIN if name not in ("polino", "resnet18", "resnet50", "wrn")]
"""Networks in which every layer but the first reads an activation that feeds such layers only."""


def thin_network(name: str, **options: object) -> nn.Module:
    build, shape, fixed = THIN[name]
    torch.manual_seed(0)
    return build(shape, 5, **fixed | options)


def images(name: str, count: int = 4) -> Tensor:
    return torch.randn(count, *THIN[name][1], generator=torch.Generator().manual_seed(1))


def build_from_conf(name: str, shape: Shape, classes: int, **options: object) -> nn.Module:
    """Build the network of a file of conf/model on the meta device, which takes no memory."""
    node = {k: v for k, v in (CONF[name] | options).items() if v != "auto" and k != "act"}
    with torch.device("meta"):
        return registry.create("model", node, shape=shape, classes=classes)  # type: ignore[no-any-return]


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Sizes


@pytest.mark.parametrize(
    ("name", "parameters", "millions", "share"),
    [("a", 2_082_378, 41.7, 0.11), ("b", 523_306, 11.6, 0.20), ("c", 132_186, 3.48, 0.34), ("d", 33_730, 1.16, 0.50)],
)
def test_the_svhn_models_have_the_sizes_of_the_script(
    name: str, parameters: int, millions: float, share: float
) -> None:
    """Counted from the authors' script: parameters, multiply-adds (83.5 MFLOP in A), share of the float layers."""
    model = build_from_conf(f"svhn_{name}", SVHN, 10)
    macs = count_macs(model, SVHN)
    assert count_parameters(model) == parameters
    assert sum(macs.values()) / 1e6 == pytest.approx(millions, rel=0.003)
    assert (macs["conv0"] + macs["fc1"]) / sum(macs.values()) == pytest.approx(share, abs=0.005)
    if name == "a":
        assert 2 * sum(macs.values()) / 1e6 == pytest.approx(83.5, abs=0.05)


def test_the_alexnet_of_dorefa_has_the_size_of_the_script() -> None:
    """60,985,416 parameters as in the log of tensorpack's issue 810; map sizes 54, 27, 14, 6 as in the script."""
    model = build_from_conf("dorefa_alexnet", IMAGENET, 1000)
    assert count_parameters(model) == 60_985_416
    macs = count_macs(model, IMAGENET)
    assert macs["conv0"] == 54**2 * 96 * 3 * 12**2
    assert macs["conv1"] == 54**2 * 256 * 48 * 5**2
    assert macs["conv2"] == 27**2 * 384 * 256 * 3**2
    assert macs["conv4"] == 14**2 * 256 * 192 * 3**2
    assert macs["fc0"] == 6**2 * 256 * 4096


def test_the_resnet18_of_dorefa_is_that_of_tensorpacks_script() -> None:
    """Parameters by hand; averages before BN; a projection in the first block, as the script's loaded weights have."""
    model = build_from_conf("dorefa_resnet18", IMAGENET, 1000)
    convs = 64 * 3 * 49 + 64 + sum(n * m * k * k for n, m, k in (
        *[(64, 64, 3)] * 4, (64, 64, 1), (128, 64, 3), *[(128, 128, 3)] * 3, (128, 64, 1), (256, 128, 3),
        *[(256, 256, 3)] * 3, (256, 128, 1), (512, 256, 3), *[(512, 512, 3)] * 3, (512, 256, 1),
    ))  # fmt: skip
    norms = 2 * (4 * 64 + (64 + 3 * 128) + (128 + 3 * 256) + (256 + 3 * 512) + 512)
    assert sum(p.numel() for p in model.parameters()) == convs + norms + 512 * 1000 + 1000
    with torch.device("meta"):
        sizes = [torch.empty(1, 3, 224, 224)]
    assert model(sizes[0]).shape == (1, 1000)
    thin = dorefa_resnet.build((3, 64, 64), 5, width=2).eval()
    x = torch.rand(1, 3, 64, 64)
    stem = thin.conv1(F.pad(x, (3, 2, 3, 2)))  # type: ignore[operator]
    assert stem.shape[2:] == (32, 32)
    edge = torch.cat([stem[..., :1, :], stem, stem[..., -1:, :]], 2)
    edge = torch.cat([edge[..., :1], edge, edge[..., -1:]], 3)
    seen: list[Tensor] = []
    block = thin.blocks[2]  # type: ignore[index]
    thin.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # type: ignore[index]
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block.bn1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    thin.fct.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        thin(x)
        assert torch.equal(seen[0], F.max_pool2d(edge, 3, 2))
        assert torch.equal(seen[2], F.avg_pool2d(seen[1], 2))
    assert seen[3].max() <= 49, "values in [0, 1], averaged, times 49"
    assert [b.downsample is not None for b in thin.blocks] == [True, False] * 4  # type: ignore[union-attr]


def test_the_alexnet_of_hwgq_has_the_size_of_the_prototxt() -> None:
    """By hand from the prototxt: eight layers, a bias in the last only, no scale or shift anywhere."""
    convs = 11**2 * 3 * 96 + 5**2 * 96 * 256 + 9 * (256 * 384 + 384 * 384 + 384 * 256)
    model = build_from_conf("hwgq_alexnet", CAFFE, 1000, norm="no_affine")
    assert count_parameters(model) == convs + 9216 * 4096 + 4096**2 + 4096 * 1000 + 1000 == 62_368_776
    with torch.device("meta"):
        assert (
            count_parameters(hwgq_alexnet.build(IMAGENET, 1000, norm="no_affine")) == 62_368_776
        )  # Caffe's max pooling rounds up


def test_the_resnet18_of_hwgq_has_the_size_of_the_prototxt() -> None:
    """torchvision's 11,689,512 less 9,600 of BN, plus conv1's bias, plus scale and shift before the eight sums."""
    ends = 2 * (2 * (64 + 128 + 256 + 512) + 128 + 256 + 512)
    assert (
        count_parameters(build_from_conf("hwgq_resnet18", IMAGENET, 1000, norm="no_affine"))
        == 11_689_512 - 9_600 + 64 + ends
    )


@pytest.mark.parametrize(("name", "parameters"), [("18", 11_689_512), ("34", 21_797_672), ("50", 25_557_032)])
def test_the_imagenet_resnets_have_the_sizes_of_torchvision(name: str, parameters: int) -> None:
    """Parameters as in torchvision's documentation; both forms have the same convolutions."""
    post, pre = (build_from_conf(f"resnet{name}", IMAGENET, 1000, form=form) for form in ("post", "pre"))
    assert count_parameters(post) == parameters
    convs = [sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)) for model in (post, pre)]
    assert convs[0] == convs[1]
    assert sum(count_macs(post, IMAGENET).values()) == sum(count_macs(pre, IMAGENET).values())


def test_the_multiply_adds_are_those_of_torchvisions_documentation() -> None:
    """The GFLOPS of torchvision's tables are multiply-adds: ResNets 1.81, 3.66, 4.09; MobileNetV2 0.30, ..."""
    expected = {"resnet18": 1.81, "resnet34": 3.66, "resnet50": 4.09, "mobilenet_v2_imagenet": 0.30, "vgg16": 15.47}
    for name, giga in (expected | {"alexnet": 0.71, "googlenet": 1.50}).items():
        macs = sum(count_macs(build_from_conf(name, IMAGENET, 1000), IMAGENET).values())
        assert macs / 1e9 == pytest.approx(giga, abs=0.006), name


def test_the_resnet18b_has_one_and_a_half_times_the_filters() -> None:
    wide, model = build_from_conf("resnet18b", IMAGENET, 1000), build_from_conf("resnet18", IMAGENET, 1000)
    pairs = list(zip(wide.modules(), model.modules(), strict=True))
    assert {a.out_channels / b.out_channels for a, b in pairs if isinstance(b, nn.Conv2d)} == {1.5}


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("polino_teacher", 5.346),
        ("polino_s0", 1.000),
        ("polino_s1", 0.318),
        ("polino_s2", 0.112),
        ("polino_deeper", 5.83),
        ("wrn_28_20", 145.8),
        ("wrn_16_22", 82.7),
        ("wrn_22_8", 17.2),
        ("wrn_28_10", 36.5),
    ],
)
def test_the_networks_of_polino_have_the_sizes_of_the_code(name: str, millions: float) -> None:
    """Counted from the authors' code: parameters in millions, rounded (21.38, 4.00, 1.27, 0.45, ..., 583 megabytes)."""
    digits = len(str(millions).partition(".")[2])
    assert round(count_parameters(build_from_conf(name, CIFAR, 10)) / 1e6, digits) == millions


def test_the_networks_of_gupta_have_the_sizes_counted_by_hand() -> None:
    assert count_parameters(build_from_conf("gupta_mlp", MNIST, 10)) == 784_000 + 1000 + 1_000_000 + 1000 + 10_010
    assert count_parameters(build_from_conf("gupta_mnist", MNIST, 10)) == 208 + 3_216 + (16 * 4 * 4 * 128 + 128) + 1_290
    assert count_parameters(build_from_conf("gupta_cifar", CIFAR, 10)) == 4_864 + 2 * 102_464 + (64 * 4 * 4 * 10 + 10)


@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"])
def test_the_resnets_of_ttq_have_the_sizes_counted_by_hand(name: str) -> None:
    """Pre-activation, no biases, shortcuts without parameters; BN in front of each convolution and of the head."""
    m = 2 * (int(name.removeprefix("resnet")) - 2) // 6  # convolutions of a stage
    convs = 9 * (3 * 16 + m * 16**2 + 16 * 32 + (m - 1) * 32**2 + 32 * 64 + (m - 1) * 64**2)
    norms = 2 * (m * 16 + 16 + (m - 1) * 32 + 32 + (m - 1) * 64 + 64)
    model = build_from_conf(name, CIFAR, 10)
    assert count_parameters(model) == convs + norms + 650
    assert model.form == "pre"


def test_the_shortcut_of_ttq_averages_and_pads_zeros_on_both_sides() -> None:
    block = resnet.build(CIFAR, 10, depth=8, width=4).get_submodule("layer2.0")
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 6, 6)
    y = block(x)
    assert y.shape == (2, 8, 3, 3)
    torch.testing.assert_close(y[:, 2:6], x.reshape(2, 4, 3, 2, 3, 2).mean((3, 5)))
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


@pytest.mark.parametrize("form", ["pre", "post"])
@pytest.mark.parametrize("size", [6, 7])
def test_the_shortcut_of_he_takes_every_second_pixel_and_pads_zeros_on_both_sides(form: str, size: int) -> None:
    block = resnet.build(CIFAR, 10, depth=8, width=4, form=form, shortcut="A_stride").get_submodule("layer2.0").eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, size, size)  # at least 0, so that the activation after the sum changes nothing
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, [0, 2, 4, 6][: (size + 1) // 2]][..., [0, 2, 4, 6][: (size + 1) // 2]])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


# Order


def layer_order(model: nn.Module) -> str:
    """Return the layers of a chain as the papers write them; Q is an activation."""
    letters = {"Conv2d": "C", "Linear": "F", "ReLU": "Q", "Hardtanh": "h", "SamePool": "M", "MaxPool2d": "M"}
    letters |= {"BatchNorm2d": "B", "BatchNorm1d": "B", "Dropout": "d", "Dropout2d": "d"}
    letters |= {"UnscaledDropout": "d", "DropoutScale": "r"}
    order = "".join(letters.get(type(m).__name__, "") for m in model.children())
    return order[0] + order[1:].replace("C", " C").replace("F", " F")


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("svhn clip", "CMQ CBQ CBMQ CBQ CBQ CBQd CrBh F"),
        ("dorefa_alexnet", "CQ CBMQ CBMQ CBQ CBMQ FBQ FBQ F"),
        ("hwgq_alexnet", "CMBQ CMBQ CBQ CBQ CMBQ FBQ FBQ F"),
        ("gupta_mnist", "CQM CQM FQ F"),
        ("gupta_cifar", "CQM CQM CQM F"),
        ("polino", "CQB CQBMd CQB CQBMd FQBd FQ"),
    ],
)
def test_the_order_of_pooling_norm_and_activation(name: str, order: str) -> None:
    assert layer_order(thin_network(name)) == order


def test_the_dropout_of_polinos_teacher_is_that_of_the_authors() -> None:
    model = build_from_conf("polino_teacher", CIFAR, 10)
    assert layer_order(model) == "CQB CQBMd CQB CQBMd CQB CQB CQB CQBMd FQBd FQBd FQ"
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout2d)] == [0.2, 0.3, 0.35]
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.4, 0.4]
    assert not [m for m in build_from_conf("polino_s0", CIFAR, 10, dropout=[]).modules() if getattr(m, "p", 0)]


def test_the_norms_before_a_sum_keep_scale_and_shift_in_hwgqs_resnet() -> None:
    model = hwgq_resnet.build(CIFAR, 5, depth=18, width=4, norm="no_affine")
    affine = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.affine}
    blocks = [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)]
    assert affine == {f"{b}.bn" for b in blocks} | {f"layer{stage}.0.downsample.1" for stage in (2, 3, 4)}
    assert isinstance(model.get_submodule("layer1.0.bn1"), nn.Identity)


@pytest.mark.parametrize(("build", "strides"), [(hwgq_resnet.build, (2, 1, 1)), (imagenet_resnet.build, (1, 2, 1))])
def test_the_convolution_of_a_bottleneck_that_has_the_stride(build: Build, strides: tuple[int, ...]) -> None:
    block = build(CIFAR, 5, depth=50, width=4).get_submodule("layer2.0")
    assert tuple(getattr(block, f"conv{i}").stride[0] for i in (1, 2, 3)) == strides


@pytest.mark.parametrize("name", ["vgg_small", "hwgq_alexnet", "hwgq_resnet18", "hwgq_resnet34", "hwgq_resnet50"])
def test_the_running_averages_of_hwgqs_networks_can_have_the_authors_momentum(configure: Configure, name: str) -> None:
    """The prototxts: moving_average_fraction 0.95. The option stays out of the identity at torch's default."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    for words, momentum in (([], 0.1), (["model.bn_momentum=0.05"], 0.05)):
        config = configure("method=hwgq", "dataset=tiny_imagenet", f"model={name}", *words)
        options = {key: value for key, value in config.model.items() if key not in ("norm", "act", "head")}
        with torch.device("meta"):
            model = registry.create("model", options, shape=(3, 64, 64), classes=10)
        assert isinstance(model, nn.Module)
        assert {m.momentum for m in model.modules() if isinstance(m, kinds)} == {momentum}
        assert ("bn_momentum" in run_identity(config).keys["model"]) is bool(words)
    with pytest.raises(ValueError, match="must be above 0 and below 1"):
        hwgq_resnet.build(CIFAR, 10, width=4, bn_momentum=1.0)


def test_the_first_block_of_hwgqs_resnet_adds_the_normalized_stem() -> None:
    model = thin_network("hwgq_resnet18").eval()
    for name in ("layer1.0.conv2.weight", "layer1.0.bn.bias"):
        nn.init.zeros_(model.get_parameter(name))
    nn.init.constant_(model.bn1.bias, -1.5)
    seen: list[Tensor] = []
    model.bn1.register_forward_hook(lambda module, x, y: seen.append(y))
    model.get_submodule("layer1.0").register_forward_hook(lambda module, x, y: seen.append(y))
    model(images("hwgq_resnet18"))
    assert seen[0].min() < 0
    assert torch.equal(*seen)


@pytest.mark.parametrize("name", ["hwgq_resnet18", "preresnet18"])
def test_the_shortcuts_that_change_the_shape_read_the_activated_input(name: str) -> None:
    block = thin_network(name).get_submodule("layer2.0").eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), block.downsample(x.div((1 + block.bn1.eps) ** 0.5).relu()))
    nn.init.constant_(block.bn1.bias, -9)
    assert not block(x).any()


@pytest.mark.parametrize("name", ["hwgq_resnet18", "preresnet18", "resnet18", "wrn"])
def test_the_last_layer_reads_an_average_of_activated_values(name: str) -> None:
    model = thin_network(name).train()
    seen: list[Tensor] = []
    last = model.get_submodule(list(quantizable(model))[-1])
    last.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    model(images(name))
    assert seen[0].min() >= 0
    assert seen[0].max() > 0


def test_the_wide_resnet_has_a_late_stride_and_a_shortcut_of_the_raw_input() -> None:
    model = thin_network("wrn")
    block = model.get_submodule("layer2.0")
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(block(x), block.shortcut[0](x))
    assert model.bn1.momentum == 0.9


@pytest.mark.parametrize("size", [5, 6, 27, 54])
def test_the_same_pool_is_that_of_tensorflow(size: int) -> None:
    """The output has ceil(n / 2) rows; half of the padding, rounded down, comes first."""
    x = torch.randn(1, 2, size, size + 1)
    y = dorefa_alexnet.SamePool()(x)
    assert y.shape[2:] == (-(-size // 2), -(-(size + 1) // 2))
    before = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) // 2 for n in x.shape[2:]]
    for row in range(y.shape[2]):
        for column in range(y.shape[3]):
            top, left = 2 * row - before[0], 2 * column - before[1]
            window = x[0, :, max(top, 0) : top + 3, max(left, 0) : left + 3]
            assert torch.equal(y[0, :, row, column], window.amax((1, 2)))


def test_the_dropout_of_the_svhn_models_acts_after_the_quantizer() -> None:
    model = install(dorefa.build(w=2, a=2), thin_network("svhn"), example=images("svhn")).train()
    x = torch.randn(3, 16, 5, 5)
    torch.manual_seed(4)
    y = model.restore6(model.conv6(model.drop5(x)))
    torch.manual_seed(4)
    kept = torch.empty_like(x).bernoulli_(0.5)
    quantized = dorefa.quantize_activation(x, 2) * kept / 0.5
    torch.testing.assert_close(y, F.conv2d(quantized, model.conv6.weight_q(model.conv6.weight)))
    assert 0.3 < kept.mean() < 0.7
    model.eval()
    assert torch.equal(model.restore6(model.drop5(x)), x)


@pytest.mark.parametrize(
    ("last_act", "expected"), [("relu", [0, 0.5, 3]), ("clip", [0, 0.5, 1]), ("magnitude", [1, 0.5, 1])]
)
def test_activations_in_front_of_the_last_layer(last_act: str, expected: list[float]) -> None:
    act = dorefa_svhn.build(SVHN, 10, width=1, last_act=last_act).act6
    assert act(torch.tensor([-2, 0.5, 3])).tolist() == expected


# torchvision's checkpoints


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_the_imagenet_resnets_have_the_state_dicts_of_torchvision(depth: int) -> None:
    with torch.device("meta"):
        theirs = getattr(vision.torchvision().models, f"resnet{depth}")(weights=None)
    ours = build_from_conf(f"resnet{depth}", IMAGENET, 1000)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]


@pytest.mark.parametrize("depth", [18, 50])
def test_the_imagenet_resnets_compute_what_torchvisions_do(depth: int) -> None:
    theirs = getattr(vision.torchvision().models, f"resnet{depth}")(weights=None, num_classes=7).eval()
    ours = imagenet_resnet.build((3, 40, 36), 7, depth=depth).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics other than 0 and 1, without exploding values
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(1, 2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 40, 36)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn", "googlenet", "alexnet", "mobilenet_v2_imagenet"])
def test_the_state_dicts_of_torchvision_load(name: str) -> None:
    extra = {"init_weights": True} if name == "googlenet" else {}
    with torch.device("meta"):
        theirs = vision.torchvision().models.get_model(CONF[name]["net"], weights=None, **extra)
    keys = build_from_conf(name, IMAGENET, 1000).load_state_dict(theirs.state_dict(), strict=False, assign=True)
    assert keys.missing_keys == []
    assert {key.partition(".")[0] for key in keys.unexpected_keys} == ({"aux1", "aux2"} if extra else set())


# Which layers an activation feeds


@pytest.mark.parametrize("name", FED)
def test_the_values_stay_the_same_if_quantizers_replace_activations(name: str) -> None:
    """DoReFa's quantizer clips at 0 itself, so the ReLU in front of it changes nothing."""
    float_model = thin_network(name)
    for module in float_model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.5)
    x = images(name)
    kept, replaced = (
        install(dorefa.build(w=4, a=4), copy.deepcopy(float_model), example=x, act=act).eval()
        for act in ("keep", "fused")
    )
    last = list(quantizable(float_model))[-1]
    taken = {n for n, m in replaced.named_modules() if isinstance(m, BypassedActivation)}
    assert taken == {act for act, readers in float_model.feeds.items() if readers != (last,)}
    assert torch.equal(kept(x), replaced(x))


@pytest.mark.parametrize("name", FED)
def test_the_methods_that_replace_activations_quantize_every_inner_layer(name: str) -> None:
    float_model = thin_network(name)
    for method, model in (
        (xnor.build(w=1, a=1), copy.deepcopy(float_model)),
        (hwgq.build(w=1, a=2), thin_network(name, norm="no_affine") if name in NORMED else copy.deepcopy(float_model)),
    ):
        layers = list(quantizable(model))
        install(method, model, example=images(name))
        quantized = quantized_layers(model)
        assert len(quantized) == len(layers) - 2
        assert all(type(layer.input_q) is not nn.Identity for layer in quantized.values())
        loss = F.cross_entropy(model.train()(images(name)), torch.arange(4))
        loss.backward()
        assert loss.isfinite()
        assert all(layer.weight.grad.isfinite().all() for layer in quantized.values())


def test_a_layer_without_an_activation_of_its_own_is_unsupported() -> None:
    with pytest.raises(Unsupported, match=r"layer1\.0\.conv1 has no activation function of its own"):
        install(xnor.build(w=1, a=1), thin_network("resnet18"), example=images("resnet18"))
    with pytest.raises(Unsupported, match=r"\S*shortcut\.0 has no activation function of its own"):
        install(xnor.build(w=1, a=1), thin_network("wrn"), example=images("wrn"))
    with pytest.raises(
        Unsupported, match=r"not possible for conv2 and 3 more: the layer reads the result of BatchNorm2d bn1, not of a"
    ):
        install(xnor.build(w=1, a=1), thin_network("polino"), example=images("polino"))
    model = install(xnor.build(w=1, a=1), thin_network("wrn"), Policy(downsample="float"), example=images("wrn"))
    assert set(quantized_layers(model)) == {f"layer{s}.0.conv{i}" for s in (1, 2, 3) for i in (1, 2)}


def test_the_feeds_of_torchvisions_chains_pass_pooling_and_dropout() -> None:
    feeds = build_from_conf("vgg16", IMAGENET, 1000).feeds
    convs = [2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    readers = [f"features.{i}" for i in convs] + [f"classifier.{i}" for i in (0, 3, 6)]
    assert [layer for (layer,) in feeds.values()] == readers
    assert (feeds["features.29"], feeds["features.3"]) == (("classifier.0",), ("features.5",))
    small = build_from_conf("vgg16", CIFAR, 10).feeds  # features of 1x1, which the average pooling repeats
    assert "features.29" not in small
    assert feeds.items() - small.items() == {("features.29", ("classifier.0",))}
    assert list(build_from_conf("alexnet", IMAGENET, 1000).feeds.values()) == [
        *((f"features.{i}",) for i in (3, 6, 8, 10)),
        *((f"classifier.{i}",) for i in (1, 4, 6)),
    ]
    assert not hasattr(build_from_conf("googlenet", IMAGENET, 1000), "feeds")


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn", "alexnet"])
def test_the_xnor_method_quantizes_every_inner_layer_of_torchvisions_chains(name: str) -> None:
    model = build_from_conf(name, IMAGENET, 1000)
    example = torch.zeros(1, *IMAGENET, device="meta")
    install(xnor.build(w=1, a=1), model, example=example)
    assert len(quantized_layers(model)) == len(quantizable(model)) - 2
    assert model(example).shape == (1, 1000)


def test_the_values_of_torchvisions_alexnet_stay_the_same_if_quantizers_replace_activations() -> None:
    torch.manual_seed(0)
    model = zoo.build(IMAGENET, 5, net="alexnet")
    x, method = torch.randn(1, *IMAGENET), dorefa.build(w=32, a=4)
    with torch.no_grad():
        kept = install(method, copy.deepcopy(model), example=x, act="keep").eval()(x)
        assert torch.equal(install(method, model, example=x, act="fused").eval()(x), kept)
    assert kept.std() > 0


# Training steps


@pytest.mark.parametrize("name", THIN)
def test_the_networks_train_with_two_bit_dorefa(name: str) -> None:
    model = thin_network(name)
    x, labels = images(name), torch.arange(4)
    install(dorefa.build(w=2, a=2), model, example=x).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    first = next(n for n, p in model.named_parameters())
    assert not torch.equal(model.state_dict()[first], before[first])
    assert model(x).shape == (4, 5)


@pytest.mark.parametrize("norm", ["affine", "no_affine", "none"])
@pytest.mark.parametrize("name", NORMED)
def test_the_normalizations(name: str, norm: str) -> None:
    model = thin_network(name, norm=norm)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert model.norm == norm
    assert model(images(name)).isfinite().all()
    assert bool(norms) == (norm != "none")
    assert all(m.affine for m in norms) == (norm != "no_affine" or not norms)


# Invalid options


@pytest.mark.parametrize(
    ("build", "smallest", "options"),
    [
        (dorefa_svhn.build, 37, {"width": 1}),
        (dorefa_alexnet.build, 44, {"width_mult": 0.01}),
        (hwgq_alexnet.build, 39, {"width_mult": 0.01}),
        (hwgq_resnet.build, 5, {"width": 1}),
        (polino.build, 4, {"convs": (2, 2, 2, 2), "hidden": (2,)}),
        (gupta.build, 13, {"convs": (2, 2), "hidden": ()}),
    ],
)
def test_too_small_images_raise(build: Build, smallest: int, options: dict[str, Any]) -> None:
    for shape in ((3, smallest, smallest + 3), (3, smallest + 1, smallest)):
        assert build(shape, 3, **options)(torch.randn(2, *shape)).shape == (2, 3)
    for shape in ((3, smallest - 1, 300), (3, 300, smallest - 1), (3, 1, 1)):
        with pytest.raises(ValueError, match=f"images of {shape[1]}x{shape[2]}"):
            build(shape, 3, **options)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (dorefa_svhn.build, {"width": 0}, r"width=0: must be 1 or more; models A to D have 16, 8, 4 and 2"),
        (dorefa_svhn.build, {"dropout": 1.0}, r"dropout=1.0: must be at least 0 and below 1"),
        (dorefa_svhn.build, {"last_act": "tanh"}, r"last_act=tanh: must be one of relu, clip, magnitude"),
        (dorefa_alexnet.build, {"last_act": "tanh"}, r"last_act=tanh: must be one of relu, clip, magnitude"),
        (dorefa_alexnet.build, {"width_mult": 0.0}, r"width_mult=0.0: must be a factor above 0"),
        (hwgq_alexnet.build, {"width_mult": -1.0}, r"width_mult=-1.0: must be a factor above 0"),
        (hwgq_resnet.build, {"depth": 20}, r"depth=20: must be one of 18, 34, 50"),
        (hwgq_resnet.build, {"width": 0}, r"width=0: must be 1 or more channels"),
        (imagenet_resnet.build, {"depth": 101}, r"depth=101: must be one of 18, 34, 50"),
        (imagenet_resnet.build, {"width": 0}, r"width=0: must be 1 or more channels"),
        (imagenet_resnet.build, {"form": "middle"}, r"form=middle: must be pre .* or post"),
        (gupta.build, {"convs": (8, 0)}, r"convs=\[8, 0\] and hidden=\[1000, 1000\]: must contain at least one layer"),
        (gupta.build, {"convs": (), "hidden": ()}, r"convs=\[\] and hidden=\[\]: must contain at least one layer"),
        (gupta.build, {"pad": 3}, r"pad=3: must be 0, 1 or 2"),
        (gupta.build, {"pool": 4}, r"pool=4: must be 2 or 3"),
        (gupta.build, {"std": 0.0}, r"std=0.0: must be more than 0"),
        (polino.build, {"convs": ()}, r"convs=\[\]: must contain at least one layer"),
        (polino.build, {"hidden": (0,)}, r"hidden=\[0\]: each layer must have 1 or more"),
        (polino.build, {"kernel": 4}, r"kernel=4: must be an odd number"),
        (polino.build, {"pools": (4, 2)}, r"pools=\[4, 2\]: must be numbers from 1 to 4, ascending"),
        (polino.build, {"pools": (5,)}, r"pools=\[5\]: must be numbers from 1 to 4"),
        (polino.build, {"dropout": (0.2,)}, r"dropout=\[0.2\]: must be 3 rates"),
        (polino.build, {"dropout": (0.2, 0.3, 1.0)}, r"dropout=\[0.2, 0.3, 1.0\]: must be 3 rates"),
        (wide_resnet.build, {"depth": 20}, r"depth=20: must be 6 n \+ 4"),
        (wide_resnet.build, {"widen": 0}, r"widen=0: must be 1 or more"),
        (wide_resnet.build, {"dropout": -0.1}, r"dropout=-0.1: must be at least 0 and below 1"),
    ],
)
def test_invalid_options_raise(build: Build, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build((3, 64, 64), 10, **options)


@pytest.mark.parametrize("name", NORMED)
def test_an_unknown_normalization_raises(name: str) -> None:
    with pytest.raises(ValueError, match=r"norm=batch: must be one of auto, affine, no_affine, none"):
        thin_network(name, norm="batch")
