"""Options of image classification, with the defaults of each mode."""

from typing import Literal

from pydantic import Field, model_validator

from fastalign.evaluation.heads import IMAGE_HEADS
from fastalign.evaluation.options import Count, Options, Precision, Seeds, flag
from fastalign.utils.errors import UserError

_FROZEN_LINEAR = {"epochs": 50, "lr": 1e-3, "warmup_epochs": 0, "weight_decay": 0.01}
_FROZEN = {"epochs": 20, "lr": 5e-4, "warmup_epochs": 1, "weight_decay": 0.05}
_UNFROZEN = {"epochs": 50, "lr": 3e-4, "warmup_epochs": 5, "weight_decay": 0.05, "layer_decay": 0.75}
_UNFREEZE_ONLY = ("layer_decay", "grad_checkpointing")
_LIVE_ONLY = ("mixup", "cutmix", "crop", "color_jitter", "randaugment", "accumulate", "save_every")


class ImageOptions(Options):
    """How a classifier is trained. `resolved` replaces None by the default of head and mode."""

    head: Literal[IMAGE_HEADS] = "linear"
    unfreeze: bool = False
    """train the backbone too, on augmented images"""
    augment: bool = False
    """frozen backbone: read new crops and flips each epoch, instead of features computed once"""
    epochs: Count | None = None
    batch_size: Count = 256
    """over all ranks"""
    accumulate: Count = 1
    """parts that a rank's batch is computed in (unfreeze, augment)"""
    lr: float | None = Field(None, gt=0)
    """peak learning rate of the head"""
    min_lr: float | None = Field(None, ge=0)
    """where the cosine ends; default lr / 10"""
    warmup_epochs: float | None = Field(None, ge=0)
    weight_decay: float | None = Field(None, ge=0)
    layer_decay: float | None = Field(None, gt=0, le=1)
    """unfreeze: factor of the learning rate from one block to the block before it"""
    clip: float = Field(3.0, ge=0)
    """largest gradient norm; 0 = any"""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    """alpha; 0 = off (unfreeze, augment)"""
    cutmix: float = Field(0.0, ge=0)
    """alpha; 0 = off (unfreeze, augment)"""
    crop: Literal["rrc", "rkrc"] = "rrc"
    """(unfreeze, augment)"""
    color_jitter: float = Field(0.0, ge=0)
    """(unfreeze, augment)"""
    randaugment: str = ""
    """timm's spelling, as in rand-m9-mstd0.5-inc1 (unfreeze, augment)"""
    seeds: Seeds = (0,)
    """one training each"""
    precision: Precision = "auto"
    """auto: bf16 where the hardware has it"""
    threads: Count = 4
    """reading threads per rank, and as many for decoding"""
    grad_checkpointing: bool = False
    """unfreeze: less memory, more time"""
    save_every: int = Field(0, ge=0)
    """updates between checkpoints, in addition to each epoch's end (unfreeze, augment)"""
    memory_share: float = Field(0.25, ge=0, le=1)
    """share of free memory that features may take; larger ones go to a file"""

    @property
    def live(self) -> bool:
        """Whether images go through the backbone in every epoch."""
        return self.unfreeze or self.augment

    @model_validator(mode="after")
    def _check(self) -> "ImageOptions":
        """Refuses what would have no effect."""
        if self.unfreeze and self.augment:
            raise UserError("--augment is for a frozen backbone; --unfreeze augments anyway: remove it")
        for names, active, remedy in (
            (_UNFREEZE_ONLY, self.unfreeze, "the backbone is frozen: add --unfreeze"),
            (_LIVE_ONLY, self.live, "features are computed once: add --augment or --unfreeze"),
        ):
            for name in names:
                if not active and getattr(self, name) != type(self).model_fields[name].default:
                    raise UserError(f"{flag(name)} has no effect, {remedy}")
        return self

    def resolved(self) -> "ImageOptions":
        """With every default filled in.

        Raises:
            UserError: min_lr is above lr.
        """
        defaults = _UNFROZEN if self.unfreeze else _FROZEN_LINEAR if self.head == "linear" else _FROZEN
        given = {name: value for name, value in self if value is not None}
        values = defaults | given
        values.setdefault("min_lr", values["lr"] / 10)
        if values["min_lr"] > values["lr"]:
            raise UserError(f"--min-lr {values['min_lr']:g} is above --lr {values['lr']:g}: lower it")
        return ImageOptions(**values)

    def settings(self) -> dict:
        """The values that decide the results; the same settings repeat them."""
        return self.model_dump(exclude={"threads", "save_every", "memory_share", "seeds"})
