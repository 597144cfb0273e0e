"""Initial weights from anybody's checkpoint: where the tensors are, what they are called, what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Configure, long_tier
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from qbench.config.identity import file_sha256, run_identity
from qbench.errors import CheckpointError, ConfigError
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import assemble
from qbench.models import resnet
from qbench.training.initial_weights import fits, load_initial_weights

Weights = dict[str, Tensor]


def network(classes: int = 10, **options: Any) -> nn.Module:
    return resnet.build(
        (1, 8, 8), classes, **{"depth": 8, "width": 4, "form": "post", "shortcut": "A_stride"} | options
    )


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Weights and statistics that differ from those of a new network."""
    model, generator = network(), torch.Generator().manual_seed(7)
    return {k: torch.rand(t.shape, generator=generator) if t.dim() else t + 5 for k, t in model.state_dict().items()}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {re.sub(f"^{re.escape(old)}", new, k): t for k, t in weights.items()}


def safetensors(weights: Weights) -> bytes:
    """Return a .safetensors file, written from the description of the format."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, tensor in weights.items():
        data = tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.numpy().tobytes()
        place = [len(body), len(body) + len(data)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        body += data
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


FILES: dict[str, tuple[Callable[[Weights], Any], list[str]]] = {
    "bare": (lambda w: w, []),
    "state_dict": (lambda w: {"epoch": 3, "state_dict": w}, ["taken from the key state_dict"]),
    "model": (lambda w: {"model": w}, []),
    "model_state_dict": (lambda w: {"model_state_dict": w}, ["taken from the key model_state_dict"]),
    "net": (lambda w: {"net": w, "acc": 91.0}, ["taken from the key net"]),
    "ema": (lambda w: {"ema": renamed("", "module.")(w) | {"n_averaged": torch.tensor(7)}},
            ["taken from the key ema", "prefix module. removed", "not weights, so left out: n_averaged"]),
    "model and ema": (lambda w: {"ema": {}, "model": w}, ["taken from the key model", "ema not used"]),
    "model and another average": (lambda w: {"model": w, "ema_state_dict": renamed("", "module.")(w), "epoch": 3},
                                  ["taken from the key model", "ema_state_dict not used"]),
    "model and optimizer": (lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}}, []),
    "a name and weights": (lambda w: {"model": "resnet8", "net": w}, ["taken from the key net"]),
    "module.": (renamed("", "module."), ["prefix module. removed"]),
    "model.": (renamed("", "model."), ["prefix model. removed"]),
    "compiled": (renamed("", "_orig_mod.module."), ["prefix _orig_mod.module. removed"]),
    "backbone and head": (lambda w: {("head.fc" + k[2:] if k.startswith("fc") else f"backbone.{k}"): t
                                     for k, t in w.items()},
                          ["prefix backbone. removed", "head.fc renamed to fc"]),
    "linear": (renamed("fc", "linear"), ["linear renamed to fc"]),
    "classifier": (renamed("fc", "module.classifier.1"), ["prefix module. removed", "classifier.1 renamed to fc"]),
    "with numbers": (lambda w: w | {"epoch": 3, "best": 91.0}, ["not weights, so left out: epoch, best"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_state_dict_is_found_and_its_names_are_translated(name: str, weights: Weights, tmp_path: Path) -> None:
    write, notes = FILES[name]
    torch.save(write(weights), tmp_path / "file.pth")
    model = network()
    loaded = load_initial_weights(model, tmp_path / "file.pth")
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert loaded.message == "; ".join([f"weights from {tmp_path / 'file.pth'}: {len(weights)} tensors loaded", *notes])
    assert loaded.is_float


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_is_converted_and_said(dtype: torch.dtype, weights: Weights, tmp_path: Path) -> None:
    stored = {key: t.to(dtype) if t.is_floating_point() else t for key, t in weights.items()}
    torch.save(stored, tmp_path / "file.tar")
    model = network()
    message = load_initial_weights(model, tmp_path / "file.tar").message
    assert f"{str(dtype).removeprefix('torch.')} converted to float32" in message
    assert all(torch.equal(t, stored[key].to(t.dtype)) for key, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_files_load(dtype: torch.dtype, weights: Weights, tmp_path: Path) -> None:
    stored = {f"model.{k}": t.to(dtype) if t.is_floating_point() else t for k, t in weights.items()}
    (tmp_path / "model.safetensors").write_bytes(safetensors(stored))
    model = network()
    loaded = load_initial_weights(model, tmp_path / "model.safetensors")
    assert "no checksums" in loaded.message
    assert all(torch.equal(t, stored[f"model.{key}"].to(t.dtype)) for key, t in model.state_dict().items())


def broken_headers(good: bytes) -> dict[str, bytes]:
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])

    def changed(**values: object) -> bytes:
        text = json.dumps(header | {"conv1.weight": header["conv1.weight"] | values}).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + size :]

    return {
        "cut in the tensors": good[:-1],
        "cut in the header": good[: size // 2],
        "bytes after the end": good + b"x",
        "another type": changed(dtype="F4"),
        "a larger shape": changed(shape=[4, 1, 3, 30]),
        "a negative shape": changed(shape=[-4, -1, 3, 3]),
        "bytes of another tensor": changed(data_offsets=[4, 148]),
        "beyond the end": changed(data_offsets=[10**9, 10**9 + 144]),
        "no places": changed(data_offsets=None),
        "a list": (2).to_bytes(8, "little") + b"[]",
        "no JSON": (8).to_bytes(8, "little") + b"{" + bytes(7),
    }


def test_damaged_safetensors_are_refused(weights: Weights, tmp_path: Path) -> None:
    cases = broken_headers(safetensors(weights))
    for name, data in cases.items():
        (tmp_path / "bad.safetensors").write_bytes(data)
        if name == "bytes of another tensor":  # a valid file with other weights
            load_initial_weights(network(), tmp_path / "bad.safetensors")
            continue
        with pytest.raises(CheckpointError, match=r"bad\.safetensors") as caught:
            load_initial_weights(network(), tmp_path / "bad.safetensors")
        assert len(str(caught.value).splitlines()) <= 2, name


def test_names_that_could_be_mixed_up_are_refused(weights: Weights, tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save(weights | {"module.conv1.weight": weights["conv1.weight"]}, file)
    with pytest.raises(CheckpointError, match=r"two of its tensors would be named conv1\.weight"):
        load_initial_weights(network(), file)
    two = renamed("fc", "linear")(weights) | {"head.weight": weights["fc.weight"], "head.bias": weights["fc.bias"]}
    torch.save(two, file)
    with pytest.raises(CheckpointError, match=r"missing: fc\.weight, fc\.bias"):
        load_initial_weights(network(), file)


def test_negative_variances_are_refused(weights: Weights, tmp_path: Path) -> None:
    """Evaluation would give nan. A variance that rounding made slightly negative loads, because eps exceeds it."""
    for value, refused in ((-1e-3, True), (-1e-5, True), (-1e-6, False), (0.0, False)):
        changed = weights["bn1.running_var"].clone()
        changed[1] = value
        torch.save(weights | {"bn1.running_var": changed}, tmp_path / "w.pt")
        if refused:
            with pytest.raises(CheckpointError, match=r"w\.pt: bn1\.running_var contains negative variances"):
                load_initial_weights(network(), tmp_path / "w.pt")
        else:
            load_initial_weights(network(), tmp_path / "w.pt")


def test_another_number_of_classes_needs_a_new_last_layer(weights: Weights, tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save(renamed("fc", "linear")(weights), file)
    with pytest.raises(
        CheckpointError, match=r"its last layer has 10 classes, but the data set has 7\nadd model\.head=new"
    ):
        load_initial_weights(network(classes=7), file)
    model = network(classes=7)
    random = {key: model.state_dict()[key].clone() for key in ("fc.weight", "fc.bias")}
    loaded = load_initial_weights(model, file, new_head=True)
    assert "linear renamed to fc" in loaded.message
    assert "the last layer is new (fc.weight, fc.bias)" in loaded.message
    assert not loaded.is_float, "its accuracy is that of chance, which is no baseline"
    assert all(torch.equal(t, random.get(key, weights[key])) for key, t in model.state_dict().items())


def test_a_file_with_quantizers_is_no_float_network(weights: Weights, tmp_path: Path) -> None:
    torch.save(weights | {"conv1.weight_q.scale": torch.ones(1)}, tmp_path / "file.pt")
    assert not load_initial_weights(network(), tmp_path / "file.pt").is_float
    assert fits(network(), tmp_path / "file.pt")
    assert not fits(network(depth=14), tmp_path / "file.pt")


@pytest.mark.parametrize("method", ["dorefa", long_tier("qd")])
def test_latent_weights_are_no_float_network(smoke: Configure, tmp_path: Path, method: str) -> None:
    """The quantizers of these methods have no tensors, so only the checkpoint's list of layers tells the difference."""
    source = Path(run(planned_run(smoke(f"method={method}", "bits=w4a32"))).run)
    for init in (source, source / "last.pt"):
        result = run(planned_run(smoke("method=lsq", "bits=w2a2", f"init={init}", "rerun=true")))
        assert result.baseline_top1 is None
        with pytest.raises(ConfigError, match="this is not a float network, so it cannot be the teacher"):
            run(planned_run(smoke("method=lsq", "bits=w2a2", f"init={init}", "distill=kd")))


