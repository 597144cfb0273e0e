"""Test the float networks: sizes from the papers, names from torchvision, and which layers read an activation."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qbench.config import registry
from qbench.cost.count import count_macs
from qbench.errors import ConfigError
from qbench.models import lenet, mlp, mobilenet_v2, resnet, vgg_small
from qbench.models import torchvision as zoo
from qbench.system import torchvision as vision

CONF = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "conf" / "model").glob("*.yaml"))}
HEAVY = ("alexnet", "vgg16", "vgg16_bn")
CIFAR, MNIST, IMAGENET, DIGITS = (3, 32, 32), (1, 28, 28), (3, 224, 224), (1, 8, 8)
NORMS = ("affine", "no_affine", "none")

Build = Callable[..., nn.Module]
NETWORKS: list[tuple[Build, tuple[int, int, int], dict[str, Any]]] = [
    (mlp.build, DIGITS, {"hidden": 2, "width": 8}),
    (resnet.build, CIFAR, {"depth": 14, "width": 4}),
    (resnet.build, CIFAR, {"depth": 14, "width": 4, "shortcut": "B"}),
    (resnet.build, CIFAR, {"depth": 14, "width": 4, "form": "post"}),
    (resnet.build, CIFAR, {"depth": 14, "width": 4, "form": "post", "shortcut": "B"}),
    (resnet.build, CIFAR, {"depth": 14, "width": 4, "form": "post", "shortcut": "A_stride"}),
    (lenet.build, MNIST, {}),
    (vgg_small.build, CIFAR, {"width": 4}),
    (mobilenet_v2.build, CIFAR, {"width_mult": 0.5}),
    (mobilenet_v2.build, CIFAR, {"width_mult": 0.25}),  # its first block has a shortcut
]
every_network = pytest.mark.parametrize(("build", "shape", "options"), NETWORKS)


def build_from_conf(name: str, shape: tuple[int, int, int], classes: int, **options: object) -> nn.Module:
    """Build the network of a file of conf/model; values `auto` are left to the builder's default."""
    node = {key: value for key, value in (CONF[name] | options).items() if value != "auto"}
    return registry.create("model", node, shape=shape, classes=classes)  # type: ignore[no-any-return]


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Sizes


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.7)],
)
@pytest.mark.parametrize("form", ["pre", "post"])
def test_the_cifar_resnets_have_the_sizes_of_the_paper(name: str, millions: float, form: str) -> None:
    """He et al. 2016, arXiv 1512.03385, table 6: millions of parameters to two digits."""
    with torch.device("meta"):
        assert count_parameters(build_from_conf(name, CIFAR, 10, form=form)) / 1e6 == pytest.approx(millions, rel=0.02)


def test_the_size_of_resnet20_is_that_counted_by_hand() -> None:
    """Convolutions: 3x16, 6 of 16x16, 16x32, 5 of 32x32, 32x64, 5 of 64x64, all times 9; BN: 2 per channel."""
    convs = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    post_bn = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    pre_bn = 2 * (6 * 16 + 16 + 5 * 32 + 32 + 5 * 64 + 64)  # in front of the convolutions and of the head
    assert count_parameters(resnet.build(CIFAR, 10, form="post")) == convs + post_bn + 650
    assert count_parameters(resnet.build(CIFAR, 10, form="pre")) == convs + pre_bn + 650
    assert count_parameters(resnet.build(CIFAR, 10, norm="no_affine")) == convs + 650


def test_the_vgg_small_is_that_of_hwgq() -> None:
    """4,657,546 parameters and 607.6 M multiply-adds, counted from the authors' prototxt."""
    model = vgg_small.build(CIFAR, 10, norm="no_affine")
    assert count_parameters(model) == 4_657_546
    assert sum(count_macs(model, CIFAR).values()) / 1e6 == pytest.approx(607.6, abs=0.05)
    kinds = [(type(m).__name__, getattr(m, "out_channels", "")) for m in model if not isinstance(m, nn.ReLU)]
    bn, pool = ("BatchNorm2d", ""), ("MaxPool2d", "")
    conv = {width: ("Conv2d", width) for width in (128, 256, 512)}
    assert kinds == [
        *(conv[128], bn, conv[128], pool, bn, conv[256], bn, conv[256], pool, bn, conv[512], bn, conv[512], bn, pool),
        *(("Flatten", ""), ("Linear", "")),
    ]


