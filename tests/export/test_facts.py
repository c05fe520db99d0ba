"""What an export says of itself: statistics of its features, licence, transform; and its decoder."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image

import fastalign as fa
from fastalign.config import Config
from fastalign.export import hf, load_decoder, measure
from fastalign.export.__main__ import main
from fastalign.export.run import Run
from tests.export.helpers import FAMILIES, evaluation_transform, facts, images, small, truth
from tests.numerics import relative_error
from tests.truth import StudentTruth


def test_mean_and_std_of_the_features(runs, exported, images, tmp_path, monkeypatch):
    """Images that cannot be read are left out, as in training, also if they are all of a batch."""
    pictures = shutil.copytree(images / "val", tmp_path / "pictures")
    monkeypatch.setattr(measure, "BATCH", 2)
    transform, paths = evaluation_transform("clip"), sorted(pictures.glob("*/*.jpg"))
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    for name in ("broken1.jpg", "broken2.jpg"):
        (pictures / name).write_bytes(paths[0].read_bytes()[:100])
    output = exported("clip", "timm", "--images", str(pictures))
    with torch.no_grad():
        patches = truth(runs("clip"), "clip", 0.5).forward_features(batch.double())[:, 1:].flatten(0, 1)
    found = facts(output)["features"]
    assert found["images"] == len(paths)
    assert relative_error(torch.tensor(found["mean"]), patches.mean(0)) < 1e-4
    assert relative_error(torch.tensor(found["std"]), patches.std(0, correction=0)) < 1e-4


def test_what_must_be_known_is_written(damaged):
    row = {"model": "aligned", "head": "linear", "labels": "patch", "test": {"macro_recall": {"mean": 0.5}}}
    unknown = row | {"test": {"macro_recall": {"mean": None}}}
    (damaged / "probe.json").write_text(json.dumps({"summary": [row, unknown]}))
    assert main([str(damaged), "--to", "hf-clip"]) == 0
    output = damaged / "exports" / "hf-clip"
    found, card = facts(output), (output / "README.md").read_text()
    assert found["source"]["licence"] is None, "unknown for weights from a file"
    assert found["recipe"]["optim"]["lr"] == 0.05
    assert found["probe"] == {"summary": [row, unknown]}
    read = {"layer": -1, "normed": True, "prefix_tokens": 1, "patch_grid": [2, 2], "width": 48}
    assert found["read"] == read
    for words in (
        "license: other\nlicense_name: see-source\n",
        f"---\n# {FAMILIES['clip']}, locality-aligned\n\n**Soft-cap: its attention logits are capped at 0.5. ",
        "[see source](https://huggingface.co/timm/vit_base_patch16_clip_224.openai)",
        "| patch probe: aligned, linear head on patch labels | 50.0% |",
        f'AutoModel.from_pretrained("{output}", trust_remote_code=True)',
    ):
        assert words in card
    assert card.count("patch probe") == 1


def test_the_recipe_is_the_one_that_trained_the_backbone(damaged, capsys):
    """`config.yaml` is of the newest start, which may have forced other settings; its data may be gone."""
    path = damaged / "config.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["optim"] |= {"lr": 9.0, "ema": 0.5}
    recipe["decoder"]["kwargs"]["heads"] = 1
    recipe["data"]["val"] = "/gone/val"
    path.write_text(yaml.safe_dump(recipe))
    assert main([str(damaged), "--to", "timm"]) == 0
    found = facts(damaged / "exports" / "timm")
    optim = found["recipe"]["optim"]
    assert (optim["lr"], optim["ema"], found["changes"]) == (0.05, None, [])
    assert found["decoder"]["block"]["heads"] == 3
    assert found["features"]["mean"] is None
    assert "give --images FOLDER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("vit_base_patch16_224.mae", "cc-by-nc-4.0"),
        ("vit_base_patch16_mocov3_224", "cc-by-nc-4.0"),
        ("eva02_base_patch16_clip_224.merged2b", "mit"),
        ("vit_base_patch16_224.dino", "apache-2.0"),
    ],
)
def test_the_licence_of_published_weights(tmp_path, name, licence):
    run = Run(tmp_path, None, {"name": name}, Config())
    source = run.source()
    assert (source["weights"], source["licence"]) == ("pretrained", licence)
    assert name.split("_")[-1].split(".")[0] in source["page"] or "moco" in source["page"]


@pytest.mark.parametrize("options", [(), ("student.head=mlp", "decoder.layers=1"), ("optim.ema=0.5",)])
@torch.no_grad()
def test_the_decoder_predicts_what_the_student_predicts(runs, tmp_path, options):
    folder, output = runs("clip", 0.5, *options), tmp_path / "export"
    assert main([str(folder), "--to", "hf-clip", "--output", str(output)]) == 0
    state = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
    shape = {"head": "mlp", "layers": 1} if options[:1] == ("student.head=mlp",) else {}
    student = StudentTruth(FAMILIES["clip"], cap=0.5, target_dim=48, **shape, **small("clip"))
    student.load_state_dict(state["average"] or state["student"])
    wanted = student.double().eval()(images("clip").double(), torch.ones(2, 1, 4, dtype=torch.bool))[:, 0]
    features = hf.load_tower(output).eval()(images("clip")).last_hidden_state
    assert relative_error(load_decoder(output).eval()(features), wanted) < 1e-5


def test_without_a_checkpoint_there_is_no_decoder(damaged, capsys):
    shutil.rmtree(damaged / "checkpoints")
    assert main([str(damaged), "--to", "timm"]) == 0
    assert "no decoder" in capsys.readouterr().out
    with pytest.raises(fa.UserError, match=r"no decoder\.safetensors"):
        load_decoder(damaged / "exports" / "timm")
