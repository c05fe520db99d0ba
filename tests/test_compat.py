"""`fastalign.compat.locality_alignment`: signatures, numbers against timm and the truth, checkpoints, `run`."""

import argparse
import copy
import inspect
import math
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

import fastalign.compat.__main__ as command
import fastalign.compat.locality_alignment as la
from fastalign.compat.locality_alignment import loss_utils, model_utils, train_utils
from fastalign.compat.locality_alignment.backbones import moco, svit
from fastalign.errors import UserError
from tests import truth
from tests.numerics import gradient_error, randomise, relative_error

ROOT = Path(__file__).parent.parent
REQUIRED = inspect.Parameter.empty
MODELS = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "vit_base_patch16_clip_quickgelu_224": {"img_size": 64, "embed_dim": 48, "num_heads": 3},
    "vit_base_patch16_siglip_224": {"img_size": 64, "embed_dim": 48, "num_heads": 3},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "embed_dim": 48, "num_heads": 3},
    "beit_base_patch16_224": {"img_size": 64, "embed_dim": 48, "num_heads": 3},
    "eva02_base_patch16_clip_224": {"img_size": 64, "embed_dim": 48, "num_heads": 3},
}
ONE = "vit_tiny_patch16_224"


def make(name=ONE, depth=3, dtype=torch.float64, **kwargs) -> nn.Module:
    """A small timm model, every parameter moved."""
    torch.manual_seed(0)
    options = {"num_classes": 0, "depth": depth, **MODELS.get(name.removeprefix("s"), {}), **kwargs}
    model = timm.create_model(name, **options).to(dtype)
    randomise(model)
    return model


def batch(model, images=2, seed=0):
    """Images, their masks as the samplers give them, and the images repeated for each mask."""
    size, patches = model.patch_embed.img_size[0], model.patch_embed.num_patches
    pixels = torch.randn(images, 3, size, size, dtype=torch.float64)
    return pixels, la.UniformMaskSampler(patches)(images, seed=seed).double(), pixels.repeat_interleave(3, 0)


# ---- names and signatures ----

SIGNATURES = {
    "MaskLayer": {"image_width": REQUIRED, "patch_size": REQUIRED},
    "MaskEmbedDecoder": {
        **dict.fromkeys(("embed_dim", "num_heads", "num_patch_tokens", "num_prefix_tokens"), REQUIRED),
        **dict.fromkeys(("output_size", "num_layers"), REQUIRED),
        **dict.fromkeys(("prefix_only", "qkv_bias", "qk_norm"), False),
        "init_values": None,
        "norm_layer": nn.LayerNorm,
        "act_layer": nn.GELU,
        "mlp_layer": timm.layers.Mlp,
    },
    "MaskEmbedStudent": {"encoder": REQUIRED, "decoder": REQUIRED},
    "TransformerPooling": dict.fromkeys(("embed_dim", "num_heads", "num_tokens", "num_layers"), REQUIRED),
    "UniformMaskSampler": {"mask_size": REQUIRED, "antithetical_sampling": True, "include_null": True},
    "BernoulliMaskSampler": {
        "mask_size": REQUIRED, "mask_ratio": 0.5, "antithetical_sampling": True, "include_null": True
    },
    "BlockwiseMaskSampler": {
        "mask_size": REQUIRED, "target_ratio": 0.4, "antithetical_sampling": True, "include_null": True
    },
    "convert_to_teacher_model": {"model": REQUIRED, "skip_blocks": 0, "prefix_only": False},
    "convert_to_mim_teacher_model": {"model": REQUIRED},
    "convert_to_student_model": {"model": REQUIRED, "output_dim": REQUIRED, "output_head": "linear"},
    "convert_to_mim_student_model": {"model": REQUIRED, "output_dim": REQUIRED, "output_head": "linear"},
    "load_checkpoint": {
        "model": REQUIRED, "checkpoint_path": REQUIRED, "use_ema": True, "device": "cpu", "strict": True,
        "filter_fn": None,
    },
    "load_checkpoint_auto": {
        "model": REQUIRED, "checkpoint_path": REQUIRED, "use_ema": True, "device": "cpu", "strict": True
    },
    "CheckpointSaver": {
        "model": REQUIRED, "optimizer": REQUIRED, "args": None, "model_ema": None, "amp_scaler": None,
        "checkpoint_prefix": "checkpoint", "recovery_prefix": "recovery", "checkpoint_dir": "",
        "recovery_dir": "", "decreasing": False, "max_history": 10, "retain_interval": None,
        "unwrap_fn": timm.utils.unwrap_model,
    },
}  # fmt: skip


