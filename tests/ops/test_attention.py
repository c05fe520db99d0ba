"""Attention: every installed implementation against the definition; the choice and its reason."""

import inspect
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import fastalign as fa
from fastalign import ops
from fastalign.ops import attention as selection
from fastalign.ops import reference
from fastalign.ops.attention import BACKENDS, Case, Sequences, attention, backends, choose
from tests.numerics import DEVICE, check_kernel, needs_compiler

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TIMES = 5 if DEVICE == "cuda" else 1
"""In the interpreter more rows take too long."""
BOUNDS = [TIMES * bound for bound in (0, 5, 5, 22, 40)]
"""One sequence is empty; the last seven rows are padding."""
LENGTH, ROWS, LONGEST, WIDTH = 33 * TIMES, BOUNDS[-1] + 7, 18 * TIMES, 16
CALL = Case("cuda", torch.bfloat16, False, False, False, 577, 64, True)
with_cap = pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "capped"])
with_packing = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
no_gpu = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU tests the installed library")


def tensors(packed):
    """q, k, v in the layout of the projection, and the sequences."""
    torch.manual_seed(0)
    shape = (ROWS, 3, 4, WIDTH) if packed else (2, LENGTH, 3, 4, WIDTH)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=DTYPE) * 2).unbind(-3)
    if packed:
        return (q, k, v), Sequences(torch.tensor(BOUNDS, dtype=torch.int32, device=DEVICE), LONGEST)
    return [x.transpose(1, 2) for x in (q, k, v)], None


def compare(run, softcap, packed):
    """Outputs and gradients of `run(q, k, v, softcap, sequences)`; padding is finite and gets no gradient."""
    (q, k, v), sequences = tensors(packed)
    end = BOUNDS[-1] if packed else None

    def no_gradient_of_padding(gradient):
        assert not gradient[end:].any()

    def found(q, k, v):
        for x in (q, k, v) if packed else ():
            x.register_hook(no_gradient_of_padding)
        out = run(q, k, v, softcap, sequences)
        assert torch.isfinite(out).all()
        return out[:end]

    def truth(q, k, v):
        bounds = sequences and sequences.bounds
        return reference.softcap_attention(q, k, v, softcap=softcap, cu_seqlens=bounds)[:end]

    check_kernel(found, truth, {"q": q, "k": k, "v": v})


@with_packing
@with_cap
@pytest.mark.parametrize("name", BACKENDS)
def test_every_implementation_here_equals_the_definition(name, softcap, packed):
    length = LONGEST if packed else LENGTH
    case = Case(DEVICE, DTYPE, softcap is not None, False, packed, length, WIDTH, True)
    if refusal := BACKENDS[name].refuses(case, selection.architecture()):
        pytest.skip(f"{name} {refusal}")
    run = lambda q, k, v, cap, s: attention(q, k, v, softcap=cap, sequences=s, backend=name)  # noqa: E731
    compare(run, softcap, packed)


@needs_compiler
@with_packing
@pytest.mark.parametrize("name", ["auto", "sdpa_flash", "eager"])
def test_torch_compile_makes_one_graph(name, packed):
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True)
    run = lambda q, k, v, cap, s: compiled(q, k, v, softcap=cap, sequences=s, backend=name)  # noqa: E731
    for softcap in (None, 30.0):
        compare(run, softcap, packed)


def _library(with_lse):
    """A stand-in with flash-attn's documented interface: [B, T, H, d] and packed [L, H, d]; padding is NaN."""

    def finish(out):
        return (out, None) if with_lse else out

    def flash_attn_func(q, k, v, softcap=0.0):
        out = reference.softcap_attention(*(x.transpose(1, 2) for x in (q, k, v)), softcap=softcap or None)
        return finish(out.transpose(1, 2))

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softcap=0.0
    ):
        assert cu_seqlens_q.diff().max() <= max_seqlen_q == max_seqlen_k
        out = reference.softcap_attention(q, k, v, softcap=softcap or None, cu_seqlens=cu_seqlens_k)
        return finish(torch.where((torch.arange(len(q)) < cu_seqlens_q[-1])[:, None, None], out, torch.nan))

    return SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func, __path__=[]
    )


