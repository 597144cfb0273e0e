"""Plots of a comparison: data read back from the figures equals what the runs hold, worked out by hand."""

import json
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Configure, long_tier
from helpers import epoch_line, evaluation, plant, write_metrics

from qbench.bits import Bits
from qbench.cost.network_cost import NetworkCost
from qbench.errors import ConfigError
from qbench.report.comparison.compare import compare
from qbench.report.comparison.setting import SeedAccuracy, Setting, estimate
from qbench.report.comparison.setting_table import settings_of
from qbench.report.plots.accuracy_plots import pareto_front
from qbench.report.plots.plots import KINDS, comparison_figure, plot
from qbench.report.plots.style import COLOURS, DASHES, MARKERS
from qbench.report.plots.training_curves import fitted_sqnr, layer_errors, learning_curves, line_over_seeds
from qbench.runs.history import epochs, observed
from qbench.runs.reader import read
from qbench.runs.result import BaselineResult, with_checksum

STUDENT_2 = 4.302653  # 97.5 % of Student's t with 2 degrees of freedom, from any table


@pytest.fixture
def runs(configure: Configure) -> Any:
    """Return a function that reads and compares the planted runs."""

    def made() -> tuple[Any, Any]:
        found = read([configure().out])
        return compare(found), found

    return made


def test_a_bar_that_the_axis_cuts_ends_in_an_arrow(configure: Configure, runs: Any) -> None:
    """84, 97, 98 has the mean 93 and the half-width 19.4. The axis shows 30 % of the range of the means beyond them."""
    planted = {"dorefa": (96.0, 97.0, 98.0), "twn": (84.0, 97.0, 98.0), "ttq": (92.9, 93.0, 93.1)}
    for method, accuracies in planted.items():
        for seed, top1 in enumerate(accuracies):
            plant(configure(f"method={method}", "bits=w2a32", f"seed={seed}"), top1, 98.0)
    panel = comparison_figure(*runs(), ["bits"]).subfigs[0].axes[0]
    bottom, top = panel.get_ylim()
    cut = []
    for bars in panel.containers:
        for (x, low), (_, high) in filter(len, bars.lines[2][0].get_segments()):
            cut += [(x, top, 6)] * bool(high > top) + [(x, bottom, 7)] * bool(low < bottom)
    assert len(cut) >= 2, "or nothing is tested"
    assert len(cut) < 6, "or nothing is tested"
    arrows = [line for line in panel.lines if line.get_marker() in (6, 7)]
    drawn = sorted((*line.get_xydata()[0], line.get_marker()) for line in arrows)
    assert [pytest.approx(arrow) for arrow in sorted(cut)] == drawn
    assert not any(line.get_clip_on() for line in arrows)


def test_bits_are_means_with_students_interval(configure: Configure, runs: Any) -> None:
    for seed, top1 in enumerate((96.0, 97.0, 98.0)):
        plant(configure("method=dorefa", "bits=w2a32", f"seed={seed}"), top1, 98.0 + seed / 2)
    plant(configure("method=dorefa", "bits=w4a32"), 98.25, 98.0)
    figure = comparison_figure(*runs(), ["bits"])
    panel = figure.subfigs[0].axes[0]
    ((line, _, (segments,)),) = [bars.lines for bars in panel.containers]
    (x2, y2), (x4, y4) = line.get_xydata()
    assert (y2, y4) == pytest.approx((97.0, 98.25))
    assert (x2, x4) == pytest.approx((0, 1)), "one line stands in the middle of its width's place"
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["2", "4"]
    ends = segments.get_segments()[0][:, 1]
    half = STUDENT_2 * 1.0 / 3**0.5  # the deviation of 96, 97, 98 is 1
    assert ends == pytest.approx([97 - half, 97 + half], abs=1e-4)
    assert not any(isfinite(y) for _, y in segments.get_segments()[1]), "one seed has no interval"
    band = [patch for patch in panel.patches if patch.get_alpha() == 0.15]
    low, high = band[0].get_y(), band[0].get_y() + band[0].get_height()
    assert (low + high) / 2 == pytest.approx(98.5)  # baselines: 98, 98.5, 99
    assert (high - low) / 2 == pytest.approx(STUDENT_2 * 0.5 / 3**0.5, abs=1e-4)


