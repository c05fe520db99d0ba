"""What a run that goes on compares with its checkpoint: the settings that decide the result."""

from pathlib import Path
from typing import Any

from fastalign.build import WEIGHTS
from fastalign.config import Config, kinds, resolve
from fastalign.data.loader import Loader
from fastalign.engine.changes import Change, changes
from fastalign.engine.files import checksum_of
from fastalign.errors import UserError


def contents(config: Config, train: Loader, val: Loader | None) -> dict[str, Any]:
    """Fingerprints of what lies at the paths of a configuration, by key; that decides the result, not the path.

    Args:
        config: names data sets and weights.
        train, val: their data sets.

    Raises:
        OSError: weights cannot be read.
    """
    loaders = {"train": train, "val": val}
    found = {
        f"data.{name}": loader.source.fingerprint() for name, loader in loaders.items() if loader is not None
    }
    for section in ("student", "teacher"):
        weights = getattr(config, section).weights
        if weights not in (None, "pretrained", "random"):
            place = Path(weights)
            inside = sorted(path for path in place.glob("*") if path.suffix in WEIGHTS)
            found[f"{section}.weights"] = checksum_of(inside if place.is_dir() else [place])
    return found


def changed_settings(
    state: dict, path: Path, config: Config, now: dict[str, Any], *, finished: bool
) -> tuple[list[Change], list[str]]:
    """What a run that goes on has changed of what decides its result; only `resume=force` may.

    Args:
        state: of the checkpoint `path`.
        config: of the run that goes on.
        now: its `contents`.
        finished: nothing is left to train: a new setting would change only what the run says of itself.

    Returns:
        The changes, and lines about paths that are others while their contents are the same.

    Raises:
        UserError: it may not.
    """
    before = resolve(state["config"], [], path).model_dump(mode="json")
    changed, moved = changes(before, config.model_dump(mode="json"), kinds(), state["contents"], now)
    notes = [f"{each}: the contents are the same" for each in moved]
    if not changed:
        return [], notes
    told = (
        f"{config.output} stands at step {state['step']} with other settings: {'; '.join(map(str, changed))}"
    )
    if finished:
        raise UserError(
            f"{told}; it is finished, nothing would be trained with the new ones: choose another output"
        )
    if config.resume != "force":
        raise UserError(
            f"{told}; set it back, choose another output, or use the new ones from here on with resume=force, which "
            "records the change"
        )
    return changed, notes