def test_the_lenet_is_that_of_caffe() -> None:
    """Caffe's examples/mnist: 500 + 20, 25,000 + 50, 400,000 + 500 and 5,000 + 10."""
    assert count_parameters(lenet.build(MNIST, 10, norm="none")) == 520 + 25_050 + 400_500 + 5_010 == 431_080


def test_the_mobilenet_v2_has_the_size_of_torchvisions() -> None:
    assert count_parameters(mobilenet_v2.build(IMAGENET, 1000)) == 3_504_872


@pytest.mark.parametrize(
    ("net", "parameters"),
    [
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("alexnet", 61_100_840),
        ("vgg16", 138_357_544),
        ("mobilenet_v2", 3_504_872),
    ],
)
def test_the_sizes_are_those_of_torchvisions_documentation(net: str, parameters: int) -> None:
    """Numbers of parameters in torchvision's documentation."""
    with torch.device("meta"):
        assert count_parameters(zoo.build(IMAGENET, 1000, net=net)) == parameters


# Names and values as in torchvision


@pytest.mark.parametrize("width_mult", [0.25, 0.5, 1.0, 1.4])
def test_the_mobilenet_v2_differs_from_torchvisions_in_two_strides_only(width_mult: float) -> None:
    ours = mobilenet_v2.build(CIFAR, 10, width_mult=width_mult).eval()
    theirs = vision.torchvision().models.mobilenet_v2(weights=None, num_classes=10, width_mult=width_mult).eval()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict())
    theirs.features[0][0].stride = theirs.features[2].conv[1][0].stride = (1, 1)
    x = torch.randn(2, *CIFAR)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_post_activation_resnet_differs_from_torchvisions_in_stem_and_stages_only() -> None:
    ours = resnet.build(CIFAR, 10, depth=20, width=4, form="post", shortcut="B").eval()
    module = vision.torchvision().models.resnet
    theirs = module.ResNet(module.BasicBlock, [3, 3, 3, 1])
    assert list(ours.state_dict()) == [k for k in theirs.state_dict() if not k.startswith("layer4")]
    block = ours.get_submodule("layer2.0")
    bn = nn.BatchNorm2d(8)
    theirs = module.BasicBlock(4, 8, 2, nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), bn)).eval()
    theirs.load_state_dict(block.state_dict())
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), theirs(x))


@pytest.mark.parametrize("net", ["resnet18", "mobilenet_v2", "googlenet"])
def test_the_initial_weights_are_those_of_torchvision(net: str) -> None:
    torch.manual_seed(3)
    ours = zoo.build(CIFAR, 4, net=net)
    torch.manual_seed(3)
    extra = zoo.OPTIONS.get(net, {})
    theirs = vision.torchvision().models.get_model(net, weights=None, num_classes=4, **extra)
    assert all(m.training for m in ours.modules())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


# Shapes and one step


@pytest.mark.parametrize("norm", NORMS)
@every_network
def test_the_networks_take_images_of_their_size(
    build: Build, shape: tuple[int, int, int], options: dict[str, Any], norm: str
) -> None:
    model = build(shape, 7, norm=norm, **options)
    assert model.norm == norm
    assert model(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("build", "shape", "options"),
    [
        (resnet.build, DIGITS, {"depth": 8, "form": "post"}),
        (resnet.build, (3, 30, 33), {"depth": 8, "stem_stride": 2}),
        (lenet.build, (1, 16, 16), {}),
        (lenet.build, (3, 17, 40), {"pad": 1}),
        (lenet.build, DIGITS, {"pad": 2}),
        (lenet.build, (1, 4, 5), {"pad": 2}),
        (vgg_small.build, DIGITS, {"width": 4}),
        (vgg_small.build, (3, 17, 40), {"width": 4}),
        (mobilenet_v2.build, DIGITS, {"width_mult": 0.1}),
        (mobilenet_v2.build, (3, 64, 48), {"width_mult": 0.1}),
        (zoo.build, (3, 63, 63), {"net": "squeezenet1_1"}),
    ],
)
def test_the_networks_take_other_image_sizes(
    build: Build, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    assert build(shape, 3, **options)(torch.randn(2, *shape)).shape == (2, 3)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full) if n in HEAVY else n for n in CONF])
