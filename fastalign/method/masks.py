"""Mask distributions. A mask is True where the patch is visible.

Every distribution is called as ``masks(sample_ids, num_patches, epoch=0)`` and returns [B, M, N] bool on the device
of `sample_ids`: one sample, then, if requested, its complement and the full mask. A mask is a pure function of
(seed, epoch, sample id): the same on every device, for every number of ranks and after every resume. Source: Covert
et al., ICLR 2025.

The PyTorch code here is the definition. The extension in `csrc/`, if installed, draws the same bits.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign import ops
from fastalign.ops import extension
from fastalign.ops.reference import Packing
from fastalign.utils.random import Stream, random_uniform, random_words

MIN_BLOCK_PATCHES = 16
MAX_BLOCKS = 64


@dataclass(frozen=True)
class _Masks:
    """The base class. Subclasses define ``sample(sample_ids, grid, epoch)``: [B, N] bool, one draw per image."""

    complement: bool = True  # add the complement of each sample (antithetical sampling)
    full: bool = True  # add the mask that hides nothing
    seed: int = 0

    @property
    def copies(self) -> int:
        """M, masks per image."""
        return 1 + self.complement + self.full

    def __call__(self, sample_ids: Tensor, num_patches: int | tuple[int, int], epoch: int = 0) -> Tensor:
        """Masks [B, M, N] bool, True = visible.

        Args:
            sample_ids: [B] int64.
            num_patches: N, or the grid (rows, columns).
            epoch: 0..2^32-1; `fastalign.utils.random.EVAL_EPOCH` for evaluation.
        """
        grid = self._grid(num_patches)
        if (arguments := self._for_extension(sample_ids, grid, epoch)) is None:
            return self.eager(sample_ids, grid, epoch)
        return torch.ops.fastalign.draw_masks(*arguments)

    def eager(self, sample_ids: Tensor, num_patches: int | tuple[int, int], epoch: int = 0) -> Tensor:
        """The same masks in PyTorch operations, whether or not the extension is installed."""
        sample = self.sample(sample_ids, self._grid(num_patches), epoch)
        stack = [sample, *[~sample] * self.complement, *[torch.ones_like(sample)] * self.full]
        return torch.stack(stack, dim=1)

    def packed(
        self, sample_ids: Tensor, num_patches: int | tuple[int, int], prefix: int, epoch: int = 0
    ) -> tuple[Tensor, Packing]:
        """Masks, and the packing of their visible tokens, with P = `prefix` tokens that every copy keeps.

        With complements the row has a fixed length, and a GPU needs one kernel launch. Otherwise
        `fastalign.ops.pack_masks` computes the length, which waits for the GPU.
        """
        grid, length = self._grid(num_patches), None
        if self.complement:  # a sample and its complement have N visible patches, and so has a full mask
            length = len(sample_ids) * (grid[0] * grid[1] * (self.copies - 1) + self.copies * prefix)
            if (arguments := self._for_extension(sample_ids, grid, epoch)) is not None:
                visible, *packing = torch.ops.fastalign.draw_packed_masks(*arguments, prefix, length)
                return visible, Packing(*packing)
        visible = self(sample_ids, grid, epoch)
        return visible, ops.pack_masks(visible, prefix, length)

    def _for_extension(self, sample_ids: Tensor, grid: tuple[int, int], epoch: int) -> tuple | None:
        """The arguments of the extension's operators; None if the extension cannot draw these masks."""
        kind = _EXTENSION_KINDS.get(type(self))  # by exact class: a subclass may override `sample`
        if kind is None or not extension.available(sample_ids.device):
            return None
        seed = ((self.seed + 2**63) & (2**64 - 1)) - 2**63  # the signed integer of the same bits
        ratio = getattr(self, "ratio", 0.0)
        return sample_ids.to(torch.int64), *grid, kind, ratio, seed, epoch, self.complement, self.full

    def _grid(self, num_patches: int | tuple[int, int]) -> tuple[int, int]:
        if isinstance(num_patches, (tuple, list)):
            rows, columns = num_patches
            return int(rows), int(columns)
        side = math.isqrt(num_patches)
        return (side, side) if side * side == num_patches else (1, int(num_patches))


class UniformMasks(_Masks):
    """Per image u ~ U(0, 1), then each patch visible iff its own U(0, 1) exceeds u.

    >>> fa.UniformMasks(seed=0)(torch.tensor([7, 8]), num_patches=196).shape  # mask, complement, full
    torch.Size([2, 3, 196])

    The number of visible patches is therefore uniform on 0..N, both ends included.
    """

    def sample(self, sample_ids: Tensor, grid: tuple[int, int], epoch: int) -> Tensor:
        count = grid[0] * grid[1]
        words = random_words(sample_ids, count + 1, seed=self.seed, stream=Stream.MASKS, epoch=epoch)
        return words[:, 1:] > words[:, :1]


