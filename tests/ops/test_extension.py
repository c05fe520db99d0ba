"""The extension: the same bits as in PyTorch, packing against a loop, errors, threads, compilation, the install."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

import fastalign as fa
from fastalign.ops import extension, reference
from tests.ops.helpers import COPIES, EXTREME_IDS, KINDS, packed_by_loop

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
needs = pytest.mark.skipif(not extension.available(CPU), reason=f"extension {extension.status()}")
no_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and extension.available(torch.device("cuda"))), reason="needs a GPU"
)
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])])

GRIDS = [(1, 1), (1, 7), (14, 14), (16, 16), (27, 27), (8, 20)]
PACK = getattr(torch.ops.fastalign, "pack_masks", None)


def test_it_is_built_if_there_is_a_compiler():
    if "0" in (os.environ.get("FASTALIGN_BUILD_EXT"), os.environ.get("FASTALIGN_EXTENSION")):
        pytest.skip("disabled in the environment")
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    assert not extension.status().startswith("absent"), extension.status()
    if shutil.which("nvcc") and torch.version.cuda:
        assert extension.status() == "C++ and CUDA"


@needs
@on_devices
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_have_the_bits_of_pytorch(kind, grid, device):
    ids = torch.tensor(EXTREME_IDS + list(range(100, 150)))
    for complement, full in COPIES:
        for seed, epoch in ((0, 0), (2**64 - 1, 3), (2**63 + 5, 2**32 - 1), (7 << 32, 2**31)):
            masks = KINDS[kind](complement=complement, full=full, seed=seed)
            assert torch.equal(masks(ids.to(device), grid, epoch).cpu(), masks.eager(ids, grid, epoch))
    assert masks(ids[:0].to(device), grid).shape == (0, 3, grid[0] * grid[1])
    ends = (0.0, 1.0) if kind == "bernoulli" else ()
    for ratio in () if kind == "uniform" else (1e-12, 0.07, 0.4, 0.5, 1 / 3, 0.999, *ends):
        masks, ids = KINDS[kind](ratio=ratio), torch.arange(500)
        assert torch.equal(masks(ids.to(device), grid).cpu(), masks.eager(ids, grid))


@needs
@on_devices
@pytest.mark.parametrize("function", [PACK, reference.pack_masks])
def test_packing_worked_by_hand(function, device):
    visible = torch.tensor([[[1, 0, 1], [0, 1, 0]], [[0, 0, 0], [1, 1, 1]]], dtype=torch.bool, device=device)
    indices, slots, starts, counts = (t.tolist() for t in function(visible, 1, 12))
    assert indices == [0, 1, 3, 0, 2, 4, 4, 5, 6, 7, -1, -1]
    assert slots == [[[0, 1, -1, 2], [3, -1, 4, -1]], [[5, -1, -1, -1], [6, 7, 8, 9]]]
    assert starts == [0, 3, 5, 6, 10]
    assert counts == [3, 2, 1, 4]


@pytest.fixture
def poisoned():
    """Every torch.empty returns the largest number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@needs
@on_devices
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "shape", [(3, 2, 7), (70, 3, 33), (2, 1, 300), (1, 1, 1), (0, 3, 4), (2, 3, 0)], ids=str
)
def test_packing_equals_a_loop(shape, share, prefix, device, poisoned):
    visible = torch.rand(shape) < share
    length = int(visible.sum()) + shape[0] * shape[1] * prefix
    for padding in (0, 1, 1000):
        found = PACK(visible.to(device), prefix, length + padding)
        wanted = packed_by_loop(visible.numpy(), prefix, length + padding)
        assert all(tensor.dtype == torch.int32 for tensor in found)
        assert [tensor.tolist() for tensor in found] == wanted


