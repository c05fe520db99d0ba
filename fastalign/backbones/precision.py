"""The dtype that a model computes in, and lower precision for frozen weights: bf16 storage, FP8 products."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastalign.backbones.blocks import MLP, Attention

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
FP8_CAPABILITY = (8, 9)
"""The first GPUs that multiply in FP8: Ada, then Hopper and Blackwell."""
NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""torch's names for the instructions that multiply in bf16: two of x86, one of Arm."""


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """float32 for "fp32", bfloat16 for "bf16" and "fp8"; for "auto" bfloat16 where the hardware has it."""
    bf16 = has_bf16(device) if precision == "auto" else precision != "fp32"
    return torch.bfloat16 if bf16 else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bf16: a GPU, or a CPU with instructions for it and a torch that uses them."""
    if device.type == "cuda":
        return True
    # oneDNN's own answer is yes for every CPU with AVX-512, but it may convert to fp32 and back, which is slow.
    capabilities = torch.cpu.get_capabilities() if torch.backends.mkldnn.is_available() else {}
    return any(capabilities.get(name, False) for name in NATIVE_BF16)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """bf16 autocast, or nothing in fp32."""
    return torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()


def store_as(module: nn.Module, dtype: torch.dtype) -> None:
    """Store in `dtype` what autocast of a frozen module would cast at every use; the output keeps its bits."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.to(dtype)
        elif isinstance(part, Attention) and hasattr(part, "q_bias"):  # BEiT's, which become a bias of qkv
            part.q_bias.data, part.v_bias.data = part.q_bias.data.to(dtype), part.v_bias.data.to(dtype)


def quantize(module: nn.Module) -> None:
    """Replace the linear layers of the blocks within a frozen module by `FP8Linear`, in place.

    Layers whose widths are not multiples of 16 stay as they are: GPUs have no FP8 product for them.
    """
    for part in list(module.modules()):
        if not isinstance(part, (Attention, MLP)):
            continue
        if hasattr(part, "q_bias"):  # BEiT's: folded into qkv's own
            part.qkv.bias = nn.Parameter(part.qkv_bias(), requires_grad=False)
            part.spec = replace(part.spec, qkv="fused")
            del part.q_bias, part.v_bias
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear) and not (layer.in_features % 16 or layer.out_features % 16):
                setattr(part, name, FP8Linear(layer))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[R, K] -> FP8 values [R, K], each row scaled so that its largest is FP8's largest, and fp32 scales [R, 1]."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / E4M3_MAX
    # The division may round up beyond the largest FP8 value, which the cast would turn into NaN.
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


class FP8Linear(nn.Module):
    """A frozen linear layer that multiplies in FP8, with a scale per output channel and a dynamic scale per token.

    Its widths are multiples of 16. On a CPU the same FP8 values are multiplied in fp32: the same error, slowly.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight, scale = quantize_rows(layer.weight.detach())
        # As bytes, which every backend of torch.distributed can send.
        self.register_buffer("weight", weight.view(torch.uint8))
        self.register_buffer("scale", scale.reshape(1, -1))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] bf16."""
        rows, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        weight = self.weight.view(torch.float8_e4m3fn).t()
        if x.is_cuda:
            options = {"bias": self.bias, "out_dtype": torch.bfloat16, "use_fast_accum": True}
            out = torch._scaled_mm(rows, weight, scale_a=scale, scale_b=self.scale, **options)
        else:
            with torch.autocast(rows.device.type, enabled=False):
                out = rows.float() @ weight.float() * (scale * self.scale)
                out = (out if self.bias is None else out + self.bias.float()).bfloat16()
        return out.unflatten(0, x.shape[:-1])