def test_every_public_name_is_there():
    assert set(la.__all__) == {*SIGNATURES, "backbones"}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    found = inspect.signature(getattr(la, name)).parameters.values()
    assert [(p.name, p.default) for p in found] == list(SIGNATURES[name].items())


# ---- samplers ----


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("kind", ["Uniform", "Bernoulli", "Blockwise"])
def test_layout_of_masks(kind, pair, null):
    sampler = getattr(la, f"{kind}MaskSampler")(49, antithetical_sampling=pair, include_null=null)
    copies = 1 + pair + null
    for seed in (None, 5):
        masks = sampler(4, seed=seed)
        assert masks.shape == (4 * copies, 49)
        assert masks.dtype == torch.float32
        sample = masks[::copies]
        assert set(sample.unique().tolist()) <= {0, 1}
        assert len({tuple(row) for row in sample.tolist()}) > 1
        if pair:
            assert torch.equal(masks[1::copies], 1 - sample)
        if null:
            assert (masks[copies - 1 :: copies] == 1).all()


def test_seeded_masks_are_numpys_draws():
    draws = np.random.default_rng(7).uniform(size=(6, 10))
    wanted = [[float(value > row[0]) for value in row[1:]] for row in draws[::3]]
    assert la.UniformMaskSampler(9)(2, seed=7)[::3].tolist() == wanted
    draws = np.random.default_rng(7).uniform(size=(4, 9))
    wanted = [[float(value < 0.25) for value in row] for row in draws[::2]]
    assert la.BernoulliMaskSampler(9, 0.25, include_null=False)(2, seed=7)[::2].tolist() == wanted


def test_masks_without_a_seed_follow_torchs():
    def draw(seed):
        torch.manual_seed(seed)
        sampler = la.UniformMaskSampler(64)
        return [sampler(3), sampler(3)]

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_blockwise_share_and_errors():
    masks = la.BlockwiseMaskSampler(196, 0.4, False, False)(300, seed=0)
    assert masks.mean(1).min() >= 0.4
    assert 0.45 < masks.mean() < 0.53
    with pytest.raises(ValueError, match="square"):
        la.BlockwiseMaskSampler(10)
    with pytest.raises(ValueError, match="mask_ratio"):
        la.BernoulliMaskSampler(9, mask_ratio=1.5)
    with pytest.raises(ValueError, match="target_ratio"):
        la.BlockwiseMaskSampler(9, target_ratio=1.0)
    assert loss_utils.UniformMaskSampler is la.UniformMaskSampler


# ---- parts ----


def test_mask_layer():
    image = torch.randn(1, 3, 62, 62, dtype=torch.float64)
    mask = torch.tensor([[1.0, 0, 0, 1, 1, 0, 1, 1, 0]], dtype=torch.float64)
    found = la.MaskLayer(62, 20)(image, mask)[0]
    wanted = truth.blank_pixels(image[0], mask[0], 20)
    wanted[:, 60:], wanted[:, :, 60:] = 0, 0  # no patch reads the remainder
    assert torch.equal(found, wanted)
    assert torch.equal(la.MaskLayer(60, 20)(image[..., :60, :60], mask / 2)[0], wanted[:, :60, :60] / 2)
    with pytest.raises(ValueError, match="N = 9"):
        la.MaskLayer(62, 20)(image, torch.ones(1, 16))


def test_transformer_pooling():
    torch.manual_seed(0)
    head = la.TransformerPooling(32, 4, 5, 2).double()
    randomise(head)
    assert {key.partition(".")[0] for key in head.state_dict()} == {"pos_embed", "blocks", "norm"}
    blocks = [timm.models.vision_transformer.Block(32, 4, norm_layer=nn.LayerNorm).double() for _ in range(2)]
    nn.Sequential(*blocks).load_state_dict(head.blocks.state_dict())
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    wanted = head.norm(blocks[1](blocks[0](x + head.pos_embed))).mean(1)
    assert relative_error(head(x), wanted) < 1e-12
    with pytest.raises(ValueError, match="pool_include_prefix"):
        head(x[:, 1:])


def test_attention_dropout_and_masks():
    block = svit.StableBlock(32, 4, attn_drop=0.5, max_attn_val=2.0).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    whole = block.eval()(x)
    torch.manual_seed(0)
    dropped = block.train()(x)
    assert relative_error(dropped, whole) > 1e-3
    block.attn.attn_drop.p = 1e-12
    block.attn.attn_drop.forward = lambda weights: weights  # the path that drops, dropping nothing
    assert relative_error(block(x), whole) < 1e-12
    causal = block.eval()(x, is_causal=True)
    assert relative_error(causal[:, -1], whole[:, -1]) < 1e-12  # the last token sees all
    assert relative_error(causal[:, :1], block(x[:, :1])) < 1e-12
    with pytest.raises(ValueError, match="max_attn_val"):
        svit.StableAttention(32, 4, max_attn_val=0.0)


# ---- teachers and students ----


@pytest.mark.parametrize("name", MODELS)
def test_teacher(name):
    model = make(name).eval()
    images, mask, repeated = batch(model)
    teacher = la.convert_to_teacher_model(copy.deepcopy(model), skip_blocks=1)
    wanted = truth.teacher_targets(model, images, mask.unflatten(0, (2, 3)).bool(), 1).flatten(0, 1)
    assert relative_error(teacher(repeated, mask), wanted) < 1e-12
    teacher.output_scaling.scale *= 3
    assert relative_error(teacher(repeated, mask), 3 * wanted) < 1e-12
    assert set(teacher.state_dict()) - set(model.state_dict()) == {"output_scaling.scale"}
    assert teacher.embed_dim == model.embed_dim
    assert teacher.num_prefix_tokens == model.num_prefix_tokens


def student(encoder, width=40, prefix_only=False, layers=2, target=None):
    """Put together as the training script does it."""
    block, qkv = encoder.blocks[0], getattr(encoder.blocks[0].attn, "qkv", None)
    heads, patches = block.attn.num_heads, encoder.patch_embed.num_patches
    target = target or encoder.embed_dim
    encoder = la.convert_to_student_model(encoder, output_dim=width)
    decoder = la.MaskEmbedDecoder(
        embed_dim=width,
        num_heads=2 if width % heads else heads,
        num_patch_tokens=patches,
        num_prefix_tokens=encoder.num_prefix_tokens,
        output_size=target,
        num_layers=layers,
        prefix_only=prefix_only,
        qkv_bias=qkv is None or qkv.bias is not None,
        init_values=1e-6,
        norm_layer=type(encoder.norm),
        act_layer=type(block.mlp.act),
        mlp_layer=type(block.mlp),
    )
    return la.MaskEmbedStudent(encoder, decoder).double()


@pytest.mark.parametrize(
    ("name", "cap"), [(name, None) for name in MODELS] + [(f"s{name}", 30.0) for name in list(MODELS)[:3]]
)
def test_student_and_its_gradients(name, cap):
    ours = student(make(name))
    assert not ours.encoder.head.weight.any()
    assert not ours.encoder.head.bias.any()
    randomise(ours)
    plain = name.removeprefix("s") if cap else name
    wanted = truth.StudentTruth(
        plain, cap=cap, target_dim=ours.encoder.embed_dim, width=40, decoder_heads=2, depth=3,
        decoder_qkv_bias=ours.decoder.blocks[0].attn.qkv.bias is not None, **MODELS[plain],
    ).double()  # fmt: skip
    wanted.load_state_dict(ours.state_dict())
    images, mask, _ = batch(ours.encoder)
    visible = mask.unflatten(0, (2, 3)).bool()
    predictions = ours(images, mask), wanted(images, visible).flatten(0, 1)
    assert relative_error(*predictions) < 1e-10
    cotangent = torch.randn_like(predictions[0])
    gradients = []
    for model, prediction in zip((ours, wanted), predictions, strict=True):
        (prediction * cotangent).sum().backward()
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    gradients[1] = {key: gradients[1][key] for key in gradients[0]}
    assert gradient_error(*gradients) < 1e-8


