"""Defines the names of scalars in TensorBoard.

TensorBoard sorts groups of tags by name and opens the first two groups, which are `accuracy` and `loss`. All tags about
layers and quantizers begin with `quant/`.
"""

from collections.abc import Mapping

QUANT = "quant/"
"""Prefix of the tags about quantized layers."""

FINAL = {
    "val_top1": "accuracy/val", "val_top5": "accuracy/val_top5", "val_loss": "loss/val",
    "test_top1": "test/top1", "test_top5": "test/top5", "test_loss": "test/loss",
}  # fmt: skip
"""Maps the names of final metrics to tags."""
TAGS: Mapping[str, Mapping[str, str]] = {
    "step": {"loss": "loss/step"},
    "epoch": {"train_top1": "accuracy/train", "train_loss": "loss/train", "lr": "optim/lr"}
    | {name: tag for name, tag in FINAL.items() if name.startswith("val_")},
    "final": FINAL,
}
"""Maps the kind of a record and the name of a value to a tag."""
SPEED = "speed/images_per_second"


def scalar_tags(kind: str, values: Mapping[str, object]) -> dict[str, float]:
    """Return the values of a record by TensorBoard tag. Values without a tag are left out."""
    tags = TAGS.get(kind, {})
    scalars = {tags[name]: value for name, value in values.items() if name in tags and isinstance(value, int | float)}
    images, seconds = values.get("images"), values.get("seconds")
    if isinstance(images, int) and isinstance(seconds, int | float) and seconds > 0:
        scalars[SPEED] = images / seconds
    return scalars


def final_metrics(scalars: Mapping[str, float]) -> dict[str, float]:
    """Return the final metrics by name. `scalars` contains them by TensorBoard tag.

    For final records, this function is the inverse of `scalar_tags`.
    """
    return {name: scalars[tag] for name, tag in FINAL.items() if tag in scalars}
