"""Options of the evaluation commands: checked fields, and the flags of a command line that set them."""

import argparse
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, Field, ValidationError, model_validator

from fastalign.backbones.vit import ViT
from fastalign.evaluation.heads import HEADS_FOR, IMAGE_HEADS, PATCH_HEADS
from fastalign.evaluation.results import PATCH_METRICS
from fastalign.training.build import backbone_before, named_backbone
from fastalign.utils.errors import UserError
from fastalign.utils.files import path_argument
from fastalign.utils.sections import Section, explain

Distinct = AfterValidator(lambda values: tuple(dict.fromkeys(values)))
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1), Distinct]
Count = Annotated[int, Field(ge=1)]


class Options(Section):
    """Options that are validated on construction; the UserError names the flag of an invalid one."""

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            key, text = explain(error, type(self).model_fields)
            raise UserError(text.replace(key, flag(key), 1)) from None


def flag(name: str) -> str:
    """layer_decay -> --layer-decay"""
    return "--" + name.replace("_", "-")


def evaluation_parser(
    prog: str, description: str, *models: type[Options], data: str, output: str
) -> argparse.ArgumentParser:
    """A parser with the flags of both commands (backbone, data, output), and one for each field of the options."""
    parser = argparse.ArgumentParser(prog=f"fastalign {prog}", description=description)
    add, name = parser.add_argument, "NAME_OR_RUN"
    add("--backbone", required=True, type=path_argument, metavar=name, help="timm name or run folder")
    add("--before", action="store_true", help="evaluate the backbone that the run started from too")
    add("--data", required=True, type=path_argument, metavar="DATA", help=data)
    add("--weights", type=path_argument, help="for a timm name: pretrained (default), random, or a file")
    add("--kwargs", default="{}", metavar="YAML", help="timm's arguments, as in '{img_size: 336}'")
    add("--softcap", type=float, metavar="CAP", help="for a timm name: cap of attention logits; default none")
    add("--output", type=path_argument, help=f"default {output}")
    fields = {name: field for model in models for name, field in model.model_fields.items()}
    fields.pop("recipe", None)
    for name, field in fields.items():
        kind = field.annotation
        while get_origin(kind) not in (None, Literal):  # int | None, tuple[Literal[...], ...]
            kind = get_args(kind)[0]
        if kind is bool:
            how = {"action": "store_true"}
        else:
            how = {"choices": get_args(kind)} if get_origin(kind) else {"metavar": "X"}
            how["nargs"] = "+" if get_origin(field.annotation) is tuple else None
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = (field.description or "") + ("" if default in (None, "", False) else f" (default {default})")
        parser.add_argument(flag(name), default=argparse.SUPPRESS, help=text, **how)
    return parser


def from_flags(model: type[Options], given: argparse.Namespace, **more: Any) -> Any:
    """The options given on the command line, and `more`."""
    return model(**{name: value for name, value in vars(given).items() if name in model.model_fields}, **more)


def open_backbones(given: argparse.Namespace) -> tuple[dict[str, ViT], Path | None]:
    """The backbones that these flags name ("before", and "aligned" or timm's name), and the run folder if any."""
    how = {key: getattr(given, key) for key in ("weights", "kwargs", "softcap")}
    vit, folder = named_backbone(given.backbone, **how)
    if (channels := vit.spec.channels) != 3:
        raise UserError(f"--kwargs in_chans={channels}: images have 3 channels; remove it")
    before = {"before": backbone_before(given.backbone, folder)} if given.before else {}
    return {**before, "aligned" if folder else given.backbone: vit}, folder


class Reading(Options):
    """How images are read."""

    threads: Count = 4
    """reading threads per rank, and as many for decoding"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the hardware has it"""


class PatchReading(Reading):
    """The same for a probe."""

    forward_batch: Count = 64
    """images per forward pass"""


class Recipe(Options):
    """How a head is trained; the defaults are the paper's."""

    epochs: Count = 5
    batch_size: Count = 32
    lr: float = Field(1e-3, gt=0)
    min_lr: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(500, ge=0)
    """at most a tenth of all updates"""
    weight_decay: float = Field(0.01, ge=0)
    select: Literal[PATCH_METRICS] = "macro_recall"
    """metric on val that selects the epoch; macro recall for labels without that metric"""