def test_norms_are_renewed_and_the_mlp_head_starts_at_zero():
    model = make()
    encoder = la.convert_to_student_model(model, 24, output_head="mlp")
    assert encoder is model
    assert (encoder.norm.weight == 1).all()
    assert not encoder.norm.bias.any()
    assert encoder.head.fc1.out_features == encoder.blocks[0].mlp.fc1.out_features
    assert encoder.double()(batch(encoder)[0]).abs().max() == 0
    with pytest.raises(ValueError, match="'linear' or 'mlp'"):
        la.convert_to_student_model(make(), 24, "conv")


@pytest.mark.parametrize("name", [ONE, "vit_base_patch16_siglip_224", "vit_small_patch14_reg4_dinov2"])
def test_prefix_only_predicts_each_image_its_own_vector(name):
    model = make(name).eval()
    images, mask, repeated = batch(model)
    teacher = la.convert_to_teacher_model(copy.deepcopy(model), prefix_only=True)
    ours = student(copy.deepcopy(model), prefix_only=True)
    randomise(ours)
    targets, predictions = teacher(repeated, mask), ours(images, mask)
    assert targets.shape == predictions.shape == (6, 1, model.embed_dim)
    blanked = [
        truth.blank_pixels(x, m, model.patch_embed.patch_size[0]) for x, m in zip(repeated, mask, strict=True)
    ]
    pooled = model.forward_head(model.forward_features(torch.stack(blanked)))
    assert relative_error(targets[:, 0], pooled) < 1e-12
    each = torch.stack([((p - t) ** 2).mean() for p, t in zip(predictions[:, 0], pooled, strict=True)]).mean()
    assert relative_error(functional.mse_loss(predictions, targets), each) < 1e-12


def test_bad_conversions():
    with pytest.raises(ValueError, match="skip_blocks=0"):
        la.convert_to_teacher_model(make(), 1, prefix_only=True)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        la.convert_to_teacher_model(make(), 3)
    with pytest.raises(ValueError, match="square"):
        la.convert_to_teacher_model(make(img_size=(64, 32)))
    ours = student(make())
    images, mask, _ = batch(ours.encoder)
    with pytest.raises(ValueError, match="multiple of the 2 images"):
        ours(images, mask[:5])
    with pytest.raises(RuntimeError, match="0 and 1 only"):
        ours(images, mask / 2)


@pytest.mark.parametrize("name", MODELS)
def test_masked_image_modeling(name):
    model = make(name).eval()
    images, mask, repeated = batch(model)
    teacher = la.convert_to_mim_teacher_model(copy.deepcopy(model))
    assert relative_error(teacher(images), model.forward_features(images)) < 1e-12
    ours = la.convert_to_mim_student_model(copy.deepcopy(model), 24).double()
    randomise(ours)
    wanted = truth.StudentTruth(
        name, cap=None, target_dim=24, layers=0, decoder_heads=1, depth=3, **MODELS[name]
    )
    wanted.double().encoder.load_state_dict(ours.state_dict())
    patch = model.patch_embed.patch_size[0]
    blanked = torch.stack([truth.blank_pixels(x, m, patch) for x, m in zip(repeated, mask, strict=True)])
    assert relative_error(ours(repeated, mask), wanted.encoder(blanked)) < 1e-12


def test_grad_checkpointing_changes_no_gradient():
    ours = student(make(f"s{ONE}")).train()
    randomise(ours)
    images, mask, _ = batch(ours.encoder)
    gradients = []
    for enable in (False, True):
        ours.set_grad_checkpointing(enable=enable)
        assert ours.encoder.grad_checkpointing is enable
        ours.zero_grad()
        ours(images, mask).square().mean().backward()
        gradients.append({k: p.grad.clone() for k, p in ours.named_parameters() if p.grad is not None})
    assert gradient_error(*gradients) < 1e-12


# ---- backbones ----

