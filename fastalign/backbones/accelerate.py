"""Any timm ViT on our parts, in place.

A module keeps its parameters, buffers, hooks and name; only its class becomes a subclass of timm's with another
`forward`. So state dicts, copies, pickles, wrappers and `isinstance` are what they were.

The parts subclass timm's, so they are imported where they are used: importing timm takes a second.
"""

from torch import nn

from fastalign.backbones.spec import check_softcap
from fastalign.ops.attention.choice import check
from fastalign.utils.errors import UserError


def accelerate(
    model: nn.Module, *, softcap: float | None = None, backend: str = "auto", undo: bool = False
) -> nn.Module:
    """Swap the attention and stochastic depth of a timm ViT for ours, in place.

    The state dict stays the same; outputs and gradients too, to rounding, unless there is a cap. Call it again to
    change the cap or the implementation. Call it before torch.compile, DDP or FSDP.

    Args:
        model: a timm VisionTransformer, Eva, Beit or anything else made of their attention modules.
        softcap: logits s become ``softcap * tanh(s / softcap)``; None = plain attention. Attention pooling stays
            plain. The cap is not in the state dict: whoever loads one must set it again.
        backend: a name of `fastalign.ops.attention.BACKENDS`, used where it can do the case; "auto" = the fastest.
        undo: give timm's modules back instead.

    Returns:
        The model itself. `accelerated` tells what was swapped.

    Raises:
        UserError: a wrong argument; or the model has no attention of a known class, one of an unknown class, one
            whose forward was replaced, or with a cap one that drops attention weights. Nothing has been changed then.
    """
    from fastalign.backbones.timm_parts import FAST, TIMM, FastDropPath, FastSelfAttention, drops_paths

    _check(model, softcap, backend)
    for module in model.modules():
        theirs = TIMM.get(type(module), type(module))
        if theirs not in FAST:
            continue
        fast = not undo and (not issubclass(FAST[theirs], FastDropPath) or drops_paths(module))
        module.__class__ = FAST[theirs] if fast else theirs
        if isinstance(module, FastSelfAttention):
            module.softcap, module.backend = softcap, backend
    return model


def accelerated(model: nn.Module) -> dict[str, str]:
    """What `accelerate` swapped: the path of each module in the model, and timm's name of its class."""
    from fastalign.backbones.timm_parts import TIMM

    return {path: TIMM[type(part)].__name__ for path, part in model.named_modules() if type(part) in TIMM}


def _check(model: nn.Module, softcap: float | None, backend: str) -> None:
    from fastalign.backbones.timm_parts import FAST, TIMM, FastSelfAttention

    if not isinstance(model, nn.Module):
        raise UserError(f"accelerate: model must be a module such as timm.create_model makes, got {model!r}")
    check_softcap(softcap, "accelerate: ")
    try:
        check(backend)
    except ValueError as error:
        raise UserError(f"accelerate: backend: {error}") from error
    if type(model).__module__.startswith("fastalign.backbones"):
        raise UserError(f"accelerate: {type(model).__name__} is ours and has it all: set its softcap instead")
    known = 0
    for path, module in model.named_modules():
        if issubclass(FAST.get(TIMM.get(type(module), type(module)), object), FastSelfAttention):
            known += 1
            _check_attention(path, module, softcap)
        elif _is_attention(path, module):
            raise UserError(
                f"accelerate: {path} is {type(module).__module__}.{type(module).__qualname__}, an attention that "
                "fastalign has not got: leave the model as it is, or give the parts of it that have none"
            )
    if not known:
        raise UserError(
            f"accelerate: {type(model).__name__} has no attention of a timm VisionTransformer, Eva or Beit: "
            "leave it as it is"
        )


def _is_attention(path: str, module: nn.Module) -> bool:
    """Attention over the tokens by another class; pooling by attention is left as it is."""
    named = path.rpartition(".")[2] == "attn" or hasattr(module, "fused_attn")
    return named and not isinstance(module, nn.Identity) and "Pool" not in type(module).__name__


def _check_attention(path: str, module: nn.Module, softcap: float | None) -> None:
    if "forward" in vars(module):
        raise UserError(f"accelerate: the forward of {path} was replaced: take that back first")
    if softcap is not None and module.attn_drop.p > 0:
        from fastalign.backbones.timm_parts import refuse_cap

        refuse_cap(module, path)
