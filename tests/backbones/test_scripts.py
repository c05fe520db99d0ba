"""Checkpoints of other projects' training scripts, with the names that each gives to timm's parameters, by hand."""

import pytest
import torch

import fastalign as fa
from tests.backbones.helpers import CLIP, DINO, DINOV3, IMAGES, ONE, REGISTERS, SMALL, VIT, random_timm
from tests.numerics import relative_error


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def chunked(state: dict) -> dict:
    """As dinov2 with block_chunks=2: chunks of one block each here; a block keeps its number within."""
    return renamed(state, {"blocks.0.": "blocks.0.0.", "blocks.1.": "blocks.1.1."})


def dinov2s(state: dict) -> dict:
    """timm's registers and class token under dinov2's names, where the class token has a position of its own."""
    state = renamed(state, {"reg_token": "register_tokens"}) | {"mask_token": torch.zeros(1, 48)}
    if "register_tokens" in state:
        place = torch.randn(1, 1, 48)
        state["cls_token"] = state["cls_token"] - place
        state["pos_embed"] = torch.cat([place, state["pos_embed"]], 1)
    return state


def dinov3s(state: dict) -> dict:
    """Biases of query, key and value in one, of which a mask removes the keys', and what only training needs."""
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    more = {"mask_token": ONE, "rope_embed.periods": ONE, "local_cls_norm.weight": ONE}
    for block in range(2):
        q, v = (state.pop(f"blocks.{block}.attn.{part}_bias") for part in "qv")
        more[f"blocks.{block}.attn.qkv.bias"] = torch.cat([q, torch.randn(48), v])
        more[f"blocks.{block}.attn.qkv.bias_mask"] = torch.cat([0 * q + 1, 0 * q, 0 * q + 1])
    return renamed(state, names) | more


def renamed(state: dict, names: dict[str, str]) -> dict:
    """Keys in which each name is replaced by the other, in order."""
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


