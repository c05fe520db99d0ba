"""The loss kernel against the reference: every loss, dense and packed, with its gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fastalign.kernels.reconstruction_loss import forward_op, reconstruction_loss
from fastalign.ops import reference
from fastalign.ops.reference import LOSSES
from tests.numerics import DEVICE, check_kernel, mask, needs_compiler, some

DTYPES = [torch.float32, torch.bfloat16]
# images, masks, patches, prefix, width
SHAPES = [(3, 3, 9, 1, 96), (1, 1, 1, 0, 1), (2, 2, 5, 5, 300), (2, 3, 4, 0, 1157), (1, 2, 6, 1, 520)]


def check(**inputs):
    """Kernel and reference; the gradient of the prediction."""
    check_kernel(reconstruction_loss, reference.reconstruction_loss, inputs, only={"prediction"})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(shape, loss, dtype, poison):
    images, copies, patches, prefix, width = shape
    size = (images, copies, prefix + patches, width)
    check(
        prediction=some(*size, dtype=dtype),
        target=some(*size, dtype=dtype),
        visible=mask(images, copies, patches),
        loss=loss,
        scale=torch.tensor(1.7, device=DEVICE),
        prefix_visible=prefix == 5,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("whole_target", [False, True], ids=["packed target", "target of the whole image"])
def test_packed(loss, whole_target, dtype, poison):
    visible = mask(3, 2, 7)
    length = int(visible.sum()) + 3 * 2 * 2 + 3  # two prefix tokens, three rows of padding
    packing = reference.pack_masks(visible, 2, length)
    packing = packing._replace(indices=torch.stack([packing.indices, packing.indices], 1)[:, 0])  # strided
    check(
        prediction=some(length, 72, dtype=dtype),
        target=some(3, 9, 72) if whole_target else some(length, 72),
        visible=visible,
        loss=loss,
        packing=packing,
        prefix_visible=whole_target,
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_one_target_for_all_copies_and_one_predicted_token(loss):
    """Masked image modeling broadcasts the target; prefix_only predicts a single token."""
    visible = mask(2, 3, 5)
    check(prediction=some(2, 3, 6, 40), target=some(2, 1, 6, 40), visible=visible, loss=loss)
    check(prediction=some(2, 3, 1, 40), target=some(2, 3, 1, 40), visible=visible, loss=loss)
    check(prediction=some(1, 1, 1, 8), target=some(1, 1, 1, 8), visible=mask(1, 1, 1), loss=loss)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 2), st.integers(1, 80),
    st.sampled_from(LOSSES), st.booleans(),
)  # fmt: skip
def test_any_shape_and_stride(images, copies, patches, prefix, width, loss, flipped):
    if loss == "cosine":
        width += 7  # the gradient of the cosine of one or two channels is only rounding
    size = (images, copies, prefix + patches, width)
    prediction, target = some(*size), some(*size)
    if flipped:
        prediction, target = (some(*size[::-1]).permute(3, 2, 1, 0) for _ in range(2))
    check(prediction=prediction, target=target, visible=mask(images, copies, patches), loss=loss, scale=0.3)


def test_equal_vectors_and_zero_vectors():
    """l1 has gradient zero where nothing differs; the cosine of a zero vector is zero, as in torch."""
    prediction, visible = some(1, 1, 4, 8), mask(1, 1, 4)
    check(prediction=prediction, target=prediction.clone(), visible=visible, loss="l1")
    zero = prediction.clone()
    zero[0, 0, 1] = 0
    check(prediction=zero, target=some(1, 1, 4, 8), visible=visible, loss="cosine")
    found = reconstruction_loss(zero, prediction, visible, loss="cosine")
    wanted = 1 - functional.cosine_similarity(zero, prediction, dim=-1).mean()
    assert abs(found - wanted) < 1e-6


def test_not_a_number_is_seen():
    prediction = some(1, 1, 4, 8)
    prediction[:, :, 2] = float("nan")
    prediction.requires_grad_()
    for loss in LOSSES:
        visible = torch.tensor([[[True, True, loss != "masked_mse", True]]], device=DEVICE)
        value = reconstruction_loss(prediction, torch.zeros_like(prediction), visible, loss=loss)
        (gradient,) = torch.autograd.grad(value, prediction)
        assert value.isnan()
        assert gradient[0, 0, 2].isnan().all()


def test_the_factor_reaches_the_gradient_and_twice_is_refused():
    prediction, target, visible = some(2, 3, 5, 8).requires_grad_(), some(2, 3, 5, 8), mask(2, 3, 5)
    (whole,) = torch.autograd.grad(reconstruction_loss(prediction, target, visible), prediction)
    loss = reconstruction_loss(prediction, target, visible)
    (quarter,) = torch.autograd.grad(loss * 0.25, prediction, retain_graph=True)
    assert torch.equal(quarter, whole * 0.25)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, prediction)


def test_without_a_gradient_none_is_computed():
    prediction, target, visible = some(2, 3, 5, 8), some(2, 3, 5, 8), mask(2, 3, 5)
    scale = torch.ones((), device=DEVICE)
    _, gradient = forward_op(prediction, target, visible, scale, None, None, 5, "mse", False, False)
    assert gradient.numel() == 0
    with torch.no_grad():
        assert not reconstruction_loss(prediction.requires_grad_(), target, visible).requires_grad


@needs_compiler
def test_compiles_as_one_graph():
    target, visible = some(2, 3, 5, 8), mask(2, 3, 5)
    function = torch.compile(lambda x: reconstruction_loss(x * 2, target, visible) / 3, fullgraph=True)
    inputs = [some(2, 3, 5, 8).requires_grad_() for _ in range(2)]
    inputs[1].data = inputs[0].data.clone()
    function(inputs[0]).backward()
    (reference.reconstruction_loss(inputs[1] * 2, target, visible) / 3).backward()
    assert (inputs[0].grad - inputs[1].grad).abs().max() < 1e-6
