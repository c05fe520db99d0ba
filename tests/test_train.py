"""The command, as a user runs it: files, resume, ranks, accumulation, settings, bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import fastalign as fa
from fastalign import build, train
from fastalign.build import build_backbones
from fastalign.config import Config
from tests.numerics import needs_compiler
from tests.test_gpu import run_of_batches

ROOT = Path(__file__).parent.parent
MODEL = {"name": "vit_tiny_patch16_224", "weights": "random", "kwargs": {"img_size": 32, "depth": 2}}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 40 real JPEGs for training and 10 for validation."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 10)):
        for index in range(count):
            path = root / split / f"class{index % 2}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC).save(path)
    return root


@pytest.fixture
def recipe(tmp_path, images):
    """Runs the command in this process; returns the run folder."""

    def run(*overrides, name="run", expect=0) -> Path:
        tree = {
            "output": str(tmp_path / name),
            "student": MODEL,
            "data": {"train": str(images / "train"), "val": str(images / "val"), "threads": 1},
            "optim": {"batch_size": 8, "epochs": 2, "lr": 1e-3},
            "log": {"every_steps": 2},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        assert train.main([str(path), *overrides]) == expect
        return tmp_path / name

    return run


def metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """The training lines and the validation lines of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "val_loss" in line]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)[0]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step-*.pt"))
    return torch.load(newest, weights_only=True)["student"]


@pytest.mark.parametrize("mode", ["zero", "drop"])
def test_the_run_of_the_gpus_tests_is_a_run_here_too(tmp_path, mode):
    """Without a GPU those tests are left out whole, and what is wrong with them would be seen by nobody."""
    run, batches = run_of_batches(tmp_path, f"masks.mode={mode}", "efficiency.grad_checkpointing=true")
    assert torch.isfinite(train.update(run, batches, 0)["loss"])


def test_a_loaded_backbone_gives_the_students_tokens(recipe):
    """To the bit: with the cap, and with the epsilon of the norm that was trained, which is not CLIP's."""
    name, sizes = "vit_base_patch16_clip_quickgelu_224", {"embed_dim": 48, "num_heads": 3}
    folder = recipe(
        f"student.name={name}", *(f"student.kwargs.{k}={v}" for k, v in sizes.items()), "max_steps=2"
    )
    student = fa.MaskEmbedStudent.from_backbone(fa.create_backbone(name, img_size=32, depth=2, **sizes))
    student.load_state_dict(weights(folder))
    images = torch.randn(2, 3, 32, 32)
    encoder = student.encoder.eval()
    assert torch.equal(fa.load_backbone(folder).forward_features(images), encoder.forward_features(images))


def test_a_run_leaves_what_is_promised(recipe):
    folder = recipe()
    lines, validation = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert {"step", "epoch", "loss", "lr", "grad_norm", "images_per_second", "data_wait", "memory"} <= lines[
        0
    ].keys()
    assert [line["step"] for line in validation] == [0, 5, 10]
    assert validation[-1]["val_loss"] < validation[0]["val_loss"]
    assert validation[0]["val_loss"] == pytest.approx(4 / 3, abs=0.15)
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["betas"] == [0.9, 0.95]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "best.pt",
        "step-00000005.pt",
        "step-00000010.pt",
    ]
    facts = json.loads((folder / "backbone.json").read_text())
    assert facts["softcap"] == 30.0
    vit = fa.load_backbone(folder)
    assert vit.softcap == 30.0
    best = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)["student"]
    for name, value in vit.state_dict().items():
        assert torch.equal(value, best[f"encoder.{name}"])
    assert load_file(folder / "backbone.safetensors").keys() == vit.state_dict().keys()


