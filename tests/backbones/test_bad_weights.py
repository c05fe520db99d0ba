"""Files that cannot be read, or hold other weights: refused in one line, and no code in them is run."""

import argparse
import os
from pathlib import Path

import pytest
import timm
import torch
import transformers

import fastalign as fa
from tests.backbones.helpers import CLIP, HF, ONE, SMALL

TINY = "vit_tiny_patch16_224"

WHOLE = {"state_dict": timm.create_model(TINY, num_classes=0, **SMALL).state_dict()}
SVIT = {"student_model": f"s{TINY}"}


def saved(folder: Path, content) -> Path:
    torch.save(content, folder / "a.pth")
    return folder / "a.pth"


def cut(folder: Path) -> Path:
    content = saved(folder, WHOLE).read_bytes()
    (folder / "a.pth").write_bytes(content[: len(content) // 2])
    return folder / "a.pth"


def hf_folder(folder: Path, text: str | None = None, **config) -> Path:
    """A CLIP of transformers, perhaps with another config.json."""
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF, **config)).save_pretrained(folder)
    if text is not None:
        (folder / "config.json").write_text(text)
    return folder


def index(folder: Path, text: str) -> Path:
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


PATCH = "patch_embed.proj.weight"
OPEN_CLIP_MARKS = [f"transformer.resblocks.0.{part}weight" for part in ("ln_1.", "attn.in_proj_")]
REFUSED = {
    "half a file": (cut, ["cut short"]),
    "no weights": (lambda p: saved(p, {"state_dict": {}}), ["holds no weights"]),
    "a list": (lambda p: saved(p, [1, 2]), ["holds a list"]),
    "no names": (lambda p: saved(p, {1: ONE}), ["a dictionary of tensors by name"]),
    "a wrong cap": (lambda p: saved(p, WHOLE | {"softcap": "x"}), ["a.pth: softcap must be a positive number"]),
    "another model": (lambda p: saved(p, WHOLE | {"args": SVIT}), ["another model (svit_tiny_patch16_224)"]),
    "another activation": (lambda p: hf_folder(p, hidden_act="gelu"), ["hidden_act=gelu", "act_layer=gelu"]),
    "other heads": (
        lambda p: hf_folder(p, '{"model_type": "x", "num_attention_heads": 6, "image_size": 32, "patch_size": 16}'),
        ["num_attention_heads=6", "num_heads=6"],
    ),
    "timm's config of another library's model": (
        lambda p: hf_folder(p, '{"architecture": "resnet50", "pretrained_cfg": {"input_size": [3, 32, 32]}}'),
        ["model.safetensors: backbone resnet50", "img_size"],
    ),
    "a damaged config": (lambda p: hf_folder(p, "{"), ["config.json is damaged"]),
    "a config without a model": (lambda p: hf_folder(p, "null"), ["config.json is damaged"]),
    "a config with a wrong size": (
        lambda p: hf_folder(p, '{"model_type": "clip_vision_model", "image_size": "x", "patch_size": 16}'),
        ["config.json is damaged"],
    ),
    "a damaged layout": (
        lambda p: saved(p, {"conv1.weight": ONE, "class_embedding": ONE.sum()} | dict.fromkeys(OPEN_CLIP_MARKS, ONE)),
        ["a.pth holds damaged weights of open_clip"],
    ),
    "an empty folder": (lambda p: p, ["no weights in", "model.safetensors"]),
    "a damaged index": (lambda p: index(p, "{"), ["index.json is damaged"]),
    "an index of nothing": (lambda p: index(p, "{}"), ["index.json is damaged"]),
    "a shard that is gone": (lambda p: index(p, '{"weight_map": {"a": "../b.bin"}}'), ["{path}/b.bin", "No such"]),
    "two backbones": (lambda p: saved(p, {f"a.{PATCH}": ONE, f"b.{PATCH}": ONE}), ["several backbones (a, b)"]),
    "torchvision": (
        lambda p: saved(p, {"conv_proj.weight": ONE, "class_token": ONE}),
        ["has an unknown layout", "timm", "open_clip", "transformers' DINOv2"],
    ),
    "TorchScript": (
        lambda p: torch.jit.trace(torch.nn.Linear(1, 1), ONE).save(p / "a.pt") or p / "a.pt",
        ["TorchScript program, as OpenAI", "state_dict()"],
    ),
    "a checkpoint of a run": (
        lambda p: saved(p, {"student": {"encoder.norm.weight": ONE}, "optimizer": {}, "step": 1, "config": {}}),
        ["give the run's folder"],
    ),
}  # fmt: skip


def message(name: str, path: Path, **kwargs) -> str:
    with pytest.raises(fa.UserError) as caught:
        fa.create_backbone(name, checkpoint=path, **{**SMALL, **kwargs})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:.*TorchScript")
@pytest.mark.parametrize("case", REFUSED)
def test_other_files_are_refused_in_one_line(tmp_path, case):
    make, words = REFUSED[case]
    found = message(CLIP, make(tmp_path))
    assert all(word.format(path=tmp_path) in found for word in words), found


def test_a_failed_download_names_no_arguments_that_the_user_did_not_give(monkeypatch):
    def create(name, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("offline\nand more")
        return plain(name, **kwargs)

    plain = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(fa.UserError) as caught:
        fa.create_backbone(CLIP, pretrained=True)
    assert "(offline): check the network and the arguments, or set student.weights" in str(caught.value)
    assert "num_classes" not in str(caught.value)


def test_weights_of_another_shape_are_refused_in_one_line(tmp_path):
    path = saved(tmp_path, WHOLE)
    assert "a.pth holds the weights of another model: size mismatch for" in message(TINY, path, embed_dim=96)
    assert "lacks blocks.2" in message(TINY, path, depth=3)
    assert "also has blocks.1.attn.proj.bias" in message(TINY, path, depth=1)


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["args", "optimizer", "state_dict"])
@pytest.mark.parametrize(("zipped", "nested"), [(True, True), (True, False), (False, True)])
def test_code_in_a_file_is_refused_and_nothing_runs(tmp_path, place, zipped, nested):
    attack = Attack(f"touch {tmp_path / 'ran'}")
    content = WHOLE | {place: argparse.Namespace(evil=attack) if nested else attack}
    torch.save(content, tmp_path / "a.pth.tar", _use_new_zipfile_serialization=zipped)
    found = message(TINY, tmp_path / "a.pth.tar")
    assert all(word in found for word in ("a.pth.tar", "not safe", "posix.system", "no code was run"))
    assert not (tmp_path / "ran").exists()
