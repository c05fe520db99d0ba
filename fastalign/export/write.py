"""Writing an export: the target's files, `fastalign.json`, the decoder and the model card; all of them or nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from fastalign import __version__
from fastalign.backbones.weight_files import read_json
from fastalign.export import measure
from fastalign.export.files import write_json, write_weights
from fastalign.export.run import DECODER, Run, read_run
from fastalign.export.targets import Target, find_target
from fastalign.utils.errors import UserError, first_line
from fastalign.utils.files import temporary_name

FACTS = "fastalign.json"


def export(
    run: str | Path | Run,
    to: str,
    *,
    output: str | Path | None = None,
    drop_softcap: bool = False,
    images: str | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> tuple[Path, dict[str, Any]]:
    """Export the backbone and the decoder of a run.

    Args:
        run: its folder, or what `fastalign.export.run.read_weights` returns.
        to: a name of `fastalign.export.targets.TARGETS`.
        output: the folder to write; None = ``exports/TARGET`` in the run's. An earlier export there is replaced.
        drop_softcap: export without the cap, for the library's own classes.
        images: folder, tar shards or ``synthetic:COUNT`` that features are measured on; None = validation data.
        say: gets a line for each thing that is done.

    Returns:
        The folder and the content of its fastalign.json.

    Raises:
        UserError: a damaged run, a target that does not fit, or an export that is not exact.
    """
    if not isinstance(run, Run):
        say(f"reading {run}")
        run = read_run(run)
    for name, value in run.vit.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{run.folder or '--weights'}: {name} is not finite; export other weights")
    cap, target = run.vit.softcap, find_target(to, run)
    output = _output(run, to, output)
    found, where = measure.find_images(images, run.val)
    softcap = {"value": cap, "applied": cap is not None and not drop_softcap}
    if cap is not None:
        say("measuring what the soft-cap changes")
        softcap["effect"] = measure.without_softcap(run.vit, found)
    if drop_softcap:
        run.vit.softcap = None
    facts = _facts(run, to, softcap)
    facts["features"] = {**measure.moments(run.vit, found, say), "of": where}
    temporary = temporary_name(output)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(run, target, facts, temporary, say)
        _write_card(temporary, facts, target, output)
        shutil.rmtree(output, ignore_errors=True)
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output, facts


def is_exported(folder: Path, to: str) -> bool:
    """Whether an export of a run in its default place is of the run's present weights."""
    try:
        kept, made = (
            [json.loads(path.read_text()).get(key) for key in ("step", "val_loss", "changes")]
            for path in (folder / "backbone.json", folder / "exports" / to / FACTS)
        )
    except (OSError, ValueError):
        return False
    return kept == made


def _output(run: Run, to: str, given: str | Path | None) -> Path:
    """The folder to write."""
    if given is None and run.folder is None:
        raise UserError("--output: give the folder to write, because --weights is not a run")
    output = Path(given) if given else run.folder / "exports" / to
    if output.exists() and not (output / FACTS).is_file():
        raise UserError(f"--output {output} exists and is not an export: choose another folder")
    return output


def _write(
    run: Run, target: Target, facts: dict[str, Any], folder: Path, say: Callable[[str], object]
) -> None:
    """All files but the card, if the library's own model, loaded from them, gives our features."""
    name = f"--to {facts['target']}"
    say(f"writing files for {target.package}")
    notes = target.write(run, folder)
    say(f"comparing what {target.package} computes from them")
    try:
        tokens = target.read(folder)
    except Exception as error:  # of the library
        raise UserError(
            f"{name}: {target.package} cannot load it ({first_line(error)}): not written; choose another target"
        ) from error
    error = measure.check_parity(run.vit, tokens, name)
    facts["parity"] = {"largest_relative_error": error, "of": measure.PARITY_OF}
    facts["notes"] = [*run.notes, *notes]
    if run.decoder:
        write_weights(folder / DECODER, run.decoder_weights)
    write_json(folder / FACTS, facts)


def _facts(run: Run, to: str, softcap: dict[str, Any]) -> dict[str, Any]:
    config, spec = run.config, run.vit.spec
    return {
        "target": to,
        "fastalign": __version__,
        "source": run.source(),
        **{key: run.facts.get(key) for key in ("objective", "step", "val_loss")},
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
        "recipe": config.model_dump(mode="json") if config else None,
        "changes": run.facts.get("changes"),
        "decoder": run.decoder,
    }


def change_in_words(effect: dict[str, dict[str, float]]) -> str:
    """How much the features change without the soft-cap."""
    return ", ".join(
        f"{100 * change['relative_change']:.2g}% on {name} (lowest cosine of a token {change['lowest_cosine']:.4f})"
        for name, change in effect.items()
    )


def _write_card(folder: Path, facts: dict[str, Any], target: Target, output: Path) -> None:
    """README.md in `folder`, for an export that is loaded from `output`."""
    weights, config = facts["source"]["weights"], folder / "config.json"
    words = {None: "not recorded", "pretrained": "its published weights", "random": "random weights"}
    template = jinja2.Template(
        Path(__file__).with_name("card.md").read_text(),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    card = template.render(
        facts,
        package=target.package,
        how_capped=target.how_capped,
        config=read_json(config) if config.is_file() else {},
        folder=output,
        started_from=words.get(weights) or f"`{Path(weights).name}`",
        change=change_in_words(facts["softcap"].get("effect", {})),
    )
    (folder / "README.md").write_text(card)
