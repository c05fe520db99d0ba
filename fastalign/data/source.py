"""What a source is, and the one that needs no disk.

A source is a list: a sample's id is its index in the source's stable order, the same in every process.
"""

import zlib

import numpy as np
import torch
from torch import Tensor

from fastalign.errors import UserError
from fastalign.random import Stream, random_uniform

SYNTHETIC_LENGTH = 50_000


class Unreadable(UserError):
    """A sample's bytes cannot be had. `reason` says why in a few words, without the place of the data set."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class Source:
    """A list of encoded images. `kind` is "folder", "tar" or "synthetic"."""

    kind: str
    root: str | None = None
    """the folder that names are relative to, where there is one"""
    damaged: tuple[tuple[str, str], ...] = ()
    """tar shards of which only the images before some damage are in the list: (file name, what is wrong)"""

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The sample's name, for messages and label files."""
        raise NotImplementedError

    def read(self, index: int) -> np.ndarray:
        """The encoded image: [bytes] uint8. Safe to call from several threads.

        Raises:
            Unreadable: the file is gone, no regular file, empty or larger than 256 MiB.
        """
        raise NotImplementedError

    def label(self, index: int) -> int | None:
        """The class of a sample, None where the source has no labels."""
        return None

    def class_names(self) -> list[str | None]:
        """The class of each sample, as the data set writes it; None for a sample without one.

        Raises:
            UserError: the file that holds the labels cannot be read.
        """
        return [None] * len(self)

    def fingerprint(self) -> int:
        """A CRC-32 over the length and the first, middle and last names: ranks that see the same data agree on it.

        Where the data set lies does not count, so that nodes may have copies at different paths.
        """
        total = len(self)
        names = [self.portable_name(index) for index in (0, total // 2, total - 1)]
        return zlib.crc32("\0".join([str(total), *names]).encode("utf-8", "surrogateescape"))

    def portable_name(self, index: int) -> str:
        """The sample's name without the place where the data set lies."""
        return self.name(index)

    def close(self) -> None:
        """Releases open files."""


class SyntheticSource(Source):
    """Random images made on the device, no disk and no decoder: for benchmarks and tests.

    Args:
        length: samples.
    """

    kind = "synthetic"

    def __init__(self, length: int = SYNTHETIC_LENGTH):
        if length < 1:
            raise UserError(f"synthetic:{length}: the number of samples must be at least 1")
        self._length = length

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        return f"synthetic:{index}"

    def images(self, ids: Tensor, size: tuple[int, int], *, seed: int, dtype: torch.dtype) -> Tensor:
        """Normalised images, a pure function of (seed, id): mean 0, variance 1, values in -3..3.

        Every channel is the outer product of a random column and a random row, so that an image costs h + w
        draws a channel and one multiplication a pixel.

        Args:
            ids: [B] int64, on the device that the images are wanted on.
            size: (h, w) pixels.
            seed: of the run.
            dtype: of the result.

        Returns:
            [B, 3, h, w] in `dtype`.
        """
        height, width = size
        draws = random_uniform(ids, 3 * (height + width), seed=seed, stream=Stream.SYNTHETIC).float()
        waves = ((2 * draws - 1) * 3**0.5).view(len(ids), 3, height + width)
        return (waves[..., :height, None] * waves[..., None, height:]).to(dtype)


class Subset(Source):
    """Some samples of another source, in an order of their own; it reads what the other reads.

    Args:
        whole: the other source.
        indices: [n] integers, samples of `whole`; n >= 1.
    """

    def __init__(self, whole: Source, indices: np.ndarray):
        self.whole, self.indices = whole, np.asarray(indices, dtype=np.int64)
        self.kind, self.root, self.damaged = whole.kind, whole.root, whole.damaged

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))

    def read(self, index: int) -> np.ndarray:
        return self.whole.read(int(self.indices[index]))

    def label(self, index: int) -> int | None:
        return self.whole.label(int(self.indices[index]))

    def class_names(self) -> list[str | None]:
        names = self.whole.class_names()
        return [names[index] for index in self.indices]

    def portable_name(self, index: int) -> str:
        return self.whole.portable_name(int(self.indices[index]))

    def close(self) -> None:
        self.whole.close()
