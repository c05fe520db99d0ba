"""The configuration of a run: one typed tree, read from YAML and `key=value` overrides.

Each key is of one of three kinds (`engine/changes.py`), which say what a run that goes on does about a new value.
What bears no mark decides the result.

A recipe may name another file as its `base`, relative to itself; its own keys win. Every key is listed here
and nowhere else; a misspelt key or a value of the wrong type is an error that names the nearest right key.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from typing_extensions import TypedDict  # typing's own is refused by pydantic before Python 3.12

from fastalign.backbones.spec import check_svit
from fastalign.method.masks import MASKS
from fastalign.utils import sections
from fastalign.utils.changes import Kind
from fastalign.utils.paths import UserPath
from fastalign.utils.sections import Section, to_yaml
from fastalign.utils.yaml_files import read_with_bases

__all__ = ["Config", "keys", "kinds", "load_config", "resolve", "to_yaml"]

KEYS_OF_KWARGS = {"name": "name", "weights": "weights", "pretrained": "weights", "checkpoint": "weights"}
"""Arguments of a backbone that are keys of `student` and `teacher`."""


class Student(Section):
    name: str = "vit_base_patch16_224.augreg_in21k_ft_in1k"
    """timm's name of the backbone to align"""
    weights: UserPath = "pretrained"
    """where it starts: pretrained (published), random, or a PATH: weights file, Hugging Face or run folder"""
    kwargs: dict[str, Any] = Field({})
    """timm's arguments: img_size, depth, drop_path_rate..."""
    softcap: float | None = Field(30.0, gt=0)
    """cap of the attention logits; null = plain attention"""
    head: Literal["linear", "mlp"] = "linear"
    """from the backbone's width to the decoder's"""
    freeze: bool = False
    """train the decoder only"""


class Teacher(Section):
    name: str | None = None
    """timm's name; null = the student's backbone, weights and kwargs"""
    weights: UserPath | None = None
    """as student.weights; null = the student's, or pretrained where teacher.name is set"""
    kwargs: dict[str, Any] = Field({})
    """timm's arguments"""
    skip_blocks: int = Field(1, ge=0)
    """last blocks removed before the final norm is read"""
    prefix_only: bool = False
    """the target is the pooled output, one vector; needs skip_blocks: 0"""


class DecoderKwargs(TypedDict, total=False):
    """The decoder's shape, and parts of its blocks, as timm calls them."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    width: Annotated[int, Field(gt=0)] | None
    heads: Annotated[int, Field(gt=0)] | None
    qk_norm: bool | None
    qkv_bias: bool | None
    init_values: float | None


class Decoder(Section):
    layers: int = Field(2, ge=0)
    """transformer blocks"""
    kwargs: DecoderKwargs = Field({})
    """width (null: the teacher's), heads, qk_norm, qkv_bias (the student's), init_values (1e-6; null: none)"""


class Masks(Section):
    distribution: Literal[tuple(MASKS)] = "uniform"
    """how the visible patches are drawn"""
    ratio: float | None = Field(None, ge=0, le=1)
    """visible share; null = 0.5 for bernoulli, 0.4 for blockwise; uniform has none"""
    complement: bool = True
    """add each mask's complement"""
    full: bool = True
    """add the mask that hides nothing"""
    mode: Literal["zero", "drop"] = "zero"
    """zero: a hidden patch is blank; drop (ours): it leaves the sequence, which is faster, and another estimator"""


class Loss(Section):
    name: Literal["mse", "cosine", "l1", "masked_mse", "unmasked_mse"] = "mse"
    """the reconstruction loss"""
    target_scale: float | str = "auto"
    """targets are multiplied by it; auto = unit variance for mse, 1 otherwise; auto:BATCHES = over so many a rank"""

    @field_validator("target_scale")
    @classmethod
    def _number_or_auto(cls, value: float | str) -> float | str:
        try:
            return value if re.fullmatch(r"auto(:0*[1-9]\d*)?", str(value)) else _finite(value)
        except ValueError:
            raise ValueError("write a number, auto, or auto:BATCHES (of validation images, a rank)") from None


