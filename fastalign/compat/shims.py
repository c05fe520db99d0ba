"""What `run` puts right around a script: argparse's traps, and what is missing or refused with current libraries."""

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
from torch.nn.parallel import DistributedDataParallel

from fastalign.utils.errors import UserError


def install() -> None:
    """Put everything in place, in this process, once."""
    # timm's own readers (--resume, checkpoint_path) then take the authors' checkpoints: a bag of values, no code.
    torch.serialization.add_safe_globals([argparse.Namespace])
    _mend(argparse.ArgumentParser)
    VisionTransformer.pool = _pool_all(VisionTransformer.pool)
    DistributedDataParallel.__init__ = _without_cpu_ids(DistributedDataParallel.__init__)
    torch.jit.script = _no_modules(torch.jit.script)
    if importlib.util.find_spec("torchinfo") is None:
        module = types.ModuleType("torchinfo", "A summary in place of the package that is not installed.")
        module.summary = summary
        sys.modules["torchinfo"] = module


def parse_bool(text: str) -> bool:
    """yes or no; in argparse's ``type=bool`` every text but the empty one is True."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0", ""):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


class _Switch(argparse.Action):
    """store_true, and where the default is True already, with an optional value so that it can be switched off."""

    def __init__(self, option_strings, dest, default=False, required=False, help=None, **kwargs):
        super().__init__(
            option_strings, dest, nargs=0, const=True, default=default, required=required, help=help, **kwargs
        )
        if default:
            self.take_value()

    def take_value(self):
        self.nargs, self.type = "?", parse_bool

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, True if values == [] else values)


def _mend(parser: type[argparse.ArgumentParser]) -> None:
    """Mend the class itself, which argparse names in its own super() calls."""
    init, set_defaults = parser.__init__, parser.set_defaults

    def mended_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.register("type", bool, parse_bool)
        self.register("action", "store_true", _Switch)

    def mended_set_defaults(self, **kwargs):
        for action in self._actions:
            if isinstance(action, _Switch) and kwargs.get(action.dest):
                action.take_value()
        # A key that is no option is ignored without a word: usually a slip in a configuration.
        known = [action.dest for action in self._actions]
        for key in kwargs:
            if known and key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                warnings.warn(
                    f"the configuration's key {key!r} is no option of this script{hint}", stacklevel=2
                )
        set_defaults(self, **kwargs)

    parser.__init__, parser.set_defaults = mended_init, mended_set_defaults


def _pool_all(pool):
    """timm's pooling once gave a pooling layer every token; now it leaves prefix tokens out."""

    @functools.wraps(pool)
    def mended(self, x, pool_type=None):
        return pool(self, x, pool_type) if self.attn_pool is None else self.attn_pool(x)

    return mended


def _without_cpu_ids(init):
    """DDP takes device ids of GPUs only; scripts give it whatever --device says."""

    @functools.wraps(init)
    def mended(self, module, device_ids=None, *args, **kwargs):
        ids = [device for device in device_ids or [] if torch.device(device).type != "cpu"]
        init(self, module, ids or None, *args, **kwargs)

    return mended


def _no_modules(script):
    @functools.wraps(script)
    def mended(obj, *args, **kwargs):
        if isinstance(obj, nn.Module):
            raise UserError(
                "TorchScript of models is not supported: leave --torchscript out, use --torchcompile"
            )
        return script(obj, *args, **kwargs)

    return mended


def summary(model: nn.Module, *args, **kwargs) -> str:
    """The parameters of a model, in one line. Takes torchinfo's other arguments."""
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{type(model).__name__}: {count:,} parameters, {trained:,} of them trained"
