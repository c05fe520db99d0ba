"""Families of tiny models, their capped truth in float64, and each library's way to load an export."""

import json
from functools import partial
from pathlib import Path

import onnxruntime
import timm
import torch
import transformers
from safetensors.torch import load_file

from tests.numerics import relative_error
from tests.truth import CappedAttention

FAMILIES = {
    "clip": "vit_base_patch16_clip_quickgelu_224.openai",
    "openclip": "vit_base_patch16_clip_224.laion2b",
    "siglip": "vit_base_patch16_siglip_224.webli",
    "dinov2": "vit_base_patch14_dinov2.lvd142m",
    "registers": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov3": "vit_small_patch16_dinov3_qkvb.lvd1689m",
    "gated": "vit_small_plus_patch16_dinov3.lvd1689m",
    "vit": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
}
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}


def small(family: str) -> dict:
    return {**SMALL, "img_size": 28 if "patch14" in FAMILIES[family] else 32}


def truth(folder: Path, family: str, cap: float | None) -> torch.nn.Module:
    """timm's model with the run's weights, capped, in float64."""
    kwargs = json.loads((folder / "backbone.json").read_text())["kwargs"]
    model = timm.create_model(FAMILIES[family], **kwargs)
    model.load_state_dict(load_file(folder / "backbone.safetensors"))
    if cap is not None:
        for block in model.blocks:
            block.attn = CappedAttention(block.attn, cap)
    return model.double().eval()


def images(family: str, count: int = 2) -> torch.Tensor:
    size = small(family)["img_size"]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def tokens(folder: Path, family: str, cap: float | None) -> torch.Tensor:
    with torch.no_grad():
        return truth(folder, family, cap).forward_features(images(family).double())


def facts(folder: Path) -> dict:
    return json.loads((folder / "fastalign.json").read_text())


def by_timm(folder: Path, x: torch.Tensor, family: str) -> torch.Tensor:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features(x)


def by_prismatic(folder: Path, x: torch.Tensor, family: str) -> torch.Tensor:
    """Prismatic's own lines, but for the layer; it leaves the prefix out."""
    featurizer = timm.create_model(
        f"local-dir:{folder}", pretrained=True, num_classes=0, img_size=x.shape[-1]
    )
    assert isinstance(featurizer, timm.models.VisionTransformer)
    featurizer.eval()
    featurizer.forward = partial(
        featurizer.get_intermediate_layers, n={len(featurizer.blocks) - 1}, norm=True
    )
    return featurizer(x)[0]


def by_transformers(folder: Path, x: torch.Tensor, family: str) -> torch.Tensor:
    """Without a cap it is transformers' own class, whose CLIP does not norm its tokens."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    out = model(x, output_hidden_states=True)
    if facts(folder)["softcap"]["applied"]:
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        return out.last_hidden_state
    assert type(model).__module__.startswith("transformers.models.")
    clip = facts(folder)["target"] == "hf-clip"
    return model.post_layernorm(out.last_hidden_state) if clip else out.last_hidden_state


def by_onnxruntime(folder: Path, x: torch.Tensor, family: str) -> torch.Tensor:
    """One image at a time, then the rest together; the program of torch.export gives the same."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    found = [session.run(["tokens"], {"images": part.numpy()})[0] for part in x.split([1, len(x) - 1])]
    found = torch.cat([torch.from_numpy(part) for part in found])
    program = torch.export.load(folder / "model.pt2").module()
    assert relative_error(program(x), found) < 1e-5
    return found


LOADERS = {"timm": by_timm, "prismatic": by_prismatic, "onnx": by_onnxruntime}


def evaluation_transform(family: str):
    data = timm.data.resolve_data_config({}, model=timm.create_model(FAMILIES[family], **small(family)))
    size = small(family)["img_size"]
    return timm.data.create_transform(**{**data, "input_size": (3, size, size)})