class Data(Section):
    train: UserPath | None = None
    """image folder, tar shards (folder, file or pattern), or synthetic[:COUNT]"""
    val: UserPath | None = None
    """the same for validation; null = none"""
    crop: Literal["rkrc", "rrc"] = "rkrc"
    """resize-keep-ratio with centre crop, or random resized crop"""
    scale: tuple[float, float] = (0.08, 1.0)
    """area of the zoom"""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """aspect change"""
    hflip: float = Field(0.5, ge=0, le=1)
    """probability of a horizontal flip"""
    color_jitter: float = Field(0.0, ge=0)
    """strength of brightness, contrast and saturation jitter"""
    randaugment: str = ""
    """timm's spelling: rand-m9-mstd0.5-inc1; empty = none"""
    mixup: float = Field(0.0, ge=0)
    """alpha; 0 = off"""
    cutmix: float = Field(0.0, ge=0)
    """alpha; 0 = off"""
    threads: Annotated[int, Kind.FREE] = Field(4, gt=0)
    """reading and decoding threads a rank"""
    hw_decoder_load: Annotated[float, Kind.FREE] = Field(0.9, ge=0, le=1)
    """share of JPEGs for the GPU's decoding engine, where it has one"""


class Optim(Section):
    name: Literal["adamw", "apex_adam", "apex_lamb"] = "adamw"
    """adamw: torch's, fused; apex_adam: the same by NVIDIA's apex, torch's without it; apex_lamb: LAMB by apex"""
    batch_size: int = Field(1024, gt=0)
    """images an update, over all ranks and accumulation steps"""
    accumulate: Annotated[int, Kind.FREE] = Field(1, gt=0)
    """forward and backward passes an update"""
    epochs: int = Field(5, gt=0)
    """passes over the data; the schedule's length"""
    lr: float = Field(3e-4, gt=0)
    """peak learning rate"""
    min_lr: float | None = Field(None, ge=0)
    """at the end, and where the warm-up starts; null = lr / 10"""
    warmup_epochs: float = Field(0.0, ge=0)
    """linear warm-up"""
    weight_decay: float = Field(0.01, ge=0)
    """decoupled, on all parameters"""
    betas: tuple[float, float] = (0.9, 0.95)
    """of the moments"""
    clip: float | None = Field(1.0, gt=0)
    """largest norm of the gradient; null = no clipping"""
    ema: float | None = Field(None, gt=0, lt=1)
    """decay of the moving average of the weights; null = none"""


class Checkpoint(Section):
    kind: ClassVar[Kind] = Kind.FREE
    every_steps: int | None = Field(None, gt=0)
    """also at the end of each epoch; null = within an epoch after 15 minutes without one"""
    keep: int = Field(2, gt=0)
    """newest ones kept, beside the best"""


class Probe(Section):
    data: UserPath | None = None
    """labelled data (docs/probe.md): its train split teaches a probe's head, its val split judges; null = no probe"""
    every_steps: int | None = Field(None, gt=0)
    """null = each epoch; in both cases also before the first step and after the last"""
    best: bool = False
    """best.pt and the backbone are those of the best probe (by mAP), not of the lowest validation loss"""


class FaultRules(TypedDict, total=False):
    """What a run does about what breaks; docs/reliability.md explains each."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    bad_samples: Annotated[float, Field(ge=0, le=1)]
    quarantine: UserPath | None
    nonfinite: Literal["skip", "stop"]
    timeout: Annotated[float, Field(gt=0)]


FAULT_RULES: FaultRules = {"bad_samples": 0.01, "quarantine": None, "nonfinite": "skip", "timeout": 600.0}


class Log(Section):
    kind: ClassVar[Kind] = Kind.FREE
    every_steps: int = Field(20, gt=0)
    """metrics are fetched from the device, written and shown"""
    to: list[str] = Field([])
    """besides metrics.jsonl: tensorboard (events in the run folder), wandb:PROJECT (Weights & Biases)"""


class Efficiency(Section):
    """Nothing here changes the loss beyond rounding, which is coarsest in fp8 (docs/precision.md)."""

    kind: ClassVar[Kind] = Kind.FREE
    precision: Annotated[Literal["auto", "bf16", "fp32", "fp8"], Kind.RESULT] = "auto"
    """bf16 autocast, weights fp32; fp8 = bf16, the teacher's products in FP8; auto = bf16 if the hardware has it"""
    compile: bool | Literal["blocks"] = False
    """torch.compile the student and the teacher; blocks = block by block, which starts sooner"""
    grad_checkpointing: bool = False
    """recompute the student's blocks in the backward pass"""
    shard: bool = False
    """FSDP: each rank keeps a part of the student's weights and of the optimiser's state; the same checkpoints"""
    attention: str = "auto"
    """auto = the fastest that was measured on this GPU; or a name that python -m fastalign.doctor lists"""


