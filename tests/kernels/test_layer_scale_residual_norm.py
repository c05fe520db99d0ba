"""layer_scale_residual_norm: the kernel against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fastalign import reference
from fastalign.kernels import layer_scale_residual_norm as module
from fastalign.kernels.layer_scale_residual_norm import backward_op, forward_op, layer_scale_residual_norm
from tests.kernels.helpers import some
from tests.numerics import DEVICE, check_kernel, needs_compiler

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# no row; one channel; several rows a program, the last partly filled; one row a program; three dimensions
SHAPES = [(0, 72), (5, 1), (33, 72), (5, 257), (1, 1152), (2, 3, 300)]


def arguments(*shape, dtype=torch.float32, scaled=True, branch=None, scale=None, norm=None):
    """Random inputs in one dtype, or in others for the branch, for the scale and for weight and bias."""
    width = shape[-1]
    return {
        "residual": some(*shape, dtype=dtype),
        "branch": some(*shape, dtype=branch or dtype),
        "scale": some(width, dtype=scale or dtype) if scaled else None,
        "weight": some(width, dtype=norm or dtype),
        "bias": some(width, dtype=norm or dtype),
        "eps": 1e-6,
    }


def mixed(residual, branch, scale, weight, bias, eps):
    """The reference for parameters of the norm in another dtype, which eager refuses on some devices."""
    total = residual + (branch if scale is None else branch * scale)
    wide = torch.promote_types(total.dtype, torch.float32)
    normed = functional.layer_norm(total.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return total, normed.to(total.dtype)


def gradients(function, inputs, use=(0, 1), needed=("residual", "branch", "scale", "weight", "bias")):
    """The gradients, by name, of the outputs in use for cotangents that depend on the outputs alone."""
    given = {name: inputs[name] for name in needed if inputs[name] is not None}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    outputs = function(**{**inputs, **leaves})
    sum(outputs[index].double().square().mean() for index in use).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_scale_residual_norm(shape, dtype, scaled, poison):
    inputs = arguments(*shape, dtype=dtype, scaled=scaled)
    check_kernel(layer_scale_residual_norm, reference.layer_scale_residual_norm, inputs)


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_programs(dtype, scaled, poison, monkeypatch):
    """A program sums over several tiles of rows; the last tile is partly filled."""
    monkeypatch.setattr(module, "_PROGRAMS", 3)
    inputs = arguments(32 * 7 + 3, 40, dtype=dtype, scaled=scaled)
    check_kernel(layer_scale_residual_norm, reference.layer_scale_residual_norm, inputs)


def test_no_row_gives_zero_sums():
    found = gradients(layer_scale_residual_norm, arguments(0, 8))
    assert all(not found[name].any() and found[name].shape == (8,) for name in ("scale", "weight", "bias"))


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize(
    ("dtypes", "total"),
    [
        ({"dtype": torch.bfloat16, "norm": torch.float32}, torch.bfloat16),
        ({"dtype": torch.float16, "norm": torch.float32}, torch.float16),
        ({"branch": torch.bfloat16}, torch.float32),
        ({"branch": torch.bfloat16, "scale": torch.bfloat16, "norm": torch.bfloat16}, torch.float32),
        ({"dtype": torch.bfloat16, "branch": torch.float16, "norm": torch.float32}, torch.float32),
    ],
    ids=["bf16, fp32 norm", "fp16, fp32 norm", "bf16 branch", "fp32 residual", "bf16 and fp16"],
)
def test_mixed_dtypes_promote_as_in_eager(dtypes, total, scaled, poison):
    inputs = arguments(7, 48, scaled=scaled, **dtypes)
    check_kernel(layer_scale_residual_norm, mixed, inputs)
    assert [output.dtype for output in layer_scale_residual_norm(**inputs)] == [total, total]


def test_a_scale_in_fp32_widens_the_total():
    inputs = arguments(7, 48, dtype=torch.bfloat16, scale=torch.float32)
    check_kernel(layer_scale_residual_norm, mixed, inputs)
    assert layer_scale_residual_norm(**inputs)[0].dtype == torch.float32


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 5), st.integers(1, 40), st.integers(8, 150), st.booleans(), st.booleans())
def test_any_shape_and_stride(images, tokens, width, scaled, flipped):
    """Widths that average over the luck of rounding; the least is above."""
    inputs = arguments(images, tokens, width, scaled=scaled)
    if flipped:
        inputs["residual"] = some(width, tokens, images).permute(2, 1, 0)
        inputs["branch"] = some(images, tokens + 1, 2 * width)[:, 1:, :width]
        inputs["weight"] = some(width, 2)[:, 0]
    check_kernel(layer_scale_residual_norm, reference.layer_scale_residual_norm, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_far_from_zero(dtype, poison):
    """Mean 1000, deviation 1: the variance must not be the difference of two large numbers."""
    inputs = arguments(9, 768, dtype=dtype)
    inputs["residual"] = (1000 + torch.randn(9, 768, device=DEVICE)).to(dtype)
    inputs["branch"] /= 8
    check_kernel(layer_scale_residual_norm, reference.layer_scale_residual_norm, inputs)


def test_constant_rows():
    """No variance: eps alone."""
    inputs = arguments(5, 100)
    inputs["residual"], inputs["branch"] = torch.full_like(inputs["residual"], 3.0), some(5, 100) * 0
    found, wanted = layer_scale_residual_norm(**inputs), reference.layer_scale_residual_norm(**inputs)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_scale_the_total_has_the_bits_of_eager(dtype):
    inputs = arguments(9, 96, dtype=dtype, scaled=False)
    assert torch.equal(layer_scale_residual_norm(**inputs)[0], inputs["residual"] + inputs["branch"])


@pytest.mark.parametrize(
    ("scaled", "need"),
    [
        (True, "scale"),
        *((scaled, n) for scaled in (True, False) for n in ("residual", "branch", "weight", "bias")),
    ],
)
def test_only_the_gradients_asked_for(scaled, need, poison):
    """Of the norm alone: the total does not depend on its parameters."""

    def normed(function):
        return lambda **inputs: function(**inputs)[1]

    kernel, wanted = normed(layer_scale_residual_norm), normed(reference.layer_scale_residual_norm)
    check_kernel(kernel, wanted, arguments(6, 40, scaled=scaled), only={need})


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("use", [0, 1])
def test_an_unused_output_is_not_read(use, scaled, poison):
    """No gradient of it is made up, and the norm's parameters have none where the norm is unused."""
    inputs = arguments(6, 40, scaled=scaled)
    found = gradients(layer_scale_residual_norm, inputs, use=(use,))
    wanted = gradients(reference.layer_scale_residual_norm, inputs, use=(use,))
    for name, value in wanted.items():
        if value is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_gradients_do_not_share_memory():
    """Without a scale the two inputs have one gradient; what is accumulated for them is apart."""
    found = gradients(layer_scale_residual_norm, arguments(6, 40, scaled=False))
    assert torch.equal(found["residual"], found["branch"])
    assert found["residual"].data_ptr() != found["branch"].data_ptr()


