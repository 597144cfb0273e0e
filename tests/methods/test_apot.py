"""APoT against the authors' code, transcribed, against values computed by hand, and their checkpoints' names."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle_apot
import pytest
import torch
from conftest import Configure
from torch import Tensor

from qbench.config import compose
from qbench.errors import CheckpointError
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import assemble
from qbench.methods import apot
from qbench.quant.layers import quantized_layers
from qbench.runs.result import Result

SEVEN = [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1]
SIXTEEN = [n / 48 for n in (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48)]


def f64(values: object) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64)


@pytest.mark.parametrize(("code", "expected"), [(1, [0, 1]), (2, [0, 0.25, 0.5, 1]), (3, SEVEN), (4, SIXTEEN)])
def test_levels_computed_by_hand(code: int, expected: list[float]) -> None:
    assert apot.levels(code) == pytest.approx(expected)


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_levels_are_those_of_the_authors_code(code: int) -> None:
    assert apot.levels(code) == pytest.approx(oracle_apot.build_power_value(code).tolist(), rel=1e-15)
    assert len(apot.levels(code)) == 2**code


def test_weights_computed_by_hand() -> None:
    w = f64([0.9, -0.3, 0.1, 0, -0.7])
    cases = {
        3.0: ([1.5, -0.75, 0, 0, -1.5], [-0.007093, -0.080969, -0.056344, 0, -0.105595]),
        1.0: ([1, -0.5, 0.25, 0, -1], [1, 0.007093, 0.080969, 0, -1]),
    }
    for start, (values, slopes) in cases.items():
        for i, slope in enumerate(slopes):
            alpha = f64(start).requires_grad_()
            out = apot.quantize_weight(w, alpha, 3)
            torch.testing.assert_close(out, f64(values), atol=1e-12, rtol=0)
            (grad,) = torch.autograd.grad(out[i], alpha)
            assert grad.item() == pytest.approx(slope, abs=2e-6)


Weight = Callable[[Tensor, Tensor, int], Tensor]
Activation = Callable[[Tensor, Tensor, int], Tensor]


def check_weight(quantize: Weight) -> None:
    generator = np.random.default_rng(0)
    for bits in (2, 3, 4, 5, 6):
        for alpha in (0.7, 1.9, 3.0):
            values = generator.normal(0.2, 0.05, (6, 5, 3))
            want = oracle_apot.weight(values, alpha, bits)
            w, a, up = f64(values).requires_grad_(), f64(alpha).requires_grad_(), f64(generator.normal(size=(6, 5, 3)))
            out = quantize(w, a, bits)
            torch.testing.assert_close(out, f64(want.value), atol=1e-12, rtol=0)
            dw, da = torch.autograd.grad(out, (w, a), up)
            torch.testing.assert_close(dw, up * f64(want.slope), rtol=1e-10, atol=0)
            assert da.item() == pytest.approx((up.numpy() * want.alpha_slope).sum(), rel=1e-9)


def check_activation(quantize: Activation) -> None:
    generator = np.random.default_rng(1)
    for bits in (2, 3, 4, 5):
        for alpha in (0.6, 2.3):
            values = np.maximum(generator.normal(0.3, 1.0, (7, 11)), 0)
            want = oracle_apot.activation(values, alpha, bits)
            x, a, up = f64(values).requires_grad_(), f64(alpha).requires_grad_(), f64(generator.normal(size=(7, 11)))
            out = quantize(x, a, bits)
            torch.testing.assert_close(out, f64(want.value), atol=1e-12, rtol=0)
            dx, da = torch.autograd.grad(out, (x, a), up)
            torch.testing.assert_close(dx, up * f64(want.slope), rtol=1e-12, atol=0)
            assert da.item() == pytest.approx((up.numpy() * want.alpha_slope).sum(), rel=1e-9)


def test_weights_and_gradients_are_those_of_the_authors_code() -> None:
    check_weight(apot.quantize_weight)


def test_activations_and_gradients_are_those_of_the_authors_code() -> None:
    check_activation(apot.quantize_activation)


def test_the_weights_of_the_first_and_last_layer_are_those_of_the_authors_code() -> None:
    values = np.random.default_rng(2).normal(-0.05, 1, (4, 9))
    w = f64(values).requires_grad_()
    assert values.max() < -values.min(), "the code has levels below -127 here"
    out = apot.quantize_edge_weight(w, "max")
    site = apot.APoTEdgeWeight("max")
    assert (site(w).reshape(-1, 1) - site.grid(w).points.reshape(1, -1)).abs().min(1).values.max() < 1e-6
    assert apot.APoTEdgeWeight("abs").grid(w).points.numel() == 255
    torch.testing.assert_close(out, f64(oracle_apot.first_or_last(values)), atol=1e-12, rtol=0)
    (grad,) = torch.autograd.grad(out.sum(), w)
    assert torch.equal(grad, torch.ones_like(w))


def without_normalization(w: Tensor, alpha: Tensor, bits: int) -> Tensor:
    deviation = w.detach().std()
    return apot.quantize_weight(w, alpha / deviation, bits) * deviation + w.mean()


def with_a_clipped_gradient(w: Tensor, alpha: Tensor, bits: int) -> Tensor:
    inside = (apot.normalized(w.detach()).abs() <= alpha.detach()).to(w.dtype)
    return apot.quantize_weight(w * inside + (w * (1 - inside)).detach(), alpha, bits)


def with_a_graph_through_the_deviation(w: Tensor, alpha: Tensor, bits: int) -> Tensor:
    out, scaled = apot.quantize_weight(w, alpha, bits), (w - w.mean()) / w.std()
    fixed = apot.normalized(w)
    return out - (fixed - fixed.detach()) + (scaled - scaled.detach())


@pytest.mark.parametrize(
    "mutant",
    [
        without_normalization,
        with_a_clipped_gradient,
        with_a_graph_through_the_deviation,
        lambda w, alpha, bits: apot.quantize_weight(w, alpha, bits - 1 if bits > 2 else bits),
        lambda w, alpha, bits: apot.quantize_weight(w, alpha.detach(), bits) + 0 * alpha,
    ],
)
def test_the_comparison_rejects_wrong_weights(mutant: Weight) -> None:
    with pytest.raises(AssertionError):
        check_weight(mutant)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda x, alpha, bits: apot.quantize_activation(x, alpha, bits - 1 if bits > 2 else bits),
        lambda x, alpha, bits: apot.quantize_activation(x, alpha.detach(), bits) + 0 * alpha,
        lambda x, alpha, bits: apot.quantize_activation(x.detach(), alpha, bits) + x - x.detach(),
    ],
)
def test_the_comparison_rejects_wrong_activations(mutant: Activation) -> None:
    with pytest.raises(AssertionError):
        check_activation(mutant)


def test_degenerate_weights_stay_finite() -> None:
    for w in (torch.zeros(3, 2), torch.full((4,), -0.5), torch.tensor([0.3])):
        assert apot.quantize_weight(w, torch.tensor(3.0), 3).abs().max() == 0
        edge = apot.quantize_edge_weight(w)
        torch.testing.assert_close(edge, w)


FORM = ("model.form=post", "model.shortcut=B", "layers.first=w8", "layers.last=w8")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], Result]:
    """A trained network of qbench, stored under the names of the authors' code; its tensors and its result."""
    folder = tmp_path_factory.mktemp("published")
    words = ["experiment=smoke", "runtime.tensorboard=false", "method=apot", "bits=w3a3", *FORM]
    (config,) = compose.configurations([*words, f"out={folder}"])
    result = run(planned_run(config))
    state = torch.load(Path(result.run) / "last.pt", weights_only=True)["model"]
    ends = {"input_q.alpha": "act_alpha", "weight_q.alpha": "weight_quant.wgt_alpha"}
    named = {f"module.{re.sub('|'.join(ends), lambda m: ends[m[0]], name)}": t for name, t in state.items()}
    torch.save({"epoch": 3, "state_dict": named}, folder / "res.pth.tar")
    return folder / "res.pth.tar", state, result


