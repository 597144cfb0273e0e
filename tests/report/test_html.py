"""The HTML page of a comparison: complete, escaped, self-contained, and sorted and filtered by a browser."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Configure
from helpers import epoch_line, evaluation, plant, write_metrics

from qbench.cli.compare import run_compare
from qbench.config import compose
from qbench.errors import ConfigError
from qbench.methods import dorefa
from qbench.report.comparison.compare import compare
from qbench.report.comparison.pairs import conclude
from qbench.report.html.page import html, page
from qbench.report.quantizer_plots.measurement import forward_curves, measure_quantizers
from qbench.runs.reader import read
from qbench.runs.result import with_checksum

EVIL = "<script>window.evil = 1</script>"
EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source"}
LOADS = ("src", "href", "srcset", "data", "action", "poster", "xlink:href")


class Reader(HTMLParser):
    """What a parser finds: tags with their attributes, whether all are closed, the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(a.get(key) == value for key, value in wanted.items())]


def change(path: Path, **values: Any) -> None:
    """Change a stored result."""
    stored = json.loads((path / "result.json").read_text())
    (path / "result.json").write_text(json.dumps(with_checksum(stored | values)))


@pytest.fixture
def out(configure: Configure) -> str:
    """Return a folder with two widths of a method, one with a script in its name, and runs without a result."""
    for seed, top1 in enumerate((96.0, 97.0, 98.0)):
        layers = {"layer1.conv1": {"w": {"found": 3 + seed % 2, "allowed": 4}}}
        card = {"dorefa": {"choices": "`clip`, of <three>", "deviations": "a zero stays zero"}}
        path = plant(configure("method=dorefa", f"seed={seed}"), top1, 98.0, verified=layers, card=card, notes=["well"])
        change(path, warnings=[f"not trained {EVIL}"])
        write_metrics(path, [epoch_line(0, 50.0), epoch_line(1, 60.0), '{"kind": "epo'])
    plant(configure("method=dorefa", "bits.w=10"), 98.5, 98.0)
    change(plant(configure("method=ttq"), 90.0, 98.0), method=EVIL)
    plant(configure("method=dorefa", "seed=8"), 0.0, status="failed", reason=f"{EVIL}\nsecond line")
    plant(configure("method=dorefa", "seed=9"), 0.0, status="diverged", reason="the loss is nan")
    return str(configure().out)


def made(out: str) -> str:
    found = read([out])
    return html(conclude(compare(found)), found)


def test_every_setting_row_and_reason_is_there_once_and_escaped(out: str) -> None:
    text = made(out)
    read_back = Reader(text)
    details = read_back.all("details")
    anchors = [one["id"] for one in details]
    assert anchors == ["t0s0", "t0s1", "t0s2", "t0s3"]
    (summed_up,) = (note for note in conclude(compare(read([out])))[0].notes if note.startswith("No difference"))
    assert text.count(summed_up) == 1, "above the table, not again in the notes"
    assert text.index(summed_up) < text.index("<table")
    assert [row["data-setting"] for row in read_back.all("tr") if "data-setting" in row] == anchors
    assert [link["href"] for link in read_back.all("a") if (link["href"] or "")[:2] == "#t"][2:] == [
        f"#{anchor}" for anchor in anchors
    ]
    words = [word.strip() for word in read_back.words]
    assert words.count(f"{EVIL}\nsecond line") == 1
    assert words.count("the loss is nan") == 1
    assert sum(EVIL in word for word in words) >= 3
    assert words.count(f"not trained {EVIL}") == 1, "in the details of its setting"
    assert words.count(f"warning: dorefa w2a32g32: not trained {EVIL}") == 1, "below the table"
    assert EVIL not in text
    assert len(read_back.all("script")) == 1


