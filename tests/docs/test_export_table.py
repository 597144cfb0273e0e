"""scripts/export_table.py: the table from planted results, and the record behind docs/guides/export.md."""

import json
import sys
from dataclasses import replace

from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import export_table
from export_table import FormResult, Row

from qbench.config import groups


def test_the_table_by_hand() -> None:
    forms = {
        "packed": FormResult(bytes=5_123, same_class=450), "onnx": FormResult(bytes=7_000, same_class=449),
        "int8": FormResult(reason="layer1: int8 needs"), "qonnx": FormResult(reason="? the package qonnx is missing"),
        "integer": FormResult(bytes=6_001, same_class=450),
    }  # fmt: skip
    row = Row(method="lsq", bits="w2a2g32", ideal=4_000.25, float_size=76_328, images=450, forms=forms)
    head, line, written = export_table.size_table([row]).splitlines()
    assert head == "| method | W A | float | ideal | packed | onnx | int8 | qonnx | integer | same class |"
    assert line.count("|") == head.count("|")
    assert written == "| lsq | 2 2 | 76,328 | 4,000 | 5,123 | 7,000 | - | ? | 6,001 | 449 of 450 |"
    other = replace(row, network="resnet20 on cifar10")
    assert export_table.size_table([other]).splitlines()[-1].startswith("| lsq, resnet20 on cifar10 | 2 2 | 76,328 |")
    assert len(export_table.time_table([row, other]).splitlines()) == 3, "only the networks of the table are timed"


def test_times_by_hand() -> None:
    forms = {
        "packed": FormResult(bytes=5_123, same_class=450, times={"numba": 0.512}),
        "onnx": FormResult(bytes=7_000, same_class=450, times={"onnxruntime": 1.0}),
        "int8": FormResult(bytes=6_500, same_class=449, times={"onnxruntime": 0.704, "openvino": 0.6}),
        "qonnx": FormResult(reason="no"), "integer": FormResult(reason="no"),
    }  # fmt: skip
    row = Row(method="dorefa", bits="w2a2g32", ideal=4_000.25, float_size=76_328, images=450, forms=forms)
    assert export_table.time_table([row]).splitlines()[-1] == "| dorefa | 2 2 | 0.51 | 1.00 | 0.70 | 0.60 |"
    short = export_table.short_table([row]).splitlines()
    assert short[-1] == ("| dorefa | 2 2 | 76,328 | 4,000 | 5,123 | 6,500 | 449 of 450 | 0.51 | 1.00 | 0.70 | 0.60 |")
    assert {line.count("|") for line in short} == {12}
    untimed = replace(row, forms={form: replace(found, times={}) for form, found in forms.items()})
    assert export_table.tables([row], "note").count("| dorefa |") == 2
    assert export_table.tables([untimed], "note").count("| dorefa |") == 1


def test_the_record_has_every_method_with_all_forms_verified() -> None:
    stored = json.loads((ROOT / "docs" / "records" / "export_table.json").read_text())
    rows = export_table.loaded_rows(stored["rows"])
    assert {row.method for row in rows} == set(groups.option_names("method"))
    for row in rows:
        assert list(row.forms) == list(export_table.FORMS)
        for form, found in row.forms.items():
            assert (found.bytes is None) == bool(found.reason), (row.method, form)
            assert not found.reason.startswith("?"), "all packages were installed"
            least = 0.99 * row.images if row.network else row.images  # rounding errors on 10,000 images of CIFAR-10
            assert found.same_class is None or found.same_class >= least
        assert row.forms["packed"].bytes
    written = (ROOT / "docs" / "guides" / "export.md").read_text()
    assert f"{export_table.tables(rows, stored['note'])}\n" in written
    assert export_table.short_table(rows) in (ROOT / "README.md").read_text(encoding="utf-8")
