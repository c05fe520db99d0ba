"""Mask samplers: float masks [B (1 + a + b), N], 1 = visible, image by image: sample, complement, full."""

import math

import numpy as np
import torch
from torch import Tensor

from fastalign.compat.errors import ArgumentError
from fastalign.method.masks import BernoulliMasks, BlockwiseMasks, UniformMasks
from fastalign.utils.random import EVAL_EPOCH


class _Sampler:
    """Without a seed, masks follow `torch.manual_seed` and the images drawn so far; with one, the seed alone."""

    def __init__(self, mask_size: int, antithetical_sampling: bool, include_null: bool):
        self.mask_size = mask_size
        self.antithetical_sampling, self.include_null = antithetical_sampling, include_null
        self._drawn = 0

    def _distribution(self, **options):
        """The distribution of `fastalign.method.masks`."""
        raise NotImplementedError

    def _seeded(self, rows: int, seed: int) -> Tensor | None:
        """[rows, N] bool, of which every copies-th is used: NumPy's draws, as in the authors' runs; None = ours."""
        return None

    def __call__(self, batch_size: int, seed: int | None = None) -> Tensor:
        """Draw masks.

        Args:
            batch_size: B, images.
            seed: for masks that are the same at every call, as in validation.

        Returns:
            [B (1 + a + b), N] fp32 of 0 and 1, where a = 1 with complements and b = 1 with the full mask.
        """
        options = {"complement": bool(self.antithetical_sampling), "full": bool(self.include_null)}
        if seed is None:
            masks = self._distribution(**options, seed=torch.initial_seed() % 2**63)
            ids = torch.arange(self._drawn, self._drawn + batch_size)
            self._drawn += batch_size
            return masks(ids, self.mask_size).flatten(0, 1).float()
        masks = self._distribution(**options, seed=seed)
        sample = self._seeded(batch_size * masks.copies, seed)
        if sample is None:
            return masks(torch.arange(batch_size), self.mask_size, EVAL_EPOCH).flatten(0, 1).float()
        stack = [sample[:: masks.copies]]
        if masks.complement:
            stack.append(~stack[0])
        if masks.full:
            stack.append(torch.ones_like(stack[0]))
        return torch.stack(stack, 1).flatten(0, 1).float()


class UniformMaskSampler(_Sampler):
    """The number of visible patches is uniform on 0..N.

    Args:
        mask_size: N.
        antithetical_sampling: add the complement of each sample.
        include_null: add the mask that hides nothing.
    """

    def __init__(self, mask_size: int, antithetical_sampling: bool = True, include_null: bool = True):
        super().__init__(mask_size, antithetical_sampling, include_null)

    def _distribution(self, **options):
        return UniformMasks(**options)

    def _seeded(self, rows: int, seed: int) -> Tensor:
        draws = np.random.default_rng(seed).uniform(size=(rows, self.mask_size + 1))
        return torch.from_numpy(draws[:, 1:] > draws[:, :1])


class BernoulliMaskSampler(_Sampler):
    """Each patch visible with probability `mask_ratio`. Other arguments as for `UniformMaskSampler`."""

    def __init__(
        self,
        mask_size: int,
        mask_ratio: float = 0.5,
        antithetical_sampling: bool = True,
        include_null: bool = True,
    ):
        super().__init__(mask_size, antithetical_sampling, include_null)
        self.mask_ratio = mask_ratio
        if not 0 <= mask_ratio <= 1:
            raise ArgumentError(f"BernoulliMaskSampler: mask_ratio must lie in 0..1, got {mask_ratio}")

    def _distribution(self, **options):
        return BernoulliMasks(**options, ratio=self.mask_ratio)

    def _seeded(self, rows: int, seed: int) -> Tensor:
        return torch.from_numpy(
            np.random.default_rng(seed).uniform(size=(rows, self.mask_size)) < self.mask_ratio
        )


class BlockwiseMaskSampler(_Sampler):
    """Visible rectangles until the visible share reaches `target_ratio`. Other arguments as for `UniformMaskSampler`.

    Always drawn by `fastalign.BlockwiseMasks`: the authors' distribution, not their bits.
    """

    def __init__(
        self,
        mask_size: int,
        target_ratio: float = 0.4,
        antithetical_sampling: bool = True,
        include_null: bool = True,
    ):
        super().__init__(mask_size, antithetical_sampling, include_null)
        self.target_ratio, self.mask_side = target_ratio, math.isqrt(mask_size)
        if self.mask_side**2 != mask_size:
            raise ArgumentError(f"BlockwiseMaskSampler: mask_size must be a square number, got {mask_size}")
        if not 0 < target_ratio < 1:
            raise ArgumentError(
                f"BlockwiseMaskSampler: target_ratio must lie between 0 and 1, both excluded, got {target_ratio}"
            )

    def _distribution(self, **options):
        return BlockwiseMasks(**options, ratio=self.target_ratio)
