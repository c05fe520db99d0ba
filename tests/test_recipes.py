"""The recipes: each loads, says what the table of the authors' 52 recipes says, and trains a step."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastalign.backbones.zoo import create_backbone
from fastalign.config import Config, load_config
from fastalign.method.flops import flops_per_image
from fastalign.method.objectives import MaskedImageModeling, MaskEmbed
from fastalign.training.build import build_objective
from fastalign.training.optim import adamw

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
ALL = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "base")
RECIPES = {path.stem: path for path in ALL if path.stem != "demo"}

CLIP_B = "vit_base_patch16_clip_quickgelu_224.openai"
IN1K_B = "vit_base_patch16_224.augreg_in21k_ft_in1k"
LARGE = {"lr": 2e-4, "min_lr": 2e-5}
PLAIN_BLOCKS = {"softcap": None, "decoder.kwargs": {"qkv_bias": True, "qk_norm": False}}
ONE_MASK = {"masks.complement": False, "masks.full": False}
MIM = {"objective": "mim", "teacher.skip_blocks": 0}


def on_21k(name: str, *, softcap=30.0, lr=3e-4, min_lr=3e-5, accumulate=1, epochs=5, **others) -> tuple:
    """A recipe on ImageNet-21k: the data, and every key that is set."""
    return "imagenet21k", {
        "student.name": name,
        "student.softcap": softcap,
        "optim.lr": lr,
        "optim.min_lr": min_lr,
        "optim.batch_size": 1024,
        "optim.accumulate": accumulate,
        "optim.epochs": epochs,
        "optim.warmup_epochs": 0,
        "teacher.skip_blocks": 1,
        "masks.distribution": "uniform",
        "masks.ratio": None,
        "masks.complement": True,
        "masks.full": True,
        "loss.name": "mse",
        "data.crop": "rkrc",
        **others,
    }


def on_1k(name: str, *, epochs: int, warmup=1, softcap=30.0, **others) -> tuple:
    """A recipe on ImageNet-1k."""
    _, keys = on_21k(name, epochs=epochs, softcap=softcap)
    return "imagenet", {**keys, "optim.warmup_epochs": warmup, **others}


def ablation(**others) -> tuple:
    """An ablation on the supervised ViT-B: 25 epochs of ImageNet-1k, plain attention."""
    return on_1k(IN1K_B, epochs=25, softcap=None, **others)


# Written from the authors' recipes, not from ours: their svit_* student = soft-cap 30, any other = none.
AUTHORS = {
    "beit-vit-b": on_21k("beit_base_patch16_224.in22k_ft_in22k_in1k", **PLAIN_BLOCKS),
    "beitv2-vit-b": on_21k("beitv2_base_patch16_224.in1k_ft_in22k_in1k", **PLAIN_BLOCKS),
    "clip-vit-b-in1k-e10": on_1k(CLIP_B, epochs=10, softcap=None),
    "clip-vit-b-in1k-e100": on_1k(CLIP_B, epochs=100),
    "clip-vit-b-in1k-e2": on_1k(CLIP_B, epochs=2, softcap=None),
    "clip-vit-b-in1k-e25": on_1k(CLIP_B, epochs=25, softcap=None),
    "clip-vit-b-in1k-e50": on_1k(CLIP_B, epochs=50),
    "clip-vit-b-in21k-e1": on_21k(CLIP_B, epochs=1),
    "clip-vit-b-in21k-e10": on_21k(CLIP_B, epochs=10),
    "clip-vit-b-in21k-e5": on_21k(CLIP_B, epochs=5),
    "clip-vit-b-mim-aligned-mim": on_21k(CLIP_B, **{"teacher.weights": "runs/mim-clip-vit-b-mim-aligned"}),
    "clip-vit-b-mim-aligned": on_21k(CLIP_B, **{"teacher.weights": "runs/clip-vit-b-mim"}),
    "clip-vit-b-mim": on_21k(CLIP_B, **{"teacher.weights": "runs/mim-clip-vit-b"}),
    "clip-vit-b": on_21k(CLIP_B),
    "clip-vit-l-336": on_21k("vit_large_patch14_clip_quickgelu_336.openai", accumulate=8, **LARGE),
    "clip-vit-l": on_21k("vit_large_patch14_clip_quickgelu_224.openai", accumulate=2, **LARGE),
    "dfn-vit-b": on_21k("vit_base_patch16_clip_224.dfn2b"),
    "dino-vit-b": on_1k("vit_base_patch16_224.dino", epochs=50),
    "dinov2-vit-b": on_21k("vit_base_patch14_reg4_dinov2.lvd142m", **{"student.kwargs": {"img_size": 224}}),
    "eva02-vit-b": on_21k("eva02_base_patch16_clip_224.merged2b", **PLAIN_BLOCKS),
    "in1k-vit-b-autoaug": ablation(**{"data.randaugment": "rand-m9-mstd0.5-inc1"}),
    "in1k-vit-b-bernoulli25": ablation(
        **ONE_MASK, **{"masks.distribution": "bernoulli", "masks.ratio": 0.25}
    ),
    "in1k-vit-b-bernoulli50": ablation(**ONE_MASK, **{"masks.distribution": "bernoulli", "masks.ratio": 0.5}),
    "in1k-vit-b-bernoulli75": ablation(
        **ONE_MASK, **{"masks.distribution": "bernoulli", "masks.ratio": 0.75}
    ),
    "in1k-vit-b-block": ablation(**ONE_MASK, **{"masks.distribution": "blockwise", "masks.ratio": 0.4}),
    "in1k-vit-b-cls": ablation(**{"teacher.prefix_only": True, "teacher.skip_blocks": 0}),
    "in1k-vit-b-cosine": ablation(**{"loss.name": "cosine"}),
    "in1k-vit-b-cutmix": ablation(**{"data.cutmix": 1.0}),
    "in1k-vit-b-e10": on_1k(IN1K_B, epochs=10, softcap=None),
    "in1k-vit-b-e100": on_1k(IN1K_B, epochs=100),
    "in1k-vit-b-e2": on_1k(IN1K_B, epochs=2, warmup=0, softcap=None),
    "in1k-vit-b-e50": on_1k(IN1K_B, epochs=50),
    "in1k-vit-b-embed-final": ablation(**{"teacher.skip_blocks": 0}),
    "in1k-vit-b-embed": ablation(),
    "in1k-vit-b-in21k-e1": on_21k(IN1K_B, epochs=1),
    "in1k-vit-b-in21k-e10": on_21k(IN1K_B, epochs=10),
    "in1k-vit-b-in21k-e5": on_21k(IN1K_B, epochs=5),
    "in1k-vit-b-mixup": ablation(**{"data.mixup": 0.5}),
    "in1k-vit-b-uniform-antithetical": ablation(**{"masks.full": False}),
    "in1k-vit-b-uniform": ablation(**ONE_MASK),
    "in1k-vit-b": on_21k(IN1K_B),
    "in1k-vit-l": on_21k("vit_large_patch16_224.augreg_in21k_ft_in1k", accumulate=2, **LARGE),
    "in1k-vit-s": on_21k("vit_small_patch16_224.augreg_in21k_ft_in1k"),
    "in1k-vit-t": on_21k("vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
    "mae-vit-b": on_1k("vit_base_patch16_224.mae", epochs=50),
    "moco-vit-b": on_1k("vit_base_patch16_mocov3_224", epochs=50),
    "openclip-vit-b": on_21k("vit_base_patch16_clip_224.laion2b"),
    "siglip-vit-b": on_21k("vit_base_patch16_siglip_224.webli"),
    # The authors write no tag, which meant these weights then and means SigLIP 2 in today's timm.
    "siglip-vit-so400m-384": on_21k("vit_so400m_patch14_siglip_384.webli", accumulate=16, **LARGE),
    "siglip-vit-so400m": on_21k("vit_so400m_patch14_siglip_224.webli", accumulate=4, **LARGE),
    # The authors keep these two in a folder of their own, as clip-vit-b-mim-aligned and clip-vit-b.
    "mim-clip-vit-b-mim-aligned": on_21k(CLIP_B, **MIM, **{"teacher.weights": "runs/clip-vit-b-mim"}),
    "mim-clip-vit-b": on_21k(CLIP_B, **MIM),
}
OURS = {
    "mim-clip-vit-b-aligned": on_21k(CLIP_B, **MIM, **{"student.weights": "runs/clip-vit-b"}),
    "in1k-vit-b-l1": ablation(**{"loss.name": "l1"}),
    "in1k-vit-b-masked-mse": ablation(**{"loss.name": "masked_mse"}),
    "in1k-vit-b-unmasked-mse": ablation(**{"loss.name": "unmasked_mse"}),
    "clip-vit-b-mlp-head": on_21k(CLIP_B, **{"student.head": "mlp"}),
    "clip-vit-b-frozen": on_21k(CLIP_B, softcap=None, **{"student.freeze": True}),
    "clip-vit-b-decoder1": on_21k(CLIP_B, **{"decoder.layers": 1}),
    "clip-vit-b-decoder4": on_21k(CLIP_B, **{"decoder.layers": 4}),
    "clip-vit-b-no-softcap": on_21k(CLIP_B, softcap=None),
}
TABLE = AUTHORS | OURS

# The others train two blocks: with random weights, one full depth an architecture tells all.
FULL_DEPTH = {
    "beit-vit-b",
    "clip-vit-b",
    "dinov2-vit-b",
    "eva02-vit-b",
    "in1k-vit-s",
    "in1k-vit-t",
    "siglip-vit-b",
}
SLOW = {"clip-vit-l", "in1k-vit-l", "siglip-vit-so400m"}
WEIGHTS = {"student.weights", "teacher.weights"}
RANDOM = [f"{key}=random" for key in sorted(WEIGHTS)]


def header(path: Path) -> str:
    """The comment lines that a recipe begins with."""
    lines = path.read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


def command(path: Path) -> list[str]:
    """The words of the command in a recipe's header."""
    text = header(path).replace("\\\n", " ")
    return shlex.split(re.search(r"^torchrun .*$", text, re.MULTILINE).group())


