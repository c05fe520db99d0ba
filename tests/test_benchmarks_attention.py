"""`benchmarks.attention`: runs everything there is, and writes the table that the choice reads."""

import json

import pytest
import torch

from benchmarks import attention, record
from fastalign import ops
from fastalign.attention import Case, choice, choose


@pytest.mark.slow
def test_every_implementation_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert attention.main(["--tiny"]) == 0
    text = capsys.readouterr().out
    for name in ("ours", "eager", "sdpa", "sdpa_flash"):
        assert f" {name} " in text
    assert "not timed" not in text
    assert text.count("unmeasured") == 4
    assert not list(tmp_path.iterdir())


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
        attention.write_table(rows)
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


def test_the_grid_is_the_issue_of_vision_transformers():
    found = {
        (c.options["length"], c.options["width"], bool(c.options["softcap"]), c.options["packed"])
        for c in attention.CASES
    }
    assert len(found) == len(attention.CASES) == 7 * 3 * 2 * 2
