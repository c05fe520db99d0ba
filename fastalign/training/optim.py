"""Optimizer, learning-rate schedule and moving average."""

import importlib
import math
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor, nn

from fastalign.utils.errors import UserError


def adamw(parameters: Iterable[nn.Parameter], **options) -> torch.optim.AdamW:
    """Fused AdamW over the trained parameters, all of them with weight decay; `options`: lr, betas, weight_decay."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], fused=True, **options)


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], device: torch.device, **options
) -> tuple[torch.optim.Optimizer, list[str]]:
    """The optimizer of `optim.name` over the trained parameters, and lines for the user."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    apex = None if name == "adamw" else _import_apex(device)
    if apex is None:
        missing = f"optim.name={name}: NVIDIA's apex with its CUDA extensions and a GPU are needed"
        if name == "apex_lamb":
            raise UserError(f"{missing}; build it from NVIDIA's repository, or set optim.name=adamw")
        notes = [f"{missing}: torch's fused AdamW, the same update"] if name == "apex_adam" else []
        return adamw(trained, **options), notes
    if name == "apex_adam":
        return apex.FusedAdam(trained, adam_w_mode=True, **options), []
    return apex.FusedLAMB(trained, max_grad_norm=math.inf, **options), []  # the gradient is clipped before


def _import_apex(device: torch.device) -> ModuleType | None:
    """NVIDIA's `apex.optimizers`, None if it cannot be used. The package index has another project called apex."""
    try:
        importlib.import_module("amp_C")  # its CUDA extensions
        return importlib.import_module("apex.optimizers") if device.type == "cuda" else None
    except Exception:  # whatever another project raises when it is imported
        return None


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """torch.AdamW, apex.FusedAdam...: whose state a checkpoint holds."""
    return f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}"


def learning_rate(
    step: int, *, total: int, warmup: int, lr: float, min_lr: float, start: float | None = None
) -> float:
    """timm's schedule: linear from `start` (default `min_lr`) over `warmup` updates, then the cosine to `min_lr`.

    The cosine runs over all `total` updates; the warm-up replaces its beginning. `step` counts from 0.
    """
    if step < warmup:
        start = min_lr if start is None else start
        return start + (lr - start) * step / warmup
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * min(step, total) / total))


def seed_update(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for an update (stochastic depth), so that a resumed run draws the same numbers."""
    number = ((seed * 1_000_003 + step) * 65_536 + rank) % 2**63
    # Not torch.manual_seed, which takes milliseconds for backends that are not in use.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Update the weights unless `skip`, a [] bool on the device, is true; then weights and moments stay.

    torch's fused AdamW decides on the device, as with a gradient scaler; for other optimizers the host waits.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = skip.float()
        optimizer.step()
    elif not skip.item():
        optimizer.step()


class MovingAverage:
    """An exponential moving average of a module's parameters and buffers in fp32."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._live = [value.detach() for value in module.state_dict().values()]
        self.state = {name: value.detach().clone().float() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's current weights."""
        torch._foreach_lerp_(list(self.state.values()), self._live, 1 - self.decay)

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved average."""
        for name, value in self.state.items():
            value.copy_(state[name])