STABLE = [
    *(f"{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
    *(f"base_patch16_{kind}_224" for kind in ("mocov3", "clip", "clip_quickgelu", "siglip")),
    *(f"large_patch14_clip_quickgelu_{size}" for size in (224, 336)),
    *(f"base_patch14_{kind}" for kind in ("dinov2", "reg4_dinov2")),
    *(f"so400m_patch14_siglip_{size}" for size in (224, 384)),
]


@pytest.mark.parametrize("name", STABLE)
def test_svit_models(name):
    with torch.device("meta"):
        model = timm.create_model(f"svit_{name}", depth=1, num_classes=0, max_attn_val=7.0)
        plain = timm.create_model(f"vit_{name}", depth=1, num_classes=0)
    assert timm.is_model(f"svit_{name}")
    assert model.blocks[0].attn.max_attn_val == 7.0
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, plain)]
    assert shapes[0] == shapes[1]
    assert getattr(svit, f"svit_{name}").__name__ == f"svit_{name}"


def test_svit_takes_timms_tags():
    with torch.device("meta"):
        model = timm.create_model("svit_base_patch16_clip_quickgelu_224.openai", depth=1)
    assert model.pretrained_cfg["tag"] == "openai"
    assert model.blocks[0].attn.max_attn_val == 30.0


def test_capped_features_differ_from_plain_ones_and_equal_the_truth():
    model, plain = make(f"s{ONE}", max_attn_val=0.05).eval(), make(ONE).eval()
    plain.load_state_dict(model.state_dict())
    images = batch(model)[0]
    uncapped = plain.forward_features(images)
    for block in plain.blocks:
        block.attn = truth.CappedAttention(block.attn, 0.05)
    assert relative_error(model.forward_features(images), plain.forward_features(images)) < 1e-12
    assert relative_error(model.forward_features(images), uncapped) > 1e-3


def test_moco_position_is_fixed():
    model = moco.VisionTransformerMoCo(img_size=48, patch_size=16, embed_dim=16, depth=1, num_heads=2)
    row, column, quarter = 2, 1, 4
    token = model.pos_embed[0, 1 + row * 3 + column]
    for k in range(quarter):  # MoCo-v3 lets the first half follow the outer index
        angle = 10000 ** -(k / quarter)
        wanted = (
            math.sin(row * angle),
            math.cos(row * angle),
            math.sin(column * angle),
            math.cos(column * angle),
        )
        assert token[k::quarter].tolist() == pytest.approx(wanted, abs=1e-6)
    assert not model.pos_embed.requires_grad
    assert not model.pos_embed[0, 0].any()
    assert model.blocks[0].attn.qkv.weight.abs().max() <= math.sqrt(6 / 32)
    frozen = moco.VisionTransformerMoCo(stop_grad_conv1=True, img_size=32, embed_dim=16, depth=1, num_heads=2)
    assert not frozen.patch_embed.proj.weight.requires_grad


def test_moco_is_registered():
    with pytest.raises(UserError, match="no tag"):
        timm.create_model("vit_base_patch16_mocov3_224.other")
    model = timm.create_model("vit_base_patch16_mocov3_224", img_size=32, depth=1, num_classes=0)
    assert model.pretrained_cfg["crop_pct"] == 0.875
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.485, 0.456, 0.406)


def test_conv_stem():
    stem = moco.ConvStem(img_size=32, embed_dim=16)
    assert stem(torch.randn(2, 3, 32, 32)).shape == (2, stem.num_patches, 16)
    assert [layer.out_channels for layer in stem.proj if isinstance(layer, nn.Conv2d)] == [2, 4, 8, 16, 16]
    with pytest.raises(ValueError, match="patch_size 16"):
        moco.ConvStem(patch_size=8)


# ---- checkpoints ----


