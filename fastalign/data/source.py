"""What a source is, and the one that needs no disk.

A source is a list: a sample's id is its index in the source's stable order, the same in every process.
"""

import zlib
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastalign.utils.errors import UserError
from fastalign.utils.random import Stream, random_uniform

SYNTHETIC_LENGTH = 50_000
_SAMPLED = 8


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
    """what else belongs to it and cannot be read: (portable name, what is wrong) of tar shards of which only the
    images before some damage are in the list, and of links in the place of folders that lead nowhere"""

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

        Where the data set lies does not count, so that nodes may have copies at different paths. `identity` tells
        more, and takes longer.
        """
        total = len(self)
        return self._crc_of_names((0, total // 2, total - 1), str(total))

    @cached_property
    def identity(self) -> dict[str, int | list[int]]:
        """Which data set it is, wherever it lies: CRC-32 of all names, and of the bytes of nine samples.

        Plain values, for a checkpoint; 0 stands for a sample that cannot be read. `differs_from` compares.
        """
        spread = sorted({i * (len(self) - 1) // _SAMPLED for i in range(_SAMPLED + 1)})
        return {"names": self._crc_of_all_names(), "samples": [self._crc_of(index) for index in spread]}

    def differs_from(self, identity: dict[str, int | list[int]]) -> str | None:
        """How this data set differs from one whose `identity` was kept, in a few words; None: it is the same.

        Of the samples half may differ: bad ones were mended since. Of another data set all do.
        """
        if self.identity["names"] != identity["names"]:
            return "other names"
        same = sum(a == b for a, b in zip(self.identity["samples"], identity["samples"], strict=True))
        return "other images of the same names" if 2 * same < len(identity["samples"]) else None

    def _crc_of(self, index: int) -> int:
        try:
            return zlib.crc32(self.read(index))
        except UserError:
            return 0

    def _crc_of_names(self, indices: Iterable[int], *before: str) -> int:
        names = (*before, *(self.portable_name(index) for index in indices))
        return zlib.crc32("\0".join(names).encode("utf-8", "surrogateescape"))

    def _crc_of_all_names(self) -> int:
        return self._crc_of_names(range(len(self)))

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

    @cached_property
    def identity(self) -> dict[str, int | list[int]]:
        """Its length says it all."""
        return {"names": self._length, "samples": []}

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
