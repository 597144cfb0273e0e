"""Settings that cannot be ranked against each other: of other widths, protocols, normalization or training."""

import inspect
from pathlib import Path

import pytest
from conftest import Configure
from helpers import plant, qbench

from qbench.bits import Bits
from qbench.config import registry
from qbench.config.groups import option_names
from qbench.report.comparison.comparable import Compared, Unlike, unlike_protocols, unlike_widths
from qbench.report.comparison.compare import compare
from qbench.report.comparison.setting_table import settings_of
from qbench.runs.reader import read


def widths(*runs: tuple[str, Bits]) -> list[Unlike]:
    return unlike_widths(Compared(method, bits, "digits", "resnet8", "", {}) for method, bits in runs)


NOT_RANKED = "; these are not ranked against each other"


@pytest.mark.parametrize(
    ("runs", "statement", "advice"),
    [
        (
            [("dorefa", Bits(2)), ("lsq", Bits(2, 2))],
            "activations have different widths: dorefa w2a32; lsq w2a2",
            "for equal widths, type bits=w2a32 or bits=w2a2",
        ),
        (
            [("dorefa", Bits(4)), ("dorefa", Bits(2)), ("lsq", Bits(2, 2)), ("pact", Bits(2, 2)), ("lsq", Bits(4, 2))],
            "activations have different widths: dorefa w2a32; lsq, pact w2a2",
            "for equal widths, type bits=w2a32 or bits=w2a2",
        ),
        (
            [("dorefa", Bits(8, 32, 8)), ("uniform", Bits(8, 32))],
            "gradients have different widths: dorefa w8a32g8; uniform w8a32g32",
            "for equal widths, type bits=w8a32g32",
        ),
        (
            [("twn", Bits(2)), ("lsq", Bits(2, 2))],
            "activations have different widths: lsq w2a2; twn w2a32",
            "for equal widths, type bits=w2a32",
        ),
        (
            [("ttq", Bits(2)), ("ttq+hwgq", Bits(2, 2))],
            "activations have different widths: ttq w2a32; ttq+hwgq w2a2",
            "",
        ),
        (
            [("my.file:build", Bits(3, 3)), ("lsq", Bits(3, 5))],
            "activations have different widths: lsq w3a5; my.file:build w3a3",
            "for equal widths, type bits=w3a5 or bits=w3a3",
        ),
    ],
)
def test_methods_without_common_widths(runs: list[tuple[str, Bits]], statement: str, advice: str) -> None:
    assert widths(*runs)[0] == (statement + NOT_RANKED, advice)


def test_widths_are_listed_together_where_the_same_methods_differ() -> None:
    (found,) = widths(*[(m, Bits(w, a)) for w in (4, 2) for m, a in (("dorefa", 32), ("lsq", 2))])
    assert "dorefa w2a32, w4a32; lsq w2a2, w4a2;" in found.statement
    assert found.advice.endswith("bits=w2a32,w4a32 or bits=w2a2,w4a2")


def test_methods_that_share_widths_or_are_linked_by_a_third_are_like() -> None:
    assert not widths(("dorefa", Bits(2, 2)), ("lsq", Bits(2, 2)), ("lsq", Bits(2, 4)))
    assert not widths(("bwn", Bits(1)), ("dorefa", Bits(1)), ("dorefa", Bits(1, 1)), ("xnor", Bits(1, 1)))
    assert not widths(("bwn", Bits(1)), ("twn", Bits(2)), ("float", Bits()), ("dorefa", Bits(2)))
    linked = [
        ("lsq", Bits(2, 2)),
        ("dorefa", Bits(2)),
        ("pact", Bits(2, 4)),
        ("uniform", Bits(2, 2)),
        ("uniform", Bits(2)),
    ]
    (found,) = widths(*linked)
    assert "dorefa, lsq, uniform w2a32, w2a2; pact w2a4;" in found.statement


def test_the_widths_of_a_method_are_those_of_its_function() -> None:
    for name in option_names("method"):
        assert registry.widths(name) == "".join(
            key for key in inspect.signature(registry.find("method", name)).parameters if key in ("w", "a", "g")
        )


