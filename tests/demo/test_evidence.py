"""The demo's trials, its table of evidence, and the ablation, on mosaics of a tiny size."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

import fastalign as fa
from benchmarks import ablation
from demo import evidence, mosaics, trials
from demo.trials import Trial
from fastalign.config import load_config
from fastalign.report.run import read_probe
from fastalign.train import main as train
from fastalign.training.build import build_objective
from fastalign.utils.errors import UserError

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe like the demo's on tiny mosaics, with a random teacher, and its run."""
    root = tmp_path_factory.mktemp("evidence")
    mosaics.render(root / "data", mosaics.Settings(train=64, val=16, test=16, size=32), workers=1)
    torch.manual_seed(0)
    name, weights, path = "vit_tiny_patch16_224", str(root / "teacher.safetensors"), root / "recipe.yaml"
    save_file(fa.create_backbone(name, **KWARGS).state_dict(), weights)
    images = {split: str(root / "data" / split / "images") for split in ("train", "val")}
    tree = {
        "student": {"name": name, "weights": weights, "kwargs": KWARGS},
        "data": {**images, "threads": 1},
        "optim": {"batch_size": 16, "epochs": 1},
        "output": str(root / "run"),
        "max_steps": 2,
    }
    path.write_text(yaml.safe_dump(tree))
    assert train([str(path)]) == 0
    return path


@pytest.fixture
def here(monkeypatch):
    """Trials run in this process. The list of those that were started."""
    started = []

    def start(trial, root):
        started.append(trial)
        trial.path(root).mkdir(parents=True, exist_ok=True)
        trials.run_trial(trial, root)

    monkeypatch.setattr(trials, "start_trial", start)
    return started


def test_another_training_teacher_or_probe_has_files_of_its_own(recipe, tmp_path):
    def files(**options):
        trial = Trial("a", 0, recipe=str(recipe), **options)
        return trial.path(tmp_path), trial.results(tmp_path)

    base, probed = files(), files(heads=("mlp",))
    assert files(overrides=("masks.mode=drop",))[0] != base[0] == probed[0]
    assert probed[1] != base[1]
    (tmp_path / "teacher").write_bytes(b"x")
    another = files(overrides=(f"student.weights={tmp_path}/teacher",))
    (tmp_path / "teacher").write_bytes(b"y")
    changed = files(overrides=(f"student.weights={tmp_path}/teacher",))
    assert changed[0] != another[0] != base[0]
    assert changed[1].name != another[1].name


def test_a_trial_that_fails_names_its_log(recipe, tmp_path):
    trial = Trial("broken", 0, recipe=str(recipe), overrides=("data.train=/nowhere",))
    with pytest.raises(UserError, match=r"trial broken, seed 0, failed \(.*nowhere.*log.txt"):
        trials.run_trials([trial], tmp_path)


def test_the_table_of_evidence(recipe, here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "RECIPE", str(recipe))
    run = recipe.parent / "run"
    plain = Trial
    monkeypatch.setattr(evidence, "Trial", lambda *a, **k: plain(*a, **k, images=32, epochs=1))
    command = [str(run), "--root", str(tmp_path), "--workers", "1"]
    monkeypatch.setenv("COLUMNS", "80")
    assert evidence.main(command) == 0  # as in `make demo`
    text = capsys.readouterr().out
    lines = text[text.index("test split, percent") :].splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].split()[:3] == ["gain,", "in", "points"]
    assert {name for name in evidence.ROWS if name in text} == {evidence.TEACHER, evidence.ALIGNED}
    assert {(trial.name, trial.seed) for trial in here} == {(evidence.TEACHER, 0), (evidence.ALIGNED, 0)}
    monkeypatch.setenv("COLUMNS", "120")  # every name in one line
    assert evidence.main([*command, "--controls", "--seeds", "0", "1"]) == 0
    text = capsys.readouterr().out
    assert len(here) == 2 * len(evidence.ROWS)  # what was probed is not probed again
    assert all(name in text for name in evidence.ROWS)
    facts = json.loads((run / "evidence-test.json").read_text())
    rows = [json.loads(path.read_text()) for path in tmp_path.rglob("probes-student*.json")]
    mim = [row for part in rows if part["trial"]["name"] == "masked image modeling" for row in part["rows"]]
    values = [row["test"]["map"] for row in mim if (row["labels"], row["head"]) == ("union", "mlp")]
    assert len(values) == 2
    found = facts["table"]["masked image modeling"]["patches, MLP"]
    assert found["mean"] == pytest.approx(sum(values) / 2)
    assert found["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    # The demo's own run is the aligned student of its seed: it is not trained again.
    assert not any(t.name.startswith("aligned") and t.seed == 0 and not t.folder for t in here)
    _, settings = read_probe(run / "probe.json")
    assert all(set(setting.scores) == {"before", "aligned"} for setting in settings.values())


def test_distillation_with_nothing_hidden_hides_nothing(recipe):
    objective, _ = build_objective(load_config(recipe, list(evidence.VISIBLE)))
    visible = objective.masks(torch.arange(50), 16)
    assert visible.shape == (50, 1, 16)
    assert visible.all()


def test_the_ablation_runs_at_a_tiny_size(recipe, here, tmp_path, capsys):
    command = ["--tiny", "--seeds", "0", "--recipe", str(recipe), "--root", str(tmp_path), "--workers", "1"]
    rows = ablation.main(command)
    assert [row["variant"] for row in rows] == [ablation.BASE, "leave the sequence (mode drop)"]
    assert "| hidden patches | leave the sequence (mode drop) | 1 |" in capsys.readouterr().out


def test_gains_are_differences_within_a_seed_by_hand():
    """0.10 and 0.30 more in the two seeds that both have: 0.20, n - 1 standard deviation 0.1 * sqrt(2)."""
    base = {"seeds": [0, 1, 2], "linear": {"values": [0.2, 0.5, 0.9]}}
    row = {"seeds": [1, 2, 3], "linear": {"values": [0.6, 1.2, 0.0]}}
    assert ablation.gain(row, base, "linear") == pytest.approx({"mean": 0.2, "std": 0.1 * 2**0.5})
    assert ablation.gain({**row, "seeds": [3, 4, 5]}, base, "linear") is None
