"""The authors' YAML files: their 52 recipes, written here from the facts about them, and every single option."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from fastalign import UserError, train
from fastalign.compat.reference_config import make_config, read_reference
from fastalign.compat.reference_options import OPTIONS
from fastalign.config import load_config
from tests.run_helpers import MODEL, losses
from tests.test_recipes import RECIPES

ROOT = Path(__file__).parents[2]

# file | data | teacher | student (= the same, s = soft-capped) | batch a GPU x passes | lr | epochs (warm-up) | rest
ROWS = """
beit-vit-b | 21k | beit_base_patch16_224.in22k_ft_in22k_in1k | = | 256x1 | 3e-4 | 5 (0) | BIAS
beitv2-vit-b | 21k | beitv2_base_patch16_224.in1k_ft_in22k_in1k | = | 256x1 | 3e-4 | 5 (0) | BIAS
clip-vit-b-in1k-e10 | 1k | CLIP.openai | = | 256x1 | 3e-4 | 10 (1) |
clip-vit-b-in1k-e100 | 1k | CLIP.openai | s | 256x1 | 3e-4 | 100 (1) |
clip-vit-b-in1k-e2 | 1k | CLIP.openai | = | 256x1 | 3e-4 | 2 (1) |
clip-vit-b-in1k-e25 | 1k | CLIP.openai | = | 256x1 | 3e-4 | 25 (1) |
clip-vit-b-in1k-e50 | 1k | CLIP.openai | s | 256x1 | 3e-4 | 50 (1) |
clip-vit-b-in21k-e1 | 21k | CLIP.openai | s | 256x1 | 3e-4 | 1 (0) |
clip-vit-b-in21k-e10 | 21k | CLIP.openai | s | 256x1 | 3e-4 | 10 (0) |
clip-vit-b-in21k-e5 | 21k | CLIP.openai | s | 256x1 | 3e-4 | 5 (0) |
clip-vit-b-mim-aligned-mim | 21k | sCLIP | sCLIP.openai | 256x1 | 3e-4 | 5 (0) | MIM clip-vit-b-mim-aligned-mim
clip-vit-b-mim-aligned | 21k | sCLIP.openai | = | 256x1 | 3e-4 | 5 (0) | ALIGNED clip-vit-b-mim-aligned
clip-vit-b-mim | 21k | sCLIP | sCLIP.openai | 256x1 | 3e-4 | 5 (0) | MIM clip-vit-b-mim
clip-vit-b | 21k | CLIP.openai | s | 256x1 | 3e-4 | 5 (0) |
clip-vit-l-336 | 21k | vit_large_patch14_clip_quickgelu_336.openai | s | 32x8 | 2e-4 | 5 (0) |
clip-vit-l | 21k | vit_large_patch14_clip_quickgelu_224.openai | s | 128x2 | 2e-4 | 5 (0) |
dfn-vit-b | 21k | vit_base_patch16_clip_224.dfn2b | s | 256x1 | 3e-4 | 5 (0) |
dino-vit-b | 1k | vit_base_patch16_224.dino | s | 256x1 | 3e-4 | 50 (1) |
dinov2-vit-b | 21k | vit_base_patch14_reg4_dinov2.lvd142m | s | 256x1 | 3e-4 | 5 (0) | SIZE
eva02-vit-b | 21k | eva02_base_patch16_clip_224.merged2b | = | 256x1 | 3e-4 | 5 (0) | BIAS
in1k-vit-b-autoaug | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | aa: rand-m9-mstd0.5-inc1
in1k-vit-b-bernoulli25 | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | BERNOULLI: 0.25, ONE
in1k-vit-b-bernoulli50 | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | BERNOULLI: 0.5, ONE
in1k-vit-b-bernoulli75 | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | BERNOULLI: 0.75, ONE
in1k-vit-b-block | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | mask_sampling: blockwise, blockwise_mask_ratio: 0.4, ONE
in1k-vit-b-cls | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | prefix_only: true, skip_blocks: 0
in1k-vit-b-cosine | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | loss_function: cosine
in1k-vit-b-cutmix | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | cutmix: 1.0
in1k-vit-b-e10 | 1k | IN1K | = | 256x1 | 3e-4 | 10 (1) |
in1k-vit-b-e100 | 1k | IN1K | s | 256x1 | 3e-4 | 100 (1) |
in1k-vit-b-e2 | 1k | IN1K | = | 256x1 | 3e-4 | 2 (0) |
in1k-vit-b-e50 | 1k | IN1K | s | 256x1 | 3e-4 | 50 (1) |
in1k-vit-b-embed-final | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | skip_blocks: 0
in1k-vit-b-embed | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) |
in1k-vit-b-in21k-e1 | 21k | IN1K | s | 256x1 | 3e-4 | 1 (0) |
in1k-vit-b-in21k-e10 | 21k | IN1K | s | 256x1 | 3e-4 | 10 (0) |
in1k-vit-b-in21k-e5 | 21k | IN1K | s | 256x1 | 3e-4 | 5 (0) |
in1k-vit-b-mixup | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | mixup: 0.5
in1k-vit-b-uniform-antithetical | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | UNIFORM, PAIR
in1k-vit-b-uniform | 1k | IN1K | = | 256x1 | 3e-4 | 25 (1) | mask_sampling: uniform, ONE
in1k-vit-b | 21k | IN1K | s | 256x1 | 3e-4 | 5 (0) |
in1k-vit-l | 21k | vit_large_patch16_224.augreg_in21k_ft_in1k | s | 128x2 | 2e-4 | 5 (0) |
in1k-vit-s | 21k | vit_small_patch16_224.augreg_in21k_ft_in1k | s | 256x1 | 3e-4 | 5 (0) |
in1k-vit-t | 21k | vit_tiny_patch16_224.augreg_in21k_ft_in1k | s | 256x1 | 3e-4 | 5 (0) |
mae-vit-b | 1k | vit_base_patch16_224.mae | s | 256x1 | 3e-4 | 50 (1) |
moco-vit-b | 1k | vit_base_patch16_mocov3_224 | s | 256x1 | 3e-4 | 50 (1) |
openclip-vit-b | 21k | vit_base_patch16_clip_224.laion2b | s | 256x1 | 3e-4 | 5 (0) |
siglip-vit-b | 21k | vit_base_patch16_siglip_224.webli | s | 256x1 | 3e-4 | 5 (0) |
siglip-vit-so400m-384 | 21k | vit_so400m_patch14_siglip_384 | s | 16x16 | 2e-4 | 5 (0) |
siglip-vit-so400m | 21k | vit_so400m_patch14_siglip_224 | s | 64x4 | 2e-4 | 5 (0) |
configs-mim/clip-vit-b-mim-aligned | 21k | sCLIP.openai | = | 256x1 | 3e-4 | 5 (0) | ALIGNED clip-vit-b-mim-aligned
configs-mim/clip-vit-b | 21k | CLIP.openai | s | 256x1 | 3e-4 | 5 (0) |
"""
SHORT = {
    "CLIP": "vit_base_patch16_clip_quickgelu_224",
    "IN1K": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "BERNOULLI": "mask_sampling: bernoulli, bernoulli_mask_ratio",
    "UNIFORM": "mask_sampling: uniform",
    "SIZE": "img_size: 224, model_kwargs: {img_size: 224}",
    "BIAS": "decoder_qkv_bias: true, decoder_qk_norm: false",
    "PAIR": "antithetical_sampling: true, include_null_mask: false",
    "ONE": "antithetical_sampling: false, include_null_mask: false",
}
OWN_NAMES = {
    "clip-vit-b-mim": "clip-vit-b-mim-aligned",
    "clip-vit-b-mim-aligned": "clip-vit-b-mim-aligned-aligned",
    "clip-vit-b-mim-aligned-mim": "clip-vit-b-mim-aligned-mim-aligned",
    "configs-mim/clip-vit-b": "clip-vit-b-mim",
    "configs-mim/clip-vit-b-mim-aligned": "clip-vit-b-mim-aligned-mim",
}
COMMON = """
train_split: train
val_split: val
teacher_pretrained: true
student_pretrained: true
amp: true
amp_dtype: bfloat16
torchcompile: inductor
opt: adamw
weight_decay: 0.01
clip_grad: 1.0
opt_kwargs: {betas: [0.9, 0.95]}
sched: cosine
sched_on_updates: true
train_crop_mode: rkrc
color_jitter: null
workers: 24
pin_mem: true
log_wandb: true
"""
FILES = {row.partition(" |")[0]: row for row in ROWS.strip().splitlines()}
# What does not decide the run, or is another place's: compared by itself.
ELSEWHERE = {"output", "seed", "log", "checkpoint", "efficiency"}

# Every option of their train.py with its default, in their order.
DEFAULTS = """
data_dir=None dataset= train_split=train val_split=validation train_num_samples=None val_num_samples=None
dataset_download=False class_map= input_img_mode=None input_key=None target_key=None
student_model=vit_base_patch16_224.augreg_in21k_ft_in1k student_head=linear student_pretrained=True
student_checkpoint= freeze_student=False
teacher_model=vit_base_patch16_224.augreg_in21k_ft_in1k teacher_pretrained=True
teacher_checkpoint= skip_blocks=1 prefix_only=False loss_function=mse decoder_layers=2 decoder_width=None
decoder_num_heads=None decoder_qk_norm=None decoder_qkv_bias=None decoder_init_values=1e-06 resume=
no_resume_opt=False img_size=None in_chans=None input_size=None crop_pct=None mean=None std=None interpolation=
batch_size=128 validation_batch_size=None channels_last=False grad_accum_steps=1 grad_checkpointing=False
model_kwargs={} student_model_kwargs={} teacher_model_kwargs={} torchscript=False torchcompile=None device=cuda
amp=False amp_dtype=float16 no_ddp_bb=False synchronize_step=False local_rank=0 device_modules=None opt=sgd
opt_eps=None opt_betas=None momentum=0.9 weight_decay=0.01 clip_grad=None clip_mode=norm layer_decay=None
opt_kwargs={} sched=cosine sched_on_updates=False lr=None lr_base=0.1 lr_base_size=256 lr_base_scale= lr_noise=None
lr_noise_pct=0.67 lr_noise_std=1.0 lr_cycle_mul=1.0 lr_cycle_decay=0.5 lr_cycle_limit=1 lr_k_decay=1.0
warmup_lr=1e-05 min_lr=0.0 epochs=300 epoch_repeats=0.0 start_epoch=None decay_milestones=[90,180,270]
decay_epochs=90.0 warmup_epochs=5 warmup_prefix=False cooldown_epochs=0 patience_epochs=10 decay_rate=0.1
no_aug=False train_crop_mode=None scale=[0.08,1.0] ratio=[0.75,1.3333333333333333] hflip=0.5 vflip=0.0
color_jitter=0.4 color_jitter_prob=None grayscale_prob=None gaussian_blur_prob=None aa=None aug_repeats=0.0
aug_splits=0 reprob=0.0 remode=pixel recount=1 resplit=False mixup=0.0 cutmix=0.0 cutmix_minmax=None mixup_prob=1.0
mixup_switch_prob=0.5 mixup_mode=batch mixup_off_epoch=0 train_interpolation=random drop=0.0 drop_path=None
drop_block=None model_ema=False model_ema_force_cpu=False model_ema_decay=0.9998 model_ema_warmup=False seed=42
worker_seeding=all log_interval=100 recovery_interval=0 checkpoint_hist=10 checkpoint_retain_interval=50 workers=4
save_images=False pin_mem=False no_prefetcher=False output= experiment= project=None wandb_id=None log_wandb=False
use_multi_epochs_loader=False mask_sampling=uniform bernoulli_mask_ratio=0.5 blockwise_mask_ratio=0.4
antithetical_sampling=True include_null_mask=True
"""
# The least that their train.py would train with and we take.
LEAST = {"data_dir": "/d", "opt": "adamw", "sched_on_updates": True, "lr": 1e-3, "warmup_epochs": 0}


def reference_yaml(name: str) -> str:
    """A file as the authors wrote it: 32 options, and what a recipe changes."""
    cells = [cell.strip() for cell in FILES[name].split("|")]
    for short, text in SHORT.items():
        cells = [re.sub(rf"\b(s?){short}\b", rf"\g<1>{text}", cell) for cell in cells]
    file, data, teacher, student, batch, lr, epochs, others = cells
    ablation = file.startswith(("clip-vit-b-in", "in1k-vit-b-"))
    mim = file.startswith("configs-mim/")
    size, passes = batch.split("x")
    lines = {
        "data_dir": "data/imagenet" if data == "1k" else "data/imagenet21k",
        "teacher_model": teacher,
        "student_model": {"=": teacher, "s": f"s{teacher}"}.get(student, student),
        "batch_size": size,
        "validation_batch_size": size,
        "grad_accum_steps": passes,
        "lr": lr,
        "min_lr": lr.replace("e-4", "e-5"),
        "warmup_lr": lr.replace("e-4", "e-5"),
        "epochs": epochs.split()[0],
        "warmup_epochs": epochs.split("(")[1].strip(")"),
        "output": "output_mim" if mim else "output",
        "experiment": OWN_NAMES.get(file, file if ablation else f"{file}-maskembed"),
        "project": "locality-alignment" + ("-mim" if mim else "-ablations" if ablation else ""),
    }
    text = COMMON + "".join(f"{key}: {value}\n" for key, value in lines.items())
    assert len(yaml.safe_load(text)) == 32
    if others.startswith(("MIM ", "ALIGNED ")):
        stage, run = others.split()
        folder = "output_mim" if stage == "MIM" else "output"
        others = f"teacher_checkpoint: {folder}/{run}/model_best.pth.tar"
        text = text.replace("teacher_pretrained: true", "teacher_pretrained: false")
    return text + re.sub(r", (?=\w+:)", "\n", others) + "\n"


def write(tmp_path: Path, content: dict | str, name: str = "configs/their.yaml") -> Path:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_all_52_are_here():
    assert len(FILES) == 52


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_of_theirs_is_ours(name, tmp_path):
    """Against the recipes of configs/, which tests/test_recipes.py compares with a table written by hand."""
    folder, _, stem = f"configs/{name}".replace("configs/configs-mim", "configs-mim").rpartition("/")
    path = write(tmp_path, reference_yaml(name), f"{folder}/{stem}.yaml")
    ours = load_config(RECIPES[f"mim-{stem}" if folder == "configs-mim" else stem])
    theirs = make_config(path)
    assert make_config(path, world_size=4) == theirs
    left, right = (config.model_dump(exclude=ELSEWHERE) for config in (theirs, ours))
    given = yaml.safe_load(reference_yaml(name))
    for split in ("train", "val"):
        assert left["data"].pop(split) == f"{given['data_dir']}/{split}"
        right["data"].pop(split)
    if "teacher_checkpoint" in given:
        # Ours names the run's folder, which knows its soft-cap; theirs a file, so that the name has to tell it.
        assert left["teacher"].pop("weights") == given["teacher_checkpoint"]
        assert left["teacher"].pop("name").removesuffix(".openai") == f"s{SHORT['CLIP']}"
        assert right["teacher"].pop("weights").startswith("runs/")
        assert right["teacher"].pop("name") is None
    assert left == right
    assert theirs.output == f"{given['output']}/{given['experiment']}"
    assert (theirs.seed, theirs.checkpoint.keep, theirs.log.every_steps) == (42, 10, 100)
    assert (theirs.efficiency.precision, theirs.efficiency.compile) == ("auto", True)


def test_a_chain_finds_the_runs_of_ours_where_theirs_would_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, reference_yaml("clip-vit-b-mim"))
    assert make_config(path).teacher.weights == "output_mim/clip-vit-b-mim/model_best.pth.tar"
    folder = Path("output_mim/clip-vit-b-mim")
    folder.mkdir(parents=True)
    (folder / "backbone.json").write_text("{}")
    assert make_config(path).teacher.weights == str(folder)
    (folder / "model_best.pth.tar").write_text("")
    assert make_config(path).teacher.weights == "output_mim/clip-vit-b-mim/model_best.pth.tar"


def test_the_table_has_every_option_and_its_default():
    named = dict(pair.split("=", 1) for pair in DEFAULTS.split())
    assert len(named) == 141
    assert {name: str(option.default).replace(" ", "") for name, option in OPTIONS.items()} == named


def test_the_documentation_is_the_table():
    text = (ROOT / "docs" / "reference-configs.md").read_text()
    rows = [f"| `{name}` | {option.fate} | {option.note} |" for name, option in OPTIONS.items()]
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (
            {},
            {
                "optim.betas": (0.9, 0.999),
                "optim.clip": None,
                "efficiency.precision": "fp32",
                "data.crop": "rrc",
            },
        ),
        ({}, {"data.color_jitter": 0.4, "optim.batch_size": 512, "optim.epochs": 300, "seed": 42}),
        ({}, {"data.train": "/d/train", "data.val": "/d/validation", "student.softcap": None}),
        ({"val_split": ""}, {"data.val": None}),
        ({"data_dir": "/d/a.tar"}, {"data.train": "/d/a.tar"}),
        (
            {"dataset": "wds/in", "train_split": "{0..9}.tar", "val_split": None},
            {"data.train": "/d/{0..9}.tar"},
        ),
        ({"lr": None, "batch_size": 64}, {"optim.lr": 0.1}),
        ({"lr": None, "batch_size": 256}, {"optim.lr": 0.2}),
        ({"lr": None, "batch_size": 256, "lr_base_scale": "linear"}, {"optim.lr": 0.4}),
        ({"opt_betas": [0.8, 0.9], "opt_eps": "1e-8"}, {"optim.betas": (0.8, 0.9)}),
        (
            {"min_lr": "1e-5", "warmup_lr": "1e-5", "warmup_epochs": 2},
            {"optim.min_lr": 1e-5, "optim.warmup_epochs": 2},
        ),
        ({"model_ema": True}, {"optim.ema": 0.9998}),
        ({"model_ema_decay": 0.9}, {"optim.ema": None}),
        ({"aa": "rand-m9", "color_jitter": 0.4}, {"data.randaugment": "rand-m9", "data.color_jitter": 0.0}),
        ({"amp": True, "amp_dtype": "bfloat16"}, {"efficiency.precision": "auto"}),
        ({"grad_checkpointing": True}, {"efficiency.grad_checkpointing": True, "efficiency.compile": False}),
        (
            {"recovery_interval": 500, "checkpoint_hist": 3},
            {"checkpoint.every_steps": 500, "checkpoint.keep": 3},
        ),
        (
            {"student_checkpoint": "a.pth.tar"},
            {"student.weights": "a.pth.tar", "teacher.weights": "pretrained"},
        ),
        (
            {"teacher_checkpoint": "a.pth.tar"},
            {"student.weights": "pretrained", "teacher.weights": "a.pth.tar"},
        ),
        ({"student_pretrained": False}, {"student.weights": "random", "teacher.weights": "pretrained"}),
        ({"drop_path": 0.1}, {"student.kwargs": {"drop_path_rate": 0.1}, "teacher.name": None}),
        ({"model_kwargs": {"depth": 2}}, {"student.kwargs": {"depth": 2}, "teacher.name": None}),
        ({"teacher_model_kwargs": {"depth": 2}}, {"student.kwargs": {}, "teacher.kwargs": {"depth": 2}}),
        (
            {"student_model": "svit_base_patch16_224.a", "student_model_kwargs": {"max_attn_val": 20}},
            {"student.name": "vit_base_patch16_224.a", "student.softcap": 20.0, "student.kwargs": {}},
        ),
        (
            {"teacher_model": "svit_base_patch16_224.a", "teacher_model_kwargs": {"max_attn_val": 20}},
            {"teacher.name": "svit_base_patch16_224.a", "teacher.kwargs": {"max_attn_val": 20}},
        ),
        (
            {"decoder_init_values": 0, "decoder_num_heads": 4},
            {"decoder.kwargs.init_values": None, "decoder.kwargs.heads": 4},
        ),
        ({"img_size": 224, "input_size": [3, 224, 224], "in_chans": 3}, {"student.kwargs": {}}),
        ({"freeze_student": True}, {"student.freeze": True}),
        (
            {"experiment": None, "output": None},
            {"output": f"output/train/{OPTIONS['student_model'].default}"},
        ),
    ],
)
def test_options_mean_what_they_mean_there(tmp_path, options, keys):
    """Worked out by hand from what their script does with an option, and timm with its arguments."""
    config = make_config(write(tmp_path, LEAST | options))
    for key, value in keys.items():
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == (pytest.approx(value) if isinstance(value, float) else value), key


def test_the_batch_is_a_gpus_times_the_gpus(tmp_path, monkeypatch):
    path = write(tmp_path, LEAST | {"batch_size": 32, "grad_accum_steps": 8})
    assert make_config(path).optim.batch_size == 1024
    assert make_config(path, world_size=1).optim.batch_size == 256
    monkeypatch.setenv("WORLD_SIZE", "8")
    config, notes = read_reference(path)
    assert (config.optim.batch_size, config.optim.accumulate) == (2048, 8)
    assert "32 images a GPU x 8 passes x 8 GPUs = 2048 images an update" in notes[0]
    assert make_config(path, world_size=2).optim.batch_size == 512
    for text in ("many", "", "0", "-2", "1.5"):
        monkeypatch.setenv("WORLD_SIZE", text)
        with pytest.raises(UserError, match=f"WORLD_SIZE={text} .*--world-size=N"):
            make_config(path)


def test_splits_are_found_under_their_other_names(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "training").mkdir()
    config = make_config(write(tmp_path, LEAST | {"data_dir": str(tmp_path)}))
    assert config.data.train == str(tmp_path / "training")
    assert config.data.val == str(tmp_path / "val")


def test_paths_are_read_as_a_shell_reads_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NONE", raising=False)
    (tmp_path / "data/validation").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/backbone.json").touch()
    theirs = {
        "data_dir": "~/data",
        "student_checkpoint": "$HOME/run/last.pth",
        "output": "~/out",
        "experiment": "a",
    }
    config = make_config(write(tmp_path, LEAST | theirs))
    made = [config.data.val, config.student.weights, config.output]
    assert made == [f"{tmp_path}/data/validation", f"{tmp_path}/run", f"{tmp_path}/out/a"]
    with pytest.raises(
        UserError, match=r"their.yaml: output: \$NONE/x: the environment variable NONE is not"
    ):
        make_config(write(tmp_path, LEAST | {"output": "$NONE/x"}))


def test_a_file_of_mim(tmp_path):
    options = LEAST | {"teacher_pretrained": True}
    config = make_config(write(tmp_path, options, "configs-mim/a.yaml"))
    assert (config.objective, config.teacher.skip_blocks, config.student.weights) == ("mim", 0, "random")
    path = write(tmp_path, options)
    assert make_config(path, ["objective=mim"]).teacher.skip_blocks == 0
    assert make_config(path).objective == "maskembed"
    for name, value in (("decoder_layers", 4), ("freeze_student", False), ("skip_blocks", 2)):
        with pytest.raises(UserError, match=f"mim.py has no use for {name}: remove it"):
            make_config(write(tmp_path, options | {name: value}), ["objective=mim"])


def test_wandb_is_left_out_where_it_is_missing(tmp_path, monkeypatch):
    path = write(tmp_path, LEAST | {"log_wandb": True, "project": "p"})
    for spec, sinks in ((None, []), (object(), ["wandb:p"])):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, spec=spec: spec)
        config, notes = read_reference(path)
        assert config.log.to == sinks
        assert ("wandb is not installed" in " ".join(notes)) == (not sinks)


def test_names_without_a_tag(tmp_path):
    name = "vit_base_patch16_siglip_224"
    path = write(tmp_path, LEAST | {"student_model": f"s{name}", "teacher_model": name})
    assert make_config(path).student.name == f"{name}.webli"
    name = "vit_large_patch14_clip_quickgelu_336"
    config, notes = read_reference(write(tmp_path, LEAST | {"student_model": name, "teacher_model": name}))
    assert config.student.name == name
    assert [note for note in notes if "names no weights" in note and name in note]


REFUSED = {
    **dict.fromkeys(("input_key", "interpolation", "resume", "device", "clip_mode", "sched"), "other"),
    **dict.fromkeys(("mixup_mode", "train_interpolation", "input_img_mode"), "other"),
    **dict.fromkeys(
        ("crop_pct", "layer_decay", "lr_k_decay", "epoch_repeats", "vflip", "opt_eps", "drop"), 0.25
    ),
    **dict.fromkeys(
        ("color_jitter_prob", "grayscale_prob", "gaussian_blur_prob", "aug_repeats", "reprob"), 0.25
    ),
    **dict.fromkeys(("mixup_prob", "mixup_switch_prob", "drop_block"), 0.25),
    **{name: [0.5] for name in ("mean", "std", "lr_noise", "cutmix_minmax", "device_modules")},
    **dict.fromkeys(("in_chans", "lr_cycle_limit", "start_epoch", "cooldown_epochs", "aug_splits"), 7),
    **dict.fromkeys(("dataset_download", "warmup_prefix", "no_aug", "model_ema_warmup", "save_images"), True),
    "mixup_off_epoch": 7,
    "sched_on_updates": False,
}


def test_every_refused_option_is_tried_below():
    assert set(REFUSED) == {name for name, option in OPTIONS.items() if option.fate == "refused"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fastalign_has_not_got_is_refused_by_name(tmp_path, name):
    with pytest.raises(UserError) as caught:
        make_config(write(tmp_path, LEAST | {name: REFUSED[name]}))
    assert f"their.yaml: {name}" in str(caught.value)
    assert f"remove {name}" in str(caught.value) or f"set {name} to" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bach_size": 3}, ["unknown option bach_size", "nearest is batch_size"]),
        ({"data-dir": "/d"}, ["unknown option data-dir", "nearest is data_dir"]),
        ({"num_classes": 1000}, ["num_classes", "finetune.py"]),
        ({"prefix_only": "False"}, ["prefix_only must be true or false, without quotes"]),
        ({"antithetical_sampling": 0}, ["antithetical_sampling must be true or false"]),
        ({"batch_size": 1.5}, ["batch_size must be a whole number, got 1.5"]),
        ({"epochs": "inf"}, ["epochs must be a whole number"]),
        ({"lr": "fast"}, ["lr must be a number, got 'fast'"]),
        ({"batch_size": None}, ["batch_size must be a whole number, got None"]),
        ({"model_kwargs": "img_size=224"}, ["model_kwargs must be a mapping"]),
        ({"scale": 0.5}, ["scale must be a list of numbers"]),
        ({"scale": ["a"]}, ["scale must be a list of numbers"]),
        ({"opt": "sgd"}, ["opt=sgd is not in fastalign", "set opt to adamw"]),
        ({"loss_function": "huber"}, ["loss_function=huber", "mse or cosine or l1"]),
        ({"train_crop_mode": "rkrr"}, ["train_crop_mode=rkrr", "rrc or rkrc"]),
        ({"torchcompile": "aot_eager"}, ["torchcompile=aot_eager", "inductor"]),
        ({"amp": True}, ["amp_dtype=float16", "set amp_dtype: bfloat16"]),
        ({"aa": "augmix-m5"}, ["aa=augmix-m5", "rand-"]),
        ({"opt_kwargs": {"layer_decay": 0.7}}, ["opt_kwargs.layer_decay", "remove it"]),
        ({"opt_kwargs": {"eps": 1e-6}}, ["opt_kwargs.eps", "remove it"]),
        ({"opt_kwargs": {"betas": [0.9, 0.9]}, "opt_betas": [0.9, 0.9]}, ["opt_betas", "remove one"]),
        ({"opt_kwargs": {1: 2, "a": 3}}, ["opt_kwargs.1 is not in fastalign", "remove it"]),
        ({"lr": None, "lr_base_size": 0}, ["lr_base_size must be at least 1, got 0"]),
        ({"lr": None, "lr_base_size": -4}, ["lr_base_size must be at least 1, got -4"]),
        ({"model_kwargs": {1: 2, "a": 3}, "student_model_kwargs": {1: 2, "a": 3}}, ["1 is in", "remove one"]),
        (
            {"student_model": "svit_a", "model_kwargs": {"max_attn_val": "x"}},
            ["max_attn_val must be a positive"],
        ),
        ({"warmup_epochs": 1}, ["warmup_lr is 1e-05", "set warmup_lr: 0.0"]),
        ({"teacher_pretrained": False}, ["teacher_pretrained or teacher_checkpoint"]),
        ({"model_kwargs": {"depth": 2}, "student_model_kwargs": {"depth": 3}}, ["depth", "remove one"]),
        ({"model_kwargs": {"max_attn_val": 3}}, ["max_attn_val", "svit_"]),
        ({"img_size": 448}, ["img_size is 448", "model_kwargs: {img_size: 448}"]),
        ({"input_size": [3, 448, 448]}, ["input_size", "[3, 224, 224]"]),
        ({"student_model": "vit_base_patch16_224.mae"}, ["normalise", "vit_base_patch16_224.mae"]),
        ({"dataset": "tfds/imagenet"}, ["dataset tfds/imagenet", "folder"]),
        ({"dataset": "wds/imagenet"}, ["names no tar shards", "{000..099}.tar"]),
        ({"clip_grad": -1}, ["optim.clip", "-1"]),
        ({"hflip": 2}, ["data.hflip", "2"]),
    ],
)
def test_bad_files_are_one_line_that_names_file_and_option(tmp_path, options, words):
    with pytest.raises(UserError) as caught:
        make_config(write(tmp_path, LEAST | options))
    message = str(caught.value)
    assert "\n" not in message
    for word in ("their.yaml", *words):
        assert word in message


def test_the_command_prints_ours(tmp_path, capsys):
    path = write(tmp_path, reference_yaml("clip-vit-b"))
    assert train.main(["--reference-config", str(path), "--print-config", "seed=3", "optim.epochs=2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# 256 images a GPU x 1 passes x 4 GPUs = 1024 images an update")
    assert load_config(write(tmp_path, text, "ours.yaml")) == make_config(path, ["seed=3", "optim.epochs=2"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reference-config", "none.yaml"], "none.yaml"),
        (["configs/demo.yaml", "--world-size", "4"], "--world-size requires --reference-config"),
        (["--reference-config", "none.yaml", "--world-size", "0"], "--world-size must be at least 1"),
    ],
)
def test_the_command_refuses(arguments, words, capsys):
    assert train.main(arguments) == 2
    assert words in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        train.main([])
    assert caught.value.code == 2
    assert "--reference-config FILE" in capsys.readouterr().err


def test_a_file_of_theirs_trains(tmp_path, images, monkeypatch, capsys):
    """With what a laptop needs changed: random weights, a tiny model, no compiler."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, tmp_path / "data" / "imagenet21k")
    path = write(tmp_path, reference_yaml("in1k-vit-t"))
    tiny = [f"student.kwargs={{img_size: 32, depth: {MODEL['kwargs']['depth']}}}", "student.weights=random"]
    tiny += ["efficiency.compile=false", "optim.batch_size=8", "data.threads=1", "max_steps=2", "log.to=[]"]
    assert train.main(["--reference-config", str(path), *tiny]) == 0
    assert len(losses(tmp_path / "output" / "in1k-vit-t-maskembed")) == 2
    assert "images an update" in capsys.readouterr().out
