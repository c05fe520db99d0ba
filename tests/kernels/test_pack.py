"""pack and unpack: the kernels against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.kernels.pack import backward_op, forward_op, pack
from fastalign.kernels.unpack import backward_op as unpack_backward_op
from fastalign.kernels.unpack import forward_op as unpack_op
from fastalign.kernels.unpack import unpack
from fastalign.ops import reference
from tests.numerics import DEVICE, check_kernel, mask, some

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
    """The packing of random masks, with an empty and a full sequence if the shape allows."""
    visible = mask(images, copies, patches)
    return reference.pack_masks(visible, prefix, int(visible.sum()) + images * copies * prefix + padding)


def test_packed_rows_by_hand():
    visible = torch.tensor([[[True, False, True], [False, False, False]]], device=DEVICE)
    packing = reference.pack_masks(visible, 1, 6)
    patches, prefix = (torch.tensor(x, device=DEVICE) for x in ([[[1.0], [2.0], [3.0]]], [[50.0]]))
    position = torch.tensor([[0.1], [0.2], [0.3]], device=DEVICE)
    for function in (reference.pack, pack):
        packed = function(patches, packing, prefix, position)
        assert torch.equal(packed[:, 0], torch.tensor([50.0, 1.1, 3.3, 50.0, 0.0, 0.0], device=DEVICE))
    rows = [[50.0, packed[1, 0], 0.0, packed[2, 0]], [50.0, 0, 0, 0]]
    assert unpack(packed, packing)[0, :, :, 0].tolist() == rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_and_unpack(shape, dtype, poison):
    images, copies, patches, prefix, width, padding = shape
    packing = packing_of(images, copies, patches, prefix, padding)
    inputs = {
        "patches": some(images, patches, width, dtype=dtype),
        "packing": packing,
        "prefix": some(prefix, width, dtype=dtype) if prefix else None,
        "position": some(patches, width, dtype=dtype),
    }
    check_kernel(pack, reference.pack, inputs)
    inputs = {"packed": some(len(packing.indices), width, dtype=dtype), "packing": packing}
    check_kernel(unpack, reference.unpack, inputs)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(0, 3), st.integers(1, 70), st.booleans()
)  # fmt: skip
def test_any_shape_and_stride(images, copies, patches, prefix, width, flipped):
    packing = packing_of(images, copies, patches, prefix)
    size = (images, prefix + patches, width)
    tokens = some(*size[::-1]).permute(2, 1, 0) if flipped else some(*size)
    rows = some(prefix + patches, width)
    inputs = {"patches": tokens[:, prefix:], "packing": packing}
    inputs |= {"prefix": rows[:prefix] if prefix else None, "position": None if flipped else rows[prefix:]}
    check_kernel(pack, reference.pack, inputs)


def test_only_the_gradients_asked_for(poison):
    packing = packing_of(2, 3, 5, 1)
    inputs = {"patches": some(2, 5, 8), "packing": packing, "prefix": some(1, 8), "position": some(5, 8)}
    for need in ("patches", "prefix", "position"):
        check_kernel(pack, reference.pack, inputs, only={need})


def test_repeatable():
    packing = packing_of(23, 2, 3, 1)
    patches, prefix = some(23, 3, 520), some(1, 520).requires_grad_()
    losses = [pack(patches, packing, prefix).square().sum() for _ in range(2)]
    assert torch.equal(*(torch.autograd.grad(loss, prefix)[0] for loss in losses))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    packing = packing_of(2, 3, 5, 1, 2)
    length = len(packing.indices)
    patches, prefix, position = some(2, 5, 8, dtype=dtype), some(1, 8), some(5, 8, dtype=dtype)
    for rows in [(prefix, position), (prefix, None)]:
        torch.library.opcheck(forward_op, (patches, packing.slots, packing.cu_seqlens, length, *rows))
    gradient = some(length, 8, dtype=dtype)
    for flags in [(True, True), (False, True), (True, False)]:
        torch.library.opcheck(backward_op, (gradient, packing.slots, 5, dtype, *flags))
    torch.library.opcheck(unpack_op, (gradient, packing.slots))
    torch.library.opcheck(unpack_backward_op, (some(2, 3, 6, 8, dtype=dtype), packing.slots, length))
