"""Checkpoints of training scripts, written by timm's own saver: read safely, whatever they are wrapped in."""

import argparse
import copy
import os
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
from tests.numerics import randomise, relative_error

NAME, KWARGS = "vit_tiny_patch16_224", {"img_size": 32, "depth": 2}
ARGS = {
    "lr": 3e-4,
    "opt_kwargs": {"betas": [0.9, 0.95]},
    "scale": (0.08, 1.0),
    "device": torch.device("cuda", 0),
    "model_kwargs": {},
    "student_model_kwargs": {},
}


class Student(nn.Module):
    """A student as the authors' scripts save it: an encoder with a head of its own, and a decoder."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        encoder.head = nn.Linear(encoder.embed_dim, encoder.embed_dim)
        self.encoder, self.decoder = encoder, nn.Linear(3, 3)


def plain(name: str = NAME, **kwargs) -> nn.Module:
    """timm's model with every parameter moved."""
    model = timm.create_model(name, num_classes=0, **{**KWARGS, **kwargs})
    randomise(model, 0.2)
    return model.eval()


def save(folder: Path, model: nn.Module, *, ema=None, metric=0.5, **args) -> Path:
    """timm's CheckpointSaver, with the state of an optimiser that took a step and the script's arguments."""
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    model.load_state_dict(before)
    arguments = argparse.Namespace(**{**ARGS, "student_model": NAME, "model": NAME, **args})
    scaler = torch.amp.GradScaler("cpu")
    scaler.state_dict_key = "amp_scaler"
    saver = CheckpointSaver(
        model, optimizer, arguments, ema, scaler, checkpoint_dir=str(folder), decreasing=True
    )
    saver.save_checkpoint(3, metric)
    return folder / "model_best.pth.tar"


def same(vit: nn.Module, model: nn.Module) -> bool:
    images = torch.randn(2, 3, *vit.spec.image_size)
    return torch.equal(vit.eval().forward_features(images), model.forward_features(images))


@pytest.mark.parametrize(
    "wrappers", ["", "_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod.", "student."]
)
def test_a_student_of_the_authors_scripts(tmp_path, wrappers):
    encoder = plain()
    path = save(tmp_path, Student(copy.deepcopy(encoder)))
    content = torch.load(path, weights_only=False)
    assert isinstance(content["args"], argparse.Namespace)
    content["state_dict"] = {wrappers + key: value for key, value in content["state_dict"].items()}
    torch.save(content, path)
    vit = fa.create_backbone(NAME, checkpoint=path, **KWARGS)
    assert same(vit, encoder)
    assert vit.softcap is None


def test_torchs_own_compile_and_data_parallel_wrappers(tmp_path):
    encoder = plain()
    wrapped = torch.compile(nn.DataParallel(Student(copy.deepcopy(encoder))))
    assert next(iter(wrapped.state_dict())).startswith("_orig_mod.module.encoder.")
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "a.pth.tar")
    assert same(fa.create_backbone(NAME, checkpoint=tmp_path / "a.pth.tar", **KWARGS), encoder)


def test_a_students_head_is_never_a_classifier(tmp_path):
    path = save(tmp_path, Student(plain()))
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


@pytest.mark.parametrize("metric", [0.5, np.float64(0.5), np.float32(0.5), torch.tensor(0.5)])
def test_metrics_of_any_kind(tmp_path, metric):
    encoder = plain()
    path = save(tmp_path, copy.deepcopy(encoder), metric=metric)
    assert same(fa.create_backbone(NAME, checkpoint=path, **KWARGS), encoder)


