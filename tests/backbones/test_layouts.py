"""Weights as other libraries and training scripts save them, against the tokens of the library that made them."""

import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastalign as fa
from fastalign.backbones.layouts import HF_DEFAULTS
from fastalign.training.build import make_backbone
from tests.numerics import randomise, relative_error

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
HF = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 32,
    "patch_size": 16,
}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
ONE = torch.ones(1)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))

CLIP, SIGLIP, VIT = (
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_224",
)
DINO, REGISTERS = "vit_base_patch14_dinov2", "vit_base_patch14_reg4_dinov2"
AT_16 = {"patch_size": 16}


def transformers_models() -> dict:
    """Of each: our name and arguments, the model, and its tokens."""
    t, tanh = transformers, {"hidden_act": "gelu_pytorch_tanh"}
    text = {**TEXT, "vocab_size": 2000, "max_position_embeddings": 4}
    clip, siglip = t.CLIPVisionConfig(**HF), t.SiglipVisionConfig(**HF, **tanh)
    plain = {k: v for k, v in HF.items() if k != "intermediate_size"}

    def last(model, images):
        return model(images).last_hidden_state

    def clips(model, images):
        return model.post_layernorm(last(model, images))

    def inner(model, images):
        return last(model.vit, images)

    return {
        "CLIP": (CLIP, {}, t.CLIPVisionModel(clip), clips),
        "CLIP with text": (
            CLIP,
            {},
            t.CLIPModel(t.CLIPConfig(vision_config=HF, text_config=text)),
            lambda model, images: clips(model.vision_model, images),
        ),
        "SigLIP": (SIGLIP, {"act_layer": "gelu_tanh"}, t.SiglipVisionModel(siglip), last),
        "DINOv2": (DINO, AT_16, t.Dinov2Model(t.Dinov2Config(**plain)), last),
        "registers": (
            REGISTERS,
            AT_16,
            t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**plain, num_register_tokens=4)),
            last,
        ),
        "ViT": (VIT, {}, t.ViTModel(t.ViTConfig(**HF, layer_norm_eps=1e-6)), last),
        "ViT's classifier": (
            VIT,
            {},
            t.ViTForImageClassification(t.ViTConfig(**HF, layer_norm_eps=1e-6)),
            inner,
        ),
    }


@pytest.mark.parametrize("kind", ["folder", "pieces", "bin", "in memory"])
@pytest.mark.parametrize("name", transformers_models())
@torch.no_grad()
def test_towers_of_transformers(tmp_path, name, kind):
    timm_name, kwargs, model, tokens = transformers_models()[name]
    randomise(model.eval(), 0.2)
    path = tmp_path
    if kind == "in memory":  # transformers 5 has other names there than in its files
        path = tmp_path / "a.pth"
        torch.save(model.state_dict(), path)
    else:
        model.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "pieces" else "5GB")
    if kind == "pieces":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        vision = {file for key, file in index.items() if not key.startswith("text_model.")}
        others = set(index.values()) - vision
        assert (name == "CLIP with text") == bool(others)
        for file in others:  # the pieces of the vision model are enough
            (tmp_path / file).unlink()
    elif kind == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    vit = make_backbone("student.weights", timm_name, str(path), {**SMALL, **kwargs}).eval()
    assert relative_error(vit.forward_features(IMAGES), tokens(model, IMAGES).double()) < 1e-5
    if name == "SigLIP":
        assert relative_error(vit(IMAGES), model(IMAGES).pooler_output.double()) < 1e-5


@torch.no_grad()
def test_a_siglip_tower_without_its_pooling_head(tmp_path):
    config = transformers.SiglipVisionConfig(**HF, vision_use_head=False, hidden_act="gelu")
    model = transformers.SiglipVisionModel(config).eval()
    randomise(model, 0.2)
    model.save_pretrained(tmp_path)
    vit = fa.create_backbone(SIGLIP, checkpoint=tmp_path, **SMALL).eval()
    assert (vit.pool, vit.attn_pool) == ("none", None)
    assert relative_error(vit.forward_features(IMAGES), model(IMAGES).last_hidden_state.double()) < 1e-5


