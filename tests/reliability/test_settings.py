"""A run that resumes with other settings: refused by name, free, or forced and recorded."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import fastalign as fa
from fastalign.config import kinds, resolve
from fastalign.training.checkpoint import changed_settings
from fastalign.utils.errors import UserError
from fastalign.utils.sections import Kind
from tests.data_helpers import needs_dali
from tests.run_helpers import MODEL, checkpoint, losses

OTHER = {
    "output": "b", "resume": "force", "seed": 5, "max_steps": 2, "objective": "mim",
    "student.name": "a", "student.weights": "random", "student.kwargs": {"depth": 3}, "student.softcap": None,
    "student.head": "mlp", "student.freeze": True,
    "teacher.name": "a", "teacher.weights": "random", "teacher.kwargs": {"depth": 3}, "teacher.skip_blocks": 2,
    "teacher.prefix_only": True,
    "decoder.layers": 3, "decoder.kwargs.width": 8, "decoder.kwargs.heads": 2,
    "decoder.kwargs.qk_norm": True, "decoder.kwargs.qkv_bias": True, "decoder.kwargs.init_values": None,
    "masks.distribution": "bernoulli", "masks.ratio": 0.3, "masks.complement": False, "masks.full": False,
    "masks.mode": "drop",
    "loss.name": "l1", "loss.target_scale": 2.0,
    "data.train": "b", "data.val": "b", "data.crop": "rrc", "data.scale": [0.5, 1.0], "data.ratio": [0.5, 2.0],
    "data.hflip": 0.1, "data.color_jitter": 0.1, "data.randaugment": "rand-m9", "data.mixup": 0.1, "data.cutmix": 0.1,
    "data.threads": 2, "data.hw_decoder_load": 0.1,
    "optim.batch_size": 512, "optim.accumulate": 2, "optim.epochs": 9, "optim.lr": 0.1,
    "optim.min_lr": 0.1, "optim.warmup_epochs": 1.0, "optim.weight_decay": 0.1, "optim.betas": [0.5, 0.6],
    "optim.clip": None, "optim.ema": 0.9, "optim.micro_batch": 4,
    "checkpoint.every_steps": 7, "checkpoint.keep": 7,
    "probe.data": "b", "probe.every_steps": 7, "probe.best": True,
    "log.every_steps": 7, "log.to": ["tensorboard"], "export.to": ["timm"],
    "efficiency.precision": "fp32", "efficiency.compile": True, "efficiency.grad_checkpointing": True,
    "efficiency.attention": "eager",
    "faults.bad_samples": 0.5, "faults.quarantine": "q", "faults.nonfinite": "stop", "faults.timeout": 5.0,
}  # fmt: skip
NEEDS = {
    "teacher.prefix_only": "teacher.skip_blocks=0",
    "masks.ratio": "masks.distribution=bernoulli",
    "probe.best": "probe.data=a",
}
"""What must hold before and after, for a value to be possible at all."""


def compare(before: list[str], now: list[str], *, finished=False):
    """The changes and notes of a run that started with some overrides and resumes with others."""
    state = {"config": resolve({}, before, "then").model_dump(mode="json"), "step": 3}
    return changed_settings(state, Path("c.pt"), resolve({}, now, "now"), {}, finished=finished)


@pytest.mark.parametrize("key", sorted(kinds()))
def test_every_key_is_free_or_refused_by_name(key):
    before = [NEEDS[key]] if key in NEEDS else []
    now = [*before, f"{key}={json.dumps(OTHER[key])}"]
    if kinds()[key] is Kind.FREE:
        assert compare(before, now) == ([], [])
        return
    with pytest.raises(UserError, match=rf"step 3 with other settings: {re.escape(key)} was .*resume=force"):
        compare(before, now)
    (change,), notes = compare(before, [*now, "resume=force"])
    assert (change.key, notes) == (key, [])
    with pytest.raises(UserError, match="it is finished"):
        compare(before, [*now, "resume=force"], finished=True)


def test_max_steps_may_grow_but_not_below_the_steps_done():
    for before, now in (("3", "4"), ("3", "null"), ("null", "4"), ("4", "3")):
        assert compare([f"max_steps={before}"], [f"max_steps={now}"]) == ([], [])
    with pytest.raises(UserError, match="max_steps was 4, is 2;"):
        compare(["max_steps=4"], ["max_steps=2"])


def test_a_finished_run_is_not_relabelled(recipe, capsys):
    """What a sweep with one `output` does."""
    folder = recipe("max_steps=2")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for force in ([], ["resume=force"]):
        recipe("max_steps=2", "optim.lr=0.01", "optim.weight_decay=0.3", *force, expect=2)
        said = capsys.readouterr().err
        assert "optim.lr was 0.001, is 0.01; optim.weight_decay was 0.01, is 0.3; it is finished" in said
        recipe("max_steps=2", "data.threads=2", "log.every_steps=1", *force)
        assert "is finished: step 2 of 2, nothing to train" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    facts = json.loads(before["backbone.json"])
    assert (facts["settings"]["optim"]["lr"], facts["changes"]) == (0.001, [])
    assert "threads" not in facts["settings"]["data"]


def optimizer_step(before: dict, after: dict, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight after an update and AdamW by hand, for betas 0.5, 0.6 and decay 0.3."""
    index = next(iter(before["optimizer"]["state"]))
    name, moments = list(before["student"])[index], after["optimizer"]["state"][index]
    t, value = int(moments["step"]), before["student"][name].double() * (1 - lr * 0.3)
    first, second = moments["exp_avg"].double() / (1 - 0.5**t), moments["exp_avg_sq"].double() / (1 - 0.6**t)
    assert before["optimizer"]["state"][index]["step"] + 1 == t
    return after["student"][name].double(), value - lr * first / (second.sqrt() + 1e-8)