def gigaflop(text: str) -> float:
    return float(re.search(r"([\d.]+) GFLOP per image", text).group(1))


def distinct() -> dict[str, list[str]]:
    """For each different model, objective and learning rate one recipe, and all that have the same."""
    groups: dict[str, list[str]] = {}
    for stem in TABLE:
        config = load_config(RECIPES[stem], RANDOM)
        kept = config.model_dump(exclude={"output": True, "data": True, "optim": {"epochs", "warmup_epochs"}})
        groups.setdefault(json.dumps(kept), []).append(stem)
    return {
        next((stem for stem in group if stem in FULL_DEPTH), group[0]): group for group in groups.values()
    }


def set_keys(keys: dict) -> Config:
    """A configuration of the defaults and these dotted keys."""
    tree = {}
    for key, value in keys.items():
        *sections, name = ["", *key.split(".")]
        (tree.setdefault(sections[1], {}) if len(sections) > 1 else tree)[name] = value
    return Config.model_validate(tree)


STEPS = distinct()


def test_the_table_has_every_recipe():
    assert len(AUTHORS) == 52
    assert set(TABLE) == set(RECIPES)
    assert len(RECIPES) == sum(path.stem != "demo" for path in ALL), "two recipes of one name"


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_loads_and_writes_to_its_own_folder(path):
    assert load_config(path).output == f"runs/{path.stem}"