@no_gpu
@with_packing
@with_cap
@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
def test_flash_attn_is_called_as_documented(name, softcap, packed, monkeypatch):
    module = BACKENDS[name].needs.partition(":")[0]
    monkeypatch.setitem(sys.modules, "flash_attn", _library(False))
    monkeypatch.setitem(sys.modules, module, _library(name == "flash_attn_3"))
    compare(lambda q, k, v, cap, s: BACKENDS[name].run(q, k, v, cap, None, s), softcap, packed)


def test_varlen_attn_is_called_as_every_release_since_2_10_takes_it(monkeypatch):
    """By position: the releases differ in later arguments."""
    from torch.nn.attention import varlen

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, /):
        assert cu_seq_q.diff().max() <= max_q == max_k
        return reference.softcap_attention(q, k, v, cu_seqlens=cu_seq_k)

    names = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert list(inspect.signature(varlen.varlen_attn).parameters)[:7] == names
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    compare(lambda q, k, v, cap, s: BACKENDS["varlen_attn"].run(q, k, v, cap, None, s), None, True)


@pytest.mark.parametrize(
    ("name", "changes", "arch", "words"),
    [
        ("triton", {"device": "cpu"}, 0, "needs a GPU"),
        ("varlen_attn", {}, 90, "packed sequences only"),
        ("sdpa_flash", {"packed": True}, 90, "does not support packed sequences"),
        ("sdpa_flash", {"width": 68}, 90, "does not support heads of 68"),
        ("triton", {"biased": True}, 90, "does not support a bias"),
        ("triton", {"dtype": torch.float64}, 90, "does not support float64"),
        ("flash_attn_3", {}, 100, "does not support sm_100"),
        ("flash_attn_4", {"capped": True}, 100, "may hang with a cap on sm_100"),
        ("flash_attn_4", {"compiled": True}, 90, "breaks the graph"),
        ("sdpa_cudnn", {"device": "cpu"}, 0, "does not support this device"),
        ("eager", {"capped": True, "packed": True, "dtype": torch.float64}, 70, None),
    ],
)
def test_refusals(name, changes, arch, words, monkeypatch):
    monkeypatch.setattr(ops, "MODE", "auto")
    found = BACKENDS[name].refuses(CALL._replace(**changes), arch)
    assert found is None if words is None else words in found


def test_missing_libraries_are_named():
    assert backends.Backend(None, "no_such_package:f").missing().startswith("is not installed (Module")
    assert backends.Backend(None, "torch:no", "x").missing() == "is not installed (torch has no no); x"
    assert all(BACKENDS[name].missing() is None for name in ("sdpa_flash", "varlen_attn"))


@pytest.fixture
def hopper(tmp_path, monkeypatch):
    """A machine with an sm_90 and a table that the benchmark wrote there."""

    def row(ms, **facts):
        default = {"capped": False, "packed": False, "gradient": True, "length": 577, "width": 64}
        return default | facts | {"ms": ms}

    rows = [
        row({"sdpa_cudnn": 1.0, "sdpa_flash": 1.5, "triton": 2.0, "flash_attn_2": 0.1}),
        row({"sdpa_cudnn": 2.0, "sdpa_flash": 1.0}, length=197),
        row({"sdpa_flash": 3.0, "triton": 2.0}, width=72),
        row({"flash_attn_3": 1.0, "triton": 1.3, "eager": 4.0}, capped=True),
    ]
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"sm_90": {"environment": {}, "rows": rows}}))
    monkeypatch.setattr(selection, "TABLE", table)
    monkeypatch.setattr(selection, "architecture", lambda: 90)
    monkeypatch.setattr(ops, "MODE", "auto")
    missing = backends._missing  # as if flash-attn were not installed
    monkeypatch.setattr(
        backends, "_missing", lambda needs: "no such" if needs.startswith("flash_attn") else missing(needs)
    )
    selection._choose.cache_clear()
    yield
    selection._choose.cache_clear()