FORM = ("model.form=post", "model.shortcut=A_stride")


@pytest.fixture
def trained(smoke: Configure, tmp_path: Path) -> Path:
    """The weights of a float baseline as another program would store them."""
    result = run(planned_run(smoke("method=float", *FORM)))
    state = torch.load(Path(result.run) / "best.pt", weights_only=True)["model"]
    torch.save({"state_dict": renamed("fc", "module.linear")(renamed("", "module.")(state))}, tmp_path / "other.th")
    return tmp_path / "other.th"


def test_a_checkpoint_is_evaluated_as_it_is(smoke: Configure, trained: Path) -> None:
    float_run = run(planned_run(smoke("method=float", *FORM)))
    result = run(planned_run(smoke("method=float", f"init={trained}", "epochs=0", *FORM)))
    assert float_run.best is not None
    assert result.final.test == float_run.best.test
    assert result.final.epoch is None
    assert result.baseline.final == result.final
    assert (result.baseline.run, result.baseline.sha256) == (str(trained), file_sha256("init", str(trained)))


def test_the_network_of_a_file_is_the_float_baseline_and_evaluating_it_changes_nothing(
    smoke: Configure, trained: Path
) -> None:
    words = ("method=dorefa", "bits=w2a2", *FORM)
    first, second = (run(planned_run(smoke(*words, init))) for init in ("init=float", f"init={trained}"))
    assert second.weights_sha256 == first.weights_sha256
    assert second.baseline.final.test == first.baseline.best.test
    assert any(str(trained) in note and second.baseline.sha256[:12] in note for note in second.notes)