@pytest.mark.parametrize("stem", TABLE)
def test_equals_the_table(stem):
    _, keys = TABLE[stem]
    assert load_config(RECIPES[stem]) == set_keys({**keys, "output": f"runs/{stem}"})


@pytest.mark.parametrize("stem", TABLE)
def test_header(stem):
    data, _ = TABLE[stem]
    path = RECIPES[stem]
    name = path.relative_to(ROOT).as_posix()
    start = ["torchrun", "--standalone", "--nproc-per-node=4", "-m", "fastalign.train", name]
    words = command(path)
    assert words[:6] == start
    assert words[6:] == [f"data.train=/path/to/{data}/train", f"data.val=/path/to/{data}/val"]
    config = load_config(path, words[6:])
    share = config.optim.batch_size // (4 * config.optim.accumulate)
    assert f"4 GPUs, {share} images per GPU" in header(path)
    assert "Time and final loss: not measured yet." in header(path)
    for other in (config.student.weights, config.teacher.weights):
        run = f"Train configs/{Path(other or '').name}.yaml first"
        assert other in ("pretrained", None) or run in header(path).replace("\n", " ")


@pytest.mark.parametrize("stem", STEPS)
def test_operations_an_image(stem):
    with torch.device("meta"):
        objective, _ = build_objective(load_config(RECIPES[stem], RANDOM))
    computed = round(flops_per_image(objective) / 1e9, 1)
    assert {same: gigaflop(header(RECIPES[same])) for same in STEPS[stem]} == dict.fromkeys(
        STEPS[stem], computed
    )