def test_numbers_are_sorted_as_numbers_and_no_value_is_empty(out: str) -> None:
    values = [a["data-value"] for tag, a in Reader(made(out)).tags if "data-value" in a and tag == "td"]
    assert len(values) > 20
    assert "" in values, "a single run has no standard deviation"
    assert all(float(value) == float(value) for value in values if value)
    assert {"10", "2", "32", "97.0", "7176.0"} <= set(values)


def test_nothing_is_loaded_from_elsewhere_and_one_script_may_run(out: str) -> None:
    text = made(out)
    read_back = Reader(text)
    assert "http:" not in text.replace("http-equiv", "")
    assert "https:" not in text
    for tag, attributes in read_back.tags:
        for name in LOADS:
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert set(re.findall(r"url\(([^)]?)", text)) <= {"#"}
    assert "@import" not in text
    (policy,) = [a["content"] or "" for a in read_back.all("meta") if "http-equiv" in a]
    (script,) = re.findall(r"(?s)<script>(.*?)</script>", text)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_keys_are_those_of_the_configuration_and_equal_seeds_have_no_interval(configure: Configure) -> None:
    words = ("method=ttq", "activation=dorefa", "activation.activation=abs", "bits=w2a2", "lr_search=grid")
    for seed in range(3):
        ((config, *_),) = [compose.configurations([*words, f"seed={seed}", f"out={configure().out}"])]
        plant(config, 97.0, 98.0, final=evaluation(97.0, 96.0))
    text = made(str(configure().out))
    keys = [word.partition("=")[0] for word in Reader(text).words]
    assert {"activation.activation", "optim.lr"} <= set(keys)
    assert not {"method.activation.activation", "method.optim.lr"} & set(keys)
    assert "97.00 %, 3 seeds" in text


def test_a_setting_shows_its_runs_layers_choices_and_configuration(out: str) -> None:
    text = made(out)
    (details,) = re.findall(r'(?s)<details class="setting" id="t0s3">.*?</details>', text)
    words = [word.strip() for word in Reader(details).words if word.strip()]
    assert words[0] == "dorefa W2"
    assert [word for word in words if word in ("96.00", "97.00", "98.00")] == ["96.00", "97.00", "98.00"]
    assert words.count("3-4 of 4") == 1
    assert words.count("well") == 1, "the same note of three runs is one"
    assert 'href="#m0"' in details
    assert "<code>clip</code>, of &lt;three&gt;" in text.partition('id="m0"')[2]
    assert "name: dorefa" in details
    assert "validation top-1 (%)" in details
    line = re.findall(r'<polyline class="own" points="([^"]*)"', details)[0]
    assert line == "34.0,126.0 372.0,6.0", "two epochs, from 50 % below to 60 % above"