def test_repeatable_on_any_gpu(monkeypatch):
    """Twice the same bits, with several rows a program."""
    monkeypatch.setattr(module, "_PROGRAMS", 4)
    inputs = arguments(300, 72, dtype=torch.bfloat16)
    first, second = (gradients(layer_scale_residual_norm, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    inputs = arguments(2, 5, 24, dtype=dtype)
    residual, branch, scale, weight, bias, eps = inputs.values()
    for given_scale in (scale, None):
        torch.library.opcheck(forward_op, (residual, branch, given_scale, weight, bias, eps))
    total, _, statistics = forward_op(residual, branch, scale, weight, bias, eps)
    d_total, d_normed = torch.randn_like(total), torch.randn_like(total)
    for tensors, needs in [
        ((d_total, d_normed, total, statistics, branch, scale, weight), [True] * 5),
        ((None, d_normed, total, statistics, None, None, weight), [True, False, False, False, True]),
        ((d_total, None, total, statistics, branch, scale, weight), [False, True, True, False, False]),
    ]:
        torch.library.opcheck(backward_op, (*tensors, dtype, torch.float32, needs))


@needs_compiler
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
def test_compile(scaled):
    inputs = arguments(3, 5, 24, scaled=scaled)

    def block(function, residual, branch, **parameters):
        total, normed = function(residual, torch.tanh(branch), **parameters)
        return function(total, normed * 2, **parameters)

    def found(**inputs):
        return block(layer_scale_residual_norm, **inputs)

    def wanted(**inputs):
        return block(reference.layer_scale_residual_norm, **inputs)

    compiled = torch.compile(found, fullgraph=True)
    check_kernel(compiled, wanted, inputs)
    # The norm unused: the compiler passes zeros, where eager passes nothing.
    ours, theirs = gradients(compiled, inputs, use=(0,)), gradients(wanted, inputs, use=(0,))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)
