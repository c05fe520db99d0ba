"""Writing an export: the target's files, `fastalign.json`, the decoder and the model card; all of them or nothing."""

import shutil
from pathlib import Path
from typing import Any

from fastalign import __version__
from fastalign.export import measure
from fastalign.export.run import DECODER, Run, read_run
from fastalign.export.targets import Target, find_target
from fastalign.export.towers import write_json
from fastalign.utils.errors import UserError
from fastalign.utils.files import temporary_name, write_tensors
from fastalign.utils.yaml_files import merge

FACTS = "fastalign.json"


def export(
    folder: str | Path,
    to: str,
    *,
    output: str | Path | None = None,
    drop_softcap: bool = False,
    images: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Export the backbone and the decoder of a run.

    Args:
        folder: of the run.
        to: a name of `fastalign.export.targets.TARGETS`.
        output: the folder to write; None = ``exports/TARGET`` in the run's. An earlier export there is replaced.
        drop_softcap: export without the cap, for the library's own classes, and measure the effect.
        images: folder, tar shards or ``synthetic:COUNT`` that features are measured on; None = validation data.

    Returns:
        The folder and the content of its fastalign.json.

    Raises:
        UserError: a damaged run, a target that does not fit or cannot cap, or an export that is not exact.
    """
    run = read_run(folder)
    target, cap = find_target(to, run), run.vit.softcap
    output = Path(output) if output else run.folder / "exports" / to
    if output.exists() and not (output / FACTS).is_file():
        raise UserError(f"--output {output} exists and is not an export: choose another folder")
    if cap is not None and not drop_softcap and not target.can_cap:
        raise UserError(
            f"--to {to} cannot apply the soft-cap of {cap:g} that {run.folder} was trained with: choose another "
            "target, or give --drop-softcap, which changes the features and measures by how much"
        )
    found, where = measure.find_images(images, run.config.data.val if run.config else None)
    softcap = {"value": cap, "applied": cap is not None and not drop_softcap}
    if cap is not None and drop_softcap:
        softcap["dropped"] = measure.without_softcap(run.vit, found)
        run.vit.softcap = None
    facts = _facts(run, to, softcap) | {"notes": [*run.notes, *target.notes]}
    facts["features"] = measure.moments(run.vit, found) if found else {"mean": None, "std": None}
    facts["features"]["of"] = where
    temporary = temporary_name(output)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(run, target, facts, temporary)
        shutil.rmtree(output, ignore_errors=True)
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output, facts


def _write(run: Run, target: Target, facts: dict[str, Any], folder: Path) -> None:
    """All files, if the library's own model, loaded from them, gives our features."""
    target.write(run, folder)
    error = measure.parity(run.vit, target.read(folder))
    if error > measure.PARITY:
        raise UserError(
            f"--to {facts['target']}: the exported model differs from ours by {error:.1e} (at most "
            f"{measure.PARITY:g}): not written; check the versions of the libraries"
        )
    facts["parity"] = {"largest_relative_error": error, "of": "any token, fp32, 4 images of noise"}
    if run.decoder:
        write_tensors(folder / DECODER, run.decoder_weights)
    write_json(folder / FACTS, facts)
    (folder / "README.md").write_text(_model_card(facts, target.package, target.usage(run)))


def _facts(run: Run, to: str, softcap: dict[str, Any]) -> dict[str, Any]:
    config, spec = run.config, run.vit.spec
    return {
        "target": to,
        "fastalign": __version__,
        "source": run.source(),
        "objective": run.facts.get("objective"),
        "step": run.facts.get("step"),
        "val_loss": run.facts.get("val_loss"),
        "probe": run.probe,
        "softcap": softcap,
        "read": {
            "layer": -1,
            "normed": spec.final_norm,
            "prefix_tokens": spec.prefix,
            "patch_grid": list(spec.grid),
            "width": spec.block.width,
        },
        "images": {"size": list(spec.image_size), **run.vit.data},
        "data": {"train": config.data.train, "val": config.data.val} if config else None,
        # config.yaml is of the newest start, which may have forced other settings than those of this backbone.
        "recipe": merge(config.model_dump(mode="json"), run.facts.get("settings", {})) if config else None,
        "changes": run.facts.get("changes"),
        "decoder": run.decoder,
    }


def _model_card(facts: dict[str, Any], library: str, usage: str) -> str:
    """README.md of an export; `usage` is Python that loads it with `library`."""
    source, read, images, data = facts["source"], facts["read"], facts["images"], facts["data"]
    features, parity, grid = facts["features"], facts["parity"], read["patch_grid"]
    loss = "not measured" if facts["val_loss"] is None else f"{facts['val_loss']:.4f}"
    licence = f"{source['licence']}, as timm records it; see the source's own page"
    measured = f"in fastalign.json: {features.get('images')} images, {features['of']}"
    rows = {
        "backbone": f"`{source['name']}`, weights: {source['weights'] or 'unknown'}",
        "licence of its weights": licence if source["licence"] else "unknown: that of the original weights",
        "soft-cap": _softcap(facts["softcap"]),
        "tokens to read": f"the last layer's{', normed' if read['normed'] else ''}: {read['prefix_tokens']} prefix "
        f"tokens, then {grid[0]} x {grid[1]} patches of width {read['width']}",
        "images": ", ".join(f"{name} {value}" for name, value in images.items()),
        "data": f"train `{data['train']}`, validation `{data['val']}`" if data else "unknown",
        "trained": f"{facts['objective']}, {facts['step']} updates, validation loss {loss}",
        "patch probe": facts["probe"] if facts["probe"] is not None else "not measured",
        "feature mean and std": features["of"] if features["mean"] is None else measured,
        "difference from fastalign's own model": f"{parity['largest_relative_error']:.1e} ({parity['of']})",
        "MaskEmbed decoder": "`fastalign.export.load_decoder(FOLDER)`" if facts["decoder"] else "none",
    }
    lines = [
        "---",
        f"license: {source['licence'] or 'unknown'}",
        f"library_name: {library}",
        "pipeline_tag: image-feature-extraction",
        "tags: [locality-alignment, fastalign]",
        "---",
        f"# {source['name']}, locality-aligned",
        "",
        "A vision transformer after [MaskEmbed](https://arxiv.org/abs/2410.11087) with fastalign "
        f"{facts['fastalign']}, for `{facts['target']}`.",
        "",
        "```python",
        usage,
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "`fastalign.json` has all of this, the whole recipe and the features' mean and std by channel.",
        *(["", *facts["notes"]] if facts["notes"] else []),
    ]
    return "\n".join(lines) + "\n"


def _softcap(softcap: dict[str, Any]) -> str:
    if softcap["value"] is None:
        return "none: trained with plain attention"
    if softcap["applied"]:
        return f"{softcap['value']:g}, applied by the import above; without it the features differ"
    changes = ", ".join(
        f"{100 * v['relative_change']:.2g}% on {name}" for name, v in softcap["dropped"].items()
    )
    return f"**dropped**: trained with {softcap['value']:g}; relative change of the features {changes}"
