"""The recipes: each loads, equals the authors' recipe or differs as listed, and trains a step."""

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastalign.backbones.zoo import create_backbone
from fastalign.config import Config, load_config
from fastalign.method.flops import flops_per_image
from fastalign.method.objectives import MaskedImageModeling, MaskEmbed
from fastalign.training.build import build_objective
from tests.reference_recipes import FILES, reference_keys

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
ALL = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "base")
RECIPES = {path.stem: path for path in ALL if path.stem != "demo"}

CLIP_B = "vit_base_patch16_clip_quickgelu_224.openai"
# Our own recipes: each is another recipe with these overrides, and with a name and an output of its own.
OURS = {
    "mim-clip-vit-b-aligned": ("mim-clip-vit-b", ["student.weights=runs/clip-vit-b"]),
    "in1k-vit-b-l1": ("in1k-vit-b-embed", ["loss.name=l1"]),
    "in1k-vit-b-masked-mse": ("in1k-vit-b-embed", ["loss.name=masked_mse"]),
    "in1k-vit-b-unmasked-mse": ("in1k-vit-b-embed", ["loss.name=unmasked_mse"]),
    "clip-vit-b-mlp-head": ("clip-vit-b", ["student.head=mlp"]),
    "clip-vit-b-frozen": ("clip-vit-b", ["student.freeze=true", "student.softcap=null"]),
    "clip-vit-b-decoder1": ("clip-vit-b", ["decoder.layers=1"]),
    "clip-vit-b-decoder4": ("clip-vit-b", ["decoder.layers=4"]),
    "clip-vit-b-no-softcap": ("clip-vit-b", ["student.softcap=null"]),
}
# For other backbones, by the recipe that has their batch and learning rate.
OTHER_BACKBONES = {
    "clip-vit-b": "siglip2-vit-b dinov3-vit-s dinov3-vit-b pe-core-vit-b metaclip-vit-b pe-spatial-vit-b radio-v3-b",
    "clip-vit-l": "dinov3-vit-l aimv2-vit-l metaclip-vit-l",
    "clip-vit-l-336": "pe-core-vit-l-336",
    "siglip-vit-so400m": "siglip2-vit-so400m",
    "siglip-vit-so400m-384": "siglip2-vit-so400m-384 internvit-300m dfn-vit-h-378",
}
for other, stems in OTHER_BACKBONES.items():
    OURS |= {
        stem: (other, [f"student.name={load_config(RECIPES[stem]).student.name}"]) for stem in stems.split()
    }
for stem in ("pe-spatial-vit-b", "radio-v3-b"):  # 512 pixels
    OURS[stem][1].append("optim.accumulate=8")
# What recipes leave at the defaults: it does not decide the result.
DEFAULTS = {"seed", "log", "checkpoint", "efficiency"}
RANDOM = ["student.weights=random", "teacher.weights=random"]


def header(stem: str) -> str:
    """The comment lines that a recipe begins with."""
    lines = RECIPES[stem].read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


def distinct() -> dict[str, list[str]]:
    """For each different model, objective and learning rate one recipe, and all that have the same."""
    groups: dict[str, list[str]] = {}
    for stem in RECIPES:
        config = load_config(RECIPES[stem], RANDOM)
        kept = config.model_dump(exclude={"output": True, "data": True, "optim": {"epochs", "warmup_epochs"}})
        groups.setdefault(json.dumps(kept), []).append(stem)
    return {group[0]: group for group in groups.values()}


STEPS = distinct()
THEIRS = {name.replace("configs-mim/", "mim-"): name for name in FILES}


def data_of(stem: str) -> str:
    stem = OURS[stem][0] if stem in OURS else stem
    return {"1k": "imagenet", "21k": "imagenet21k"}[FILES[THEIRS[stem]][1]]


def test_every_recipe_is_compared():
    assert len(FILES) == 52
    assert set(THEIRS) | set(OURS) == set(RECIPES)
    assert len(RECIPES) == sum(path.stem != "demo" for path in ALL), "two recipes of one name"


