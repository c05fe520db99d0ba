"""What goes wrong while a loader runs reaches the consumer, and every thread ends."""

import gc
import queue
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from fastalign.data import batches as batches_module
from fastalign.data.loader import Loader
from fastalign.data.prefetch import Prefetcher
from fastalign.data.sources import open_source
from fastalign.utils.errors import UserError
from tests.data_helpers import EVAL, TRAIN, has_dali, needs_dali, small_photos, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(
        tmp_path_factory.mktemp("images"), {f"{i}.jpg": p for i, p in enumerate(small_photos(50))}
    )


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("fastalign")]


@needs_dali
@pytest.mark.parametrize("damage", [b"no image", None])
def test_undecodable_files_are_named(folder, tmp_path, damage):
    photos = small_photos(20)
    files = {f"{i:02d}.jpg": p for i, p in enumerate(photos)}
    for bad in ("05.jpg", "07.jpg"):
        files[bad] = files[bad][: len(files[bad]) // 2] if damage is None else np.frombuffer(damage, np.uint8)
    loader = Loader(
        open_source(str(write_folder(tmp_path / "bad", files))), EVAL, device="cpu", batch_size=5, train=False
    )
    batches = loader.batches()
    assert next(batches).ids_host.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(
        UserError, match=r"cannot decode 05\.jpg \(.*\), 07\.jpg \(.*\) in .*/bad: 2 of a batch of 5; remove"
    ) as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    assert [b.ids_host[0] for b in loader.batches(start=2)] == [10, 15]
    loader.close()


@needs_dali
def test_a_vanished_file_reaches_the_consumer(folder, tmp_path):
    root = write_folder(tmp_path / "few", {f"{i}.jpg": p for i, p in enumerate(small_photos(4))})
    source = open_source(str(root))
    (root / "2.jpg").unlink()
    loader = Loader(source, EVAL, device="cpu", batch_size=2, train=False)
    with pytest.raises(UserError, match=r"cannot read .*2\.jpg"):
        list(loader.batches())
    loader.close()
    assert not loader_threads()


def test_a_missing_dali_is_explained(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    loader = Loader(open_source(str(folder)), EVAL, device="cpu", batch_size=2)
    with pytest.raises(UserError, match="is not installed: pip install nvidia-dali-cuda130"):
        next(loader.batches())
    loader.close()


def test_another_project_named_dali_is_refused(tmp_path):
    (tmp_path / "nvidia/dali").mkdir(parents=True)
    for package in ("nvidia", "nvidia/dali"):
        (tmp_path / package / "__init__.py").touch()
    code = "import sys; sys.path.insert(0, sys.argv[1])\nfrom fastalign.data.pipeline import load_dali\nload_dali()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "is another package; remove it" in done.stderr


def test_modules_import_without_dali():
    code = "import sys; import fastalign.data.loader; assert not any('dali' in m for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def settled() -> bool:
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not loader_threads()


def test_leaving_early_leaves_no_thread(folder):
    assert settled()
    source = open_source(str(folder) if has_dali() else "synthetic:50")
    loader = Loader(source, TRAIN, device="cpu", batch_size=4, prefetch=1)
    for _ in loader.batches():
        break
    assert [t.name for t in loader_threads() if t.name == "fastalign-loader"] == []
    old = loader.batches()
    new = loader.batches(1)
    assert list(old) == []
    assert next(new).wait >= 0
    new.close()
    loader.close()
    assert settled()
    with pytest.raises(RuntimeError, match="closed"):
        loader.batches()
    forgotten = Loader(source, TRAIN, device="cpu", batch_size=4)
    iterator = forgotten.batches()
    next(iterator)
    del forgotten, iterator
    gc.collect()
    assert settled()


def test_interpreter_exits_while_a_loader_runs(folder):
    spec = str(folder) if has_dali() else "synthetic:50"
    code = f"""
from fastalign.data.loader import Loader
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform
loader = Loader(open_source({spec!r}), Transform((16, 16), (0.5,) * 3, (0.5,) * 3), batch_size=4, device="cpu")
batches = loader.batches()
next(batches)
print("left")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


@needs_dali
def test_batches_before_any_failure_are_delivered(folder, monkeypatch):
    geometry, calls = batches_module.geometry, []

    def fails_at_the_third(*arguments, **options):
        calls.append(0)
        if len(calls) == 3:
            raise ValueError("third")
        return geometry(*arguments, **options)

    monkeypatch.setattr(batches_module, "geometry", fails_at_the_third)
    loader = Loader(open_source(str(folder)), EVAL, device="cpu", batch_size=5, train=False)
    batches = loader.batches()
    assert [next(batches).ids_host[0] for _ in range(2)] == [0, 5]
    with pytest.raises(ValueError, match="third"):
        next(batches)
    loader.close()


def test_a_loader_may_die_in_its_own_thread(monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    loader = Loader(open_source("synthetic:8"), EVAL, device="cpu", batch_size=4)
    pool, held = loader._pool, [loader]
    del loader
    pool.submit(held.clear).result()
    assert settled()
    assert unraisable == []


def test_an_iterator_outlives_its_loader():
    iterator = Loader(open_source("synthetic:40"), EVAL, device="cpu", batch_size=4, prefetch=3).batches()
    time.sleep(0.3)
    made = []
    for batch in iterator:
        made.append(batch)
        time.sleep(0.02)
    assert len(made) == 10
    assert settled()


def test_a_gpu_that_fails_in_the_thread_is_reported(monkeypatch):
    def no_gpu(device):
        raise RuntimeError(f"no such GPU: {device}")

    monkeypatch.setattr(torch.cuda, "Stream", no_gpu)
    with pytest.raises(RuntimeError, match="no such GPU: cuda:7"):
        next(Prefetcher((batch for batch in ()), torch.device("cuda:7"), 1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loader_thread_that_dies_is_reported_and_not_waited_for(monkeypatch):
    """Out of memory where it hands over, so that not even the exception comes through."""

    def no_memory(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(queue.Queue, "put", no_memory)
    batches = Prefetcher((batch for batch in ("one", "two")), torch.device("cpu"), 1)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="the loader's thread ended without a result"):
        next(batches)
    assert time.monotonic() - begin < 10


@needs_dali
@pytest.mark.parametrize("death", [SystemExit(0), KeyboardInterrupt()])
def test_a_reader_thread_that_dies_is_an_error_and_no_silent_end(folder, monkeypatch, death):
    source = open_source(str(folder))

    def read(index):
        raise death

    monkeypatch.setattr(source, "read", read)
    loader = Loader(source, EVAL, device="cpu", batch_size=5, train=False)
    with pytest.raises(RuntimeError, match=f"a data worker ended with {type(death).__name__}"):
        next(loader.batches())
    loader.close()
    assert settled()