def save(folder, model, epochs=1, metrics=None, **options):
    args = argparse.Namespace(
        model="svit_tiny_patch16_224", betas=(0.9, 0.95), folder=Path("x"), extra={"a": 1}
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    saver = la.CheckpointSaver(
        model,
        optimizer,
        args,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
        decreasing=True,
        **options,
    )
    best = [saver.save_checkpoint(e, None if metrics is None else metrics[e]) for e in range(epochs)]
    return saver, best


def test_a_checkpoint_is_plain_and_resumes(tmp_path):
    model = student(make(f"s{ONE}", depth=1))
    saver, _ = save(tmp_path, model)
    saver.save_recovery(0, 3)
    assert (tmp_path / "recovery-0-3.pth.tar").is_file()
    state = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert state["args"] == {
        "model": "svit_tiny_patch16_224", "betas": [0.9, 0.95], "folder": "x", "extra": {"a": 1}
    }  # fmt: skip
    assert state["softcap"] == 30.0
    assert state["arch"] == "svit_tiny_patch16_224"
    other = student(make(f"s{ONE}", depth=1))
    randomise(other)
    assert timm.models.resume_checkpoint(other, str(tmp_path / "last.pth.tar")) == 1
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_the_best_and_every_third_checkpoint_stay(tmp_path):
    model = nn.Linear(2, 2)
    metrics = [0.9, 0.5, 0.7, 0.6, 0.4, 0.8]
    _, best = save(tmp_path, model, 6, metrics, max_history=2, retain_interval=3)
    assert best[-1] == (0.4, 4)
    # the two best are 1 and 4; epoch 2 is a third one, epoch 5 was never among the best
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{e}.pth.tar" for e in (1, 2, 4)
    ]
    assert torch.load(tmp_path / "model_best.pth.tar", weights_only=True)["epoch"] == 4


def test_a_student_fits_a_plain_backbone_without_layer_scale(tmp_path):
    """The factor goes into the layer before it; pooling goes; the soft-cap's loss is named."""
    scaled = make(f"s{ONE}", init_values=0.3)
    ours = student(scaled)
    randomise(ours)
    save(tmp_path, ours)
    plain = make(f"s{ONE}", global_pool="avg").eval()
    missing, extra = la.load_checkpoint_auto(plain, str(tmp_path / "last.pth.tar"), strict=False)
    assert {key.partition(".")[0] for key in extra} == {"head", "norm"}
    assert {key.partition(".")[0] for key in missing} == {"fc_norm"}
    assert plain.global_pool is None
    images = batch(scaled)[0]
    wanted = ours.encoder.eval().forward_intermediates(images, norm=False, intermediates_only=True)[-1]
    found = plain.forward_intermediates(images, norm=False, intermediates_only=True)[-1]
    assert relative_error(found, wanted) < 1e-12
    with pytest.warns(UserWarning, match="capped at 30"):
        la.load_checkpoint_auto(make(), str(tmp_path / "last.pth.tar"), strict=False)


