"""The command as users run it: the files of a run, resuming, accumulation, every variant of the objective."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import fastalign as fa
from fastalign import train
from fastalign.config import Config
from fastalign.training import reporter
from fastalign.training.build import build_backbones
from tests.run_helpers import MODEL, checkpoint, lines, losses, run_of_batches


@pytest.mark.parametrize("mode", ["zero", "drop"])
def test_the_run_of_the_gpu_tests_works_on_a_cpu(tmp_path, mode):
    """Machines without a GPU skip those tests and would not notice an error in their run."""
    run, batches = run_of_batches(tmp_path, f"masks.mode={mode}", "efficiency.grad_checkpointing=true")
    assert torch.isfinite(train.update(run, batches, 0)["loss"])


def test_a_loaded_backbone_gives_the_students_tokens(recipe):
    """To the bit: with the cap, and with the epsilon of the norm that was trained, which is not CLIP's."""
    name, sizes = "vit_base_patch16_clip_quickgelu_224", {"embed_dim": 48, "num_heads": 3}
    folder = recipe(
        f"student.name={name}", *(f"student.kwargs.{k}={v}" for k, v in sizes.items()), "max_steps=2"
    )
    student = fa.MaskEmbedStudent.from_backbone(fa.create_backbone(name, img_size=32, depth=2, **sizes))
    student.load_state_dict(checkpoint(folder)["student"])
    images = torch.randn(2, 3, 32, 32)
    encoder = student.encoder.eval()
    assert torch.equal(fa.load_backbone(folder).forward_features(images), encoder.forward_features(images))


CHECKPOINT_KEYS = """
student optimizer average target_scale step best val_loss first_val_loss probed last_eval_step skipped_in_a_row bad
contents changes config is_best backbone
"""


def test_the_files_of_a_run(recipe):
    folder = recipe()
    training, validation = lines(folder, "loss"), lines(folder, "val_loss")
    assert [line["step"] for line in training] == list(range(1, 11))
    keys = {"step", "epoch", "loss", "lr", "grad_norm", "images_per_second", "data_wait", "memory"}
    assert keys <= training[0].keys()
    assert [line["step"] for line in validation] == [0, 5, 10]
    assert validation[-1]["val_loss"] < validation[0]["val_loss"]
    assert validation[0]["val_loss"] == pytest.approx(4 / 3, abs=0.15)
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["betas"] == [0.9, 0.95]
    names = ["best.pt", "step-00000005.pt", "step-00000010.pt"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == names
    facts = json.loads((folder / "backbone.json").read_text())
    assert facts["softcap"] == 30.0
    vit = fa.load_backbone(folder)
    assert vit.softcap == 30.0
    best = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
    assert best.keys() == set(CHECKPOINT_KEYS.split())
    for name, value in vit.state_dict().items():
        assert torch.equal(value, best["student"][f"encoder.{name}"])
    assert load_file(folder / "backbone.safetensors").keys() == vit.state_dict().keys()


@pytest.mark.parametrize(("size", "passes", "steps"), [(8, 4, 10), (12, 3, 6)])
def test_accumulation_gives_the_same_losses(recipe, size, passes, steps):
    """40 images in updates of 12 are 3 updates an epoch, each over exactly 12 images."""
    once = losses(recipe(f"optim.batch_size={size}", name="once"))
    folder = recipe(f"optim.batch_size={size}", f"optim.accumulate={passes}", name="accumulated")
    assert [line["step"] for line in lines(folder, "loss")] == list(range(1, steps + 1))
    assert losses(folder) == pytest.approx(once, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        ["objective=mim", "teacher.skip_blocks=0"],
        ["masks.mode=drop"],
        ["masks.mode=drop", "masks.distribution=bernoulli", "masks.complement=false", "loss.name=l1"],
        ["masks.mode=drop", "objective=mim", "efficiency.grad_checkpointing=true"],
        ["loss.name=cosine"],
        ["teacher.skip_blocks=0", "teacher.prefix_only=true"],
        ["student.freeze=true"],
        ["masks.distribution=bernoulli", "masks.ratio=0.25", "masks.complement=false", "masks.full=false"],
        ["data.randaugment=rand-m9-mstd0.5-inc1", "data.mixup=0.5", "data.cutmix=1.0", "data.crop=rrc"],
        ["loss.target_scale=auto:1", "data.val=null"],
        ["data.train=synthetic:40", "data.val=synthetic:10"],
    ],
    ids=lambda options: " ".join(options[:2]),
)
def test_variants_train(recipe, options):
    folder = recipe(*options, "max_steps=2")
    assert np.isfinite(losses(folder)).all()
    assert (folder / "backbone.json").exists() != ("student.freeze=true" in options)


def test_the_target_scale_is_measured_once(recipe, capsys, monkeypatch):
    """On all of validation, or so many batches of it, or 50 of training: 3 batches of 10 images, by 4."""
    monkeypatch.setattr(reporter, "LINE_SECONDS", -1)
    val = "synthetic:10"
    cases = (("auto", val, 3), ("auto:2", val, 2), ("auto:20", val, 3), ("auto", "null", 10))
    for scale, val, count in cases:
        options = [f"loss.target_scale={scale}", f"data.val={val}", "optim.batch_size=4"]
        folder = recipe(*options, "max_steps=1", name=f"{scale}-{val}".replace(":", "-"))
        assert f"measuring the scale of the targets: 1 of {count} batches" in capsys.readouterr().out
    recipe(*options, "max_steps=2", name=folder.name)
    assert "measuring" not in capsys.readouterr().out
    assert checkpoint(folder, 1)["target_scale"] == checkpoint(folder, 2)["target_scale"] != 1.0


def test_a_student_may_start_from_an_earlier_run(recipe):
    first = recipe("max_steps=1", f"seed={2**62 + 5}", name="first")
    second = recipe("max_steps=1", f"student.weights={first}", f"teacher.weights={first}", name="second")
    assert fa.load_backbone(second).softcap == 30.0


def test_the_teacher_has_the_students_weights_unless_told_otherwise(tmp_path):
    """Random weights are drawn anew for each backbone, so that equal ones are the same object."""
    tree = {"student": MODEL, "output": str(tmp_path)}

    def pair(**teacher) -> list[torch.Tensor]:
        torch.manual_seed(0)
        backbones = build_backbones(Config.model_validate({**tree, "teacher": teacher}))
        return [backbone.blocks[0].attn.qkv.weight for backbone in backbones]

    for same in ({}, {"weights": "random"}, {"kwargs": {"depth": 2}}):
        assert torch.equal(*pair(**same))
    student, teacher = pair(kwargs={"drop_path_rate": 0.1})
    assert not torch.equal(student, teacher)
    path = tmp_path / "other.pth"
    other = fa.create_backbone(MODEL["name"], **MODEL["kwargs"])
    torch.save(other.state_dict(), path)
    for teacher in ({"weights": str(path)}, {**MODEL, "weights": str(path)}):
        assert torch.equal(pair(**teacher)[1], other.blocks[0].attn.qkv.weight)
    with pytest.raises(fa.UserError, match=r"teacher\.weights=random_ "):
        pair(weights="random_ ")


def test_evaluating_the_average_changes_no_update(recipe):
    """With stochastic depth, which is off in the evaluation only."""
    plain = recipe("student.kwargs.drop_path_rate=0.3", name="plain")
    averaged = recipe("student.kwargs.drop_path_rate=0.3", "optim.ema=0.9", name="averaged")
    assert losses(averaged) == losses(plain)
    assert losses(averaged, "val_loss")[1:] != losses(plain, "val_loss")[1:]


def test_a_run_exports_when_it_ends(recipe, capsys):
    """Again only what is missing, or of other weights."""
    folder = recipe("max_steps=1", "export.to=[timm]")
    place = folder / "exports/timm"
    assert load_file(place / "model.safetensors")
    for steps, word in ((1, "already exported"), (2, "exported"), (2, "already exported")):
        assert f"exported: {place}" in capsys.readouterr().out
        before = (place / "model.safetensors").stat().st_ino
        recipe(f"max_steps={steps}", "export.to=[timm]")
        assert ((place / "model.safetensors").stat().st_ino == before) == (word == "already exported")
    (place / "fastalign.json").write_text("")
    recipe("max_steps=2", "export.to=[timm]")
    assert (place / "fastalign.json").read_text()
    shutil.rmtree(place)
    recipe("max_steps=2", "export.to=[timm]")
    assert place.exists()
    for target, words in (
        ("hf-klip", "export.to: unknown target hf-klip; the nearest is hf-clip"),
        ("hf-siglip", "export.to hf-siglip: vit_"),
    ):
        for options in ([], ["--dry-run"]):
            other = recipe(f"export.to=[{target}]", *options, name="other", expect=2)
            assert words in capsys.readouterr().err
            assert not (other / "metrics.jsonl").exists(), "before training"
