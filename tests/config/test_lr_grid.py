"""`lr_search=grid`: which runs a command line becomes, and which of them the table shows."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import Configure
from helpers import evaluation, plant

from qbench.cli.main import main
from qbench.config import compose
from qbench.config.identity import run_identity
from qbench.config.schema import Config, baseline_config, to_dict
from qbench.config.validate import from_dict
from qbench.errors import ConfigError
from qbench.report.comparison.compare import compare
from qbench.report.comparison.setting import Setting
from qbench.report.comparison.setting_table import settings_of
from qbench.report.tables.table import FORMATS, Table
from qbench.runs.directory import directory_name
from qbench.runs.reader import read

LOW, OWN, HIGH = 0.001, 0.01, 0.1  # of digits' recipe, with factors 0.1, 1 and 10
THREE = "lr_grid.factors=[0.1,1,10]"


def tuned(out: Path, *words: str) -> list[Config]:
    return compose.configurations([f"out={out}", "lr_search=grid", *words])


def planted(out: Path, val: dict[float, float], *words: str, method: str = "dorefa") -> None:
    """Write runs with the validation top-1 in `val` by rate; test top-1 is 50, 51, 52 by rate."""
    for place, config in enumerate(tuned(out, THREE, f"method={method}", *words)):
        if config.optim.lr in val:
            plant(config, 0.0, 90.0, final=evaluation(50.0 + place, val[config.optim.lr]))


def selected_rate(setting: Setting) -> float | None:
    return setting.learning_rate.rate if setting.learning_rate else None


def only_table(out: Path) -> Table:
    (table,) = compare(read([str(out)]))
    return table


def test_a_line_becomes_a_run_for_each_rate(tmp_path: Path) -> None:
    runs = tuned(tmp_path, "method=dorefa")
    assert [c.optim.lr for c in runs] == [0.001, 0.003, 0.01, 0.03, 0.1], "digits' 0.01 times 0.1, 0.3, 1, 3, 10"
    assert [c.optim.lr_end for c in runs] == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3], "its 1e-4 in the same way"
    assert len({directory_name(run_identity(c)) for c in runs}) == 5
    assert len({json.dumps(run_identity(c).protocol, sort_keys=True) for c in runs}) == 1
    (unified,) = compose.configurations(["method=dorefa"])
    assert {directory_name(run_identity(baseline_config(c))) for c in runs} == {
        directory_name(run_identity(baseline_config(unified)))
    }
    assert directory_name(run_identity(unified)) not in {directory_name(run_identity(c)) for c in runs}


def test_the_grid_is_relative_to_the_rate_typed(tmp_path: Path) -> None:
    runs = tuned(tmp_path, "method=dorefa", "optim=sgd", "optim.lr=0.02", "lr_grid.factors=[0.5,1,2]")
    assert [(c.optim.lr, c.optim.lr_end) for c in runs] == [(0.01, 0.0), (0.02, 0.0), (0.04, 0.0)]
    other = tuned(tmp_path, "method=dorefa", "optim=sgd", "optim.lr=0.01", "lr_grid.factors=[0.5,1,2]")
    assert other[1].optim == runs[0].optim
    assert run_identity(other[1]).protocol != run_identity(runs[0]).protocol, "another grid"
    wider = tuned(tmp_path, "method=dorefa", "optim=sgd", "optim.lr=0.02", "lr_grid.factors=[0.25,1]")
    assert run_identity(wider[1]).protocol != run_identity(runs[1]).protocol


def test_every_run_of_a_sweep_has_the_same_grid(tmp_path: Path) -> None:
    runs = tuned(tmp_path, "-m", "method=dorefa,ttq,lsq,gupta", "seed=0,1")
    assert len(runs) == len({directory_name(run_identity(c)) for c in runs}) == 4 * 2 * 5
    assert len({json.dumps(run_identity(c).protocol, sort_keys=True) for c in runs}) == 1
    assert len({directory_name(run_identity(baseline_config(c))) for c in runs}) == 2, "a float baseline for each seed"
    mixed = compose.configurations(["-m", "method=dorefa", "lr_search=none,grid"])
    assert [c.lr_search for c in mixed] == ["none"] + ["grid"] * 5


def test_a_method_that_trains_nothing_is_one_run(tmp_path: Path) -> None:
    (alone,) = tuned(tmp_path, "method=float")
    assert directory_name(run_identity(alone)) == directory_name(
        run_identity(compose.configurations(["method=float"])[0])
    )
    (ptq,) = tuned(tmp_path, "method=ptq")
    assert run_identity(ptq).protocol == run_identity(tuned(tmp_path, "method=dorefa")[0]).protocol, (
        "it belongs to the table of the others"
    )
    assert "optim.lr" not in run_identity(ptq).options
    assert len(tuned(tmp_path, "method=qd", "method.trained=false", "distill=none")) == 1
    assert len(tuned(tmp_path, "method=qd")) == 5
    assert len(tuned(tmp_path, "method=float", "init=float")) == 5, "the control has a grid too"
    assert len(tuned(tmp_path, "method=ttq", "activation=ptq", "bits.a=8")) == 5
    assert len(tuned(tmp_path, "method=dorefa", "bits.w=17")) == 5, (
        "a method that cannot be built reports it in its own run"
    )


def test_a_run_without_a_grid_has_no_key_of_it(configure: Configure) -> None:
    config = configure("method=dorefa")
    for part in (run_identity(config).keys, run_identity(config).protocol):
        assert not {"lr_search", "lr_grid"} & set(part)
    assert directory_name(run_identity(configure("method=dorefa", "lr_search=none"))) == directory_name(
        run_identity(config)
    )


def test_a_stored_run_of_the_grid_comes_back_as_itself(tmp_path: Path) -> None:
    for config in tuned(tmp_path, "method=dorefa", "bits=w2a2", "optim=sgd_step"):
        again = from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config))))
        assert again == config
        assert directory_name(run_identity(again)) == directory_name(run_identity(config))


REFUSED = {
    "lr_search=gird": ("lr_search=gird", "none, grid"),
    "dataset.val=0": ("dataset.val=0", "type dataset.val=0.1"),
    "lr_grid.factors=[1]": ("lr_grid.factors", "two or more ascending numbers"),
    "lr_grid.factors=[1,0.5]": ("lr_grid.factors", "ascending"),
    "lr_grid.factors=[0,1]": ("lr_grid.factors", "above 0"),
    "lr_grid.factors=[1,inf]": ("lr_grid.factors", "ascending"),
    "lr_grid.factors=3": ("lr_grid.factors=3", "a list"),
    "lr_grid.factor=[1,2]": ("lr_grid.factor", "lr_grid.factors"),
    "lr_grid.lr=0.1": ("lr_grid.lr", "no such key"),
    "+lr_grid.lr=0.1": ("lr_grid.lr", "set optim.lr"),
    "lr_grid.factors=[1,1e400]": ("lr_grid.factors", "ascending"),
    "optim.lr=1e308": ("not a valid learning rate", "optim.lr=1e+308"),
}


@pytest.mark.parametrize("word", REFUSED)
def test_refused_with_the_fix(tmp_path: Path, word: str) -> None:
    words = [word] if word.startswith("lr_search") else ["lr_search=grid", word]
    with pytest.raises(ConfigError) as caught:
        compose.configurations(["method=dorefa", *words])
    for phrase in REFUSED[word]:
        assert phrase in str(caught.value), str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_grid_without_a_search_is_refused() -> None:
    with pytest.raises(ConfigError, match="no effect without lr_search=grid"):
        compose.configurations(["method=dorefa", "lr_grid.factors=[1,2]"])


def test_validation_selects_and_the_other_rates_test_accuracy_is_not_shown(tmp_path: Path) -> None:
    """Test top-1 is 50, 51 and 52 by rate: the highest is not at the selected rate."""
    for seed in (0, 1):
        planted(tmp_path, {LOW: 80.0, OWN: 90.0 + seed, HIGH: 89.0}, f"seed={seed}")
    found = compare(read([str(tmp_path)]))
    (table,) = found
    assert [row[0] for row in table.rows] == ["float", "dorefa"]
    setting = settings_of(table)[1]
    assert setting.difference
    assert (setting.top1.mean, setting.top1.n, setting.difference.mean) == (51.0, 2, -39.0)
    assert setting.to_json()["lr_search"] == {
        "optim.lr": OWN,
        "seeds": [0, 1],
        "grid": [
            {"optim.lr": LOW, "val_top1_mean": 80.0},
            {"optim.lr": OWN, "val_top1_mean": 90.5},
            {"optim.lr": HIGH, "val_top1_mean": 89.0},
        ],
    }
    assert table.notes == [
        "dorefa w2a32g32: optim.lr=0.01 is the best of 3 by validation top-1, seeds 0, 1; the search "
        "cost 3 x 30 epochs per seed"
    ]
    for name, form in FORMATS.items():
        shown = form(found)
        assert "51.00" in shown or "51.0" in shown, name
        assert not any(hidden in shown for hidden in ("50.0", "52.0")), name


def test_order_of_runs_does_not_matter(tmp_path: Path) -> None:
    for seed in range(3):
        planted(tmp_path, {LOW: 70.0 + seed, OWN: 71.0, HIGH: 71.0 - seed / 3}, f"seed={seed}")
    found = read([str(tmp_path)])
    assert compare(found) == compare(found[::-1])


def test_each_method_and_width_has_its_own_rate(tmp_path: Path) -> None:
    planted(tmp_path, {LOW: 1.0, OWN: 2.0, HIGH: 1.5})
    planted(tmp_path, {LOW: 1.0, OWN: 2.0, HIGH: 3.0}, "bits.w=4")
    planted(tmp_path, {LOW: 4.0, OWN: 2.0, HIGH: 3.0}, method="ttq")
    planted(tmp_path, {LOW: 5.0, OWN: 2.0, HIGH: 3.0}, "method.activation=abs", "bits=w2a2")
    (ptq,) = tuned(tmp_path, THREE, "method=ptq")
    plant(ptq, 61.0, 90.0)
    table = only_table(tmp_path)
    rates = {(s.label, s.bits.w, s.bits.a): selected_rate(s) for s in settings_of(table)}
    assert rates == {
        ("float", 32, 32): None,
        ("dorefa activation=clip", 2, 32): OWN,
        ("dorefa activation=clip", 4, 32): HIGH,
        ("dorefa activation=abs", 2, 2): LOW,
        ("ttq", 2, 32): LOW,
        ("ptq", 8, 8): None,
    }
    ends = [
        note.split(": ")[0]
        for note in table.notes
        if "of the grid, so a lower rate may be better" in note or "a higher rate may be" in note
    ]
    assert ends == ["dorefa activation=abs w2a2g32", "dorefa activation=clip w4a32g32", "ttq w2a32g32"]


def test_of_equal_rates_the_one_nearest_to_the_recipes_own_is_selected(tmp_path: Path) -> None:
    planted(tmp_path, {LOW: 90.0, OWN: 90.0, HIGH: 90.0})
    planted(tmp_path, {LOW: 90.0, OWN: 89.0, HIGH: 90.0}, "bits.w=4")
    rates = {s.bits.w: selected_rate(s) for s in settings_of(only_table(tmp_path))[1:]}
    assert rates == {2: OWN, 4: LOW}, "both ends are as near: the lower one"


def test_the_mean_is_over_the_seeds_that_all_rates_have(tmp_path: Path) -> None:
    """Seed 1, whose best rate is HIGH by far, is missing at LOW: only seed 0 counts."""
    planted(tmp_path, {LOW: 80.0, OWN: 90.0, HIGH: 85.0}, "seed=0")
    planted(tmp_path, {OWN: 90.0, HIGH: 99.0}, "seed=1")
    table = only_table(tmp_path)
    setting = settings_of(table)[1]
    assert setting.learning_rate
    assert setting.learning_rate.rate == OWN
    assert setting.learning_rate.seeds == (0,)
    assert [run.seed for run in setting.runs] == [0, 1]
    assert table.notes[-1] == "dorefa w2a32g32: validation accuracy is missing at optim.lr 0.001 (missing, seed 1)"


def test_a_rate_that_diverges_for_one_seed_is_not_selected(tmp_path: Path) -> None:
    planted(tmp_path, {LOW: 80.0, OWN: 90.0, HIGH: 99.0}, "seed=0")
    planted(tmp_path, {LOW: 80.0, OWN: 90.0}, "seed=1")
    (high,) = (c for c in tuned(tmp_path, THREE, "method=dorefa", "seed=1") if c.optim.lr == HIGH)
    plant(high, 0.0, status="diverged", reason="the loss is nan")
    table, rest = compare(read([str(tmp_path)]))
    setting = settings_of(table)[1]
    assert setting.learning_rate
    assert setting.learning_rate.rate == OWN
    assert setting.learning_rate.seeds == (0, 1)
    assert setting.learning_rate.validation[HIGH] is None
    assert table.notes[-1] == "dorefa w2a32g32: validation accuracy is missing at optim.lr 0.1 (diverged, seed 1)"
    assert rest.rows[0][0] == "diverged"


def test_a_run_that_trains_nothing_has_no_grid(configure: Configure) -> None:
    assert len(compose.configurations(["lr_search=grid", "method=dorefa", "epochs=0", f"out={configure().out}"])) == 1


def test_without_validation_accuracy_nothing_is_selected(tmp_path: Path) -> None:
    (first, *_) = tuned(tmp_path, THREE, "method=dorefa")
    plant(first, 97.0, 90.0)
    table = only_table(tmp_path)
    assert [row[0] for row in table.rows] == ["float"]
    assert "none of 3 rates is selected" in table.notes[0]
    assert "97.0" not in str(table.values)


def test_runs_with_and_without_a_grid_are_in_two_tables(configure: Configure, tmp_path: Path) -> None:
    planted(tmp_path, {LOW: 80.0, OWN: 90.0, HIGH: 85.0})
    title = 'resnet8 on digits; protocol with lr_grid.factors=[0.1, 1, 10], lr_search="grid"'
    assert only_table(tmp_path).title == title
    plant(configure("method=dorefa"), 60.0, 90.0)
    titles = {table.title: settings_of(table)[1].top1.mean for table in compare(read([str(tmp_path)]))}
    assert titles == {
        title: 51.0,
        'resnet8 on digits; protocol with lr_search="none"': 60.0,
    }


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One float baseline, a run for each rate, one row; the same command again trains nothing."""
    words = [
        "experiment=smoke",
        "method=dorefa",
        "lr_search=grid",
        "lr_grid.factors=[0.01,1]",
        "runtime.tensorboard=false",
    ]
    assert main([*words, f"out={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert sorted(path.parent.name.partition("-")[0] for path in stored) == ["dorefa", "dorefa", "float"]
    children = [json.loads(path.read_text()) for path in stored if path.parent.name.startswith("dorefa")]
    assert {r["options"]["optim.lr"] for r in children} == {0.0001, 0.01}
    best = max(children, key=lambda r: r["final"]["val"]["top1"])
    assert len({r["final"]["val"]["top1"] for r in children}) == 2, "equal rates would not show which one is selected"
    assert f"optim.lr={best['options']['optim.lr']:g} is the best of 2" in shown
    assert "2 x 1 epochs per seed" in shown
    assert len([line for line in shown.splitlines() if line.startswith("dorefa   ")]) == 1
    assert main([*words, f"out={tmp_path}"]) == 0
    assert capsys.readouterr().out == shown
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == stored
