"""Cases for the extension, packing worked out by a loop, and a record of the operators that are called."""

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode

import fastalign as fa

KINDS = {"uniform": fa.UniformMasks, "bernoulli": fa.BernoulliMasks, "blockwise": fa.BlockwiseMasks}
COPIES = [(False, False), (False, True), (True, False), (True, True)]
"""complement, full"""
EXTREME_IDS = [0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1, -(2**63)]


def packed_by_loop(visible: np.ndarray, prefix: int, length: int) -> list[list]:
    """indices, slots, cu_seqlens, counts, one token at a time."""
    images, copies, patches = visible.shape
    tokens = prefix + patches
    indices, starts, slots = [], [0], np.full((images, copies, tokens), -1)
    for image in range(images):
        for copy in range(copies):
            for token in range(tokens):
                if token < prefix or visible[image, copy, token - prefix]:
                    slots[image, copy, token] = len(indices)
                    indices.append(image * tokens + token)
            starts.append(len(indices))
    counts = np.diff(starts).tolist()
    return [indices + [-1] * (length - len(indices)), slots.tolist(), starts, counts]


class Calls(TorchDispatchMode):
    """Records the calls of fastalign's operators, and their arguments."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "fastalign":
            self.found.append((operator, args))
        return operator(*args, **(kwargs or {}))
