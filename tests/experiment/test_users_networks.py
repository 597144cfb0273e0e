"""Runs of networks that users bring: what they print, and how they are refused."""

from contextlib import nullcontext
from itertools import count
from pathlib import Path

import pytest
from conftest import Configure, tiered

from qbench.analysis.finished_run import load_finished_network
from qbench.analysis.plan import plan
from qbench.config.schema import baseline_config
from qbench.cost.count import NOT_REACHED
from qbench.errors import CheckpointError, ConfigError, Interrupted
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import assemble
from qbench.quant.layers import quantized_layers
from qbench.quant.method import Unsupported
from qbench.runs.result import Result
from qbench.training.checkpoint import pack, unpack

NETWORKS = """
import copy

import torch
from torch import nn
from torch.nn.utils import prune

def layers(*middle):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *middle, nn.Linear(16, 10))

def weight_norm(shape, classes):
    return layers(nn.utils.weight_norm(nn.Linear(16, 16)))

def parametrized(shape, classes):
    return layers(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))

def pruned(shape, classes):
    linear = nn.Linear(16, 16)
    prune.l1_unstructured(linear, "weight", 0.5)
    return layers(linear)

def tied(shape, classes):
    a, b = nn.Linear(16, 16), nn.Linear(16, 16)
    b.weight = a.weight
    return layers(a, nn.ReLU(), b)

def normalized(shape, classes):
    return nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10))

def transformer(shape, classes):
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    return nn.Sequential(nn.Flatten(2), nn.Linear(64, 16), layer, nn.Flatten(), nn.Linear(16, 10))

def silu(shape, classes):
    return layers(nn.SiLU(), nn.Linear(16, 16))

def one_value(shape, classes):
    return layers(nn.BatchNorm1d(16), nn.Linear(16, 16))

class Uncalled(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.first, self.mid, self.last = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, classes)
        self.second = nn.Linear(16, 16)
    def forward(self, x):
        h = nn.Linear.forward(self.mid, self.first(x.flatten(1)).relu())
        return self.last(self.second(h).relu())

class Branches(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, classes)
        self.dark, self.bright = nn.Linear(16, 16), nn.Linear(16, 16)
    def forward(self, x):
        h, bright = self.first(x.flatten(1)).relu(), x.mean((1, 2, 3)) > 0.05
        out = torch.zeros_like(h)
        for chosen, layer in ((bright, self.bright), (~bright, self.dark)):
            if chosen.any():
                out = out.index_put((chosen.nonzero().flatten(),), layer(h[chosen]))
        return self.last(out)

class Routed(nn.Module):
    # executes other layers after training than before, like a network whose experts depend on the data
    def __init__(self, shape, classes):
        super().__init__()
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, classes)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(16, 16)), nn.Sequential(nn.Linear(16, 16), nn.ReLU())])
        self.register_buffer("chosen", torch.tensor(0))
    def forward(self, x):
        if self.training:
            self.chosen.fill_(1)
        return self.last(self.experts[int(self.chosen)](self.first(x.flatten(1)).relu()))

class Dropout(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.net = layers(nn.Linear(16, 16))

    def forward(self, x):
        return self.net(nn.functional.dropout(x, 0.2))

class Centred(Dropout):
    def forward(self, x):
        return self.net(x - x.mean(0, keepdim=True))

class NeverInEval(Dropout):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.net = nn.Sequential(nn.BatchNorm2d(1), *layers(nn.Linear(16, 16)))

    def train(self, mode=True):
        return super().train(True)

    def forward(self, x):
        return self.net(x)

class Counting(Dropout):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.net(x) + self.calls

class Softmax(Dropout):
    def forward(self, x):
        return self.net(x).softmax(1)

STEPS = [0]

class Scheduled(Dropout):
    # the rate of dropout depends on the number of training steps, which is counted in an attribute
    steps = 0

    def forward(self, x):
        if not self.training:
            return self.net(x)
        self.steps += 1
        return self.net(nn.functional.dropout(x, min(0.5, self.steps / 20)))

class GlobalSteps(Dropout):
    def forward(self, x):
        STEPS[0] += self.training
        return self.net(nn.functional.dropout(x, STEPS[0] % 7 / 20, self.training))

class OwnGenerator(Dropout):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.net(x + torch.randn(x.shape, generator=self.generator) if self.training else x)

class Buffered(Dropout):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += self.training
        return self.net(nn.functional.dropout(x, min(0.5, float(self.steps) / 20), self.training))

class Threads(Dropout):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(False)

    def forward(self, x):
        assert torch.get_num_threads() == 1 or not self.training
        assert torch.are_deterministic_algorithms_enabled() or not self.training
        return self.net(x)

class ExtraState(Dropout):
    def get_extra_state(self):
        return {"steps": 1}

    def set_extra_state(self, state):
        pass

class Sigmoid(Dropout):
    def forward(self, x):
        return self.net(x).sigmoid()

class Small(Dropout):
    # logits from 0 to 1, which are not the outputs of a sigmoid
    def forward(self, x):
        return self.net(x).square() * 1e-3

class LogSoftmax(Dropout):
    def forward(self, x):
        return self.net(x).log_softmax(1)

class Auxiliary(Dropout):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.aux = nn.Linear(64, classes)

    def forward(self, x):
        return self.net(x) + self.aux(x.flatten(1)) if self.training else self.net(x)

def seeded(shape, classes):
    torch.manual_seed(0)
    return layers(nn.Linear(16, 16))

def loaded(shape, classes):
    net = layers(nn.Linear(16, 16))
    net.load_state_dict({k: torch.linspace(-0.1, 0.1, v.numel()).view(v.shape) for k, v in net.state_dict().items()})
    return net

def by_seed(shape, classes):
    return layers(nn.Linear(16, 16))

def thousand(shape, classes):
    return nn.Sequential(layers(nn.Linear(16, 16)), nn.Linear(10, 1000))

def three(shape, classes):
    return nn.Sequential(layers(nn.Linear(16, 16)), nn.Linear(10, 3))

class KeepsAttribute(Dropout):
    seen = 1.0

    def forward(self, x):
        if self.training:
            self.seen = 0.9 * self.seen + 0.2
        return self.net(x) * self.seen

class KeepsBuffer(Dropout):
    persistent = False

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.register_buffer("seen", torch.zeros(()), persistent=self.persistent)

    def forward(self, x):
        if self.training:
            self.seen += x.mean().detach()
        return self.net(x) + self.seen * x.flatten(1)[:, :10]

class KeepsPersistentBuffer(KeepsBuffer):
    persistent = True

class KeepsMean(Dropout):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.before = {}

    def forward(self, x):
        h = self.net[1](x.flatten(1))
        if self.training:
            self.before["mean"] = h.detach().mean(0)
        return self.net[3](self.net[2](h - self.before.get("mean", 0)))

class AddsBuffer(Dropout):
    def forward(self, x):
        if self.training:
            self.register_buffer("seen", torch.ones(()))
        return self.net(x)

class Detached(Dropout):
    def forward(self, x):
        return self.net[3](self.net[2](self.net[1](x.flatten(1)).detach()))

class ResidualData(Dropout):
    def forward(self, x):
        h = self.net[1](x.flatten(1))
        return self.net[3](h + self.net[2](h).data)

class WithoutGradient(Dropout):
    def forward(self, x):
        with torch.no_grad():
            h = self.net[1](x.flatten(1))
        return self.net[3](self.net[2](h))

class Copied(Dropout):
    def forward(self, x):
        return self.net[3](copy.deepcopy(self.net[2])(self.net[1](x.flatten(1))))

class Rounded(Dropout):
    def forward(self, x):
        return self.net[3](self.net[2](self.net[1](x.flatten(1)).round()))

class Unused(Dropout):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.spare = nn.Linear(4, 4)

    def forward(self, x):
        return self.net(x)

class FrozenByUser(Dropout):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.net[1].requires_grad_(False)

    def forward(self, x):
        return self.net(x)

class SkippedAtFirst(Dropout):
    steps = 0

    def forward(self, x):
        self.steps += self.training
        h = self.net[1](x.flatten(1))
        return self.net[3](self.net[2](h) if self.steps > 2 or not self.training else h)

class DetachedOutput(Dropout):
    def forward(self, x):
        return self.net(x).detach()

class Steady(Dropout):
    def forward(self, x):
        return self.net(nn.functional.dropout(x, 0.2, self.training))

class ChangesImages(Dropout):
    def forward(self, x):
        return self.net(x.mul_(0.5))

class ChangesView(Dropout):
    def forward(self, x):
        x[:, :, 0] = 0
        return self.net(x)

class Dict(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.net = layers(nn.Linear(16, 16))

    def forward(self, x):
        return {"logits": self.net(x), "features": x}

class Pair(Dict):
    def forward(self, x):
        return (self.net(x), x) if self.training else self.net(x)

class WrongShape(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Flatten(), nn.Linear(784, num_classes))

class Residual(nn.Module):
    # as in torchvision: one ReLU module that is called after each normalization, and after the sum
    def __init__(self, num_classes=10):
        super().__init__()
        self.stem, self.bn0, self.relu = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.relu(x + y).mean((2, 3)))

class Grouped(nn.Module):
    # its attribute is a module, not the name of a normalization
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()
        self.middle, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.middle(self.relu(self.norm(self.conv(x)))).mean((2, 3)))

class Flat(Dict):
    def forward(self, x):
        return self.net(x).flatten()
"""


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the words of a short run, after putting the networks where they can be imported."""
    (tmp_path / "users_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return ["init=scratch", "epochs=1", "pretrain.epochs=1", "method=dorefa", "bits=w2a2", "runtime.tensorboard=false"]


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (
            "weight_norm",
            "2: the weight is computed in every forward pass\nfirst call torch.nn.utils.remove_weight_norm",
        ),
        ("parametrized", "2: the weight is computed in every forward pass\nfirst call torch.nn.utils.parametrize"),
        ("pruned", "2: the weight is computed in every forward pass\nfirst call torch.nn.utils.prune.remove(layer, "),
        ("tied", "2 and 4 share a weight"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_network_that_cannot_be_quantized_is_an_unsupported_run(
    configure: Configure, words: list[str], network: str, reason: str
) -> None:
    """An unsupported run does not end a sweep."""
    result = run(planned_run(configure(*words, f"model=users_networks:{network}")))
    assert result.status == "unsupported"
    assert str(result.reason).startswith(reason)


def test_what_the_first_layer_reads_is_found_before_anything_trains(configure: Configure, words: list[str]) -> None:
    network = [*words, "model=users_networks:normalized"]
    result = run(planned_run(configure(*network, "layers.first=8")))
    assert result.status == "unsupported"
    assert "does not read the image but the result of BatchNorm2d 0" in str(result.reason)
    assert run(planned_run(configure(*network, "layers.first=8", "layers.input=float"))).status == "done"


def test_the_row_names_what_is_left_float(configure: Configure, words: list[str]) -> None:
    planned = planned_run(configure(*words, "model=users_networks:transformer"))
    line = (
        "2 of 6 layers with weights are quantized; left in float: 1, 2.self_attn (MultiheadAttention), "
        "2.self_attn.out_proj (NonDynamicallyQuantizableLinear), 4"
    )
    assert line in plan([planned])[-1].notes
    result: Result = run(planned)
    assert line in result.warnings
    assert result.verified is not None
    assert list(result.verified) == ["2.linear1", "2.linear2"]


def test_signed_activations_before_unsigned_levels_are_noted(configure: Configure, words: list[str]) -> None:
    notes = run(planned_run(configure(*words, "model=users_networks:silu"))).warnings
    (note,) = (line for line in notes if line.startswith("1 layer sets negative inputs to 0 (3 "))
    assert " % of the inputs), because no level is negative" in note
    signed = run(planned_run(configure(*words, "model=users_networks:silu", "method=lsq"))).warnings
    assert not any("negative inputs" in line for line in signed)
    relu = run(planned_run(configure(*words, "model=mlp", "model.width=16"))).warnings
    assert not any("negative inputs" in line for line in relu)


OTHER_IMAGES = (
    "the output for an image depends on the other images of its batch, even in eval mode, "
    "so the accuracy would change with other batches"
)


@pytest.mark.parametrize(
    ("network", "noted"),
    [("Scheduled", True), ("GlobalSteps", True), ("OwnGenerator", True), ("Buffered", False), ("Dropout", False),
     ("Centred", False), ("Steady", False)],
)  # fmt: skip
def test_state_that_acts_only_in_training_is_noted(
    configure: Configure, words: list[str], network: str, noted: bool
) -> None:
    """Such a run would continue with other weights after it was stopped, without any other sign of it."""
    result = run(planned_run(configure(*words, f"model=users_networks:{network}", "method=dorefa", "bits=w2a2")))
    found = [line for line in result.warnings if line.startswith("in training, the network has state that is not in")]
    assert bool(found) is noted


def test_a_network_does_not_change_the_threads_of_its_run(configure: Configure, words: list[str]) -> None:
    config = configure(*words, "model=users_networks:Threads", "method=dorefa", "bits=w2a2", "runtime.threads=1")
    assert run(planned_run(config)).status == "done"


def test_extra_state_is_refused(configure: Configure, words: list[str]) -> None:
    with pytest.raises(ConfigError, match="_extra_state in the network's state_dict is a dict, but runs store only"):
        run(planned_run(configure(*words, "model=users_networks:ExtraState", "method=dorefa", "bits=w2a2")))


@pytest.mark.parametrize(
    ("network", "note"),
    [
        ("Dropout", "two evaluations of the same images differ"),
        ("Counting", "two evaluations of the same images differ"),
        ("Centred", OTHER_IMAGES),
        ("NeverInEval", OTHER_IMAGES),
        ("Softmax", "the network returns probabilities; the loss treats them as logits and applies softmax"),
        (
            "Sigmoid",
            "the network returns numbers from 0 to 1 only, as after a sigmoid; the loss treats them as logits "
            "and applies softmax",
        ),
        ("LogSoftmax", None),
        ("Small", None),
        ("Steady", None),
    ],
)
@pytest.mark.parametrize("method", tiered(["dorefa", "float"], ["dorefa"]))
def test_an_accuracy_that_depends_on_more_than_the_weights_is_noted(
    configure: Configure, words: list[str], network: str, note: str | None, method: str
) -> None:
    widths = "bits=w2a2" if method == "dorefa" else "bits=auto"
    result = run(planned_run(configure(*words, f"model=users_networks:{network}", f"method={method}", widths)))
    expected = ("two evaluations", "the output for an image", "the network returns")
    found = [line for line in result.warnings if line.startswith(expected)]
    assert [line.partition(":")[0].partition(", also")[0] for line in found] == ([note] if note else [])


@pytest.mark.parametrize(
    ("network", "kept"),
    [
        ("KeepsAttribute", "the network has state that is not in its state_dict"),
        ("KeepsBuffer", "the network has state that is not in its state_dict"),
        ("KeepsMean", "the network has state that is not in its state_dict"),
        ("AddsBuffer", "last.pt and config.yaml belong to different networks"),
        ("KeepsPersistentBuffer", None),
    ],
)
@pytest.mark.parametrize("method", tiered(["dorefa", "float"], ["dorefa"]))
def test_state_that_is_not_in_the_weights_file_is_noted(
    configure: Configure, words: list[str], network: str, kept: str | None, method: str
) -> None:
    words += [f"method={method}", "bits=w2" if method == "dorefa" else "bits=auto"]
    warnings = run(planned_run(configure(*words, f"model=users_networks:{network}"))).warnings
    found = [line for line in warnings if line.startswith(("the network has state", "last.pt"))]
    assert [line.partition(" (")[0].partition(":")[0] for line in found] == ([kept] if kept else [])


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        ("Detached", "net.1.weight, net.1.bias"),
        ("ResidualData", "net.2.weight, net.2.bias"),
        ("WithoutGradient", "net.1.weight, net.1.bias"),
        ("Copied", "net.2.weight, net.2.bias"),
        ("Rounded", "net.1.weight, net.1.bias"),
        ("Unused", "spare.weight, spare.bias"),
        ("FrozenByUser", ""),
        ("SkippedAtFirst", ""),
        ("Steady", ""),
    ],
)
@pytest.mark.parametrize("method", tiered(["dorefa", "float"], ["dorefa"]))
def test_parameters_without_a_gradient_are_named(
    configure: Configure, words: list[str], network: str, parameters: str, method: str
) -> None:
    words += [f"method={method}", "bits=w2" if method == "dorefa" else "bits=auto", "optim@pretrain.optim=adam"]
    result = run(planned_run(configure(*words, f"model=users_networks:{network}")))
    found = [line for line in result.warnings if line.startswith("parameters not trained")]
    assert found == (
        [
            f"parameters not trained: {parameters} had no gradient in the first 18 steps; "
            "probably forward() does not use them, detaches or copies a tensor, or clips all values that depend on "
            "them, as quantizers can"
        ]
        if parameters
        else []
    )


@pytest.mark.parametrize(("method", "epochs"), [("inq", 1), ("slq", 2), ("qcnn", 1), ("dq", 1)])
def test_weights_that_a_method_freezes_are_not_named(
    configure: Configure, words: list[str], method: str, epochs: int
) -> None:
    network = [f"method={method}", "bits=auto", "model=mlp", "model.width=16", f"epochs={epochs}", "distill=none"]
    result = run(planned_run(configure(*words, *network)))
    assert result.status == "done"
    assert not [line for line in result.warnings if line.startswith("parameters not trained")]


@pytest.mark.parametrize(("network", "same"), [("seeded", True), ("loaded", True), ("by_seed", False)])
def test_initial_weights_that_do_not_depend_on_the_seed_are_noted(
    configure: Configure, words: list[str], network: str, same: bool
) -> None:
    warnings = run(planned_run(configure(*words, f"model=users_networks:{network}"))).warnings
    assert sum(line.startswith("the initial weights are the same for every seed") for line in warnings) == same


@pytest.mark.parametrize(("network", "count"), [("thousand", 1000), ("three", 3)])
def test_a_network_with_another_number_of_classes_is_refused(
    configure: Configure, words: list[str], network: str, count: int
) -> None:
    planned = planned_run(configure(*words, f"model=users_networks:{network}"))
    for attempt in (lambda: run(planned), lambda: plan([planned])):
        with pytest.raises(ConfigError, match=f"returns {count} logits per image; must be 10, one per class\n"):
            attempt()


def test_a_network_without_any_gradient_is_refused(configure: Configure, words: list[str]) -> None:
    planned = planned_run(configure(*words, "model=users_networks:DetachedOutput"))
    with pytest.raises(ConfigError, match=r"does not depend on any parameter that is trained\n.*detach\(\)"):
        run(planned)


def test_layers_that_evaluation_does_not_call_are_noted(configure: Configure, words: list[str]) -> None:
    planned = planned_run(configure(*words, "model=users_networks:Auxiliary"))
    line = "layers that evaluation does not use; the size includes them as float layers: aux"
    assert f"{NOT_REACHED}: aux" in plan([planned])[-1].notes
    assert line in run(planned).warnings


@pytest.mark.parametrize(
    ("network", "line"),
    [
        ("Uncalled", "layers that are used without being called, so they stay in float and their operations are not "
        "counted: mid"),
        ("Branches", "layers that only some images reach, so they stay in float and their operations are not counted: "
        "bright"),
    ],
)  # fmt: skip
def test_layers_that_an_image_of_zeros_does_not_call_are_noted(
    configure: Configure, words: list[str], network: str, line: str
) -> None:
    planned = planned_run(configure(*words, f"model=users_networks:{network}"))
    assert line in run(planned).warnings
    layer = line.rpartition(" ")[2]
    notes = [note for note in plan([planned])[-1].notes if note.endswith(f": {layer}")]
    assert notes == [f"{NOT_REACHED}: {layer}"], (
        "plan sees no images, so it does not know whether others reach the layer"
    )


def test_a_stored_run_quantizes_the_layers_that_its_network_executed(configure: Configure, words: list[str]) -> None:
    """The initial weights of the run, not those of the rebuilt network, determine which layers are quantized."""
    planned = planned_run(configure(*words, "model=users_networks:Routed", "init=float", "epochs=3"))
    run(planned_run(baseline_config(planned.config)))
    calls = count()
    with pytest.raises(Interrupted):
        run(planned, RunContext(stop=lambda: 15 if next(calls) > 30 else 0))
    result = run(planned)  # continued
    path = Path(result.run)
    assert result.verified is not None
    assert list(result.verified) == ["experts.1.0"]
    assert result.cost is not None
    assert result.cost.macs == 64 * 16 + 16 * 16 + 16 * 10
    assert result.cost.bitops == (64 * 16 + 16 * 10) * 32 * 32 + 16 * 16 * 2 * 2
    assert not [line for line in result.warnings if "state_dict" in line]
    for name in ("last.pt", "best.pt"):
        setup, model, _ = load_finished_network(path, weights=name.removesuffix(".pt"))
        assert list(quantized_layers(model)) == ["experts.1.0"]
        assert setup.macs["experts.1.0"] == 256
    stored = unpack((path / "last.pt").read_bytes(), "last.pt")
    stored["layers"]["quantized"]["experts.1.1"] = "bypassed"
    (path / "last.pt").write_bytes(pack(stored))
    with pytest.raises(CheckpointError, match=r"experts\.1\.1 \(float, in the run bypassed\)\n.*\n.*rerun=true"):
        load_finished_network(path, weights="last")
    del stored["layers"]  # as in runs of earlier versions
    (path / "last.pt").write_bytes(pack(stored))
    with pytest.raises(CheckpointError, match=r"experts\.0\.0 \(w2a2g32, in the run float\); experts\.1\.0 \(fl"):
        load_finished_network(path, weights="last")


def test_a_stored_run_of_an_earlier_version_loads(configure: Configure, words: list[str]) -> None:
    path = Path(run(planned_run(configure(*words, "model=mlp"))).run)
    stored = unpack((path / "last.pt").read_bytes(), "last.pt")
    del stored["layers"]
    (path / "last.pt").write_bytes(pack(stored))
    _, model, _ = load_finished_network(path, weights="last")
    assert quantized_layers(model)


@pytest.mark.parametrize(
    ("network", "found"),
    [("Dict", "a dict with logits, features"), ("Pair", "a tuple"), ("Flat", r"a tensor \(\d+,\)")],
)
def test_a_network_that_does_not_return_logits_is_refused(
    configure: Configure, words: list[str], network: str, found: str
) -> None:
    planned = planned_run(configure(*words, f"model=users_networks:{network}"))
    for attempt in (lambda: run(planned), lambda: plan([planned])):
        with pytest.raises(ConfigError, match=f"the network returns {found} .* allowed: a tensor of logits"):
            attempt()


@pytest.mark.parametrize("network", ["ChangesImages", "ChangesView"])
def test_a_network_that_changes_its_images_is_refused(configure: Configure, words: list[str], network: str) -> None:
    """With a teacher, the teacher would see the changed images."""
    planned = planned_run(configure(*words, f"model=users_networks:{network}"))
    for attempt in (lambda: run(planned), lambda: plan([planned])):
        with pytest.raises(ConfigError, match=r"changes its input in place.*\n.*x\.clone\(\)"):
            attempt()


def test_a_batch_of_one_image_is_refused_where_batch_normalization_needs_two(
    configure: Configure, words: list[str]
) -> None:
    planned = planned_run(configure(*words, "model=users_networks:one_value", "optim.batch_size=1"))
    for attempt in (lambda: run(planned), lambda: plan([planned])):
        with pytest.raises(ConfigError, match=r"optim\.batch_size=1: .*\nset optim\.batch_size=2"):
            attempt()


def test_a_network_for_other_images_is_refused(configure: Configure, words: list[str]) -> None:
    planned = planned_run(configure(*words, "model=users_networks:WrongShape"))
    message = r"WrongShape: the network fails on images of shape \(2, 1, 8, 8\) \(N, C, H, W\): RuntimeError: .*\nmake"
    for attempt in (lambda: run(planned), lambda: plan([planned])):
        with pytest.raises(ConfigError, match=message):
            attempt()


def test_scale_and_shift_are_removed_from_a_network_for_a_method_that_requires_it(
    configure: Configure, words: list[str]
) -> None:
    words = [*words, "model=users_networks:Residual"]
    affine = run(planned_run(configure(*words, "method=pact")))
    result = run(planned_run(configure(*words, "method=hwgq", "bits=auto")))
    assert (affine.status, result.status) == ("done", "done")
    assert result.cost is not None
    assert affine.cost is not None
    assert affine.cost.params - result.cost.params == 2 * (8 + 8 + 8), "scale and shift of three normalizations"
    assert result.network == {"norm": "no_affine"}
    setup = assemble(configure(*words, "method=hwgq", "bits=auto"))
    assert setup.baseline.config.model["norm"] == "no_affine", "the float baseline has no scale and shift either"
    result = run(planned_run(configure(*words, "method=xnor", "bits=auto")))
    assert result.status == "unsupported"
    assert "which is not possible for conv1 and 1 more: relu is called 3 times, and also feeds add, mean" in str(
        result.reason
    )


@pytest.mark.parametrize(
    ("method", "network", "reason"),
    [
        ("gupta", "Residual", "requires a network without batch normalization; Residual has 3 such layers"),
        ("hwgq", "Grouped", "Grouped has no batch normalization"),
        ("hwgq", "Residual", ""),
        ("gupta", "Grouped", ""),
    ],
)
def test_the_normalization_that_a_method_requires(
    configure: Configure, words: list[str], method: str, network: str, reason: str
) -> None:
    config = configure(*words, f"model=users_networks:{network}", f"method={method}", "bits=auto")
    with pytest.raises(Unsupported, match=reason) if reason else nullcontext():
        assemble(config).float_model()


def test_a_network_with_lazy_layers_is_refused(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = "nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))"
    (tmp_path / "lazy.py").write_text(f"from torch import nn\ndef build(shape, classes):\n    return {network}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="model=lazy:build: the network has lazy layers"):
        assemble(configure("model=lazy:build"))
