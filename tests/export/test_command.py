"""The command: what it refuses, replaces and publishes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastalign as fa
from fastalign.data.index import save_index
from fastalign.export import hf, targets, towers
from fastalign.export.__main__ import main
from fastalign.training.checkpoint import publish_backbone
from tests.export.helpers import SMALL, facts


def test_a_model_that_differs_is_not_written(runs, tmp_path, capsys, monkeypatch):
    """A weight that goes astray: the fresh libraries' classes would load it without a word."""
    right = targets.TARGETS["hf-clip"]

    def astray(vit):
        state = towers.CLIP.state(vit)
        names = [f"vision_model.encoder.layers.1.layer_norm{number}.bias" for number in (1, 2)]
        return state | dict(zip(names, [state[name] for name in reversed(names)], strict=True))

    misplaced = right._replace(write=towers.CLIP._replace(state=astray).write)
    monkeypatch.setitem(targets.TARGETS, "hf-clip", misplaced)
    assert main([str(runs("clip")), "--to", "hf-clip", "--output", str(tmp_path / "export")]) == 2
    assert "differs from ours by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def not_a_number(path: Path) -> None:
    weights = load_file(path)
    weights["norm.weight"][3] = float("nan")
    save_file(weights, path)


KWARGS = {**SMALL, "num_classes": 0}
BAD = {
    "no such run": (lambda run: ["/no/such/run", "--to", "timm"], ["/no/such/run", "not a directory"]),
    "no backbone": (lambda run: (run / "backbone.json").unlink(), ["no backbone at", "finished run"]),
    "no weights": (lambda run: (run / "backbone.safetensors").unlink(), ["no weights file at"]),
    "half a backbone": (
        lambda run: half(run / "backbone.safetensors"),
        ["backbone.safetensors", "weights file"],
    ),
    "half of its facts": (lambda run: half(run / "backbone.json"), ["backbone.json is damaged"]),
    "half a checkpoint": (
        lambda run: half(run / "checkpoints" / "step-00000003.pt"),
        ["00003.pt is damaged"],
    ),
    "a backbone of another size": (
        lambda run: edit(run / "backbone.json", kwargs={**KWARGS, "depth": 3}),
        ["another model", "blocks.2"],
    ),
    "not a number": (lambda run: not_a_number(run / "backbone.safetensors"), ["norm.weight is not finite"]),
    "unknown architecture": (
        lambda run: edit(run / "backbone.json", name="vit_bass_patch16_224"),
        ["vit_bass_patch16_224", "nearest"],
    ),
    "an architecture that does not fit": (
        lambda run: [str(run), "--to", "hf-siglip"],
        ["--to hf-siglip", "class_token is True, wanted False", "what fits: timm, hf-clip, open-clip"],
    ),
    "a folder of something else": (
        lambda run: [str(run), "--to", "timm", "--output", str(run / "checkpoints")],
        ["--output", "is not an export"],
    ),
    "no such images": (
        lambda run: [str(run), "--to", "timm", "--images", "/no/such/images"],
        ["/no/such/images"],
    ),
    "a damaged probe": (lambda run: (run / "probe.json").write_text("{"), ["probe.json is damaged"]),
    "output is no folder": (
        lambda run: [str(run), "--to", "timm", "--output", "/dev/null/x"],
        ["/dev/null"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(damaged, capsys, case):
    spoil, words = BAD[case]
    arguments = spoil(damaged)
    assert main(arguments if isinstance(arguments, list) else [str(damaged), "--to", "timm"]) == 2
    error = capsys.readouterr().err.splitlines()
    error = [line for line in error if line.startswith("fastalign:")]
    assert len(error) == 1
    for word in words:
        assert word in error[0]
    assert not (damaged / "exports" / "timm").exists()


def test_a_library_that_is_not_installed(runs, capsys, monkeypatch):
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    assert main([str(runs("clip")), "--to", "hf-clip"]) == 2
    assert "pip install 'transformers>=5.20'" in capsys.readouterr().err


def test_loading_what_is_no_export(tmp_path):
    with pytest.raises(fa.UserError, match=r"no config\.json"):
        hf.load_tower(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(fa.UserError, match="bert"):
        hf.load_tower(tmp_path)


def test_an_earlier_export_is_replaced(runs, tmp_path):
    output = tmp_path / "export"
    for target in ("hf-clip", "timm"):
        assert main([str(runs("clip")), "--to", target, "--output", str(output)]) == 0
    assert not (output / "preprocessor_config.json").exists()
    assert facts(output)["target"] == "timm"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_follow_the_umask(runs, tmp_path, monkeypatch, umask):
    """An export of every kind, the facts of a run, and an index in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = os.umask(umask)
    try:
        for target in ("timm", "hf-clip", "open-clip"):
            assert main([str(runs("clip", None)), "--to", target, "--output", str(tmp_path / target)]) == 0
        state = torch.load(runs("clip") / "checkpoints" / "best.pt", weights_only=True)
        publish_backbone(tmp_path, state)
        assert save_index("kind", "key", {"offsets": np.arange(3)})
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.name != "__pycache__"]
    assert {path.suffix for path in written} >= {".safetensors", ".json", ".idx", ".md"}
    for path in written:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_push_to_hub(runs, tmp_path, capsys, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, exist_ok):
            if name == "refused":
                raise ValueError("no login\nmore")
            calls.append((name, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    command = [str(runs("clip")), "--to", "timm", "--output", str(tmp_path / "export"), "--push-to-hub"]
    assert main([*command, "me/model"]) == 0
    assert calls[0] == ("me/model", True)
    assert calls[1][1] == [
        "README.md", "config.json", "decoder.safetensors", "fastalign.json", "model.safetensors",
    ]  # fmt: skip
    assert main([*command, "refused"]) == 2
    assert "--push-to-hub refused: no login;" in capsys.readouterr().err
