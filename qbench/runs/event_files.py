"""What the event files of a run tell, damaged ones too: hyper-parameters and final scalars."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qbench.system import files

AROUND = 16
"""Bytes of an event file around each record."""
TRIED = 2**16
"""Places behind damage at which a record is looked for, in a whole event file: more would take minutes."""


class Summary(NamedTuple):
    """Hyper-parameters, the scalars below `final/`, and what of the files cannot be read."""

    hparams: dict[str, Any]
    final: dict[str, float]
    unread: list[str]


def summary(path: Path) -> Summary:
    """Return what all event files of a directory tell, the last one's word before the others'."""
    told = Summary({}, {}, [])
    paths = sorted(path.glob("events.out.tfevents.*"))
    if not paths:
        return told
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = b""
    for file in paths:
        data = files.read(file)
        lost = len(data)
        for record in _records(data):
            lost -= len(record) + AROUND
            for value in Event.FromString(record).summary.value:
                if value.tag == "_hparams_/session_start_info":
                    content = value.metadata.plugin_data.content
                elif value.tag.startswith("final/"):
                    told.final[value.tag.removeprefix("final/")] = value.simple_value
        if lost:
            told.unread.append(f"{file.name}: {lost:,} bytes cannot be read")
    stored = HParamsPluginData.FromString(content).session_start_info.hparams
    told.hparams.update({key: getattr(value, value.WhichOneof("kind")) for key, value in stored.items()})
    return told


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records of an event file whose checksums match; TensorBoard's own reader gives up at the first other.

    A record is its length (8 bytes), the checksum of that (4), the content, the checksum of that (4). Damaged content
    is passed over by its length; where a length is damaged, the next record is looked for, up to `TRIED` times.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    def matches(start: int, stop: int) -> bool:
        found: int = masked_crc32c(data[start:stop])
        return found == int.from_bytes(data[stop : stop + 4], "little")

    at = tried = 0
    while at + AROUND <= len(data) and tried < TRIED:
        end = at + AROUND + int.from_bytes(data[at : at + 8], "little")
        if end > len(data) or not matches(at, at + 8):
            at, tried = at + 1, tried + 1
            continue
        if matches(at + 12, end - 4):
            yield data[at + 12 : end - 4]
        at = end
