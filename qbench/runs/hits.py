"""Reads the hits of a run (the correctly classified test images), and packs them for records of many runs."""

import base64
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Hits:
    """The hits of one run.

    Args:
        labels_sha256: sha256 of the labels of the test images (int64, in the order of the images). Runs with equal
            values were tested on the same images.
        correct: whether each of the N images was classified correctly, (N,) bool.
    """

    labels_sha256: str
    correct: "NDArray[np.bool_]"


def load_hits(run: Path, top1: float) -> Hits | None:
    """Return the hits of a run, or None if predictions.npy is missing or damaged, or contradicts the test `top1`."""
    if not os.path.exists(f"{run}/predictions.npy"):  # NumPy's error for a missing file would take ten times as long
        return None
    import numpy as np

    try:
        labels, predicted = np.load(run / "predictions.npy").T
        hits = Hits(hashlib.sha256(labels.astype(np.int64).tobytes()).hexdigest(), labels == predicted)
    except Exception:  # NumPy raises many kinds of errors on damaged files
        return None
    return hits if _agrees(hits, top1) else None


def pack_hits(hits: Hits) -> dict[str, object]:
    """Return hits as values for JSON, with one bit per image."""
    import numpy as np

    bits = base64.b64encode(np.packbits(hits.correct).tobytes()).decode()
    return {"images": len(hits.correct), "labels_sha256": hits.labels_sha256, "bits": bits}


def unpack_hits(values: Mapping[str, object], top1: float) -> Hits:
    """Return the hits in the values that `pack_hits` returned.

    Raises:
        ValueError: the values are not packed hits, or they contradict `top1`.
    """
    import numpy as np

    images, sha256 = values.get("images"), values.get("labels_sha256")
    if not isinstance(images, int) or images < 1 or not isinstance(sha256, str):
        raise ValueError(f"images={images}, labels_sha256={sha256}: not the hits of a run")
    packed = np.frombuffer(base64.b64decode(str(values.get("bits")), validate=True), np.uint8)
    if len(packed) != -(-images // 8):
        raise ValueError(f"{len(packed)} bytes of hits: must be {-(-images // 8)}, one bit for each of {images} images")
    hits = Hits(sha256, np.unpackbits(packed, count=images).astype(np.bool_))
    if not _agrees(hits, top1):
        raise ValueError(f"{100 * hits.correct.mean():.2f} % of the images are hits, but top-1 is {top1:.2f} %")
    return hits


def _agrees(hits: Hits, top1: float) -> bool:
    return hits.correct.size > 0 and abs(100 * float(hits.correct.mean()) - top1) < 0.01
