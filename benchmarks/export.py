"""Errors of exported backbones relative to ours: ``python -m benchmarks.export [NAME ...]``.

fp32, random weights (every parameter perturbed), native image size and width, two blocks, with the soft-cap of 30
and without; each export is loaded from its files by the library's own classes. Backbones given by NAME are measured
at full depth and not written. Otherwise writes `benchmarks/results/export.json` and the table of `docs/export.md`.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import record
from fastalign.backbones.zoo import create_backbone
from fastalign.export import export
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


def measure(name: str, **kwargs) -> list[dict]:
    """A row per target: the largest relative error of a token, with the cap (None: refused) and without."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        make_run(run, name, **kwargs)
        spec = create_backbone(name, **kwargs).spec
        for target in TARGETS:
            if TARGETS[target].misfits(spec):
                continue
            errors = {}
            for column, drop in (("capped", False), ("plain", True)):
                if drop or TARGETS[target].how_capped:
                    _, facts = export(run, target, output=Path(folder) / "out", drop_softcap=drop)
                    errors[column] = facts["parity"]["largest_relative_error"]
            rows.append({"backbone": name, "target": target, "capped": None, **errors})
    return rows


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
