"""Untrusted input is read as data: nothing of it runs, and it is either accepted or refused in one line."""

import os
import pickle
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastalign.config import Config, kinds, load_config
from fastalign.utils.errors import UserError

ROOT = Path(__file__).parents[2]


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def one_line(path, overrides=()) -> str | None:
    """The message that a configuration is refused with, or None."""
    try:
        load_config(path, list(overrides))
        return None
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) <= 2000
        return message


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]"
for old, new in pairwise("abcdefghi"):
    BOMB += f"\n{new}: &{new} [{', '.join([f'*{old}'] * 9)}]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 5000, ["nested too deeply"]),
        (BOMB, ["an alias at line 2", "write the value out"]),
        ('!!python/object/apply:os.mkdir ["HERE"]', ["not YAML", "python/object"]),
        ("seed: " + "9" * 5000, ["not YAML", "digits"]),
        ("seed: 2001-13-41", ["not YAML", "month"]),
        ("a\x00b: 1", ["not YAML"]),
        ("1: 2", ["Keys should be strings"]),
        ("base: /", ["no recipe at /"]),
    ],
)
def test_configurations_made_to_harm_are_one_line(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text(text)
    message = one_line(path)
    assert all(word in message for word in words), message
    assert not (tmp_path / "HERE").exists()


@pytest.mark.parametrize("value", ["[" * 5000, "&a [*a]"])
def test_overrides_made_to_harm_are_one_line(tmp_path, value):
    (tmp_path / "c.yaml").touch()
    assert "override 'student.kwargs.a=" in one_line(tmp_path / "c.yaml", [f"student.kwargs.a={value}"])


NAMES = st.sampled_from([*Config.model_fields, "base", "student.kwargs.depth", *kinds()]) | st.text(
    max_size=6
)
YAML = st.text("abc:{}[]&*!|>-?#'\"%@` \n\t0", max_size=60).map(str.encode)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | YAML, name=NAMES, value=st.text(max_size=20))
def test_any_file_and_any_override_are_read_or_refused_in_one_line(tmp_path, content, name, value):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    one_line(path)
    path.write_text("")
    one_line(path, [f"{name}={value}"])


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_checkpoint_runs(recipe, tmp_path, capsys, legacy):
    """On resume; `tests/backbones/test_bad_weights.py` reads it as weights."""
    target = tmp_path / "ran"
    state = {"student": {}, "optimizer": Bomb(target), "step": 1, "config": {}}
    path = tmp_path / "run/checkpoints/step-00000001.pt"
    path.parent.mkdir(parents=True)
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    recipe("max_steps=1", expect=2)
    assert str(path) in capsys.readouterr().err
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "the bomb does not work"


def test_no_reader_that_could_run_code():
    """No pickles, no archive unpacked blindly: what the rules of ruff (S...) do not find."""
    unsafe = re.compile(r"weights_only=False|unsafe_load|allow_pickle|\.extract(all)?\(")
    for path in [*ROOT.glob("fastalign/**/*.py"), *ROOT.glob("demo/*.py"), *ROOT.glob("kernels/*.py")]:
        assert not unsafe.search(path.read_text()), path
