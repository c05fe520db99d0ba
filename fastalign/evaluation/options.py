"""Options of the evaluation commands: checked fields, and the flags of a command line that set them."""

import argparse
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fastalign.utils.errors import UserError
from fastalign.utils.paths import path_argument

Distinct = AfterValidator(lambda values: tuple(dict.fromkeys(values)))
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1), Distinct]
Precision = Literal["auto", "bf16", "fp32"]
Count = Annotated[int, Field(ge=1)]


class Options(BaseModel):
    """Named values that are checked when they are given.

    Raises:
        UserError: an unknown or invalid one; the message names its flag.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            value = values.get(first["loc"][0])
            shown = " ".join(map(str, value)) if isinstance(value, tuple | list) else value
            raise UserError(f"{flag(first['loc'][0])} {shown}: {first['msg']}") from None


def flag(name: str) -> str:
    """layer_decay -> --layer-decay"""
    return "--" + name.replace("_", "-")


def evaluation_parser(prog: str, description: str, *, data: str, output: str) -> argparse.ArgumentParser:
    """A parser with the flags that both commands have: the backbone, the data, the output."""
    parser = argparse.ArgumentParser(prog=f"python -m fastalign.{prog}", description=description)

    def refuse(message: str) -> None:
        raise UserError(f"{message}; --help lists the options")

    parser.error = refuse
    add = parser.add_argument
    add(
        "--backbone", required=True, type=path_argument, metavar="NAME_OR_RUN", help="timm name or run folder"
    )
    add("--data", required=True, type=path_argument, metavar="DATA", help=data)
    add("--weights", type=path_argument, help="of a timm name: pretrained (default), random, or a file")
    add("--kwargs", default="{}", metavar="YAML", help="timm's arguments, as in '{img_size: 336}'")
    add("--softcap", type=float, metavar="CAP", help="of a timm name's attention logits; default none")
    add("--output", type=path_argument, help=f"default {output}")
    return parser


def add_flags(parser: argparse.ArgumentParser, *models: type[Options]) -> None:
    """Adds a flag for each field; fields that are options themselves add theirs."""
    for model in models:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Options):
                add_flags(parser, field.annotation)
                continue
            default = "" if field.default in (None, "", False) else f" (default {field.default})"
            common = {"default": argparse.SUPPRESS, "help": f"{field.description or ''}{default}"}
            if field.annotation is bool:
                parser.add_argument(flag(name), action="store_true", **common)
                continue
            several = get_origin(field.annotation) is tuple
            kind = _plain_type(field.annotation)
            choices = (
                {"choices": get_args(kind)} if get_origin(kind) is Literal else {"type": kind, "metavar": "X"}
            )
            parser.add_argument(flag(name), nargs="+" if several else None, **choices, **common)


def from_flags(model: type[Options], given: argparse.Namespace) -> Any:
    """The options that a command line gives.

    Raises:
        UserError: a value out of range.
    """
    values = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Options):
            values[name] = from_flags(field.annotation, given)
        elif name in given:
            values[name] = getattr(given, name)
    return model(**values)


def _plain_type(annotation: Any) -> Any:
    """int, float, str or a Literal: the first type that an annotation is made of."""
    while get_origin(annotation) not in (None, Literal):
        annotation = get_args(annotation)[0]
    return annotation
