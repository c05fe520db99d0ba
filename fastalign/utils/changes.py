"""What may change between a checkpoint and its continuation: a kind for each key, and what two trees differ in."""

import json
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple


class Kind(Enum):
    """What a key is to a run that goes on. The value is a remark for the key's documentation."""

    RESULT = "decides the result"
    FREE = "may change when a run goes on"
    GROWS = "may change when a run goes on, but not to less than is done"


class Change(NamedTuple):
    """A key whose value, or what its value names, is no longer what it was."""

    key: str
    before: Any
    now: Any
    contents: str | None = None
    """where it names a place: what is other there than it was"""

    def __str__(self) -> str:
        before, now = (json.dumps(value, ensure_ascii=False) for value in (self.before, self.now))
        if before == now:
            return f"{self.key} {now} has {self.contents} than before"
        return f"{self.key} was {before}, is {now}{f' with {self.contents}' if self.contents else ''}"


def changes(
    before: dict,
    now: dict,
    kinds: Mapping[str, Kind],
    places: Mapping[str, str | None],
    done: int,
) -> tuple[list[Change], list[Change]]:
    """What two trees of settings differ in.

    Args:
        before, now: sections of plain values. A key that holds a mapping is compared value by value; null is the
            same as nothing there.
        kinds: of every key, dotted.
        places: of keys that name a place: what is other there than it was, None where nothing is. That decides, and
            not the path.
        done: updates; a key that may grow has their number at least.

    Returns:
        What may not have changed, those whose values differ first; and the paths that differ while their contents are
        the same.
    """
    differing, inside, moved = [], [], []
    for key, kind in kinds.items():
        old, new = _value(before, key), _value(now, key)
        if kind is Kind.FREE:
            continue
        if kind is Kind.GROWS:
            if old != new and new is not None and new < done:
                differing.append(Change(key, old, new))
        elif key in places:
            change = Change(key, old, new, places[key])
            if old != new:
                (differing if places[key] else moved).append(change)
            elif places[key]:
                inside.append(change)
        else:
            differing += _differences(key, old, new)
    return differing + inside, moved


def _value(tree: dict, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def _differences(key: str, old: Any, new: Any) -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _differences(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield Change(key, old, new)
