"""Reads the configuration and the weights of a finished run, from which its network can be rebuilt."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from qbench.config.foreign_code import refuse_edited_code
from qbench.config.schema import Config, Distill, to_dict
from qbench.data.spec import InputFormat
from qbench.errors import CheckpointError
from qbench.quant.graph import eval_mode_keeping_rng, state_restored
from qbench.quant.layers import quantized_layers, quantized_parts
from qbench.runs.result import load_result
from qbench.runs.stored_config import stored_config
from qbench.training.checkpoint import Saved
from qbench.training.initial_weights import load_published

LAYERS = "layers"
"""Key of a checkpoint for its `StoredLayers`."""

VERIFIED = "verified"
"""Key for the names of the quantized layers.

Checkpoints of earlier versions have no `LAYERS`. `stored_run` then reads these names from result.json.
"""


OTHER_OUTPUTS = 0.01
"""Relative difference of outputs above which a rebuilt network is not taken for the run's network.

The difference is the median over the example images. On another device or with another number of threads, rounding
errors are much smaller for most images.
"""

PATTERNS = 8
"""Number of example images."""


class StoredLayers(TypedDict):
    """The layers of a run's network, in a checkpoint. They can depend on the weights from which the run started.

    `order` contains the layers in the order of their first execution, `macs` the multiply-accumulates of each layer,
    and `quantized` the quantized parts (`quantized_parts`). `input` is the format of the images. `outputs` contains the
    outputs of the network for the example images (`example_outputs`), in last.pt and best.pt. Checkpoints of earlier
    versions do not contain `input` and `outputs`.
    """

    order: list[str]
    macs: dict[str, int]
    quantized: dict[str, str]
    input: NotRequired[InputFormat]
    outputs: NotRequired[Tensor]


def stored_run(run: Path, named: str, weights: str = "best", device: str = "cpu") -> tuple[Config, Saved]:
    """Return a finished run's configuration and checkpoint.

    Initial weights and teacher are removed from the configuration.

    Args:
        run: directory of the run.
        named: name of the run in error messages.
        weights: `best` for the weights with the best validation accuracy, `last` for the weights of
            the last epoch.
        device: device to set in the configuration.

    Raises:
        CheckpointError: a file of the run is missing, is damaged or was edited, or a user's file
            that the run's configuration names was edited after the run.
    """
    try:
        state = load_published(run, f"{weights}.pt")
        config = stored_config(run, str(state.get("identity")))
    except OSError as error:
        raise CheckpointError(f"{named}: {error.filename}: {error.strerror}; the run may not be finished") from None
    refuse_edited_code(run, to_dict(config))
    if LAYERS not in state and (result := load_result(run)) and result.verified is not None:
        state[VERIFIED] = list(result.verified)
    runtime = replace(config.runtime, device=device)
    return replace(config, init="scratch", distill=Distill("none"), runtime=runtime), state


def load_weights(model: nn.Module, state: Saved, named: str) -> nn.Module:
    """Load a run's checkpoint into the network, and return the network.

    Raises:
        CheckpointError: the checkpoint belongs to another network, or to a network with other quantized layers.
    """
    check_quantized(model, state, named)
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, KeyError) as error:
        why = str(error).partition("\n")[0]
        raise CheckpointError(f"{named} and config.yaml belong to different networks: {why}") from None
    return model


def check_quantized(model: nn.Module, state: Saved, named: str) -> None:
    """Check that a rebuilt network has quantizers at the same places as the network of the checkpoint.

    The places can differ, because the layers that a network executes can depend on data or on unseeded random numbers.

    Args:
        state: the content of a checkpoint. Without information on the quantized layers, nothing is checked.
        named: name of the checkpoint in the error message.

    Raises:
        CheckpointError: the places differ. The message names them.
    """
    found = quantized_parts(model)
    if LAYERS in state:
        stored = dict(state[LAYERS]["quantized"])
    elif VERIFIED in state:
        found = {name: found[name] for name in quantized_layers(model)}
        stored = {name: found.get(name, "quantized") for name in state[VERIFIED]}
    else:
        return
    differing = [name for name in [*found, *stored.keys() - found] if found.get(name) != stored.get(name)]
    if differing:
        shown = "; ".join(f"{n} ({found.get(n, 'float')}, in the run {stored.get(n, 'float')})" for n in differing[:4])
        more = f" and {len(differing) - 4} more" if differing[4:] else ""
        raise CheckpointError(
            f"{named}: the rebuilt network has quantizers at other places than the network of the run: {shown}{more}\n"
            "which layers this network executes depends on its weights or on random numbers\n"
            "to train the run again, add rerun=true"
        )


def example_outputs(model: nn.Module, images: InputFormat) -> Tensor | None:
    """Return the outputs of a network for `PATTERNS` example images, as (PATTERNS, classes) in float32 on the CPU.

    The images are waves with different directions and lengths, over the whole range of pixel values. They need no data
    set, so they are the same wherever the run's network is loaded. The network's state does not change.

    Returns:
        None if the network returns no tensor, raises an error, or has outputs that are not finite for these images.
    """
    channels, height, width = images["shape"]
    down, right = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    waves = [
        (1 + torch.sin(2 * math.pi * (i % 3 * down + i // 3 * right + i / PATTERNS + c / channels))) / 2
        for i in range(PATTERNS)
        for c in range(channels)
    ]
    pixels = torch.stack(waves).view(PATTERNS, channels, height, width)
    if images["ends"]:
        low, high = (torch.tensor(end).view(-1, 1, 1) for end in images["ends"])
        pixels = low + (high - low) * pixels
    mean, std = (torch.tensor(images[key]).view(-1, 1, 1) for key in ("mean", "std"))
    device = next(model.parameters()).device
    try:
        with state_restored(model), eval_mode_keeping_rng(model), torch.no_grad():
            outputs = model(((pixels - mean) / std).to(device, memory_format=torch.channels_last))
        return outputs.float().cpu() if outputs.isfinite().all() else None
    except Exception:  # a user's network can refuse images that are no photographs
        return None


def other_outputs(model: nn.Module, layers: Mapping[str, Any], named: str) -> str:
    """Return a warning if a rebuilt network with the weights of a checkpoint has other outputs than the run's network.

    The reason can be code that the identity of a run does not contain, such as a module that a user's file imports.

    Args:
        model: the network, with the weights of the checkpoint.
        layers: the `StoredLayers` of the checkpoint. It is empty in checkpoints of other programs.
        named: name of the checkpoint in the warning.

    Returns:
        "" if the outputs are the same except for rounding errors, or if the checkpoint contains no outputs.
    """
    stored: Tensor | None = layers.get("outputs")
    found = example_outputs(model, layers["input"]) if stored is not None else None
    if stored is None or found is None or found.shape != stored.shape:
        return ""
    difference = ((found - stored).norm(dim=1) / stored.norm(dim=1).clamp(min=1e-12)).median().item()
    if difference <= OTHER_OUTPUTS:
        return ""
    return (
        f"{named}: with these weights, the rebuilt network has other outputs than the network that was trained (they "
        f"differ by {100 * difference:.2g} %); code that the network or the method uses has changed since the run, "
        "another version of qbench or torch computes something else, or the outputs depend on more than the weights"
    )