@pytest.mark.parametrize("kind", HF_DEFAULTS)
def test_defaults_of_transformers_hold_where_config_json_is_silent(tmp_path, kind):
    config = transformers.AutoConfig.for_model(kind)
    assert HF_DEFAULTS[kind] == {key: getattr(config, key) for key in HF_DEFAULTS[kind]}
    saved(tmp_path, timm.create_model(VIT, num_classes=0, **SMALL).state_dict())
    edited(tmp_path, json.dumps({"model_type": "x", "vision_config": {"model_type": kind}}))
    with pytest.raises(fa.UserError, match="num_attention_heads=12, the backbone has 3"):
        fa.create_backbone(VIT, checkpoint=tmp_path / "a.pth", **SMALL)


@torch.no_grad()
def test_a_wide_table_has_the_sizes_in_config_json(tmp_path):
    """2x8 patches, whose number is a square's."""
    config = transformers.ViTConfig(**{**HF, "image_size": (32, 128)}, layer_norm_eps=1e-6)
    model = transformers.ViTModel(config).eval()
    randomise(model, 0.2)
    model.save_pretrained(tmp_path)
    vit = fa.create_backbone(VIT, checkpoint=tmp_path, **{**SMALL, "img_size": (32, 128)}).eval()
    images = torch.randn(2, 3, 32, 128)
    assert relative_error(vit.forward_features(images), model(images).last_hidden_state.double()) < 1e-5


@torch.no_grad()
def test_siglip_2_of_any_size(tmp_path):
    """Its patches come flat, [height, width, channel], and so does its patch embedding."""
    sizes = {key: value for key, value in HF.items() if key != "image_size"}
    config = transformers.Siglip2VisionConfig(**sizes, num_patches=4, hidden_act="gelu")
    model = transformers.Siglip2VisionModel(config).eval()
    randomise(model, 0.2)
    model.save_pretrained(tmp_path)
    patches = (
        IMAGES.unflatten(3, (2, 16)).unflatten(2, (2, 16)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    )
    wanted = model(patches, torch.ones(2, 4), torch.tensor([[2, 2]] * 2)).last_hidden_state
    vit = fa.create_backbone(SIGLIP, checkpoint=tmp_path, **SMALL).eval()
    assert relative_error(vit.forward_features(IMAGES), wanted.double()) < 1e-5


@pytest.mark.parametrize("kind", ["state dict", "checkpoint of training", "folder", "tower"])
@torch.no_grad()
def test_open_clip(tmp_path, kind):
    vision = {
        "layers": 2,
        "width": 48,
        "head_width": 16,
        "patch_size": 16,
        "image_size": 32,
        "output_tokens": True,
    }
    text = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    model = open_clip.CLIP(24, vision, text, quick_gelu=True).eval()
    randomise(model, 0.2)
    model.visual.proj = None  # read tokens, not their projection
    first, patches = model.visual(IMAGES)
    state = model.state_dict() | {"visual.proj": torch.randn(48, 24)}
    if kind == "folder":
        save_file(state, tmp_path / "open_clip_model.safetensors")
    elif kind == "tower":  # as fastalign.export writes it
        save_file(model.visual.state_dict(), tmp_path / "visual.safetensors")
    elif kind == "state dict":
        torch.save(state, tmp_path / "a.pt")
    else:
        state = {f"module.{key}": value for key, value in state.items()}
        torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": {}}, tmp_path / "a.pt")
    path = tmp_path if kind in ("folder", "tower") else tmp_path / "a.pt"
    vit = fa.create_backbone(CLIP, checkpoint=path, **SMALL).eval()
    assert (
        relative_error(vit.forward_features(IMAGES), torch.cat([first[:, None], patches], 1).double()) < 1e-5
    )


@torch.no_grad()
def test_open_clip_around_a_model_of_timm(tmp_path):
    vision = {
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 32,
    }
    text = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    model = open_clip.CustomTextCLIP(24, {**vision, "timm_model_pretrained": False}, text)
    model.visual.trunk = timm.create_model(VIT, num_classes=0, **SMALL).eval()
    randomise(model, 0.2)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    vit = fa.create_backbone(VIT, checkpoint=tmp_path / "a.pt", **SMALL).eval()
    assert torch.equal(vit.forward_features(IMAGES), model.visual.trunk.forward_features(IMAGES))


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def chunked(state: dict) -> dict:
    """As dinov2 with block_chunks=2: chunks of one block each here; a block keeps its number within."""
    return {
        key.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): v
        for key, v in state.items()
    }


