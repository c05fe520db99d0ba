"""`benchmarks.data`: the pipeline at a tiny size, and how many threads feed a step."""

import pytest

from benchmarks import data, record


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)


def test_data(capsys):
    rows = data.main(["--tiny", "--needs", "100"])
    assert [row["source"] for row in rows] == ["folder", "tar"]
    assert all(row["images_per_second"] > 0 and row["threads_needed"] >= 1 for row in rows)
    assert "folder: to feed 100 images/s you need" in capsys.readouterr().out


def test_threads_that_feed_a_step():
    rates = {1: 100.0, 2: 180.0, 4: 300.0}
    assert data.threads_needed(90, rates) == (1, True)
    assert data.threads_needed(180, rates) == (2, True)
    assert data.threads_needed(230, rates) == (3, True)  # 2.83 on the line
    assert data.threads_needed(600, rates) == (8, False)  # at 75 a thread
    rows = [
        {"source": "tar", "decoder": "DALI GPU mixed", "hw_decoder_load": load, "threads": number}
        | {"images_per_second": rate * (1 + load)}
        for load in (0.0, 0.5)
        for number, rate in rates.items()
    ]
    line = "tar: to feed 600 images/s you need 6 threads (DALI GPU mixed, hw_decoder_load 0.5, more than were"
    assert data.closing(rows, 600)[0].startswith(line)
