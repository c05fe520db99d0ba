"""The authors' model names: `svit_X` is timm's `vit_X` with capped attention logits."""

import math
from typing import Any

from fastalign.utils.errors import UserError

AUTHORS_SOFTCAP = 30.0
_CAPPED, _PLAIN = "svit_", "vit_"


def uncapped(name: str, kwargs: dict) -> tuple[str, dict, float | None]:
    """timm's name and arguments for a name that may be one of the authors'.

    Args:
        name: timm's, or `svit_...`, which may come with their argument `max_attn_val`.
        kwargs: arguments of the model.

    Returns:
        timm's name, the arguments without `max_attn_val`, and the soft-cap; None for a name of timm's.

    Raises:
        UserError: `max_attn_val` is no positive number.
    """
    if not name.startswith(_CAPPED):
        return name, kwargs, None
    cap = kwargs.get("max_attn_val", AUTHORS_SOFTCAP)
    if not is_cap(cap):
        raise UserError(
            f"max_attn_val must be a positive number, got {cap!r}: give one, or leave it out for 30"
        )
    rest = {key: value for key, value in kwargs.items() if key != "max_attn_val"}
    return _PLAIN + name.removeprefix(_CAPPED), rest, float(cap)


def is_cap(value: Any) -> bool:
    """Can attention logits be capped at it: a positive finite number?"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def check_recipe(student: str, student_kwargs: dict, teacher: str | None, teacher_kwargs: dict) -> None:
    """Only `teacher.name` may be one of the authors' names: the student's cap has a key, and is not the teacher's.

    Raises:
        ValueError: a cap that the run would not read, or would read for both.
    """
    if student.startswith(_CAPPED):
        plain = _PLAIN + student.removeprefix(_CAPPED)
        raise ValueError(f"student.name={student}: write {plain} and student.softcap={AUTHORS_SOFTCAP:g}")
    if "max_attn_val" in student_kwargs:
        raise ValueError("student.kwargs.max_attn_val: write student.softcap instead")
    if "max_attn_val" in teacher_kwargs and not (teacher or "").startswith(_CAPPED):
        raise ValueError("teacher.kwargs.max_attn_val goes with teacher.name=svit_... only: remove it")