def test_the_network_of_a_file_is_the_teacher(smoke: Configure, trained: Path) -> None:
    result = run(planned_run(smoke("method=qd", f"init={trained}", f"out={trained.parent / 'taught'}", *FORM)))
    assert result.status == "done"
    assert [path.name.split("-")[0] for path in (trained.parent / "taught").glob("*/*")] == ["qd"], "no float baseline"
    with pytest.raises(ConfigError, match="not a float network, so it cannot be the teacher"):
        run(planned_run(smoke("method=qd", f"init={trained}", "model.head=new", *FORM)))


def test_a_new_last_layer_has_no_baseline_and_is_another_run(smoke: Configure, trained: Path) -> None:
    kept, new = (smoke("method=dorefa", f"init={trained}", f"model.head={head}", *FORM) for head in ("keep", "new"))
    assert run_identity(kept).digest != run_identity(new).digest
    assert run_identity(kept).digest == run_identity(smoke("method=dorefa", f"init={trained}", *FORM)).digest
    assert "head" not in run_identity(kept).keys["model"]
    assert run(planned_run(new)).baseline is None


def test_8_bit_floats_are_refused(smoke: Configure, tmp_path: Path) -> None:
    weights = {name: t.to(torch.float8_e4m3fn) if t.dim() else t for name, t in network(depth=20).state_dict().items()}
    torch.save(weights, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"does not fit the network: other type: .*float8_e4m3fn"):
        assemble(smoke("method=dorefa", f"init={tmp_path / 'file.pt'}", "model=resnet20"))


