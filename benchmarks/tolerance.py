"""When a kernel is right: the one rule of the tests and the benchmarks."""

import torch
from torch import Tensor


def errors(found: Tensor, truth: Tensor) -> Tensor:
    """[2] float64: the Euclidean and the largest error, each relative to the same norm of the truth."""
    if truth.numel() == 0:
        return torch.zeros(2, dtype=torch.float64, device=truth.device)
    truth = truth.detach().double().flatten()
    difference = found.detach().double().flatten() - truth
    norms = [(difference.norm(), truth.norm()), (difference.abs().max(), truth.abs().max())]
    return torch.stack([error / norm.clamp_min(1e-30) for error, norm in norms])


def allowed(eager: Tensor, dtype: torch.dtype) -> Tensor:
    """[2] float64: at most twice the error of eager PyTorch in the same dtype, plus a few roundings.

    One rounding of the result's dtype, and sixteen of fp32, in which statistics and sums are kept: a kernel may
    take them in another order than eager PyTorch, which in fp32 is all the difference there is.

    Args:
        eager: `errors` of the reference from the same inputs in the same dtype.
        dtype: of the result.
    """
    return 2 * eager + torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
