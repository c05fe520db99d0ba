"""The authors' YAML files: every option, what it means here, and what is refused."""

import re
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from fastalign import UserError, train
from fastalign.compat.reference_config import make_config, read_reference
from fastalign.compat.reference_options import IGNORED, KEYS, REFUSED, Options
from fastalign.config import load_config
from tests.reference_recipes import reference_options
from tests.run_helpers import MODEL, losses

ROOT = Path(__file__).parents[2]

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
# The smallest file that their train.py would train with and that we accept.
LEAST = {"data_dir": "/d", "opt": "adamw", "sched_on_updates": True, "lr": 1e-3, "warmup_epochs": 0}


@pytest.fixture
def write(tmp_path):
    """Writes one of their files."""

    def write(options: dict, folder: str = "configs") -> Path:
        path = tmp_path / folder / "their.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(options))
        return path

    return write


def test_every_option_is_mapped_ignored_or_refused():
    defaults = dict(pair.split("=", 1) for pair in DEFAULTS.split())
    assert len(defaults) == 141
    assert sorted([*Options.model_fields, *REFUSED, *IGNORED]) == sorted(defaults)
    found = {name: field.default for name, field in Options.model_fields.items() if name != "opt_kwargs"}
    found |= {name: row[0] for name, row in REFUSED.items()}
    for name, value in found.items():
        text = str(value).replace(" ", "")
        assert text == defaults[name] or float(value) == float(defaults[name]), name


