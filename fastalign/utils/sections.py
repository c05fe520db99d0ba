"""Typed configuration sections: declared as classes, read from YAML and overrides, written with documentation."""

import copy
import re
from collections.abc import Iterable, Iterator
from enum import Enum
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from fastalign.utils.errors import UserError, unknown
from fastalign.utils.files import user_path

_Tree = TypeVar("_Tree", bound="Section")
_BRANCH = re.compile(r"float|bool|constrained-\w+|literal\[.*")  # a union's branch in an error's location


class Kind(Enum):
    """Whether a key may change when a run resumes. The value is a remark in the key's documentation."""

    RESULT = "decides the result"
    FREE = "may change when a run resumes"
    GROWS = "may change when a run resumes, but not below the steps done"


class Section(BaseModel):
    """A group of keys; a key's kind is its annotation (`Annotated[int, Kind.FREE]`), else the section's."""

    kind: ClassVar[Kind] = Kind.RESULT
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_true_as_one(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for the number 1."""
        kinds = set(re.findall(r"\w+", str(cls.model_fields[info.field_name].annotation)))
        if isinstance(value, bool) and kinds & {"int", "float"} and "bool" not in kinds:
            raise ValueError("give a number")
        return value


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo, Kind]]:
    """Every dotted key with its field and its kind."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            kinds = (each for each in field.metadata if isinstance(each, Kind))
            yield prefix + name, field, next(kinds, section.kind)


def resolve(section: type[_Tree], tree: dict, overrides: list[str], where: str | Path) -> _Tree:
    """The typed tree of a plain one, with `key=value` overrides; an override of a section is merged into it.

    A UserError names the file `where`, or the command line if an override may be wrong.
    """
    merged, given, names = copy.deepcopy(tree), [], [name for name, _, _ in fields(section)]

    def assign(key: str, value: Any, override: str) -> None:
        if isinstance(value, dict) and any(name.startswith(f"{key}.") for name in names):
            for name, inner in value.items():
                assign(f"{key}.{name}", inner, override)
        else:
            set_key(merged, key.split("."), value, override)

    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UserError(f"override {override!r} is not of the form section.key=value")
        assign(key, parse_yaml(value, f"override {override!r:.80}"), override)
        given.append(key)
    try:
        return section.model_validate(merged)
    except ValidationError as error:
        key, text = explain(error, [*section.model_fields, *names])
        if any(not key or f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in given):
            where = "command line"
        raise UserError(f"{where}: {text}") from None


def explain(error: ValidationError, names: Iterable[str]) -> tuple[str, str]:
    """The first wrong key ("" for a conflict) and the message, with the nearest of `names` to an unknown key."""
    errors = error.errors()
    kind, value, loc = (errors[0][part] for part in ("type", "input", "loc"))
    parts = tuple(part for part in loc if isinstance(part, str) and not _BRANCH.fullmatch(part))
    key = ".".join(parts)
    if kind == "extra_forbidden":
        return key, unknown("key", key, names)
    if kind == "string_type":
        text = f"YAML reads this value as {value!r}, not as text; put it in quotes"
        return key, f"{key}: {text} (in a shell: \"{key}='...'\")"
    same = (each["msg"] for each in errors if each["loc"][: len(parts)] == parts)
    texts = [text.removeprefix("Value error, ") for text in same]
    return key, f"{key}: {', or: '.join(dict.fromkeys(texts))}, got {value!r}" if key else texts[0]


def get_key(tree: dict, key: str) -> Any:
    """The value of a dotted key in nested dictionaries."""
    return reduce(dict.__getitem__, key.split("."), tree)


def set_key(tree: dict, path: list[str], value: Any, override: str = "") -> None:
    """Set a key of nested dictionaries; UserError about `override` if part of the path is not a section."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {name} is not a section")
    tree[path[-1]] = value


def merge(base: dict, top: dict) -> dict:
    """The tree `base` with the values of `top` merged over it."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def select(config: Section, kind: Kind) -> dict[str, Any]:
    """The keys of one kind, as nested dictionaries."""
    selected: dict[str, Any] = {}
    plain = config.model_dump(mode="json")
    for key, _, each in fields(type(config)):
        if each is kind:
            set_key(selected, key.split("."), get_key(plain, key))
    return selected


def to_yaml(config: Section, *, comments: bool = False) -> str:
    """The configuration as YAML; with `comments`, each key is followed by its documentation."""
    text = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)
    if not comments:
        return text
    documentation = {
        key: f"  # {field.description}{_choices(field)}{'' if kind is Kind.RESULT else f' ({kind.value})'}"
        for key, field, kind in fields(type(config))
    }
    lines, path = [], []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path[depth:] = [line.strip().split(":")[0]]
        lines.append(line + documentation.get(".".join(path), "") + "\n")
    return "".join(lines)


def _choices(field: FieldInfo) -> str:
    """The allowed values of a key, if there are few, such as " [linear | mlp]"."""
    kinds = [field.annotation, *get_args(field.annotation)]
    values = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    values = ["true", "false", *values] if values and bool in kinds else values
    return f" [{' | '.join(map(str, values))}]" if values else ""


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """The mapping in a YAML file, merged over that of its `base`, if any; UserError if the file has none."""
    if not path.is_file():
        raise UserError(f"no recipe at {path}: check the path, or give a name that `fastalign recipes` lists")
    if path.resolve() in seen:
        raise UserError(f"{path}: its bases form a cycle")
    tree = parse_yaml(path.read_bytes(), str(path))
    tree = {} if tree is None else tree  # an empty file
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: base must be the path of another recipe, got {base!r:.80}")
    return merge(read_yaml(path.parent / user_path(base), (*seen, path.resolve())), tree)


def parse_yaml(text: str | bytes, where: str) -> Any:
    """The value of a YAML text; UserError about `where` if it is not YAML."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """Plain values only: no aliases, which let a short text grow without bound, and no key twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias at line {line}: write the value out")
        node = super().compose_node(parent, index)
        names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
            raise yaml.YAMLError(f"the key {twice} twice in the mapping at line {line}: remove one")
        return node


class _Dumper(yaml.SafeDumper):
    """Sections in blocks, lists on one line."""


# In YAML 1.1, 1e-5 is a string; in YAML 1.2, JSON and Python it is a number.
_EXPONENTIAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENTIAL, list("-+.0123456789"))
_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)