OPEN_CLIP = {
    **{"patch_embed.proj": "conv1", "pos_embed": "positional_embedding", "cls_token": "class_embedding"},
    **{"attn_pool.norm": "attn_pool.layernorm", "attn_pool.latent": "attn_pool.probe", "norm_pre": "ln_pre"},
    **{"attn_pool.proj": "attn_pool.attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
    **{"norm1": "ln_1", "norm2": "ln_2", "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj"},
    **{"blocks.": "transformer.resblocks.", "gamma_1": "ls_1.gamma", "gamma_2": "ls_2.gamma"},
}


def open_clips(state: dict) -> dict:
    """A vision tower, with Perception Encoder's LayerScale and attention pooling if there are, and other parts."""
    for kind in ("weight", "bias"):
        state[f"ln_post.{kind}"] = state.pop(f"norm.{kind}")
        if f"attn_pool.q.{kind}" in state:
            joint = torch.cat([state.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")])
            state[f"attn_pool.attn.in_proj_{kind}"] = joint
    state = renamed(state, OPEN_CLIP) | {"proj": torch.randn(48, 24)}
    state["class_embedding"] = state["class_embedding"][0, 0]
    state["positional_embedding"] = state["positional_embedding"][0]
    text = {"positional_embedding": torch.randn(4, 8), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    return prefixed("visual.", state) | text | {"logit_scale": ONE, "ln_final.weight": ONE}


def apples(state: dict) -> dict:
    state["trunk.post_trunk_norm.weight"] = state.pop("norm.weight")
    names = {"norm1": "norm_1", "norm2": "norm_2", "mlp.fc1_g": "mlp.fc1", "mlp.fc1_x": "mlp.fc3"}
    names |= {"blocks.": "trunk.blocks.", "patch_embed.": "preprocessor.patchifier."}
    return renamed(state, names | {"pos_embed": "preprocessor.pos_embed"})


def maes(state: dict) -> dict:
    decoder = {"decoder_embed.weight": (8, 48), "decoder_pos_embed": (1, 5, 8), "decoder_norm.weight": (8,)}
    decoder |= {"decoder_blocks.0.norm1.weight": (8,), "decoder_pred.bias": (768,), "mask_token": (1, 1, 8)}
    return state | {key: torch.randn(shape) for key, shape in decoder.items()}


def heads(prefix: str) -> dict:
    return {f"{prefix}mlp.0.weight": torch.randn(4, 48), f"{prefix}last_layer.weight": torch.randn(4, 4)}


def lightnings(state: dict) -> dict:
    weights = prefixed("model.", state | {"head.weight": ONE}) | {"criterion.scale": ONE}
    return {"state_dict": weights, "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}}}


AIM, PE = "aimv2_large_patch14_224", "vit_pe_core_base_patch16_224"
MODELS = {"dinov2's teacher": DINO, "dinov2's whole model": REGISTERS, "dinov3's teacher": DINOV3}
MODELS |= {"Perception Encoder": PE, "open_clip": CLIP, "AIMv2": AIM}
MORE = {AIM: {"mlp_ratio": 4}, PE: {"init_values": 0.1, "attn_pool_num_heads": 3}}
SCRIPTS = {
    "dinov2's teacher": lambda x, y: {"teacher": prefixed("backbone.", chunked(dinov2s(x))) | heads("dino_head.")},
    "dinov2's whole model": lambda x, y: {
        "model": prefixed("student.backbone.", dinov2s(y)) | prefixed("teacher.backbone.", dinov2s(x))
    },
    "dinov3's teacher": lambda x, y: {"teacher": prefixed("backbone.", chunked(dinov3s(x))) | heads("dino_head.")},
    "Perception Encoder": lambda x, y: open_clips(x),
    "open_clip": lambda x, y: {"epoch": 1, "state_dict": prefixed("module.", open_clips(x))},
    "open_clip around timm": lambda x, y: prefixed("visual.trunk.", x) | {"visual.head.proj.weight": ONE},
    "AIMv2": lambda x, y: apples(x),
    "DINO": lambda x, y: {
        "student": prefixed("module.backbone.", y) | heads("module.head."),
        "teacher": prefixed("backbone.", x) | heads("head."),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "dino_loss": {"center": torch.zeros(1, 4)},
    },
    "MAE": lambda x, y: {"model": maes(x), "optimizer": {}, "epoch": 1, "scaler": {}},
    "MoCo-v3": lambda x, y: {
        "state_dict": prefixed("module.base_encoder.", x | {"head.0.weight": torch.ones(4, 48)})
        | prefixed("module.momentum_encoder.", y)
    },
    "Lightning": lambda x, y: lightnings(x),
    "FSDP": lambda x, y: renamed(x, {"blocks.1.": "blocks.1._fsdp_wrapped_module."}),
    "I-JEPA": lambda x, y: {"encoder": prefixed("module.", x), "target_encoder": prefixed("module.", y), "epoch": 1},
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
@torch.no_grad()
def test_checkpoints_of_training_scripts(tmp_path, script):
    """`y` are weights that must not be read."""
    name, save = MODELS.get(script, VIT), SCRIPTS[script]
    kwargs = SMALL if name == VIT else {**SMALL, "patch_size": 16, **MORE.get(name, {})}
    model, other = (random_timm(name, **kwargs) for _ in range(2))
    torch.save(save(model.state_dict(), other.state_dict()), tmp_path / "last.ckpt")
    vit = fa.create_backbone(name, checkpoint=tmp_path / "last.ckpt", **kwargs).eval()
    found, wanted = vit.forward_features(IMAGES), model.forward_features(IMAGES)
    if name == REGISTERS:  # a sum that is taken apart and added up again
        assert relative_error(found, wanted.double()) < 1e-6
    else:
        assert torch.equal(found, wanted)


def test_the_dinov3_of_its_authors_is_not_read_without_its_biases(tmp_path):
    """timm's own function leaves them out where the model has none."""
    torch.save(dinov3s(random_timm(DINOV3, **SMALL).state_dict()), tmp_path / "a.pth")
    with pytest.raises(fa.UserError, match=r"it also has blocks\.0\.attn\.[qv]_bias"):
        fa.create_backbone(DINOV3.removesuffix("_qkvb"), checkpoint=tmp_path / "a.pth", **SMALL)


@torch.no_grad()
def test_radio(tmp_path):
    """NVIDIA's files: a table of 8x8 positions, which timm's NaFlexVit resamples as NVIDIA does."""
    kwargs = {**SMALL, "pos_embed_grid_size": (8, 8)}
    model = random_timm("naflexvit_base_patch16_radio_v3", **kwargs)
    state = {key.removeprefix("embeds."): value for key, value in model.state_dict().items()}
    weight = state.pop("proj.weight").unflatten(1, (16, 16, 3)).permute(0, 3, 1, 2).flatten(1)
    model.embeds.proj.bias.zero_()
    file = {key: value for key, value in state.items() if key.startswith("blocks.")}
    file |= {
        "patch_generator.embedder.weight": weight,
        "patch_generator.pos_embed": state["pos_embed"].flatten(1, 2),
    }
    file["patch_generator.cls_token.token"] = torch.cat([state["cls_token"], state["reg_token"]], 1)[0]
    torch.save(prefixed("radio_model.model.", file), tmp_path / "a.pth")
    vit = fa.create_backbone("naflexvit_base_patch16_radio_v3", checkpoint=tmp_path / "a.pth", **SMALL).eval()
    assert relative_error(vit.forward_features(IMAGES), model.forward_features(IMAGES)) < 1e-6
    with pytest.raises(fa.UserError, match="layout of NVIDIA's C-RADIO"):
        fa.create_backbone("vit_base_patch16_radio_v3", checkpoint=tmp_path / "a.pth", **SMALL)
