"""Writing an export: the target's files, `fastalign.json`, the decoder and the model card; all of them or nothing."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastalign import __version__
from fastalign.export import measure
from fastalign.export.card import model_card
from fastalign.export.run import DECODER, Run, read_run
from fastalign.export.targets import Target, find_target
from fastalign.export.towers import write_json
from fastalign.utils.errors import UserError
from fastalign.utils.files import temporary_name, write_tensors
from fastalign.utils.sections import merge

FACTS = "fastalign.json"


def export(
    run: str | Path | Run,
    to: str,
    *,
    output: str | Path | None = None,
    drop_softcap: bool = False,
    images: str | None = None,
    hub: str | None = None,
    text_tower: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Export the backbone and the decoder of a run.

    Args:
        run: its folder, or what `fastalign.export.run.read_weights` returns.
        to: a name of `fastalign.export.targets.TARGETS`.
        output: the folder to write; None = ``exports/TARGET`` in the run's. An earlier export there is replaced.
        drop_softcap: export without the cap, for the library's own classes.
        images: folder, tar shards or ``synthetic:COUNT`` that features are measured on; None = validation data.
        text_tower: for open_clip: the CLIP model whose text tower is kept, a file, a folder or ``hf-hub:OWNER/NAME``;
            None = the weights that the run started from.
        hub: OWNER/NAME under which the export will be uploaded; the model card loads it from there.

    Returns:
        The folder and the content of its fastalign.json.

    Raises:
        UserError: a damaged run, a target that does not fit or cannot cap, or an export that is not exact.
    """
    run = replace(run if isinstance(run, Run) else read_run(run), text_tower=text_tower)
    target, cap = find_target(to, run), run.vit.softcap
    output = _output(run, to, output)
    if cap is not None and not drop_softcap and target.how_capped is None:
        raise UserError(
            f"--to {to} cannot apply the soft-cap of {cap:g} that {run.facts['name']} was trained with: choose "
            "another target, or give --drop-softcap, which changes the features and measures by how much"
        )
    found, where = measure.find_images(images, run.config.data.val if run.config else None)
    softcap = {"value": cap, "applied": cap is not None and not drop_softcap}
    if cap is not None:
        softcap["effect"] = measure.without_softcap(run.vit, found)
        run.vit.softcap = cap if softcap["applied"] else None
    facts = _facts(run, to, softcap)
    facts["features"] = measure.moments(run.vit, found) if found else {"mean": None, "std": None}
    facts["features"]["of"] = where
    temporary = temporary_name(output)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(run, target, facts, temporary)
        usage = target.usage(run)
        if hub:
            usage = usage.replace("local-dir:FOLDER", f"hf-hub:{hub}")
        usage = usage.replace("FOLDER", hub or str(output))
        (temporary / "README.md").write_text(model_card(facts, target.package, usage, target.how_capped))
        shutil.rmtree(output, ignore_errors=True)
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output, facts


def _output(run: Run, to: str, given: str | Path | None) -> Path:
    """The folder to write."""
    if given is None and run.folder is None:
        raise UserError("--output: give the folder to write, because --weights is not a run")
    output = Path(given) if given else run.folder / "exports" / to
    if output.exists() and not (output / FACTS).is_file():
        raise UserError(f"--output {output} exists and is not an export: choose another folder")
    return output


def _write(run: Run, target: Target, facts: dict[str, Any], folder: Path) -> None:
    """All files but the card, if the library's own model, loaded from them, gives our features."""
    notes = target.write(run, folder) or []
    error = measure.check_parity(run.vit, target.read(folder), f"--to {facts['target']}")
    facts["parity"] = {"largest_relative_error": error, "of": measure.PARITY_OF}
    facts["notes"] = [*run.notes, *target.notes, *notes]
    if run.decoder:
        write_tensors(folder / DECODER, run.decoder_weights)
    write_json(folder / FACTS, facts)


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
