"""Exports to open_clip with the text tower of the source: the whole model, against the source's own library."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

import fastalign as fa
from fastalign.export.__main__ import main
from tests.export.helpers import FAMILIES, SMALL, facts
from tests.numerics import randomise, relative_error

TEXT = {"context_length": 6, "vocab_size": 50, "width": 48, "heads": 3, "layers": 2}
TOKENS = torch.tensor([[48, 3, 5, 49, 0, 0], [48, 7, 9, 11, 13, 49]])


@register_model
def tiny_siglip(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """SigLIP in small: open_clip builds timm's models by name alone."""
    kwargs = {key: kwargs[key] for key in ("num_classes", "global_pool") if key in kwargs}
    shape = {**SMALL, "class_token": False, "act_layer": "gelu_tanh", "norm_layer": None}
    model = VisionTransformer(**shape, **{"global_pool": "map", **kwargs})
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model


VISION = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 16}
NATIVE = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
SIGLIP = {
    "embed_dim": 48,
    "init_logit_bias": -10,
    "vision_cfg": {
        "timm_model_name": "tiny_siglip", "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none",
        "image_size": 32,
    },
    "text_cfg": {
        **TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "hf_tokenizer_name": "this folder",
    },
}  # fmt: skip
# The model, the backbone's name and arguments, the model's configuration.
SOURCES = {
    "CLIP": (open_clip.CLIP, FAMILIES["openclip"], SMALL, NATIVE),
    "QuickGELU": (open_clip.CLIP, FAMILIES["clip"], SMALL, {**NATIVE, "quick_gelu": True}),
    "SigLIP": (open_clip.CustomTextCLIP, "tiny_siglip", {}, SIGLIP),
}


def make_source(folder, source: str) -> torch.nn.Module:
    """A random model of open_clip in a folder."""
    make, _, _, config = SOURCES[source]
    model = make(**config).eval()
    randomise(model, 0.2)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    config = {**config, "custom_text": make is open_clip.CustomTextCLIP}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    (folder / "tokenizer_config.json").write_text("{}")
    return model


@pytest.mark.parametrize("source", SOURCES)
@torch.no_grad()
def test_the_whole_model(tmp_path, capsys, source):
    """Of weights that were not trained further, it is the source; with a student's, its text tower is."""
    _, name, kwargs, _ = SOURCES[source]
    (tmp_path / "source").mkdir()
    wanted = make_source(tmp_path / "source", source)
    weights = ["--weights", str(tmp_path / "source"), "--name", name, "--kwargs", json.dumps(kwargs)]
    assert main([*weights, "--to", "open-clip", "--output", str(tmp_path / "export")]) == 0
    assert "The text tower and the projections are those of source" in capsys.readouterr().out
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'export'}")
    x = torch.randn(3, 3, 32, 32)
    assert relative_error(model.eval().encode_image(x), wanted.encode_image(x)) < 1e-5
    assert relative_error(model.encode_text(TOKENS), wanted.encode_text(TOKENS)) < 1e-5
    assert torch.equal(model.logit_scale, wanted.logit_scale)
    assert list(transform.transforms[-1].mean) == fa.create_backbone(name, **kwargs).data["mean"]
    assert (tmp_path / "export" / "tokenizer_config.json").exists() == (source == "SigLIP")

    student = fa.MaskEmbedStudent.from_backbone(fa.create_backbone(name, **kwargs), softcap=None)
    randomise(student, 0.2)
    fa.save_backbone(student, tmp_path / "run")
    options = ["--text-tower", str(tmp_path / "source"), "--output", str(tmp_path / "export")]
    assert main([str(tmp_path / "run"), "--to", "open-clip", *options]) == 0
    model = open_clip.create_model(f"local-dir:{tmp_path / 'export'}").eval()
    assert relative_error(model.encode_text(TOKENS), wanted.encode_text(TOKENS)) < 1e-5
    assert relative_error(model.encode_image(x), wanted.encode_image(x)) > 0.1
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
    assert "has no text tower: give the model" in capsys.readouterr().err
