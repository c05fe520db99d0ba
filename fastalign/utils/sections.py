"""Typed trees of keys: declared as classes, read from YAML and `key=value` overrides, written with documentation."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import is_typeddict

from fastalign.utils.changes import Kind
from fastalign.utils.errors import UserError
from fastalign.utils.yaml_files import explain, parse_yaml, put, write_yaml

_Tree = TypeVar("_Tree", bound="Section")


class Section(BaseModel):
    """A group of keys, each with its kind as a mark (`Annotated[int, Kind.FREE]`), else the section's."""

    kind: ClassVar[Kind] = Kind.RESULT
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo, Kind]]:
    """Every key, dotted, with its field and its kind."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            marks = (mark for mark in field.metadata if isinstance(mark, Kind))
            yield prefix + name, field, next(marks, section.kind)


def resolve(section: type[_Tree], tree: dict, overrides: list[str], where: str | Path) -> _Tree:
    """The typed tree of a plain one with overrides, which stays as it is.

    Raises:
        UserError: about the file `where`, or the command line where the mistake is in an override.
    """
    whole = copy.deepcopy(tree)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UserError(f"override {override!r} is not of the form section.key=value")
        put(whole, key.split("."), parse_yaml(value, f"override {override!r}"), override)
    try:
        return section.model_validate(whole)
    except ValidationError as error:
        key, text = explain(error, _names(section))
        given = [override.partition("=")[0] for override in overrides]
        ours = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in given)
        # Keys that contradict each other have no single place: the file's, if it is wrong alone.
        at_fault = ours if key else given and _is_valid(section, tree)
        raise UserError(f"{'command line' if at_fault else where}: {text}") from None


def _is_valid(section: type[Section], tree: dict) -> bool:
    try:
        section.model_validate(tree)
    except ValidationError:
        return False
    return True


def _names(section: type[Section]) -> list[str]:
    """Whatever may be written before a colon or an equals sign, dotted."""
    names = list(section.model_fields)
    for key, field, _ in fields(section):
        names.append(key)
        if is_typeddict(field.annotation):
            names += [f"{key}.{name}" for name in field.annotation.__annotations__]
    return names


def only(tree: Section, kind: Kind) -> dict[str, Any]:
    """The keys of one kind, as a plain tree."""
    found: dict[str, Any] = {}
    whole = tree.model_dump(mode="json")
    for key, _, each in fields(type(tree)):
        if each is kind:
            *path, name = key.split(".")
            source, target = whole, found
            for part in path:
                source, target = source[part], target.setdefault(part, {})
            target[name] = source[name]
    return found


def to_yaml(tree: Section, *, comments: bool = False) -> str:
    """A tree of sections, one level deep, as YAML; with the documentation of each key behind it where asked for."""
    text = write_yaml(tree.model_dump(mode="json"))
    if not comments:
        return text
    documentation = {
        key: f"{field.description}{'' if kind is Kind.RESULT else f' ({kind.value})'}"
        for key, field, kind in fields(type(tree))
    }
    lines, section = [], ""
    for line in text.splitlines():
        name = line.strip().split(":")[0]
        section = section if line.startswith(" ") else f"{name}."
        key = section + name if line.startswith(" ") else name
        lines.append(f"{line}  # {documentation[key]}" if key in documentation else line)
    return "\n".join(lines) + "\n"
