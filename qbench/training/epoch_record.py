"""The metrics of one epoch."""

from dataclasses import asdict, dataclass

from qbench.runs.result import Accuracy


@dataclass(frozen=True)
class EpochRecord:
    """The metrics of one epoch.

    Args:
        epoch: number of the epoch, from 0.
        lr: learning rate of the last step.
        train_loss: mean loss over the training batches.
        train_top1: top-1 accuracy on the training batches in percent.
        seconds: training time, without evaluation.
        images: number of training images.
        validation: the accuracy on the validation split, or None if there is no such split.
    """

    epoch: int
    lr: float
    train_loss: float
    train_top1: float
    seconds: float
    images: int
    validation: Accuracy | None = None

    def metrics(self) -> dict[str, float]:
        """Return the record as stored in metrics.jsonl. Validation metrics have the prefix `val_`."""
        validation = asdict(self.validation) if self.validation else {}
        return {
            "epoch": self.epoch, "lr": self.lr, "train_loss": self.train_loss, "train_top1": self.train_top1,
            "seconds": self.seconds, "images": self.images,
        } | {f"val_{name}": value for name, value in validation.items()}  # fmt: skip
