"""The 141 options of the authors' training scripts: mapped to our keys, ignored, or refused.

docs/reference-configs.md lists them; a test compares.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from fastalign.utils.paths import UserPath

_IN1K = "vit_base_patch16_224.augreg_in21k_ft_in1k"


class Options(BaseModel):
    """The options that decide our keys, with the authors' defaults.

    The text in an annotation is our key for the same value; `reference_config` computes with the others.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

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
    loss_function: Annotated[Literal["mse", "cosine", "l1", "masked_mse", "unmasked_mse"], "loss.name"] = (
        "mse"
    )
    decoder_layers: Annotated[int, "decoder.layers"] = 2
    decoder_width: Annotated[int | None, "decoder.kwargs.width"] = None
    decoder_num_heads: Annotated[int | None, "decoder.kwargs.heads"] = None
    decoder_qk_norm: Annotated[StrictBool | None, "decoder.kwargs.qk_norm"] = None
    decoder_qkv_bias: Annotated[StrictBool | None, "decoder.kwargs.qkv_bias"] = None
    decoder_init_values: Annotated[float | None, "decoder.kwargs.init_values"] = 1e-06
    img_size: int | None = None
    input_size: list[float] | None = None
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
    opt_kwargs: dict = {}
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
    aa: str | None = Field(None, pattern="^rand")
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
    mask_sampling: Annotated[Literal["uniform", "bernoulli", "blockwise"], "masks.distribution"] = "uniform"
    bernoulli_mask_ratio: float = 0.5
    blockwise_mask_ratio: float = 0.4
    antithetical_sampling: Annotated[StrictBool, "masks.complement"] = True
    include_null_mask: Annotated[StrictBool, "masks.full"] = True


KEYS = {
    name: key
    for name, field in Options.model_fields.items()
    for key in field.metadata
    if isinstance(key, str)
}
"""The options that become one of our keys as they are."""
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

MIM_DEFAULTS = {"student_pretrained": False, "teacher_pretrained": False, "skip_blocks": 0}
NOT_MIM = ("freeze_student", *(name for name in Options.model_fields if name.startswith("decoder_")))
"""Options that mim.py does not have."""