@needs
@on_devices
@pytest.mark.parametrize("grid", [(1, 1), (14, 14), (8, 20), (27, 27)], ids=str)
@pytest.mark.parametrize(("complement", "full"), COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_come_packed(kind, complement, full, grid, device, poisoned):
    """With complements drawn and packed in one call, in rows without padding."""
    masks = KINDS[kind](complement=complement, full=full, seed=9)
    ids, patches = torch.arange(40, device=device), grid[0] * grid[1]
    for prefix in (0, 5):
        visible, packing = masks.packed(ids, grid, prefix, epoch=2)
        assert torch.equal(visible, masks(ids, grid, 2))
        length = len(packing.indices)
        if complement:
            assert length == 40 * ((masks.copies - 1) * patches + masks.copies * prefix)
        wanted = packed_by_loop(visible.cpu().numpy(), prefix, length)
        assert [tensor.tolist() for tensor in packing] == wanted


@needs
def test_inputs_need_not_be_contiguous():
    ids = torch.arange(20)[::2]
    assert torch.equal(fa.UniformMasks()(ids, 9), fa.UniformMasks()(ids.contiguous(), 9))
    visible = (torch.rand(5, 3, 4) < 0.5).transpose(0, 2)
    assert all(map(torch.equal, PACK(visible, 1, 200), PACK(visible.contiguous(), 1, 200)))


@needs
@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_number_of_threads(kind):
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        visible, packing = KINDS[kind]().packed(torch.arange(200), (6, 10), prefix=2)
        results.append([visible, *packing])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs
@on_devices
@pytest.mark.parametrize("name", ["draw_masks", "pack_masks", "draw_packed_masks"])
def test_opcheck(name, device):
    ids, visible = torch.arange(6, device=device), torch.rand(2, 3, 5, device=device) < 0.5
    draw = (ids, 3, 4, 2, 0.4, -5, 1, True, False)
    arguments = {"draw_masks": draw, "pack_masks": (visible, 1, 40), "draw_packed_masks": (*draw, 1, 90)}
    torch.library.opcheck(getattr(torch.ops.fastalign, name).default, arguments[name])


@needs
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph_for_all_epochs(kind):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    masks, ids = KINDS[kind](seed=4), torch.arange(30)
    compiled = torch.compile(lambda epoch: masks(ids, 49, epoch).sum(-1), backend=counter, fullgraph=True)
    for epoch in range(5):
        assert torch.equal(compiled(epoch), masks(ids, 49, epoch).sum(-1))
    assert counter.frame_count <= 3  # torch.compile specializes on 0 and 1; all other epochs are one graph


@needs
def test_a_subclass_may_draw_itself():
    class AllHidden(fa.UniformMasks):
        def sample(self, sample_ids, grid, epoch):
            return torch.zeros(len(sample_ids), grid[0] * grid[1], dtype=torch.bool)

    assert not AllHidden(complement=False, full=False)(torch.arange(2), 16).any()


@needs
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fa.UniformMasks()(torch.arange(4).view(2, 2), 4), r"sample_ids must be \[B\]"),
        (lambda: fa.UniformMasks()(torch.arange(4), (-2, 2)), "grid must not be negative"),
        (lambda: PACK(torch.ones(1, 1, 2) > 0, -1, 2), "prefix and length"),
        (lambda: PACK(torch.ones(1, 2, 2) > 0, 1, 5), "length is 5, but 6 tokens are visible"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(RuntimeError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_the_status_says_why_it_is_absent(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTALIGN_EXTENSION", raising=False)
    monkeypatch.setattr(extension, "_LIBRARY", tmp_path / "none.so")
    assert extension._load() == ("absent: it was not built at install (see setup.py)", frozenset())
    (tmp_path / "none.so").write_text("no library")
    assert extension._load()[0].startswith("absent: ")
    monkeypatch.setenv("FASTALIGN_EXTENSION", "0")
    assert extension._load()[0] == "absent: FASTALIGN_EXTENSION=0"


def run_setup(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """setup.py in the source tree, with environment variables."""
    command, environment = [sys.executable, "setup.py", *arguments], {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_without_the_extension_the_package_works(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTALIGN_EXTENSION", raising=False)
    places = ["build", "--build-base", str(tmp_path), "--build-lib", str(tmp_path / "lib")]
    result = run_setup(*places, FASTALIGN_BUILD_EXT="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("no C++/CUDA extension, because FASTALIGN_BUILD_EXT=0") == 1
    assert not list(tmp_path.rglob("*.so"))
    code = (
        "import torch, fastalign as fa; from fastalign.ops import extension\n"
        "print(extension.__file__, extension.status(), fa.UniformMasks()(torch.arange(2), 16).shape)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "lib", capture_output=True, text=True
    )
    assert str(tmp_path) in result.stdout, result.stderr
    assert "absent: it was not built at install" in result.stdout
    assert "[2, 3, 16]" in result.stdout


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_compile_error_names_the_remedy(tmp_path):
    places = ["build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    result = run_setup(*places, CXX="false", CC="false")
    assert result.returncode != 0
    assert "FASTALIGN_BUILD_EXT=0 installs without the extension" in result.stderr
