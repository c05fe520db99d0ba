"""Typed configuration sections: declared as classes, read from YAML and overrides, written with documentation."""

import copy
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from fastalign.utils.errors import UserError
from fastalign.utils.yaml_files import Dumper, explain, parse_yaml, set_key

_Tree = TypeVar("_Tree", bound="Section")


class Kind(Enum):
    """What a new value of a key means to a resumed run. The value is a remark for the key's documentation."""

    RESULT = "decides the result"
    FREE = "may change when a run resumes"
    GROWS = "may change when a run resumes, but not below the steps done"


class Section(BaseModel):
    """A group of keys; a key's kind is its annotation (`Annotated[int, Kind.FREE]`), else the section's."""

    kind: ClassVar[Kind] = Kind.RESULT
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo, Kind]]:
    """Every dotted key with its field and its kind."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            kinds = (each for each in field.metadata if isinstance(each, Kind))
            yield prefix + name, field, next(kinds, section.kind)


def resolve(section: type[_Tree], tree: dict, overrides: list[str], where: str | Path) -> _Tree:
    """The typed tree of a plain one, with `key=value` overrides applied to a copy.

    A UserError is about the file `where`, or about the command line if an override may be wrong.
    """
    merged = copy.deepcopy(tree)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UserError(f"override {override!r} is not of the form section.key=value")
        set_key(merged, key.split("."), parse_yaml(value, f"override {override!r}"), override)
    try:
        return section.model_validate(merged)
    except ValidationError as error:
        key, text = explain(error, [*section.model_fields, *(name for name, _, _ in fields(section))])
        given = [override.partition("=")[0] for override in overrides]
        if any(not key or f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in given):
            where = "command line"
        raise UserError(f"{where}: {text}") from None


def get_key(tree: dict, key: str) -> Any:
    """The value of a dotted key in nested dictionaries."""
    for name in key.split("."):
        tree = tree[name]
    return tree


def select(config: Section, kind: Kind) -> dict[str, Any]:
    """The keys of one kind, as nested dictionaries."""
    selected: dict[str, Any] = {}
    plain = config.model_dump(mode="json")
    for key, _, each in fields(type(config)):
        if each is kind:
            set_key(selected, key.split("."), get_key(plain, key))
    return selected


def _choices(field: FieldInfo) -> str:
    """The values of a key that has few, such as " [linear | mlp]"."""
    kinds = [field.annotation, *get_args(field.annotation)]
    values = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    values = ["true", "false", *values] if values and bool in kinds else values
    return f" [{' | '.join(map(str, values))}]" if values else ""


def to_yaml(config: Section, *, comments: bool = False) -> str:
    """The configuration as YAML; with `comments`, each key's documentation stands after its value."""
    text = yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False)
    if not comments:
        return text
    documentation = {
        key: f"{field.description}{_choices(field)}{'' if kind is Kind.RESULT else f' ({kind.value})'}"
        for key, field, kind in fields(type(config))
    }
    lines, path = [], []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path[depth:] = [line.strip().split(":")[0]]
        key = ".".join(path)
        lines.append(f"{line}  # {documentation[key]}" if key in documentation else line)
    return "\n".join(lines) + "\n"