def test_a_forced_change_takes_effect_and_is_recorded(recipe, capsys):
    """In the optimizer, the schedule and the average; reported with its step, and kept by later starts."""
    every = ["checkpoint.every_steps=1", "checkpoint.keep=20"]
    folder = recipe("max_steps=3", *every)
    new = ["optim.lr=0.01", "optim.weight_decay=0.3", "optim.betas=[0.5, 0.6]", "optim.ema=0.9"]
    recipe("max_steps=4", *every, *new, expect=2)
    capsys.readouterr()
    recipe("max_steps=4", *every, *new, "resume=force")
    said = capsys.readouterr().out
    assert "resume=force: from step 3 on optim.weight_decay was 0.01, is 0.3" in said
    before, after = checkpoint(folder, 3), checkpoint(folder, 4)
    lr = losses(folder, "lr")[-1]
    assert lr > 0.005  # of ten steps, cosine from 0.01
    found, wanted = optimizer_step(before, after, lr)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7)
    name = next(name for name, value in after["student"].items() if value.is_floating_point())
    average = 0.9 * before["student"][name] + 0.1 * after["student"][name]
    assert torch.allclose(after["average"][name], average, rtol=1e-5, atol=1e-7)
    changes = map(json.loads, (folder / "changes.jsonl").read_text().splitlines())
    assert [(change["step"], change["key"], change["now"]) for change in changes] == [
        (3, "optim.lr", 0.01), (3, "optim.weight_decay", 0.3), (3, "optim.betas", [0.5, 0.6]), (3, "optim.ema", 0.9)
    ]  # fmt: skip
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["optim"]["lr"], config["resume"]) == (0.01, "auto")
    recipe("max_steps=5", *every, expect=2)  # the values of the beginning are no longer those of the run
    recipe("max_steps=5", *every, *new[:3], "resume=force")  # and the average off again
    facts = json.loads((folder / "backbone.json").read_text())
    assert facts["settings"]["optim"]["weight_decay"] == 0.3
    assert [change["step"] for change in facts["changes"]] == [3, 3, 3, 3, 4]
    weight = next(iter(load_file(folder / "backbone.safetensors").items()))
    assert torch.equal(weight[1], checkpoint(folder)["student"][f"encoder.{weight[0]}"])


def test_a_change_without_a_checkpoint_is_not_recorded(recipe, monkeypatch):
    """A forced start that was killed before it saved has changed nothing."""
    folder = recipe("max_steps=2")
    monkeypatch.setattr("fastalign.train.train_loop", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recipe("max_steps=4", "optim.lr=0.01", "resume=force")
    assert (folder / "changes.jsonl").exists()
    monkeypatch.undo()
    recipe("max_steps=4")
    assert not (folder / "changes.jsonl").exists()


def test_a_forced_loss_is_measured_and_chosen_anew(recipe):
    """The scale of the targets is the mean squared error's alone, and losses of two kinds do not compare."""
    recipe("max_steps=1")
    state = checkpoint(recipe("max_steps=2", "loss.name=l1", "resume=force"))
    assert (state["is_best"], state["target_scale"], state["config"]["loss"]["name"]) == (True, 1.0, "l1")


@needs_dali
def test_paths_may_move_and_their_contents_may_not_change(recipe, images, tmp_path, monkeypatch, capsys):
    """Names of images, bytes of images, and weights."""
    torch.manual_seed(0)
    vit = fa.create_backbone(MODEL["name"], **MODEL["kwargs"])
    for place in ("here", "there"):
        shutil.copytree(images / "train", tmp_path / place / "train")
        save_file(vit.state_dict(), tmp_path / place / "weights.safetensors")

    def at(place):
        return [f"data.train={place}/train", f"student.weights={place}/weights.safetensors"]

    whole = recipe(*at(tmp_path / "here"), "max_steps=5", name="whole")
    folder = recipe(*at(tmp_path / "here"), "max_steps=2")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    recipe(*at("there"), "max_steps=5")
    said = capsys.readouterr().out
    assert f'data.train was "{tmp_path}/here/train", is "there/train": the contents are the same' in said
    assert losses(folder) == losses(whole)
    paths = sorted(Path("there/train").glob("*/*.jpg"))
    weights = Path("there/weights.safetensors")

    def refused(words: str) -> None:
        recipe(*at("there"), expect=2)
        assert words in capsys.readouterr().err

    kept = weights.read_bytes()
    save_file(vit.state_dict() | {"cls_token": vit.cls_token + 1}, weights)
    refused('student.weights "there/weights.safetensors" has other contents than before')
    weights.write_bytes(kept)
    new = Path(shutil.copy(paths[0], paths[0].with_name("0-new.jpg")))
    refused('data.train "there/train" has other contents than before')
    new.unlink()
    for path in paths:
        path.write_bytes(path.read_bytes() + b" ")
    refused('data.train "there/train" has other contents than before')


def test_a_random_teacher_is_reported_and_recorded(recipe, capsys, tmp_path):
    folder = recipe("max_steps=1")
    assert "warning: student.weights=random: the teacher has random weights" in capsys.readouterr().out
    teacher = {"name": MODEL["name"], "weights": "random"}
    assert json.loads((folder / "backbone.json").read_text())["teacher"] == teacher
    path = tmp_path / "weights.safetensors"
    save_file(fa.create_backbone(MODEL["name"], **MODEL["kwargs"]).state_dict(), path)
    recipe("max_steps=1", f"teacher.weights={path}", name="other")
    assert "warning" not in capsys.readouterr().out
