"""Mask samplers: float masks [B (1 + a + b), N], 1 = visible, image by image: sample, complement, full."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastalign.method.masks import BernoulliMasks, BlockwiseMasks, UniformMasks
from fastalign.utils.random import EVAL_EPOCH


class _Sampler:
    """Without a seed, masks follow `torch.manual_seed` and the images drawn so far; with one, the seed alone."""

    _draw = None  # (rows, generator) -> [rows, N] bool: NumPy's draws, as in the authors' runs; None: ours

    def _build(self, kind: type, mask_size: int, pair: bool, null: bool, **options: float) -> None:
        self.mask_size, self.antithetical_sampling, self.include_null = mask_size, bool(pair), bool(null)
        self._masks, self._drawn = kind(self.antithetical_sampling, self.include_null, **options), 0

    def __call__(self, batch_size: int, seed: int | None = None) -> Tensor:
        """Masks of B = `batch_size` images, fp32; with a seed, as in validation, the same at every call."""
        masks, ids, epoch = self._masks, torch.arange(batch_size), EVAL_EPOCH
        if seed is None:
            ids, epoch, seed = ids + self._drawn, 0, torch.initial_seed() % 2**63
            self._drawn += batch_size
        elif self._draw:
            rows = self._draw(batch_size * masks.copies, np.random.default_rng(seed))
            sample = torch.from_numpy(rows)[:: masks.copies]
            stack = [sample, *[~sample] * masks.complement, *[torch.ones_like(sample)] * masks.full]
            return torch.stack(stack, 1).flatten(0, 1).float()
        return replace(masks, seed=seed)(ids, self.mask_size, epoch).flatten(0, 1).float()


class UniformMaskSampler(_Sampler):
    """The number of visible patches is uniform on 0..N = `mask_size`.

    `antithetical_sampling` adds the complement of each sample, `include_null` the mask that hides nothing.
    """

    def __init__(self, mask_size: int, antithetical_sampling=True, include_null=True):
        self._build(UniformMasks, mask_size, antithetical_sampling, include_null)

    def _draw(self, rows: int, generator: np.random.Generator) -> np.ndarray:
        draws = generator.uniform(size=(rows, self.mask_size + 1))
        return draws[:, 1:] > draws[:, :1]


class BernoulliMaskSampler(_Sampler):
    """Each patch is visible with probability `mask_ratio`. Other arguments as for `UniformMaskSampler`."""

    def __init__(self, mask_size: int, mask_ratio=0.5, antithetical_sampling=True, include_null=True):
        self._build(BernoulliMasks, mask_size, antithetical_sampling, include_null, ratio=mask_ratio)
        self.mask_ratio = mask_ratio

    def _draw(self, rows: int, generator: np.random.Generator) -> np.ndarray:
        return generator.uniform(size=(rows, self.mask_size)) < self.mask_ratio


class BlockwiseMaskSampler(_Sampler):
    """Visible rectangles until the visible share reaches `target_ratio`. Other arguments as for `UniformMaskSampler`.

    With a seed too it draws from `fastalign.BlockwiseMasks`: the authors' distribution, not their bits.
    """

    def __init__(self, mask_size: int, target_ratio=0.4, antithetical_sampling=True, include_null=True):
        self._build(BlockwiseMasks, mask_size, antithetical_sampling, include_null, ratio=target_ratio)
        self.target_ratio = target_ratio