@pytest.mark.parametrize("stem", THEIRS)
def test_equals_the_authors_recipe(stem):
    ours, theirs = load_config(RECIPES[stem]), load_config(None, reference_keys(THEIRS[stem]))
    assert ours.model_dump(include=DEFAULTS) == Config().model_dump(include=DEFAULTS)
    own = {**dict.fromkeys(DEFAULTS, True), "output": True, "data": {"train", "val"}}
    assert ours.model_dump(exclude=own) == theirs.model_dump(exclude=own)


@pytest.mark.parametrize("stem", OURS)
def test_our_recipe_is_another_with_overrides(stem):
    other, overrides = OURS[stem]
    assert load_config(RECIPES[stem]) == load_config(RECIPES[other], [*overrides, f"output=runs/{stem}"])


@pytest.mark.parametrize("stem", RECIPES)
def test_header(stem):
    path, text = RECIPES[stem], header(stem)
    words = shlex.split(re.search(r"^torchrun .*$", text.replace("\\\n", " "), re.MULTILINE).group())
    name = path.relative_to(ROOT).as_posix()
    assert words[:6] == ["torchrun", "--standalone", "--nproc-per-node=4", "-m", "fastalign.train", name]
    config = load_config(path, words[6:])
    assert config.output == f"runs/{stem}"
    assert words[6:] == [f"data.{split}=/path/to/{data_of(stem)}/{split}" for split in ("train", "val")]
    share = config.optim.batch_size // (4 * config.optim.accumulate)
    assert f"4 GPUs, {share} images per GPU" in text
    assert "Time and final loss: not measured yet." in text
    for other in (config.student.weights, config.teacher.weights):
        run = f"Train configs/{Path(other or '').name}.yaml first"
        assert other in ("pretrained", None) or run in text.replace("\n", " ")


@pytest.mark.parametrize("stem", STEPS)
def test_operations_an_image(stem):
    with torch.device("meta"):
        objective, _ = build_objective(load_config(RECIPES[stem], RANDOM))
    computed = f"{flops_per_image(objective) / 1e9:.1f} GFLOP per image"
    assert all(re.search(rf"\b{re.escape(computed)}", header(same)) for same in STEPS[stem])


@pytest.mark.parametrize("stem", STEPS)
def test_image_constants_are_those_of_the_published_weights(stem):
    student = load_config(RECIPES[stem]).student
    with torch.device("meta"):
        vit = create_backbone(student.name, **student.kwargs)
    constants = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "crop_pct": 0.875}
    moco = timm.models.PretrainedCfg(input_size=(3, 224, 224), **constants)  # as its authors evaluate it
    published = timm.models.get_pretrained_cfg(student.name) or moco
    for name in ("mean", "std", "interpolation", "crop_pct"):
        wanted = getattr(published, name)
        assert vit.data[name] == (wanted if isinstance(wanted, str | float) else list(wanted))
    size = student.kwargs.get("img_size", published.input_size[1])
    assert vit.spec.image_size == (size, size)


