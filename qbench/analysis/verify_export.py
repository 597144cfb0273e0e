"""Verifies on a run's test images that an exported file computes the same results as the run."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qbench.analysis.finished_run import FinishedRun, half_precision_note
from qbench.bits import FLOAT
from qbench.deploy import packed
from qbench.deploy.about import About
from qbench.deploy.agreement import Agreement, Logits, RoundingErrors, batch_noise, compare, rounding_errors
from qbench.deploy.integer_convert import Converted, compare_codes
from qbench.deploy.integer_file import unpack_integers
from qbench.deploy.network import Network
from qbench.deploy.runtimes import RUNTIMES
from qbench.deploy.trace import NotExportable
from qbench.errors import ConfigError
from qbench.experiment.device import HALF_TYPES
from qbench.quant.layers import quantized_layers
from qbench.quant.probe import Batch

NARROW = 4
"""Each pair below has two values: one for widths up to this number of bits, and one for larger widths.
"""

NARROW_TOLERANCE, WIDE_TOLERANCE = 2e-5, 2e-2
"""Tolerances of logits in ONNX files, relative to the largest logit."""

NARROW_CODES, WIDE_CODES = 0.0, 5e-4
"""Largest allowed share of activation codes of an integer file that differ from a simulation in float64."""

COMPARED_CODES, CODES_BATCH = 1_000_000, 50
"""Number of codes after which the comparison of codes stops, and number of images in one batch of this comparison."""

NOISE_IMAGES = 64

TRACE_IMAGES, TRACE_TOLERANCE, TRACE_SHARE = 256, 1e-3, 0.02
"""The traced network must compute the run's logits for this number of test images. The tolerance is relative to the
largest logit. A rounding error can move an activation to the neighbouring level, so a small share of images may differ.
"""

ROUNDING = 1e-5
"""Largest difference of logits, relative to the largest logit, that rounding explains if activation levels agree."""


def verify_trace(finished: FinishedRun, traced: Network) -> None:
    """Compare the traced network, from which a file is made, with the run's network.

    Raises:
        NotExportable: the logits differ for more images than rounding explains.
    """
    function, images, wrong = traced.function(), 0, 0
    for batch, _ in finished.setup.loader().unaugmented("test", TRACE_IMAGES):
        with torch.no_grad():
            expected, found = finished.model(batch), function(batch)
        allowed = TRACE_TOLERANCE * max(1.0, expected.abs().max().item())
        images += len(batch)
        wrong += int((~((expected - found).abs().amax(1) <= allowed)).sum())  # nan counts as wrong
    if wrong > TRACE_SHARE * images:
        raise NotExportable(
            f"the network cannot be exported, because its recorded functions compute other logits for {wrong} of "
            f"{images} test images\nprobably its code changes a tensor in place, or through a view; use functions that "
            "return new tensors"
        )


def verify_packed(finished: FinishedRun, data: bytes, path: Path) -> tuple[Agreement, list[str]]:
    """Compare a packed file with its run. Return the agreement, and lines of text about the agreement.

    Raises:
        NotExportable: classes of the file and of the run differ, or logits differ by more than torch's rounding.
    """
    content = packed.unpack_network(data, str(path))
    agreement = compare(finished.model, content.network.function(), run_images(finished))
    close = agreement.largest <= ROUNDING * max(1.0, agreement.magnitude)
    if not agreement.identical and not (close and agreement.same_class == agreement.images):
        raise NotExportable(
            f"the packed network does not compute the same logits as the run; the largest difference is "
            f"{agreement.largest:.2g}"
        )
    parts = ", ".join(f"{size:,} of {name}" for name, size in content.sizes.items())
    equal = (
        "all logits equal the run's logits, bit for bit"
        if agreement.identical
        else f"the classes are equal; logits differ by at most {agreement.largest:.2g}, because torch rounds "
        "differently in another memory layout"
    )
    verified = f"verified on {agreement.images} test images{_in_float32(finished)}: {equal}"
    return agreement, [f"bytes: {parts}", verified]


def verify_onnx(
    finished: FinishedRun, about: About, traced: Network, data: bytes, path: Path
) -> tuple[Agreement, list[str]]:
    """Compare an ONNX file with its run in each runtime. Return the worst agreement, and lines about all agreements.

    Raises:
        NotExportable: predicted classes differ, or logits differ by more than the tolerance, and this happens more
            often than rounding errors explain (`RoundingErrors`).
    """
    tolerance = NARROW_TOLERANCE if _largest_width(finished) <= NARROW else WIDE_TOLERANCE
    noise = batch_noise(finished.model, first_images(finished, NOISE_IMAGES))
    agreements: list[Agreement] = []
    lines = []
    for name in VERIFIED_IN[about.form]:
        try:
            function = RUNTIMES[name](data, about, str(path))
        except ConfigError as missing:
            if not agreements:
                raise
            lines.append(f"not verified in {name}: {missing}".replace("\n", "; "))
            continue
        logits: Logits = []
        found = compare(finished.model, function, run_images(finished), logits)
        allowed = max(tolerance * max(1.0, found.magnitude), noise)
        where = f"{found.images:,} test images{_in_float32(finished)}{OPTIONS.get(name, '')}"
        if found.same_class == found.images and found.largest <= allowed:
            lines.append(
                f"verified in {name} on {where}: the classes are equal; logits differ by at most {found.largest:.2g} "
                f"(allowed {allowed:.2g}; torch's own logits differ by {noise:.2g} between batch sizes)"
            )
        else:
            errors = _rounding_errors(finished, logits, traced, allowed)
            if not errors.comparable:
                raise NotExportable(
                    f"{name} predicts the run's class for {found.same_class:,} of {where}; the largest difference of "
                    f"logits is {found.largest:.2g}, allowed {allowed:.2g}; {_in_words(errors)}\n"
                    "try: qbench export RUN --to packed"
                )
            lines.append(f"verified in {name} on {where}: {_mostly_equal(found)}; {_in_words(errors)}")
        agreements.append(found)
    return max(agreements, key=lambda agreement: agreement.largest), lines


OPTIONS: Mapping[str, str] = {"openvino": " with INFERENCE_PRECISION_HINT=f32"}
"""Runtime -> text on the options with which it runs a file. OpenVINO may compute in bfloat16 by default."""

VERIFIED_IN: Mapping[str, Sequence[str]] = {
    "onnx": ("onnxruntime",), "int8": ("onnxruntime", "openvino"), "qonnx": ("qonnx",),
}  # fmt: skip
"""Form of an export -> the runtimes in which a file of this form is verified."""


def run_images(finished: FinishedRun) -> Iterator[Batch]:
    """Yield the run's test images and labels."""
    return finished.setup.loader().unaugmented("test")


