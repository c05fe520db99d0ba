"""What a run that goes on compares with its checkpoint: the settings that decide the result."""

from pathlib import Path
from typing import Any

from fastalign.config import Config, kinds, resolve
from fastalign.data.loader import Loader
from fastalign.data.source import Source
from fastalign.utils.changes import Change, changes
from fastalign.utils.errors import UserError
from fastalign.utils.files import checksum_of

_WEIGHTS = {".safetensors", ".pth", ".pt", ".bin", ".npz"}
"""How files of weights in a folder end."""


def contents(config: Config, train: Loader, val: Loader | None) -> dict[str, Any]:
    """What lies at the paths of a configuration, by key, as plain values for a checkpoint: that decides the result.

    Args:
        config: names data sets and weights.
        train, val: their data sets.

    Raises:
        OSError: weights cannot be read.
    """
    found: dict[str, Any] = {key: source.identity for key, source in _sources(train, val).items()}
    for section in ("student", "teacher"):
        weights = getattr(config, section).weights
        if weights not in (None, "pretrained", "random"):
            place = Path(weights)
            inside = sorted(path for path in place.glob("*") if path.suffix in _WEIGHTS)
            found[f"{section}.weights"] = checksum_of(inside if place.is_dir() else [place])
    return found


def other_contents(
    then: dict[str, Any], now: dict[str, Any], train: Loader, val: Loader | None
) -> dict[str, str | None]:
    """What is other than it was at the paths that both `contents` know, by key; None = nothing."""
    sources = _sources(train, val)
    return {
        key: sources[key].differs_from(then[key])
        if key in sources
        else None
        if now[key] == then[key]
        else "other contents"
        for key in now.keys() & then.keys()
    }


def _sources(train: Loader, val: Loader | None) -> dict[str, Source]:
    return {"data.train": train.source} | ({} if val is None else {"data.val": val.source})


def changed_settings(
    state: dict, path: Path, config: Config, places: dict[str, str | None], *, finished: bool
) -> tuple[list[Change], list[str]]:
    """What a run that goes on has changed of what decides its result; only `resume=force` may.

    Args:
        state: of the checkpoint `path`.
        config: of the run that goes on.
        places: of `other_contents`.
        finished: nothing is left to train: a new setting would change only what the run says of itself.

    Returns:
        The changes, and lines about paths that are others while their contents are the same.

    Raises:
        UserError: it may not.
    """
    before = resolve(state["config"], [], path).model_dump(mode="json")
    changed, moved = changes(before, config.model_dump(mode="json"), kinds(), places, state["step"])
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