class Plan(Options):
    """The heads that are trained on each encoder."""

    heads: Annotated[tuple[Literal[PATCH_HEADS], ...], Distinct] = ("transformer",)
    """heads to train, see docs/probe.md"""
    labels: Annotated[tuple[Literal[tuple(HEADS_FOR)], ...], Distinct] = ("union",)
    """labels to predict, see docs/probe.md"""
    seeds: Seeds = (0,)
    """one training run per head each"""
    recipe: Recipe = Recipe()
    hidden: Count = 1024
    """width of the mlp head"""
    layers: Count = 2
    """blocks of the transformer heads"""

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        if self.recipe.min_lr > self.recipe.lr:
            raise UserError(f"--min-lr {self.recipe.min_lr:g} is above --lr {self.recipe.lr:g}: lower it")
        for head in self.heads:
            fit = [labels for labels, heads in HEADS_FOR.items() if head in heads]
            if not set(fit) & set(self.labels):
                raise UserError(f"--heads {head} needs one of --labels {' '.join(fit)}")
        for labels in self.labels:
            if not set(HEADS_FOR[labels]) & set(self.heads):
                raise UserError(f"--labels {labels} needs one of --heads {' '.join(HEADS_FOR[labels])}")
        return self


_FROZEN_LINEAR = {"epochs": 50, "lr": 1e-3, "warmup_epochs": 0, "weight_decay": 0.01}
_FROZEN = {"epochs": 20, "lr": 5e-4, "warmup_epochs": 1, "weight_decay": 0.05}
_UNFROZEN = {"epochs": 50, "lr": 3e-4, "warmup_epochs": 5, "weight_decay": 0.05, "layer_decay": 0.75}
_ON_IMAGES = ("mixup", "cutmix", "crop", "color_jitter", "randaugment", "accumulate")


class ImageOptions(Reading):
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
    """number of passes for a rank's batch (unfreeze, augment)"""
    lr: float | None = Field(None, gt=0)
    """peak learning rate of the head"""
    min_lr: float | None = Field(None, ge=0)
    """end of the cosine; default lr / 10"""
    warmup_epochs: float | None = Field(None, ge=0)
    weight_decay: float | None = Field(None, ge=0)
    layer_decay: float | None = Field(None, gt=0, le=1)
    """unfreeze: factor of the learning rate from one block to the block before it"""
    clip: float = Field(3.0, ge=0)
    """largest gradient norm; 0 = no clipping"""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    """alpha; 0 = off (unfreeze, augment)"""
    cutmix: float = Field(0.0, ge=0)
    """alpha; 0 = off (unfreeze, augment)"""
    crop: Literal["rrc", "rkrc"] = "rrc"
    color_jitter: float = Field(0.0, ge=0)
    randaugment: str = ""
    """timm's syntax, as in rand-m9-mstd0.5-inc1 (unfreeze, augment)"""
    seeds: Seeds = (0,)
    """one training run each"""
    grad_checkpointing: bool = False
    """unfreeze: less memory, more time"""

    @property
    def on_images(self) -> bool:
        """Whether images go through the backbone in every epoch."""
        return self.unfreeze or self.augment

    @model_validator(mode="after")
    def _check(self) -> "ImageOptions":
        """Refuse options that would have no effect."""
        if self.unfreeze and self.augment:
            raise UserError("--augment is for a frozen backbone; --unfreeze augments anyway: remove it")
        for names, active, remedy in (
            (("layer_decay", "grad_checkpointing"), self.unfreeze, "the backbone is frozen: add --unfreeze"),
            (_ON_IMAGES, self.on_images, "features are computed once: add --augment or --unfreeze"),
        ):
            for name in names:
                if not active and getattr(self, name) != type(self).model_fields[name].default:
                    raise UserError(f"{flag(name)} has no effect, {remedy}")
        return self

    def resolved(self) -> "ImageOptions":
        """With every default filled in."""
        defaults = _UNFROZEN if self.unfreeze else _FROZEN_LINEAR if self.head == "linear" else _FROZEN
        values = defaults | {name: value for name, value in self if value is not None}
        values.setdefault("min_lr", values["lr"] / 10)
        if values["min_lr"] > values["lr"]:
            raise UserError(f"--min-lr {values['min_lr']:g} is above --lr {values['lr']:g}: lower it")
        return ImageOptions(**values)

    def facts(self) -> dict:
        """The options that decide a seed's results, as plain values."""
        return self.model_dump(exclude={"threads", "seeds"})
