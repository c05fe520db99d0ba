"""What can be set, with the defaults of each mode."""

import math
from dataclasses import asdict, dataclass, fields, replace

from fastalign.utils.errors import UserError

HEADS = ("linear", "attention", "transformer")
_FROZEN_LINEAR = {"epochs": 50, "lr": 1e-3, "warmup_epochs": 0, "weight_decay": 0.01}
_FROZEN = {"epochs": 20, "lr": 5e-4, "warmup_epochs": 1, "weight_decay": 0.05}
_UNFROZEN = {"epochs": 50, "lr": 3e-4, "warmup_epochs": 5, "weight_decay": 0.05, "layer_decay": 0.75}


@dataclass(frozen=True)
class Options:
    """How a classifier is trained. A None is filled in by `resolved`, by head and mode."""

    head: str = "linear"
    """linear | attention | transformer"""
    unfreeze: bool = False
    """train the backbone too, on augmented images"""
    augment: bool = False
    """frozen backbone: read new crops and flips each epoch, instead of features computed once"""
    epochs: int | None = None
    batch_size: int = 256
    """over all ranks"""
    accumulate: int = 1
    """parts that a rank's batch is computed in (unfreeze, augment)"""
    lr: float | None = None
    """of the head, at its highest"""
    min_lr: float | None = None
    """where the cosine ends; default a tenth of lr"""
    warmup_epochs: float | None = None
    weight_decay: float | None = None
    layer_decay: float | None = None
    """unfreeze: lr of the last block over the head's, of the block before it over the last block's..."""
    clip: float = 3.0
    """largest gradient norm; 0 = any"""
    label_smoothing: float = 0.0
    mixup: float = 0.0
    """alpha; 0 = off (unfreeze, augment)"""
    cutmix: float = 0.0
    """alpha; 0 = off (unfreeze, augment)"""
    crop: str = "rrc"
    """rrc | rkrc (unfreeze, augment)"""
    color_jitter: float = 0.0
    """(unfreeze, augment)"""
    randaugment: str = ""
    """timm's spelling (unfreeze, augment)"""
    seeds: tuple[int, ...] = (0,)
    precision: str = "auto"
    """auto (bf16 where the hardware has it) | bf16 | fp32"""
    threads: int = 4
    """reading threads a rank, and as many for decoding"""
    grad_checkpointing: bool = False
    """unfreeze: less memory, more time"""
    save_every: int = 0
    """updates between checkpoints, besides the one at each epoch's end (unfreeze, augment)"""
    memory_share: float = 0.25
    """share of the free memory that features may take; what needs more lies in a file"""

    @property
    def live(self) -> bool:
        """Whether images go through the backbone in every epoch."""
        return self.unfreeze or self.augment

    def resolved(self) -> "Options":
        """With every default filled in.

        Raises:
            UserError: a value out of range, or one that the chosen mode would not read; it names the flag.
        """
        self._check()
        defaults = _UNFROZEN if self.unfreeze else _FROZEN_LINEAR if self.head == "linear" else _FROZEN
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        full = replace(self, **missing)
        full = replace(full, min_lr=full.lr / 10) if full.min_lr is None else full
        if full.min_lr > full.lr:
            raise UserError(f"--min-lr {full.min_lr:g} is above --lr {full.lr:g}: lower it")
        return full

    def settings(self) -> dict:
        """Plain values that decide the figures; two settings that are equal repeat each other."""
        without = ("threads", "save_every", "memory_share", "seeds")
        return {name: value for name, value in asdict(self).items() if name not in without}

    def _check(self) -> None:
        if self.head not in HEADS:
            raise UserError(f"--head {self.head}: it must be one of {', '.join(HEADS)}")
        if self.crop not in ("rrc", "rkrc"):
            raise UserError(f"--crop {self.crop}: it must be rrc or rkrc")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise UserError(f"--precision {self.precision}: it must be auto, bf16 or fp32")
        if self.unfreeze and self.augment:
            raise UserError("--augment goes with a frozen backbone; --unfreeze augments anyway: remove it")
        self._check_modes()
        rules = (
            (("epochs", "batch_size", "accumulate", "threads"), lambda x: x >= 1, "at least 1"),
            (("lr",), lambda x: 0 < x < math.inf, "a positive number"),
            (("layer_decay",), lambda x: 0 < x <= 1, "in 0..1, 0 excluded"),
            (("label_smoothing",), lambda x: 0 <= x < 1, "in 0..1, 1 excluded"),
            (("memory_share",), lambda x: 0 <= x <= 1, "in 0..1"),
            (("min_lr", "warmup_epochs", "weight_decay", "clip"), lambda x: 0 <= x < math.inf, "0 or more"),
            (("mixup", "cutmix", "color_jitter", "save_every"), lambda x: 0 <= x < math.inf, "0 or more"),
        )
        for names, right, rule in rules:
            for name in names:
                value = getattr(self, name)
                if value is not None and not right(value):
                    raise UserError(f"{_flag(name)} {value}: it must be {rule}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(
                f"--seeds {' '.join(map(str, self.seeds))}: give different numbers, 0 or more, as in 0 1 2"
            )

    def _check_modes(self) -> None:
        """Refuse what would have no effect."""
        plain = {field.name: field.default for field in fields(self)}
        for names, present, remedy in (
            (("layer_decay", "grad_checkpointing"), self.unfreeze, "the backbone is frozen: add --unfreeze"),
            (
                ("mixup", "cutmix", "crop", "color_jitter", "randaugment", "accumulate", "save_every"),
                self.live,
                "features are computed once: add --augment or --unfreeze",
            ),
        ):
            for name in names:
                if not present and getattr(self, name) != plain[name]:
                    raise UserError(f"{_flag(name)} has no effect, {remedy}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
