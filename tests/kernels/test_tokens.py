"""mask_tokens, expand_masked, pack and unpack: the kernels against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tolerance import is_floating
from fastalign.kernels import common
from fastalign.ops import KERNELS, reference
from tests.numerics import DEVICE, check_kernel, mask, some

NAMES = ["mask_tokens", "expand_masked", "pack", "unpack"]
DTYPES = [(dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
DTYPES.append((torch.bfloat16, torch.float32))
# images, masks, patches, prefix, width
SHAPES = [
    (3, 3, 9, 1, 96),
    (1, 1, 1, 0, 1),
    (2, 2, 5, 5, 300),
    (5, 3, 4, 0, 257),
    (0, 3, 4, 1, 8),
    (2, 3, 0, 1, 8),
]


def inputs_of(shape, dtype=torch.float32, row_dtype=torch.float32, padding=3):
    """Random inputs of each operation."""
    images, copies, patches, prefix, width = shape
    visible = mask(images, copies, patches)
    length = int(visible.sum()) + images * copies * prefix + padding
    packing = {"packing": reference.pack_masks(visible, prefix, length)}
    tokens, position = (
        some(count, prefix + patches, width, dtype=kind) for count, kind in ((images, dtype), (1, row_dtype))
    )
    rows = {"prefix": position[0, :prefix] if prefix else None, "position": position[0, prefix:]}
    patches = {"patches": tokens[:, prefix:], **rows}
    return {
        "mask_tokens": {**patches, "hidden": some(width, dtype=row_dtype), "visible": visible},
        "expand_masked": {"tokens": tokens, "visible": visible, "position": position},
        "pack": patches | packing,
        "unpack": {"packed": some(length, width, dtype=dtype)} | packing,
    }


def check(name, inputs, **options):
    check_kernel(KERNELS[name], getattr(reference, name), inputs, **options)


def test_packed_rows_by_hand():
    visible = torch.tensor([[[True, False, True], [False, False, False]]], device=DEVICE)
    packing = reference.pack_masks(visible, 1, 6)
    patches, prefix = (torch.tensor(x, device=DEVICE) for x in ([[[1.0], [2.0], [3.0]]], [[50.0]]))
    position = torch.tensor([[0.1], [0.2], [0.3]], device=DEVICE)
    for function in (reference.pack, KERNELS["pack"]):
        packed = function(patches, packing, prefix, position)
        assert torch.equal(packed[:, 0], torch.tensor([50.0, 1.1, 3.3, 50.0, 0.0, 0.0], device=DEVICE))
    rows = [[50.0, packed[1, 0], 0.0, packed[2, 0]], [50.0, 0, 0, 0]]
    assert KERNELS["unpack"](packed, packing)[0, :, :, 0].tolist() == rows


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "row_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_the_reference(shape, dtype, row_dtype, name, poison):
    """Mixed dtypes promote as in eager PyTorch."""
    check(name, inputs_of(shape, dtype, row_dtype)[name])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_teachers_input_has_the_bits_of_the_reference(shape):
    """With either a prefix or a position, in another dtype: one selection and one sum round alike."""
    inputs = inputs_of(shape, torch.bfloat16)["mask_tokens"]
    if inputs["prefix"] is not None:
        inputs["position"] = None
    assert torch.equal(KERNELS["mask_tokens"](**inputs), reference.mask_tokens(**inputs))


@settings(max_examples=15, deadline=None)
@given(st.tuples(*(st.integers(*ends) for ends in ((1, 4), (1, 3), (1, 9), (0, 3), (1, 70)))), st.booleans())
def test_any_shape_and_stride(shape, flipped):
    for name, inputs in inputs_of(shape, padding=0).items():
        for key, value in inputs.items():
            if flipped and isinstance(value, torch.Tensor) and value.dim() > 1:
                inputs[key] = value.mT.contiguous().mT
        check(name, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_gradients_asked_for(name, poison):
    inputs = inputs_of((2, 3, 5, 1, 8))[name]
    for need in inputs.keys() - {"visible", "packing"}:
        check(name, inputs, only={need})


def test_without_copies_gradients_are_zero(poison):
    inputs = inputs_of((2, 0, 5, 1, 8))
    for name in NAMES:
        check(name, inputs[name])


@pytest.mark.parametrize("name", ["mask_tokens", "expand_masked", "pack"])
def test_several_images_a_chunk_and_repeatable(name, monkeypatch):
    """As of thousands of images: a program sums over three, the last one over fewer; twice the same bits."""
    monkeypatch.setattr(common, "image_chunks", lambda images, tiles: (3, -(-images // 3)))
    inputs = inputs_of((7, 2, 2, 1, 260))[name]
    check(name, inputs)
    leaves = [x.requires_grad_() for x in inputs.values() if is_floating(x)]
    gradients = [torch.autograd.grad(KERNELS[name](**inputs).square().mean(), leaves) for _ in range(2)]
    assert all(map(torch.equal, *gradients))