def test_a_checkpoint_of_the_authors_gives_the_same_network(
    smoke: Configure, published: tuple[Path, dict[str, Tensor], Result]
) -> None:
    file, state, trained = published
    result = run(planned_run(smoke("method=apot", "bits=w3a3", "epochs=0", f"init={file}", *FORM)))
    assert result.final.test == trained.final.test
    assert result.weights_sha256 == trained.weights_sha256
    assert result.baseline is None, "the file contains no float network"
    assert any(name.endswith("input_q.alpha") for name in state)


@pytest.mark.full
def test_a_checkpoint_of_the_authors_needs_the_same_quantized_layers(
    smoke: Configure, published: tuple[Path, dict[str, Tensor], Result]
) -> None:
    file, _, _ = published
    usual = {"bits": "w3a3", **dict(word.split("=") for word in FORM)}
    for change in ({"layers.downsample": "float"}, {"layers.last": "same"}, {"bits": "w3a32"}):
        words = [f"{key}={value}" for key, value in (usual | change).items()]
        with pytest.raises(CheckpointError, match=r"its quantizers do not fit: .*alpha"):
            assemble(smoke("method=apot", f"init={file}", *words))
    with pytest.raises(CheckpointError, match=r"does not fit the network"):
        assemble(smoke("method=lsq", "bits=w3a3", f"init={file}", *FORM))


def test_the_first_and_last_layer_have_8_bit_weights_and_float_inputs(smoke: Configure) -> None:
    setup = assemble(smoke("method=apot", "bits=w3a3", *FORM))
    layers = quantized_layers(setup.install(setup.float_model()))
    assert layers["conv1"].bits == layers["fc"].bits == (8, 32, 32)
    assert layers["layer1.0.conv1"].bits == (3, 3, 32)


@pytest.mark.parametrize(
    "options", [{"initial_weight": 0.0}, {"initial_input": -1.0}, {"decay": 1.0}, {"edge_scale": "min"}]
)
def test_invalid_options_raise(options: dict[str, Any]) -> None:
    (key,) = options
    with pytest.raises(ValueError, match=rf"{key}=.*must be"):
        apot.build(**options)