def test_the_axis_is_logarithmic_in_the_error_where_accuracies_are_far_apart(configure: Configure, runs: Any) -> None:
    plant(configure("method=dorefa", "bits=w4a32"), 97.0, 98.0)
    plant(configure("method=dorefa", "bits=w2a32"), 96.0, 98.0)
    near = comparison_figure(*runs(), ["bits"]).subfigs[0].axes[0]
    assert (near.get_yscale(), near.get_ylabel()) == ("linear", "test top-1 (%)")
    plant(configure("method=dorefa", "bits=w1a32"), 60.0, 98.0)
    far = comparison_figure(*runs(), ["bits"]).subfigs[0].axes[0]
    assert far.get_ylabel() == "test top-1 (%), log scale of the error"
    low, high, third = (far.transData.transform((0, y))[1] for y in (61.0, 81.0, 91.0))
    assert third - high == pytest.approx(high - low), "40, 20 and 10 errors in a hundred, and one, are a step apart"
    ends = far.get_ylim()
    assert ends[0] < 60 < 98 < ends[1]


def test_settings_with_float_weights_have_a_panel_of_their_own(configure: Configure, runs: Any) -> None:
    for words in ("bits=w2a2", "bits=w4a4", "bits=w1a2", "bits=w32a2", "bits=w2a2g6"):
        plant(configure("method=dorefa", words), 95.0, 98.0)
    figure = comparison_figure(*runs(), ["bits"])
    assert [panel.get_xlabel() for panel in figure.subfigs[0].axes] == ["weight bits W", "activation bits A"]
    labels = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
    assert sorted(labels) == ["dorefa", "dorefa, A2", "dorefa, A=W", "dorefa, A=W G6", "float"]


def test_the_pareto_front_of_points_worked_out_by_hand() -> None:
    assert pareto_front([(4, 90), (1, 80), (2, 85), (3, 84), (2, 70), (5, 90)]) == [1, 2, 0]
    assert pareto_front([(1, 50)]) == [0]
    assert pareto_front([(1, 50), (1, 50), (2, 60)]) == [0, 1, 2], "equal points do not dominate each other"
    assert pareto_front([]) == []


def test_pareto_marks_the_front_over_bytes_and_bitops(configure: Configure, runs: Any) -> None:
    for words, top1, size, ops in (
        ("bits=w1", 90.0, 100, 9000), ("bits=w2", 95.0, 200, 2000), ("bits=w4", 94.0, 400, 4000)
    ):  # fmt: skip
        cost = NetworkCost(
            params=1, macs=1, bitops=ops, bytes_float=1, bytes_ideal=size, bytes_packed=size, bits_per_weight=2.0
        )
        plant(configure("method=dorefa", words), top1, 98.0, cost=cost)
    left, right = comparison_figure(*runs(), ["pareto"]).subfigs[0].axes
    for panel, wanted in ((left, [(100, 90), (200, 95)]), (right, [(2000, 95)])):
        (rings,) = [line for line in panel.lines if line.get_markersize() == 9]
        assert [tuple(point) for point in rings.get_xydata()] == wanted
        assert panel.get_xscale() == "log"
    assert [text.get_text() for text in left.texts] == ["1", "2"]
    named = [panel.get_xlabel().replace("\N{NO-BREAK SPACE}", " ").splitlines()[1:] for panel in (left, right)]
    assert named == [["Pareto front: 1 dorefa W1, 2 dorefa W2"], ["Pareto front: 1 dorefa W2"]]


def test_curves_are_the_mean_and_the_extremes_of_seeds(configure: Configure, runs: Any) -> None:
    for seed, values in enumerate(((50.0, 70.0), (60.0, 90.0))):
        path = plant(configure("method=dorefa", f"seed={seed}"), 95.0, 98.0)
        write_metrics(
            path,
            [json.dumps({"kind": "step", "step": 1, "loss": 1.0}), *(epoch_line(i, v) for i, v in enumerate(values))],
        )
        baseline = path.parent / f"float-w32a32g32-s{seed}-00000000"
        baseline.mkdir()
        write_metrics(baseline, [epoch_line(0, 20.0 + seed), epoch_line(1, 30.0), epoch_line(2, 40.0)])
    tables, found = runs()
    lines, measure = learning_curves(settings_of(tables[0])[1:], {str(run.path): run.result for run in found})
    assert measure == "val_top1"
    assert lines["dorefa"]["W2"] == ([1, 2], [55.0, 80.0], [50.0, 70.0], [60.0, 90.0])
    assert lines["dorefa"]["float"] == ([-2, -1, 0], [20.5, 30.0, 40.0], [20.0, 30.0, 40.0], [21.0, 30.0, 40.0])
    (panel,) = comparison_figure(tables, found, ["curves"]).subfigs[0].axes
    assert [list(line.get_ydata()) for line in panel.lines[:2]] == [[20.5, 30.0, 40.0], [55.0, 80.0]]
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["1", "3", "2"]


