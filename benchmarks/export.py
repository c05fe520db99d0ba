"""Errors of exported backbones relative to ours: ``python -m benchmarks.export [NAME ...]``.

fp32, random weights (every parameter perturbed), native image size and width, two blocks, with the soft-cap of 30
and without. An export for transformers is loaded as its model card says, in a process that cannot import fastalign;
the others in this process, by the library's own classes. Backbones given by NAME are measured at full depth and not
written. Otherwise writes `benchmarks/results/export.json` and the table of `docs/export.md`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import record
from fastalign.backbones.zoo import create_backbone
from fastalign.export import export
from fastalign.export.measure import noise, token_error
from fastalign.export.run import read_run
from fastalign.export.targets import TARGETS

BACKBONES = [
    "vit_base_patch16_clip_quickgelu_224.openai",
    "vit_base_patch16_clip_224.laion2b",
    "vit_base_patch16_siglip_224.webli",
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch14_dinov2.lvd142m",
    "vit_base_patch16_224.augreg_in21k_ft_in1k",
]
TINY = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}
TABLE = record.ROOT / "docs" / "export.md"


def make_run(folder: Path, name: str, **kwargs) -> None:
    """The folder of a run without training: random weights with a cap of 30. `kwargs` are timm's."""
    torch.manual_seed(0)
    vit = create_backbone(name, **kwargs)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    kwargs = {**vit.recipe["kwargs"], **({"global_pool": ""} if vit.spec.pool == "map" else {})}
    weights = {key: value for key, value in vit.state_dict().items() if not key.startswith("attn_pool.")}
    folder.mkdir()
    save_file(weights, folder / "backbone.safetensors")
    # As in a run, the student's final norm is new and has its own epsilon.
    facts = {"name": name, "kwargs": kwargs, "softcap": 30.0, "norm_eps": vit.spec.fresh_norm_eps}
    (folder / "backbone.json").write_text(json.dumps(facts))


ALONE = """
import json, sys
import torch

sys.modules["fastalign"] = None  # importing it is an error
torch.set_grad_enabled(False)
for folder, code in json.loads(sys.argv[1]).items():
    names = {"images": torch.load("images.pt")}
    exec(code.replace("FOLDER", folder), names)
    torch.save(names["tokens"], f"{folder}.pt")
"""


def tokens_without_fastalign(folder: Path, usages: dict[str, str], images: Tensor) -> dict[str, Tensor]:
    """The tokens that the lines of each model card compute, in one process that cannot import fastalign.

    Args:
        folder: where the exports are; `usages` has the lines by the name of an export.
    """
    torch.save(images, folder / "images.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_HOME"] = str(folder / "cache")
    subprocess.run([sys.executable, "-c", ALONE, json.dumps(usages)], cwd=folder, env=environment, check=True)
    return {name: torch.load(folder / f"{name}.pt") for name in usages}


def measure(name: str, **kwargs) -> list[dict]:
    """A row per target: the largest relative error of a token, with the cap (None: refused) and without."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_run(folder / "run", name, **kwargs)
        run, usages, wanted = read_run(folder / "run"), {}, {}
        images, spec = noise(run.vit), run.vit.spec
        rows = {
            target: {"backbone": name, "target": target, "capped": None}
            for target in TARGETS
            if not TARGETS[target].misfits(spec)
        }
        for column, softcap in (("capped", run.vit.softcap), ("plain", None)):
            run.vit.softcap = softcap
            wanted[column] = run.vit.forward_features(images).detach()
            for target, row in rows.items():
                if column == "plain" or TARGETS[target].can_cap:
                    output = folder / f"{target}-{column}"
                    _, facts = export(folder / "run", target, output=output, drop_softcap=column == "plain")
                    row[column] = facts["parity"]["largest_relative_error"]
                    if TARGETS[target].package == "transformers":
                        usages[output.name] = TARGETS[target].usage(run)
        for place, tokens in tokens_without_fastalign(folder, usages, images).items():
            target, _, column = place.rpartition("-")
            rows[target][column] = token_error(tokens, wanted[column])
    return list(rows.values())


def cells(row: dict) -> list[str]:
    """A row of the table."""
    capped = "refused" if row["capped"] is None else f"{row['capped']:.1e}"
    return [row["backbone"], row["target"], capped, f"{row['plain']:.1e}"]


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, write."""
    parser = record.parser("export", __doc__, "a tiny model")
    parser.add_argument("names", nargs="*", metavar="NAME", help="timm names, at full depth and not written")
    options = parser.parse_args(arguments)
    whole = not options.names and not options.tiny
    kwargs = TINY if options.tiny else {"depth": 2} if whole else {}
    rows = []
    for name in options.names or (BACKBONES[:1] if options.tiny else BACKBONES):
        rows += measure(name, **kwargs)
        print("\n".join(" ".join(cells(row)) for row in rows if row["backbone"] == name), flush=True)
    if whole:
        record.write("export", rows)
        table = record.markdown("| backbone | target | with the cap | without |", list(map(cells, rows)))
        record.replace_table(TABLE, table)
    return rows


if __name__ == "__main__":
    main()
