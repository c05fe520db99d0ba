"""What `run` corrects for a script: argparse's traps, and features that current libraries changed or dropped."""

import argparse
import difflib
import functools
import importlib.util
import sys
import types
import warnings

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def install() -> None:
    """Install all corrections in this process."""
    # timm's own readers (--resume, checkpoint_path) then accept the authors' checkpoints: plain values, no code.
    torch.serialization.add_safe_globals([argparse.Namespace])
    parser = argparse.ArgumentParser
    parser.__init__ = _init_parser(parser.__init__)
    parser.set_defaults = _set_defaults(parser.set_defaults)
    VisionTransformer.pool = _pool_all(VisionTransformer.pool)
    if importlib.util.find_spec("torchinfo") is None:
        sys.modules["torchinfo"] = types.SimpleNamespace(summary=_summary)


def _summary(model: nn.Module, *args, **kwargs) -> str:
    """The number of parameters, in place of torchinfo's table."""
    return f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters"


def parse_bool(text: str) -> bool:
    """yes or no; with argparse's ``type=bool`` every text except the empty one is True."""
    words = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(
        ("false", "no", "off", "0"), False
    )
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return words[text.lower()]


class _Switch(argparse.Action):
    """store_true; if the default is already True, with an optional value that can switch it off."""

    def __init__(self, option_strings, dest, default=False, **kwargs):
        super().__init__(option_strings, dest, nargs=0, const=True, default=default, **kwargs)
        if default:
            self.take_value()

    def take_value(self):
        self.nargs, self.type = "?", parse_bool

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, True if values == [] else values)


def _init_parser(init):
    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.register("type", bool, parse_bool)
        self.register("action", "store_true", _Switch)

    return wrapped


def _set_defaults(set_defaults):
    @functools.wraps(set_defaults)
    def wrapped(self, **kwargs):
        for action in self._actions:
            if isinstance(action, _Switch) and kwargs.get(action.dest):
                action.take_value()
        # argparse silently accepts a key that is not an option: usually a typo in a configuration.
        known = [action.dest for action in self._actions]
        for key in kwargs:
            if known and key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                text = f"the configuration's key {key!r} is not an option of this script{hint}"
                warnings.warn(text, stacklevel=2)
        set_defaults(self, **kwargs)

    return wrapped


def _pool_all(pool):
    """timm's pooling layers used to read every token; now they leave prefix tokens out."""

    @functools.wraps(pool)
    def wrapped(self, x, pool_type=None):
        return pool(self, x, pool_type) if self.attn_pool is None else self.attn_pool(x)

    return wrapped