def test_the_network_of_every_conf_file_trains_on_a_batch(name: str) -> None:
    torch.manual_seed(0)
    thin = {"width": 4, "width_mult": 0.25, "widen": 1}
    shape = (3, 64, 64) if "alexnet" in name or name.startswith("svhn_") else CIFAR
    model = build_from_conf(name, shape, 4, **{key: value for key, value in thin.items() if key in CONF[name]})
    x, labels = torch.randn(8, *shape), torch.arange(8) % 4
    before = [p.detach().clone() for p in model.parameters()]
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", CONF)
def test_the_conf_files_hold_the_keys_of_the_build_functions(name: str) -> None:
    build = registry.find("model", CONF[name].get("family", name))
    keys = [k for k, p in inspect.signature(build).parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert set(CONF[name]) - {"family", "added"} == {"name", "act", *keys}
    assert CONF[name].get("added", {}).items() <= CONF[name].items()
    assert CONF[name]["name"] == name
    assert CONF[name]["act"] == CONF[name].get("norm", "auto") == "auto"


# Normalization


@every_network
def test_the_norm_no_affine_has_no_scale_or_shift_in_front_of_quantizers(
    build: Build, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    model = build(shape, 10, norm="no_affine", **options)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)}
    assert norms
    assert [n for n, m in norms.items() if m.affine] == (["bn6"] if build is vgg_small.build else [])
    assert "act6" not in model.feeds
    assert not [m for m in build(shape, 10, norm="none", **options).modules() if "BatchNorm" in type(m).__name__]


# Which modules read an activation


class ReaderRecorder(TorchFunctionMode):
    """Record, for the output of every watched module, the modules in which a torch function takes it."""

    def __init__(self, model: nn.Module, watched: list[str]) -> None:
        super().__init__()
        self.within, self.outputs = [""], {}
        self.readers: dict[str, set[str]] = {name: set() for name in watched}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, x, name=name: self.within.append(name))
            module.register_forward_hook(lambda m, x, y, name=name: self._leave(name, y))

    def _leave(self, name: str, output: torch.Tensor) -> None:
        self.within.pop()
        if name in self.readers:
            self.outputs[name] = output

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") != "__get__":  # attributes such as x.shape
            taken = [*args, *(kwargs or {}).values()]
            for name, output in self.outputs.items():
                if any(argument is output for argument in taken):
                    self.readers[name].add(self.within[-1])
        return function(*args, **(kwargs or {}))


def readers(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, set[str]]:
    acts = [name for name, m in model.named_modules() if isinstance(m, nn.ReLU | nn.ReLU6)]
    recorder = ReaderRecorder(model, acts)
    with recorder, torch.no_grad():
        model(torch.randn(2, *shape))
    assert set(recorder.outputs) == set(acts)
    return recorder.readers


