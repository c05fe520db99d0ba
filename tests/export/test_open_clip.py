"""Exports to open_clip with the text tower of the source: the whole model, against the source's own library."""

import json

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

import fastalign as fa
from fastalign.export.__main__ import main
from tests.export.helpers import FAMILIES, facts
from tests.numerics import randomise, relative_error

CLIP = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "vocab_size": 50,
}
VISION = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
VISION |= {"image_size": 32, "patch_size": 16}
TOKENS = torch.tensor([[48, 3, 5, 49, 0, 0], [48, 7, 9, 11, 13, 49]])


@register_model
def tiny_siglip(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """SigLIP in small: open_clip builds timm's models by name alone."""
    kwargs = {key: kwargs[key] for key in ("num_classes", "global_pool") if key in kwargs}
    shape = {**CLIP, "class_token": False, "act_layer": "gelu_tanh", "norm_layer": None}
    model = VisionTransformer(**shape, **{"global_pool": "map", **kwargs})
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model


def of_open_clip(folder, activation: str = "gelu"):
    """A random model, and what gives its image and text features."""
    text = {"context_length": 6, "vocab_size": 50, "width": 64, "heads": 1, "layers": 2}
    vision = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 16}
    config = {
        "embed_dim": 24,
        "vision_cfg": vision,
        "text_cfg": text,
        "quick_gelu": activation == "quick_gelu",
    }
    model = open_clip.CLIP(**config).eval()
    randomise(model, 0.2)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return model.encode_image, model.encode_text, model.logit_scale


def of_transformers(folder, activation: str):
    """The same of transformers' CLIP."""
    text = {**TEXT, "max_position_embeddings": 6, "eos_token_id": 49, "hidden_act": activation}
    vision = {**VISION, "hidden_act": activation}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    randomise(model, 0.2)
    model.save_pretrained(folder)
    image = model.get_image_features
    return (
        lambda x: image(x).pooler_output,
        lambda t: model.get_text_features(t).pooler_output,
        model.logit_scale,
    )


def of_siglip(folder, activation: str):
    """The same of transformers' SigLIP."""
    text = {
        **TEXT,
        "max_position_embeddings": 6,
        "projection_size": 48,
        "hidden_size": 48,
        "num_attention_heads": 3,
    }
    text["hidden_act"] = activation
    config = transformers.SiglipConfig(text_config=text, vision_config={**VISION, "hidden_act": activation})
    model = transformers.SiglipModel(config).eval()
    randomise(model, 0.2)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    image = model.get_image_features
    return (
        lambda x: image(x).pooler_output,
        lambda t: model.get_text_features(t).pooler_output,
        model.logit_scale,
    )


SOURCES = {
    "open_clip": (of_open_clip, FAMILIES["openclip"], CLIP, "gelu"),
    "open_clip, QuickGELU": (of_open_clip, FAMILIES["clip"], CLIP, "quick_gelu"),
    "transformers": (of_transformers, FAMILIES["clip"], CLIP, "quick_gelu"),
    "SigLIP": (of_siglip, "tiny_siglip", {}, "gelu_pytorch_tanh"),
}


@pytest.mark.parametrize("source", SOURCES)
@torch.no_grad()
def test_the_whole_model(tmp_path, capsys, source):
    """Of weights that were not trained further, it is the source; with a student's, its text tower is."""
    make, name, kwargs, activation = SOURCES[source]
    (tmp_path / "source").mkdir()
    image, text, scale = make(tmp_path / "source", activation)
    weights = ["--weights", str(tmp_path / "source"), "--name", name, "--kwargs", json.dumps(kwargs)]
    assert main([*weights, "--to", "open-clip", "--output", str(tmp_path / "export")]) == 0
    assert "The text tower and the projections are those of source" in capsys.readouterr().out
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'export'}")
    x = torch.randn(3, 3, 32, 32)
    assert relative_error(model.eval().encode_image(x), image(x)) < 1e-5
    assert relative_error(model.encode_text(TOKENS), text(TOKENS)) < 1e-5
    assert torch.equal(model.logit_scale.flatten(), scale.flatten())
    assert list(transform.transforms[-1].mean) == fa.create_backbone(name, **kwargs).data["mean"]
    assert (tmp_path / "export" / "tokenizer_config.json").exists() == (source == "SigLIP")

    student = fa.MaskEmbedStudent.from_backbone(fa.create_backbone(name, **kwargs), softcap=None)
    randomise(student, 0.2)
    fa.save_backbone(student, tmp_path / "run")
    options = ["--text-tower", str(tmp_path / "source"), "--output", str(tmp_path / "export")]
    assert main([str(tmp_path / "run"), "--to", "open-clip", *options]) == 0
    model = open_clip.create_model(f"local-dir:{tmp_path / 'export'}").eval()
    assert relative_error(model.encode_text(TOKENS), text(TOKENS)) < 1e-5
    assert relative_error(model.encode_image(x), image(x)) > 0.1
    assert facts(tmp_path / "export")["parity"]["largest_relative_error"] < 1e-5


@torch.no_grad()
def test_only_the_visual_tower(tmp_path, capsys):
    """A timm tower without pooling, whose text tower is unknown; read again as `student.weights`."""
    student = fa.MaskEmbedStudent.from_backbone(fa.create_backbone("tiny_siglip"), softcap=None)
    randomise(student, 0.2)
    fa.save_backbone(student, tmp_path)
    assert main([str(tmp_path), "--to", "open-clip"]) == 0
    assert "There is only the visual tower" in capsys.readouterr().out
    output, x = tmp_path / "exports" / "open-clip", torch.randn(2, 3, 32, 32)
    model = open_clip.create_model(f"local-dir:{output}").eval()
    wanted = fa.load_backbone(tmp_path).forward_features(x)
    assert relative_error(model.encode_image(x), wanted) < 1e-5
    assert not model.encode_text(torch.ones(1, 4, dtype=torch.long)).any()
    assert (
        relative_error(fa.create_backbone("tiny_siglip", checkpoint=output).forward_features(x), wanted)
        < 1e-5
    )
    assert main([str(tmp_path), "--to", "open-clip", "--text-tower", str(output)]) == 2
    assert "has no text tower" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text-tower", "hf-hub:nobody/nothing"], "hf-hub:nobody/nothing cannot be loaded"),
        (["--text-tower", "RUN"], "has no text tower"),
        ([], "open_clip builds timm's vit_tiny_patch16_224 without arguments, not with {'depth': 1}"),
    ],
)
def test_bad_text_towers_and_backbones(tmp_path, capsys, options, words):
    kwargs = {"depth": 1, **({} if options == [] else {"img_size": 32})}
    name = FAMILIES["clip"] if options else "vit_tiny_patch16_224"
    fa.save_backbone(fa.create_backbone(name, **kwargs), tmp_path)
    options = [option.replace("RUN", str(tmp_path)) for option in options]
    assert main([str(tmp_path), "--to", "open-clip", *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "exports").exists() or not list((tmp_path / "exports").iterdir())
