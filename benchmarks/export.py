"""Errors of exported backbones relative to ours: ``python -m benchmarks.export [--tiny]``.

fp32, random weights (every parameter perturbed), native image size and width, two blocks, with the soft-cap of 30
and without, in batches of 1 and 3 images. Each export is loaded by the lines of its own model card, in a process that
cannot import fastalign; in one that can where the card imports it, for timm with a cap. Writes
`benchmarks/results/export.json` and the table of `docs/export.md`.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import record
from fastalign.backbones.weight_files import save_backbone
from fastalign.backbones.zoo import create_backbone
from fastalign.export import export
from fastalign.export.measure import noise, token_error
from fastalign.export.run import read_run
from fastalign.export.targets import TARGETS
from fastalign.method.student import student_encoder

BACKBONES = [
    "vit_base_patch16_clip_quickgelu_224.openai",
    "vit_base_patch16_clip_224.laion2b",
    "vit_base_patch16_siglip_224.webli",
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch14_dinov2.lvd142m",
    "vit_base_patch16_dinov3.lvd1689m",
    "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "beit_base_patch16_224.in22k_ft_in22k",
    "eva02_base_patch16_clip_224.merged2b",
]
TINY = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}
TABLE = record.ROOT / "docs" / "export.md"


def make_run(folder: Path, name: str, **kwargs) -> None:
    """The folder of a student with a cap of 30 and random weights. `kwargs` are timm's."""
    torch.manual_seed(0)
    encoder = student_encoder(create_backbone(name, **kwargs), out=1)
    with torch.no_grad():
        for parameter in encoder.parameters():  # tokens and positions as large as patch embeddings
            parameter.add_((1 if parameter.ndim == 3 else 0.02) * torch.randn_like(parameter))
    save_backbone(encoder, folder)


RUN_CARDS = """
import sys
import torch

torch.set_grad_enabled(False)
jobs = torch.load(sys.argv[1])
sys.modules.update(dict.fromkeys(sys.argv[2:]))  # importing these is an error
for name, (code, images) in jobs.items():
    found = []
    for batch in images.split([1, len(images) - 1]):
        names = {"images": batch}
        exec(code, names)
        found.append(torch.as_tensor(names["tokens"]))
    jobs[name] = torch.cat(found)
torch.save(jobs, sys.argv[1])
"""


def run_cards(exports: dict[str, Path], images: Tensor, folder: Path) -> dict[str, Tensor]:
    """The tokens that the code in the model card of each export computes, in a process of its own.

    The process cannot import fastalign, unless the code does. `folder` is for files of this function.
    """
    codes = {
        name: (export / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        for name, export in exports.items()
    }
    found, path = {}, folder / "jobs.pt"
    for block in ("fastalign", ""):
        jobs = {
            name: (code, images)
            for name, code in codes.items()
            if ("import fastalign" in code) != bool(block)
        }
        if not jobs:
            continue
        torch.save(jobs, path)
        places = {"HF_HOME": str(folder / "cache"), "PYTHONPATH": "" if block else str(record.ROOT)}
        command = [sys.executable, "-W", "ignore", "-c", RUN_CARDS, str(path), *([block] if block else [])]
        subprocess.run(command, cwd=folder, env={**os.environ, **places}, check=True)
        found |= torch.load(path)
    return found


def measure(name: str, **kwargs) -> list[dict]:
    """A row per target: the largest relative error of a token, with the cap and without."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_run(folder / "run", name, **kwargs)
        run = read_run(folder / "run")
        vit, images, wanted, exports = run.vit, noise(run.vit), {}, {}
        rows = {
            target: {"backbone": name, "target": target}
            for target in TARGETS
            if target != "prismatic" and not TARGETS[target].misfits(run.vit)  # its files are those for timm
        }
        for column, softcap in (("capped", vit.softcap), ("plain", None)):
            vit.softcap = softcap
            wanted[column] = vit.forward_features(images).detach()
            for target in rows:
                output = folder / f"{target}-{column}"
                export(folder / "run", target, output=output, drop_softcap=softcap is None)
                exports[output.name] = output
        for place, tokens in run_cards(exports, images, folder).items():
            target, _, column = place.rpartition("-")
            rows[target][column] = token_error(tokens, wanted[column])
    return list(rows.values())


COLUMNS = {"timm": "timm", "hf-": "transformers", "onnx": "onnx"}
"""Titles of the table by the beginning of a target's name."""


def line(rows: list[dict]) -> list[str]:
    """The line of a backbone in the table: with the cap / without."""
    found = {row["target"]: f"{_figure(row['capped'])}/{_figure(row['plain'])}" for row in rows}
    cells = [next((found[name] for name in found if name.startswith(start)), "-") for start in COLUMNS]
    return [rows[0]["backbone"], *cells]


def _figure(error: float) -> str:
    return f"{error:.1e}".replace("0.0e+00", "0")


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, write."""
    tiny, groups = record.parser("export", __doc__, "a tiny model").parse_args(arguments).tiny, []
    for name in BACKBONES[:1] if tiny else BACKBONES:
        groups.append(measure(name, **(TINY if tiny else {"depth": 2})))
        print(" | ".join(line(groups[-1])), flush=True)
    rows = [row for group in groups for row in group]
    if not tiny:
        record.write("export", rows)
        header = f"| backbone | {' | '.join(COLUMNS.values())} |"
        record.replace_table(TABLE, record.markdown(header, list(map(line, groups))))
    return rows


if __name__ == "__main__":
    main()
