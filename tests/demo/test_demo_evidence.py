"""The demo's trials, its table of evidence, and the ablation, on mosaics of a tiny size."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import fastalign as fa
from benchmarks import ablation
from demo import evidence, mosaics, trials
from demo.trials import Trial
from fastalign.config import load_config
from fastalign.report.probe import read_probe
from fastalign.train import main as train
from fastalign.utils.errors import UserError

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe like the demo's on tiny mosaics, with a teacher that knows nothing."""
    root = tmp_path_factory.mktemp("evidence")
    mosaics.render(root / "data", mosaics.Settings(train=64, val=16, test=16, size=32), workers=1)
    torch.manual_seed(0)
    save_file(fa.create_backbone("vit_tiny_patch16_224", **KWARGS).state_dict(), root / "teacher.safetensors")
    tree = {
        "student": {
            "name": "vit_tiny_patch16_224",
            "weights": str(root / "teacher.safetensors"),
            "kwargs": KWARGS,
        },
        "data": {
            "train": str(root / "data/train/images"),
            "val": str(root / "data/val/images"),
            "threads": 1,
        },
        "optim": {"batch_size": 16, "epochs": 1},
        "output": str(root / "run"),
        "max_steps": 2,
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert train([str(root / "recipe.yaml")]) == 0
    return root / "recipe.yaml"


@pytest.fixture
def here(monkeypatch):
    """Trials in this process, which starts no interpreter for each."""
    started = []

    def start(trial, root):
        started.append(trial)
        trial.place(root).mkdir(parents=True, exist_ok=True)
        trials.run_trial(trial, root)

    monkeypatch.setattr(trials, "_start", start)
    return started


def test_a_trial_is_trained_and_probed_once(recipe, here, tmp_path):
    trial = Trial("aligned", 1, recipe=str(recipe), images=32, epochs=1, heads=("linear",))
    first = trials.run_trials([trial], tmp_path, lambda text: None)
    again = trials.run_trials([trial], tmp_path, lambda text: None)
    assert again == first
    assert len(here) == 1
    lines = [json.loads(line) for line in (trial.place(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 2
    asked = {(row["labels"], row["head"]) for row in first[0]}
    assert asked == {("union", "linear"), ("global-union", "linear"), ("global-in-patch", "linear")}
    assert load_config(trial.place(tmp_path) / "config.yaml").seed == 1


def test_trials_that_train_something_else_have_another_folder(recipe, tmp_path):
    base = Trial("a", 0, recipe=str(recipe))
    other = Trial("a", 0, recipe=str(recipe), overrides=("masks.mode=drop",))
    assert base.place(tmp_path) != other.place(tmp_path)
    assert base.place(tmp_path) == Trial("a", 0, recipe=str(recipe), heads=("mlp",)).place(tmp_path)
    assert base.results(tmp_path) != Trial("a", 0, recipe=str(recipe), heads=("mlp",)).results(tmp_path)


def test_another_teacher_makes_another_trial(recipe, tmp_path):
    trial, weights = Trial("a", 0, recipe=str(recipe)), recipe.parent / "teacher.safetensors"
    place, results, kept = trial.place(tmp_path), trial.results(tmp_path), weights.read_bytes()
    try:
        weights.write_bytes(kept + b"x")
        assert trial.place(tmp_path) != place
        assert trial.results(tmp_path).name != results.name
    finally:
        weights.write_bytes(kept)


def test_a_trial_that_fails_names_its_log(recipe, tmp_path):
    trial = Trial("broken", 0, recipe=str(recipe), overrides=("data.train=/nowhere",))
    with pytest.raises(UserError, match=r"trial broken, seed 0, failed \(.*nowhere.*log.txt"):
        trials.run_trials([trial], tmp_path, lambda text: None)


def test_an_untrained_decoder_keeps_shapes_and_depends_on_the_seed(recipe, tmp_path):
    probed = [
        trials._probed(Trial("d", seed, recipe=str(recipe), read="decoder"), tmp_path, torch.device("cpu"))
        for seed in (0, 0, 1)
    ]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        first, same, other = (one.encode(images)[0] for one in probed)
    assert first.shape == (2, 17, 32)
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    assert len({one.identity for one in probed}) == 2


def test_the_table_of_evidence(recipe, here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "RECIPE", str(recipe))
    run = recipe.parent / "run"
    plain = Trial
    monkeypatch.setattr(evidence, "Trial", lambda *a, **k: plain(*a, **k, images=32, epochs=1))
    assert evidence.main([str(run), "--root", str(tmp_path), "--seeds", "0", "1", "--workers", "1"]) == 0
    text = capsys.readouterr().out
    for name in evidence.ROWS:
        assert name in text
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
    assert {model for model, *_ in read_probe(run / "probe.json").results} >= {"before", "aligned"}


def test_nothing_is_hidden_where_nothing_is_hidden(recipe):
    from fastalign.training.build import build_objective

    objective, _ = build_objective(load_config(recipe, list(evidence.NOTHING_HIDDEN)))
    visible = objective.masks(torch.arange(50), 16)
    assert visible.shape == (50, 1, 16)
    assert visible.all()


def test_evidence_wants_a_finished_run(tmp_path, capsys):
    assert evidence.main([str(tmp_path)]) == 2
    assert "is no finished run" in capsys.readouterr().err


def test_the_ablation_runs_at_a_tiny_size(recipe, here, tmp_path, capsys):
    rows = ablation.main(
        ["--tiny", "--seeds", "0", "--recipe", str(recipe), "--root", str(tmp_path), "--workers", "1"]
    )
    assert [row["variant"] for row in rows] == [ablation.BASE, "leave the sequence (mode drop)"]
    assert "| hidden patches | leave the sequence (mode drop) | 1 |" in capsys.readouterr().out


def test_gains_are_differences_within_a_seed_by_hand():
    """0.10 and 0.30 more in the two seeds that both have: 0.20, n - 1 standard deviation 0.1 * sqrt(2)."""
    base = {"seeds": [0, 1, 2], "linear": {"values": [0.2, 0.5, 0.9]}}
    row = {"seeds": [1, 2, 3], "linear": {"values": [0.6, 1.2, 0.0]}}
    assert ablation.gain(row, base, "linear") == pytest.approx({"mean": 0.2, "std": 0.1 * 2**0.5})
    assert ablation.gain({**row, "seeds": [3, 4, 5]}, base, "linear") is None


def test_every_variant_of_the_ablation_is_a_recipe_of_its_own():
    seen = set()
    for members in ablation.VARIANTS.values():
        for overrides in members.values():
            seen.add(load_config(ablation.RECIPE, [*ablation.LENGTH, *overrides]).model_dump_json())
    assert len(seen) == sum(len(members) for members in ablation.VARIANTS.values())


def test_the_ablation_counts_what_a_step_costs(recipe):
    full = ablation.gigaflops((), str(recipe))
    assert ablation.gigaflops(("masks.mode=drop",), str(recipe)) < full
    assert ablation.gigaflops(("decoder.layers=4",), str(recipe)) > full
    assert ablation.gigaflops(("optim.epochs=2",), str(recipe)) == full


def test_an_unknown_variant_is_named(tmp_path):
    with pytest.raises(UserError, match="--only nonsense"):
        ablation.main(["--only", "nonsense", "--root", str(Path(tmp_path))])