def test_methods_without_a_common_protocol() -> None:
    def run(method: str, **keys: object) -> Compared:
        return Compared(method, Bits(2), "digits", "resnet8", repr(keys), keys)

    assert not unlike_protocols([run("dorefa", epochs=3), run("dorefa", epochs=4), run("lsq", epochs=4)])
    (found,) = unlike_protocols([run("dorefa", epochs=3, optim={"lr": 1}), run("lsq", epochs=4, optim={"lr": 1})])
    assert found.statement == f"resnet8 on digits: dorefa and lsq have no protocol in common{NOT_RANKED}"
    assert found.advice == "for equal protocols, give all methods the same epochs"


def test_a_table_says_which_settings_are_not_ranked(configure: Configure) -> None:
    for method in ("dorefa", "lsq"):
        plant(configure(f"method={method}", "bits.w=2"), 97.0, 98.0)
    (table,) = compare(read([configure().out]))
    assert table.notes[0].startswith("activations have different widths: dorefa w2a32; lsq w2a2; these are not ranked")
    plant(configure("method=dorefa", "bits=w2a2"), 97.0, 98.0)
    (table,) = compare(read([configure().out]))
    assert not table.notes


def test_the_float_control_has_the_same_normalization(configure: Configure) -> None:
    other = {"norm": "no_affine"}
    plant(configure("method=float", "init=float"), 98.5, 98.0)
    plant(configure("method=dorefa", "bits=w2"), 97.0, 98.0)
    plant(configure("method=hwgq"), 95.0, 97.5, network=other)

    def over() -> dict[str, float]:
        (table,) = compare(read([configure().out]))
        notes.extend(note for note in table.notes if "no float control" in note)
        return {s.method: s.over_control.mean for s in settings_of(table) if s.over_control}

    notes: list[str] = []
    assert over() == {"dorefa": -1.5}
    typed = "method=float init=float model.norm=no_affine"
    assert notes == [f"hwgq w1a2g32: no float control has the same normalization; to add one, run {typed}"]
    plant(configure(*typed.split()), 97.0, 97.5, network=other)
    assert over() == {"dorefa": -1.5, "hwgq": -2.0}
    assert len(notes) == 1


@pytest.mark.parametrize(
    "change", ["trained from scratch, as the method requires", "not trained: post-training quantization"]
)
def test_the_float_control_is_trained_as_long(change: str, configure: Configure) -> None:
    plant(configure("method=float", "init=float"), 98.5, 98.0)
    plant(configure("method=gupta"), 97.0, 98.0, protocol_changes=[change])
    plant(configure("method=qd"), 97.5, 98.0, protocol_changes=["distilled from the float baseline, as it requires"])
    (table,) = compare(read([configure().out]))
    assert {s.method: s.over_control.mean for s in settings_of(table) if s.over_control} == {"qd": -1.0}


@pytest.mark.full
def test_a_sweep_warns_first_and_ends_with_conclusions_and_the_next_commands(tmp_path: Path) -> None:
    words = ["-m", "experiment=smoke", "method=dorefa,lsq", "seed=0,1", "runtime.tensorboard=false", "out=my runs"]
    words += ["optim.batch_size=256", "pretrain.optim.batch_size=256"]
    planned = qbench("plan", *words, "bits.w=2", cwd=tmp_path)
    unfair = qbench(*words, "bits.w=2", cwd=tmp_path)
    assert unfair.returncode == 0, unfair.stderr
    warning, advice, first = unfair.stderr.splitlines()[:3]
    assert warning == f"warning: activations have different widths: dorefa w2a32; lsq w2a2{NOT_RANKED}"
    assert advice == "for equal widths, type bits=w2a32 or bits=w2a2"
    assert [x for x in planned.stderr.splitlines() if not x.startswith("measuring ")] == [warning, advice]
    assert "/4" in first
    assert "compared by" not in unfair.stdout
    fair = qbench(*words, "bits=w2a2", cwd=tmp_path)
    assert "warning" not in fair.stderr
    assert "compared by seed and test image" in fair.stdout
    assert fair.stdout.endswith(
        "\n\nruns   'my runs'\nnext   qbench compare 'my runs' bits=w2a2g32\n"
        "       qbench compare 'my runs' bits=w2a2g32 --html report.html\n"
    )
