"""Test that every experiment file gives one run, and that its network trains with its method on two random images.

The long tier tests all pairs of network and method at the papers' sizes. The fast tier tests the first file of each
published table, and one thin network for each family of networks and method. The files of claims are composed in
tests/papers/test_claims.py; their pairs are included here.
"""

import math
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Configure, tiered
from filelock import FileLock
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import Bits
from qbench.config import compose, groups, registry
from qbench.config.schema import Config
from qbench.cost.count import count_cost
from qbench.experiment.setup import assemble
from qbench.methods import lsq
from qbench.papers.claim_files import read_claims
from qbench.quant import product_quantization as product
from qbench.quant.combine import distilled
from qbench.quant.layers import fully_quantized, quantized_layers
from qbench.quant.policy import quantizable
from qbench.quant.probe import Probe
from qbench.quant.verify import verify
from qbench.training import optimizer as optim
from qbench.training.loop import Callbacks, train
from qbench.training.state import State
from qbench.training.task import Task

STEPS = 2
SHARED = Path()
FILES = [name for name in groups.option_names("experiment") if "/" in name and not name.startswith("claims/")]
PAPERS = sorted({name.partition("/")[0] for name in FILES})
ROW_OF_A_TABLE = re.compile(r"_(w\d|levels|nearest|stochastic|s\d).*")
"""The end of a file's name in which rows of one published table differ, such as `_w1a2g4`."""
FIRST_ROWS = {ROW_OF_A_TABLE.sub("", name): name for name in reversed(FILES)}.values()


def papers(*fast: str) -> pytest.MarkDecorator:
    """Return the mark of a test of every paper that tests only `fast` in the fast tier."""
    return pytest.mark.parametrize("paper", tiered(PAPERS, fast))


rows = pytest.mark.parametrize("rows", tiered(["first", "all"], ["first"]))
NARROW = {"width": 4, "width_mult": 0.05, "widen": 1}


@pytest.fixture(scope="session", autouse=True)
def _composed_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep composed files in a folder that all processes of a test session share."""
    folder = tmp_path_factory.getbasetemp()  # one folder per process; its parent belongs to the session
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "SHARED", folder / "composed")
        yield


def configurations(paper: str, rows: str = "all") -> dict[str, list[Config]]:
    """Return what `compose_files` returns; it is computed once per test session."""
    SHARED.mkdir(exist_ok=True)
    with FileLock(SHARED / f"{paper}.{rows}.lock"):
        file = SHARED / f"{paper}.{rows}"
        if not file.exists():
            file.write_bytes(pickle.dumps(compose_files(paper, rows)))
        by_file: dict[str, list[Config]] = pickle.loads(file.read_bytes())
        return by_file


def compose_files(paper: str, rows: str) -> dict[str, list[Config]]:
    """Return the configurations of each file of a paper, or of the first of each table; for `claims`, of each arm."""
    if paper != "claims":
        files = FILES if rows == "all" else FIRST_ROWS
        names = [name for name in files if name.startswith(f"{paper}/")]
        return {name: compose.configurations([f"experiment={name}"]) for name in names}
    arms = [(claim.name, arm) for claim in read_claims(ROOT / "conf" / "experiment" / "claims") for arm in claim.arms]
    lines = [(f"experiment=claims/{name}", *arm) for name, arm in arms]
    return {" ".join(line): compose.configurations(list(line)) for line in lines}


def pairs(paper: str, rows: str = "all") -> dict[str, Config]:
    """Return the first file for each combination of network, method with options, widths and activation method."""
    first: dict[str, tuple[str, Config]] = {}
    for name, (config,) in configurations(paper, rows).items():
        network = (config.model, config.dataset["name"], config.dataset.get("size"))
        first.setdefault(repr((network, config.method, config.bits, config.activation)), (name, config))
    return dict(first.values())


def families(paper: str, rows: str = "first") -> dict[str, Config]:
    """Return the first file for each family of networks and method, with a thin network and small photographs."""
    first: dict[tuple[str, str], tuple[str, Config]] = {}
    for name, config in pairs(paper, rows).items():
        first.setdefault((config.model.get("family", config.model["name"]), config.method_name), (name, config))
    for _, config in first.values():
        config.model |= {key: value for key, value in NARROW.items() if key in config.model}
        if "convs" in config.model:
            config.model["convs"] = [max(4, channels // 16) for channels in config.model["convs"]]
        if config.dataset["name"] == "imagenet":
            config.dataset |= {"size": 64, "resize": 64}
    return dict(first.values())


def narrowed(model: nn.Module) -> nn.Module:
    """Divide the channels and units of torchvision's AlexNet and VGG by 16, since they have no key for it."""
    if type(model).__name__ not in ("AlexNet", "VGG"):
        return model
    layers = list(quantizable(model).items())
    for i, (name, layer) in enumerate(layers):
        out, inside = layer.weight.shape[:2]  # type: ignore[union-attr]
        out, inside = out if i == len(layers) - 1 else out // 16, inside if i == 0 else inside // 16
        if isinstance(layer, nn.Conv2d):
            model.set_submodule(name, nn.Conv2d(inside, out, layer.kernel_size, layer.stride, layer.padding))  # type: ignore[arg-type]
        else:
            model.set_submodule(name, nn.Linear(inside, out))
    return model


