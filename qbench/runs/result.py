"""Defines the result of a run, which is the content of `result.json`."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import msgspec

from qbench.bits import FLOAT, LevelCount
from qbench.config.identity import digest
from qbench.config.schema import RATE
from qbench.cost.network_cost import NetworkCost
from qbench.system import files

SCHEMA = 3
"""Version of the format of result.json. Results with other versions are not read."""

Name = Annotated[str, msgspec.Meta(min_length=1)]
Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]
Seed = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Width = Annotated[int, msgspec.Meta(ge=1, le=FLOAT)]
STATUSES = ("done", "failed", "diverged", "unsupported")


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Top-1 and top-5 in percent, and mean cross entropy, on one split."""

    top1: Percent
    top5: Percent
    loss: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The accuracy of one set of weights on the test and validation splits.

    `val` is None if there is no validation split. `epoch` is the epoch of the weights, counted from 0, or None if the
    network was not trained.
    """

    test: Accuracy
    val: Accuracy | None = None
    epoch: int | None = None


@dataclass(frozen=True, kw_only=True)
class BaselineResult:
    """The directory of a float baseline, and its evaluations after the last and after the best epoch.

    If a run starts from a checkpoint, the baseline is the network in the checkpoint, which is evaluated before it is
    quantized. In this case, `run` is the path of the checkpoint file, or of the directory that contains best.pt, and
    `sha256` is the digest of the file.
    """

    run: str
    final: Evaluation
    best: Evaluation | None = None
    sha256: str | None = None

    @property
    def pretrained(self) -> bool:
        """Whether the baseline is a checkpoint that `init` names, instead of a float network that qbench trained."""
        return self.sha256 is not None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The configuration keys that must be equal in two runs that are compared, and the digest of these keys.

    The digest is "" if the protocol is not known.
    """

    hash: str
    keys: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainingSpeed:
    """Training speed without evaluation, and peak memory in bytes of the process or the CUDA device."""

    images_per_second: float
    seconds_per_epoch: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """The content of `result.json`. docs/reference/run-directory.md describes each field.

    `final` is measured after the last epoch, and `best` after the epoch with the best validation accuracy. `verified`
    contains the number of used and allowed levels, as `verified[layer][tensor]`, where `tensor` is w, a or g.
    `protocol_changes` describes how the method changes the common protocol of all methods. `run` is the directory of
    the run. This path is not stored in the file.

    `data_sha256` is the digest of the data set's fingerprint, which contains the number of images and the sha256 of the
    images and labels of each split. This digest is not part of `identity`, because the identity must be known before
    any data is read. The digest shows whether a stored run was trained on the images that are present now.

    `warnings` are facts that a reader must know to interpret the accuracy or the size. `notes` are other remarks.

    `commits` are the commits of qbench that trained the run, oldest first. There are several commits if the run was
    continued after a change of the code.
    """

    schema: int = SCHEMA
    status: str
    reason: str | None = None
    method: Name
    options: dict[str, Any] = field(default_factory=dict)
    bits: dict[str, Width]
    network: dict[str, str] = field(default_factory=dict)
    levels: int | None = None
    seed: Seed
    dataset: Name
    model: Name
    synthetic: bool = False
    run: str = ""
    identity: str = ""
    protocol: Protocol
    baseline: BaselineResult | None = None
    final: Evaluation | None = None
    best: Evaluation | None = None
    verified: dict[str, dict[str, LevelCount]] | None = None
    quantizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    card: dict[str, dict[str, str]] = field(default_factory=dict)
    cost: NetworkCost | None = None
    speed: TrainingSpeed | None = None
    weights_sha256: str | None = None
    state_sha256: str | None = None
    data_sha256: str | None = None
    commits: list[str] = field(default_factory=list)
    wall_seconds: float | None = None
    protocol_changes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def widths(self) -> str:
        """The bit widths as one word, such as w2a2g32."""
        return "".join(f"{key}{self.bits[key]}" for key in "wag")

    @property
    def top1(self) -> float | None:
        """Test top-1 in percent after the last epoch."""
        return self.final.test.top1 if self.final else None

    def same_data(self, other: "Result") -> bool:
        """Return whether this run and another run used the same data set with the same images.

        If this run did not record the digest of its images, the images count as the same.
        """
        return self.dataset == other.dataset and self.data_sha256 in (None, other.data_sha256)

    @property
    def baseline_top1(self) -> float | None:
        """Test top-1 in percent of the float baseline after its last epoch."""
        return self.baseline.final.test.top1 if self.baseline else None


def load_result(path: Path) -> Result | None:
    """Return the result in a run directory.

    The result is None if the file is missing or corrupt, or has another schema. The protocol must match the stored
    hash, because tables read the keys of the protocol.
    """
    values = files.read_json(path / "result.json")
    if values is None or values.pop("sha256", None) != digest(values):
        return None
    try:
        result = parse_result(values | {"run": str(path)})
    except ValueError:
        return None
    return result if result.protocol.hash == digest(result.protocol.keys) else None


def parse_result(values: dict[str, object]) -> Result:
    """Return a result from the values of a JSON object. The type and the range of every field are checked.

    Raises:
        ValueError: a field is missing or unknown, or has a wrong type or value.
    """
    if unknown := set(values) - {f.name for f in fields(Result)}:
        raise ValueError(f"unknown fields: {', '.join(sorted(unknown))}")
    text = json.dumps(values, ensure_ascii=False)
    if "\\u0000" in text or not _is_unicode(text):
        raise ValueError("a text contains NUL or half a surrogate pair, which file names and pages cannot contain")
    try:
        result = msgspec.convert(values, Result)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    if result.schema != SCHEMA:
        raise ValueError(f"schema {result.schema}: must be {SCHEMA}")
    if result.status not in STATUSES:
        raise ValueError(f"status {result.status}: must be one of {', '.join(STATUSES)}")
    if set(result.bits) != set("wag"):
        raise ValueError(f"bits has the keys {', '.join(result.bits)}: must be w, a, g")
    if not isinstance(result.options.get(RATE, 0.0), float | int):
        raise ValueError(f"options: {RATE} is not a number")
    if result.status == "done" and result.final is None:
        raise ValueError("status is done, but there is no accuracy")
    return result


def _is_unicode(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8, which half of a surrogate pair would prevent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def short_commit(commit: str) -> str:
    """Return the first eight digits of a commit, and `+changes` if there were uncommitted changes."""
    digits, plus, changes = commit.partition("+")
    return digits[:8] + plus + changes


def store_result(path: Path, result: Result) -> None:
    """Write result.json into a run directory."""
    values = {name: value for name, value in asdict(result).items() if name != "run"}
    files.write_json(path / "result.json", with_checksum(values))


def with_checksum(values: dict[str, object]) -> dict[str, Any]:
    """Return the values with an additional key `sha256`, the digest of the values as JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
    plain.pop("sha256", None)
    return plain | {"sha256": digest(plain)}
