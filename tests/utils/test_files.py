"""User paths: `~` and `$VARIABLES` expand as in a shell, also without a home directory or a user name."""

import os
import pwd
import subprocess
import sys
import tempfile

import pytest

from fastalign import config, scan
from fastalign.data import index
from fastalign.data.sources import open_source
from fastalign.evaluation.datasets import open_labelled
from fastalign.utils.errors import UserError
from fastalign.utils.files import user_path
from fastalign.utils.sections import get_key
from tests.data_helpers import small_photos, write_folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PART", "a part")
    monkeypatch.delenv("NONE", raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def test_paths_expand_as_in_bash(home):
    texts = "~ ~/a/b ~root/a /$PART/b ${PART}s/$HOME a~b/~ $ a$/b ../x random synthetic:100"
    command = ["bash", "-c", f"IFS=; printf '%s\\n' {texts}"]
    bash = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [user_path(text) for text in texts.split()] == bash.splitlines()
    with pytest.raises(UserError, match="the home folder of ~nobody-at-all is not known"):
        user_path("~nobody-at-all/x")


def test_keys_that_are_paths_expand(home):
    keys = "output data.train data.val student.weights teacher.weights probe.data faults.quarantine"
    for key in keys.split():
        assert get_key(config.resolve({}, [f"{key}=~/x"], "FILE").model_dump(), key) == f"{home}/x"
    with pytest.raises(UserError, match=r"^command line: data\.val: .*variable NONE is not set"):
        config.resolve({}, ["data.val=$NONE/x"], "FILE")


def test_commands_expand_their_paths(home, monkeypatch, capsys):
    write_folder(home / "data", {"a.jpg": small_photos(1)[0]})
    monkeypatch.setattr(scan, "scan", lambda *_: [])
    assert scan.main(["~/data", "--output", "$HOME/lists/q.jsonl"]) == 0
    assert (home / "lists/q.jsonl").is_file()
    with pytest.raises(SystemExit, match="2"):
        scan.main(["~/data", "--output", "$NONE/q.jsonl"])
    assert "argument --output: $NONE/q.jsonl: the environment variable NONE" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"no such folder: {home}/coco"):
        open_labelled("coco:~/coco", "val")
    assert not list((home.parent / "elsewhere").iterdir())


NOBODY = """
import pwd
pwd.getpwuid = {}.__getitem__
import fastalign.doctor, fastalign.export.__main__, fastalign.report.__main__
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from triton import knobs
print(default_cache_dir(), knobs.cache.home_dir)
"""


def test_home_and_user_are_optional(tmp_path, monkeypatch):
    """As in a container with a numeric user."""

    def fails(error):
        def call(*_):
            raise error

        return call

    write_folder(tmp_path / "data", {"a.jpg": small_photos(1)[0]})
    monkeypatch.chdir(tmp_path / "data")
    assert len(open_source(".")) == 1  # with a cache
    for name in ("XDG_CACHE_HOME", "HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "TRITON_HOME"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", fails(KeyError("uid not found")))
    with pytest.raises(RuntimeError, match="home directory"):
        index.cache_folder()
    assert len(open_source(".")) == 1
    with pytest.raises(UserError, match=r"the home folder of ~ is not known; write the path out"):
        open_source("~/data")
    # These modules import timm, and with it torch's compiler.
    ran = subprocess.run([sys.executable, "-c", NOBODY], capture_output=True, text=True, check=False)
    assert ran.stderr == ""
    folder = tempfile.gettempdir()
    assert ran.stdout == f"{folder}/torchinductor_{os.getuid()} {folder}/fastalign-{os.getuid()}\n"
    assert [path.name for path in tmp_path.joinpath("data").iterdir()] == ["a.jpg"]
