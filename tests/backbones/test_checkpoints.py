"""Checkpoints of training scripts, written by timm's own saver: read safely, with any wrapper."""

import argparse
import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

import fastalign as fa
import fastalign.compat.locality_alignment as la
from fastalign.config import Config
from fastalign.training.build import build_backbones
from tests.backbones.helpers import random_timm
from tests.numerics import relative_error

NAME, KWARGS = "vit_tiny_patch16_224", {"img_size": 32, "depth": 2}
SVIT = {"student_model": f"s{NAME}"}
ARGS = {"lr": 3e-4, "opt_kwargs": {"betas": [0.9, 0.95]}, "scale": (0.08, 1.0), "model_kwargs": {}}
ARGS |= {"device": torch.device("cuda", 0), "student_model_kwargs": {}}


class Student(nn.Module):
    """A student as the authors' scripts save it: an encoder with another head, and a decoder."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        encoder.head = nn.Linear(encoder.embed_dim, encoder.embed_dim)
        self.encoder, self.decoder = encoder, nn.Linear(3, 3)


def plain(name: str = NAME, **kwargs) -> nn.Module:
    return random_timm(name, **{**KWARGS, **kwargs})


def save(folder: Path, model: nn.Module, *, ema=None, metric=0.5, **args) -> Path:
    """timm's CheckpointSaver, with the state of an optimizer that took a step and the script's arguments."""
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(twin.parameters())
    sum(parameter.sum() for parameter in twin.parameters()).backward()
    optimizer.step()
    arguments = argparse.Namespace(**{**ARGS, "student_model": NAME, "model": NAME, **args})
    saver = CheckpointSaver(model, optimizer, arguments, ema, checkpoint_dir=str(folder), decreasing=True)
    saver.save_checkpoint(3, metric)
    return folder / "model_best.pth.tar"


def same(vit: nn.Module, model: nn.Module) -> bool:
    images = torch.randn(2, 3, *vit.spec.image_size)
    return torch.equal(vit.eval().forward_features(images), model.forward_features(images))


METRICS = {
    "": 0.5,
    "module.": np.float64(0.5),
    "_orig_mod.module.": np.float32(0.5),
    "student.": torch.ones(()),
}


@pytest.mark.parametrize(("wrappers", "metric"), METRICS.items())
def test_a_student_of_the_authors_scripts(tmp_path, wrappers, metric):
    """Wrapped in any way, with metrics of any type; its head is never a classifier."""
    encoder = plain()
    path = save(tmp_path, Student(copy.deepcopy(encoder)), metric=metric)
    content = torch.load(path, weights_only=False)
    assert isinstance(content["args"], argparse.Namespace)
    content["state_dict"] = {wrappers + key: value for key, value in content["state_dict"].items()}
    torch.save(content, path)
    vit = fa.create_backbone(NAME, checkpoint=path, **KWARGS)
    assert same(vit, encoder)
    assert vit.softcap is None
    with pytest.raises(fa.UserError, match=r"lacks head\.bias"):
        fa.create_backbone(NAME, checkpoint=path, **KWARGS, num_classes=192)


def test_the_average_is_read_before_the_weights(tmp_path):
    live, average = plain(), plain()
    ema = ModelEmaV3(Student(copy.deepcopy(average)))
    path = save(tmp_path, Student(live), ema=ema)
    assert same(fa.create_backbone(NAME, checkpoint=path, **KWARGS), average)
    content = torch.load(path, weights_only=False)
    content["state_dict_ema"] = None
    torch.save(content, path)
    assert same(fa.create_backbone(NAME, checkpoint=path, **KWARGS), live)
    content["model_ema"] = average.state_dict()
    torch.save(content, path)
    assert same(fa.create_backbone(NAME, checkpoint=path, **KWARGS), average)


@pytest.mark.parametrize(
    ("args", "name", "cap"),
    [
        ({"student_model": f"s{NAME}.tag"}, NAME, 30.0),
        ({"student_model": f"s{NAME}", "student_model_kwargs": {"max_attn_val": 20.0}}, NAME, 20.0),
        ({"student_model": NAME}, NAME, None),
        ({"student_model": 5, "model_kwargs": "depth=2"}, NAME, None),  # of another script
        ({"student_model": NAME}, f"s{NAME}", 30.0),
    ],
)
def test_the_softcap_comes_with_the_file_or_the_name(tmp_path, args, name, cap):
    path = save(tmp_path, Student(plain()), **args)
    vit = fa.create_backbone(name, checkpoint=path, **KWARGS)
    assert vit.softcap == cap
    assert vit.recipe["name"] == NAME
    student = {"name": NAME, "kwargs": KWARGS, "weights": "random"}
    config = Config(student=student, teacher={"name": name, "kwargs": KWARGS, "weights": str(path)})
    assert build_backbones(config)[1].softcap == cap


def test_a_recorded_softcap_is_read_first(tmp_path):
    """The drop-in saver's own file, without arguments; then against the arguments, and None as it stands."""
    encoder = timm.create_model(f"s{NAME}", num_classes=0, **KWARGS, max_attn_val=7.0)
    student = la.MaskEmbedStudent(encoder, copy.deepcopy(encoder))
    saver = la.CheckpointSaver(student, torch.optim.AdamW(student.parameters()), checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0)
    path = tmp_path / "last.pth.tar"
    content = torch.load(path)
    for changes in ({}, {"softcap": 5, "args": SVIT}, {"softcap": None, "args": SVIT}):
        torch.save(content | changes, path)
        assert fa.create_backbone(NAME, checkpoint=path, **KWARGS).softcap == changes.get("softcap", 7.0)


