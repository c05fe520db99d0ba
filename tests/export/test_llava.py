"""A VLM that uses the tower."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from fastalign.export import hf
from tests.export.helpers import evaluation_transform, images, tokens, truth
from tests.numerics import relative_error


@pytest.fixture
def llava(exported):
    """Exports a run and builds a tiny LLaVA on it."""

    def build(family: str, target: str, softcap: float | None):
        output = exported(family, target, softcap=softcap)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = transformers.LlamaConfig(vocab_size=32, **sizes)
        config = hf.llava_config(output, text, image_token_index=31)
        model = transformers.LlavaForConditionalGeneration(config).eval()
        model.model.vision_tower = hf.load_tower(output).eval()
        return model

    return build


@torch.no_grad()
def seen(model, family: str) -> torch.Tensor:
    """What LLaVA's projector reads in a forward pass with an image in the prompt."""
    inputs = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    count = model.config.image_seq_length
    prompt = torch.tensor([[1, *[31] * count, 2, 3]]).expand(2, -1)
    out = model(input_ids=prompt, pixel_values=images(family))
    hook.remove()
    assert out.logits.shape == (2, count + 3, 32)
    assert torch.isfinite(out.logits).all()
    return inputs[0]


VLMS = [
    ("clip", "hf-clip", 0.5, 1),
    ("clip", "hf-clip", None, 1),
    ("siglip", "hf-siglip", 0.5, 0),
    ("siglip", "hf-siglip", None, 0),
    ("dinov2", "hf-dinov2", 0.5, 1),
    ("registers", "hf-dinov2", 0.5, 0),
]


@pytest.mark.parametrize(("family", "target", "softcap", "skip"), VLMS)
def test_llava_reads_the_aligned_features(runs, llava, tmp_path, family, target, softcap, skip):
    model = llava(family, target, softcap)
    wanted = tokens(runs(family, softcap), family, softcap)[:, skip:]
    assert model.config.vision_feature_layer == -1
    assert relative_error(seen(model, family), wanted) < 1e-5
    model.set_attn_implementation("eager")
    assert relative_error(seen(model, family), wanted) < 1e-5, "the cap survives another attention"
    model.save_pretrained(tmp_path / "vlm")
    again = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "vlm", attn_implementation="sdpa"
    )
    assert relative_error(seen(again.eval(), family), wanted) < 1e-5, "saved and loaded"


def test_the_tower_trains(runs, exported):
    """A VLM may tune it: gradients against those of the truth."""
    tower, model = hf.load_tower(exported("clip", "hf-clip")).train(), truth(runs("clip"), "clip", 0.5)
    cotangent = torch.randn(2, 5, 48)
    tower(images("clip")).last_hidden_state.backward(cotangent)
    model.forward_features(images("clip").double()).backward(cotangent.double())
    for ours, theirs in (
        (tower.embeddings.patch_embedding.weight, model.patch_embed.proj.weight),
        (tower.encoder.layers[1].self_attn.v_proj.weight, model.blocks[1].attn.qkv.weight),
    ):
        gradient = theirs.grad if ours.shape == theirs.shape else theirs.grad.chunk(3)[2]
        assert relative_error(ours.grad, gradient) < 1e-4


SIZES = [(64, 48), (48, 64), (62, 40), (61, 40), (63, 40), (50, 37), (64, 43), (40, 41), (90, 33), (32, 32)]


@pytest.mark.parametrize("family", ["openclip", "vit", "dinov2"])
def test_the_image_processor_is_the_evaluation_transform(exported, family):
    """timm on PIL's pixels, except for the crop's offset in the cases that the card names."""
    output = exported(family, "hf-clip" if family == "openclip" else "hf-dinov2")
    processor = transformers.AutoImageProcessor.from_pretrained(output)
    resize, crop, *rest = evaluation_transform(family).transforms
    for size in SIZES:
        small = np.random.default_rng(0).integers(0, 255, (7, 9, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        wanted = resize(picture)
        x, y = [(side - cropped) % 4 == 3 for side, cropped in zip(wanted.size, crop.size, strict=True)]
        wanted = wanted.transform(wanted.size, Image.Transform.AFFINE, (1, 0, -x, 0, 1, -y))
        for step in (crop, *rest):
            wanted = step(wanted)
        found = processor(picture, return_tensors="pt")["pixel_values"][0]
        assert relative_error(found, wanted) < 0.02, "the bicubic of two libraries"


@torch.no_grad()
def test_attention_weights_of_a_capped_tower(exported, monkeypatch):
    """As with transformers' sdpa the argument gives a warning and the setting is refused; uncapped, eager works."""
    warnings = []
    monkeypatch.setattr(hf.logger, "warning_once", warnings.append)
    capped = hf.load_tower(exported("clip", "hf-clip")).eval()
    assert capped(images("clip"), output_attentions=True).attentions is None
    assert "does not support `output_attentions=True`" in warnings[0]
    with pytest.raises(ValueError, match="output_attentions"):
        capped.config.output_attentions = True
    plain = hf.load_tower(exported("clip", "hf-clip", "--drop-softcap")).eval()
    plain.set_attn_implementation("eager")
    weights = plain(images("clip"), output_attentions=True).attentions
    assert [layer.sum(-1).allclose(torch.ones(2, 3, 5)) for layer in weights] == [True, True]