def test_documentation_lists_every_recipe():
    text = (ROOT / "docs" / "recipes.md").read_text()
    listed = {}
    for line in text.splitlines():
        if found := re.match(r"\| \[(.+?)\]\(\.\./(.+?)\) \|(.*)\|$", line):
            listed[found.group(1)] = (found.group(2), [cell.strip() for cell in found.group(3).split("|")])
    assert set(listed) == set(RECIPES)
    assert all(path.relative_to(ROOT).as_posix() in text for path in ALL)
    for stem, (file, cells) in listed.items():
        config, keys = load_config(RECIPES[stem]), TABLE[stem][1]
        optim = config.optim
        assert file == RECIPES[stem].relative_to(ROOT).as_posix()
        assert cells[:6] == [
            f"`{keys['student.name']}`",
            "IN-1k" if TABLE[stem][0] == "imagenet" else "IN-21k",
            f"{optim.epochs} ({optim.warmup_epochs:g})",
            f"{optim.batch_size} / {optim.accumulate}",
            f"{optim.lr:.0e} → {optim.min_lr:.0e}".replace("e-0", "e-"),
            "none" if config.student.softcap is None else f"{config.student.softcap:g}",
        ]
        assert cells[-1] == f"{gigaflop(header(RECIPES[stem])):.1f}"


def reduced(stem: str, *, full_depth: bool) -> list[str]:
    """Overrides for random weights and the smallest images that the masks allow."""
    config = load_config(RECIPES[stem])
    side = 3 if config.masks.distribution == "blockwise" else 2
    size = side * (14 if "patch14" in config.student.name else 16)
    return [
        *(["student.weights=random"] if config.student.weights == "pretrained" else []),
        f"student.kwargs.img_size={size}",
        *([] if full_depth else ["student.kwargs.depth=2"]),
    ]


def take_a_step(config: Config) -> MaskEmbed | MaskedImageModeling:
    """Forward, backward and AdamW; the loss is finite and the weights move."""
    objective = build_objective(config)[0].train()
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    before = [parameter.detach().norm() for parameter in trained]
    optim = config.optim
    optimizer = adamw(trained, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    loss = objective(torch.randn(2, 3, *objective.teacher.spec.image_size), torch.arange(2))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, optim.clip)
    optimizer.step()
    assert loss.isfinite()
    assert all(parameter.isfinite().all() for parameter in trained)
    # The encoder's body has no gradient yet, behind a head of zeros: weight decay moves it, but no zeros.
    moved = [bool(parameter.detach().norm() != was) for parameter, was in zip(trained, before, strict=True)]
    assert sum(moved) > len(moved) / 2
    return objective


@pytest.mark.parametrize(
    "stem", [pytest.param(stem, marks=pytest.mark.slow) if stem in SLOW else stem for stem in STEPS]
)
def test_takes_a_step(stem):
    overrides = reduced(stem, full_depth=stem in FULL_DEPTH | SLOW)
    take_a_step(load_config(RECIPES[stem], [*overrides, *RANDOM]))


@pytest.mark.parametrize("stem", [stem for stem, (_, keys) in TABLE.items() if WEIGHTS & set(keys)])
def test_starts_from_the_run_before(stem, tmp_path, monkeypatch):
    config = load_config(RECIPES[stem], reduced(stem, full_depth=False))
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
