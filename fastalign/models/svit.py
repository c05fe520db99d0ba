"""The authors' model names: `svit_X` is timm's `vit_X` with capped attention logits."""

AUTHORS_SOFTCAP = 30.0
_CAPPED, _PLAIN = "svit_", "vit_"


def uncapped(name: str, kwargs: dict) -> tuple[str, dict, float | None]:
    """timm's name and arguments for a name that may be one of the authors'.

    Args:
        name: timm's, or `svit_...`, which may come with their argument `max_attn_val`.
        kwargs: arguments of the model.

    Returns:
        timm's name, the arguments without `max_attn_val`, and the soft-cap; None for a name of timm's.
    """
    if not name.startswith(_CAPPED):
        return name, kwargs, None
    rest = {key: value for key, value in kwargs.items() if key != "max_attn_val"}
    return _PLAIN + name.removeprefix(_CAPPED), rest, float(kwargs.get("max_attn_val", AUTHORS_SOFTCAP))
