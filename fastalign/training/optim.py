"""Optimiser, learning-rate schedule and moving average."""

import importlib
import importlib.util
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastalign.training.sharding import like, local
from fastalign.utils.errors import UserError


def adamw(
    parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that are trained, with weight decay on all of them."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], device: torch.device, **options
) -> tuple[torch.optim.Optimizer, str | None]:
    """The optimiser of `optim.name`.

    Args:
        name: adamw (torch's, fused), apex_adam (the same update, by NVIDIA's apex) or apex_lamb.
        parameters: those without a gradient are left out.
        device: where they are.
        **options: lr, betas, weight_decay.

    Returns:
        The optimiser, and what the user should know about the choice, if anything.

    Raises:
        UserError: apex_lamb where apex does not run.
    """
    if name == "adamw":
        return adamw(parameters, **options), None
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    missing = _apex_is_missing(device)
    if name == "apex_adam" and missing:
        return adamw(
            trained, **options
        ), f"optim.name=apex_adam: {missing}: torch's fused AdamW, the same update"
    if missing:
        raise UserError(
            f"optim.name={name}: {missing}; build it from NVIDIA's repository with its C++ and CUDA extensions, "
            "or set optim.name=adamw"
        )
    apex = importlib.import_module("apex.optimizers")
    if name == "apex_adam":
        return apex.FusedAdam(trained, adam_w_mode=True, **options), None
    # Whoever steps has clipped the gradient already.
    return apex.FusedLAMB(trained, max_grad_norm=math.inf, **options), None


def _apex_is_missing(device: torch.device) -> str | None:
    """Why NVIDIA's apex cannot be used; None = it can. The package index has another project of that name."""
    if device.type != "cuda":
        return f"apex runs on GPUs only, not on a {device.type.upper()}"
    try:
        right = hasattr(importlib.import_module("apex.optimizers"), "FusedAdam")
    except Exception:  # whatever another project does when it is imported
        right = False
    if not right:
        return "NVIDIA's apex is not installed"
    if importlib.util.find_spec("amp_C") is None:
        return "apex is installed without its CUDA extensions"
    return None


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """torch.AdamW, apex.FusedAdam...: whose state a checkpoint holds."""
    return f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}"


def learning_rate(
    step: int, *, total: int, warmup: int, lr: float, min_lr: float, start: float | None = None
) -> float:
    """The rate of update `step` (from 0): linear from `start` over `warmup` updates, then the cosine to `min_lr`.

    `start` is `min_lr` where it is not given.

    The cosine runs over all `total` updates and the warm-up covers its beginning, as timm's schedule does.
    """
    if step < warmup:
        start = min_lr if start is None else start
        return start + (lr - start) * step / warmup
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * min(step, total) / total))


def seed_update(seed: int, step: int, rank: int) -> None:
    """Seed torch's generator for an update: stochastic depth draws from it, and a resumed run draws the same."""
    number = ((seed * 1_000_003 + step) * 65_536 + rank) % 2**63
    # torch.manual_seed, but for GPUs that are not in use: it formats a stack trace for each kind, milliseconds.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Update the weights, or leave them and the moments as they are.

    torch's fused AdamW decides on the device, as it does for torch's gradient scaler; other optimisers make the host
    wait for the answer.

    Args:
        optimizer: whose gradients are ready.
        skip: [] bool on the device.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = skip.float()
        optimizer.step()
    elif not skip.item():
        optimizer.step()


class MovingAverage:
    """An exponential moving average of a module's parameters and buffers, fp32; split among ranks as they are.

    Args:
        module: what is averaged; its state dict gives the names.
        decay: share of the old average that each update keeps.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._live = [local(value.detach()) for value in module.state_dict().values()]
        self.state = {name: value.detach().clone().float() for name, value in module.state_dict().items()}
        self._average = [local(value) for value in self.state.values()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights in."""
        torch._foreach_lerp_(self._average, self._live, 1 - self.decay)

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved average, whose tensors are whole."""
        for name, value in self.state.items():
            value.copy_(like(state[name], value))
