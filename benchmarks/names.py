"""Every vision transformer of timm, equal to timm's or refused: ``python -m benchmarks.names [--write]``.

Each name at one block, narrow where timm allows it, on an image of 2 x 3 patches, in fp32 with every weight moved:
tokens, pooled output and every gradient. Names whose models differ in width, depth, image size and weights only are
computed once. ``--write`` puts the table into docs/backbones.md.
"""

import argparse
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn

from benchmarks import record
from benchmarks.parity import compare
from fastalign.backbones.describe import from_timm
from fastalign.backbones.zoo import create_backbone
from fastalign.utils.errors import UserError

PAGE = record.ROOT / "docs/backbones.md"
PLAIN = ("vision_transformer", "naflexvit", "beit", "eva", "deit")
OTHER = ("vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam", "vitamin")
"""timm's modules of plain vision transformers, and of those with a convolutional stem or windows."""
FAMILIES = {
    "DINOv3, LingBot": r"dinov3|lingbot",
    "Perception Encoder": r"^vit_pe_",
    "AIMv2": r"^aimv2",
    "InternViT": r"intern",
    "rotary ViT": r"_rope_",
    "Sapiens2": r"sapiens2",
    "RADIO": r"radio",
    "NaFlexViT": r"^naflexvit",
    "DINOv2, TIPSv2": r"dinov2|tips",
    "SigLIP": r"siglip",
    "EVA02": r"^eva02",
    "CLIP": r"clip",
    "BEiT, BEiT3, EVA": r"^beit|^eva",
    "DeiT": r"^deit",
}
"""The first that matches; other names are "ViT"."""
ABOVE_1B = re.compile(r"giant|gigantic|enormous|_\d+b_")
NARROW = ({"depth": 1, "embed_dim": 96, "num_heads": 2}, {"depth": 1}, {})
_SIZES = re.compile("size|grid|shape|patches|_traits|_model_args|pretrained|default_cfg|feature_info")


class Result(NamedTuple):
    """What became of a name."""

    name: str
    family: str
    reason: str | None = None
    """why it is refused"""
    errors: dict[str, float] | None = None
    """relative to timm: tokens, pooled, gradient"""

    @property
    def counted(self) -> bool:
        """Whether it is a plain ViT of at most a billion parameters; timm's models for its own tests are not."""
        return self.family != "other" and not ABOVE_1B.search(self.name) and not self.name.startswith("test_")


def names() -> list[tuple[str, str]]:
    """Every name with its family."""
    plain = [name for module in PLAIN for name in timm.list_models(module=module)]
    families = [next((f for f, mark in FAMILIES.items() if re.search(mark, name)), "ViT") for name in plain]
    other = [(name, "other") for module in OTHER for name in timm.list_models(module=module)]
    return [*zip(plain, families, strict=True), *other]


def survey() -> Iterator[Result]:
    """Try every name."""
    computed: dict[str, dict[str, float]] = {}
    for name, family in names():
        model, kwargs = build(name)
        try:
            spec = from_timm(model).spec
        except UserError:
            yield Result(name, family, refusal(name, kwargs))
            continue
        if (key := architecture(model)) not in computed:
            rows, columns = spec.patch_size
            computed[key] = errors(name, {**kwargs, "img_size": (2 * rows, 3 * columns)})
        yield Result(name, family, errors=computed[key])


def build(name: str) -> tuple[nn.Module, dict]:
    """timm's model without memory for its weights, and its arguments."""
    for kwargs in NARROW:
        try:
            with torch.device("meta"):
                return timm.create_model(name, num_classes=0, **kwargs), {"num_classes": 0, **kwargs}
        except (TypeError, ValueError, AssertionError):
            continue
    raise AssertionError(f"timm cannot build {name}")


def refusal(name: str, kwargs: dict) -> str:
    """Why a name is refused: the part of the message, which is one line, that names the unsupported parts."""
    try:
        create_backbone(name, **kwargs)
    except UserError as error:
        if found := re.fullmatch(f"backbone {name}: (.+) is not supported: (?:choose|give) .+", str(error)):
            return found[1]
        raise
    raise AssertionError(f"{name} is taken, but from_timm refuses it")


def architecture(model: nn.Module) -> str:
    """Everything that modules say of themselves and every shape, but for image sizes."""
    parts = []
    for path, part in model.named_modules():
        facts = {k: v for k, v in vars(part).items() if _simple(v) and not _SIZES.search(k)}
        parts.append((path, type(part).__name__, sorted(facts.items())))
    tables = re.compile("pos_embed|relative_position")
    return str((parts, [(k, v.shape) for k, v in model.state_dict().items() if not tables.search(k)]))


def _simple(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_simple, value))
    return value is None or isinstance(value, (int, float, str))


def errors(name: str, kwargs: dict) -> dict[str, float]:
    """Of our backbone with the weights of a file that timm's model was saved to."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, **kwargs)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        torch.save(theirs.state_dict(), Path(folder) / "weights.pth")
        ours = create_backbone(name, checkpoint=Path(folder) / "weights.pth", **kwargs)
    return compare(theirs, ours, images=2)


def table(results: list[Result]) -> str:
    """A row for each family, in Markdown."""
    families = defaultdict(list)
    for result in results:
        families[result.family].append(result)
    rows = []
    for family in [*FAMILIES, "ViT", "other"]:
        taken = [result.errors for result in families[family] if result.errors]
        worst = max((error for errors in taken for error in errors.values()), default=None)
        worst = "-" if worst is None else f"{worst:.0e}".replace("0e+00", "0")
        refused = defaultdict(list)
        for result in families[family]:
            if result.reason:
                refused[result.reason.split(",")[0].replace(" with", ":")].append(f"`{result.name}`")
        why = "; ".join(f"{reason} ({_list(names)})" for reason, names in refused.items()) or "-"
        rows.append([family, str(len(families[family])), str(len(taken)), worst, why])
    return record.markdown("| family | names | equal | difference | refused |", rows)


def _list(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 5 else f"{len(names)} names, as {names[0]}"


def summary(results: list[Result]) -> str:
    """The counts in two sentences."""
    counted = [result for result in results if result.counted]
    equal, counted_equal = (sum(bool(result.errors) for result in part) for part in (results, counted))
    return (
        f"Of timm's {len(results)} vision transformers, {equal} equal timm's and {len(results) - equal} are refused. "
        f"Of the {len(counted)} plain ones with at most a billion parameters, {counted_equal} are equal."
    )


def main(write: bool) -> None:
    """Try, print, write."""
    results = []
    for result in survey():
        found = result.reason or "  ".join(f"{part} {error:.1e}" for part, error in result.errors.items())
        print(f"{result.name:44} {found}", flush=True)
        results.append(result)
    print(summary(results), table(results), sep="\n\n")
    if write:
        page, mark = PAGE.read_text(), re.compile(r"Of timm's \d+\s+vision[^.]+\.[^.]+\.")
        PAGE.write_text(mark.sub(summary(results), page))
        record.replace_table(PAGE, table(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.names", description=__doc__)
    parser.add_argument("--write", action="store_true", help="the table of docs/backbones.md")
    main(parser.parse_args().write)
