"""mask_tokens and expand_masked: the kernels against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.kernels.expand_masked import expand_masked
from fastalign.kernels.mask_tokens import backward_op, forward_op, mask_tokens
from fastalign.ops import reference
from tests.numerics import DEVICE, check_kernel, mask, some

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


def inputs_of_mask_tokens(shape, dtype, row_dtype):
    images, copies, patches, prefix, width = shape
    return {
        "patches": some(images, patches, width, dtype=dtype),
        "hidden": some(width, dtype=row_dtype),
        "visible": mask(images, copies, patches),
        "prefix": some(prefix, width, dtype=row_dtype) if prefix else None,
        "position": some(patches, width, dtype=row_dtype),
    }


def inputs_of_expand_masked(shape, dtype, row_dtype):
    images, copies, patches, prefix, width = shape
    return {
        "tokens": some(images, prefix + patches, width, dtype=dtype),
        "visible": mask(images, copies, patches),
        "position": some(1, prefix + patches, width, dtype=row_dtype),
    }


@pytest.mark.parametrize(("dtype", "row_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_the_reference(shape, dtype, row_dtype, poison):
    """Mixed dtypes promote as in eager PyTorch."""
    check_kernel(mask_tokens, reference.mask_tokens, inputs_of_mask_tokens(shape, dtype, row_dtype))
    check_kernel(expand_masked, reference.expand_masked, inputs_of_expand_masked(shape, dtype, row_dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_teachers_input_has_the_bits_of_the_reference(shape):
    """With either a prefix or a position, in another dtype: one selection and one sum round alike."""
    inputs = inputs_of_mask_tokens(shape, torch.bfloat16, torch.float32)
    if inputs["prefix"] is not None:
        inputs["position"] = None
    assert torch.equal(mask_tokens(**inputs), reference.mask_tokens(**inputs))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(0, 3), st.integers(1, 70), st.booleans()
)  # fmt: skip
def test_any_shape_and_stride(images, copies, patches, prefix, width, flipped):
    tokens, visible = some(images, prefix + patches, width), mask(images, copies, patches)
    position = some(1, prefix + patches, width)
    if flipped:
        tokens = some(width, prefix + patches, images).permute(2, 1, 0)
        visible = mask(images, patches, copies).transpose(1, 2)
        position = some(1, width, prefix + patches).transpose(1, 2)
    inputs = {"tokens": tokens, "visible": visible, "position": position}
    check_kernel(expand_masked, reference.expand_masked, inputs)
    inputs = {"patches": tokens[:, prefix:], "hidden": position[0, 0], "visible": visible}
    inputs |= {"prefix": position[0, :prefix] if prefix else None, "position": position[0, prefix:]}
    check_kernel(mask_tokens, reference.mask_tokens, inputs)


def test_only_the_gradients_asked_for_and_zeros_without_copies(poison):
    inputs = {"tokens": some(2, 6, 8), "visible": mask(2, 3, 5), "position": some(1, 6, 8)}
    for need in ("tokens", "position"):
        check_kernel(expand_masked, reference.expand_masked, inputs, only={need})
    inputs["visible"] = inputs["visible"][:, :0]
    check_kernel(expand_masked, reference.expand_masked, inputs)


def test_many_images_a_chunk_and_repeatable():
    """More images than chunks, so that a program sums over several; twice the same bits."""
    inputs = {"tokens": some(300, 70, 600), "visible": mask(300, 1, 69), "position": some(1, 70, 600)}
    if DEVICE == "cpu":
        inputs = {"tokens": some(23, 3, 520), "visible": mask(23, 2, 2), "position": some(1, 3, 520)}
    gradients = []
    for _ in range(2):
        leaves = {n: v.clone().requires_grad_(v.is_floating_point()) for n, v in inputs.items()}
        expand_masked(**leaves).square().mean().backward()
        gradients.append((leaves["tokens"].grad, leaves["position"].grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    check_kernel(expand_masked, reference.expand_masked, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    visible = mask(2, 3, 5)
    patches, row = some(2, 5, 8, dtype=dtype), some(8, dtype=dtype)
    for arguments in [
        (patches, row, visible, some(1, 8), some(5, 8)),
        (patches, None, visible, None, None),
    ]:
        torch.library.opcheck(forward_op, arguments)
    gradient = some(2, 3, 6, 8, dtype=dtype)
    for flags in [(False, True, True, True), (True, True, False, False), (False, False, True, False)]:
        torch.library.opcheck(backward_op, (gradient, visible, dtype, *flags))
