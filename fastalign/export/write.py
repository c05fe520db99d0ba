"""Write an export: the target's files, `fastalign.json`, the decoder and the model card; all of them or none."""

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import jinja2

from fastalign import __version__
from fastalign.export import measure
from fastalign.export.run import DECODER, Run, read_run
from fastalign.export.targets import Target, find_target
from fastalign.utils.errors import UserError, first_line
from fastalign.utils.files import temporary_name, wrap_io_errors, write_tensors

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
        run: the run's folder, or the result of `fastalign.export.run.read_weights`.
        to: a name of `fastalign.export.targets.TARGETS`.
        output: the folder to write; None = ``exports/TARGET`` in the run's. An earlier export there is replaced.
        drop_softcap: export without the cap, for the library's own classes.
        images: folder, tar shards or ``synthetic:COUNT`` that features are measured on; None = validation data.
        say: called with a line for each step.

    Returns:
        The folder and the content of its fastalign.json.

    Raises:
        UserError: a damaged run, a target that does not fit, or an export whose error is too large.
    """
    if not isinstance(run, Run):
        say(f"reading {run}")
        run = read_run(run)
    for name, value in run.vit.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{run.folder or '--weights'}: {name} is not finite; export other weights")
    target, output, cap = find_target(to, run.vit), _output(run, to, output), run.vit.softcap
    source, where = measure.find_images(images, run.val)
    softcap = {"value": cap, "applied": cap is not None and not drop_softcap}
    if cap is not None:
        say("measuring what the soft-cap changes")
        softcap["effect"] = measure.without_softcap(run.vit, source)
    if drop_softcap:
        run.vit.softcap = None
    if source is not None:
        say("measuring features")
    facts = _facts(run, to, softcap)
    facts["features"] = {**measure.moments(run.vit, source), "of": where}
    temporary = temporary_name(output)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with wrap_io_errors(output):
            say(f"writing files for {target.package}")
            error = _write_model(run, to, target, temporary)
            facts["parity"] = {"largest_relative_error": error, "of": measure.PARITY_OF}
            facts["notes"] = run.notes
            decoder = {DECODER: run.decoder_weights} if run.decoder else {}
            _write_files(temporary, {FACTS: facts, **decoder})
            (temporary / "README.md").write_text(_card(run, facts, target, output))
            shutil.rmtree(output, ignore_errors=True)
            temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output, facts


def is_exported(folder: Path, to: str) -> bool:
    """Whether the export in a run's default folder has the run's present weights."""
    try:
        kept, made = (
            [json.loads(path.read_text()).get(key) for key in ("step", "val_loss", "changes")]
            for path in (folder / "backbone.json", folder / "exports" / to / FACTS)
        )
    except (OSError, ValueError, AttributeError):
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


def _write_model(run: Run, to: str, target: Target, folder: Path) -> float:
    """Write the library's files, load them with the library, and return the error of its model."""
    library = import_module(f"fastalign.export.{target.module}")
    _write_files(folder, library.files(run, folder, to))
    try:
        tokens = library.read(folder)
    except Exception as error:  # of the library
        raise UserError(
            f"--to {to}: {target.package} cannot load it ({first_line(error)}): not written; choose another target"
        ) from error
    return measure.check_parity(run.vit, tokens, f"--to {to}")


def _write_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write JSON, or weights in fp32; safetensors refuses tensors that share memory."""
    for name, content in files.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
            continue
        weights = {key: value.detach().float().contiguous().clone() for key, value in content.items()}
        write_tensors(folder / name, weights)


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


def _card(run: Run, facts: dict[str, Any], target: Target, folder: Path) -> str:
    """The text of README.md, whose code loads the export from `folder`."""
    weights = facts["source"]["weights"]
    words = {None: "not recorded", "pretrained": "its published weights", "random": "random weights"}
    options = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    text = Path(__file__).with_name("card.md").read_text()
    template = jinja2.Template(text, undefined=jinja2.StrictUndefined, **options)
    try:
        return template.render(
            facts,
            package=target.package,
            how_capped=target.how_capped,
            folder=folder,
            started_from=words.get(weights) or f"`{Path(weights).name}`",
            change=change_in_words(facts["softcap"].get("effect", {})),
        )
    except (jinja2.UndefinedError, TypeError) as error:  # all else in the card is our own
        raise UserError(
            f"{run.folder}/probe.json has no results of fastalign probe ({error}): run it again, or remove the file"
        ) from error