@pytest.mark.full
def test_networks_that_would_fit_are_named(smoke: Configure, tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save(network(depth=20, width=16).state_dict(), file)
    with pytest.raises(CheckpointError, match=r"does not fit.*\nthe file fits model=resnet20 model\.form=post$"):
        assemble(smoke("method=dorefa", f"init={file}"))
    torch.save(network(depth=20, width=5).state_dict(), file)
    with pytest.raises(CheckpointError, match=r"\nthe file fits no network of qbench; to list them: qbench list$"):
        assemble(smoke("method=dorefa", f"init={file}"))


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["model.head=new"], "model.head=new has no effect with init=auto"),
        (["model.head=new", "init=float"], "model.head=new has no effect with init=float"),
        (["model.head=old"], "model.head=old: must be one of keep, new"),
        (["init=imagenet"], "init=imagenet: torchvision has no ImageNet weights for resnet8"),
    ],
)
def test_keys_of_initial_weights_that_cannot_work(smoke: Configure, words: list[str], phrase: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(phrase)):
        smoke("method=dorefa", *words)


@pytest.mark.parametrize("method", ["inq", "slq"])
def test_methods_that_quantize_in_the_course_of_training_need_epochs(smoke: Configure, method: str) -> None:
    with pytest.raises(ConfigError, match=f"epochs=0: {method} quantizes its weights during training"):
        assemble(smoke(f"method={method}", "epochs=0"))


def test_imagenet_weights_are_those_of_torchvision(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    words = ("model=resnet18", "dataset=synthetic", "dataset.channels=3", "method=dorefa", "init=imagenet")
    file = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    with pytest.raises(CheckpointError, match=rf"{file} is missing\nfetch https://\S+/resnet18-f37072fd\.pth"):
        configure(*words)
    file.parent.mkdir()
    file.write_bytes(b"not these")
    with pytest.raises(CheckpointError, match="is damaged: its sha256 does not begin with f37072fd"):
        configure(*words)
    monkeypatch.setattr("hashlib.sha256", lambda data=b"": type("Stated", (), {"hexdigest": lambda self: "f37072fd"})())
    assert configure(*words).init == str(file)


@pytest.mark.parametrize("head", ["linear", "convolution"])
def test_the_new_last_layer_is_the_last_that_runs(configure: Configure, tmp_path: Path, head: str) -> None:
    """The last layer need not be registered last, and need not be linear."""
    words = ("method=float", f"model=test_initial_weights:Heads{head.title()}")
    torch.save(assemble(configure(*words)).float_model().state_dict(), tmp_path / "best.pt")
    setup = assemble(configure(*words, "model.head=new", f"init={tmp_path / 'best.pt'}"))
    loaded = setup.load_file(setup.float_model(seed=1))
    assert "the last layer is new (head.weight, head.bias)" in loaded.message


def test_a_last_layer_whose_weight_is_computed_is_not_renamed(tmp_path: Path) -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    torch.save({"fc.weight": torch.ones(3, 4)}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"missing: .*parametrizations"):
        load_initial_weights(model, tmp_path / "file.pt")


class HeadsLinear(nn.Module):
    """A network whose last layer is registered first."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.head, self.first, self.scale = nn.Linear(8, classes), nn.Conv2d(shape[0], 8, 3), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        means = self.first(x).relu().mean((2, 3))
        y: Tensor = self.head(means * self.scale(means).sigmoid())
        return y


class HeadsConvolution(nn.Module):
    """A network whose last layer is a convolution."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(shape[0], 8, 3), nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.first(x).relu()).mean((2, 3))
        return y