def dinov2s(state: dict) -> dict:
    """timm's registers and class token under dinov2's names, where the class token has a position of its own."""
    if "reg_token" not in state:
        return state | {"mask_token": torch.zeros(1, 48)}
    place = torch.randn(1, 1, 48)
    rest = {key: value for key, value in state.items() if key != "reg_token"}
    return rest | {
        "mask_token": torch.zeros(1, 48),
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - place,
        "pos_embed": torch.cat([place, state["pos_embed"]], 1),
    }


def maes(state: dict) -> dict:
    decoder = {"decoder_embed.weight": (8, 48), "decoder_pos_embed": (1, 5, 8), "decoder_norm.weight": (8,)}
    decoder |= {"decoder_blocks.0.norm1.weight": (8,), "decoder_pred.bias": (768,), "mask_token": (1, 1, 8)}
    return state | {key: torch.randn(shape) for key, shape in decoder.items()}


def projector(prefix: str) -> dict:
    return {f"{prefix}mlp.0.weight": torch.randn(4, 48), f"{prefix}last_layer.weight": torch.randn(4, 4)}


SCRIPTS = {
    "dinov2's teacher": (
        DINO,
        lambda x, y: {"teacher": prefixed("backbone.", chunked(dinov2s(x))) | projector("dino_head.")},
    ),
    "dinov2's whole model": (
        REGISTERS,
        lambda x, y: {
            "model": prefixed("student.backbone.", dinov2s(y)) | prefixed("teacher.backbone.", dinov2s(x)),
            "iteration": 3,
        },
    ),
    "dinov2's backbone": (REGISTERS, lambda x, y: chunked(dinov2s(x))),
    "DINO": (
        VIT,
        lambda x, y: {
            "student": prefixed("module.backbone.", y) | projector("module.head."),
            "teacher": prefixed("backbone.", x) | projector("head."),
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
            "dino_loss": {"center": torch.zeros(1, 4)},
            "epoch": 7,
        },
    ),
    "MAE": (VIT, lambda x, y: {"model": maes(x), "optimizer": {}, "epoch": 1, "scaler": {}}),
    "MoCo-v3": (
        VIT,
        lambda x, y: {
            "arch": "vit_base",
            "state_dict": prefixed("module.base_encoder.", x | {"head.0.weight": torch.ones(4, 48)})
            | prefixed("module.momentum_encoder.", y),
        },
    ),
    "Lightning": (
        VIT,
        lambda x, y: {
            "state_dict": {**prefixed("model.", x | {"head.weight": ONE}), "criterion.scale": ONE},
            "pytorch-lightning_version": "2.5",
            "hyper_parameters": {"lr": 0.1},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        },
    ),
    "FSDP": (VIT, lambda x, y: {k.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): v for k, v in x.items()}),
    "I-JEPA": (
        VIT,
        lambda x, y: {"encoder": prefixed("module.", x), "target_encoder": prefixed("module.", y), "epoch": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
@torch.no_grad()
def test_checkpoints_of_training_scripts(tmp_path, script):
    """The names that each project gives to timm's parameters, by hand; `y` are weights that must not be read."""
    name, save = SCRIPTS[script]
    kwargs = SMALL if name == VIT else {**SMALL, **AT_16}
    model, other = (timm.create_model(name, num_classes=0, **kwargs).eval() for _ in range(2))
    randomise(model, 0.2)
    torch.save(save(model.state_dict(), other.state_dict()), tmp_path / "last.ckpt")
    vit = make_backbone("student.weights", name, str(tmp_path / "last.ckpt"), kwargs).eval()
    found, wanted = vit.forward_features(IMAGES), model.forward_features(IMAGES)
    if name == REGISTERS:  # a sum that is taken apart and added up again
        assert relative_error(found, wanted.double()) < 1e-6
    else:
        assert torch.equal(found, wanted)


def hf_folder(folder: Path, **config) -> Path:
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF, **config)).save_pretrained(folder)
    return folder


def edited(folder: Path, config: str) -> Path:
    (folder / "config.json").write_text(config)
    return folder


