"""Every operator as `torch.library.opcheck` wants it: schema, fake tensors, no aliases."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import TINY_CASES, Case
from benchmarks.tolerance import evaluate, is_floating
from fastalign.ops import reference
from tests.numerics import DEVICE, mask, some


def packed_loss(batch, device):
    visible = mask(batch, 3, 5)
    inputs = {"prediction": some(40, 8), "target": some(batch, 6, 8), "visible": visible}
    return inputs | {"packing": reference.pack_masks(visible, 1, 40)}


class Calls(TorchDispatchMode):
    """Keeps one call of each of fastalign's operators for each set of options and absent tensors."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "fastalign":
            detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
            options = (None if isinstance(x, torch.Tensor) else str(x) for x in args)
            self.found[(operator, *options)] = operator, detached
        return operator(*args, **(kwargs or {}))


CASES = [*TINY_CASES, Case("reconstruction_loss", "packed", 2, packed_loss, (), lambda batch: (0, 0))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.label}")
def test_operators(case):
    """With every gradient, and with each alone."""
    inputs = case.build(DEVICE)
    leaves = [
        name for name, value in inputs.items() if is_floating(value) and name not in ("target", "scale")
    ]
    with Calls() as calls:
        for chosen in [leaves, *([name] for name in leaves)]:
            evaluate(case.kernel, inputs, chosen)
    assert calls.found
    for operator, arguments in calls.found.values():
        torch.library.opcheck(operator, arguments)
