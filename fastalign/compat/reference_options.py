"""The 141 options of the authors' training scripts: type, default, and what becomes of each here.

mapped: to a key of ours. ignored: it changes nothing that is computed. refused: any other value than the ones that
mean "as here" ends the command with a line. docs/reference-configs.md is this table; a test compares them.
"""

from pathlib import Path
from typing import Any, NamedTuple


class Option(NamedTuple):
    """One option."""

    kind: type
    default: Any
    fate: str
    """mapped | ignored | refused"""
    note: str
    """mapped: our key; ignored, refused: why"""
    choices: tuple = ()
    """the only values that are taken; empty = any of its kind"""


def _to(kind: type, default: Any, key: str, *choices: Any) -> Option:
    return Option(kind, default, "mapped", key, choices)


def _same(kind: type, default: Any, why: str) -> Option:
    return Option(kind, default, "ignored", why)


def _no(kind: type, default: Any, why: str, *choices: Any) -> Option:
    return Option(kind, default, "refused", why, choices or (default,))


_OTHER = "of other schedules than the cosine"
_LABELS = "labels are not used"
_SPEED = "about speed only"
_IN1K = "vit_base_patch16_224.augreg_in21k_ft_in1k"
_BACKBONE = "images are read, cropped and normalised as the backbone's published ones"

