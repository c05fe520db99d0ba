"""Mask distributions. A mask is True where the patch is visible: said once, here.

Every distribution is called as ``masks(sample_ids, num_patches, epoch=0)`` and returns ``[B, M, N]`` bool
on the device of ``sample_ids``, with M = 1 sample, plus its complement and the full mask where asked for,
in that order. A mask is a pure function of (seed, epoch, sample id): the same on every device, for every
number of ranks and after every resume. Source: method.md's step 1; Covert et al., ICLR 2025.

The PyTorch code here is the definition. Where the extension of `csrc/` is installed it draws, the same bits.
"""

import math
import operator
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
    complement: bool = True
    """Add the complement of each sample (antithetical sampling)."""
    full: bool = True
    """Add the mask that hides nothing."""
    seed: int = 0

    @property
    def copies(self) -> int:
        """M, the masks an image."""
        return 1 + self.complement + self.full

    def __call__(self, sample_ids: Tensor, num_patches: int | tuple[int, int], epoch: int = 0) -> Tensor:
        """Masks of the given samples.

        Args:
            sample_ids: [B] int64.
            num_patches: N, or the grid (rows, columns).
            epoch: 0..2^32-1; `fastalign.utils.random.EVAL_EPOCH` for evaluation.

        Returns:
            [B, M, N] bool, True = visible.
        """
        if not self._in_extension(sample_ids):
            return self.eager(sample_ids, num_patches, epoch)
        return extension.draw_masks(**self._arguments(sample_ids, self._grid(num_patches), epoch))

    def eager(self, sample_ids: Tensor, num_patches: int | tuple[int, int], epoch: int = 0) -> Tensor:
        """The same masks in PyTorch operations, whether or not the extension is there."""
        sample = self.sample(sample_ids, self._grid(num_patches), epoch)
        stack = [sample]
        if self.complement:
            stack.append(~sample)
        if self.full:
            stack.append(torch.ones_like(sample))
        return torch.stack(stack, dim=1)

    def packed(
        self,
        sample_ids: Tensor,
        num_patches: int | tuple[int, int],
        prefix: int,
        epoch: int = 0,
        length: int | None = None,
    ) -> tuple[Tensor, Packing]:
        """Masks, and where their visible tokens stand in one row; on a GPU in the same launch for a pair.

        Args:
            sample_ids, num_patches, epoch: as for the masks alone.
            prefix: P, tokens that every copy keeps.
            length: rows. By default exactly the tokens present where complements make their number fixed, else
                what `fastalign.ops.pack_masks` takes, which waits for a GPU.

        Returns:
            [B, M, N] bool, and the `fastalign.ops.reference.Packing`.
        """
        grid = self._grid(num_patches)
        if self.complement and length is None:
            length = self._fixed_length(len(sample_ids), grid, prefix)
        if length is None or not self._in_extension(sample_ids):
            visible = self(sample_ids, grid, epoch)
            return visible, ops.pack_masks(visible, prefix, length)
        fixed = self.complement and length == self._fixed_length(len(sample_ids), grid, prefix)
        drawn = extension.draw_packed_masks(
            **self._arguments(sample_ids, grid, epoch), prefix=prefix, length=length
        )
        packing = Packing(*drawn[1:])
        if not fixed:
            ops.check_length(packing)
        return drawn[0], packing

    def _fixed_length(self, images: int, grid: tuple[int, int], prefix: int) -> int:
        """With complements, two copies have the patches of one, and a full one has them all."""
        return images * (grid[0] * grid[1] * (self.copies - 1) + self.copies * prefix)

    def _in_extension(self, sample_ids: Tensor) -> bool:
        return self._kind in extension.KINDS and extension.available(sample_ids.device)

    @property
    def _kind(self) -> str | None:
        """The name in `MASKS`; None for a subclass, which may have a `sample` of its own."""
        return next((name for name, kind in MASKS.items() if kind is type(self)), None)

    def _arguments(self, sample_ids: Tensor, grid: tuple[int, int], epoch: int) -> dict:
        """What the extension wants to know."""
        return {
            "sample_ids": sample_ids.to(torch.int64),
            "grid": grid,
            "kind": self._kind,
            "ratio": getattr(self, "ratio", 0.0),
            "seed": self.seed,
            "epoch": epoch,
            "complement": self.complement,
            "full": self.full,
        }

    def _grid(self, num_patches: int | tuple[int, int]) -> tuple[int, int]:
        return _as_grid(num_patches)

    def sample(self, sample_ids: Tensor, grid: tuple[int, int], epoch: int) -> Tensor:
        """[B, N] bool: one draw an image."""
        raise NotImplementedError


def _as_grid(num_patches: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(num_patches, (tuple, list)):
        rows, columns = num_patches
        return operator.index(rows), operator.index(columns)
    count = operator.index(num_patches)
    side = math.isqrt(count)
    return (side, side) if side * side == count else (1, count)


class UniformMasks(_Masks):
    """Per image u ~ U(0, 1), then each patch visible iff its own U(0, 1) exceeds u.

    The number of visible patches is therefore uniform on 0..N, both ends included.
    """

    def sample(self, sample_ids: Tensor, grid: tuple[int, int], epoch: int) -> Tensor:
        count = grid[0] * grid[1]
        words = random_words(sample_ids, count + 1, seed=self.seed, stream=Stream.MASKS, epoch=epoch)
        return words[:, 1:] > words[:, :1]


@dataclass(frozen=True)
class BernoulliMasks(_Masks):
    """Each patch visible with probability `ratio`, independently."""

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
        target = math.ceil(self.ratio * rows * columns - 1e-9)
        first = self._first_cover(sample_ids, grid, epoch)
        # The number of patches covered after each rectangle decides how many rectangles count.
        counts = torch.zeros(first.shape[0], MAX_BLOCKS + 1, dtype=torch.int64, device=first.device)
        counts.scatter_add_(1, first, torch.ones_like(first))
        covered = counts[:, :MAX_BLOCKS].cumsum(1)
        used = (covered < target).sum(1, keepdim=True)
        return first <= used.clamp(max=MAX_BLOCKS - 1)

    def _first_cover(self, sample_ids: Tensor, grid: tuple[int, int], epoch: int) -> Tensor:
        """[B, N] int64: the first rectangle that covers each patch, MAX_BLOCKS where none does."""
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
        return torch.where(inside, index, MAX_BLOCKS).amin(1)


MASKS = {"uniform": UniformMasks, "bernoulli": BernoulliMasks, "blockwise": BlockwiseMasks}
"""Every distribution by its name in a configuration, which is also its name in the extension."""
