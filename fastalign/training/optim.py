"""Learning-rate schedule, seeds of updates and moving average."""

import math

import torch
from torch import Tensor, nn


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