def test_the_documentation_lists_every_option():
    text = (ROOT / "docs" / "reference-configs.md").read_text()
    mapped, rest = text.partition("## Mapped")[2].split("## Ignored")
    ignored, refused = rest.split("## Refused")
    rows = re.findall(r"^- ((?:`\w+`(?:, )?)+): (.+)$", mapped, re.M)
    rows = {name: key for names, key in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(rows) == set(Options.model_fields)
    for name, key in KEYS.items():
        section, _, last = key.rpartition(".")
        assert f"`{key}`" in rows[name] or (last == name and f"`{section}.*`" in rows[name]), name
    for part, expected, first in ((ignored, IGNORED, ": "), (refused, REFUSED, "- ")):
        rows = re.findall(r"^- .*$", part, re.M)
        names = [row.rpartition(first)[2] if first == ": " else row.partition(": ")[0] for row in rows]
        assert {name for row in names for name in re.findall(r"`(\w+)`", row)} == set(expected)


# Worked out by hand from what their script does with an option, and timm with its arguments.
MEANINGS = """
-> optim.betas: [0.9, 0.999], optim.clip: null, efficiency.precision: fp32, data.crop: rrc, seed: 42
-> data.color_jitter: 0.4, optim.batch_size: 512, optim.epochs: 300, student.softcap: null
-> data.train: /d/train, data.val: /d/validation
val_split: "" -> data.val: null
data_dir: /d/a.tar -> data.train: /d/a.tar
dataset: wds/in, train_split: "{0..9}.tar", val_split: null -> data.train: "/d/{0..9}.tar"
lr: null, batch_size: 64 -> optim.lr: 0.1
lr: null, batch_size: 256 -> optim.lr: 0.2
lr: null, batch_size: 256, lr_base_scale: linear -> optim.lr: 0.4
opt_betas: [0.8, 0.9], opt_eps: 1e-08 -> optim.betas: [0.8, 0.9]
min_lr: 1e-5, warmup_lr: 1e-5, warmup_epochs: 2 -> optim.min_lr: 0.00001, optim.warmup_epochs: 2
model_ema: true -> optim.ema: 0.9998
model_ema_decay: 0.9 -> optim.ema: null
aa: rand-m9, color_jitter: 0.4 -> data.randaugment: rand-m9, data.color_jitter: 0.0
amp: true, amp_dtype: bfloat16 -> efficiency.precision: auto
grad_checkpointing: true -> efficiency.grad_checkpointing: true, efficiency.compile: false
recovery_interval: 500, checkpoint_hist: 3 -> checkpoint.every_steps: 500, checkpoint.keep: 3
student_checkpoint: a.pth.tar -> student.weights: a.pth.tar, teacher.weights: pretrained
teacher_checkpoint: a.pth.tar -> student.weights: pretrained, teacher.weights: a.pth.tar
student_pretrained: false -> student.weights: random, teacher.weights: pretrained
drop_path: 0.1 -> student.kwargs: {drop_path_rate: 0.1}, teacher.name: null
model_kwargs: {depth: 2} -> student.kwargs: {depth: 2}, teacher.name: null
teacher_model_kwargs: {depth: 2} -> student.kwargs: {}, teacher.kwargs: {depth: 2}
student_model: svit_a.b, student_model_kwargs: {max_attn_val: 20} -> student.name: vit_a.b, student.softcap: 20.0
student_model: svit_a_siglip_b, teacher_model: vit_a_siglip_b -> student.name: vit_a_siglip_b.webli
teacher_model: svit_a.b -> teacher.name: svit_a.b, teacher.kwargs: {}, student.softcap: null
teacher_model: svit_a.b, teacher_model_kwargs: {max_attn_val: 2} -> teacher.kwargs: {max_attn_val: 2}
decoder_init_values: 0, decoder_num_heads: 4 -> decoder.kwargs.init_values: null, decoder.kwargs.heads: 4
img_size: 448, model_kwargs: {img_size: 448}, in_chans: 3 -> student.kwargs: {img_size: 448}
opt_kwargs: {betas: [0.9, 0.95]}, opt_betas: [0.8, 0.9] -> optim.betas: [0.9, 0.95]
freeze_student: true -> student.freeze: true
experiment: null, output: null -> output: output/train/vit_base_patch16_224.augreg_in21k_ft_in1k
"""


@pytest.mark.parametrize("case", MEANINGS.strip().splitlines())
def test_options_mean_what_they_mean_there(write, case):
    options, keys = (yaml.safe_load(f"{{{part}}}") for part in case.split("->"))
    config = make_config(write(LEAST | options))
    for key, value in keys.items():
        found = attrgetter(key)(config)
        found = list(found) if isinstance(found, tuple) else found
        assert found == (pytest.approx(value) if isinstance(value, float) else value), key


def test_the_batch_is_a_gpus_times_the_gpus(write, monkeypatch):
    path = write(LEAST | {"batch_size": 32, "grad_accum_steps": 8})
    assert make_config(path).optim.batch_size == 1024
    monkeypatch.setenv("WORLD_SIZE", "8")
    config, notes = read_reference(path)
    assert (config.optim.batch_size, config.optim.accumulate) == (2048, 8)
    assert "32 images per GPU x 8 passes x 8 GPUs = 2048 images per update" in notes[0]
    assert make_config(path, world_size=2).optim.batch_size == 512


def test_paths_and_splits(write, tmp_path, monkeypatch):
    """Read as a shell reads them; a split under another usual name; the folder of a run of ours in a chain."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("data/val", "data/training", "run"):
        (tmp_path / folder).mkdir(parents=True)
    theirs = {"data_dir": "~/data", "student_checkpoint": "$HOME/run/a.pth"}
    path = write(LEAST | theirs | {"output": "~/out", "experiment": "a"})
    config = make_config(path)
    assert [config.data.train, config.data.val] == [f"{tmp_path}/data/training", f"{tmp_path}/data/val"]
    assert [config.student.weights, config.output] == [f"{tmp_path}/run/a.pth", f"{tmp_path}/out/a"]
    (tmp_path / "run/backbone.json").touch()
    assert make_config(path).student.weights == f"{tmp_path}/run"
    (tmp_path / "run/a.pth").touch()
    assert make_config(path).student.weights == f"{tmp_path}/run/a.pth"


def test_a_file_of_mim(write):
    options = LEAST | {"teacher_pretrained": True}
    config = make_config(write(options, "configs-mim"))
    assert (config.objective, config.teacher.skip_blocks, config.student.weights) == ("mim", 0, "random")
    assert make_config(write(options), ["objective=mim"]).teacher.skip_blocks == 0
    assert make_config(write(options)).objective == "maskembed"
    for name, value in (("decoder_layers", 4), ("freeze_student", False), ("skip_blocks", 2)):
        with pytest.raises(UserError, match=f"mim.py does not use {name}: remove it"):
            make_config(write(options | {name: value}), ["objective=mim"])


def test_wandb_is_left_out_if_it_is_missing(write, monkeypatch):
    path = write(LEAST | {"log_wandb": True, "project": "p"})
    for spec, sinks in ((None, []), (object(), ["wandb:p"])):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, spec=spec: spec)
        config, notes = read_reference(path)
        assert config.log.to == sinks
        assert ("wandb is not installed" in " ".join(notes)) == (not sinks)


@pytest.mark.parametrize("name", REFUSED)
def test_other_values_are_refused_by_name(write, name):
    for value in REFUSED[name]:
        make_config(write(LEAST | {name: value}))
    with pytest.raises(UserError, match=f"their.yaml: {name}=.* is not supported: remove it"):
        make_config(write(LEAST | {name: 7 if isinstance(REFUSED[name][-1], int) else "other"}))


BAD = """
output: $NO_SUCH_VARIABLE/x -> output: $NO_SUCH_VARIABLE/x: the environment variable
bach_size: 3 -> unknown key bach_size | nearest is batch_size
data-dir: /d -> unknown key data-dir | nearest is data_dir
model: vit, num_classes: 1000 -> finetune.py | fastalign classify
prefix_only: "False" -> prefix_only: Input should be a valid boolean, got 'False'
batch_size: null -> batch_size: Input should be a valid integer, got None
opt: sgd -> opt: Input should be 'adamw', got 'sgd'
amp: true -> amp_dtype=float16 | set amp_dtype: bfloat16
aa: augmix-m5 -> aa=augmix-m5 is not supported: give rand-..., or remove it
opt_kwargs: {layer_decay: 0.7} -> unknown key opt_kwargs.layer_decay
lr_base_size: 0 -> lr_base_size: Input should be greater than or equal to 1, got 0
student_model: svit_a, model_kwargs: {max_attn_val: x} -> max_attn_val must be a positive
warmup_epochs: 1 -> warmup_lr is 1e-05 | set warmup_lr: 0.0
teacher_pretrained: false -> teacher_pretrained or teacher_checkpoint
img_size: 448 -> img_size is 448 | model_kwargs: {img_size: 448}
student_model: vit_base_patch16_224.mae -> normalise | vit_base_patch16_224.mae
dataset: tfds/imagenet -> dataset tfds/imagenet | folder of images
dataset: wds/imagenet -> dataset wds/imagenet | {000..099}.tar
clip_grad: -1 -> optim.clip | -1
"""


@pytest.mark.parametrize("case", BAD.strip().splitlines())
def test_bad_files_are_one_line_that_names_file_and_option(write, case):
    options, words = case.split(" -> ")
    with pytest.raises(UserError) as caught:
        make_config(write(LEAST | yaml.safe_load(f"{{{options}}}")))
    message = str(caught.value)
    assert "\n" not in message
    for word in ("their.yaml", *words.split(" | ")):
        assert word in message


def test_the_command_prints_ours(write, tmp_path, capsys):
    path = write(reference_options("clip-vit-b"))
    assert train.main(["--reference-config", str(path), "--print-config", "seed=3", "optim.epochs=2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# 256 images per GPU x 1 passes x 4 GPUs = 1024 images per update")
    (tmp_path / "ours.yaml").write_text(text)
    assert load_config(tmp_path / "ours.yaml") == make_config(path, ["seed=3", "optim.epochs=2"])


def test_the_command_refuses(capsys):
    for arguments, words in {
        "--reference-config none.yaml": "none.yaml",
        "configs/demo.yaml --world-size 4": "--world-size",
        "--reference-config none.yaml --world-size 0": "--world-size takes 1 or more",
    }.items():
        assert train.main(arguments.split()) == 2
        assert words in capsys.readouterr().err


def test_a_file_of_theirs_trains(write, tmp_path, images, monkeypatch, capsys):
    """With random weights and a tiny model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "imagenet21k").symlink_to(images)
    path = write(reference_options("in1k-vit-t"))
    tiny = [f"student.kwargs={{img_size: 32, depth: {MODEL['kwargs']['depth']}}}", "student.weights=random"]
    tiny += ["efficiency.compile=false", "optim.batch_size=8", "data.threads=1", "max_steps=2", "log.to=[]"]
    assert train.main(["--reference-config", str(path), *tiny]) == 0
    assert len(losses(tmp_path / "output" / "in1k-vit-t")) == 2
    assert "images per update" in capsys.readouterr().out