def test_float_curves_of_unequal_length_are_averaged_from_their_first_epoch(configure: Configure, runs: Any) -> None:
    for seed, values in enumerate(((20.0, 30.0), (40.0, 50.0, 60.0))):
        path = plant(configure("method=dorefa", f"seed={seed}"), 95.0, 98.0)
        write_metrics(path, [epoch_line(0, 50.0)])
        baseline = path.parent / f"float-w32a32g32-s{seed}-00000000"
        baseline.mkdir()
        write_metrics(baseline, [epoch_line(i, value) for i, value in enumerate(values)])
    tables, found = runs()
    lines, _ = learning_curves(settings_of(tables[0])[1:], {str(run.path): run.result for run in found})
    assert lines["dorefa"]["float"][:2] == ([-1, 0], [30.0, 40.0])


def test_curves_end_at_the_last_epoch_that_all_seeds_have() -> None:
    """With early stopping, the mean over the remaining seeds would jump where a seed ends."""
    early, late = {1: 50.0, 2: 60.0}, {1: 70.0, 2: 80.0, 3: 90.0}
    assert line_over_seeds([early, late]) == ([1, 2], [60.0, 70.0], [50.0, 60.0], [70.0, 80.0])
    assert line_over_seeds([late, {}]) == ([1, 2, 3], [70.0, 80.0, 90.0], [70.0, 80.0, 90.0], [70.0, 80.0, 90.0])
    assert line_over_seeds([]) is line_over_seeds([{}]) is line_over_seeds([{1: 1.0}, {2: 1.0}]) is None


@pytest.mark.parametrize("same", [True, False])
def test_the_float_curve_is_not_that_of_another_data_set(configure: Configure, runs: Any, same: bool) -> None:
    """The checkpoint was trained in another folder, on the same images or on those of another data set."""
    words = [] if same else ["dataset=glyphs"]
    start = plant(configure("method=float", "init=scratch", "epochs=4", f"out={configure().out}-before", *words), 91.0)
    (start / "best.pt").write_bytes(b"weights")
    write_metrics(start, [epoch_line(0, 20.0), epoch_line(1, 30.0)])
    loaded = BaselineResult(run=str(start), final=evaluation(98.0), sha256="0" * 64)
    write_metrics(plant(configure("method=dorefa", f"init={start}"), 97.0, baseline=loaded), [epoch_line(0, 50.0)])
    tables, found = runs()
    lines, _ = learning_curves(settings_of(tables[0]), {str(run.path): run.result for run in found})
    floats = {"float": ([-1, 0], [20.0, 30.0], [20.0, 30.0], [20.0, 30.0])} if same else {}
    assert lines == {"dorefa": floats | {"W2": ([1], [50.0], [50.0], [50.0])}}


@pytest.mark.parametrize("corrupt", ['{"kind": "epoch", "epoch": 1, "val_t', "[1, 2]", "\x00\x01", '{"epoch": NaN}'])
def test_a_corrupt_log_loses_only_the_corrupt_part(tmp_path: Path, corrupt: str) -> None:
    write_metrics(tmp_path, [epoch_line(0, 50.0), corrupt, epoch_line(2, 70.0), '{"kind": "epoch", "epoch": "3"}'])
    assert {e: values["val_top1"] for e, values in epochs(tmp_path).items()} == {0: 50.0, 2: 70.0}
    assert epochs(tmp_path / "nowhere") == {}


def test_layers_are_plotted_where_their_metrics_were_recorded(configure: Configure, runs: Any) -> None:
    tables, found = runs()
    assert comparison_figure(tables, found, ["layers"]) is None
    for seed, error in enumerate((0.1, 0.01)):
        path = plant(configure("method=dorefa", f"seed={seed}"), 95.0, 98.0)
        early = {"conv1": {"cosine": 0.1}, "conv2": {"cosine": 0.2}}
        late = {"conv1": {"cosine": (1 - error) ** 0.5, "sqnr": -9.0}, "conv2": {"w.dead": 1.0}, "fc": {"cosine": 1.0}}
        records = [{"kind": "layers", "step": i, "epoch": i, "layers": t} for i, t in enumerate((early, late))]
        write_metrics(path, [epoch_line(0, 50.0), *map(json.dumps, records)])
    assert observed(path)["fc"] == {"cosine": 1.0}
    tables, found = runs()
    lines, names = layer_errors([s for s in settings_of(tables[0]) if not s.is_float])
    assert names == ["conv1", "fc"]
    assert lines["dorefa"]["W2"].x == [0, 1]
    own = [lines["dorefa"]["W2"].mean, lines["dorefa"]["W2"].low, lines["dorefa"]["W2"].high]
    assert own == [pytest.approx(wanted) for wanted in ([15, 60], [10, 60], [20, 60])], "errors of 1/10 and 1/100"
    (panel,) = comparison_figure(tables, found, ["layers"]).subfigs[0].axes
    assert [tick.get_text() for tick in panel.get_xticklabels()] == names
    assert list(panel.lines[0].get_ydata()) == pytest.approx([15, 60])