DATA = {
    "data_dir": _to(Path, None, "data.train, data.val: with the split"),
    "dataset": _to(
        str, "", "data.train: a folder or tar file; wds/ = tar shards, the split is their pattern"
    ),
    "train_split": _to(str, "train", "data.train"),
    "val_split": _to(str, "validation", "data.val; empty = none"),
    "train_num_samples": _same(int, None, "images are counted"),
    "val_num_samples": _same(int, None, "images are counted"),
    "dataset_download": _no(bool, False, "nothing is downloaded: give a folder or tar shards"),
    "class_map": _same(str, "", _LABELS),
    "input_img_mode": _no(str, None, "images are RGB", None, "RGB"),
    "input_key": _no(str, None, "tar shards name their images by extension"),
    "target_key": _same(str, None, _LABELS),
}
MODEL = {
    "student_model": _to(str, _IN1K, "student.name; svit_* = vit_* with student.softcap, any other without"),
    "student_head": _to(str, "linear", "student.head", "linear", "mlp"),
    "student_pretrained": _to(bool, True, "student.weights: pretrained or random"),
    "student_checkpoint": _to(Path, "", "student.weights"),
    "freeze_student": _to(bool, False, "student.freeze"),
    "teacher_model": _to(str, _IN1K, "teacher.name, unless it is the student's"),
    "teacher_pretrained": _to(bool, True, "teacher.weights: pretrained"),
    "teacher_checkpoint": _to(Path, "", "teacher.weights"),
    "skip_blocks": _to(int, 1, "teacher.skip_blocks; 0 for mim.py, which has no use for it"),
    "prefix_only": _to(bool, False, "teacher.prefix_only"),
    "loss_function": _to(str, "mse", "loss.name", "mse", "cosine", "l1", "masked_mse", "unmasked_mse"),
    "decoder_layers": _to(int, 2, "decoder.layers"),
    "decoder_width": _to(int, None, "decoder.kwargs.width"),
    "decoder_num_heads": _to(int, None, "decoder.kwargs.heads"),
    "decoder_qk_norm": _to(bool, None, "decoder.kwargs.qk_norm"),
    "decoder_qkv_bias": _to(bool, None, "decoder.kwargs.qkv_bias"),
    "decoder_init_values": _to(float, 1e-6, "decoder.kwargs.init_values; 0 = none"),
    "resume": _no(
        str, "", "a run resumes by running again on its output; student_checkpoint gives weights only"
    ),
    "no_resume_opt": _same(bool, False, "nothing without resume"),
    "img_size": _to(int, None, "checked: must be the backbone's, with model_kwargs"),
    "in_chans": _no(int, None, "images have 3 channels", None, 3),
    "input_size": _to(list, None, "checked: must be 3 channels of the backbone's size"),
    "crop_pct": _no(float, None, _BACKBONE),
    "mean": _no(list, None, _BACKBONE),
    "std": _no(list, None, _BACKBONE),
    "interpolation": _no(str, "", _BACKBONE, "", None),
    "batch_size": _to(int, 128, "optim.batch_size: times grad_accum_steps, times the GPUs"),
    "validation_batch_size": _same(int, None, "validation has the training's batch"),
    "channels_last": _same(bool, False, _SPEED),
    "grad_accum_steps": _to(int, 1, "optim.accumulate"),
    "grad_checkpointing": _to(bool, False, "efficiency.grad_checkpointing"),
    "model_kwargs": _to(dict, {}, "student.kwargs, teacher.kwargs; max_attn_val: student.softcap"),
    "student_model_kwargs": _to(dict, {}, "student.kwargs; max_attn_val: student.softcap"),
    "teacher_model_kwargs": _to(dict, {}, "teacher.kwargs"),
    "torchscript": _same(bool, False, _SPEED),
    "torchcompile": _to(str, None, "efficiency.compile", None, "inductor"),
}
MACHINE = {
    "device": _no(str, "cuda", "a run takes the GPU if there is one, CUDA_VISIBLE_DEVICES hides it", "cuda"),
    "amp": _to(bool, False, "efficiency.precision: auto (bf16 where the hardware has it), without amp fp32"),
    "amp_dtype": _to(str, "float16", "efficiency.precision; with amp, bfloat16 only"),
    "no_ddp_bb": _same(bool, False, "no backbone has buffers to broadcast"),
    "synchronize_step": _same(bool, False, _SPEED),
    "local_rank": _same(int, 0, "torchrun tells it"),
    "device_modules": _no(list, None, "nothing is imported by name"),
}
OPTIMISER = {
    "opt": _to(str, "sgd", "optim.name", "adamw"),
    "opt_eps": _no(float, None, "AdamW's epsilon is 1e-8", None, 1e-8),
    "opt_betas": _to(list, None, "optim.betas; without it, or opt_kwargs' betas, AdamW's 0.9 and 0.999"),
    "momentum": _same(float, 0.9, "AdamW has none"),
    "weight_decay": _to(float, 0.01, "optim.weight_decay"),
    "clip_grad": _to(float, None, "optim.clip"),
    "clip_mode": _no(str, "norm", "gradients are clipped by their norm"),
    "layer_decay": _no(float, None, "the authors' script has no effect of it"),
    "opt_kwargs": _to(dict, {}, "optim.betas; no other key than betas and eps: 1e-8"),
}
SCHEDULE = {
    "sched": _no(str, "cosine", "the schedule is the cosine"),
    "sched_on_updates": _no(bool, False, "the learning rate changes with every update, not epoch", True),
    "lr": _to(float, None, "optim.lr"),
    "lr_base": _to(float, 0.1, "optim.lr where lr is not given: scaled by the batch"),
    "lr_base_size": _to(int, 256, "optim.lr where lr is not given"),
    "lr_base_scale": _to(
        str, "", "optim.lr where lr is not given; for AdamW the square root", "", "sqrt", "linear"
    ),
    "lr_noise": _no(list, None, "the schedule has no noise"),
    "lr_noise_pct": _same(float, 0.67, "nothing without lr_noise"),
    "lr_noise_std": _same(float, 1.0, "nothing without lr_noise"),
    "lr_cycle_mul": _same(float, 1.0, "nothing in a single cycle"),
    "lr_cycle_decay": _same(float, 0.5, "nothing in a single cycle"),
    "lr_cycle_limit": _no(int, 1, "the schedule has one cycle"),
    "lr_k_decay": _no(float, 1.0, "the cosine is the plain one"),
    "warmup_lr": _to(float, 1e-5, "optim.min_lr, where the warm-up starts: must be equal if there is one"),
    "min_lr": _to(float, 0.0, "optim.min_lr"),
    "epochs": _to(int, 300, "optim.epochs"),
    "epoch_repeats": _no(float, 0.0, "an epoch is one pass"),
    "start_epoch": _no(int, None, "a run starts at 0, or where its output stands"),
    "decay_milestones": _same(list, [90, 180, 270], _OTHER),
    "decay_epochs": _same(float, 90.0, _OTHER),
    "warmup_epochs": _to(int, 5, "optim.warmup_epochs"),
    "warmup_prefix": _no(bool, False, "the warm-up is part of the schedule"),
    "cooldown_epochs": _no(int, 0, "a run ends with its schedule"),
    "patience_epochs": _same(int, 10, _OTHER),
    "decay_rate": _same(float, 0.1, _OTHER),
}
AUGMENTATION = {
    "no_aug": _no(bool, False, "training images are augmented"),
    "train_crop_mode": _to(str, None, "data.crop; none = rrc", None, "rrc", "rkrc"),
    "scale": _to(list, [0.08, 1.0], "data.scale"),
    "ratio": _to(list, [3 / 4, 4 / 3], "data.ratio"),
    "hflip": _to(float, 0.5, "data.hflip"),
    "vflip": _no(float, 0.0, "there is no vertical flip"),
    "color_jitter": _to(float, 0.4, "data.color_jitter; 0 with aa, which switches it off"),
    "color_jitter_prob": _no(float, None, "every image is jittered"),
    "grayscale_prob": _no(float, None, "colours stay", None, 0.0),
    "gaussian_blur_prob": _no(float, None, "there is no blur", None, 0.0),
    "aa": _to(str, None, "data.randaugment; rand-... only"),
    "aug_repeats": _no(float, 0.0, "an image is seen once an epoch"),
    "aug_splits": _no(int, 0, "batches are not split"),
    "reprob": _no(float, 0.0, "nothing is erased"),
    "remode": _same(str, "pixel", "nothing without reprob"),
    "recount": _same(int, 1, "nothing without reprob"),
    "resplit": _same(bool, False, "nothing without reprob"),
    "mixup": _to(float, 0.0, "data.mixup"),
    "cutmix": _to(float, 0.0, "data.cutmix"),
    "cutmix_minmax": _no(list, None, "cutmix has its alpha"),
    "mixup_prob": _no(float, 1.0, "every batch is mixed"),
    "mixup_switch_prob": _no(float, 0.5, "mixup and cutmix take turns evenly"),
    "mixup_mode": _no(str, "batch", "a batch is mixed as a whole"),
    "mixup_off_epoch": _no(int, 0, "mixing goes on to the end"),
    "train_interpolation": _no(str, "random", "bilinear or bicubic, at random"),
    "drop": _no(float, 0.0, "there is no dropout"),
    "drop_path": _to(float, None, "student.kwargs.drop_path_rate"),
    "drop_block": _no(float, None, "a ViT has none"),
    "model_ema": _to(bool, False, "optim.ema"),
    "model_ema_force_cpu": _same(bool, False, "where the average is kept; it is evaluated here"),
    "model_ema_decay": _to(float, 0.9998, "optim.ema, with model_ema"),
    "model_ema_warmup": _no(bool, False, "the average's decay is constant"),
}
OUTPUT = {
    "seed": _to(int, 42, "seed"),
    "worker_seeding": _same(str, "all", "what is drawn does not depend on workers"),
    "log_interval": _to(int, 100, "log.every_steps"),
    "recovery_interval": _to(int, 0, "checkpoint.every_steps; 0 = its default"),
    "checkpoint_hist": _to(int, 10, "checkpoint.keep: the newest, and the best beside them"),
    "checkpoint_retain_interval": _same(int, 50, "no older checkpoint is kept but the best"),
    "workers": _same(int, 4, "decoding threads, not processes: data.threads"),
    "save_images": _no(bool, False, "no images are saved"),
    "pin_mem": _same(bool, False, _SPEED),
    "no_prefetcher": _same(bool, False, _SPEED),
    "output": _to(Path, "", "output, with experiment behind it; empty = output/train"),
    "experiment": _to(str, "", "output; empty = the student's name, no date, so that it resumes"),
    "project": _to(str, None, "log.to: wandb:PROJECT, with log_wandb"),
    "wandb_id": _same(str, None, "an output folder has its own"),
    "log_wandb": _to(bool, False, "log.to; left out with a line where wandb is not installed, as theirs"),
    "use_multi_epochs_loader": _same(bool, False, _SPEED),
}
MASKS = {
    "mask_sampling": _to(str, "uniform", "masks.distribution", "uniform", "bernoulli", "blockwise"),
    "bernoulli_mask_ratio": _to(float, 0.5, "masks.ratio for bernoulli: the visible share in both"),
    "blockwise_mask_ratio": _to(float, 0.4, "masks.ratio for blockwise: the visible share in both"),
    "antithetical_sampling": _to(bool, True, "masks.complement"),
    "include_null_mask": _to(bool, True, "masks.full"),
}
OPTIONS: dict[str, Option] = {
    **DATA, **MODEL, **MACHINE, **OPTIMISER, **SCHEDULE, **AUGMENTATION, **OUTPUT, **MASKS
}  # fmt: skip
NULLABLE = ("color_jitter", "decoder_init_values", "val_split")
"""Options that may be null although their default is a value: off."""
MIM_DEFAULTS = {"student_pretrained": False, "teacher_pretrained": False}
"""Where the defaults of mim.py differ."""
NOT_MIM = ("freeze_student", *(name for name in OPTIONS if name.startswith("decoder_")))
"""Options that mim.py has not got."""
FINETUNE = (
    "model",
    "pretrained",
    "output_head",
    "freeze_backbone",
    "initial_checkpoint",
    "num_classes",
    "smoothing",
)
FINETUNE += ("jsd_loss", "bce_loss", "bce_sum", "bce_target_thresh", "bce_pos_weight")
"""Options that only finetune.py has."""
