"""Benchmarks in tests read and leave nothing in the real results."""

import pytest

from benchmarks import record


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
