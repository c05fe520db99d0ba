"""bias_activation: the kernel against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign import reference
from fastalign.kernels import bias_activation as module
from fastalign.kernels.bias_activation import backward_op, bias_activation, forward_op
from tests.numerics import DEVICE, check_kernel, needs_compiler

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# no row; one channel; rows of a program partly filled; several blocks of channels; three dimensions
SHAPES = [(0, 72), (5, 1), (17, 72), (5, 257), (1, 1152), (2, 3, 300)]


def some(*shape, dtype=torch.float32):
    """Wide enough to reach the flat ends of the activations."""
    return (2 * torch.randn(shape, device=DEVICE)).to(dtype)


def check(activation, x, bias, **kwargs):
    inputs = {"x": x, "bias": bias, "activation": activation}
    check_kernel(bias_activation, reference.bias_activation, inputs, **kwargs)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_activation(shape, dtype, activation, poison):
    # In fp32 the error of a bias's gradient that is one number is luck: eager is sometimes exact.
    only = {"x"} if shape[-1] == 1 and dtype == torch.float32 else None
    check(activation, some(*shape, dtype=dtype), some(shape[-1], dtype=dtype), only=only)
    check(activation, some(*shape, dtype=dtype), None)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_programs(dtype, activation, poison, monkeypatch):
    """A program sums over several tiles of rows; the last tile is partly filled."""
    monkeypatch.setattr(module, "_PROGRAMS", 3)
    check(activation, some(8 * 7 + 3, 260, dtype=dtype), some(260, dtype=dtype))


def test_no_row_gives_a_zero_sum():
    bias = some(8).requires_grad_()
    bias_activation(some(0, 8), bias, "gelu").square().mean().nan_to_num().backward()
    assert bias.grad.shape == (8,)
    assert not bias.grad.any()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize(
    ("x", "bias"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_mixed_dtypes_promote_as_in_eager(x, bias, activation, poison):
    check(activation, some(7, 40, dtype=x), some(40, dtype=bias))
    found = bias_activation(some(7, 40, dtype=x), some(40, dtype=bias), activation)
    assert found.dtype == torch.float32


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(reference.ACTIVATIONS),
    st.integers(0, 5),
    st.integers(1, 9),
    st.integers(8, 300),
    st.booleans(),
)
def test_any_shape_and_stride(activation, images, tokens, width, flipped):
    """Widths that average over the luck of rounding; the least is above."""
    x, bias = some(images, tokens, width), some(width)
    if flipped:
        x, bias = some(images, tokens + 1, 2 * width)[:, 1:, :width], some(width, 2)[:, 0]
        check(activation, some(width, tokens, images).permute(2, 1, 0), bias)
    check(activation, x, bias)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tails(dtype, activation):
    """From 0 far out to both sides, where an exponential overflows and differences cancel."""
    x = torch.cat([torch.linspace(-60, 60, 481), torch.tensor([-1e4, 1e4, -0.0, 1e-4])]).to(DEVICE, dtype)
    check(activation, x.unsqueeze(0), None)


@pytest.mark.parametrize("need", ["x", "bias"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_only_the_gradients_asked_for(activation, need, poison):
    check(activation, some(6, 40), some(40), only={need})


def test_repeatable(monkeypatch):
    """Twice the same bits, with several tiles of rows a program."""
    monkeypatch.setattr(module, "_PROGRAMS", 4)
    x, found = some(300, 72, dtype=torch.bfloat16), []
    for _ in range(2):
        bias = torch.linspace(-1, 1, 72, device=DEVICE).requires_grad_()
        bias_activation(x, bias, "gelu_tanh").square().mean().backward()
        found.append(bias.grad)
    assert torch.equal(*found)


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter's assertions; Triton's own error on a GPU")
def test_an_unknown_activation_is_refused():
    with pytest.raises(Exception, match="gelu, gelu_tanh or quick_gelu"):
        bias_activation(some(2, 8), None, "relu")


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, activation):
    x, bias, gradient = some(2, 5, 24, dtype=dtype), some(24, dtype=dtype), some(2, 5, 24, dtype=dtype)
    for given_bias in (bias, None):
        torch.library.opcheck(forward_op, (x, given_bias, activation))
    for need_x, need_bias in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(backward_op, (gradient, x, bias, activation, need_x, need_bias))


@needs_compiler
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_compile(activation):
    def found(x, bias):
        return bias_activation(torch.tanh(x), bias, activation) * 2

    def wanted(x, bias):
        return reference.bias_activation(torch.tanh(x), bias, activation) * 2

    check_kernel(torch.compile(found, fullgraph=True), wanted, {"x": some(3, 5, 24), "bias": some(24)})
