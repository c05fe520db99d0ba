"""`import fastalign` alone: kernels and masks without a model, with triton and without."""

import os
import subprocess
import sys

import pytest

ALONE = """
import sys
if sys.argv[1] == "without":
    sys.modules["triton"] = None
import torch
import fastalign as fa
print(list(fa.masks.UniformMasks(seed=0)(torch.arange(2), 4).shape))
q = torch.randn(1, 2, 5, 8)
print(list(fa.ops.softcap_attention(q, q, q, softcap=3.0).shape))
for name in ("pack", "nothing"):
    try:
        print(getattr(getattr(fa.kernels, name), name).__module__)
    except AttributeError as error:
        print(f"{type(error).__name__}: {error}")
print([name for name in sys.modules if name.startswith(("nvidia.dali", "timm"))])
try:
    fa.kernels.softcap_attention.softcap_attention(q, q, q)
except (AttributeError, ValueError) as error:
    print(error)
"""


@pytest.mark.parametrize("triton", ["with", "without"])
def test_kernels_and_masks_alone(triton):
    """On the CPU and without Triton's interpreter, where a kernel names the function to call instead."""
    result = subprocess.run(
        [sys.executable, "-c", ALONE, triton],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    masks, attention, pack, nothing, heavy, refusal = result.stdout.splitlines()
    assert (masks, attention, heavy) == ("[2, 3, 4]", "[1, 2, 5, 8]", "[]")
    assert nothing.startswith("AttributeError")
    if triton == "with":
        assert pack == "fastalign.kernels.pack"
        assert "fastalign.ops" in refusal
    else:
        assert pack.startswith("AttributeError")
