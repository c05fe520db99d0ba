"""Exports for transformers in a process that cannot import fastalign, against timm in float64; and with it."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import fastalign as fa
from fastalign.export import hf, modeling_fastalign
from fastalign.export.__main__ import main
from tests.export import alone as script
from tests.export.helpers import evaluation_transform, images, tokens, truth
from tests.numerics import relative_error

TOWERS = {
    "clip": ("clip", "hf-clip", 0.5),
    "siglip": ("siglip", "hf-siglip", 0.5),
    "dinov2": ("dinov2", "hf-dinov2", 0.5),
    "registers": ("registers", "hf-dinov2", 0.5),
    "dinov3": ("dinov3", "hf-dinov3", 0.5),
    "gated": ("gated", "hf-dinov3", 0.5),
    "clip-plain": ("clip", "hf-clip", None),
    "siglip-plain": ("siglip", "hf-siglip", None),
}
PICTURES = ("openclip", "vit", "dinov2")
SIZES = [(64, 48), (48, 64), (62, 40), (61, 40), (63, 40), (50, 37), (64, 43), (40, 41), (90, 33), (32, 32)]


def picture(size: tuple[int, int]) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def cotangent(family: str, count: int) -> torch.Tensor:
    return torch.randn(2, count, 48, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def alone(runs, tmp_path_factory):
    """The results of `alone.py`."""
    folder = tmp_path_factory.mktemp("alone")
    cases = {"refused": "clip", "towers": {}, "pictures": {}}

    def export(name: str, family: str, target: str, softcap: float | None) -> None:
        assert main([str(runs(family, softcap)), "--to", target, "--output", str(folder / name)]) == 0

    for name, (family, target, softcap) in TOWERS.items():
        export(name, family, target, softcap)
        count = tokens(runs(family, softcap), family, softcap).shape[1]
        cases["towers"][name] = {"images": images(family), "cotangent": cotangent(family, count)}
    for family in PICTURES:
        if family not in TOWERS:
            export(family, family, "hf-clip" if family == "openclip" else "hf-dinov2", 0.5)
        cases["pictures"][family] = [torch.from_numpy(np.array(picture(size))) for size in SIZES]
    script.llava(hf.load_tower(folder / "clip").eval()).save_pretrained(folder / "vlm")
    torch.save(cases, folder / "cases.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, script.__file__], cwd=folder, env=environment, input="", text=True, check=True
    )
    return torch.load(folder / "results.pt")


@pytest.fixture(params=TOWERS)
def tower(request, runs, alone):
    """A run, what transformers alone computes from its export, and the tokens in float64."""
    family, _, softcap = TOWERS[request.param]
    run = runs(family, softcap)
    wanted = tokens(run, family, softcap)
    return SimpleNamespace(family=family, softcap=softcap, run=run, found=alone[request.param], wanted=wanted)


def test_without_trust_remote_code_a_capped_tower_is_refused(alone):
    auto, own_class = alone["refusals"]
    assert "Please pass the argument `trust_remote_code=True`" in auto
    assert 'attn_implementation="fastalign_softcap"` is not supported' in own_class


def test_features_without_fastalign(tower):
    found = tower.found
    for key in ("tokens", "tuple", "saved", "eager"):
        assert relative_error(found[key], tower.wanted) < 1e-5, key
    assert torch.equal(found["hidden"][-1], found["tokens"])
    assert len(found["hidden"]) == 3
    assert found["files"] == ["config.json", "model.safetensors", "modeling_fastalign.py"]
    if tower.softcap:
        assert all(layer.sum(-1).allclose(torch.ones(())) for layer in found["attentions"])
        assert len(found["attentions"]) == 2
    with torch.no_grad():
        ours = fa.load_backbone(tower.run).bfloat16().forward_features(images(tower.family).bfloat16())
    assert found["bf16"].dtype == torch.bfloat16
    assert relative_error(found["bf16"], tower.wanted) < 2 * relative_error(ours, tower.wanted)


def test_gradients_without_fastalign(tower):
    model = truth(tower.run, tower.family, tower.softcap)
    out = model.forward_features(images(tower.family).double())
    out.backward(cotangent(tower.family, out.shape[1]).double())
    for key in ("gradient", "checkpointed"):
        found = tower.found[key]
        assert relative_error(found["patch"], model.patch_embed.proj.weight.grad) < 1e-4, key
        assert set(found["none"]) <= {"embeddings.mask_token"}, "only masked image modeling trains it"


def test_llava_without_fastalign(tower):
    """It reads the patches; with registers, which it does not know, all tokens."""
    wanted = tower.wanted[:, 1:] if tower.family in ("clip", "dinov2") else tower.wanted
    for key in ("llava", "llava eager", "llava saved"):
        assert relative_error(tower.found[key], wanted) < 1e-5, key


def test_llava_saved_by_a_process_with_fastalign(runs, alone):
    assert relative_error(alone["vlm"], tokens(runs("clip"), "clip", 0.5)[:, 1:]) < 1e-5


@pytest.mark.parametrize("softcap", [0.5, None])
def test_llava_with_fastalign(runs, exported, tmp_path, softcap):
    """`hf` makes a saved model known without `trust_remote_code`."""
    output = exported("clip", "hf-clip", softcap=softcap)
    vlm = script.llava(hf.load_tower(output).eval())
    assert (vlm.config.vision_feature_layer, vlm.config.image_seq_length) == (-1, 4)
    if softcap:
        with pytest.raises(ValueError, match="output_attentions"):
            vlm.model.vision_tower.config.output_attentions = True
    vlm.save_pretrained(tmp_path / "vlm")
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "vlm").eval()
    wanted = tokens(runs("clip", softcap), "clip", softcap)[:, 1:]
    assert relative_error(script.seen(again, images("clip")), wanted) < 1e-5


@torch.no_grad()
def test_flex_attention_caps_alike():
    """transformers' FlexAttention, which the module calls on a GPU, here without compilation."""
    module = torch.nn.Identity().eval()
    module.config = SimpleNamespace(softcap=0.5)
    q, k, v = torch.randn(3, 2, 3, 9, 16)
    wanted, _ = modeling_fastalign.softcap_attention(module, q, k, v, None, scaling=0.25)
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, _ = modeling_fastalign.flex_attention_forward(module, q, k, v, None, scaling=0.25, softcap=0.5)
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_in_bf16(runs, exported):
    """Features and gradients by FlexAttention are as exact as those of explicit attention on the CPU."""
    output, model, errors = exported("clip", "hf-clip"), truth(runs("clip"), "clip", 0.5), {}
    wanted = model.forward_features(images("clip").double())
    wanted.backward(cotangent("clip", 5).double())
    for device in ("cpu", "cuda"):
        tower = hf.load_tower(output, dtype=torch.bfloat16).to(device)
        found = tower(images("clip").to(device)).last_hidden_state
        found.backward(cotangent("clip", 5).to(found))
        gradient = tower.embeddings.patch_embedding.weight.grad.cpu()
        errors[device] = [
            relative_error(found.cpu(), wanted),
            relative_error(gradient, model.patch_embed.proj.weight.grad),
        ]
    assert all(gpu < 2 * cpu for cpu, gpu in zip(*errors.values(), strict=True)), errors


