"""The configuration of a run: one typed tree, read from YAML and `key=value` overrides.

Every key is here, with its documentation and its kind (`utils/sections.py`): whether it may change when a run
resumes. A recipe may name another file as its `base`, relative to itself; the recipe's own keys take precedence.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from fastalign.backbones.spec import AUTHORS_SOFTCAP
from fastalign.method.masks import MASKS
from fastalign.utils import sections
from fastalign.utils.errors import UserError, unknown
from fastalign.utils.files import UserPath
from fastalign.utils.sections import Kind, Section, read_yaml, to_yaml

__all__ = ["Config", "kinds", "load_config", "recipes", "resolve", "to_yaml"]


class Student(Section):
    name: str = "vit_base_patch16_224.augreg_in21k_ft_in1k"
    """timm's name of the backbone to align"""
    weights: UserPath = "pretrained"
    """pretrained (published), random, or a PATH: weights file, Hugging Face or run folder"""
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
    """as student.weights; null = the student's, or pretrained if teacher.name is set"""
    kwargs: dict[str, Any] = Field({})
    """timm's arguments"""
    skip_blocks: int = Field(1, ge=0)
    """number of last blocks removed before the final norm"""
    prefix_only: bool = False
    """the target is the pooled output, one vector; needs skip_blocks: 0"""


class DecoderKwargs(Section):
    """Parts of the decoder's blocks."""

    width: int | None = Field(None, gt=0)
    """null = the teacher's"""
    heads: int | None = Field(None, gt=0)
    """null = the student's"""
    qk_norm: bool | None = None
    """null = as the student"""
    qkv_bias: bool | None = None
    """null = as the student"""
    init_values: float | None = 1e-6
    """LayerScale at the start; null = none"""


class Decoder(Section):
    layers: int = Field(2, ge=0)
    """transformer blocks"""
    kwargs: DecoderKwargs = DecoderKwargs()


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
    """zero: a hidden patch is blank; drop (ours): it leaves the sequence, a faster and different estimator"""


class Loss(Section):
    name: Literal["mse", "cosine", "l1", "masked_mse", "unmasked_mse"] = "mse"
    """the reconstruction loss"""
    target_scale: float | Annotated[str, Field(pattern=r"^auto(:0*[1-9]\d*)?$")] = "auto"
    """factor of the targets; auto = unit variance for mse, else 1; auto:BATCHES = measured on that many per rank"""


class Data(Section):
    train: UserPath | None = None
    """image folder, tar shards (folder, file or pattern), or synthetic[:COUNT]"""
    val: UserPath | None = None
    """as data.train, for validation; null = none"""
    crop: Literal["rkrc", "rrc"] = "rkrc"
    """resize-keep-ratio with centre crop, or random resized crop"""
    scale: tuple[float, float] = (0.08, 1.0)
    """range of the area kept, as a share of the image's"""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """range of the change of aspect ratio"""
    hflip: float = Field(0.5, ge=0, le=1)
    """probability of a horizontal flip"""
    color_jitter: float = Field(0.0, ge=0)
    """strength of brightness, contrast and saturation jitter"""
    randaugment: str = ""
    """timm's syntax: rand-m9-mstd0.5-inc1; empty = none"""
    mixup: float = Field(0.0, ge=0)
    """alpha; 0 = off"""
    cutmix: float = Field(0.0, ge=0)
    """alpha; 0 = off"""
    threads: Annotated[int, Kind.FREE] = Field(4, gt=0)
    """reading and decoding threads per rank"""
    hw_decoder_load: Annotated[float, Kind.FREE] = Field(0.9, ge=0, le=1)
    """share of JPEGs decoded by the GPU's decoding engine"""


class Optim(Section):
    """AdamW, fused."""

    batch_size: int = Field(1024, gt=0)
    """images per update, over all ranks and accumulation steps"""
    accumulate: Annotated[int, Kind.FREE] = Field(1, gt=0)
    """forward and backward passes per update"""
    micro_batch: Annotated[Annotated[int, Field(gt=0)] | Literal["auto"] | None, Kind.FREE] = None
    """images per rank and pass, instead of optim.accumulate; auto = as many as fit in the GPU's memory"""
    epochs: int = Field(5, gt=0)
    """passes over the data; length of the schedule"""
    lr: float = Field(3e-4, gt=0)
    """peak learning rate"""
    min_lr: float | None = Field(None, ge=0)
    """rate at the end, and at the start of the warm-up; null = lr / 10"""
    warmup_epochs: float = Field(0.0, ge=0)
    """epochs of linear warm-up"""
    weight_decay: float = Field(0.01, ge=0)
    """decoupled, on all parameters"""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """decay of the moments"""
    clip: float | None = Field(1.0, gt=0)
    """largest norm of the gradient; null = no clipping"""
    ema: float | None = Field(None, gt=0, lt=1)
    """decay of the moving average of the weights; null = none"""


class Checkpoint(Section):
    kind: ClassVar[Kind] = Kind.FREE
    every_steps: int | None = Field(None, gt=0)
    """in addition to the end of each epoch; null = 15 minutes after the last save"""
    keep: int = Field(2, gt=0)
    """number of newest checkpoints kept, in addition to the best"""


class Probe(Section):
    data: UserPath | None = None
    """labelled data (docs/probe.md): a head is trained on its train split, tested on its val split; null = none"""
    every_steps: int | None = Field(None, gt=0)
    """null = each epoch; always before the first step and after the last"""
    best: bool = False
    """select best.pt and the backbone by the best probe (mAP), not by the lowest validation loss"""


