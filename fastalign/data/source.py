"""What a source of images is, some samples of one, and synthetic images.

A source is a list: a sample's id is its index in the source's sorted order, which is the same in every process.
"""

import zlib
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastalign.utils.errors import UserError
from fastalign.utils.random import Stream, random_uniform

SYNTHETIC_LENGTH = 50_000


class Unreadable(UserError):
    """A sample's bytes cannot be read. `reason` says why, without the path of the data set."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"cannot read {name}: {reason}; repair, replace or remove it")
        self.reason = reason


def crc_of_texts(*texts: str) -> int:
    """CRC-32 of texts, separated by null bytes."""
    return zlib.crc32("\0".join(texts).encode("utf-8", "surrogateescape"))


class Source:
    """A list of encoded images.

    Subclasses define `__len__`; `name(index)`, for messages and label files, relative to `root` if there is one; and
    `read(index)`: [bytes] uint8, thread-safe, raises `Unreadable`. `damaged`: (portable name, reason) of damaged tar
    shards and of dangling links to folders.
    """

    root: str | None = None
    damaged: tuple[tuple[str, str], ...] = ()

    def portable_name(self, index: int) -> str:
        """The sample's name without the location of the data set."""
        return self.name(index)

    def class_names(self) -> list[str | None]:
        """The class of each sample as the data set writes it; None for a sample without one."""
        return [None] * len(self)

    def fingerprint(self) -> int:
        """A CRC-32 of the length and of the first, middle and last portable names: quick, to compare ranks."""
        total = len(self)
        return crc_of_texts(str(total), *(self.portable_name(i) for i in (0, total // 2, total - 1)))

    @cached_property
    def identity(self) -> dict[str, int | list[int]]:
        """CRC-32 of all portable names, and of the bytes of nine samples, for checkpoints. 0 = unreadable."""
        spread = sorted({i * (len(self) - 1) // 8 for i in range(9)})
        samples = []
        for index in spread:
            try:
                samples.append(zlib.crc32(self.read(index)))
            except Unreadable:
                samples.append(0)
        return {"names": self._crc_of_names(), "samples": samples}

    def differs_from(self, identity: dict[str, int | list[int]]) -> str | None:
        """How this data set differs from one with another `identity`; None if it is the same.

        Up to half of the samples may differ, because bad images may have been repaired.
        """
        if self.identity["names"] != identity["names"]:
            return "other names"
        same = sum(a == b for a, b in zip(self.identity["samples"], identity["samples"], strict=True))
        return "other images of the same names" if 2 * same < len(identity["samples"]) else None

    def _crc_of_names(self) -> int:
        return crc_of_texts(*(self.portable_name(index) for index in range(len(self))))


class Subset(Source):
    """The samples `indices` [n >= 1] of another source."""

    def __init__(self, whole: Source, indices: np.ndarray):
        self.whole, self.indices = whole, np.asarray(indices, dtype=np.int64)
        self.root, self.damaged = whole.root, whole.damaged

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))

    def portable_name(self, index: int) -> str:
        return self.whole.portable_name(int(self.indices[index]))

    def read(self, index: int) -> np.ndarray:
        return self.whole.read(int(self.indices[index]))


class SyntheticSource(Source):
    """Random images made on the device, without disk and decoder, for benchmarks and tests."""

    def __init__(self, length: int = SYNTHETIC_LENGTH):
        if length < 1:
            raise UserError(f"synthetic:{length}: the number of samples must be at least 1")
        self._length = length
        self.identity = {"names": length, "samples": []}

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        return f"synthetic:{index}"

    def images(self, ids: Tensor, size: tuple[int, int], *, seed: int, dtype: torch.dtype) -> Tensor:
        """Normalised images [B, 3, h, w], a function of (seed, id): mean 0, variance 1, values in -3..3.

        Each channel is the outer product of a random column and a random row. The result is on the device of `ids`.
        """
        height, width = size
        draws = random_uniform(ids, 3 * (height + width), seed=seed, stream=Stream.SYNTHETIC).float()
        waves = ((2 * draws - 1) * 3**0.5).view(len(ids), 3, height + width)
        return (waves[..., :height, None] * waves[..., None, height:]).to(dtype)