@pytest.mark.parametrize(
    ("args", "name", "cap"),
    [
        ({"student_model": f"s{NAME}.tag"}, NAME, 30.0),
        ({"student_model": f"s{NAME}", "student_model_kwargs": {"max_attn_val": 20.0}}, NAME, 20.0),
        ({"student_model": NAME}, NAME, None),
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
    student = la.MaskEmbedStudent(
        timm.create_model(f"s{NAME}", num_classes=0, **KWARGS, max_attn_val=7.0),
        timm.create_model(f"s{NAME}", num_classes=0, **KWARGS),
    )
    saver = la.CheckpointSaver(student, torch.optim.AdamW(student.parameters()), checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0)
    path = tmp_path / "last.pth.tar"
    content = torch.load(path)
    assert (content["arch"], content["softcap"], "args" in content) == ("maskembedstudent", 7.0, False)
    for recorded in (7.0, 5, None):
        args = {} if recorded == 7.0 else {"args": {"student_model": f"s{NAME}"}}
        torch.save({**content, **args, "softcap": recorded}, path)
        assert fa.create_backbone(NAME, checkpoint=path, **KWARGS).softcap == recorded
        assert la.train_utils.trained_as(torch.load(path), str(path))[1] == recorded


def test_the_authors_names_take_their_argument():
    vit = fa.create_backbone(f"s{NAME}", **KWARGS, max_attn_val=7)
    assert (vit.softcap, vit.recipe["name"], vit.recipe["kwargs"]) == (
        7.0,
        NAME,
        {"num_classes": 0, **KWARGS},
    )


@pytest.mark.parametrize("cap", ["abc", "30", -3, 0, None, True, float("nan"), float("inf")])
def test_a_cap_is_a_positive_number(cap):
    with pytest.raises(fa.UserError, match=r"max_attn_val must be a positive number, got .*: give one"):
        fa.create_backbone(f"s{NAME}", **KWARGS, max_attn_val=cap)
    with pytest.raises(fa.UserError, match="max_attn_val must be a positive number"):
        la.model_utils.check_cap(cap)


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


def test_layer_scale_that_the_file_has_not_got_is_one(tmp_path):
    encoder = plain()
    torch.save(encoder.state_dict(), tmp_path / "a.pth")
    vit = fa.create_backbone(NAME, checkpoint=tmp_path / "a.pth", init_values=1e-5, **KWARGS)
    assert torch.equal(vit.state_dict()["blocks.1.ls2.gamma"], torch.ones(192))
    assert same(vit, encoder)
    scaled = plain(init_values=0.1).state_dict()
    torch.save(
        {key: value for key, value in scaled.items() if key != "blocks.1.ls2.gamma"}, tmp_path / "a.pth"
    )
    with pytest.raises(fa.UserError, match=r"lacks blocks\.1\.ls2\.gamma"):
        fa.create_backbone(NAME, checkpoint=tmp_path / "a.pth", init_values=1e-5, **KWARGS)


def test_a_student_without_pooling_takes_it_off_the_backbone(tmp_path):
    kwargs = {"img_size": 32, "depth": 1}
    name = "vit_base_patch16_siglip_224"
    encoder = plain(name, **kwargs, global_pool="")
    path = save(tmp_path, Student(copy.deepcopy(encoder)))
    vit = fa.create_backbone(name, checkpoint=path, **kwargs)
    assert (vit.pool, vit.attn_pool) == ("none", None)
    assert same(vit, encoder)
    torch.save(encoder.state_dict(), path)
    with pytest.raises(fa.UserError, match="attn_pool"):
        fa.create_backbone(name, checkpoint=path, **kwargs)


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["args", "value of args", "optimizer", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_nothing_runs(tmp_path, place, zipped):
    attack = Attack(f"touch {tmp_path / 'ran'}")
    content = {"state_dict": plain().state_dict(), "args": argparse.Namespace(**ARGS)}
    if place == "value of args":
        content["args"].evil = attack
    else:
        content[place] = attack
    torch.save(content, tmp_path / "a.pth.tar", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        fa.UserError, match=r"a\.pth\.tar.*safely.*posix\.system.*nothing of it was run"
    ) as caught:
        fa.create_backbone(NAME, checkpoint=tmp_path / "a.pth.tar", **KWARGS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_other_files_are_refused_with_one_line(tmp_path):
    path = save(tmp_path, Student(plain()), student_model=f"s{NAME}")
    whole = path.read_bytes()
    broken = tmp_path / "broken.pth.tar"

    def message(content, name=NAME, **kwargs) -> str:
        if isinstance(content, bytes):
            broken.write_bytes(content)
        else:
            torch.save(content, broken)
        with pytest.raises(fa.UserError) as caught:
            fa.create_backbone(name, checkpoint=broken, **{**KWARGS, **kwargs})
        assert "\n" not in str(caught.value)
        assert "broken.pth.tar" in str(caught.value)
        return str(caught.value)

    assert "cut short" in message(whole[: len(whole) // 2])
    assert "cut short" in message(b"")
    assert "holds no weights" in message({"state_dict": {}})
    assert "holds a list" in message([1, 2])
    assert "state_dict is no dictionary of tensors" in message({"state_dict": {"a": 1}})
    assert "dictionary of tensors by name" in message({"state_dict": {1: torch.ones(1)}})
    assert "dictionary of tensors by name" in message({1: torch.ones(1)})
    state, args = {"state_dict": plain().state_dict()}, {"student_model": f"s{NAME}"}
    assert "max_attn_val" in message({**state, "args": {**args, "model_kwargs": {"max_attn_val": "x"}}})
    assert "softcap must be a positive number or None" in message({**state, "softcap": "x"})
    torch.save({**state, "args": {**args, "model_kwargs": "max_attn_val=3"}}, broken)
    assert fa.create_backbone(NAME, checkpoint=broken, **KWARGS).softcap == 30.0
    assert "(svit_tiny_patch16_224)" in message(whole, "vit_small_patch16_224")
    assert "lacks blocks.2" in message(whole, depth=3)
    assert "blocks.1.attn.proj.bias too" in message(whole, depth=1)
    assert "another model" in message(whole, "beit_base_patch16_224")
