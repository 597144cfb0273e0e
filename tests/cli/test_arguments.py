"""Parsers of the subcommands: help texts, flags at any place, and errors that name what is allowed."""

import re
from pathlib import Path

import pytest

from qbench.cli import compare, plot, run_options, settle
from qbench.cli.arguments import SUMMARIES
from qbench.cli.commands import SUBCOMMANDS
from qbench.cli.main import main
from qbench.cli.parsers import PARSERS
from qbench.config.groups import group_names, option_names
from qbench.errors import ConfigError


def test_every_subcommand_has_a_parser_a_summary_and_a_function() -> None:
    assert set(PARSERS) == set(SUBCOMMANDS) == set(SUMMARIES)


@pytest.mark.parametrize("name", PARSERS)
def test_help_lists_every_flag_and_argument(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: qbench {name} ")
    assert SUMMARIES[name] in text
    parser = PARSERS[name]()
    for flag in [*parser.flags(), *parser.positionals()]:
        assert re.search(rf"^  (-\w, )?({flag}\b|{{)", text, re.MULTILINE), flag
    assert main(["help", name]) == main([name, "-h"]) == 0
    assert capsys.readouterr().out == 2 * text


def test_the_screen_lists_subcommands_groups_and_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], [], ["help"], ["-m", "--help"], ["help", "nosuch"]):
        assert main(words) == 0
    first, *rest = re.split(
        r"(?=^qbench: compares methods for low-precision CNNs)", capsys.readouterr().out, flags=re.MULTILINE
    )
    assert first == ""
    assert len(rest) == 5
    assert len(set(rest)) == 1
    for name, summary in SUMMARIES.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", rest[0], re.MULTILINE)
    words = set(re.findall(r"[\w/]+", rest[0]))
    assert set(group_names()) | set(option_names("method")) | set(option_names("model")) <= words
    assert {
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
        "6",
        "8",
        "75",
        "seed",
        "epochs",
        "init",
        "lr_search",
        "out",
        "rerun",
    } <= words


def test_the_screen_is_one_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, lines in (("80", 65), ("110", 57)):
        monkeypatch.setenv("COLUMNS", columns)
        main(["--help"])
        text = capsys.readouterr().out.splitlines()
        assert len(text) <= lines
        assert max(map(len, text)) <= int(columns)


def test_list_alone_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for group in group_names():
        assert re.search(rf"^  {group}\b", text, re.MULTILINE)
    assert set(option_names("model")) <= set(re.findall(r"\w+", text))
    assert "qbench list methods" in text
    assert "qbench list runs" in text


def test_a_flag_takes_its_value_in_both_ways_at_any_place() -> None:
    behind = compare.parse(["a", "b", "method=lsq", "--format", "md", "--columns", "cost,speed", "--margin", "2"])
    before = compare.parse(["--format=md", "a", "--columns=cost,speed", "method=lsq", "--margin=2", "b"])
    assert behind == before
    assert behind.directories == ("a", "b")
    assert behind.where == {"method": ["lsq"]}
    assert (behind.format, behind.columns, behind.margin) == ("md", ("cost", "speed"), 2.0)


def test_options_have_types_and_defaults(tmp_path: Path) -> None:
    run = str(tmp_path)
    assert compare.parse([run]) == compare.CompareOptions(directories=(run,))
    several = compare.parse([run, "--html", "a.html", "--plot", "a.png", "--plot=b.pdf", "--published"])
    assert (several.pages, several.plots) == ((Path("a.html"),), (Path("a.png"), Path("b.pdf")))
    assert several.published
    assert run_options.parse_inspect([run]) == run_options.InspectOptions(run=tmp_path)
    inspected = run_options.parse_inspect(["--images", "7", run, "--bn-stats=keep"])
    assert inspected == run_options.InspectOptions(run=tmp_path, images=7, bn_stats="keep")
    assert run_options.parse_sensitivity([run, "--widths", "8,2,2"]).widths == (2, 8)
    words = ["method=lsq", run, "bits.w=4", "--budget", "w=3"]
    assert run_options.parse_sensitivity(words).overrides == ("method=lsq", "bits.w=4")
    file = tmp_path / "p.csv"
    evaluated = run_options.parse_evaluate([run, "--predictions", str(file), "dataset=glyphs"])
    assert evaluated == run_options.EvaluateOptions(run=tmp_path, overrides=("dataset=glyphs",), predictions=file)
    assert plot.parse(["--poster"]) == plot.PlotOptions(poster=True)
    drawn = plot.parse(["hwgq", "--out", "h.svg", "bits.a=2"])
    assert drawn == plot.PlotOptions(overrides=("method=hwgq", "bits.a=2"), out=Path("h.svg"))
    test = settle.parse(["--max-seeds=5", "method=dorefa bits=w2", "method=ttq", "hydra/launcher=joblib"])
    assert (test.max_seeds, test.margin, test.launcher) == (5, 0.5, "joblib")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--margin", "0.5", "--margin=5"], "compare: --margin must be typed once"),
        (["--format", "md", "--format", "csv"], "compare: --format must be typed once"),
        (["--formt", "md"], "compare: no such flag: --formt; did you mean --format?\nallowed: --format, --by, "),
        (["--form", "md"], "compare: no such flag: --form; did you mean --format?\nallowed: "),
        (["--format", "txt"], "compare --format txt; did you mean text?\nallowed: text, md, csv, json, latex, record"),
        (["--format"], "compare --format needs a value\nsee qbench compare --help"),
        (["--format", "--published"], "compare --format needs a value\nsee qbench compare --help"),
        (["--by="], "compare --by needs a value"),
        (["--margin", "-1"], "compare --margin -1: must be a number of points of top-1 above 0"),
        (["--published=no"], "compare --published: ignored explicit argument 'no'"),
    ],
)
def test_mistakes_are_named_with_what_is_allowed(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compare.parse([*words, "runs"] if words != ["--format"] else words)
    assert str(error.value).startswith(message)
    assert len(str(error.value).splitlines()) <= 3


def test_compare_without_a_directory_is_refused() -> None:
    with pytest.raises(ConfigError, match="compare needs a directory of runs, such as: qbench compare outputs"):
        compare.run_compare([])


def test_published_tables_are_printed_in_a_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published", "--paper=ttq", "--format", "csv", "--provenance", "verified"]) == 0
    text = capsys.readouterr().out
    assert "ttq/resnet20_cifar10" in text
    assert "dorefa/" not in text
    assert main(["published", "--paper", "ttq", "--missing"]) == 0
    assert "qbench experiment=ttq/resnet20_cifar10" in capsys.readouterr().out