@pytest.mark.slow
def test_resuming_gives_the_same_bits(recipe):
    """Stopped inside an epoch and started again, with stochastic depth, EMA and accumulation."""
    options = [
        "student.kwargs.drop_path_rate=0.3",
        "optim.ema=0.9",
        "optim.accumulate=2",
        "data.color_jitter=0.4",
    ]
    whole = recipe(*options, name="whole")
    recipe(*options, "max_steps=3", name="parts")
    assert len(losses(whole.parent / "parts")) == 3
    parts = recipe(*options, name="parts")
    assert losses(parts) == losses(whole)
    ours, theirs = weights(parts), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_apex_its_adam_is_torchs(recipe, capsys):
    """The same losses, one line about it; a checkpoint that apex wrote is not continued by torch."""
    usual = losses(recipe("max_steps=3", name="usual"))
    capsys.readouterr()
    folder = recipe("max_steps=3", "optim.name=apex_adam", name="apex")
    said = [line for line in capsys.readouterr().out.splitlines() if "apex" in line]
    assert len([line for line in said if "torch's fused AdamW, the same update" in line]) == 1
    assert losses(folder) == usual
    path = folder / "checkpoints" / "step-00000003.pt"
    state = torch.load(path, weights_only=True)
    assert state["optimizer_class"] == "torch.AdamW"
    torch.save({**state, "optimizer_class": "apex.FusedAdam"}, path)
    recipe("optim.name=apex_adam", name="apex", expect=2)
    assert "holds the state of apex.FusedAdam" in capsys.readouterr().err


def test_running_a_finished_run_again_does_nothing(recipe, capsys):
    folder = recipe("max_steps=2")
    before = (folder / "metrics.jsonl").read_text()
    capsys.readouterr()
    recipe("max_steps=2")
    assert "step 2 of 2" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == before


def test_accumulation_gives_the_same_losses(recipe):
    once = losses(recipe(name="once"))
    assert losses(recipe("optim.accumulate=4", name="accumulated")) == pytest.approx(once, rel=1e-4)


def test_accumulation_with_an_epoch_that_does_not_divide(recipe):
    """40 images in updates of 12: 3 updates an epoch, each over exactly 12 images."""
    folder = recipe("optim.batch_size=12", "optim.accumulate=3")
    assert [line["step"] for line in metrics(folder)[0]] == list(range(1, 7))
    plain = recipe("optim.batch_size=12", name="plain")
    assert losses(folder) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.parametrize(
    "setting", ["efficiency.grad_checkpointing=true", "data.threads=2", "log.every_steps=5"]
)
def test_efficiency_settings_do_not_change_the_loss(recipe, setting):
    assert losses(recipe(setting, name="changed")) == pytest.approx(losses(recipe(name="plain")), rel=1e-5)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("setting", ["true", "blocks"])
def test_compiled_run_has_the_same_loss(recipe, setting):
    torch._dynamo.reset()
    plain = losses(recipe("max_steps=3", name="plain"))
    compiled = recipe(f"efficiency.compile={setting}", "max_steps=3", name="compiled")
    assert losses(compiled) == pytest.approx(plain, rel=1e-4)
    cache = metrics(compiled)[0][0]
    assert cache["compile_cache_hits"] + cache["compile_cache_misses"] > 0


@pytest.mark.parametrize("mode", ["zero", "drop"])
@pytest.mark.parametrize("setting", ["true", "blocks"])
def test_nothing_is_compiled_after_the_first_step(recipe, capturing, setting, mode, capsys):
    """Over steps, epochs, and validation, whose last batch is smaller; and in fixed shapes all along."""
    options = [f"masks.mode={mode}", "log.every_steps=3"]
    compiled = recipe(f"efficiency.compile={setting}", *options, name="compiled")
    lines = [json.loads(line) for line in (compiled / "metrics.jsonl").read_text().splitlines()]
    assert [index for index, line in enumerate(lines) if "compile_seconds" in line] == [0, 1]
    assert [line["step"] for line in lines[:2]] == [0, 1]
    assert capsys.readouterr().out.count("compiled in ") == 2
    assert not any(isinstance(size, torch.SymInt) for inputs in capturing for size in inputs)
    assert losses(compiled) == pytest.approx(losses(recipe(*options, name="plain")), rel=1e-4)


