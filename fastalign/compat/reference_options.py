"""The 141 options of the authors' training scripts: read into one of our keys, ignored, or refused.

docs/reference-configs.md lists them; a test compares.
"""

from pathlib import Path
from typing import Any, NamedTuple


class Option(NamedTuple):
    """An option that decides one or more of our keys."""

    kind: type
    default: Any
    """the authors'"""
    key: str = ""
    """our key for the same value; empty = `reference_config` computes with it"""
    choices: tuple = ()
    """the supported values; empty = any of the kind"""


_IN1K = "vit_base_patch16_224.augreg_in21k_ft_in1k"
_ROWS = {
    "data_dir": (Path, None),
    "dataset": (str, ""),
    "train_split": (str, "train"),
    "val_split": (str, "validation"),
    "student_model": (str, _IN1K),
    "student_head": (str, "linear", "student.head", ("linear", "mlp")),
    "student_pretrained": (bool, True),
    "student_checkpoint": (Path, ""),
    "freeze_student": (bool, False, "student.freeze"),
    "teacher_model": (str, _IN1K),
    "teacher_pretrained": (bool, True),
    "teacher_checkpoint": (Path, ""),
    "skip_blocks": (int, 1, "teacher.skip_blocks"),
    "prefix_only": (bool, False, "teacher.prefix_only"),
    "loss_function": (str, "mse", "loss.name", ("mse", "cosine", "l1", "masked_mse", "unmasked_mse")),
    "decoder_layers": (int, 2, "decoder.layers"),
    "decoder_width": (int, None, "decoder.kwargs.width"),
    "decoder_num_heads": (int, None, "decoder.kwargs.heads"),
    "decoder_qk_norm": (bool, None, "decoder.kwargs.qk_norm"),
    "decoder_qkv_bias": (bool, None, "decoder.kwargs.qkv_bias"),
    "decoder_init_values": (float, 1e-6, "decoder.kwargs.init_values"),
    "img_size": (int, None),
    "input_size": (list, None),
    "batch_size": (int, 128),
    "grad_accum_steps": (int, 1, "optim.accumulate"),
    "grad_checkpointing": (bool, False, "efficiency.grad_checkpointing"),
    "model_kwargs": (dict, {}),
    "student_model_kwargs": (dict, {}),
    "teacher_model_kwargs": (dict, {}),
    "torchcompile": (str, None, "", (None, "inductor")),
    "amp": (bool, False),
    "amp_dtype": (str, "float16"),
    "opt": (str, "sgd", "optim.name", ("adamw",)),
    "opt_betas": (list, None),
    "weight_decay": (float, 0.01, "optim.weight_decay"),
    "clip_grad": (float, None, "optim.clip"),
    "opt_kwargs": (dict, {}),
    "sched_on_updates": (bool, False, "", (True,)),
    "lr": (float, None),
    "lr_base": (float, 0.1),
    "lr_base_size": (int, 256),
    "lr_base_scale": (str, "", "", ("", "sqrt", "linear")),
    "warmup_lr": (float, 1e-5),
    "min_lr": (float, 0.0, "optim.min_lr"),
    "epochs": (int, 300, "optim.epochs"),
    "warmup_epochs": (int, 5, "optim.warmup_epochs"),
    "train_crop_mode": (str, None, "", (None, "rrc", "rkrc")),
    "scale": (list, [0.08, 1.0], "data.scale"),
    "ratio": (list, [3 / 4, 4 / 3], "data.ratio"),
    "hflip": (float, 0.5, "data.hflip"),
    "color_jitter": (float, 0.4),
    "aa": (str, None),
    "mixup": (float, 0.0, "data.mixup"),
    "cutmix": (float, 0.0, "data.cutmix"),
    "drop_path": (float, None),
    "model_ema": (bool, False),
    "model_ema_decay": (float, 0.9998),
    "seed": (int, 42, "seed"),
    "log_interval": (int, 100, "log.every_steps"),
    "recovery_interval": (int, 0),
    "checkpoint_hist": (int, 10, "checkpoint.keep"),
    "output": (Path, ""),
    "experiment": (str, ""),
    "project": (str, None),
    "log_wandb": (bool, False),
    "mask_sampling": (str, "uniform", "masks.distribution", ("uniform", "bernoulli", "blockwise")),
    "bernoulli_mask_ratio": (float, 0.5),
    "blockwise_mask_ratio": (float, 0.4),
    "antithetical_sampling": (bool, True, "masks.complement"),
    "include_null_mask": (bool, True, "masks.full"),
}
OPTIONS = {name: Option(*row) for name, row in _ROWS.items()}