def test_a_student_fits_itself_and_averages_are_preferred(tmp_path):
    ours = student(make(depth=1))
    average = {f"_orig_mod.module.{key}": value + 1 for key, value in ours.state_dict().items()}
    namespace = argparse.Namespace(model=ONE)
    path = tmp_path / "old.pth.tar"
    torch.save({"state_dict": ours.state_dict(), "state_dict_ema": average, "args": namespace}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for use_ema in (True, False):
            other = copy.deepcopy(ours)
            la.load_checkpoint_auto(other, str(path), use_ema=use_ema)
            shift = 1.0 if use_ema else 0.0
            assert torch.equal(other.decoder.head.bias, ours.decoder.head.bias + shift)
    marked = tmp_path / "arch.pth.tar"
    namespace.model = f"s{ONE}"
    for arguments, cap in (
        ({}, 30),
        ({"args": namespace}, 30),
        ({"args": {"model_kwargs": {"max_attn_val": 7}}}, 7),
    ):
        torch.save({"state_dict": ours.state_dict(), "arch": f"s{ONE}", **arguments}, marked)
        with pytest.warns(UserWarning, match=f"capped at {cap},"):
            la.load_checkpoint_auto(copy.deepcopy(ours), marked)


def test_bad_checkpoints(tmp_path):
    model = nn.Linear(2, 2)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*gone"):
        la.load_checkpoint(model, str(tmp_path / "gone.pth"))
    with pytest.raises(NotImplementedError, match="NumPy"):
        la.load_checkpoint(model, str(tmp_path / "x.npz"))
    (tmp_path / "broken.pth").write_bytes(b"no zip")
    with pytest.raises(UserError, match="damaged, or not written by torch"):
        la.load_checkpoint(model, str(tmp_path / "broken.pth"))
    torch.save({"state_dict": model.state_dict(), "code": SimpleNamespace(a=1)}, tmp_path / "code.pth")
    with pytest.raises(UserError, match=r"pickles types.SimpleNamespace.*nothing of it was run"):
        la.load_checkpoint(model, str(tmp_path / "code.pth"))
    assert train_utils.clean_state_dict({"module._orig_mod.module.a.module.b": 1}) == {"a.module.b": 1}
    assert model_utils.Scale(2)(torch.ones(1)).item() == 2


# ---- run ----

SCRIPT = """
import argparse

import timm
import torch
import yaml
from torch.nn.parallel import DistributedDataParallel
from torchinfo import summary

import locality_alignment.backbones.svit
from locality_alignment import MaskEmbedDecoder, MaskEmbedStudent, UniformMaskSampler
from locality_alignment import convert_to_student_model, convert_to_teacher_model
from locality_alignment.loss_utils import UniformMaskSampler as Same

assert Same is UniformMaskSampler
parser = argparse.ArgumentParser()
group = parser.add_argument_group("masks")
group.add_argument("--steps", type=int, default=1)
group.add_argument("--pretrained", type=bool, default=True)
group.add_argument("--pair", action="store_true", default=True)
group.add_argument("--whole", action="store_true")
parser.set_defaults(**yaml.safe_load("{step: 3, whole: true}"))
args = parser.parse_args()
torch.manual_seed(0)
options = dict(pretrained=args.pretrained, num_classes=0, img_size=32, depth=2)
teacher = convert_to_teacher_model(timm.create_model("vit_tiny_patch16_224", **options), skip_blocks=1)
encoder = convert_to_student_model(timm.create_model("svit_tiny_patch16_224", **options), output_dim=192)
student = MaskEmbedStudent(encoder, MaskEmbedDecoder(192, 3, 4, 1, 192, 2))
print(summary(student, verbose=0))
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
student = DistributedDataParallel(student, device_ids=[torch.device("cpu")])
sampler = UniformMaskSampler(4, args.pair, args.whole)
images = torch.randn(2, 3, 32, 32)
optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
for _ in range(args.steps):
    mask = sampler(2)
    with torch.no_grad():
        target = teacher(images.repeat_interleave(len(mask) // 2, 0), mask)
    loss = torch.nn.functional.mse_loss(student(images, mask), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print("loss", len(mask), loss.item())
torch.distributed.destroy_process_group()
torch.jit.script(teacher)
"""


@pytest.mark.slow
def test_run_a_script(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    options = ["--steps", "2", "--pretrained", "False", "--pair", "False", "--whole", "no"]
    line = [sys.executable, "-m", "fastalign.compat", "run", str(script), *options]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr  # of its last line
    assert result.stderr.splitlines()[-1].startswith(
        "fastalign.compat: TorchScript of models is not supported"
    )
    losses = [line.split() for line in result.stdout.splitlines() if line.startswith("loss")]
    assert [line[1] for line in losses] == ["2", "2"]
    assert 0 < float(losses[1][2]) < float(losses[0][2]) < 3
    assert "MaskEmbedStudent" in result.stdout
    assert "'step' is no option of this script; did you mean steps?" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "usage"), (["walk", "x.py"], "usage"), (["run", "gone.py"], "no script at gone.py")],
)
def test_run_refuses_in_one_line(arguments, message, capsys):
    assert command.main(arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken.pth", "broken.pth is not a weights file"),
        ("gone.pth", "no checkpoint at"),
        ("x.npz", "NumPy's files"),
    ],
)
def test_run_says_in_one_line_what_is_wrong_with_a_file(name, message, tmp_path, monkeypatch, capsys):
    script = tmp_path / "load.py"
    (tmp_path / "broken.pth").write_bytes(b"no zip")
    script.write_text(
        "import sys, torch, fastalign.compat.locality_alignment as la\n"
        "la.load_checkpoint(torch.nn.Linear(1, 1), sys.argv[1])\n"
    )
    monkeypatch.setattr(command, "install", lambda: None)
    monkeypatch.setattr(command.shims, "install", lambda: None)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert command.main(["run", str(script), str(tmp_path / name)]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1
