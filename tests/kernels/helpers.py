"""Random inputs of kernels."""

import torch
from torch import Tensor

from tests.numerics import DEVICE


def some(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype)


def mask(images: int, copies: int, patches: int) -> Tensor:
    """Random, with an all-hidden and an all-visible copy if the shape allows."""
    visible = torch.rand(images, copies, patches, device=DEVICE) < 0.5
    visible[:1, :1], visible[-1:, -1:] = False, True
    return visible
