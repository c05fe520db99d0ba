"""Every operator as `torch.library.opcheck` wants it: schema, fake tensors, no aliases."""

import pytest
import torch

from benchmarks.cases import TINY_CASES, Case
from benchmarks.tolerance import evaluate, is_floating
from fastalign.ops import reference
from tests.numerics import DEVICE, mask, some
from tests.ops.helpers import Calls


def packed_loss(batch, device):
    visible = mask(batch, 3, 5)
    inputs = {"prediction": some(40, 8), "target": some(batch, 6, 8), "visible": visible}
    return inputs | {"packing": reference.pack_masks(visible, 1, 40)}


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
    different = {}  # options and absent tensors
    for operator, arguments in calls.found:
        options = (None if isinstance(x, torch.Tensor) else str(x) for x in arguments)
        different[(operator, *options)] = operator, arguments
    assert different
    for operator, arguments in different.values():
        torch.library.opcheck(operator, [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments])
