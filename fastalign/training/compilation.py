"""What torch.compile has cost this process. torch imports torch._dynamo when it is first used, not before."""

import torch

_TIMED = ("_compile.compile_inner", "backward._backward_impl")
"""torch's names for a graph's capture with its forward code, and for its backward code where that is made later."""


def compile_seconds() -> float:
    """Seconds that went into compilation so far."""
    times = dict(zip(*torch._dynamo.utils.compile_times(repr="csv", aggregate=True), strict=True))
    return sum(float(times.get(name, 0)) for name in _TIMED)


class Compilation:
    """Tells what was compiled since it was last asked."""

    def __init__(self):
        self._graphs, self._told = self._count(), self._totals()

    def news(self) -> dict[str, float]:
        """Seconds, and the graphs that torch had in its cache and had not; empty where nothing was compiled."""
        if self._count() == self._graphs:
            return {}
        totals = self._totals()
        found = {name: totals[name] - before for name, before in self._told.items()}
        self._graphs, self._told = self._count(), totals
        return found

    def _count(self) -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def _totals(self) -> dict[str, float]:
        cache = torch._dynamo.utils.counters["inductor"]
        return {
            "compile_seconds": compile_seconds(),
            "compile_cache_hits": cache["fxgraph_cache_hit"],
            "compile_cache_misses": cache["fxgraph_cache_miss"],
        }