def pieces(folder: Path, weight_map) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def timm_config(**changes) -> str:
    return json.dumps({"architecture": CLIP, "pretrained_cfg": {"input_size": [3, 32, 32]}, **changes})


def saved(folder: Path, content) -> Path:
    torch.save(content, folder / "a.pth")
    return folder / "a.pth"


REFUSED = {
    "another activation": (lambda p: hf_folder(p, hidden_act="gelu"), ["hidden_act=gelu", "act_layer=gelu"]),
    "other heads": (
        lambda p: edited(hf_folder(p), '{"model_type": "x", "num_attention_heads": 6}'),
        ["num_attention_heads=6", "num_heads=6"],
    ),
    "a convolutional network, by keys and not by its config": (
        lambda p: saved(edited(p, '{"model_type": "resnet", "hidden_act": "relu"}'), {"a.weight": ONE}),
        ["has a layout that is not read", "lacks"],
    ),
    "a key that is missing, and positions of no square": (
        lambda p: saved(p, {"patch_embed.proj.weight": torch.ones(48, 3, 16, 16), "pos_embed": torch.ones(1, 4, 48)}),
        ["another model", "lacks blocks.0"],
    ),
    "transformers' BEiT": (
        lambda p: transformers.BeitModel(transformers.BeitConfig(**HF)).save_pretrained(p) or p,
        ["looks like transformers' BEiT"],
    ),
    "timm's config of another library's model": (
        lambda p: edited(hf_folder(p), timm_config(architecture="resnet50")),
        ["{path}: backbone resnet50", "img_size"],
    ),
    "timm's config with a wrong cap": (
        lambda p: edited(hf_folder(p), timm_config(model_args={"softcap": "x"})),
        ["config.json: softcap must be a positive number", "'x'"],
    ),
    "timm's config with a wrong name": (
        lambda p: edited(hf_folder(p), timm_config(architecture=3)),
        ["config.json is damaged (name 3"],
    ),
    "a damaged config": (
        lambda p: edited(hf_folder(p), "{"),
        ["config.json is damaged"],
    ),
    "an empty folder": (lambda p: p, ["no weights in", "model.safetensors"]),
    "a damaged index": (lambda p: pieces(p, ["a"]), ["index.json is damaged"]),
    "a piece that is gone": (lambda p: pieces(p, {"a": "../b.safetensors"}), ["b.safetensors, which is not there"]),
    "a piece of something else": (
        lambda p: torch.save([ONE], p / "b.bin") or pieces(p, {"a": "b.bin"}),
        ["b.bin is not a piece"],
    ),
    "half a DINOv2": (
        lambda p: saved(p, {"patch_embed.proj.weight": ONE, "register_tokens": ONE}),
        ["not whole", "cls_token"],
    ),
    "a scalar": (
        lambda p: saved(p, {"patch_embed.proj.weight": ONE, "cls_token": torch.tensor(1.0)}),
        ["not whole"],
    ),
    "two backbones": (
        lambda p: saved(p, {"a.patch_embed.proj.weight": ONE, "b.patch_embed.proj.weight": ONE}),
        ["several backbones (a, b)"],
    ),
    "torchvision": (
        lambda p: saved(p, {"conv_proj.weight": ONE, "class_token": ONE}),
        ["looks like torchvision's ViT", "timm", "open_clip", "transformers' DINOv2"],
    ),
    "DINOv3": (lambda p: saved(p, {"embeddings.patch_embeddings.weight": ONE}), ["transformers' DINOv3"]),
    "adapters": (lambda p: saved(p, {"base_model.model.q_proj.lora_A.weight": ONE}), ["adapters of peft"]),
    "TorchScript": (
        lambda p: torch.jit.trace(torch.nn.Linear(1, 1), ONE).save(p / "a.pt") or p / "a.pt",
        ["TorchScript, as OpenAI", "state_dict()"],
    ),
    "a checkpoint of a run": (
        lambda p: saved(p, {"student": {"encoder.norm.weight": ONE}, "optimizer": {}, "step": 1, "config": {}}),
        ["give the run's folder"],
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*TorchScript")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_in_one_line(tmp_path, case):
    make, words = REFUSED[case]
    with pytest.raises(fa.UserError) as caught:
        fa.create_backbone(CLIP, checkpoint=make(tmp_path), **SMALL)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word.format(path=tmp_path) in str(caught.value)