@pytest.fixture(autouse=True)
def _single_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run k-means and correction of Q-CNN for one iteration."""
    monkeypatch.setattr(product, "ITERATIONS", 1)
    monkeypatch.setattr(product, "SWEEPS", 1)


@papers("gupta", "polino")
@rows
def test_every_file_gives_one_run(paper: str, rows: str) -> None:
    by_file = configurations(paper, rows)
    assert by_file
    for name, configs in by_file.items():
        assert len(configs) == 1, name
        (config,) = configs
        assert config.method_name, name
        assert config.dataset["name"] in ("mnist", "svhn", "cifar10", "cifar100", "imagenet"), name


def test_all_files_are_tested() -> None:
    paths = [path for path in (ROOT / "conf" / "experiment").rglob("*/*.yaml") if path.parent.name != "claims"]
    assert len(FILES) == len(paths) > 60


def first_values(p: Tensor) -> Tensor:
    return p.detach().flatten()[:1000].clone()


def check_training(config: Config) -> None:
    """Train two steps on two images; check finite losses, changed parameters, and that layers are on their grids."""
    parts = assemble(config, planned=True)
    torch.manual_seed(0)
    batch = torch.rand(2, *parts.data.shape).to(memory_format=torch.channels_last), torch.tensor([0, 1])
    model, method = parts.install(parts.float_model()), parts.method
    if config.distill.on:
        assert config.distill.teacher == "baseline"
        method = distilled(method, parts.float_model().eval().requires_grad_(False))
    probe = Probe([batch], F.cross_entropy)
    if method.prepare:
        method.prepare(model, probe)
    before = {name: first_values(p) for name, p in model.named_parameters() if p.requires_grad}
    task = Task(
        model=model, method=method, optim=config.optim, epochs=STEPS if method.needs_training else 0, steps=1,
        train=lambda epoch, start: [batch], validate=list, probe=probe,
    )  # fmt: skip
    losses: list[float] = []
    train(
        task,
        State(optim.build_optimizer(model, config.optim)),
        Callbacks(on_step=lambda state, loss: losses.append(loss.item())),
    )
    assert len(losses) == task.epochs
    assert all(map(math.isfinite, losses)), losses
    moved = any(
        not torch.equal(first_values(p), before[name]) for name, p in model.named_parameters() if name in before
    )
    assert moved == method.needs_training, "parameters"
    assert fully_quantized(model)
    counts = verify(model, batch[0])
    assert bool(counts) == (parts.method.bits != Bits())
    assert all(layer["w"].found > 1 for layer in counts.values() if "w" in layer), "one value for all weights"


def failures(configs: dict[str, Config]) -> list[str]:
    """Return the files whose pair does not train, each with its error."""
    errors = []
    for name, config in configs.items():
        try:
            check_training(config)
        except Exception as error:  # to report all of them at once
            errors.append(f"{name}: {type(error).__name__}: {error}")
    return errors


@papers("gupta", "lsq")
@rows
def test_the_thin_networks_train_with_their_methods(paper: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = registry.create

    def create(group: str, *arguments: Any, **options: Any) -> Any:
        created = original(group, *arguments, **options)
        return narrowed(created) if group == "model" else created

    monkeypatch.setattr(registry, "create", create)
    assert failures(families(paper, rows)) == []


def test_the_errors_of_failing_pairs_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    name, config = next(iter(families("lsq").items()))
    mutants: dict[str, tuple[object, str, Callable[..., Any]]] = {
        "AssertionError: parameters": (lsq, "optimizer_step", lambda model, optimizer: None),
        "NotQuantized: ": (lsq.LSQWeight, "forward", lambda site, w: w * site.step),
        "AssertionError: one value": (lsq.LSQWeight, "forward", lambda site, w: 0 * w * site.step),
    }
    for message, (owner, key, mutant) in mutants.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, key, mutant)
            (error,) = failures({name: config})
            assert error.startswith(f"{name}: {message}"), error


def first_points(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cluster points around the first k of them: the shapes are those of k-means."""
    return points[:k], torch.cdist(points, points[:k]).argmin(1)


@pytest.mark.full
@pytest.mark.parametrize("paper", [*PAPERS, "claims"])
def test_the_networks_of_the_papers_sizes_train_with_their_methods(paper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_lloyd", first_points)
    configs = pairs(paper)
    for config in configs.values():
        if "error_correction" in config.method:
            config.method["error_correction"] = False  # takes hours and 15 GB in the linear layers of AlexNet and VGG
    assert failures(configs) == []


@papers("lsq", "xnor")
@rows
def test_the_networks_of_the_papers_sizes_take_their_methods_on_the_meta_device(paper: str, rows: str) -> None:
    for name, config in pairs(paper, rows).items():
        parts = assemble(config, planned=True)
        model = parts.install(parts.float_model("meta"))
        assert all(p.is_meta for p in model.parameters()), name
        assert bool(quantized_layers(model)) == (parts.method.bits != Bits()), name


@pytest.mark.parametrize("name", tiered(groups.option_names("method"), ["dq", "gupta", "qcnn"]))
def test_a_network_on_the_meta_device_has_the_same_cost(name: str, configure: Configure) -> None:
    parts = assemble(configure(f"method={name}", "dataset=cifar10", "model=resnet20", "model.width=4"), planned=True)
    meta, real = (parts.install(parts.float_model(device)) for device in ("meta", "cpu"))
    shapes = [{key: (t.shape, t.dtype) for key, t in model.state_dict().items()} for model in (meta, real)]
    assert shapes[0] == shapes[1]
    if name != "dq":  # its points are allocated by gradients, which the meta device does not have
        assert count_cost(meta, parts.macs) == count_cost(real, parts.macs)
