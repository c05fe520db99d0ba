"""What `run` corrects for a script: argparse's traps, and features that current libraries changed or dropped."""

import argparse
import difflib
import functools
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastalign.utils.errors import UserError


def install() -> None:
    """Install all corrections in this process."""
    # timm's own readers (--resume, checkpoint_path) then accept the authors' checkpoints: plain values, no code.
    torch.serialization.add_safe_globals([argparse.Namespace])
    _wrap(argparse.ArgumentParser, "__init__", _init_parser)
    _wrap(argparse.ArgumentParser, "set_defaults", _set_defaults)
    _wrap(VisionTransformer, "pool", _pool_all)
    _wrap(DistributedDataParallel, "__init__", _without_cpu_ids)
    _wrap(torch.jit, "script", _refuse_models)
    if importlib.util.find_spec("torchinfo") is None:
        sys.modules["torchinfo"] = types.ModuleType("torchinfo", "A stand-in for the missing package.")
        sys.modules["torchinfo"].summary = summary


def _wrap(owner: object, name: str, wrap: Callable[[Callable], Callable]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(wrap(original)))


def parse_bool(text: str) -> bool:
    """yes or no; with argparse's ``type=bool`` every text except the empty one is True."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0", ""):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


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
    def wrapped(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.register("type", bool, parse_bool)
        self.register("action", "store_true", _Switch)

    return wrapped


def _set_defaults(set_defaults):
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

    def wrapped(self, x, pool_type=None):
        return pool(self, x, pool_type) if self.attn_pool is None else self.attn_pool(x)

    return wrapped


def _without_cpu_ids(init):
    """DDP accepts device ids of GPUs only; scripts pass whatever --device says."""

    def wrapped(self, module, device_ids=None, *args, **kwargs):
        ids = [device for device in device_ids or [] if torch.device(device).type != "cpu"]
        init(self, module, ids or None, *args, **kwargs)

    return wrapped


def _refuse_models(script):
    def wrapped(obj, *args, **kwargs):
        if isinstance(obj, nn.Module):
            raise UserError(
                "TorchScript of models is not supported: leave out --torchscript, or use --torchcompile"
            )
        return script(obj, *args, **kwargs)

    return wrapped


def summary(model: nn.Module, *args, **kwargs) -> str:
    """The number of parameters of a model, in one line. Accepts torchinfo's other arguments."""
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{type(model).__name__}: {count:,} parameters, {trained:,} of them trained"
