"""YAML files and single keys: read, laid over each other, explained where they are wrong, written."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fastalign.utils.errors import UserError
from fastalign.utils.paths import user_path

LONGEST = 1 << 20
"""characters of a YAML text; ours have some hundred"""


def read_with_bases(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """The mapping in a YAML file, laid over the one in the file that it names as its `base`, if any.

    Raises:
        UserError: no such file, no mapping, or bases that form a circle.
    """
    if path.resolve() in seen:
        raise UserError(f"{path}: its bases form a circle")
    tree = read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: base must be the path of another recipe, got {base!r:.80}")
    return merge(read_with_bases(path.parent / user_path(base), (*seen, path.resolve())), tree)


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; UserError where there is none."""
    if not path.is_file():
        raise UserError(f"no configuration file at {path}")
    if path.stat().st_size > LONGEST:
        raise UserError(f"{path} has {path.stat().st_size} bytes, a configuration has at most {LONGEST}")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    return tree


def parse_yaml(text: str, where: str) -> Any:
    """The value that a text spells; UserError about `where` if it is no YAML."""
    if len(text) > LONGEST:
        raise UserError(f"{where[:80]}...: {len(text)} characters, at most {LONGEST} are read")
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{where[:80]}: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits, a date that does not exist
        raise UserError(f"{where[:80]}: not YAML: {error}") from None


def put(tree: dict, path: list[str], value: Any, override: str) -> None:
    """Sets a key of a tree in place; UserError about `override` where a part of the path holds a plain value."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {name} is not a section")
    tree[path[-1]] = value


def explain(error: ValidationError, names: Iterable[str]) -> tuple[str, str]:
    """What is wrong with a tree: its first bad key, empty where it is no single one, and a text about it.

    Args:
        error: pydantic's.
        names: of all keys, dotted; the one nearest to an unknown key is told.
    """
    first = error.errors()[0]
    parts = [part for part in first["loc"] if isinstance(part, str)]
    key = ".".join(part for part in parts if not part.startswith(("float", "literal")))
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
        return key, f"unknown key {key}; the nearest is {near[0]}"
    if first["type"] == "string_type" and first["input"] is not None:
        return key, (
            f"{key}: YAML reads this value as {first['input']!r}, not as text; put it in quotes (in a shell: "
            f"\"{key}='...'\")"
        )
    message = first["msg"].removeprefix("Value error, ")
    return key, f"{key}: {message}, got {first['input']!r}" if key else message


def write_yaml(tree: dict) -> str:
    """A tree as YAML."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Plain values only. A text without aliases is as large as what it says, and no part of it holds itself."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"an alias in line {mark.line + 1}: write the value out")
        return super().compose_node(parent, index)


# No key is a date, and a run folder may be called after one.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Lists on one line, sections in blocks, so that each key has a line for its comment."""

    def represent_list(self, data: list) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)


def merge(base: dict, top: dict) -> dict:
    """A tree with another laid over it."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged
