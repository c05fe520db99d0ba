"""The probe during training: its score, what it must not change, what it selects, and resuming."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastalign as fa
from fastalign import train
from fastalign.evaluation import patches
from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.features import read_patch_features
from fastalign.evaluation.options import Plan, Recipe
from fastalign.evaluation.patches import Task, evaluate_head, fit_head
from tests.evaluation.helpers import CPU, SINGLE, put, results
from tests.run_helpers import checkpoint, lines, losses, torchrun


@pytest.fixture
def recipe(recipe):
    """Of a narrow student."""
    narrow = ("student.kwargs.embed_dim=48", "student.kwargs.num_heads=3")
    return lambda *overrides, name="run": recipe(*narrow, *overrides, name=name)


@pytest.fixture
def scripted(monkeypatch):
    """Probes that take no time and answer by step. Returns the steps that were asked for."""
    asked = []

    def install(answers: dict[int, float]) -> list[int]:
        def probe_student(run, splits, reporter):
            asked.append(run.state.step)
            return {"macro_recall": 0.5, "map": answers[run.state.step], "loss": 0.7}

        monkeypatch.setattr(train, "probe_student", probe_student)
        return asked

    return install


def best_state(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "best.pt", weights_only=True)


def facts(folder: Path) -> dict:
    return results(folder / "backbone.json")


@pytest.mark.parametrize("options", [[], ["optim.ema=0.5"]], ids=["live", "averaged"])
def test_the_score_is_that_of_the_saved_backbone(recipe, scenes, monkeypatch, options):
    """Read again from the run folder, with 12 and 5 images that are chosen here."""
    monkeypatch.setattr(patches, "IMAGES", {"train": 12, "val": 5})
    folder = recipe(f"probe.data={scenes}", "data.val=null", "seed=3", *options)
    vit, features = fa.load_backbone(folder), {}
    for split, total, most in (("train", 20, 12), ("val", 8, 5)):
        part = open_labelled(str(scenes), split).subset(np.array([total * i // most for i in range(most)]))
        features[split] = read_patch_features(vit, part, SINGLE, threads=1)
    task = Task("transformer", "union", 0, 3)
    plan = Plan(recipe=Recipe(epochs=3, batch_size=12))
    head, *_ = fit_head(task, vit.spec, features["train"], None, plan, **CPU)
    wanted = evaluate_head(head, task, features["val"], **CPU)
    found = lines(folder, "probe_map")[-1]
    assert found["step"] == 8
    for name in ("macro_recall", "map", "loss"):
        assert found[f"probe_{name}"] == pytest.approx(wanted[name], rel=1e-6)
        assert facts(folder)["probe"][name] == found[f"probe_{name}"]


@pytest.mark.parametrize(("every", "steps"), [("null", [0, 4, 8]), ("2", [0, 2, 4, 6, 8])])
def test_training_has_the_same_bits_with_and_without(recipe, scenes, every, steps):
    options = ["student.kwargs.drop_path_rate=0.3", "optim.ema=0.9", "data.color_jitter=0.4"]
    plain = recipe(*options, name="plain")
    probed = recipe(*options, f"probe.data={scenes}", f"probe.every_steps={every}", name="probed")
    assert losses(probed) == losses(plain)
    assert lines(probed, "val_loss") == lines(plain, "val_loss")
    for part in ("student", "average"):
        ours, theirs = (checkpoint(folder)[part] for folder in (probed, plain))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found = lines(probed, "probe_map")
    assert [(line["step"], line["epoch"]) for line in found] == [(step, int(step > 4)) for step in steps]
    assert found[0].keys() == {"step", "epoch", "probe_macro_recall", "probe_map", "probe_loss"}


@pytest.mark.parametrize("setting", ["true", "blocks"])
def test_no_graph_is_compiled_for_it(recipe, scenes, capturing, setting):
    options = [f"efficiency.compile={setting}", "max_steps=3", "data.val=null"]
    recipe(*options, name="plain")
    wanted = len(capturing)
    assert wanted
    torch._dynamo.reset()
    recipe(*options, f"probe.data={scenes}", "probe.every_steps=1", name="probed")
    assert len(capturing) == 2 * wanted


def test_the_best_probe_chooses(recipe, scenes, scripted):
    """Also inside an epoch; the probe before the first step does not take part."""
    scripted({0: 0.9, 2: 0.3, 4: float("nan"), 6: 0.6, 8: 0.6})
    options = [f"probe.data={scenes}", "probe.every_steps=2"]
    folder = recipe(*options, "probe.best=true", name="best")
    assert best_state(folder)["step"] == facts(folder)["step"] == 6
    assert facts(folder)["probe"] == {"step": 6, "macro_recall": 0.5, "map": 0.6, "loss": 0.7}
    assert facts(folder)["val_loss"] is None, "none was measured at that step"
    kept = best_state(folder)["student"]
    assert all(torch.equal(v, kept[f"encoder.{k}"]) for k, v in fa.load_backbone(folder).state_dict().items())
    usual = recipe(*options, name="usual")
    found = [line["val_loss"] for line in lines(usual, "val_loss")]
    assert found == sorted(found, reverse=True)
    assert best_state(usual)["step"] == facts(usual)["step"] == 8, "of the lowest validation loss"


def test_after_a_resume_the_same_one_is_best(recipe, scenes, scripted, monkeypatch):
    """Killed at step 7, once a checkpoint of step 6 is there; what was probed by then is not probed again."""
    asked = scripted({0: 0.1, 2: 0.5, 4: 0.2, 6: 0.3, 8: 0.4})
    options = [f"probe.data={scenes}", "probe.every_steps=2", "probe.best=true", "checkpoint.every_steps=3"]
    whole = recipe(*options, name="whole")
    asked.clear()
    update = train.update

    def killed(run, *rest):
        if run.state.step == 7:
            raise ZeroDivisionError
        return update(run, *rest)

    monkeypatch.setattr(train, "update", killed)
    with pytest.raises(ZeroDivisionError):
        recipe(*options, name="parts")
    monkeypatch.setattr(train, "update", update)
    parts = recipe(*options, name="parts")
    assert asked == [0, 2, 4, 6, 8]
    assert lines(parts, "probe_map") == lines(whole, "probe_map")
    assert losses(parts) == losses(whole)
    for folder in (whole, parts):
        assert best_state(folder)["step"] == facts(folder)["step"] == 2
        assert checkpoint(folder)["best"] == 0.5
        assert checkpoint(folder)["probed"]["step"] == 8


def test_switched_on_midway_the_selection_starts_again(recipe, scenes, scripted):
    """By force: a loss and a score do not compare, whichever came first."""
    scripted({0: 0.1, 4: 0.9, 5: 0.3, 8: 0.2})
    probed, best = f"probe.data={scenes}", "probe.best=true"
    assert facts(recipe(probed, "max_steps=4"))["step"] == 4
    assert facts(recipe(probed, best, "max_steps=5", "resume=force"))["step"] == 5
    assert facts(recipe(probed, best))["step"] == 5
    recipe(probed, best, "max_steps=5", name="back")
    assert facts(recipe("resume=force", name="back"))["step"] == 8


@pytest.mark.slow
def test_two_ranks(recipe, scenes, tmp_path):
    """Rank 0 probes, both know the score, and both end where it fails."""
    options = [f"probe.data={scenes}", "probe.every_steps=3", "probe.best=true"]
    alone, two = recipe(*options, name="alone"), tmp_path / "two"
    command, same = ("-m", "fastalign.train"), alone / "config.yaml"
    torchrun(*command, same, f"output={two}")
    ours, theirs = lines(two, "probe_map"), lines(alone, "probe_map")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [0, 3, 6, 8]
    assert ours[0]["probe_loss"] == pytest.approx(theirs[0]["probe_loss"], rel=1e-5)
    best = max(ours[1:], key=lambda line: line["probe_map"])
    assert best_state(two)["step"] == facts(two)["step"] == best["step"]
    bad = Path(shutil.copytree(scenes, tmp_path / "bad"))
    put(bad / "train/labels/train00.png", Image.fromarray(np.full((32, 32), 9, np.uint8)))
    for place, words in ((bad, "train00.png"), (tmp_path / "none", "no such folder")):
        said = torchrun(*command, same, f"probe.data={place}", f"output={tmp_path / 'fails'}", expect=1)
        assert said.count("fastalign:") == 1
        assert words in said
