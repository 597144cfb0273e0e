"""Finds the file forms to which `qbench export` could export a run that is not trained yet."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.deploy.about import About
from qbench.deploy.integer_convert import to_integers
from qbench.deploy.network import Network
from qbench.deploy.onnx_file import to_onnx
from qbench.deploy.trace import NotExportable, trace
from qbench.errors import ConfigError
from qbench.experiment.setup import ExperimentSetup
from qbench.quant.probe import Probe

FORMS = ("packed", "onnx", "int8", "qonnx", "integer")
MAX_PARAMETERS, MAX_MACS = 1_000_000, 200_000_000
"""Largest number of parameters and of MACs with which the export forms of a network are tested."""

IMAGES = 16


def refused_forms(setup: ExperimentSetup, params: int) -> dict[str, str] | None:
    """Return a map from each form of `qbench export` to the reason for a refusal, or to "" for an accepted form.

    Each form is tested with a network that has initial weights and gets random images. Forms whose package is not
    installed are left out.

    Args:
        params: number of parameters.

    Returns:
        None if the network is large, or if its method needs real images or trained weights.
    """
    if params > MAX_PARAMETERS or sum(setup.macs.values()) > MAX_MACS:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            network = trace(*_prepared_model(setup))
        except NotExportable as reason:
            return dict.fromkeys(FORMS, _first_line(reason))
        except (RuntimeError, ValueError):
            return None
    answers = {"packed": "", **{form: _refusal(setup, network, form) for form in FORMS[1:]}}
    return {form: reason for form, reason in answers.items() if reason is not None}


def _prepared_model(setup: ExperimentSetup) -> tuple[nn.Module, Tensor]:
    """Return the quantized network after the method's `prepare` and without training, and random images."""
    model, method = setup.install(setup.float_model()), setup.method
    images, labels = torch.rand(IMAGES, *setup.data.shape), torch.randint(setup.data.classes, (IMAGES,))
    probe = Probe([(images, labels)], F.cross_entropy)
    if method.prepare:
        method.prepare(model, probe)
    for epoch in range(setup.epochs if method.on_epoch else 0):
        assert method.on_epoch
        method.on_epoch(model, epoch, setup.epochs, probe)
    with torch.no_grad():
        model.train()(images)  # initializes the ranges of activations
    return model.eval(), images


def _refusal(setup: ExperimentSetup, network: Network, form: str) -> str | None:
    """Return the reason why a network cannot be exported to a form, or "" if there is no such reason.

    Return None if a package is missing.
    """
    data = setup.data
    about = About(
        form=form, title="", identity="", weights="last", dataset={}, shape=data.shape, classes=data.classes,
        mean=data.mean, std=data.std, threads=1,
    )  # fmt: skip
    try:
        if form == "integer":
            to_integers(network, about)
        else:
            to_onnx(network, about)
    except NotExportable as reason:
        return _first_line(reason)
    except ConfigError:
        return None
    return ""


def _first_line(reason: NotExportable) -> str:
    return str(reason).partition("\n")[0]


def export_lines(refused: dict[str, str]) -> list[str]:
    """Return one line that lists the accepted forms, and one line for each reason why forms are refused."""
    accepted = [form for form, reason in refused.items() if not reason]
    lines = [f"qbench export accepts the forms {', '.join(accepted)}"] if accepted else []
    for reason in dict.fromkeys(filter(None, refused.values())):
        lines.append(f"qbench export refuses {', '.join(f for f, r in refused.items() if r == reason)}: {reason}")
    return lines
