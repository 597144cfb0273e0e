"""Plots of quantizers: measured curves equal the papers' formulas, and every method can be plotted."""

import math
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from conftest import ROOT, long_tier, tiered
from torch import Tensor

from qbench.bits import Bits
from qbench.cli.plot import draw, illustrative_bits
from qbench.config import groups
from qbench.errors import ConfigError
from qbench.methods import dorefa, gupta, hwgq, inq, pact, qcnn, slq, ttq, twn, uniform, xnor
from qbench.methods import float as unquantized
from qbench.quant.method import Method
from qbench.report.quantizer_plots.measurement import PICKS, measure_quantizers
from qbench.report.quantizer_plots.panels import BLUE, ORANGE, SKY, VERMILLION, legend_handles
from qbench.report.quantizer_plots.probe_network import VALUES, normal_values
from qbench.report.quantizer_plots.transfer_curves import DRAWS, Codewords, QuantizerCurves

NORMAL = NormalDist()
LARGEST = NORMAL.inv_cdf(1 - 0.5 / VALUES)
"""The largest magnitude of the weights that are measured."""
SAMPLING = 2e-3
"""Tolerance of a threshold: half the distance of two neighbouring weights, near zero."""


def curves(method: Method) -> list[QuantizerCurves]:
    measured = measure_quantizers(method)
    found = [one for one in measured if isinstance(one, QuantizerCurves)]
    assert len(found) == len(measured)
    return found


def at(measured_curve: QuantizerCurves, x: float) -> float:
    """Return the slope at the pick nearest to x."""
    assert measured_curve.slope is not None
    return measured_curve.slope[(measured_curve.forward.x[measured_curve.picks] - x).abs().argmin()].item()


def close(found: Tensor, wanted: list[float], tolerance: float) -> None:
    assert found.tolist() == pytest.approx(wanted, abs=tolerance)