@pytest.mark.parametrize("mode", ["zero", "drop"])
def test_fp8_stays_close(recipe, mode):
    plain = losses(recipe("max_steps=4", f"masks.mode={mode}", name="plain"))
    options = ["efficiency.precision=fp8", f"masks.mode={mode}", "max_steps=4"]
    assert losses(recipe(*options, name="fp8")) == pytest.approx(plain, rel=0.02)


def test_bf16_stays_close(recipe):
    plain = losses(recipe("max_steps=4", name="plain"))
    assert losses(recipe("efficiency.precision=bf16", "max_steps=4", name="bf16")) == pytest.approx(
        plain, rel=0.02
    )


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


def test_target_scale_is_stored_and_not_measured_again(recipe):
    folder = recipe("max_steps=1", "loss.target_scale=auto:1")
    state = torch.load(folder / "checkpoints" / "step-00000001.pt", weights_only=True)
    assert state["target_scale"] != 1.0
    recipe("max_steps=2", "loss.target_scale=auto")
    again = torch.load(folder / "checkpoints" / "step-00000002.pt", weights_only=True)
    assert again["target_scale"] == state["target_scale"]


def test_parts_of_the_decoder_and_batches_of_the_scale_arrive():
    """In numbers of parameters and batches, by hand."""
    parts = {"qk_norm": True, "qkv_bias": False, "init_values": None}
    for kwargs in ({}, parts):
        config = Config.model_validate({"student": MODEL, "decoder": {"layers": 1, "kwargs": kwargs}})
        block = build.build_objective(config)[0].student.decoder.blocks[0]
        assert {name for name, _ in block.named_parameters() if "qkv.bias" in name or "_norm" in name} == (
            {f"attn.{q}_norm.{p}" for q in "qk" for p in ("weight", "bias")} if kwargs else {"attn.qkv.bias"}
        )
        gammas = [value for name, value in block.named_parameters() if name.endswith("gamma")]
        assert [set(gamma.tolist()) == {torch.tensor(1e-6).item()} for gamma in gammas] == (
            [] if kwargs else [True, True]
        )
    val = SimpleNamespace(batches=lambda: iter(range(9)))
    for scale, count in (("auto", 9), ("auto:4", 4), ("auto:20", 9)):
        config = Config.model_validate({"loss": {"target_scale": scale}})
        assert list(build.scale_batches(config, None, None, val)) == list(range(count))


def test_a_student_may_start_from_an_earlier_run(recipe):
    first = recipe("max_steps=1", name="first")
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


