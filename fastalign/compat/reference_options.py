"""The 141 options of the authors' training scripts: mapped to our keys, ignored, or refused.

docs/reference-configs.md lists them with reasons; a test compares.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StrictBool

from fastalign.config import Loss
from fastalign.method.masks import MASKS
from fastalign.utils.paths import UserPath

_LOSSES = Loss.model_fields["name"].annotation
_IN1K = "vit_base_patch16_224.augreg_in21k_ft_in1k"


class _OptKwargs(BaseModel, extra="forbid"):
    betas: list[float] | None = None


class Options(BaseModel, extra="forbid", validate_default=True, protected_namespaces=()):
    """The options that decide our keys, with the authors' defaults.

    The text in an annotation is our key for the same value; `reference_config` computes with the others.
    """

    data_dir: UserPath | None = None
    dataset: str | None = ""
    train_split: str = "train"
    val_split: str | None = "validation"
    student_model: str = _IN1K
    student_head: Annotated[Literal["linear", "mlp"], "student.head"] = "linear"
    student_pretrained: StrictBool = True
    student_checkpoint: UserPath | None = ""
    freeze_student: Annotated[StrictBool, "student.freeze"] = False
    teacher_model: str = _IN1K
    teacher_pretrained: StrictBool = True
    teacher_checkpoint: UserPath | None = ""
    skip_blocks: Annotated[int, "teacher.skip_blocks"] = 1
    prefix_only: Annotated[StrictBool, "teacher.prefix_only"] = False
    loss_function: Annotated[_LOSSES, "loss.name"] = "mse"
    decoder_layers: Annotated[int, "decoder.layers"] = 2
    decoder_width: Annotated[int | None, "decoder.kwargs.width"] = None
    decoder_num_heads: Annotated[int | None, "decoder.kwargs.heads"] = None
    decoder_qk_norm: Annotated[StrictBool | None, "decoder.kwargs.qk_norm"] = None
    decoder_qkv_bias: Annotated[StrictBool | None, "decoder.kwargs.qkv_bias"] = None
    decoder_init_values: Annotated[float | None, "decoder.kwargs.init_values"] = 1e-06
    img_size: int | None = None
    batch_size: int = 128
    grad_accum_steps: Annotated[int, "optim.accumulate"] = 1
    grad_checkpointing: Annotated[StrictBool, "efficiency.grad_checkpointing"] = False
    model_kwargs: dict = {}
    student_model_kwargs: dict = {}
    teacher_model_kwargs: dict = {}
    torchcompile: Literal["inductor"] | None = None
    amp: StrictBool = False
    amp_dtype: str = "float16"
    opt: Annotated[Literal["adamw"], "optim.name"] = "sgd"
    opt_betas: list[float] | None = None
    weight_decay: Annotated[float, "optim.weight_decay"] = 0.01
    clip_grad: Annotated[float | None, "optim.clip"] = None
    opt_kwargs: _OptKwargs = _OptKwargs()
    sched_on_updates: Literal[True] = False
    lr: float | None = None
    lr_base: float = 0.1
    lr_base_size: int = Field(256, ge=1)
    lr_base_scale: Literal["", "sqrt", "linear"] | None = ""
    warmup_lr: float = 1e-05
    min_lr: Annotated[float, "optim.min_lr"] = 0.0
    epochs: Annotated[int, "optim.epochs"] = 300
    warmup_epochs: Annotated[int, "optim.warmup_epochs"] = 5
    train_crop_mode: Literal["rrc", "rkrc"] | None = None
    scale: Annotated[list[float], "data.scale"] = [0.08, 1.0]
    ratio: Annotated[list[float], "data.ratio"] = [3 / 4, 4 / 3]
    hflip: Annotated[float, "data.hflip"] = 0.5
    color_jitter: float | None = 0.4
    aa: str | None = None
    mixup: Annotated[float, "data.mixup"] = 0.0
    cutmix: Annotated[float, "data.cutmix"] = 0.0
    drop_path: float | None = None
    model_ema: StrictBool = False
    model_ema_decay: float = 0.9998
    seed: Annotated[int, "seed"] = 42
    log_interval: Annotated[int, "log.every_steps"] = 100
    recovery_interval: int = 0
    checkpoint_hist: Annotated[int, "checkpoint.keep"] = 10
    output: UserPath | None = ""
    experiment: str | None = ""
    project: str | None = None
    log_wandb: StrictBool = False
    mask_sampling: Annotated[Literal[tuple(MASKS)], "masks.distribution"] = "uniform"
    bernoulli_mask_ratio: float = 0.5
    blockwise_mask_ratio: float = 0.4
    antithetical_sampling: Annotated[StrictBool, "masks.complement"] = True
    include_null_mask: Annotated[StrictBool, "masks.full"] = True


_FIELDS = Options.model_fields.items()
KEYS = {name: key for name, field in _FIELDS for key in field.metadata if isinstance(key, str)}
"""The options that become one of our keys as they are."""
_IGNORED = """
train_num_samples val_num_samples class_map target_key channels_last torchscript synchronize_step workers pin_mem
no_prefetcher use_multi_epochs_loader validation_batch_size local_rank no_ddp_bb momentum no_resume_opt lr_noise_pct
lr_noise_std remode recount resplit lr_cycle_mul lr_cycle_decay decay_milestones decay_epochs patience_epochs
decay_rate model_ema_force_cpu worker_seeding checkpoint_retain_interval wandb_id
"""
IGNORED = frozenset(_IGNORED.split())
"""Options that change nothing that is computed here."""
_REFUSED = {
    "input_key crop_pct mean std input_size device_modules layer_decay lr_noise start_epoch color_jitter_prob "
    "cutmix_minmax drop_block": (None,),
    "resume interpolation": ("", None),
    "dataset_download warmup_prefix no_aug model_ema_warmup save_images": (False,),
    "epoch_repeats cooldown_epochs vflip aug_repeats aug_splits reprob mixup_off_epoch drop": (0,),
    "grayscale_prob gaussian_blur_prob": (None, 0),
    "lr_cycle_limit lr_k_decay mixup_prob": (1,),
    "input_img_mode": (None, "RGB"),
    "in_chans": (None, 3),
    "device": ("cuda",),
    "opt_eps": (None, "1e-8", "1e-08", 1e-8),  # YAML 1.1 reads 1e-8 as a text
    "clip_mode": ("norm",),
    "sched": ("cosine",),
    "mixup_switch_prob": (0.5,),
    "mixup_mode": ("batch",),
    "train_interpolation": ("random",),
}
REFUSED = {name: accepted for names, accepted in _REFUSED.items() for name in names.split()}
"""Options with the authors' default and other values that mean the same; any other value is refused."""

MIM_DEFAULTS = {"student_pretrained": False, "teacher_pretrained": False, "skip_blocks": 0}
NOT_MIM = ("freeze_student", *(name for name in Options.model_fields if name.startswith("decoder_")))
"""Options that mim.py does not have."""