def test_weights_are_the_quantiles_of_a_gaussian_in_random_order() -> None:
    values = normal_values(VALUES)
    assert values.max().item() == pytest.approx(LARGEST, abs=1e-5)
    assert (values < 1).float().mean().item() == pytest.approx(NORMAL.cdf(1), abs=1 / VALUES)
    assert (values.diff() > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_dorefa_two_bit_weights() -> None:
    """w_hat = 2 Q2(tanh w / (2 M) + 1/2) - 1 jumps where tanh w / M is -2/3, 0, 2/3, with M = max tanh."""
    (measured_curve,) = curves(dorefa.build(w=2))
    top = math.tanh(LARGEST)
    jump = math.atanh(2 / 3 * top)
    close(measured_curve.forward.levels, [-1, -1 / 3, 1 / 3, 1], 1e-6)
    close(measured_curve.forward.heights, [-1, -1 / 3, 1 / 3, 1], 1e-6)
    close(measured_curve.forward.thresholds, [-jump, 0, jump], SAMPLING)
    assert torch.equal(measured_curve.forward.y, dorefa.quantize_weight(measured_curve.forward.x, 2))
    for x in (-2.0, -0.5, 0.0, 1.0, 2.5):
        assert at(measured_curve, x) == pytest.approx((1 - math.tanh(x) ** 2) / top, abs=0.01)


def test_hwgq_two_bit_inputs() -> None:
    """Thresholds are 0 and the midpoints of positive levels, 1.5 and 2.5 steps; the gradient ends at the last level."""
    weights, inputs = curves(hwgq.build(w=1, a=2, constants="authors"))
    step = 0.538
    close(inputs.forward.levels, [0, step, 2 * step, 3 * step], 1e-6)
    close(inputs.forward.heights, [0, step, 2 * step, 3 * step], 1e-6)
    close(inputs.forward.thresholds, [0, 1.5 * step, 2.5 * step], 1e-6)
    x = inputs.forward.x[inputs.picks]
    assert inputs.slope is not None
    assert (x > 2.5).any()
    assert (x < -2.5).any()
    assert torch.equal(inputs.slope, ((x > 0) & (x <= 3 * step)).float())
    alpha = math.sqrt(2 / math.pi)
    close(weights.forward.heights, [-alpha, alpha], 1e-3)
    close(weights.forward.thresholds, [0], SAMPLING)
    assert weights.slope is not None
    assert (weights.slope == 1).all()


def test_hwgq_log_tail() -> None:
    """1 / (x - (q_m - 1)) above the last level q_m."""
    _, inputs = curves(hwgq.build(w=1, a=2, constants="authors", backward="log_tailed"))
    assert at(inputs, 2.614) == pytest.approx(1 / 2, abs=0.01)
    assert at(inputs, 1.0) == 1


def test_ternary_weights() -> None:
    """TWN: 0.7 E|w| and E(|w| : |w| > that) of N(0, 1). TTQ: 0.05 max|w|, gradients by zone."""
    (measured_curve,) = curves(twn.build())
    delta = 0.7 * math.sqrt(2 / math.pi)
    alpha = NORMAL.pdf(delta) / (1 - NORMAL.cdf(delta))
    close(measured_curve.forward.thresholds, [-delta, delta], SAMPLING)
    close(measured_curve.forward.heights, [-alpha, 0, alpha], 2e-3)
    (measured_curve,) = curves(ttq.build())
    delta = 0.05 * LARGEST
    scale = NORMAL.pdf(delta) / (1 - NORMAL.cdf(delta))
    close(measured_curve.forward.thresholds, [-delta, delta], SAMPLING)
    assert [at(measured_curve, x) for x in (-1, 0, 1)] == pytest.approx([scale, 1, scale], abs=2e-3)
    assert measured_curve.notes == (f"starts at positive {scale:.3g}, negative {scale:.3g}",)


def test_xnor_gradient_of_weights_ends_at_one() -> None:
    """(1 / n + alpha 1{|w| <= 1}), n weights of a filter."""
    weights, inputs = curves(xnor.build())
    alpha = math.sqrt(2 / math.pi)
    assert at(weights, 0.9) == pytest.approx(alpha + 1 / VALUES, abs=1e-3)
    assert at(weights, 1.1) == pytest.approx(1 / VALUES, rel=1e-3)
    assert [at(inputs, x) for x in (-1.1, -0.9, 0.9, 1.1)] == [0, 1, 1, 0]


def test_inq_freezes_the_larger_half_first() -> None:
    """The median of |N(0, 1)| is 0.6745; n1 = floor(log2(4 max / 3)) = 2, so that 5 bits give +-4 ... +-1/32 and 0."""
    middle, end = curves(inq.build())
    assert middle.when == "phase 1 of 4: 50 % frozen"
    assert middle.frozen is not None
    assert middle.slope is not None
    large = middle.forward.x.abs() > NORMAL.inv_cdf(0.75)
    assert torch.equal(middle.frozen, large)
    assert torch.equal(middle.forward.y[~large], middle.forward.x[~large])
    assert torch.equal(middle.slope, (~large[middle.picks]).float())
    powers = [2.0**n for n in range(-5, 3)]
    close(end.forward.levels, [-p for p in powers[::-1]] + [0] + powers, 0)
    borders = [(a + b) / 2 for a, b in zip([0, *powers], powers, strict=False)]
    close(end.forward.thresholds, [-b for b in borders[::-1]] + borders, 5e-2)
    assert end.frozen is None
    assert end.slope is not None
    assert not end.slope.any()


def test_slq_freezes_clusters_until_all_are_frozen() -> None:
    middle, end = curves(slq.build(w=3))
    assert middle.frozen is not None
    share = middle.frozen.float().mean().item()
    assert 0.5 <= share < 1
    assert f"{100 * share:.0f} % frozen" in middle.when
    assert len(end.forward.heights) == len(end.forward.levels) == 5
    assert 0 in end.forward.levels


def test_a_tracked_range_has_adapted_to_the_inputs() -> None:
    _, inputs = curves(uniform.build(w=2, a=2))
    largest = inputs.forward.tensor.max().item()
    assert largest > 3
    close(inputs.forward.levels, [0, largest / 3, 2 * largest / 3, largest], 0.02 * largest)


def test_pact_is_shown_at_its_initial_range() -> None:
    _, inputs = curves(pact.build(w=2, a=2))
    close(inputs.forward.thresholds, [10 / 6, 30 / 6, 50 / 6], 1e-5)
    assert inputs.notes == ("starts at alpha 10",)
    assert [at(inputs, x) for x in (-0.5, 0.5, 9.9, 10.1)] == [0, 1, 1, 0]


def test_gupta_rounds_up_or_down() -> None:
    """8 bits: weights <2,6>, activations <6,2>, errors <-4,12>: steps 1/64, 1/4, 2^-12."""
    weights, inputs, outputs = curves(gupta.build(w=8, a=8, g=8))
    assert outputs.backward is not None
    cases = ((weights.forward, 2.0**-6, 2), (inputs.forward, 0.25, 32), (outputs.forward, 0.25, 32))
    for drawn, step, top in (*cases, (outputs.backward, 2.0**-12, 2.0**-5)):
        assert drawn.band is not None
        low, high = drawn.band
        x = drawn.x.clamp(-top, top - step)
        below = (x / step).floor() * step
        assert ((below <= low) & (low <= high) & (high <= below + step)).all()
        assert (high - low).max().item() == pytest.approx(step)
        wrong = (drawn.y - x).abs().max().item()
        assert wrong < step * math.sqrt(math.log(2e9 * VALUES) / (2 * DRAWS))  # Hoeffding
        assert len(drawn.jumps) == 0
    assert [len(r.forward.levels) for r in (weights, inputs)] == [256, 256]
    assert weights.forward.y[[0, -1]].tolist() == [-2, 2 - 2.0**-6]
    (nearest,) = curves(gupta.build(w=8, a=32, g=32, rounding="nearest"))
    assert nearest.forward.band is None


def test_dorefa_gradients() -> None:
    """2 bits: -m, -m/3, m/3, m with m the sample's maximum; outputs pass."""
    (outputs,) = curves(dorefa.build(w=32, g=2))
    assert outputs.backward is not None
    assert outputs.backward.band is not None
    m = 0.01 * LARGEST
    close(outputs.backward.levels, [-m, -m / 3, m / 3, m], 1e-6)
    close(outputs.backward.band[0].unique(), [-m, -m / 3, m / 3, m], 1e-6)
    assert torch.equal(outputs.forward.x, outputs.forward.y)


def test_codewords_of_several_weights_are_points_not_a_staircase() -> None:
    (found,) = measure_quantizers(qcnn.build())
    assert isinstance(found, Codewords)
    assert found.vectors.shape == found.decoded.shape == (VALUES // 4, 4)
    assert found.points.shape == (16, 4)
    assert set(map(tuple, found.decoded.tolist())) <= set(map(tuple, found.points.tolist()))
    assert found.fixed


def test_float_changes_nothing() -> None:
    (measured_curve,) = curves(unquantized.build())
    assert torch.equal(measured_curve.forward.x, measured_curve.forward.y)
    assert measured_curve.slope is not None
    assert (measured_curve.slope == 1).all()


def test_only_one_scale_group_is_shown_and_noted() -> None:
    from qbench.methods import qd

    (measured_curve,) = curves(qd.build(w=2))
    assert len(measured_curve.forward.x) == 256
    assert "one group of 256" in measured_curve.notes
    low, high = (end.item() for end in measured_curve.forward.x.aminmax())
    close(measured_curve.forward.heights, [low + i * (high - low) / 3 for i in range(4)], 1e-5)
    assert len(measured_curve.picks) <= PICKS


def test_measuring_leaves_the_random_state_as_it_was() -> None:
    before = torch.get_rng_state()
    measure_quantizers(gupta.build(w=8, a=8, g=8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("build", "bits"),
    [
        (dorefa.build, Bits(2, 2, 4)),
        (uniform.build, Bits(2, 2)),
        (gupta.build, Bits(8, 8, 8)),
        (inq.build, Bits(5)),
        (hwgq.build, Bits(1, 2)),
        (unquantized.build, Bits()),
    ],
)
def test_widths_of_the_poster(build: object, bits: Bits) -> None:
    assert illustrative_bits(build()) == bits  # type: ignore[operator]


@pytest.mark.parametrize("name", tiered(groups.option_names("method"), ["dorefa", "float", "qcnn"]))
def test_every_method_draws(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = {"gupta": ["bits=w8a8g8"], "dorefa": ["bits=w2a2g4"]}.get(name, [])
    written = draw([name, *words])
    (file,) = tmp_path.iterdir()
    assert written == file.name
    assert written.startswith(f"plot-{name}-w")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_two_methods_in_one(tmp_path: Path) -> None:
    out = tmp_path / "both.svg"
    draw(["ttq", "activation=hwgq", "bits.a=2", "--out", str(out)])
    text = out.read_text()
    assert "<!-- ttq+hwgq -->" in text
    assert "weights, W2: 3 levels" in text
    assert "inputs, A2: 4 levels" in text


@pytest.mark.parametrize(
    ("suffix", "start"), [long_tier("png", b"\x89PNG"), long_tier("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_a_format_by_its_suffix_and_the_same_bytes_again(suffix: str, start: bytes, tmp_path: Path) -> None:
    made = []
    for i in range(2):
        draw(["method=twn", f"--out={tmp_path / str(i)}.{suffix}"])
        made.append((tmp_path / f"{i}.{suffix}").read_bytes())
    assert made[0].startswith(start)
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["hwqg"], "did you mean hwgq?"),
        (["twn", "--out", "twn.bmp"], r"allowed suffixes: \.png, \.pdf, \.svg"),
        (["twn", "--out"], "needs a value"),
        (["twn", "--ot", "twn.png"], "did you mean --out?"),
        (["twn", "epochs=3"], "no effect on plot"),
        (["twn", "ttq"], "needs exactly one method"),
        ([], "needs exactly one method"),
        (["--poster", "twn"], "no effect on plot --poster"),
        (["twn", "bits.a=2"], "activations are not quantized"),
        (["hwgq", "bits.a=9"], "allowed: 1-8 or 32"),
    ],
)
def test_errors(words: list[str], phrase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=phrase) as raised:
        draw(words)
    assert len(str(raised.value).splitlines()) <= 3
    assert not list(tmp_path.iterdir())


def test_marks_differ_without_colour() -> None:
    measured = [measure_quantizers(method) for method in (inq.build(), qcnn.build(), dorefa.build(w=2, g=2))]
    handles = legend_handles([curves for one in measured for curves in one])
    kinds = [
        (
            getattr(h, "get_marker", lambda: "area")(),
            str(getattr(h, "_dash_pattern", "")),
            h.get_linewidth(),
            h.get_alpha(),
        )
        for h in handles
    ]
    assert len(set(map(str, kinds))) == len(kinds) == 10
    okabe_ito = {"#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert {BLUE, VERMILLION, SKY, ORANGE} <= okabe_ito


def test_pictures_of_the_documents_exist_and_are_small() -> None:
    folder = ROOT / "docs" / "pictures"
    names = {path.stem for path in folder.iterdir()}
    assert {"poster", "hwgq"} <= names <= {*groups.option_names("method"), "poster", "report", "bits"}
    for path in folder.iterdir():
        assert path.stat().st_size < (400_000 if path.stem in ("poster", "report", "bits") else 60_000), path


@pytest.mark.full
def test_poster(tmp_path: Path) -> None:
    out = tmp_path / "poster.svg"
    assert draw(["--poster", "--out", str(out)]) == str(out)
    text = out.read_text()
    assert all(f"<!-- $\\bf{{{name}}}$" in text for name in groups.option_names("method"))