BAD = {
    "no such folder": (["data.train=/no/such/folder"], ["/no/such/folder"]),
    "no data": (["data.train=null"], ["data.train"]),
    "empty folder": (["data.train=EMPTY"], ["EMPTY"]),
    "no images": (["data.train=TEXT"], ["TEXT"]),
    "damaged image": (["data.train=BROKEN", "optim.batch_size=2"], ["BROKEN"]),
    "unknown backbone": (["student.name=vit_tinny_patch16_224"], ["vit_tinny", "vit_tiny_patch16_224"]),
    "image size": (["student.kwargs.img_size=50"], ["50", "48 or 64"]),
    "grids": (
        ["teacher.weights=random", "teacher.name=vit_tiny_patch16_224", "teacher.kwargs.img_size=64"],
        ["different patch grids"],
    ),
    "batch larger than the data": (["optim.batch_size=64"], ["40", "64"]),
    "no dropping with a position bias": (
        ["student.name=beit_base_patch16_224", "student.kwargs={img_size: 32, depth: 2}", "masks.mode=drop"],
        ["relative position bias", "'zero'"],
    ),
    "weights of another model": (["student.weights=OTHER"], ["OTHER", "another model"]),
    "unreachable weights": (["student.weights=pretrained"], ["vit_tiny_patch16_224"]),
    "misspelt key": (["optim.learning_rate=1"], ["optim.learning_rate", "nearest"]),
    "LAMB without apex": (["optim.name=apex_lamb"], ["optim.name=apex_lamb", "NVIDIA's repository", "adamw"]),
    "ranks": (["optim.batch_size=9", "optim.accumulate=2"], ["optim.batch_size"]),
    "a file for a folder": (["data.train=OTHER"], ["OTHER"]),
    "no such validation folder": (["data.val=/no/such/val"], ["/no/such/val"]),
    "output is no folder": (["output=/dev/null/x"], ["/dev/null"]),
    "depth": (["student.kwargs.depth=0"], ["depth"]),
    "stochastic depth": (["student.kwargs.drop_path_rate=1.5"], ["drop_path_rate"]),
    "channels": (["student.kwargs.in_chans=1"], ["in_chans"]),
    "unknown attention": (["efficiency.attention=flash_atn_2"], ["efficiency.attention", "flash_attn_2"]),
    "attention not installed": (["efficiency.attention=flash_attn_3"], ["not installed", "build it"]),
    "attention of another device": (
        ["efficiency.attention=sdpa_cudnn"],
        ["efficiency.attention: sdpa_cudnn has no implementation for this device", "set auto"],
    ),
    "a key of its own": (["student.kwargs.pretrained=true"], ["student.weights"]),
    "betas": (["optim.betas=[1.5, 2]"], ["optim.betas"]),
    "infinite": (["optim.lr=.inf"], ["optim.lr"]),
    "unknown argument": (["student.kwargs.dept=3"], ["dept"]),
    "too many blocks skipped": (["teacher.skip_blocks=2"], ["skip_blocks"]),
    "no such run": (
        ["student.weights=/no/such/run"],
        ["student.weights=/no/such/run", "pretrained or random"],
    ),
    "randaugment": (["data.randaugment=rand-q9"], ["rand-q9"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(recipe, tmp_path, capsys, case):
    overrides, words = BAD[case]
    (tmp_path / "EMPTY").mkdir()
    for name, content in (("TEXT", b"words"), ("BROKEN", b"\xff\xd8\xff\xe0 not a picture")):
        (tmp_path / name).mkdir()
        for index in range(4):
            (tmp_path / name / f"{index}.{'txt' if name == 'TEXT' else 'jpg'}").write_bytes(content)
    torch.save({"patch_embed.proj.weight": torch.zeros(2)}, tmp_path / "OTHER.pth")
    places = {"EMPTY": "EMPTY", "TEXT": "TEXT", "BROKEN": "BROKEN", "OTHER": "OTHER.pth"}
    for word, place in places.items():
        overrides = [override.replace(word, str(tmp_path / place)) for override in overrides]
    recipe(*overrides, expect=2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastalign:")]
    assert len(error) == 1
    for word in words:
        assert word in error[0]


@pytest.mark.parametrize(
    "change",
    ["student.kwargs.depth=3", "student.softcap=null", "seed=5", "optim.epochs=3", "optim.name=apex_adam"],
)
def test_checkpoint_of_another_model_or_run(recipe, capsys, change):
    recipe("max_steps=1")
    capsys.readouterr()
    recipe("max_steps=2", change, expect=2)
    error = capsys.readouterr().err
    assert "checkpoint of another model or run" in error
    assert change.split("=")[0].removesuffix(".kwargs.depth").removesuffix(".softcap") in error


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {"weights": torch.zeros(1)}])
def test_a_checkpoint_of_something_else(recipe, capsys, tmp_path, content):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save(content, tmp_path / "run" / "checkpoints" / "step-00000003.pt")
    recipe(expect=2)
    assert "step-00000003.pt is not a checkpoint" in capsys.readouterr().err


def test_large_seeds(recipe):
    recipe("max_steps=1", f"seed={2**62 + 5}")


def test_arguments_that_do_not_fit_an_earlier_run(recipe, capsys):
    first = recipe("max_steps=1", name="first")
    capsys.readouterr()
    recipe(f"student.weights={first}", "student.kwargs.depth=3", name="second", expect=2)
    assert "depth" in capsys.readouterr().err
    (first / "backbone.json").write_text("{")
    recipe(f"student.weights={first}", name="second", expect=2)
    assert "backbone.json is damaged" in capsys.readouterr().err


def test_more_processes_than_gpus(recipe, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    recipe(expect=2)
    assert "--nproc-per-node=4" in capsys.readouterr().err


def test_missing_dali_is_one_line(recipe, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    recipe(expect=2)
    assert "fastalign[dali]" in capsys.readouterr().err


def test_print_config(recipe, tmp_path, capsys):
    recipe("--print-config", "optim.lr=0.5")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optim"]["lr"] == 0.5
    assert not (tmp_path / "run").exists()


def torchrun(tmp_path, *overrides, program=("-m", "fastalign.train")):
    """The recipe on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [*program, str(tmp_path / "recipe.yaml"), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_two_ranks_under_torchrun_have_the_losses_of_one(recipe, tmp_path):
    alone = recipe(name="alone")
    folder, parts = tmp_path / "two", tmp_path / "parts"
    for options in ([f"output={folder}"], [f"output={parts}", "max_steps=4"], [f"output={parts}"]):
        result = torchrun(tmp_path, *options)
        assert result.returncode == 0, result.stderr
    assert losses(parts) == losses(folder), "resumed on two ranks: the same bits"
    ours, theirs = weights(parts), weights(folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-4)
    ours, theirs = metrics(folder)[1], metrics(alone)[1]
    assert ours[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["true", "blocks"])
def test_two_compiled_ranks_have_the_losses_of_one(recipe, tmp_path, setting):
    """With accumulation and gradient checkpointing, over an epoch's end; compiled as by the fixture `capturing`."""
    options = ["optim.accumulate=2", "efficiency.grad_checkpointing=true", "max_steps=6", "data.val=null"]
    alone = recipe(*options, name="alone")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom fastalign import MaskEmbed, train\nwhole = MaskEmbed.compile\n"
        "MaskEmbed.compile = lambda *a, **k: whole(*a, **k, backend='aot_eager')\nsys.exit(train.main())\n"
    )
    two = tmp_path / "two"
    options += [f"output={two}", f"efficiency.compile={setting}"]
    result = torchrun(tmp_path, *options, program=[str(program)])
    assert result.returncode == 0, result.stderr
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)
    assert "compile_seconds" in metrics(two)[0][0]
    assert not any("compile_seconds" in line for line in metrics(two)[0][1:])


@pytest.mark.slow
def test_two_ranks_with_an_fp8_teacher(recipe, tmp_path):
    """Its FP8 and bf16 weights are sent from rank to rank at the start, like all others."""
    options = ["efficiency.precision=fp8", "max_steps=2"]
    alone = losses(recipe(*options, name="alone"))
    result = torchrun(tmp_path, *options, f"output={tmp_path / 'two'}")
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(alone, rel=0.01)


@pytest.mark.slow
def test_two_ranks_and_a_validation_set_for_one(recipe, tmp_path):
    """The second rank has nothing to validate, and must not be left behind; nor may a bad data set be told twice."""
    recipe("max_steps=1")
    folder = tmp_path / "two"
    result = torchrun(tmp_path, f"output={folder}", "data.val=synthetic:3", "max_steps=1")
    assert result.returncode == 0, result.stderr
    assert len(metrics(folder)[1]) == 2
    result = torchrun(tmp_path, f"output={tmp_path / 'bad'}", "data.train=/no/such/folder")
    assert result.returncode != 0
    assert result.stderr.count("fastalign:") == 1
    assert "no such folder: /no/such/folder" in result.stderr


@pytest.mark.slow
def test_the_command_exits_with_2(tmp_path, recipe):
    recipe("max_steps=1")
    command = [sys.executable, "-m", "fastalign.train", str(tmp_path / "recipe.yaml"), "data.train=/no/such"]
    result = subprocess.run(
        [*command, f"output={tmp_path / 'x'}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
