"""`fa.accelerate` against timm's own modules: outputs, gradients, the cap, everything a model goes through."""

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import nn
from torch.nn import functional

import fastalign as fa
from benchmarks.parity import BACKBONES
from tests.backbones.helpers import capped
from tests.numerics import gradient_error, needs_compiler, randomise, relative_error

NARROW = {"depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 5}
EXACT = 1e-12
"""In float64."""


def tiny(name: str = "vit_tiny_patch16_224", **kwargs) -> nn.Module:
    """timm's model, narrow, two patches high and three wide, random weights in every parameter."""
    patch = 14 if "patch14" in name else 16
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=(2 * patch, 3 * patch), **NARROW, **kwargs).double()
    randomise(model, 0.1)
    return model


def run(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """The output, and every gradient for a random cotangent."""
    model.zero_grad()
    torch.manual_seed(1)
    out = model(images)
    torch.manual_seed(2)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def pixels(model: nn.Module, count: int = 4) -> torch.Tensor:
    torch.manual_seed(3)
    size = model.patch_embed.img_size if hasattr(model, "patch_embed") else (32, 48)  # NaFlexViT takes any
    return torch.randn(count, 3, *size, dtype=torch.float64)


def assert_same(ours: nn.Module, theirs: nn.Module, images: torch.Tensor) -> None:
    (out, gradients), (wanted, their_gradients) = run(ours, images), run(theirs, images)
    assert relative_error(out, wanted) < EXACT
    assert gradient_error(gradients, their_gradients) < EXACT


VIT, EVA, BEIT = "vit_tiny_patch16_224", "eva02_base_patch16_clip_224", "beit_base_patch16_224"
VARIANTS = {
    "stochastic depth and layer scale": (VIT, {"drop_path_rate": 0.6, "init_values": 0.1}),
    "dropped attention weights": (VIT, {"attn_drop_rate": 0.3, "proj_drop_rate": 0.2, "drop_rate": 0.1}),
    "dropped attention weights, eva": (EVA, {"attn_drop_rate": 0.3, "proj_drop_rate": 0.2}),
    "dropped attention weights, beit": (BEIT, {"attn_drop_rate": 0.3, "proj_drop_rate": 0.2}),
    "dropped patches": (VIT, {"patch_drop_rate": 0.5}),
    "dropped patches, rotary": (EVA, {"patch_drop_rate": 0.5}),
    "qk norm": (VIT, {"qk_norm": True}),
    "NaFlexViT": ("naflexvit_base_patch16_gap", {}),
    "norms inside": (VIT, {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "no qkv bias": (VIT, {"qkv_bias": False}),
    "parallel branches": ("vit_small_patch16_18x2_224", {}),
    "eva, fused": (EVA, {"qkv_fused": True}),
    "eva, grouped heads": (EVA, {"attn_type": "rope", "num_kv_heads": 1, "scale_attn_inner": False}),
    "beit, one bias for all": (BEIT, {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "beit, both biases": (BEIT, {"use_shared_rel_pos_bias": True}),
    "beit, no bias": (BEIT, {"use_rel_pos_bias": False, "qkv_bias": False}),
}


@pytest.mark.parametrize("variant", [*BACKBONES, *VARIANTS])
def test_outputs_and_gradients_equal_timm(variant):
    name, kwargs = VARIANTS.get(variant, (variant, {}))
    theirs = tiny(name, **kwargs)
    ours = copy.deepcopy(theirs)
    assert fa.accelerate(ours) is ours
    assert len(fa.accelerated(ours)) == (4 if "18x2" in name else 2)
    for training in (False, True):
        assert_same(ours.train(training), theirs.train(training), pixels(theirs, 6))


@pytest.mark.parametrize("name", [VIT, BEIT, EVA, "vit_base_patch16_rope_224"])
def test_softcap_equals_timm_with_a_capped_function(name, monkeypatch):
    theirs = tiny(name)
    randomise(theirs, 0.3)
    ours, images = fa.accelerate(copy.deepcopy(theirs), softcap=0.5), pixels(theirs)
    plain = run(theirs, images)[0]
    monkeypatch.setattr(functional, "scaled_dot_product_attention", capped(0.5))
    assert_same(ours, theirs, images)
    assert relative_error(run(ours, images)[0], plain) > 1e-4


def test_pooling_by_attention_has_no_cap():
    theirs = tiny("vit_base_patch16_siglip_224")
    ours = fa.accelerate(copy.deepcopy(theirs), softcap=0.5)
    tokens = torch.randn(2, 6, 48, dtype=torch.float64)
    assert torch.equal(ours.attn_pool(tokens), theirs.attn_pool(tokens))


MASKS = {
    "bool [T, T]": lambda: torch.rand(7, 7) > 0.4,
    "bool [B, 1, T, T]": lambda: torch.rand(3, 1, 7, 7) > 0.4,
    "bool [B, 1, 1, T]": lambda: torch.rand(3, 1, 1, 7) > 0.4,
    "added [T, T]": lambda: torch.randn(7, 7).double(),
    "added [B, H, T, T]": lambda: torch.randn(3, 2, 7, 7).double(),
}


@pytest.mark.parametrize("kind", [Attention, AttentionRope, EvaAttention], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_masks(kind, softcap, monkeypatch):
    theirs = nn.Sequential(kind(48, num_heads=2, norm_layer=nn.LayerNorm, qk_norm=True, gated=True)).double()
    randomise(theirs, 0.3)
    ours = fa.accelerate(copy.deepcopy(theirs), softcap=softcap)
    x = torch.randn(3, 7, 48, dtype=torch.float64)
    if softcap:
        monkeypatch.setattr(functional, "scaled_dot_product_attention", capped(softcap))
    causal = theirs[0](x, attn_mask=torch.ones(7, 7, dtype=torch.bool).tril())
    assert relative_error(ours[0](x, is_causal=True), causal) < EXACT
    for name, draw in MASKS.items():
        mask = draw()
        mask = mask | torch.eye(7, dtype=torch.bool) if mask.dtype == torch.bool else mask
        assert relative_error(ours[0](x, attn_mask=mask), theirs[0](x, attn_mask=mask)) < EXACT, name


def test_state_dict_copies_pickles_and_modes():
    theirs = tiny(EVA, drop_path_rate=0.3)
    before = dict(theirs.state_dict(keep_vars=True))
    fa.accelerate(theirs, softcap=0.5)
    after = theirs.state_dict(keep_vars=True)
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    tiny(EVA).load_state_dict(theirs.state_dict())
    images = pixels(theirs)
    out = theirs.eval()(images)
    for other in (copy.deepcopy(theirs), pickle.loads(pickle.dumps(theirs))):
        assert torch.equal(other.eval()(images), out)
        assert fa.accelerated(other) == fa.accelerated(theirs)
        assert other.blocks[0].attn.softcap == 0.5
    assert isinstance(theirs.blocks[0].attn, EvaAttention)


def test_twice_with_another_cap_or_backend_and_back():
    model = tiny("vit_base_patch16_clip_quickgelu_224.openai", drop_path_rate=0.3).eval()
    kinds, images = [type(part) for part in model.modules()], pixels(model)
    plain = model(images)
    fa.accelerate(model, softcap=0.5)
    assert fa.accelerated(model) == {"blocks.0.attn": "Attention", "blocks.1.attn": "Attention"}
    first = model(images)
    fa.accelerate(model, softcap=0.2)
    assert not torch.equal(model(images), first)
    fa.accelerate(model, backend="eager")
    assert model.blocks[0].attn.backend == "eager"
    assert relative_error(model(images), plain) < EXACT
    fa.accelerate(model, undo=True)
    assert [type(part) for part in model.modules()] == kinds
    assert fa.accelerated(model) == {}


@needs_compiler
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("name", ["vit_base_patch16_clip_quickgelu_224", BEIT])
def test_torch_compile_without_a_break(softcap, name):
    torch._dynamo.reset()
    model = fa.accelerate(tiny(name, drop_path_rate=0.3), softcap=softcap)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = pixels(model)
    for training in (False, True):
        model.train(training)
        out = compiled(images)
        out.sum().backward()
        assert training or relative_error(out, model(images)) < EXACT


@pytest.mark.parametrize("name", [VIT, BEIT, EVA, "vit_base_patch16_clip_quickgelu_224"])
def test_autocast(name):
    theirs = tiny(name, drop_path_rate=0.3, **({"qk_norm": True} if name == VIT else {})).float()
    ours, images = fa.accelerate(copy.deepcopy(theirs)), pixels(theirs).float()
    exact = theirs.double().eval()(images.double()).float()
    theirs.float()
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            wanted, out = theirs.train(training)(images), ours.train(training)(images)
        assert out.dtype == wanted.dtype
        out.float().sum().backward()
    assert relative_error(out, exact) < 2 * relative_error(wanted, exact) + 2**-8


def refused(match: str, *args, **kwargs) -> None:
    with pytest.raises(fa.UserError, match=match) as error:
        fa.accelerate(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_what_is_not_known_is_refused_and_nothing_changed():
    refused("softcap must be a positive number or None, got -1.0", tiny(), softcap=-1.0)
    refused("backend: unknown name sdp; the nearest is sdpa", tiny(), backend="sdp")
    refused("Linear has no attention of a timm", nn.Linear(2, 2))
    refused("str has no attention of a timm", VIT)
    refused("is a fastalign.backbones.blocks.Attention", fa.create_backbone(VIT, img_size=32, depth=1))
    refused("blocks.0.attn is a timm.*diff_attention.DiffAttention", tiny(attn_layer="diff"))
    swin = timm.create_model("swin_tiny_patch4_window7_224")
    refused("layers.0.blocks.0.attn is a timm.*WindowAttention", swin)

    class Mine(Attention):
        pass

    model = tiny()
    model.blocks[1].attn = Mine(48, num_heads=2)
    refused("blocks.1.attn is a .*Mine, not supported", model, softcap=3.0)
    assert fa.accelerated(model) == {}
    model = tiny()
    model.blocks[1].attn.forward = model.blocks[0].attn.forward
    refused("the forward of blocks.1.attn was replaced", model)
    assert fa.accelerated(model) == {}
    model = fa.accelerate(tiny(attn_drop_rate=0.2), softcap=30.0)
    assert model.eval()(pixels(model)).isfinite().all()
    with pytest.raises(fa.UserError, match="attn_drop_rate is incompatible with a softcap"):
        model.train()(pixels(model))