def test_documentation_lists_every_recipe():
    """Each table's columns, and for the columns that it lacks the line "Common: ..." above it."""
    text, listed = (ROOT / "docs" / "recipes.md").read_text(), set()
    for line in text.splitlines():
        if line.startswith("Common: "):
            given = line.removeprefix("Common: ").removesuffix(".").split("; ")
            common = dict(each.split(" ", 1) for each in given)
        elif line.startswith("| recipe"):
            columns = [name.strip() for name in line.strip("| ").split("|")]
        elif found := re.match(r"\| \[(.+?)\]\(\.\./(.+?)\) \|(.*)\|$", line):
            stem, file, cells = found.groups()
            cells = dict(zip(columns[1:], (cell.strip() for cell in cells.split("|")), strict=True))
            config = load_config(RECIPES[stem])
            optim, softcap = config.optim, config.student.softcap
            assert file == RECIPES[stem].relative_to(ROOT).as_posix()
            assert optim.min_lr == pytest.approx(optim.lr / 10)
            wanted = {
                "backbone": f"`{config.student.name}`",
                "data": "IN-1k" if data_of(stem) == "imagenet" else "IN-21k",
                "epochs": f"{optim.epochs} ({optim.warmup_epochs:g})",
                "batch": str(optim.batch_size),
                "passes": str(optim.accumulate),
                "lr": f"{optim.lr:.0e}".replace("e-0", "e-"),
                "soft-cap": "none" if softcap is None else f"{softcap:g}",
            }
            cells.pop("what differs", None)
            assert {**common, **cells} == wanted, stem
            listed.add(stem)
    assert listed == set(RECIPES)
    assert all(path.relative_to(ROOT).as_posix() in text for path in ALL)


def reduced(stem: str) -> list[str]:
    """Overrides for random weights, two blocks and the smallest images that the masks allow."""
    config = load_config(RECIPES[stem])
    side = 3 if config.masks.distribution == "blockwise" else 2
    size = side * (14 if "patch14" in config.student.name else 16)
    weights = ["student.weights=random"] if config.student.weights == "pretrained" else []
    return [*weights, f"student.kwargs.img_size={size}", "student.kwargs.depth=2"]


def take_a_step(config: Config) -> MaskEmbed | MaskedImageModeling:
    """Forward, backward and AdamW; the loss is finite, the operations are those of the formula, the weights move."""
    objective = build_objective(config)[0].train()
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    before = [parameter.detach().norm() for parameter in trained]
    optim = config.optim
    options = {"lr": optim.lr, "betas": optim.betas, "weight_decay": optim.weight_decay}
    optimizer = torch.optim.AdamW(trained, fused=True, **options)
    images = torch.randn(2, 3, *objective.teacher.spec.image_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = objective(images, torch.arange(2))
        loss.backward()
    assert flops_per_image(objective) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    torch.nn.utils.clip_grad_norm_(trained, optim.clip)
    optimizer.step()
    assert loss.isfinite()
    assert all(parameter.isfinite().all() for parameter in trained)
    # The encoder's body has no gradient yet, behind a head of zeros: only weight decay moves it.
    moved = [bool(parameter.detach().norm() != was) for parameter, was in zip(trained, before, strict=True)]
    assert sum(moved) > len(moved) / 2
    return objective


@pytest.mark.parametrize("stem", STEPS)
def test_takes_a_step(stem):
    take_a_step(load_config(RECIPES[stem], [*reduced(stem), *RANDOM]))


@pytest.mark.parametrize("stem", [stem for stem in RECIPES if "Train configs/" in header(stem)])
def test_starts_from_the_run_before(stem, tmp_path, monkeypatch):
    config = load_config(RECIPES[stem], reduced(stem))
    folder = tmp_path / (config.teacher.weights or config.student.weights)
    folder.mkdir(parents=True)
    torch.manual_seed(1)  # other weights than a fresh backbone of this run's seed
    earlier = create_backbone(CLIP_B, **config.student.kwargs)
    save_file(earlier.state_dict(), folder / "backbone.safetensors")
    facts = {"name": CLIP_B, "kwargs": config.student.kwargs, "softcap": 30.0}
    (folder / "backbone.json").write_text(json.dumps(facts))
    monkeypatch.chdir(tmp_path)

    objective = take_a_step(config)

    assert objective.teacher.vit.softcap == 30.0
    first = "blocks.0.attn.qkv.weight"
    assert torch.equal(objective.teacher.vit.state_dict()[first], earlier.state_dict()[first])
    student = objective.student.encoder.state_dict()[first]
    same = torch.allclose(student, earlier.state_dict()[first], atol=1e-3)  # but for the step
    assert same == (config.student.weights != "random")
