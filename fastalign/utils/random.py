"""Counter-based random numbers (Philox4x32-10): a draw is a pure function of (seed, stream, epoch, id, index).

Masks, crops, flips and augmentations draw from here: the same numbers on every device, for every number of ranks and
after every resume. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Words are unsigned
32-bit integers in int64 tensors, because torch lacks unsigned 32-bit arithmetic on some devices.
"""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
EVAL_EPOCH = _WORD  # the epoch of evaluation: fixed masks, which differ from those of every training epoch


class Stream(IntEnum):
    """The purpose of random numbers. The streams of one seed are independent."""

    MASKS = 1
    GEOMETRY = 2
    AUGMENT = 3
    MIX = 4
    ORDER = 5
    SYNTHETIC = 6


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four broadcastable int64 tensors of words and a key of two words -> four tensors of words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Signed products that wrap have the same bits as unsigned ones.
        first, second = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1 = ((second >> 32) & _WORD) ^ c1 ^ k0, second & _WORD
        c2, c3 = ((first >> 32) & _WORD) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def random_words(ids: Tensor, count: int, *, seed: int, stream: Stream, epoch: int = 0) -> Tensor:
    """Random words, one row per sample id: [B, count] int64, each uniform on 0..2^32-1, on the device of the ids.

    Ids are [B] int64, >= 0; the seed has 64 bits, the epoch is 0..2^32-1.
    """
    ids = ids.to(torch.int64).unsqueeze(1)
    block = torch.arange((count + 3) // 4, device=ids.device).unsqueeze(0)
    # Multiplied by the golden ratio, so that neighbouring seeds and streams do not collide.
    key = seed & _WORD, ((seed >> 32) ^ (int(stream) * 0x9E3779B1)) & _WORD
    epochs = torch.full_like(block, epoch & _WORD)
    words = philox((block, epochs, ids & _WORD, (ids >> 32) & _WORD), key)
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def random_uniform(ids: Tensor, count: int, *, seed: int, stream: Stream, epoch: int = 0) -> Tensor:
    """[B, count] float64 multiples of 2^-32, uniform on [0, 1). Arguments as for `random_words`."""
    return random_words(ids, count, seed=seed, stream=stream, epoch=epoch).double() * 2.0**-32


def permutation(length: int, *, seed: int, epoch: int = 0) -> np.ndarray:
    """A global permutation of 0..length-1 (int64), a pure function of (seed, epoch)."""
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, (int(Stream.ORDER) << 32) | (epoch & _WORD)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(length)