def test_an_output_at_another_scale_is_no_error() -> None:
    wanted, got = np.array([3.0, 4.0, 0.0]), 0.1 * np.array([3.0, 4.0, 0.5])
    cosine = wanted @ got / np.linalg.norm(wanted) / np.linalg.norm(got)
    scale = wanted @ got / (got @ got)
    by_hand = 10 * np.log10(wanted @ wanted / np.sum((wanted - scale * got) ** 2))
    assert fitted_sqnr({"cosine": cosine}) == pytest.approx(by_hand)
    assert [fitted_sqnr({"cosine": c}) for c in (0.0, -1.0, 1.0000001)] == [0, 0, 60]
    assert fitted_sqnr({"sqnr": 3.0}) is fitted_sqnr({"cosine": None}) is None


def test_every_method_looks_different(configure: Configure, runs: Any) -> None:
    plant(configure("method=dorefa"), 95.0, 98.0)
    path = plant(configure("method=dorefa", "seed=1"), 95.0, 98.0)
    stored = json.loads((path / "result.json").read_text())
    for i in range(20):
        own = path.with_name(f"m{i}")
        own.mkdir()
        identity = str(i)
        made = with_checksum(stored | {"method": f"_${i}_{{", "identity": identity})
        (own / "result.json").write_text(json.dumps(made))
    figure = comparison_figure(*runs(), ["bits", "pareto"])
    looks = {(line.get_color(), line.get_marker()) for bars in figure.subfigs[0].axes[0].containers
             for line in bars.lines[:1]}  # fmt: skip
    assert len(looks) == 21
    labels = [text.get_text().strip() for text in figure.subfigs[0].legends[0].get_texts()]
    assert "_$3_{" in labels, "a name is text, never mathematics"
    assert len({(c, m) for i in range(66) for c, m in [(COLOURS[i % 6], MARKERS[i % 11])]}) == 66
    assert len(set(DASHES)) == len(DASHES)


@pytest.mark.parametrize(
    ("suffix", "start"),
    [(".png", b"\x89PNG"), long_tier(".pdf", b"%PDF"), long_tier(".svg", b"<?xml"), (".SVG", b"<?xml")],
)
def test_files_are_what_their_suffix_says_and_always_the_same(
    configure: Configure, runs: Any, tmp_path: Path, suffix: str, start: bytes
) -> None:
    plant(configure("method=dorefa"), 95.0, 98.0)
    plot(*runs(), tmp_path / f"one{suffix}")
    plot(*runs(), tmp_path / f"two{suffix}")
    data = (tmp_path / f"one{suffix}").read_bytes()
    assert data.startswith(start)
    assert data == (tmp_path / f"two{suffix}").read_bytes()


def test_the_file_name_selects_the_plot(configure: Configure, runs: Any, tmp_path: Path) -> None:
    path = plant(configure("method=dorefa"), 95.0, 98.0)
    write_metrics(path, [epoch_line(0, 50.0)])
    tables, found = runs()
    plot(tables, found, tmp_path / "bits.svg")
    plot(tables, found, tmp_path / "other.svg")
    assert len(comparison_figure(tables, found, KINDS).subfigs) == 3
    assert (tmp_path / "other.svg").stat().st_size > 1.5 * (tmp_path / "bits.svg").stat().st_size
    with pytest.raises(ConfigError, match=r"allowed: \.png, \.pdf, \.svg"):
        plot(tables, found, tmp_path / "bits.jpg")
    with pytest.raises(ConfigError, match="stored layer metrics"):
        plot(tables, found, tmp_path / "layers.png")


def test_nothing_to_plot_is_an_error(configure: Configure, runs: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to plot"):
        plot([], [], tmp_path / "all.png")
    plant(configure("method=dorefa"), 0.0, status="failed", reason="why")
    with pytest.raises(ConfigError, match="nothing to plot"):
        plot(*runs(), tmp_path / "all.png")
    assert not (tmp_path / "all.png").exists()


def test_widths_are_named_without_what_is_float() -> None:
    def short(bits: Bits) -> str:
        run = SeedAccuracy(seed=0, run="r", top1=90.0)
        return Setting(
            label="m", method="m", options={}, bits=bits, network={}, dataset="d", model="m", keys={},
            protocol="p", is_baseline=False, source="result.json", runs=(run,), top1=estimate([90.0]),
        ).short_widths  # fmt: skip

    assert short(Bits(2, 32, 32)) == "W2"
    assert short(Bits(2, 4, 6)) == "W2 A4 G6"
    assert short(Bits(32, 32, 32)) == "W32"