class Faults(Section):
    """docs/reliability.md explains each."""

    kind: ClassVar[Kind] = Kind.FREE
    bad_samples: float = Field(0.01, ge=0, le=1)
    """largest share of bad samples among the images drawn"""
    quarantine: UserPath | None = None
    """fastalign.scan's list of samples to leave out"""
    nonfinite: Literal["skip", "stop"] = "skip"
    """what to do when the loss or the gradient is not finite: skip the update, or stop"""
    timeout: float = Field(600.0, gt=0)
    """seconds without progress after which a rank counts as hung"""


class Export(Section):
    kind: ClassVar[Kind] = Kind.FREE
    to: list[str] = Field([])
    """targets of `fastalign export` that are written when the run ends: timm, hf-clip, onnx..."""


class Log(Section):
    kind: ClassVar[Kind] = Kind.FREE
    every_steps: int = Field(20, gt=0)
    """steps between two fetches of metrics from the device"""
    to: list[Annotated[str, Field(pattern="^(tensorboard|wandb:.+)$")]] = Field([])
    """in addition to metrics.jsonl: tensorboard (events in the run folder), wandb:PROJECT (Weights & Biases)"""


class Efficiency(Section):
    """Nothing here changes the loss beyond rounding, coarsest in fp8 (docs/precision.md)."""

    kind: ClassVar[Kind] = Kind.FREE
    precision: Annotated[Literal["auto", "bf16", "fp32", "fp8"], Kind.RESULT] = "auto"
    """bf16: autocast, fp32 weights; fp8: bf16, the teacher's matrix products in FP8; auto: bf16 if supported"""
    compile: bool | Literal["blocks"] = False
    """torch.compile the student and the teacher; blocks = block by block, which starts sooner"""
    grad_checkpointing: bool = False
    """recompute the student's blocks in the backward pass"""
    attention: str = "auto"
    """auto = the fastest measured on this GPU; or a name that fastalign doctor lists"""


class Config(Section):
    output: Annotated[UserPath, Kind.FREE] = "runs/default"
    """the run folder; running again on the same folder resumes"""
    resume: Annotated[Literal["auto", "force"], Kind.FREE] = "auto"
    """force: resume from a checkpoint with other settings; changes.jsonl in the run folder records them"""
    seed: int = Field(0, ge=0, lt=2**63)
    """of random weights, data order, augmentation and masks"""
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
    export: Export = Export()
    log: Log = Log()
    faults: Faults = Faults()
    efficiency: Efficiency = Efficiency()

    @model_validator(mode="after")
    def _check_combinations(self) -> "Config":
        student, teacher, optim, masks = self.student, self.teacher, self.optim, self.masks
        for name, kwargs in (("student", student.kwargs), ("teacher", teacher.kwargs)):
            for key in kwargs:
                if key in ("name", "weights", "pretrained", "checkpoint"):
                    raise ValueError(f"{name}.kwargs.{key}: write {name}.name and {name}.weights instead")
                if not key.isidentifier():
                    raise ValueError(
                        f"{name}.kwargs: {key!r} is not a name; write {{depth: 6}}, with a space"
                    )
        plain = f"{student.name[1:]} and student.softcap={AUTHORS_SOFTCAP:g}"
        prefix, freeze, mim = teacher.prefix_only, student.freeze, self.objective == "mim"
        size, uniform = optim.batch_size, masks.distribution == "uniform"
        broken = {
            f"student.name={student.name}: write {plain}": student.name.startswith("svit_"),
            f"optim.batch_size {size} is not a multiple of optim.accumulate": size % optim.accumulate,
            "optim.warmup_epochs must not exceed optim.epochs": optim.warmup_epochs > optim.epochs,
            "teacher.prefix_only requires teacher.skip_blocks=0": prefix and teacher.skip_blocks,
            "teacher.prefix_only requires masks.mode=zero": prefix and masks.mode == "drop",
            "masks.ratio does not apply to uniform masks: remove it": uniform and masks.ratio is not None,
            "objective=mim is incompatible with teacher.prefix_only: remove one": mim and prefix,
            "objective=mim is incompatible with student.freeze: remove one": mim and freeze,
            "probe.best needs a probe: set probe.data": self.probe.best and self.probe.data is None,
            "probe.data is incompatible with student.freeze: remove one": freeze and self.probe.data,
            "export.to is incompatible with student.freeze: remove one": freeze and self.export.to,
        }
        for text, is_broken in broken.items():
            if is_broken:
                raise ValueError(text)
        return self


def load_config(recipe: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Load a published recipe by its name (`recipes`), a file, or the defaults (None), with overrides applied.

    Overrides are "section.key=value", with values in YAML. UserError: an unknown recipe or key, a wrong value.
    """
    if recipe is None:
        return resolve({}, overrides or [], "command line")
    path = Path(recipe)
    if not (path.suffix or len(path.parts) > 1 or path.is_file()):
        if path.name not in (known := recipes()):
            raise UserError(f"{unknown('recipe', path.name, known)} (`fastalign recipes` lists them)")
        path = known[path.name]
    return resolve(read_yaml(path), overrides or [], path)


def recipes() -> dict[str, Path]:
    """The files of the published recipes by name, in alphabetical order, without the base files."""
    files = Path(__file__).with_name("configs").rglob("*.yaml")
    return {path.stem: path for path in sorted(files) if path.parent.name != "base"}


resolve = partial(sections.resolve, Config)  # from a tree of plain values and overrides to the configuration


def kinds() -> dict[str, Kind]:
    """Every dotted key with its kind."""
    return {key: kind for key, _, kind in sections.fields(Config)}