@dataclass(frozen=True)
class BernoulliMasks(_Masks):
    """Each patch visible with probability `ratio`, independently.

    >>> fa.BernoulliMasks(ratio=0.25, complement=False, full=False)(torch.tensor([7, 8]), num_patches=196).shape
    torch.Size([2, 1, 196])
    """

    ratio: float = 0.5

    def __post_init__(self):
        if not 0.0 <= self.ratio <= 1.0:
            raise ValueError(f"BernoulliMasks: ratio must lie in 0..1, got {self.ratio}")

    def sample(self, sample_ids: Tensor, grid: tuple[int, int], epoch: int) -> Tensor:
        words = random_words(sample_ids, grid[0] * grid[1], seed=self.seed, stream=Stream.MASKS, epoch=epoch)
        return words < round(self.ratio * 2**32)


@dataclass(frozen=True)
class BlockwiseMasks(_Masks):
    """Visible rectangles are added until the visible share reaches `ratio`.

    >>> fa.BlockwiseMasks(seed=0)(torch.tensor([7, 8]), num_patches=(14, 14)).shape
    torch.Size([2, 3, 196])

    A rectangle has U{16, ..., ratio * N - 1} patches, aspect U(0.3, 1 / 0.3) and a uniform position, clipped
    to the grid. The last one overshoots: for the default ratio 0.4 the mean visible share is about 0.49.
    At most 64 rectangles are drawn, all at once, so that nothing waits for the device.
    """

    ratio: float = 0.4

    def __post_init__(self):
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"BlockwiseMasks: ratio must lie strictly between 0 and 1, got {self.ratio}")

    def _grid(self, num_patches: int | tuple[int, int]) -> tuple[int, int]:
        if not isinstance(num_patches, (tuple, list)) and math.isqrt(num_patches) ** 2 != num_patches:
            raise ValueError(
                f"BlockwiseMasks: {num_patches} patches do not form a square; pass the grid (rows, columns)"
            )
        return super()._grid(num_patches)

    def sample(self, sample_ids: Tensor, grid: tuple[int, int], epoch: int) -> Tensor:
        rows, columns = grid
        largest = int(self.ratio * rows * columns)
        smallest = max(1, min(MIN_BLOCK_PATCHES, largest - 1))
        draws = random_uniform(sample_ids, 4 * MAX_BLOCKS, seed=self.seed, stream=Stream.MASKS, epoch=epoch)
        size, aspect, top, left = draws.reshape(-1, 4, MAX_BLOCKS).unbind(1)
        # float64 products, quotients and roots are correctly rounded everywhere: CPU and GPU agree to the bit.
        size = smallest + torch.floor(size * max(1, largest - smallest))
        aspect = 0.3 + aspect * (1 / 0.3 - 0.3)
        height = torch.floor(torch.sqrt(size / aspect)).clamp(1, rows)
        width = torch.floor(size / height).clamp(1, columns)
        top = torch.floor(top * (rows - height + 1))
        left = torch.floor(left * (columns - width + 1))
        row = torch.arange(rows, device=draws.device).view(1, 1, rows)
        column = torch.arange(columns, device=draws.device).view(1, 1, columns)
        in_rows = (row >= top[..., None]) & (row < (top + height)[..., None])
        in_columns = (column >= left[..., None]) & (column < (left + width)[..., None])
        inside = (in_rows[..., :, None] & in_columns[..., None, :]).flatten(2)
        index = torch.arange(MAX_BLOCKS, device=draws.device).view(1, MAX_BLOCKS, 1)
        # The first rectangle that covers each patch; MAX_BLOCKS if none does.
        first = torch.where(inside, index, MAX_BLOCKS).amin(1)
        # The number of patches covered after each rectangle decides how many rectangles count.
        counts = torch.zeros(len(first), MAX_BLOCKS + 1, dtype=torch.int64, device=first.device)
        covered = counts.scatter_add_(1, first, torch.ones_like(first))[:, :MAX_BLOCKS].cumsum(1)
        used = (covered < math.ceil(self.ratio * rows * columns - 1e-9)).sum(1, keepdim=True)
        return first <= used.clamp(max=MAX_BLOCKS - 1)


MASKS = {"uniform": UniformMasks, "bernoulli": BernoulliMasks, "blockwise": BlockwiseMasks}
"""The distributions by their names in a configuration."""
_EXTENSION_KINDS = {UniformMasks: 0, BernoulliMasks: 1, BlockwiseMasks: 2}
"""`Kind` of csrc/masks.h"""
