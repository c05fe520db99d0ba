"""YAML files: read, merged, written; and what is wrong with them as one line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fastalign.utils.errors import UserError, unknown
from fastalign.utils.paths import user_path


def read_with_bases(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """The mapping in a YAML file, merged over that of the file that it names as its `base`."""
    if path.resolve() in seen:
        raise UserError(f"{path}: its bases form a cycle")
    tree = read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: base must be the path of another recipe, got {base!r:.80}")
    return merge(read_with_bases(path.parent / user_path(base), (*seen, path.resolve())), tree)


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; UserError if there is none."""
    if not path.is_file():
        raise UserError(f"no recipe at {path}: check the path, or give a name that `fastalign recipes` lists")
    tree = parse_yaml(path.read_bytes(), str(path)) or {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    return tree


def parse_yaml(text: str | bytes, where: str) -> Any:
    """The value of a YAML text; UserError about `where` if it is not YAML."""
    where = where[:80]
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def set_key(tree: dict, path: list[str], value: Any, override: str = "") -> None:
    """Set a key of nested dictionaries; UserError about `override` if part of the path is not a section."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {name} is not a section")
    tree[path[-1]] = value


def explain(error: ValidationError, names: Iterable[str]) -> tuple[str, str]:
    """The first wrong key of a tree ("" for a conflict between keys) and what is wrong with it.

    The nearest of `names`, all dotted keys, to an unknown key is suggested.
    """
    first = error.errors()[0]
    parts = [part for part in first["loc"] if isinstance(part, str)]
    key = ".".join(part for part in parts if not part.startswith(("float", "literal")))
    if first["type"] == "extra_forbidden":
        return key, unknown("key", key, names)
    if first["type"] == "string_type" and first["input"] is not None:
        text = f"YAML reads this value as {first['input']!r}, not as text; put it in quotes"
        return key, f"{key}: {text} (in a shell: \"{key}='...'\")"
    message = first["msg"].removeprefix("Value error, ")
    return key, f"{key}: {message}, got {first['input']!r}" if key else message


class _Loader(yaml.SafeLoader):
    """Plain values only: no aliases, which let a short text grow without bound, and no dates."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise yaml.YAMLError(f"an alias in line {line}: write the value out")
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class Dumper(yaml.SafeDumper):
    """Sections in blocks, lists on one line."""


Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def merge(base: dict, top: dict) -> dict:
    """A tree merged over another one."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged
