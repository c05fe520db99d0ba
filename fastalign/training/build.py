"""From a configuration to the objects of a run."""

import re
from pathlib import Path

import torch

from fastalign.backbones.precision import FP8_CAPABILITY, compute_dtype
from fastalign.backbones.spec import check_softcap, split_svit
from fastalign.backbones.vit import ViT
from fastalign.config import Config, Teacher, load_config
from fastalign.data.loader import Loader
from fastalign.data.pipeline import BadSamples, read_quarantine
from fastalign.data.sources import Source, open_source
from fastalign.data.transforms import Transform
from fastalign.method.masks import MASKS
from fastalign.method.objectives import MaskedImageModeling, MaskEmbed
from fastalign.method.student import MaskEmbedStudent, MIMStudent
from fastalign.method.teacher import MaskedTeacher
from fastalign.ops.attention import check as check_attention
from fastalign.ops.attention import choose
from fastalign.training.distributed import World
from fastalign.utils.errors import UserError, prefixed
from fastalign.utils.sections import parse_yaml

_KEYS = {"skip_blocks": "teacher.skip_blocks", "masking": "masks.mode", "ratio": "masks.ratio"}
_KEYS |= {"decoder_width": "decoder.kwargs.width", "decoder_heads": "decoder.kwargs.heads"}  # by argument
_AUGMENT = {"crop", "scale", "ratio", "hflip", "color_jitter", "randaugment"}  # keys of `data`


def build_backbones(config: Config) -> tuple[ViT, ViT]:
    """The student's backbone and the teacher's: the same object if they do not differ."""
    student = config.student
    first, second = (student.name, student.weights, student.kwargs), teacher_of(config)
    backbone = make_backbone("student.weights", *first)
    return backbone, backbone if second == first else make_backbone("teacher.weights", *second)


def teacher_of(config: Config) -> tuple[str, str, dict]:
    """The teacher's name, weights and arguments; by default the student's."""
    student, teacher = config.student, config.teacher
    if teacher.name is None:
        return student.name, teacher.weights or student.weights, {**student.kwargs, **teacher.kwargs}
    return teacher.name, teacher.weights or "pretrained", teacher.kwargs


def make_backbone(key: str, name: str, weights: str, kwargs: dict) -> ViT:
    """A backbone by timm's name and arguments, with weights; `key` is their key or flag, for messages."""
    from fastalign.backbones.zoo import create_backbone, load_backbone  # imports timm, which takes a second

    if weights in ("pretrained", "random"):
        return create_backbone(name, pretrained=weights == "pretrained", **kwargs)
    if not Path(weights).exists():
        raise UserError(f"{key}={weights}: not found; give a file, a run folder, pretrained or random")
    if not (Path(weights) / "backbone.json").is_file() and Path(weights).suffix != ".json":
        return create_backbone(name, checkpoint=weights, **kwargs)
    name, kwargs, _ = split_svit(name, kwargs)  # the run recorded its soft-cap
    free = {key: value for key, value in kwargs.items() if key in ("drop_path_rate", "img_size")}
    vit = load_backbone(weights, **free)
    saved, used = vit.recipe["name"], vit.recipe["kwargs"]
    if saved.split(".")[0] != name.split(".")[0] or used != used | kwargs:
        raise UserError(f"{weights} has {saved} with {used}, not {name} with {kwargs}: set the same")
    return vit