@pytest.mark.parametrize("cap", ["30", -3, 0, None, True, float("nan"), float("inf")])
def test_the_authors_names_take_their_argument_a_positive_number(cap):
    vit = fa.create_backbone(f"s{NAME}", **KWARGS, max_attn_val=7)
    assert vit.softcap == 7.0
    assert vit.recipe == {"name": NAME, "kwargs": {"num_classes": 0, **KWARGS}}
    with pytest.raises(fa.UserError, match=r"max_attn_val must be a positive number.*, got"):
        fa.create_backbone(f"s{NAME}", **KWARGS, max_attn_val=cap)


@pytest.mark.parametrize("name", [NAME, "beit_base_patch16_224"])
def test_layer_scale_is_folded_where_the_backbone_has_none(tmp_path, name):
    """Against timm with LayerScale, in float64: 1e-12; biases and all."""
    scaled = plain(name, init_values=0.3).double()
    assert sum("gamma" in key for key in scaled.state_dict()) == 4
    state = {f"encoder.{key}": value for key, value in scaled.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth.tar")
    torch.set_default_dtype(torch.float64)
    try:
        vit = fa.create_backbone(name, checkpoint=tmp_path / "a.pth.tar", init_values=0.0, **KWARGS).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    assert not any("gamma" in key for key in vit.state_dict())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert relative_error(vit.forward_features(images), scaled.forward_features(images)) < 1e-12


def test_layer_scale_that_the_file_lacks_is_one(tmp_path):
    encoder = plain()
    torch.save(encoder.state_dict(), tmp_path / "a.pth")
    vit = fa.create_backbone(NAME, checkpoint=tmp_path / "a.pth", init_values=1e-5, **KWARGS)
    assert torch.equal(vit.state_dict()["blocks.1.ls2.gamma"], torch.ones(192))
    assert same(vit, encoder)


def test_a_student_without_pooling_takes_it_off_the_backbone(tmp_path):
    kwargs = {"img_size": 32, "depth": 1}
    name = "vit_base_patch16_siglip_224"
    encoder = plain(name, **kwargs, global_pool="")
    path = save(tmp_path, Student(copy.deepcopy(encoder)))
    vit = fa.create_backbone(name, checkpoint=path, **kwargs)
    assert (vit.pool, vit.attn_pool) == ("none", None)
    assert same(vit, encoder)
