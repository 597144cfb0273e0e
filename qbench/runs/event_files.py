"""Reads hyper-parameters and final scalars from TensorBoard event files, even if the files are damaged."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qbench.runs.tensorboard_tags import final_metrics
from qbench.system import files

RECORD_OVERHEAD = 16
"""Number of bytes of a record in addition to its content."""
MAX_TRIES = 2**16
"""Maximum number of offsets that are tried in the search for the next record after damage.

A longer search would take minutes.
"""


@dataclass
class EventSummary:
    """Hyper-parameters, final metrics, and messages about parts of files that cannot be read."""

    hyperparameters: dict[str, bool | float | str] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


def read_summary(path: Path) -> EventSummary:
    """Return the summary of all event files in a directory. Values in later files override values in earlier files."""
    summary = EventSummary()
    paths = sorted(path.glob("events.out.tfevents.*"))
    if not paths:
        return summary
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content, scalars = b"", dict[str, float]()
    for file in paths:
        data = files.read(file)
        lost = len(data)
        for record in _records(data):
            lost -= len(record) + RECORD_OVERHEAD
            for value in Event.FromString(record).summary.value:
                if value.tag == "_hparams_/session_start_info":
                    content = value.metadata.plugin_data.content
                elif value.HasField("simple_value"):
                    scalars[value.tag] = value.simple_value
        if lost:
            summary.unread.append(f"{file.name}: {lost:,} bytes cannot be read")
    summary.final = final_metrics(scalars)
    stored = HParamsPluginData.FromString(content).session_start_info.hparams
    summary.hyperparameters = {key: getattr(value, value.WhichOneof("kind")) for key, value in stored.items()}
    return summary


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the intact records of an event file.

    TensorBoard's reader would stop at the first damaged record.

    A record consists of the content's length (8 bytes), the checksum of the length (4 bytes), the content, and the
    checksum of the content (4 bytes). If only the content is damaged, the record is skipped. If the length is damaged,
    up to `MAX_TRIES` offsets are tried to find the next record.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    def matches(start: int, stop: int) -> bool:
        checksum: int = masked_crc32c(data[start:stop])
        return checksum == int.from_bytes(data[stop : stop + 4], "little")

    at = tries = 0
    while at + RECORD_OVERHEAD <= len(data) and tries < MAX_TRIES:
        end = at + RECORD_OVERHEAD + int.from_bytes(data[at : at + 8], "little")
        if end > len(data) or not matches(at, at + 8):
            at, tries = at + 1, tries + 1
            continue
        if matches(at + 12, end - 4):
            yield data[at + 12 : end - 4]
        at = end
