"""Tables and files of results."""

import io
import math

import pytest
from rich.console import Console

from fastalign.evaluation.results import check_output, patch_table, percent, summarise, write_results
from fastalign.utils.errors import UserError
from tests.evaluation.helpers import results


def row(model, seed, recall, skip):
    """A head's row with a few figures."""
    test = {"macro_recall": recall, "macro_precision": 0.5, "macro_f1": 0.5, "accuracy": 1.0, "loss": 0.25}
    key = {"model": model, "labels": "union", "head": "transformer", "skip_blocks": skip}
    return {**key, "seed": seed, "test": test | {"map": 0.3}}


def shown(rows) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(patch_table(summarise(rows), "test split of /data/scenes"))
    return console.file.getvalue()


def test_the_table_fits_a_terminal():
    models, both = ("before", "aligned"), (0, 1)
    rows = [row(model, seed, 0.5 + 0.3 * seed, skip) for model in models for skip in both for seed in both]
    text = shown(rows)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("65.0±21.2") == 4, "of 0.5 and 0.8: 0.3 / sqrt(2)"
    assert "seeds: 2" in text
    assert "skip" in text.splitlines()[1]
    text = shown([one for one in rows if one["skip_blocks"] == 1 and one["model"] == "before"])
    assert "before, test split of /data/scenes, skipped blocks: 1" in " ".join(text.split())
    assert "skip " not in text


def test_numbers_that_are_none_are_written_as_null(tmp_path):
    write_results(tmp_path / "a" / "p.json", {"a": math.nan, "b": [math.inf, 1.5, {"c": (-math.inf, 2)}]})
    assert results(tmp_path / "a" / "p.json") == {"a": None, "b": [None, 1.5, {"c": [None, 2]}]}
    assert percent({"mean": math.nan, "std": None}) == "-"


def test_results_of_the_same_data_elsewhere_are_overwritten(tmp_path):
    about = {"data": {"path": "coco:/a", "fingerprints": {"test": "12345678"}}, "settings": {"lr": 1e-3}}
    write_results(tmp_path / "p.json", about)
    about["data"]["path"] = "coco:/b"
    check_output(tmp_path / "p.json", about)
    about["data"]["fingerprints"] = {"test": "12345679"}
    with pytest.raises(UserError, match=r"data\.fingerprints\.test was 12345678, is 12345679"):
        check_output(tmp_path / "p.json", about)
