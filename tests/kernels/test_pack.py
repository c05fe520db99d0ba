"""pack and unpack: the kernels against the reference, the packing against a loop written by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.kernels.pack import backward_op, forward_op, pack
from fastalign.kernels.unpack import backward_op as unpack_backward_op
from fastalign.kernels.unpack import forward_op as unpack_op
from fastalign.kernels.unpack import unpack
from fastalign.ops import reference
from tests.kernels.helpers import mask, some
from tests.numerics import DEVICE, check_kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# images, masks, patches, prefix, width, padding rows
SHAPES = [
    (3, 3, 9, 1, 96, 0),
    (1, 1, 1, 0, 1, 3),
    (2, 2, 5, 5, 300, 11),
    (5, 3, 4, 0, 257, 0),
    (0, 3, 4, 1, 8, 2),
]


def packing_of(images, copies, patches, prefix, padding=0):
    """Random masks, with an empty and a full sequence where there is room, and their packing."""
    visible = mask(images, copies, patches)
    length = int(visible.sum()) + images * copies * prefix + padding
    return visible, reference.pack_masks(visible, prefix, length)


def as_kernel(patches, packing, prefix=None, position=None):
    """The kernel with the reference's arguments."""
    return pack(patches, packing.slots, packing.cu_seqlens, len(packing.indices), prefix, position)


@pytest.mark.parametrize("padding", [0, 4])
def test_packing_by_hand(padding):
    visible = torch.tensor([[[True, False, True], [False, True, False]], [[False] * 3, [True] * 3]])
    packing = reference.pack_masks(visible, 1, 10 + padding)
    assert packing.indices.tolist() == [0, 1, 3, 0, 2, 4, 4, 5, 6, 7] + [-1] * padding
    assert packing.slots.tolist() == [
        [[0, 1, -1, 2], [3, -1, 4, -1]],
        [[5, -1, -1, -1], [6, 7, 8, 9]],
    ]
    assert packing.cu_seqlens.tolist() == [0, 3, 5, 6, 10]
    assert packing.counts.tolist() == [3, 2, 1, 4]


def test_packed_rows_by_hand():
    visible = torch.tensor([[[True, False, True], [False, False, False]]], device=DEVICE)
    packing = reference.pack_masks(visible, 1, 6)
    patches = torch.tensor([[[1.0], [2.0], [3.0]]], device=DEVICE)
    prefix, position = (
        torch.tensor([[50.0]], device=DEVICE),
        torch.tensor([[0.1], [0.2], [0.3]], device=DEVICE),
    )
    for function in (reference.pack, as_kernel):
        packed = function(patches, packing, prefix, position)
        wanted = torch.tensor([50.0, 1.1, 3.3, 50.0, 0.0, 0.0], device=DEVICE)
        assert torch.equal(packed[:, 0], wanted)
    assert unpack(packed, packing.slots)[0, :, :, 0].tolist() == [
        [50.0, packed[1, 0], 0.0, packed[2, 0]],
        [50.0, 0, 0, 0],
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_and_unpack(shape, dtype, poison):
    images, copies, patches, prefix, width, padding = shape
    _, packing = packing_of(images, copies, patches, prefix, padding)
    inputs = {
        "patches": some(images, patches, width, dtype=dtype),
        "packing": packing,
        "prefix": some(prefix, width, dtype=dtype) if prefix else None,
        "position": some(patches, width, dtype=dtype),
    }
    check_kernel(as_kernel, reference.pack, inputs)
    inputs = {"packed": some(len(packing.indices), width, dtype=dtype), "packing": packing}
    check_kernel(lambda packed, packing: unpack(packed, packing.slots), reference.unpack, inputs)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(1, 70),
    st.booleans(),
)
def test_any_shape_and_stride(images, copies, patches, prefix, width, flipped):
    _, packing = packing_of(images, copies, patches, prefix)
    tokens = some(width, prefix + patches, images).permute(2, 1, 0) if flipped else some(
        images, prefix + patches, width
    )  # fmt: skip
    rows = some(prefix + patches, width)
    inputs = {"patches": tokens[:, prefix:], "packing": packing}
    inputs |= {"prefix": rows[:prefix] if prefix else None, "position": None if flipped else rows[prefix:]}
    check_kernel(as_kernel, reference.pack, inputs)
    unpacked = unpack(as_kernel(**inputs), packing.slots)
    dense = unpacked[:, 0][packing.slots[:, 0] >= 0]
    assert torch.equal(dense, as_kernel(**inputs)[packing.slots[:, 0][packing.slots[:, 0] >= 0].long()])


@pytest.mark.parametrize("need", ["patches", "prefix", "position"])
def test_only_the_gradients_asked_for(need, poison):
    _, packing = packing_of(2, 3, 5, 1)
    inputs = {"patches": some(2, 5, 8), "packing": packing, "prefix": some(1, 8), "position": some(5, 8)}
    check_kernel(as_kernel, reference.pack, inputs, only={need})


def test_a_pair_and_the_whole_have_a_fixed_length():
    """N, P: B (2N + 3P) tokens whatever the masks."""
    for _ in range(5):
        sample = torch.rand(4, 9) < torch.rand(4, 1)
        visible = torch.stack([sample, ~sample, torch.ones_like(sample)], 1)
        assert reference.pack_masks(visible, 2, 4 * (18 + 6)).cu_seqlens[-1] == 4 * (18 + 6)


def test_repeatable():
    _, packing = packing_of(23, 2, 3, 1)
    patches, prefix = some(23, 3, 520), some(1, 520).requires_grad_()
    gradients = [
        torch.autograd.grad(as_kernel(patches, packing, prefix).square().sum(), prefix)[0] for _ in range(2)
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    _, packing = packing_of(2, 3, 5, 1, 2)
    length = len(packing.indices)
    patches, prefix, position = some(2, 5, 8, dtype=dtype), some(1, 8), some(5, 8, dtype=dtype)
    for rows in [(prefix, position), (prefix, None)]:
        torch.library.opcheck(forward_op, (patches, packing.slots, packing.cu_seqlens, length, *rows))
    gradient = some(length, 8, dtype=dtype)
    for flags in [(True, True), (False, True), (True, False)]:
        torch.library.opcheck(backward_op, (gradient, packing.slots, 5, dtype, *flags))
    torch.library.opcheck(unpack_op, (gradient, packing.slots))
    torch.library.opcheck(unpack_backward_op, (some(2, 3, 6, 8, dtype=dtype), packing.slots, length))