IGNORED = {
    "images are counted": "train_num_samples val_num_samples",
    "labels are not used": "class_map target_key",
    "affects speed only": "channels_last torchscript synchronize_step workers pin_mem no_prefetcher "
    "use_multi_epochs_loader",
    "validation uses the training batch": "validation_batch_size",
    "torchrun sets it": "local_rank",
    "backbones have no buffers to broadcast": "no_ddp_bb",
    "AdamW has no momentum": "momentum",
    "has no effect without a refused option": "no_resume_opt lr_noise_pct lr_noise_std remode recount resplit",
    "belongs to other schedules": "lr_cycle_mul lr_cycle_decay decay_milestones decay_epochs patience_epochs "
    "decay_rate",
    "the average is always evaluated": "model_ema_force_cpu",
    "random draws do not depend on workers": "worker_seeding",
    "besides the newest, only the best checkpoint is kept": "checkpoint_retain_interval",
    "the run folder has its own": "wandb_id",
}
"""Options that change nothing that is computed here, by the reason."""

_BACKBONE = "images are read, cropped and normalised as for the backbone's published weights"
REFUSED: dict[str, tuple] = {
    "dataset_download": ("nothing is downloaded; give a folder or tar shards", False),
    "input_img_mode": ("images are RGB", None, "RGB"),
    "input_key": ("tar shards name their images by extension", None),
    "resume": ("running again on the same output resumes; student_checkpoint loads weights only", ""),
    "in_chans": ("images have 3 channels", None, 3),
    "crop_pct": (_BACKBONE, None),
    "mean": (_BACKBONE, None),
    "std": (_BACKBONE, None),
    "interpolation": (_BACKBONE, ""),
    "device": ("a run uses the GPU if there is one; CUDA_VISIBLE_DEVICES hides it", "cuda"),
    "device_modules": ("nothing is imported by name", None),
    "opt_eps": ("AdamW's epsilon is 1e-8", None, 1e-8),
    "clip_mode": ("gradients are clipped by their norm", "norm"),
    "layer_decay": ("it has no effect in the authors' script", None),
    "sched": ("the schedule is the cosine", "cosine"),
    "lr_noise": ("the schedule has no noise", None),
    "lr_cycle_limit": ("the schedule has one cycle", 1),
    "lr_k_decay": ("the cosine is the plain one", 1.0),
    "epoch_repeats": ("an epoch is one pass", 0.0),
    "start_epoch": ("a run starts at 0, or where its output ends", None),
    "warmup_prefix": ("the warm-up is part of the schedule", False),
    "cooldown_epochs": ("a run ends with its schedule", 0),
    "no_aug": ("training images are augmented", False),
    "vflip": ("there is no vertical flip", 0.0),
    "color_jitter_prob": ("every image is jittered", None),
    "grayscale_prob": ("there is no grayscale conversion", None, 0.0),
    "gaussian_blur_prob": ("there is no blur", None, 0.0),
    "aug_repeats": ("an image is seen once per epoch", 0.0),
    "aug_splits": ("batches are not split", 0),
    "reprob": ("there is no random erasing", 0.0),
    "cutmix_minmax": ("cutmix is given by its alpha", None),
    "mixup_prob": ("every batch is mixed", 1.0),
    "mixup_switch_prob": ("mixup and cutmix are equally likely", 0.5),
    "mixup_mode": ("a batch is mixed as a whole", "batch"),
    "mixup_off_epoch": ("mixing continues to the end", 0),
    "train_interpolation": ("bilinear or bicubic, at random", "random"),
    "drop": ("there is no dropout", 0.0),
    "drop_block": ("a ViT has none", None),
    "model_ema_warmup": ("the decay of the average is constant", False),
    "save_images": ("no images are saved", False),
}
"""Options with the reason, the authors' default, and other values that mean the same; any other value is refused."""

NULLABLE = ("color_jitter", "decoder_init_values", "val_split")
"""Options whose default is a value and that null switches off."""
MIM_DEFAULTS = {"student_pretrained": False, "teacher_pretrained": False}
NOT_MIM = ("freeze_student", *(name for name in OPTIONS if name.startswith("decoder_")))
"""Options that mim.py does not have."""
FINETUNE = {
    *(
        "model",
        "pretrained",
        "output_head",
        "freeze_backbone",
        "initial_checkpoint",
        "num_classes",
        "smoothing",
    ),
    *("jsd_loss", "bce_loss", "bce_sum", "bce_target_thresh", "bce_pos_weight"),
}
"""Options that only finetune.py has."""