def test_how_the_page_was_made(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/qbench", "compare", "my runs", "--html", "x.html"])
    newest = next(Path(out).rglob("result.json"))
    (newest.parent / "manifest.json").write_text('{"versions": {"torch": "9.9"}, "commit": null}')
    for path in Path(out).rglob("result.json"):
        os.utime(path, (0, 0))
    os.utime(newest, (86400, 86400))
    words = [word.strip() for word in Reader(made(out)).words]
    assert "qbench compare 'my runs' --html x.html" in words
    assert "1970-01-02 00:00 UTC" in words
    assert words[words.index("1 run with") + 1] == "torch 9.9"


def test_a_page_of_nothing(tmp_path: Path) -> None:
    page([], [], tmp_path / "empty.html")
    assert "No runs found." in " ".join(Reader((tmp_path / "empty.html").read_text()).words)
    with pytest.raises(ConfigError, match=r"must end in \.html"):
        page([], [], tmp_path / "page.pdf")


def test_damaged_parts_of_a_result_leave_the_page_whole(configure: Configure, tmp_path: Path) -> None:
    odd: list[dict[str, Any]] = [
        {"quantizers": {"conv": {"w": 3}}, "best": None, "wall_seconds": None},
        {"quantizers": {"conv": 3}, "card": {"dorefa": "text"}},
        {"quantizers": 3, "card": [], "verified": 3},
        {"best": {"epoch": "x", "test": 1}, "wall_seconds": "long"},
        {"baseline": None, "cost": None},
    ]
    for seed, values in enumerate(odd):
        path = plant(configure("method=dorefa", f"seed={seed}"), 95.0, 98.0)
        change(path, **values)
        write_metrics(
            path, ['{"kind": "epoch", "epoch": 0, "val_top1": "high"}', '{"epoch": 1, "layers": {"conv": 2}}']
        )
        (path / "config.yaml").write_bytes(b"\xff\xfe: [")
        (path / "manifest.json").write_text("[1]")
    assert len(Reader(made(str(tmp_path))).all("details")) == 2


@pytest.mark.full
def test_three_hundred_runs_stay_below_five_megabytes(configure: Configure, tmp_path: Path) -> None:
    layers = {f"layer{i}.conv": {key: {"found": 4, "allowed": 4} for key in "wa"} for i in range(20)}
    path = plant(configure("method=dorefa"), 95.0, 98.0, verified=layers, notes=["n" * 200])
    stored = json.loads((path / "result.json").read_text())
    for i in range(300):
        own = path.with_name(f"{path.name}-{i}")
        own.mkdir()
        values = {
            "method": f"method{i // 15}", "bits": {"w": 1 + i % 15 // 3, "a": 32, "g": 32}, "seed": i % 3,
            "identity": str(i),
        }  # fmt: skip
        (own / "result.json").write_text(json.dumps(with_checksum(stored | values)))
        write_metrics(own, [epoch_line(e, 50.0 + e) for e in range(60)])
        shutil.copy(path / "config.yaml", own)
    found = read([str(tmp_path)])
    tables = compare(found)
    page(tables, found, tmp_path / "report.html")
    assert len(Reader((tmp_path / "report.html").read_text()).all("details")) == 102
    assert (tmp_path / "report.html").stat().st_size < 5e6


class Browser:
    """Headless Chromium, spoken to through its debugging pipes: JSON between zero bytes."""

    def __init__(self, name: str, profile: Path) -> None:
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        words = [name, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "about:blank"]
        words.insert(1, f"--user-data-dir={profile}")
        shell = ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "-", *words]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(shell, pass_fds=(commands, answers), **quiet)  # type: ignore[call-overload]
        for end in (commands, answers):
            os.close(end)
        self.session, self.read, self.events, self.count = None, b"", [], 0  # type: ignore[var-annotated]
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def message(self) -> dict[str, Any]:
        while b"\0" not in self.read:
            more = os.read(self.answers, 2**16)
            assert more, "the browser has gone"
            self.read += more
        one, _, self.read = self.read.partition(b"\0")
        found: dict[str, Any] = json.loads(one)
        return found

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        own = {"sessionId": self.session} if self.session else {}
        os.write(
            self.commands, json.dumps({"id": self.count, "method": method, "params": params} | own).encode() + b"\0"
        )
        while True:
            message = self.message()
            if message.get("id") == self.count:
                return dict(message["result"])
            self.events.append(message)

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def js(self, code: str) -> Any:
        reply = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def width(self, width: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.commands)
        os.close(self.answers)

    @property
    def complaints(self) -> list[dict[str, Any]]:
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [event for event in self.events if event.get("method") in kinds]


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    name = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not name:
        pytest.skip("no Chromium here: apt-get install chromium")
    opened = Browser(name, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


ROWS = "[...document.querySelectorAll('#t0 tbody')[0].rows].filter(r => !r.hidden)"
COLUMN = ROWS + ".map(r => r.cells[{}].textContent.trim())"
OPEN = "document.querySelectorAll('details[open]').length"
HEAD = "[...document.querySelectorAll('#t0 thead th')].find(c => c.textContent.trim() === '{}')"
FILTER = "(f => {{ f.value = '{}'; f.dispatchEvent(new Event('input')) }})(document.getElementById('filter'))"


@pytest.mark.full
def test_a_browser_sorts_filters_and_opens_without_a_complaint(out: str, tmp_path: Path, browser: Browser) -> None:
    path = tmp_path / "report.html"
    path.write_text(made(out))
    browser.width(1280)
    browser.open(path)
    assert browser.js(COLUMN.format(1)) == ["32", "2", "10", "2"]

    def click(title: str) -> str:
        browser.js(f"{HEAD.format(title)}.querySelector('button').click()")
        return str(browser.js(f"{HEAD.format(title)}.getAttribute('aria-sort')"))

    assert click("W") == "ascending"
    assert browser.js(COLUMN.format(1)) == ["2", "2", "10", "32"], "as numbers, not as text"
    assert click("W") == "descending"
    assert browser.js(COLUMN.format(1)) == ["32", "10", "2", "2"]
    assert click("std") == "ascending"
    assert [cell == "-" for cell in browser.js(COLUMN.format(7))] == [False, False, True, True]
    assert click("top-1 %") == "descending", "the best first"
    assert browser.js(COLUMN.format(0))[-1] == EVIL
    browser.js(FILTER.format("w=10 dorefa"))
    assert browser.js(COLUMN.format(1)) == ["10"]
    assert browser.js("document.getElementById('shown').textContent") == "1 of 6 rows"
    assert browser.js("document.querySelectorAll('details.setting:not([hidden])').length") == 1
    browser.js(FILTER.format(""))
    assert browser.js("document.getElementById('shown').textContent") == "6 rows"
    browser.js("document.querySelector('tr[data-setting] a').click()")
    assert browser.js(f"new Promise(done => setTimeout(() => done({OPEN}), 300))") == 1
    browser.js("document.getElementById('open').click()")
    assert browser.js(OPEN) == 4
    browser.width(400)
    assert browser.js("document.documentElement.scrollWidth") <= 400, "tables and pictures scroll, the page does not"
    assert browser.js("window.evil") is None
    assert browser.js("performance.getEntriesByType('resource').length") == 0
    assert browser.complaints == []


def drawn_values(points: str) -> set[str]:
    return {point.partition(",")[2] for point in points.split()}


def test_each_setting_of_qbenchs_own_methods_shows_its_quantizers(configure: Configure) -> None:
    plant(configure("method=dorefa", "bits=w2a2"), 96.0, 98.0)
    change(plant(configure("method=ttq"), 90.0, 98.0), options={"t": 0.05})
    change(plant(configure("method=twn"), 90.0, 98.0), options={"a_key_of_another_version": 1})
    change(plant(configure("method=bwn"), 90.0, 98.0), method="os:getcwd")
    read_back = Reader(made(str(configure().out)))
    curves = [line["points"] or "" for line in read_back.all("polyline")]
    assert [len(drawn_values(points)) for points in curves] == [4, 4, 3], "weights and inputs of dorefa, weights of ttq"
    captions = [" ".join(word.split()) for word in read_back.words if " becomes " in word]
    assert [caption.partition(":")[0] for caption in captions] == [
        "weights, 4 levels", "inputs, 4 levels", "weights, 3 levels",
    ]  # fmt: skip


def test_forward_curves_are_those_of_qbench_plot() -> None:
    method = dorefa.build(w=2, a=2)
    weights, inputs = measure_quantizers(method)
    curves = forward_curves(method)
    assert torch.equal(curves["weights"].y, weights.forward.y)
    assert torch.equal(curves["weights"].x, weights.forward.x)
    assert torch.equal(curves["inputs"].y, inputs.forward.y)


def test_the_command_says_which_files_it_wrote(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.html"
    table = run_compare([out, "--html", str(file)])
    assert capsys.readouterr().err == f"writing {file} ...\nwrote {file}\n"
    assert file.is_file()
    assert "wrote" not in table, "the table alone is on stdout"