class Config(Section):
    output: Annotated[UserPath, Kind.FREE] = "runs/default"
    """the run folder; running again on it resumes"""
    resume: Annotated[Literal["auto", "force"], Kind.FREE] = "auto"
    """force: go on from a checkpoint of other settings; changes.jsonl in the run folder records what changed"""
    seed: int = Field(0, ge=0, lt=2**63)
    """of weights, data order, augmentation and masks"""
    max_steps: Annotated[int | None, Kind.GROWS] = Field(None, gt=0)
    """stop after this many updates; the schedule stays that of optim.epochs"""
    objective: Literal["maskembed", "mim"] = "maskembed"
    """MaskEmbed, or masked image modeling"""
    student: Student = Student()
    teacher: Teacher = Teacher()
    decoder: Decoder = Decoder()
    masks: Masks = Masks()
    loss: Loss = Loss()
    data: Data = Data()
    optim: Optim = Optim()
    checkpoint: Checkpoint = Checkpoint()
    probe: Probe = Probe()
    log: Log = Log()
    faults: Annotated[FaultRules, Kind.FREE] = FAULT_RULES
    """bad_samples (largest share), quarantine (fastalign.scan's list), nonfinite (skip or stop), timeout (seconds)"""
    efficiency: Efficiency = Efficiency()

    @field_validator("faults")
    @classmethod
    def _rules(cls, value: FaultRules) -> FaultRules:
        return {**FAULT_RULES, **value}

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        if self.optim.batch_size % self.optim.accumulate:
            raise ValueError(f"optim.batch_size {self.optim.batch_size} is no multiple of optim.accumulate")
        if not all(0 <= beta < 1 for beta in self.optim.betas):
            raise ValueError(f"optim.betas must lie in 0..1, 1 excluded, got {list(self.optim.betas)}")
        student, teacher = self.student, self.teacher
        for name, kwargs in (("student", student.kwargs), ("teacher", teacher.kwargs)):
            for own, key in KEYS_OF_KWARGS.items():
                if own in kwargs:
                    raise ValueError(f"{name}.kwargs.{own}: write {name}.{key} instead")
        check_svit(student.name, student.kwargs, teacher.name, teacher.kwargs)
        if self.optim.warmup_epochs > self.optim.epochs:
            raise ValueError("optim.warmup_epochs must not exceed optim.epochs")
        if self.teacher.prefix_only and self.teacher.skip_blocks:
            raise ValueError("teacher.prefix_only reads the whole model: set teacher.skip_blocks=0")
        if self.masks.distribution == "uniform" and self.masks.ratio is not None:
            raise ValueError("masks.ratio means nothing for uniform masks: remove it")
        for sink in self.log.to:
            if sink != "tensorboard" and not sink.startswith("wandb:"):
                raise ValueError(f"log.to: {sink!r} is neither tensorboard nor wandb:PROJECT")
        if self.masks.mode == "drop" and self.teacher.prefix_only:
            raise ValueError("teacher.prefix_only goes with masks.mode=zero only")
        if self.objective == "mim" and (self.teacher.prefix_only or self.student.freeze):
            raise ValueError("objective mim goes with neither teacher.prefix_only nor student.freeze")
        if self.probe.data is None and self.probe.best:
            raise ValueError("probe.best needs a probe: set probe.data, or probe.best=false")
        if self.probe.data is not None and student.freeze:
            raise ValueError(
                "student.freeze leaves nothing to probe, the backbone stays as it is: remove probe.data"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe and apply overrides.

    Args:
        path: a YAML file.
        overrides: "section.key=value" each, the value in YAML's spelling.

    Raises:
        UserError: no such file, broken YAML, unknown key, wrong type, impossible combination.
    """
    return resolve(read_with_bases(Path(path)), overrides or [], path)


def resolve(tree: dict, overrides: list[str], where: str | Path) -> Config:
    """The configuration of a tree with overrides; `where` is the tree's file, for errors."""
    return sections.resolve(Config, tree, overrides, where)


def keys() -> dict[str, str]:
    """Every key, dotted, with its documentation."""
    return {key: field.description or "" for key, field, _ in sections.fields(Config)}


def kinds() -> dict[str, Kind]:
    """Every key, dotted, with what it is to a run that goes on."""
    return {key: kind for key, _, kind in sections.fields(Config)}


def _finite(value: float | str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number
