"""The logic of the CUDA kernels of `csrc/`, emulated on the CPU by `tests/ops/emulated/`.

The threads of a block take turns between barriers, in ascending and in descending order; with a missing barrier or a
race the results differ.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.ops.helpers import COPIES, EXTREME_IDS, KINDS, packed_by_loop

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The library of emulated kernels."""
    library = tmp_path_factory.mktemp("emulated") / "masks.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Itests/ops/emulated", "-Icsrc"]
    subprocess.run(["c++", *flags, "tests/ops/emulated/masks.cpp", "-o", library], cwd=ROOT, check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def kernels(compiled, request):
    """The library, for each order of threads."""
    compiled.set_order(request.param)
    return compiled


def call(function, *arguments) -> None:
    """Pass tensors as addresses and integers with 64 bits."""
    kinds = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_double}
    function(
        *(
            ctypes.c_void_p(argument.data_ptr())
            if isinstance(argument, torch.Tensor)
            else kinds[type(argument)](argument)
            for argument in arguments
        )
    )


def outputs(images: int, copies: int, tokens: int, length: int) -> list[torch.Tensor]:
    """indices, slots, cu_seqlens, counts, filled with a number that no result has."""
    shapes = [(length,), (images, copies, tokens), (images * copies + 1,), (images * copies,)]
    return [torch.full(shape, -99, dtype=torch.int32) for shape in shapes]


def drawing(kind: str, grid: tuple[int, int], seed: int, complement: bool, full: bool) -> tuple:
    """The C arguments of a draw, after the ids, and the masks in Python."""
    masks = KINDS[kind](seed=seed, complement=complement, full=full)
    ratio = float(getattr(masks, "ratio", 0.0))
    signed = seed if seed < 2**63 else seed - 2**64
    return (*grid, list(KINDS).index(kind), ratio, signed, 3, complement, full), masks


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (14, 14), (8, 20), (27, 27)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_the_bits_of_the_pytorch_path(kernels, kind, grid):
    ids = torch.tensor([*EXTREME_IDS, 5, 6, 7])
    for complement, full in COPIES:
        arguments, masks = drawing(kind, grid, 2**64 - 5, complement, full)
        visible = torch.full((len(ids), masks.copies, grid[0] * grid[1]), 77, dtype=torch.uint8)
        call(kernels.draw_masks, ids, len(ids), *arguments, visible)
        assert torch.equal(visible, masks.eager(ids, grid, 3).to(torch.uint8))


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("shape", [(3, 2, 7), (9, 3, 33), (2, 1, 300), (1, 1, 1), (2, 3, 0)], ids=str)
def test_packing_is_what_a_loop_gives(kernels, shape, prefix):
    visible = torch.rand(shape) < 0.5
    total = int(visible.sum()) + shape[0] * shape[1] * prefix
    for length in (total, total + 1, total + 2000):
        found = outputs(shape[0], shape[1], prefix + shape[2], length)
        call(kernels.pack_masks, visible, *shape, prefix, length, *found)
        assert [tensor.tolist() for tensor in found] == packed_by_loop(visible.numpy(), prefix, length)


@pytest.mark.parametrize("grid", [(1, 1), (14, 14), (8, 33)], ids=str)
@pytest.mark.parametrize(("complement", "full"), COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_draw_and_pack_in_one_go(kernels, kind, complement, full, grid):
    ids, patches = torch.arange(6), grid[0] * grid[1]
    arguments, masks = drawing(kind, grid, 11, complement, full)
    for prefix in (0, 5):
        length = 6 * masks.copies * (prefix + patches) + 300
        visible = torch.full((6, masks.copies, patches), 77, dtype=torch.uint8)
        found = outputs(6, masks.copies, prefix + patches, length)
        call(kernels.draw_packed_masks, ids, 6, *arguments, prefix, length, visible, *found)
        wanted = masks.eager(ids, grid, 3)
        assert torch.equal(visible, wanted.to(torch.uint8))
        assert [tensor.tolist() for tensor in found] == packed_by_loop(wanted.numpy(), prefix, length)


def test_rows_from_the_length_on_are_dropped(kernels):
    visible = torch.rand(4, 3, 20) < 0.5
    indices, slots, starts, counts = found = outputs(4, 3, 21, 50)
    call(kernels.pack_masks, visible, 4, 3, 20, 1, 50, *found)
    all_indices, all_slots, all_starts, all_counts = packed_by_loop(visible.numpy(), 1, 1000)
    assert indices.tolist() == all_indices[:50]
    kept = torch.tensor(all_slots)
    assert torch.equal(slots.long(), torch.where(kept < 50, kept, -1))
    assert starts.tolist() == all_starts
    assert counts.tolist() == all_counts