@pytest.mark.parametrize(
    ("changes", "wanted", "name", "words"),
    [
        ({}, "auto", "sdpa_cudnn", "fastest usable one of 4 measured at T 577, d 64 on sm_90"),
        ({"length": 201}, "auto", "sdpa_flash", "T 197"),
        ({"width": 80}, "auto", "triton", "d 72"),
        (
            {"capped": True},
            "auto",
            "triton",
            "flash_attn_3, 1.30x as fast, is not installed (no such); build",
        ),
        ({"packed": True}, "auto", "triton", "the default for packed attention; sm_90 is not measured"),
        ({"biased": True}, "auto", "sdpa", "the default for biased"),
        ({"dtype": torch.float64, "capped": True}, "auto", "eager", "the default for capped"),
        ({}, "sdpa_flash", "sdpa_flash", "as configured"),
        ({"capped": True}, "sdpa_flash", "triton", "sdpa_flash does not support a soft-cap; the fastest"),
        ({"device": "cpu"}, "auto", "sdpa", "the default on a CPU"),
        ({"device": "cpu", "capped": True}, "auto", "eager", "the default on a CPU"),
    ],
)
def test_the_choice_and_its_reason(hopper, changes, wanted, name, words):
    found = choose(CALL._replace(**changes), wanted)
    assert found.backend == name
    assert words in found.reason


def test_wrong_arguments_and_names():
    (q, k, v), sequences = tensors(packed=True)
    with pytest.raises(ValueError, match="a bias needs dense input"):
        attention(q, k, v, sequences=sequences, bias=torch.zeros(1, 1, 1, 1, device=DEVICE))
    with pytest.raises(ValueError, match="unknown name sdpaa; the nearest is sdpa; choose from"):
        attention(q, k, v, sequences=sequences, backend="sdpaa")
    selection.check("auto"), selection.check("eager")
    if BACKENDS["flash_attn_3"].missing():
        with pytest.raises(ValueError, match=r"flash_attn_3 is not installed .*; build it from its source"):
            selection.check("flash_attn_3")


@pytest.mark.parametrize("masking", ["zero", "drop"])
@pytest.mark.parametrize("objective", ["maskembed", "mim", "beit"])
def test_a_step_has_the_planned_cases(objective, masking, monkeypatch):
    if objective == "beit" and masking == "drop":
        pytest.skip("drop does not support a relative position bias")
    name = "beit_base_patch16_224" if objective == "beit" else "vit_tiny_patch16_224"
    vit = fa.create_backbone(name, embed_dim=48, num_heads=3, img_size=32, depth=2)
    if objective == "mim":
        student = fa.MIMStudent.from_backbone(vit, masking=masking)
        step = fa.MaskedImageModeling(fa.MaskedTeacher(vit), student, fa.UniformMasks())
    else:
        student = fa.MaskEmbedStudent.from_backbone(vit)
        step = fa.MaskEmbed(fa.MaskedTeacher(vit, masking=masking), student, fa.UniformMasks())
    step.to(DEVICE)
    called = []
    monkeypatch.setattr(
        "fastalign.ops.attention.choose", lambda c, wanted: called.append((c, wanted)) or choose(c)
    )
    step.set_attention("eager")
    step(torch.randn(2, 3, 32, 32, device=DEVICE), torch.arange(2, device=DEVICE))
    planned = step.attention_cases(torch.device(DEVICE), torch.float32)
    assert set(planned) == {"teacher", "student"} | ({"decoder"} if objective != "mim" else set())
    assert {c for c, _ in called} == set(planned.values())
    assert {wanted for _, wanted in called} == {"eager"}
