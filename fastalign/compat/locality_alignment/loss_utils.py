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

    def __init__(
        self, distribution: type, mask_size: int, antithetical_sampling: bool, include_null: bool, **options
    ):
        self.mask_size = mask_size
        self.antithetical_sampling, self.include_null = antithetical_sampling, include_null
        self._distribution, self._options, self._drawn = distribution, options, 0

    def _seeded(self, rows: int, generator: np.random.Generator) -> np.ndarray | None:
        """[rows, N] bool: NumPy's draws, as in the authors' runs; None = draw as without a seed."""
        return None

    def __call__(self, batch_size: int, seed: int | None = None) -> Tensor:
        """Draw masks.

        Args:
            batch_size: B, images.
            seed: for masks that are the same at every call, as in validation.

        Returns:
            [B (1 + a + b), N] fp32 of 0 and 1, where a = 1 with complements and b = 1 with the full mask.
        """
        masks = self._distribution(
            complement=bool(self.antithetical_sampling),
            full=bool(self.include_null),
            seed=torch.initial_seed() % 2**63 if seed is None else seed,
            **self._options,
        )
        if seed is None:
            ids, epoch = torch.arange(self._drawn, self._drawn + batch_size), 0
            self._drawn += batch_size
        elif (rows := self._seeded(batch_size * masks.copies, np.random.default_rng(seed))) is not None:
            sample = torch.from_numpy(rows)[:: masks.copies]
            stack = [sample, ~sample, torch.ones_like(sample)]
            kept = [True, masks.complement, masks.full]
            return (
                torch.stack([x for x, keep in zip(stack, kept, strict=True) if keep], 1).flatten(0, 1).float()
            )
        else:
            ids, epoch = torch.arange(batch_size), EVAL_EPOCH
        return masks(ids, self.mask_size, epoch).flatten(0, 1).float()


class UniformMaskSampler(_Sampler):
    """The number of visible patches is uniform on 0..N.

    Args:
        mask_size: N.
        antithetical_sampling: add the complement of each sample.
        include_null: add the mask that hides nothing.
    """

    def __init__(self, mask_size: int, antithetical_sampling: bool = True, include_null: bool = True):
        super().__init__(UniformMasks, mask_size, antithetical_sampling, include_null)

    def _seeded(self, rows: int, generator: np.random.Generator) -> np.ndarray:
        draws = generator.uniform(size=(rows, self.mask_size + 1))
        return draws[:, 1:] > draws[:, :1]


class BernoulliMaskSampler(_Sampler):
    """Each patch is visible with probability `mask_ratio`. Other arguments as for `UniformMaskSampler`."""

    def __init__(
        self,
        mask_size: int,
        mask_ratio: float = 0.5,
        antithetical_sampling: bool = True,
        include_null: bool = True,
    ):
        if not 0 <= mask_ratio <= 1:
            raise ArgumentError(f"BernoulliMaskSampler: mask_ratio must lie in 0..1, got {mask_ratio}")
        super().__init__(BernoulliMasks, mask_size, antithetical_sampling, include_null, ratio=mask_ratio)
        self.mask_ratio = mask_ratio

    def _seeded(self, rows: int, generator: np.random.Generator) -> np.ndarray:
        return generator.uniform(size=(rows, self.mask_size)) < self.mask_ratio


class BlockwiseMaskSampler(_Sampler):
    """Visible rectangles until the visible share reaches `target_ratio`. Other arguments as for `UniformMaskSampler`.

    With a seed too it draws from `fastalign.BlockwiseMasks`: the authors' distribution, not their bits.
    """

    def __init__(
        self,
        mask_size: int,
        target_ratio: float = 0.4,
        antithetical_sampling: bool = True,
        include_null: bool = True,
    ):
        if math.isqrt(mask_size) ** 2 != mask_size:
            raise ArgumentError(f"BlockwiseMaskSampler: mask_size must be a square number, got {mask_size}")
        if not 0 < target_ratio < 1:
            raise ArgumentError(
                f"BlockwiseMaskSampler: target_ratio must lie between 0 and 1, both excluded, got {target_ratio}"
            )
        super().__init__(BlockwiseMasks, mask_size, antithetical_sampling, include_null, ratio=target_ratio)
        self.target_ratio, self.mask_side = target_ratio, math.isqrt(mask_size)
