"""Weights as other libraries save them, against the tokens of the library that made them."""

import json
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import fastalign as fa
from fastalign.backbones.vit import ViT
from fastalign.backbones.weight_files import HF_DEFAULTS
from tests.backbones.helpers import AT_16, CLIP, DINO, DINOV3, HF, IMAGES, REGISTERS, SIGLIP, SMALL, VIT
from tests.numerics import randomise, relative_error

NO_BIAS, GATED = DINOV3.removesuffix("_qkvb"), "vit_small_plus_patch16_dinov3_qkvb"
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}


def check(name: str, path: Path, tokens: Tensor, images: Tensor = IMAGES, **kwargs) -> ViT:
    """Our backbone with the weights at a path, whose tokens are the given ones."""
    vit = fa.create_backbone(name, checkpoint=path, **{**SMALL, **kwargs}).eval()
    assert relative_error(vit.forward_features(images), tokens.double()) < 1e-5
    return vit


def saved(model: nn.Module, folder: Path, **options) -> nn.Module:
    """A model of transformers with random weights, saved in a folder."""
    randomise(model.eval(), 0.2)
    model.save_pretrained(folder, **options)
    return model


def last(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    return model(images).last_hidden_state


def transformers_models() -> dict:
    """Of each: our name and arguments, the model, and its tokens."""
    t = transformers
    text = {**TEXT, "vocab_size": 2000, "max_position_embeddings": 4}
    siglip = t.SiglipVisionConfig(**HF, hidden_act="gelu_pytorch_tanh")
    no_head = t.SiglipVisionConfig(**HF, vision_use_head=False, hidden_act="gelu")
    vit = t.ViTConfig(**HF, layer_norm_eps=1e-6)
    plain = {k: v for k, v in HF.items() if k != "intermediate_size"}
    gated = {"use_gated_mlp": True, "hidden_act": "silu"}
    registers = t.Dinov2WithRegistersConfig(**plain, num_register_tokens=4)

    def clips(model):
        return model.post_layernorm(last(model))

    def dinov3(**changes):
        return t.DINOv3ViTModel(t.DINOv3ViTConfig(**HF, num_register_tokens=4, **changes))

    clip = t.CLIPModel(t.CLIPConfig(vision_config=HF, text_config=text))
    return {
        "CLIP": (CLIP, {}, t.CLIPVisionModel(t.CLIPVisionConfig(**HF)), clips),
        "CLIP with text": (CLIP, {}, clip, lambda model: clips(model.vision_model)),
        "SigLIP": (SIGLIP, {"act_layer": "gelu_tanh"}, t.SiglipVisionModel(siglip), last),
        "SigLIP without pooling": (SIGLIP, {}, t.SiglipVisionModel(no_head), last),
        "DINOv2": (DINO, AT_16, t.Dinov2Model(t.Dinov2Config(**plain)), last),
        "registers": (REGISTERS, AT_16, t.Dinov2WithRegistersModel(registers), last),
        "DINOv3": (DINOV3, {}, dinov3(), last),
        "DINOv3 without bias": (NO_BIAS, {}, dinov3(query_bias=False, value_bias=False), last),
        "DINOv3 with a gated MLP": (GATED, {"mlp_ratio": 4}, dinov3(**gated), last),
        "ViT": (VIT, {}, t.ViTModel(vit), last),
        "ViT's classifier": (VIT, {}, t.ViTForImageClassification(vit), lambda model: last(model.vit)),
    }


@pytest.mark.parametrize("kind", ["folder", "shards", "bin", "in memory"])
@pytest.mark.parametrize("name", transformers_models())
@torch.no_grad()
def test_towers_of_transformers(tmp_path, name, kind):
    timm_name, kwargs, model, tokens = transformers_models()[name]
    saved(model, tmp_path, max_shard_size="20KB" if kind == "shards" else "5GB")
    path = tmp_path
    if kind == "in memory":  # transformers 5 has other names there than in its files
        path = tmp_path / "memory" / "a.pth"
        path.parent.mkdir()
        torch.save(model.state_dict(), path)
    elif kind == "shards":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        vision = {file for key, file in index.items() if not key.startswith("text_model.")}
        others = set(index.values()) - vision
        assert (name == "CLIP with text") == bool(others)
        for file in others:  # the shards of the vision model are enough
            (tmp_path / file).unlink()
    elif kind == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    vit = check(timm_name, path, tokens(model), **kwargs)
    if name == "SigLIP":
        assert relative_error(vit(IMAGES), model(IMAGES).pooler_output.double()) < 1e-5
    if name == "SigLIP without pooling":
        assert (vit.pool, vit.attn_pool) == ("none", None)


def test_biases_that_the_backbone_lacks_must_be_zero(tmp_path):
    """Published DINOv3 has zero biases in sizes B and L, and timm a name without any."""
    config = transformers.DINOv3ViTConfig(**HF, num_register_tokens=4)
    model, name = saved(transformers.DINOv3ViTModel(config), tmp_path), DINOV3.removesuffix("_qkvb")
    with pytest.raises(fa.UserError, match=r"another model: it also has blocks\.0\.attn\.[qv]_bias"):
        fa.create_backbone(name, checkpoint=tmp_path, **SMALL)
    for key, value in model.state_dict().items():
        if key.endswith(("q_proj.bias", "v_proj.bias")):
            value.zero_()
    model.save_pretrained(tmp_path)
    check(name, tmp_path, last(model))


@pytest.mark.parametrize("kind", HF_DEFAULTS)
def test_defaults_of_transformers_apply_to_keys_that_config_json_omits(tmp_path, kind):
    config = transformers.AutoConfig.for_model(kind)
    assert HF_DEFAULTS[kind] == {key: getattr(config, key) for key in HF_DEFAULTS[kind]}
    torch.save(timm.create_model(VIT, num_classes=0, **SMALL).state_dict(), tmp_path / "a.pth")
    config = {"model_type": "x", "vision_config": {"model_type": kind}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    heads = HF_DEFAULTS[kind]["num_attention_heads"]
    with pytest.raises(fa.UserError, match=f"num_attention_heads={heads}, the backbone has 3"):
        fa.create_backbone(VIT, checkpoint=tmp_path / "a.pth", **SMALL)


@torch.no_grad()
def test_a_wide_table_has_the_sizes_in_config_json(tmp_path):
    """2x8 patches, a square number."""
    config = transformers.ViTConfig(**{**HF, "image_size": (32, 128)}, layer_norm_eps=1e-6)
    model, images = saved(transformers.ViTModel(config), tmp_path), torch.randn(2, 3, 32, 128)
    check(VIT, tmp_path, last(model, images), images, img_size=(32, 128))


@torch.no_grad()
def test_siglip_2_of_any_size(tmp_path):
    """Its patches come flat, [height, width, channel], and so does its patch embedding."""
    sizes = {key: value for key, value in HF.items() if key != "image_size"}
    config = transformers.Siglip2VisionConfig(**sizes, num_patches=4, hidden_act="gelu")
    model = saved(transformers.Siglip2VisionModel(config), tmp_path)
    patches = IMAGES.unflatten(3, (2, 16)).unflatten(2, (2, 16)).permute(0, 2, 4, 3, 5, 1)
    patches = patches.flatten(3).flatten(1, 2)
    wanted = model(patches, torch.ones(2, 4), torch.tensor([[2, 2]] * 2)).last_hidden_state
    check(SIGLIP, tmp_path, wanted)
