"""Optimiser, learning-rate schedule and moving average."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def adamw(
    parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that are trained, with weight decay on all of them."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def learning_rate(step: int, *, total: int, warmup: int, lr: float, min_lr: float) -> float:
    """The rate of update `step` (from 0): linear from `min_lr` over `warmup` updates, then the cosine to `min_lr`.

    The cosine runs over all `total` updates and the warm-up covers its beginning, as timm's schedule does.
    """
    if step < warmup:
        return min_lr + (lr - min_lr) * step / warmup
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * min(step, total) / total))


class MovingAverage:
    """An exponential moving average of a module's parameters and buffers, fp32.

    Args:
        module: what is averaged; its state dict gives the names.
        decay: share of the old average that each update keeps.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._live = [value.detach() for value in module.state_dict().values()]
        self.state = {name: value.detach().clone().float() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights in."""
        torch._foreach_lerp_(list(self.state.values()), self._live, 1 - self.decay)

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved average."""
        for name, value in self.state.items():
            value.copy_(state[name])
