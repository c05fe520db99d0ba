"""Shared by all tests: two threads, so that a figure of one machine holds on another; nothing from the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Nothing is read from or left in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.set_num_threads(2)
    torch.manual_seed(0)