def starting_backbone(config: Config) -> ViT:
    """The backbone that a run's student starts from, without the run's soft-cap."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # the same random weights as in training
        return build_backbones(config.model_copy(update={"teacher": Teacher()}))[0]


def backbone_before(place: str, folder: Path | None) -> ViT:
    """`starting_backbone` of the run given as --backbone; `folder` is the run folder, None if it is not a run."""
    recipe = (folder or Path(place)) / "config.yaml"
    if not recipe.is_file():
        raise UserError(f"--before: {recipe} is missing; use it with the folder of a run")
    return starting_backbone(load_config(recipe))


def named_backbone(
    place: str, *, weights: str | None = None, kwargs: str = "{}", softcap: float | None = None
) -> tuple[ViT, Path | None]:
    """The backbone given on a command line, and the run folder if it is a run's.

    `place`: a timm name, with `weights` and `softcap`, or the folder of a run; `kwargs`: timm's arguments in YAML.
    """
    from fastalign.backbones.zoo import load_backbone

    arguments = parse_yaml(kwargs, f"--kwargs {kwargs:.80}")
    if not isinstance(arguments, dict):
        raise UserError(f"--kwargs {kwargs}: give a mapping in YAML, as in '{{depth: 6}}'")
    path = Path(place)
    if path.exists() or "/" in place or path.suffix == ".json":
        for flag, value in (("--weights", weights), ("--softcap", softcap)):
            if value is not None:
                raise UserError(f"{flag} applies to a timm name only; the run {place} has its own: remove it")
        return load_backbone(path, **arguments), path if path.is_dir() else path.parent
    check_softcap(softcap, "--")
    torch.manual_seed(0)  # random weights are the same each time
    vit = make_backbone("--weights", place, weights or "pretrained", arguments)
    vit.softcap = softcap or vit.softcap
    return vit, None


def build_objective(config: Config) -> tuple[MaskEmbed | MaskedImageModeling, ViT]:
    """The objective, freshly initialized, and the backbone that its student started from."""
    # Random weights are the same on every rank and at every start. The decoder is seeded separately, so that its
    # weights do not depend on whether the backbone's are random or loaded.
    torch.manual_seed(config.seed)
    backbone, teacher_backbone = build_backbones(config)
    torch.manual_seed(config.seed)
    options = {"complement": config.masks.complement, "full": config.masks.full, "seed": config.seed}
    if config.masks.ratio is not None:
        options["ratio"] = config.masks.ratio
    try:
        masks = MASKS[config.masks.distribution](**options)
        teacher = MaskedTeacher(
            teacher_backbone,
            skip_blocks=config.teacher.skip_blocks,
            masking="zero" if config.objective == "mim" else config.masks.mode,
            prefix_only=config.teacher.prefix_only,
        )
        common = {"softcap": config.student.softcap, "head": config.student.head}
        common["target_dim"] = teacher_backbone.embed_dim
        if config.objective == "mim":
            student = MIMStudent.from_backbone(backbone, **common, masking=config.masks.mode)
            objective = MaskedImageModeling(teacher, student, masks, config.loss.name)
        else:
            student = MaskEmbedStudent.from_backbone(
                backbone,
                **common,
                freeze_encoder=config.student.freeze,
                prefix_only=config.teacher.prefix_only,
                decoder_layers=config.decoder.layers,
                **{f"decoder_{key}": value for key, value in config.decoder.kwargs.model_dump().items()},
            )
            objective = MaskEmbed(teacher, student, masks, config.loss.name)
    except ValueError as error:  # it names the constructor's argument
        text = re.sub(r"^\w+: ", "", str(error))
        raise UserError(re.sub(r"\w+", lambda word: _KEYS.get(word[0], word[0]), text)) from None
    student.encoder.grad_checkpointing = config.efficiency.grad_checkpointing
    return objective, backbone


def choose_attention(config: Config, objective, device: torch.device) -> str:
    """Set the objective's attention to `efficiency.attention`. Returns a line with the choice for each part."""
    wanted = config.efficiency.attention
    try:
        check_attention(wanted)
    except ValueError as error:
        raise UserError(f"efficiency.attention: {error}") from None
    cases = objective.attention_cases(device, compute_dtype(config.efficiency.precision, device))
    compiled = bool(config.efficiency.compile)
    choices = {part: choose(case._replace(compiled=compiled), wanted) for part, case in cases.items()}
    if wanted != "auto" and wanted not in {choice.backend for choice in choices.values()}:
        reason = next(iter(choices.values())).reason.partition(";")[0]
        raise UserError(f"efficiency.attention: {reason}, and no part of this run can use it; set auto")
    objective.set_attention(wanted)
    return "attention: " + ", ".join(f"{part} {choice.backend}" for part, choice in choices.items())


def teacher_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of the teacher's matrices."""
    if config.efficiency.precision != "fp8":
        return compute_dtype(config.efficiency.precision, device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"efficiency.precision=fp8: {name} lacks FP8; set efficiency.precision=bf16")
    return torch.float8_e4m3fn


def build_loaders(
    config: Config, world: World, backbone: ViT, source: Source
) -> tuple[Loader, Loader | None]:
    """The training and the validation loader; both replace or leave out bad samples."""
    data, quarantine = config.data, config.faults.quarantine
    if backbone.spec.channels != 3:
        raise UserError(
            f"student.kwargs.in_chans={backbone.spec.channels}: images have 3 channels; remove it"
        )
    mixing = {"accumulate": config.optim.accumulate, "mixup": data.mixup, "cutmix": data.cutmix}
    bad = BadSamples(read_quarantine(quarantine, source) if quarantine else ())
    train = _loader(config, world, backbone, source, data.model_dump(include=_AUGMENT), bad=bad, **mixing)
    val = evaluation_loader(config, world, backbone, data.val) if data.val is not None else None
    for key, loader in (("data.train", train), ("data.val", val)):
        if loader is not None and not world.agree(loader.source.crc_of_names()):
            raise UserError(f"{key}: the ranks see different files; give every machine the same data set")
    return train, val


def training_source(config: Config, world: World) -> Source:
    """The images of `data.train`; UserError if they do not suffice for a batch or the batch size does not divide."""
    optim, parts = config.optim, config.optim.accumulate * world.size
    if config.data.train is None:
        raise UserError("data.train is not set: give it an image folder or tar shards, data.train=PATH")
    source = open_source(config.data.train, allow_damaged=True)
    if optim.batch_size % parts or optim.batch_size > len(source):
        raise UserError(
            f"optim.batch_size={optim.batch_size}: data.train has {len(source)} images; set it to at most that, and "
            f"to a multiple of optim.accumulate x ranks = {parts}"
        )
    return source


def evaluation_loader(config: Config, world: World, backbone: ViT, path: str) -> Loader:
    """Load every image once, in order, without augmentation; bad ones are left out."""
    source = open_source(path, allow_damaged=True)
    return _loader(config, world, backbone, source, {"crop": "eval"}, train=False, bad=BadSamples())


def _loader(
    config: Config, world: World, backbone: ViT, source: Source, transform: dict, **options
) -> Loader:
    with prefixed("data."):
        transform = Transform(**transform, **image_constants(backbone))
    return Loader(
        source,
        transform,
        batch_size=config.optim.batch_size // (config.optim.accumulate * world.size),
        device=world.device,
        dtype=compute_dtype(config.efficiency.precision, world.device),
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        threads=config.data.threads,
        hw_decoder_load=config.data.hw_decoder_load,
        **options,
    )


def image_constants(backbone: ViT) -> dict:
    """Arguments of `Transform` that the backbone determines: size, mean, std, interpolation, crop_pct."""
    return {"size": backbone.spec.image_size, **backbone.data}
