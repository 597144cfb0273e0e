"""Converts a traced network (a list of torch functions, `qbench.deploy.network`) to an integer network.

Quantized layers multiply integer codes. The batch normalization, bias and activation functions after a quantized layer
become part of the integer thresholds of the next quantizer. Each channel has its own thresholds. Sums in a residual
network are fixed-point numbers, and each channel has its own number of fraction bits. Float layers compute in float64.
Layers that read an image also compute in float64 if the levels of the image are not multiples of one step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from qbench.deploy.about import About
from qbench.deploy.integer_builder import Builder, NotInteger, QuantizerPlace
from qbench.deploy.integer_functions import HANDLERS
from qbench.deploy.integer_network import IntegerNetwork
from qbench.deploy.linear import NotLinear, integer_levels
from qbench.deploy.network import Network, Step, refs
from qbench.deploy.trace import NotExportable
from qbench.quant.probe import Batch

Result = TypeVar("Result")

LAYERS = ("conv2d", "linear")
OTHER_FORM = "try: qbench export RUN --to packed"


class Converted(NamedTuple):
    """An integer network and the positions of its quantizers."""

    network: IntegerNetwork
    quantizers: Sequence[QuantizerPlace]


def to_integers(network: Network, about: About) -> Converted:
    """Convert a traced network to an integer network.

    Raises:
        NotExportable: the weights or activations of a layer, or a function, cannot be converted to integers. The
            message names the layer and the reason.
    """
    builder = Builder(network, about, _leading_to(network.steps, "quantize"))
    for place, step in enumerate(network.steps):
        layer = step.where or "the network"
        try:
            if layer.endswith(".output_q"):
                raise NotInteger("does not support output scales that are computed for each image")
            if step.function not in HANDLERS:
                raise NotInteger(f"does not support the function {step.function}")
            args, kwargs = builder.begin(place, step)
            builder.finish(HANDLERS[step.function](builder, *args, **kwargs))
        except (NotInteger, NotLinear) as reason:
            text = str(reason) if "\n" in str(reason) else f"{reason}\n{OTHER_FORM}"
            raise NotExportable(f"{layer}: integer export {text}") from None
        except TypeError:
            raise NotExportable(
                f"{layer}: integer export does not support these arguments of {step.function}\n{OTHER_FORM}"
            ) from None
    if not any(step.function in LAYERS and step.inputs[0] in builder.integer_places for step in builder.steps):
        raise NotExportable(
            "no layer has quantized weights and quantized activations, so nothing can be computed in integers\n"
            "train with bits.w=8 and bits.a=8 or less, or: qbench export RUN --to packed"
        )
    logits = builder.result(network.output.step)
    if logits.integer:
        builder.as_real(logits)
    return Converted(IntegerNetwork(builder.steps), builder.quantizers)


def _leading_to(steps: Sequence[Step], function: str) -> set[int]:
    """Return the indices of all steps on which some call of a given function depends."""
    found: set[int] = set()
    for place in reversed(range(len(steps))):
        if steps[place].function == function or place in found:
            found |= {ref.step for ref in refs((steps[place].args, tuple(steps[place].kwargs.values())))}
    return found


class CodeAgreement(NamedTuple):
    """A comparison of the integer network's activation codes with those of a float64 network.

    Args:
        images, codes: numbers of compared images and codes.
        differing: number of codes that differ.
        exported: number of images for which a code of the integer network differs from the float64 network.
        run: number of images for which a code of the run's network in float32 differs from the float64 network.
    """

    images: int
    codes: int
    differing: int
    exported: int
    run: int


def compare_codes(
    traced: Network, converted: Converted, network: IntegerNetwork, batches: Iterable[Batch], enough: int
) -> CodeAgreement:
    """Compare the activation codes of an integer network with those of the traced network in float64.

    In the float64 network, each level is replaced by the exact product of an integer and the unit. Each weight is
    replaced by the exact product of an integer and its scale.

    Args:
        converted: the result of `to_integers`.
        network: the integer network, after it was written to a file and read again.
        enough: number of compared codes after which the function stops.
    """
    levels = {}
    for quantizer in converted.quantizers:
        integers, unit = integer_levels(traced.tensors[quantizer.levels])
        levels[quantizer.levels] = torch.tensor(unit, dtype=torch.float64) * integers
    simulation = replace(traced, tensors={**traced.tensors, **levels})
    images = codes = differing = exported = run = 0
    for batch, _ in batches:
        exact, in_float32 = _codes(simulation, converted, batch.double()), _codes(traced, converted, batch)
        found: dict[int, np.ndarray] = {}
        network.run(batch.numpy(), _keeper(found, {q.integer for q in converted.quantizers}, np.ndarray))
        wrong, wrong_in_float32 = np.zeros(len(batch), bool), np.zeros(len(batch), bool)
        for quantizer in converted.quantizers:
            difference = exact[quantizer.traced] != found[quantizer.integer]
            codes, differing = codes + difference.size, differing + int(difference.sum())
            wrong |= difference.reshape(len(batch), -1).any(1)
            other = exact[quantizer.traced] != in_float32[quantizer.traced]
            wrong_in_float32 |= other.reshape(len(batch), -1).any(1)
        images, exported, run = images + len(batch), exported + int(wrong.sum()), run + int(wrong_in_float32.sum())
        if codes >= enough:
            break
    return CodeAgreement(images, codes, differing, exported, run)


def _codes(network: Network, converted: Converted, batch: Tensor) -> dict[int, np.ndarray]:
    """Return the activation codes of a traced network, by the index of the quantizer's step.

    The network computes in the type of `batch`.
    """
    results: dict[int, Tensor] = {}
    network.function(_keeper(results, {q.traced for q in converted.quantizers}, Tensor), batch.dtype)(batch)
    return {q.traced: (results[q.traced].double().numpy() / q.unit).round() for q in converted.quantizers}


def _keeper(results: dict[int, Result], wanted: set[int], kind: type[Result]) -> Callable[[int, object], None]:
    """Return a callback that stores the results of the given steps, which have the type `kind`."""

    def keep(place: int, result: object) -> None:
        if place in wanted:
            assert isinstance(result, kind)
            results[place] = result

    return keep