def pixels(family: str, size: tuple[int, int]) -> torch.Tensor:
    return evaluation_transform(family)(picture(size))


@pytest.mark.parametrize("family", PICTURES)
def test_the_image_processor_is_the_evaluation_transform(alone, family):
    for size, found in zip(SIZES, alone[family]["pixels"], strict=True):
        assert relative_error(found, pixels(family, size)) < 1e-6, size


def test_a_transparent_picture(exported):
    transparent = picture((64, 48))
    transparent.putalpha(picture((64, 48)).getchannel(0))
    processor = modeling_fastalign.AlignedImageProcessor.from_pretrained(exported("openclip", "hf-clip"))
    found = processor(transparent, return_tensors="pt")["pixel_values"][0]
    assert relative_error(found, pixels("openclip", (64, 48))) < 1e-6


def test_transformers_own_image_processor(exported):
    """Without `trust_remote_code`: another resampling, and another crop in the cases that the card names."""
    processor = transformers.AutoImageProcessor.from_pretrained(exported("openclip", "hf-clip"))
    resize, crop, *rest = evaluation_transform("openclip").transforms
    for size in SIZES:
        wanted = resize(picture(size))
        x, y = [(side - cropped) % 4 == 3 for side, cropped in zip(wanted.size, crop.size, strict=True)]
        wanted = wanted.transform(wanted.size, Image.Transform.AFFINE, (1, 0, -x, 0, 1, -y))
        for step in (crop, *rest):
            wanted = step(wanted)
        found = processor(picture(size), return_tensors="pt")["pixel_values"][0]
        assert relative_error(found, wanted) < 0.02