def first_images(finished: FinishedRun, count: int) -> Tensor:
    """Return `count` test images. If the test split has fewer images, its images are repeated."""
    images = torch.cat([images for images, _ in finished.setup.loader().unaugmented("test", count)])
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count]


def verify_integers(
    finished: FinishedRun, traced: Network, converted: Converted, data: bytes, path: Path
) -> tuple[Agreement, list[str]]:
    """Compare an integer file with its run, and the file's activation codes with a simulation in float64.

    Raises:
        NotExportable: predicted classes or codes differ more often than rounding errors explain (`RoundingErrors`).
    """
    content = unpack_integers(data, str(path))
    parts = finished.setup.loader().unaugmented("test", size=CODES_BATCH)
    codes = compare_codes(traced, converted, content.network, parts, COMPARED_CODES)
    logits: Logits = []
    agreement = compare(finished.model, content.function(), run_images(finished), logits)
    allowed = int(codes.codes * (NARROW_CODES if _largest_width(finished) <= NARROW else WIDE_CODES))
    where = f"{agreement.images:,} test images{_in_float32(finished)}"
    differing = (
        f"{codes.differing:,} of {codes.codes:,} activation codes of {codes.images} images differ from a simulation in "
        f"float64 (allowed {allowed:,})"
    )
    if codes.differing > allowed:
        in_images = RoundingErrors(codes.exported, codes.run)
        differing += f", in {codes.exported} images; the run's own codes in float32 differ in {codes.run} images"
        if not in_images.comparable:
            raise NotExportable(f"{differing}\ntry: qbench export RUN --to packed")
    if agreement.same_class == agreement.images:
        return agreement, [f"verified on {where}: the classes are equal; {differing}"]
    errors = _rounding_errors(finished, logits, traced, torch.inf)
    if not errors.comparable:
        raise NotExportable(
            f"the file predicts the run's class for {agreement.same_class:,} of {where}; {_in_words(errors)}; "
            f"{differing}\ntry: qbench export RUN --to packed"
        )
    return agreement, [f"verified on {where}: {_mostly_equal(agreement)}; {_in_words(errors)}; {differing}"]


def _rounding_errors(finished: FinishedRun, logits: Logits, traced: Network, tolerance: float) -> RoundingErrors:
    """Compare a file and its run with the run's network in float64, on all test images."""
    return rounding_errors(logits, traced.function(dtype=torch.float64), run_images(finished), tolerance)


def _mostly_equal(agreement: Agreement) -> str:
    if agreement.same_class == agreement.images:
        return "the classes are equal"
    return f"{agreement.same_class:,} classes are equal, and the others differ by rounding"


def _in_words(errors: RoundingErrors) -> str:
    return (
        f"the file's results differ from those of the run's network in float64 for {errors.exported:,} images; the "
        f"run's own float32 results differ for {errors.run:,} images (allowed: twice as many)"
    )


def _in_float32(finished: FinishedRun) -> str:
    """Return text that names the float32 network for a run in half precision, or an empty text for other runs."""
    return ", with the run's network in float32" if finished.setup.runtime.precision in HALF_TYPES else ""


def accuracy_lines(finished: FinishedRun, weights: str, agreement: Agreement) -> list[str]:
    """Return a line with the accuracy of the file, or nothing if the run itself was evaluated in float32.

    Args:
        weights: `last` or `best`, the checkpoint that was exported.
    """
    top1 = 100 * agreement.correct / agreement.images
    return [f"the file's test top-1 is {top1:.2f} %, {note}" for note in half_precision_note(finished, weights)]


def _largest_width(finished: FinishedRun) -> int:
    """Return the largest width of the quantized weights and activations, or 0 if nothing is quantized."""
    layers = quantized_layers(finished.model).values()
    return max((width for layer in layers for width in layer.bits[:2] if width < FLOAT), default=0)