@every_network
def test_the_feeds_name_exactly_the_layers_that_read_an_activation(
    build: Build, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    model = build(shape, 10, **options)
    layers = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    recorded = readers(model, shape)
    assert model.feeds
    for act, listed in model.feeds.items():
        assert recorded[act] == set(listed), act
        assert recorded[act] <= layers, act
    unlisted = [act for act, read in recorded.items() if read <= layers and act not in model.feeds]
    trunk = ["layer1.1.act2", "layer2.1.act2"]  # feed convolutions only where shortcut B changes the shape
    assert unlisted == (trunk if options.get("form") == "post" and options.get("shortcut") == "B" else [])


def test_the_recorder_sees_that_a_shortcut_reads_an_activation() -> None:
    recorded = readers(resnet.build(CIFAR, 10, depth=14, width=4, form="post"), CIFAR)
    assert recorded["act"] == {"layer1.0.conv1", "layer1.0"}
    assert recorded["layer1.1.act2"] == {"layer2.0.conv1", "layer2.0.pad"}
    assert recorded["layer3.1.act2"] == {""}


# Invalid options


@pytest.mark.parametrize(
    ("build", "shape", "options", "message"),
    [
        (resnet.build, CIFAR, {"form": "middle"}, r"form=middle: must be pre .* or post"),
        (resnet.build, CIFAR, {"depth": 21}, r"depth=21: must be 6 n \+ 2"),
        (resnet.build, CIFAR, {"shortcut": "C"}, r"shortcut=C: must be A .*A_stride .* or B"),
        (lenet.build, (1, 12, 12), {}, r"pad=0: .* 12x12 are too small; with pad=2"),
        (lenet.build, (1, 3, 3), {"pad": 2}, r"pad=2: .* 3x3"),
        (lenet.build, MNIST, {"pad": 3}, r"pad=3: must be 0"),
        (lenet.build, MNIST, {"norm": "batch"}, r"norm=batch: must be one of auto, affine, no_affine, none"),
        (vgg_small.build, CIFAR, {"norm": "batch"}, r"norm=batch: must be one of auto"),
        (vgg_small.build, CIFAR, {"width": 0}, r"width=0: must be 1 or more"),
        (vgg_small.build, (3, 32, 7), {}, r"32x7 are too small; they must be 8x8"),
        (mobilenet_v2.build, CIFAR, {"norm": "batch"}, r"norm=batch: must be one of auto"),
        (mobilenet_v2.build, CIFAR, {"width_mult": 0.0}, r"width_mult=0.0: must be a factor above 0"),
        (mobilenet_v2.build, CIFAR, {"dropout": 1.0}, r"dropout=1.0: must be at least 0"),
        (zoo.build, CIFAR, {"net": "resnet19"}, r"net=resnet19: .*; did you mean resnet1.*\?\nallowed: alexnet"),
        (zoo.build, MNIST, {"net": "resnet18"}, r"net=resnet18: the images have 1 channel\(s\).* need 3"),
        (zoo.build, CIFAR, {"net": "alexnet"}, r"net=alexnet: does not support .* 32x32\ntorch's error: Given input"),
        (zoo.build, CIFAR, {"net": "vit_b_32"}, r"net=vit_b_32: does not support .* 32x32\ntorch's error: Wrong"),
    ],
)  # fmt: skip
def test_invalid_options_raise(
    build: Build, shape: tuple[int, int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(shape, 10, **options)


def test_the_error_names_the_key_as_typed() -> None:
    with pytest.raises(ConfigError, match=r"^model\.net=vgg: .*did you mean vgg1"):
        build_from_conf("torchvision", CIFAR, 10, net="vgg")
    with pytest.raises(
        ConfigError, match=r"^model\.width_mult: vgg_small has no such key; did you mean model\.width\?"
    ):
        build_from_conf("vgg_small", CIFAR, 10, width_mult=0.5)


# torchvision's import


@pytest.mark.full
def test_the_import_of_torchvision_gives_no_warning_even_after_a_failure() -> None:
    code = (
        "try:\n import torchvision\nexcept RuntimeError: print('broken')\n"
        "from qbench.system.torchvision import torchvision as load\n"
        "loaded = load(); import torchvision\n"
        "assert loaded is torchvision is load(); loaded.models.resnet18(weights=None)\n"
        "from torchvision import datasets, transforms"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), ImportError("No module named 'torchvision'")])
def test_the_other_import_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(vision.importlib, "import_module", fail)
    with pytest.raises(type(error), match=str(error)):
        vision.torchvision.__wrapped__()


def test_no_operator_is_declared_if_the_import_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision.importlib, "import_module", lambda name: sys)
    monkeypatch.setattr(vision, "_declare", lambda *names: pytest.fail("declared"))
    assert vision.torchvision.__wrapped__() is sys
