"""Losses that leap up."""

import statistics
from collections import deque

_REMEMBERED, _NEEDED = 200, 50
_DEVIATIONS, _LEAST = 8.0, 1.2
_NORMAL = 1.4826  # the standard deviation of a normal distribution, over its median absolute deviation


class Spikes:
    """Tells a loss that lies far above those of the last 200 updates.

    Far is more than 8 robust standard deviations (of the median absolute deviation) and more than a fifth above their
    median: noise and the loss of a hard batch are neither. Nothing is told before 50 updates.
    """

    def __init__(self):
        self._losses: deque[float] = deque(maxlen=_REMEMBERED)

    def told(self, loss: float) -> float | None:
        """The usual loss where this one is a spike; None where it is none. A finite loss is remembered."""
        usual = None
        if len(self._losses) >= _NEEDED:
            middle = statistics.median(self._losses)
            spread = _NORMAL * statistics.median(abs(value - middle) for value in self._losses)
            if loss > middle + _DEVIATIONS * spread and loss > _LEAST * middle:
                usual = middle
        self._losses.append(loss)
        return usual
