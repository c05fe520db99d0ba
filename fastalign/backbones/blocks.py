"""The parts of a vision transformer, written once for every backbone family, with timm's state-dict keys.

Shapes: B images, N patches, P prefix tokens (class, registers), T = P + N tokens, D width, H heads, d head width,
L packed tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastalign.backbones.spec import BlockSpec, ViTSpec
from fastalign.ops.attention import Sequences, attention
from fastalign.ops.reference import Packing


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}


class RMSNorm(nn.RMSNorm):
    """Computes in the dtype of its weight, also under autocast, as LayerNorm does on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": RMSNorm}


def make_norm(spec: BlockSpec, width: int | None = None, *, present: bool = True) -> nn.Module:
    """The block's kind of norm over `width` channels, or the identity."""
    if not present or spec.norm == "identity":
        return nn.Identity()
    return NORMS[spec.norm](width or spec.width, eps=spec.norm_eps)


class PatchEmbed(nn.Module):
    """Convolution of each patch to a token, keys `proj`, `norm`."""

    def __init__(self, spec: ViTSpec):
        super().__init__()
        size, width = spec.patch_size, spec.block.width
        self.image_shape = (spec.channels, *spec.image_size)
        self.proj = nn.Conv2d(spec.channels, width, size, size, bias=spec.patch_bias)
        self.norm = make_norm(spec.block, present=spec.patch_norm)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, height, width] -> [B, N, D]"""
        if images.shape[1:] != self.image_shape:
            wanted = f"[B, {', '.join(map(str, self.image_shape))}]"
            raise ValueError(
                f"images are {list(images.shape)}, the backbone takes {wanted}: resize them (fastalign.transform), "
                f"or build it with img_size={tuple(images.shape[-2:])}"
            )
        if images.is_cuda:  # channels last, so that a patch's embedding comes out contiguous
            images = images.contiguous(memory_format=torch.channels_last)
        return self.norm(self.proj(images).flatten(2).transpose(1, 2))

    def blank(self) -> Tensor:
        """[D]: the embedding of a patch whose pixels are zero."""
        weight, bias = self.proj.weight, self.proj.bias
        blank = weight.new_zeros(len(weight)) if bias is None else bias
        if torch.is_autocast_enabled(blank.device.type):  # as the convolution rounds it
            blank = blank.to(torch.get_autocast_dtype(blank.device.type))
        return self.norm(blank)


def rotate(x: Tensor, table: Tensor, half: bool = False) -> Tensor:
    """Rotate pairs of channels of queries or keys by their patch's angles: (a, b) -> (a cos - b sin, b cos + a sin).

    x [B, H, T, d], the table [1 or H, T, d], or packed, [L, H, d] and [L, 1 or H, d]: the sines of d / 2 angles, then
    their cosines. The pairs are channels i and i + d / 2 (`half`), else neighbours.
    """
    sine, cosine = table.chunk(2, -1)
    a, b = x.chunk(2, -1) if half else (x[..., ::2], x[..., 1::2])
    rotated = a * cosine - b * sine, b * cosine + a * sine
    rotated = torch.cat(rotated, -1) if half else torch.stack(rotated, -1).flatten(-2)
    return rotated.to(x.dtype)


def pack_table(table: Tensor, packing: Packing) -> Tensor:
    """The rows of packed tokens: [1 or H, T, d] -> [L, 1 or H, d]."""
    return table[:, packing.indices % packing.slots.shape[2]].transpose(0, 1)


class MixedRope(nn.Module):
    """Angles as learned sums of both coordinates, for each block and head (Heo et al., 2024), key `freqs`."""

    def __init__(self, block: BlockSpec, depth: int):
        super().__init__()
        self.freqs = nn.Parameter(torch.zeros(2, depth, block.heads, block.width // block.heads // 2))

    def forward(self, coordinates: Tensor, depth: int) -> Tensor:
        """Coordinates [2, T], zeros for prefix tokens -> the tables of the first `depth` blocks, [depth, H, T, d]."""
        freqs = self.freqs[:, :depth].to(torch.promote_types(self.freqs.dtype, torch.float32))
        # Not a matrix product, which autocast would compute in bf16.
        first, second = (x[:, None] * f[:, :, None] for x, f in zip(coordinates, freqs, strict=True))
        angles = first + second
        return torch.cat([angles.sin(), angles.cos()], -1).to(self.freqs.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; with `window`, the grid of patches, it adds a relative position bias."""

    def __init__(self, spec: BlockSpec, *, window: tuple[int, int] | None = None):
        super().__init__()
        self.spec, self.backend = spec, "auto"
        width, head_width = spec.width, spec.width // spec.heads
        if spec.qkv == "split":
            self.q_proj = nn.Linear(width, width, bias=spec.qkv_bias)
            self.k_proj = nn.Linear(width, width, bias=False)
            self.v_proj = nn.Linear(width, width, bias=spec.qkv_bias)
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=spec.qkv_bias and spec.qkv == "fused")
            if spec.qkv == "no_k_bias":
                self.q_bias = nn.Parameter(torch.zeros(width))
                self.v_bias = nn.Parameter(torch.zeros(width))
        self.biased = window is not None
        if self.biased:
            entries = (2 * window[0] - 1) * (2 * window[1] - 1) + 3
            self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, spec.heads))
        self.q_norm = make_norm(spec, head_width, present=spec.qk_norm)
        self.k_norm = make_norm(spec, head_width, present=spec.qk_norm)
        self.norm = make_norm(spec, present=spec.attention_norm)
        self.proj = nn.Linear(width, width, bias=spec.proj_bias)

    def qkv_bias(self) -> Tensor:
        """[3 D]: BEiT's biases of q and v as one bias of qkv, zero for k."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., D] -> q, k, v, each [..., H, d], before their norms."""
        if self.spec.qkv == "split":
            parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            return tuple(part.unflatten(-1, (self.spec.heads, -1)) for part in parts)
        joint = self.spec.qkv == "no_k_bias"
        qkv = functional.linear(x, self.qkv.weight, self.qkv_bias()) if joint else self.qkv(x)
        return qkv.unflatten(-1, (3, self.spec.heads, -1)).unbind(-3)

    def forward(
        self, x: Tensor, position: Tensor | None = None, sequences: Sequences | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D], or with `sequences`, the bounds of packed sequences, [L, D] -> [L, D].

        `position` is the rotary table [1 or H, T, d] (packed: [L, 1 or H, d]) or the relative index [T, T].
        """
        q, k, v = self.project(x)
        q, k, bias = self.q_norm(q), self.k_norm(k), None
        if sequences is None:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.biased:
            bias = self.relative_position_bias_table[position].permute(2, 0, 1).unsqueeze(0)
        elif position is not None:
            q, k = (rotate(part, position, self.spec.rotate_half) for part in (q, k))
        options = {"softcap": self.spec.softcap, "backend": self.backend}
        x = attention(q, k, v, bias=bias, sequences=sequences, **options)
        if sequences is None:
            x = x.transpose(1, 2)
        return self.proj(self.norm(x.flatten(-2)))


class MLP(nn.Module):
    """Two layers with an activation, or gated (`swiglu`), with an optional norm before the last."""

    def __init__(self, spec: BlockSpec, out: int | None = None):
        super().__init__()
        self.kind, hidden, bias = spec.mlp, spec.mlp_hidden, spec.proj_bias
        if self.kind == "swiglu":
            self.fc1_g = nn.Linear(spec.width, hidden, bias)
            self.fc1_x = nn.Linear(spec.width, hidden, bias)
        else:
            self.fc1 = nn.Linear(spec.width, (spec.mlp_matrices - 1) * hidden, bias)
        self.act = ACTIVATIONS[spec.activation]()
        self.norm = make_norm(spec, hidden, present=spec.mlp_norm)
        self.fc2 = nn.Linear(hidden, out or spec.width, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mlp":
            x = self.act(self.fc1(x))
        else:
            gate, x = (self.fc1_g(x), self.fc1_x(x)) if self.kind == "swiglu" else self.fc1(x).chunk(2, -1)
            x = self.act(gate) * x
        return self.fc2(self.norm(x))


class Block(nn.Module):
    """Transformer block, with norms before its branches or (`post_norm`) after them; `window` as for `Attention`."""

    def __init__(self, spec: BlockSpec, *, drop_path: float = 0.0, window: tuple[int, int] | None = None):
        super().__init__()
        self.norm1, self.post_norm = make_norm(spec), spec.post_norm
        self.attn = Attention(spec, window=window)
        self.norm2 = make_norm(spec)
        self.mlp = MLP(spec)
        self.drop_path = nn.Identity()
        if drop_path:
            from timm.layers import DropPath  # here, because importing timm takes a second

            self.drop_path = DropPath(drop_path)
        self.scale_keys = spec.layer_scale_keys if spec.layer_scale else "none"
        for number in (1, 2) if spec.layer_scale else ():
            gamma = nn.Parameter(torch.full((spec.width,), float(spec.layer_scale)))
            if self.scale_keys == "ls":
                setattr(self, f"ls{number}", nn.ParameterDict({"gamma": gamma}))
            else:
                setattr(self, f"gamma_{number}", gamma)

    def layer_scales(self) -> tuple[Tensor, Tensor] | None:
        """The two LayerScale vectors, under whichever key they are stored."""
        if self.scale_keys == "ls":
            return self.ls1.gamma, self.ls2.gamma
        return (self.gamma_1, self.gamma_2) if self.scale_keys == "gamma" else None

    def forward(
        self, x: Tensor, position: Tensor | None = None, sequences: Sequences | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D], or packed, [L, D] -> [L, D]. Arguments as for `Attention`."""
        scales = self.layer_scales()
        if self.post_norm:
            branch = self.norm1(self.attn(x, position, sequences))
        else:
            branch = self.attn(self.norm1(x), position, sequences)
        x = x + self.drop_path(branch if scales is None else branch * scales[0])
        branch = self.norm2(self.mlp(x)) if self.post_norm else self.mlp(self.norm2(x))
        return x + self.drop_path(branch if scales is None else branch * scales[1])
