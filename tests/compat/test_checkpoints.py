"""The authors' checkpoints: saved, resumed, loaded by a plain backbone."""

import argparse
import copy
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import fastalign.compat.locality_alignment as la
from tests.compat.helpers import ONE, batch, make, student
from tests.numerics import randomise, relative_error


def save(folder, model, metrics=(None,), **options):
    args = argparse.Namespace(model=f"s{ONE}", betas=(0.9, 0.95), folder=Path("x"), extra={"a": 1})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    places = {"checkpoint_dir": str(folder), "recovery_dir": str(folder)}
    saver = la.CheckpointSaver(model, optimizer, args, decreasing=True, **places, **options)
    return saver, [saver.save_checkpoint(epoch, metric) for epoch, metric in enumerate(metrics)]


def test_a_checkpoint_is_plain_and_resumes(tmp_path):
    model = student(make(f"s{ONE}", depth=1))
    saver, _ = save(tmp_path, model)
    saver.save_recovery(0, 3)
    assert (tmp_path / "recovery-0-3.pth.tar").is_file()
    state = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    plain = {"model": f"s{ONE}", "betas": [0.9, 0.95], "folder": "x", "extra": {"a": 1}}
    assert (state["args"], state["softcap"], state["arch"]) == (plain, 30.0, f"s{ONE}")
    other = student(make(f"s{ONE}", depth=1))
    randomise(other)
    assert timm.models.resume_checkpoint(other, str(tmp_path / "last.pth.tar")) == 1
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_the_best_and_every_third_checkpoint_stay(tmp_path):
    model = nn.Linear(2, 2)
    metrics = [0.9, 0.5, 0.7, 0.6, 0.4, 0.8]
    _, best = save(tmp_path, model, metrics, max_history=2, retain_interval=3)
    assert best[-1] == (0.4, 4)
    # the two best are 1 and 4; epoch 2 is a third one, epoch 5 was never among the best
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{e}.pth.tar" for e in (1, 2, 4)
    ]
    assert torch.load(tmp_path / "model_best.pth.tar", weights_only=True)["epoch"] == 4


def test_a_student_fits_a_plain_backbone_without_layer_scale(tmp_path):
    """The factor goes into the layer before it; pooling goes; the soft-cap's loss is named."""
    scaled = make(f"s{ONE}", init_values=0.3)
    ours = student(scaled)
    randomise(ours)
    save(tmp_path, ours)
    plain = make(f"s{ONE}", global_pool="avg").eval()
    missing, extra = la.load_checkpoint_auto(plain, str(tmp_path / "last.pth.tar"), strict=False)
    assert {key.partition(".")[0] for key in extra} == {"head", "norm"}
    assert {key.partition(".")[0] for key in missing} == {"fc_norm"}
    assert plain.global_pool is None
    images = batch(scaled)[0]
    wanted = ours.encoder.eval().forward_intermediates(images, norm=False, intermediates_only=True)[-1]
    found = plain.forward_intermediates(images, norm=False, intermediates_only=True)[-1]
    assert relative_error(found, wanted) < 1e-12
    with pytest.warns(UserWarning, match="capped at 30"):
        la.load_checkpoint_auto(make(), str(tmp_path / "last.pth.tar"), strict=False)


def test_a_student_fits_itself_and_averages_are_preferred(tmp_path):
    ours = student(make(depth=1))
    average = {f"_orig_mod.module.{key}": value + 1 for key, value in ours.state_dict().items()}
    namespace = argparse.Namespace(model=ONE)
    path = tmp_path / "old.pth.tar"
    torch.save({"state_dict": ours.state_dict(), "state_dict_ema": average, "args": namespace}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for use_ema in (True, False):
            other = copy.deepcopy(ours)
            la.load_checkpoint_auto(other, str(path), use_ema=use_ema)
            shift = 1.0 if use_ema else 0.0
            assert torch.equal(other.decoder.head.bias, ours.decoder.head.bias + shift)
