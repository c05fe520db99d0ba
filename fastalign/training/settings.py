"""What a resumed run compares with its checkpoint: the settings and files that decide the result."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastalign.config import Config, kinds, resolve
from fastalign.data.sources import Source
from fastalign.utils.errors import UserError
from fastalign.utils.files import checksum_of
from fastalign.utils.sections import Kind, get_key

_WEIGHTS = {".safetensors", ".pth", ".pt", ".bin", ".npz"}  # suffixes


class Change(NamedTuple):
    """A key whose value, or what its value names, has changed."""

    key: str
    before: Any
    now: Any
    contents: str | None = None  # of a path: what has changed there

    def __str__(self) -> str:
        before, now = (json.dumps(value, ensure_ascii=False) for value in (self.before, self.now))
        if before == now:
            return f"{self.key} {now} has {self.contents} than before"
        return f"{self.key} was {before}, is {now}{f' with {self.contents}' if self.contents else ''}"


def contents(config: Config, sources: Mapping[str, Source]) -> dict[str, Any]:
    """Fingerprints of what the paths of a configuration hold, by key; `sources` are its opened data sets."""
    found: dict[str, Any] = {key: source.identity for key, source in sources.items()}
    for section in ("student", "teacher"):
        weights = getattr(config, section).weights
        if weights not in (None, "pretrained", "random"):
            place = Path(weights)
            inside = sorted(path for path in place.glob("*") if path.suffix in _WEIGHTS)
            found[f"{section}.weights"] = checksum_of(inside if place.is_dir() else [place])
    return found


def changed_contents(before: dict, now: dict, sources: Mapping[str, Source]) -> dict[str, str | None]:
    """For each path that two `contents` have: what has changed, None = nothing."""
    both = now.keys() & before.keys()
    changed = {key: None if now[key] == before[key] else "other contents" for key in both}
    return changed | {key: sources[key].differs_from(before[key]) for key in sources.keys() & before.keys()}


def changed_settings(
    saved: dict, path: Path, config: Config, places: Mapping[str, str | None], *, finished: bool
) -> tuple[list[Change], list[str]]:
    """The changes since the checkpoint `saved` among the keys that decide the result, and notes about moved data.

    `places` is of `changed_contents`: the contents count, not the path. UserError: there are changes without
    `resume=force`, or of a run that is `finished`.
    """
    before = resolve(saved["config"], [], path).model_dump(mode="json")
    after = config.model_dump(mode="json")
    changes, notes = [], []
    for key, kind in kinds().items():
        old, new = get_key(before, key), get_key(after, key)
        if kind is Kind.FREE:
            continue
        if kind is Kind.GROWS:
            if old != new and new is not None and new < saved["step"]:
                changes.append(Change(key, old, new))
        elif key not in places:
            changes += _differences(key, old, new)
        elif change := places[key]:
            changes.append(Change(key, old, new, change))
        elif old != new:
            notes.append(f"{Change(key, old, new)}: the contents are the same")
    if changes and (finished or config.resume != "force"):
        remedy = "set it back, choose another output, or use and record the new ones from here on with resume=force"
        if finished:
            remedy = "it is finished, and nothing would be trained with the new ones: choose another output"
        at = f"{config.output} is at step {saved['step']} with other settings"
        raise UserError(f"{at}: {'; '.join(map(str, changes))}; {remedy}")
    return changes, notes


def _differences(key: str, old: Any, new: Any) -> Iterator[Change]:
    """The values that differ; a missing key of a mapping is the same as null."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _differences(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield Change(key, old, new)
