"""`benchmarks.attention`: runs everything there is, and writes the table that the choice reads."""

import json

import pytest
import torch

from benchmarks import attention, record
from benchmarks.cases import attention_case
from fastalign import ops
from fastalign.ops.attention import Case, choice, choose, flex


def test_packed_flex_attention_is_timed_without_its_mask(monkeypatch):
    """The mask is made before, and the result equals the definition."""
    case = attention_case("tiny", 2, 18, 2, 16, 30.0, packed=True, dtype=torch.float32)
    built = case.build("cpu")
    function = attention._flex(built)
    monkeypatch.setattr(flex, "block_mask", lambda *_: 1 / 0)
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    with torch.no_grad():
        torch.testing.assert_close(function(**built.inputs), case.reference(**built.inputs))


def test_the_table_is_what_the_choice_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(choice, "architecture", lambda: 90)
    monkeypatch.setattr(ops, "MODE", "auto")
    (tmp_path / "table.json").write_text(json.dumps({"sm_80": {"environment": {}, "rows": []}}))
    facts = {"softcap": 30.0, "packed": False, "length": 577, "width": 64}
    rows = [
        facts | {"implementation": "ours", "mode": "full", "ms": 2.0},
        facts | {"implementation": "eager", "mode": "full", "ms": 1.0},
        facts | {"implementation": "ours", "mode": "forward", "ms": 1.0},
        facts | {"implementation": "eager", "mode": "forward", "ms": 3.0},
        facts | {"implementation": "compile", "mode": "forward", "ms": 0.1},
        facts | {"implementation": "sdpa_flash", "mode": "full", "ms": 0.1, "computes": "without the cap"},
        facts | {"implementation": "ours", "mode": "backward", "ms": 0.5},
        facts | {"implementation": "flex", "failed": "no room"},
    ]
    choice._choose.cache_clear(), choice._table.cache_clear()
    try:
        attention.write_table(rows, {"architecture": "sm_90"})
        written = json.loads((tmp_path / "table.json").read_text())
        assert set(written) == {"sm_80", "sm_90"}
        assert [row["ms"] for row in written["sm_90"]["rows"]] == [
            {"triton": 2.0, "eager": 1.0},
            {"triton": 1.0, "eager": 3.0},
        ]
        call = Case("cuda", torch.bfloat16, True, False, False, 577, 64, gradient=True)
        assert choose(call).backend == "eager"
        assert choose(call._replace(gradient=False)).backend == "triton"
    finally:
        choice._choose.cache_clear(), choice._table.cache_clear()


def _row(length, ms):
    facts = {"softcap": 30.0, "packed": False, "length": length, "width": 64}
    return facts | {"implementation": "ours", "mode": "full", "ms": ms}


def test_a_part_of_the_cases_leaves_the_others_in_the_table(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    monkeypatch.setattr(choice, "TABLE", path)
    attention.write_table([_row(197, 1.0), _row(577, 2.0)], {"architecture": "sm_90"})
    attention.write_table([_row(577, 3.0)], {"architecture": "sm_90", "date": "later"})
    found = json.loads(path.read_text())["sm_90"]
    assert [(row["length"], row["ms"]["triton"]) for row in found["rows"]] == [(197, 1.0), (577, 3.0)]
    # Ended while writing: the old table is still whole.
    monkeypatch.setattr(type(path), "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention.write_table([_row(577, 4.0)], {"architecture": "sm_90"})
    assert json.loads(path.read_text())["sm_90"] == found


def test_the_table_can_be_had_again_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choice, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert attention.main(["--table"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setattr(record, "environment", lambda: {"gpu": "G", "architecture": "sm_90"})
    record.write("attention", [_row(197, 1.0)])
    assert attention.main(["--table"]) == 0
    found = json.loads((tmp_path / "table.json").read_text())["sm_90"]
    assert [row["ms"] for row in found["rows"]] == [{"triton": 1.0}]


def test_the_grid_has_every_length_width_cap_and_layout():
    found = {
        (c.options["length"], c.options["width"], bool(c.options["softcap"]), c.options["packed"])
        for c in attention.CASES
    }
    assert len(found) == len(attention.CASES) == 7 * 3 * 2 * 2
