"""`benchmarks/gpu.sh`: every step at a tiny size; limits, failures and signals with a fake Python."""

import os
import re
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from benchmarks import record


@pytest.fixture
def start(tmp_path):
    """Starts the script with its results in a folder of the test; `python`: lines of bash in place of Python."""

    def start(*arguments, python=None):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/bash\n{python}\n")
        path.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(path) if python else sys.executable, "OUT": str(tmp_path)}
        command = ["bash", str(record.ROOT / "benchmarks/gpu.sh"), *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    return start


@pytest.mark.slow
def test_the_gpu_script_runs_every_step(start, tmp_path):
    process = start("--tiny")
    out, _ = process.communicate()
    assert process.returncode == 0, out
    with tarfile.open(tmp_path / "gpu.tgz") as archive:
        members = [member for member in archive if member.isfile()]
        logs = {m.name.removeprefix("./"): archive.extractfile(m).read().decode() for m in members}
    steps = dict(re.findall(r"^(\S+): exit (\d+) after", logs["steps.txt"], re.M))
    assert {"doctor", "tests", "warm", "step-b", "attention", "kernels", "fp8", "profile"} <= steps.keys()
    assert set(steps.values()) == {"0"}
    assert 'failures="0"' in logs["tests.xml"]
    assert "images/s" in logs["step-b.log"]
    assert "| B/16-224: zero over the compiled baseline |" in logs["table.txt"]
    for name in ("ours", "eager", "sdpa", "sdpa_flash"):
        assert f" {name} " in logs["attention.log"]
    assert "mask_tokens" in logs["kernels.log"]
    assert "not timed" not in logs["attention.log"] + logs["kernels.log"]


def test_a_step_that_fails_is_named_and_the_next_begins(start):
    process = start("600", python='case "$*" in *benchmarks.attention*) echo no luck; exit 3;; esac')
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"^attention: exit 3 after \d+ s", out, re.M)
    assert "no luck" in out
    assert re.search(r"^kernels: exit 0", out, re.M)
    assert re.search(r"^failed: attention$", out, re.M)


def test_a_step_ends_in_time_and_a_signal_leaves_the_archive(start, tmp_path):
    sleep = "import signal, time\nsignal.signal(2, lambda *_: exit('wrote its results'))\ntime.sleep(60)"
    tests = f'exec "{sys.executable}" -c "{sleep}"'
    python = f'case "$*" in *doctor*|*summary*) ;; *pytest*) {tests};; -m*) exec sleep 60;; esac'
    process, before = start("16", python=python), time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - before < 30
    assert process.returncode == 1
    assert re.search(r"^step-b: no time left", out, re.M)
    assert re.search(r"^tests: exit 124", out, re.M)
    assert re.search(r"^wrote its results$", out, re.M)
    (tmp_path / "gpu.tgz").unlink()
    process = start("600", python=python)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "interrupted" in out
    assert (tmp_path / "gpu.tgz").exists()
