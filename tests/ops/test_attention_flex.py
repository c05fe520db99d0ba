"""FlexAttention's parts: the tanh operator, the graph of its gradient, the mask of packed sequences."""

import pytest
import torch

from fastalign.ops import reference
from fastalign.ops.attention import flex


def test_tanh_approx_is_tanh_on_a_cpu():
    operator = flex.tanh_approx
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.equal(operator(x), torch.tanh(x))
    assert torch.autograd.gradcheck(operator, (x,))
    torch.library.opcheck(operator, (torch.randn(3, 4, requires_grad=True),))
    mapped = torch.vmap(operator, in_dims=1)(x.detach().view(1, 7))
    assert torch.equal(mapped.squeeze(1), torch.tanh(x))


def test_flex_attention_differentiates_the_capped_logit():
    """The graph that FlexAttention makes of a score_mod for its backward pass contains the operator."""
    from torch._higher_order_ops.flex_attention import create_fw_bw_graph
    from torch._inductor.lowering import lowerings

    operator = flex.tanh_approx
    assert operator in lowerings
    score, index = torch.tensor(12.0, requires_grad=True), torch.zeros((), dtype=torch.int32)
    _, joint = create_fw_bw_graph(flex.score_mod(30.0, operator), (score, *[index] * 4), ())
    assert "tanh_approx" in joint.code
    slope, *_ = joint(score.detach(), *[index] * 4, torch.tensor(1.0))
    torch.testing.assert_close(slope, 1 - torch.tanh(torch.tensor(12.0 / 30)) ** 2)


@pytest.mark.parametrize("bounds", [[0, 100, 197, 300, 300, 500], [0, 0, 7, 640], [0, 128, 256, 384]])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_of_packed_sequences(bounds):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, bounds = bounds[-1], torch.tensor(bounds, dtype=torch.int32)
    sequence = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    wanted = create_block_mask(
        lambda b, h, i, j: sequence[i] == sequence[j], None, None, length, length, device="cpu"
    )
    found = flex.block_mask(bounds, length)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert torch.equal(found.to_dense(), wanted.to_dense())
    q, k, v = torch.randn(3, length, 2, 16)
    score_mod = flex.score_mod(30.0, flex.tanh_approx)
    out = flex_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), score_mod=score_mod, block_mask=found)
    truth = reference.softcap_attention(q.double(), k.double(), v.double(), softcap=30.0, cu_seqlens=bounds)
    torch.testing.assert_close(out[0].transpose(0, 1), truth.float())


def test_the_operator_compiles(monkeypatch):
    monkeypatch.setattr(flex, "_approximate", lambda q: True)
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 2, 3, 20, 16)
    with torch.no_grad():
        out = torch.compile(flex.flex, fullgraph=True, backend="aot_eager")(q, k, v, 30.0, None)
    torch.testing.assert_close(out, reference.softcap_attention(q, k, v, softcap=30.0))


@pytest.mark.slow
def test_lengths_may_vary(monkeypatch):
    """More shapes than torch.compile's limit, called without torch.compile."""
    limit = torch._dynamo.config.recompile_limit
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: whole(*a, **k, backend="eager"))
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    try:
        for length in range(4, 4 + limit + 4):
            q, k, v = torch.randn(3, 1, 2, length, 16)
            found = flex.flex(q, k, v, 30.0, None)
            torch.testing.assert_close(found, reference.softcap_attention(q, k, v, softcap=30.0))
    finally:
        flex._compiled.cache_clear()
        torch._dynamo.config.recompile_limit = limit
