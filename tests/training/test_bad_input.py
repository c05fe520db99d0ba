"""What the command refuses: one line, exit code 2."""

import re

import pytest
import torch

from fastalign import train

BAD = {
    "no such folder": (["data.train=/no/such/folder"], ["/no/such/folder"]),
    "no data": (["data.train=null"], ["data.train"]),
    "empty folder": (["data.train=EMPTY"], ["EMPTY"]),
    "no images": (["data.train=TEXT"], ["TEXT"]),
    "damaged image": (["data.train=BROKEN", "optim.batch_size=2"], ["BROKEN"]),
    "unknown backbone": (["student.name=vit_tinny_patch16_224"], ["vit_tinny", "vit_tiny_patch16_224"]),
    "image size": (["student.kwargs.img_size=50"], ["50", "use 48"]),
    "grids": (["teacher.weights=random", "teacher.kwargs.img_size=64"], ["different patch grids"]),
    "batch larger than the data": (
        ["optim.batch_size=66", "optim.accumulate=3"],
        ["optim.batch_size=66", "data.train has 40 images", "multiple of optim.accumulate x ranks = 3"],
    ),
    "masks.mode=drop with a position bias": (
        ["student.name=beit_base_patch16_224", "student.kwargs={img_size: 32, depth: 2}", "masks.mode=drop"],
        ["masks.mode='drop'", "relative position bias", "'zero'"],
    ),
    "weights of another model": (["student.weights=OTHER"], ["OTHER", "another model"]),
    "unreachable weights": (["student.weights=pretrained"], ["vit_tiny_patch16_224"]),
    "output in a file": (["output=/dev/null/x/y"], ["/dev/null is not a directory; name another output"]),
    "depth": (["student.kwargs.depth=0"], ["depth"]),
    "channels": (["student.kwargs.in_chans=1"], ["in_chans"]),
    "unknown attention": (["efficiency.attention=flash_atn_2"], ["efficiency.attention", "flash_attn_2"]),
    "attention not installed": (["efficiency.attention=flash_attn_3"], ["not installed", "build it"]),
    "attention of another device": (["efficiency.attention=sdpa_cudnn"], ["sdpa_cudnn", "set auto"]),
    "unknown argument": (["student.kwargs.dept=3"], ["dept"]),
    "too many blocks skipped": (["teacher.skip_blocks=2"], ["teacher.skip_blocks must lie in 0..1, got 2"]),
    "heads": (["decoder.kwargs.heads=5"], ["decoder.kwargs.width", "multiple of decoder.kwargs.heads 5"]),
    "ratio": (["masks={distribution: blockwise, ratio: 1}"], ["masks.ratio must lie strictly"]),
    "area": (["data.scale=[0, 1]"], ["data.scale=(0.0, 1.0): it must be positive, lowest first"]),
    "target scale": (["loss.target_scale=0"], ["loss.target_scale", "greater than 0"]),
    "no such run": (["student.weights=/no/such/run"], ["weights=/no/such/run", "pretrained or random"]),
    "randaugment": (["data.randaugment=rand-q9"], ["data.randaugment='rand-q9'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(recipe, tmp_path, capsys, case):
    overrides, words = BAD[case]
    for path in ("EMPTY", "TEXT/0.txt", *(f"BROKEN/{i}.jpg" for i in range(4))):
        (tmp_path / path.partition("/")[0]).mkdir(exist_ok=True)
        if "/" in path:
            (tmp_path / path).write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    torch.save({"patch_embed.proj.weight": torch.zeros(2)}, tmp_path / "OTHER")
    places = re.compile("EMPTY|TEXT|BROKEN|OTHER")
    recipe(*(places.sub(lambda found: str(tmp_path / found[0]), each) for each in overrides), expect=2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastalign:")]
    assert len(error) == 1
    for word in words:
        assert word in error[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lr=3", "recipe.yaml"], "no recipe at recipe.yaml"),
        (["clip-vit-b", "siglip-vit-b"], "give one recipe, got clip-vit-b, siglip-vit-b"),
        (["clipvit-b"], "unknown recipe clipvit-b; the nearest is clip-vit-b"),
    ],
)
def test_the_recipe_is_named_in_the_message(arguments, message, capsys):
    assert train.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_does_not_fit_another_model_by_force(recipe, capsys):
    recipe("max_steps=1")
    recipe("max_steps=2", "student.kwargs.depth=3", "resume=force", expect=2)
    message = r'checkpoint of another model \(student.kwargs was .*"depth": 2.*, is .*"depth": 3.*\): choose'
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {"weights": torch.zeros(1)}])
def test_a_checkpoint_of_something_else(recipe, capsys, tmp_path, content):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save(content, tmp_path / "run" / "checkpoints" / "step-00000003.pt")
    recipe(expect=2)
    assert "step-00000003.pt is not a checkpoint" in capsys.readouterr().err


def test_arguments_that_do_not_fit_an_earlier_run(recipe, capsys):
    first = recipe("max_steps=1", name="first")
    capsys.readouterr()
    recipe(f"student.weights={first}", "student.kwargs.depth=3", name="second", expect=2)
    assert "depth" in capsys.readouterr().err
    for damaged in ("{", '{"name": "vit_tiny_patch16_224", "kwargs": [1], "softcap": 30.0}'):
        (first / "backbone.json").write_text(damaged)
        recipe(f"student.weights={first}", name="second", expect=2)
        assert "backbone.json is damaged" in capsys.readouterr().err


def test_more_processes_than_gpus(recipe, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    recipe(expect=2)
    assert "--nproc-per-node=4" in capsys.readouterr().err
