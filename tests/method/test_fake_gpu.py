"""What a step does on a GPU, in fake tensors, which need no GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalign as fa
from fastalign import ops
from fastalign.ops import attention as selection
from fastalign.ops import extension
from tests.method.helpers import tiny
from tests.ops.helpers import Calls

ATTENTION = ("softcap_attention", torch.bfloat16)
PACK, MASK_TOKENS = ("pack", torch.bfloat16), ("mask_tokens", torch.bfloat16)
LOSS = ("reconstruction_loss", torch.bfloat16)
# The student's two blocks, the decoder, the teacher. Without a cap, dense attention is torch's.
CALLS = {
    "zero": [("draw_masks", torch.int64), *[ATTENTION] * 2, MASK_TOKENS, MASK_TOKENS, LOSS],
    "drop": [("draw_packed_masks", torch.int64), *[ATTENTION] * 2, PACK, ATTENTION, PACK, ATTENTION, LOSS],
}


def move(module, mode):
    """Replace parameters and buffers by fake ones on a GPU."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = mode.from_tensor(tensor.data).to("cuda")
                    tensors[name] = torch.nn.Parameter(fake) if tensor.requires_grad else fake


@pytest.fixture
def h200(monkeypatch):
    """The facts of an H200, and bf16 autocast, which torch.autocast refuses without a GPU."""
    monkeypatch.setattr(ops, "MODE", "auto")
    monkeypatch.setattr(selection, "architecture", lambda: 90)
    monkeypatch.setattr(extension, "_DEVICES", {"cuda"})
    selection._choose.cache_clear()
    torch.set_autocast_enabled("cuda", True), torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)
    selection._choose.cache_clear()


@pytest.mark.skipif(not extension.available(torch.device("cpu")), reason="needs the extension")
@pytest.mark.parametrize("masking", CALLS)
def test_a_step_on_an_h200_runs_every_kernel_in_bf16(masking, h200):
    student = fa.MaskEmbedStudent.from_backbone(tiny(), decoder_layers=1)
    step = fa.MaskEmbed(fa.MaskedTeacher(tiny(), masking=masking), student, fa.UniformMasks())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Calls() as calls:
        move(step, mode)
        loss = step(torch.randn(4, 3, 32, 32, device="cuda"), torch.arange(4))
    found = [(operator.name().removeprefix("fastalign::"), args[0].dtype) for operator, args in calls.found]
    assert found == CALLS[masking]
    assert (loss.device.type, loss.dtype, loss.requires_grad) == ("cuda", torch.float32, True)
