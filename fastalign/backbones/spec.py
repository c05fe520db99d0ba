"""The shapes of blocks and backbones, soft-cap included, and the authors' names `svit_X` for capped ones."""

import math
from dataclasses import dataclass
from typing import Any

from fastalign.utils.errors import UserError

AUTHORS_SOFTCAP = 30.0


def check_softcap(value: Any, where: str = "", key: str = "softcap") -> float | None:
    """Return the value, a positive finite number or None, else raise a UserError that starts with `where`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        raise UserError(f"{where}{key} must be a positive number or None, got {value!r}")
    return value


@dataclass(frozen=True)
class BlockSpec:
    """The shape of a transformer block."""

    width: int
    heads: int
    mlp_hidden: int
    mlp: str = "mlp"  # mlp (fc1, fc2) | swiglu (fc1_g, fc1_x, fc2) | swiglu_packed (fc1 = both, fc2)
    activation: str = "gelu"
    mlp_norm: bool = False
    # fused | no_k_bias (one weight, q_bias and v_bias: BEiT, DINOv3) | split (q_proj, k_proj, v_proj: EVA02)
    qkv: str = "fused"
    qkv_bias: bool = True
    qk_norm: bool = False
    attention_norm: bool = False  # a norm between attention and its projection (EVA02)
    proj_bias: bool = True  # of the attention's projection and the MLP's layers
    rotate_half: bool = False  # rotary embeddings turn channels i and i + d / 2, not neighbours (DINOv3)
    layer_scale: float | None = None
    layer_scale_keys: str = "ls"  # ls (ls1.gamma) | gamma (gamma_1)
    post_norm: bool = False  # norms follow attention and MLP instead of preceding them
    norm: str = "layer_norm"  # layer_norm | rms_norm | identity
    norm_eps: float = 1e-6
    softcap: float | None = None  # attention logits s become softcap * tanh(s / softcap)

    def __post_init__(self):
        check_softcap(self.softcap)

    @property
    def mlp_matrices(self) -> int:
        """How many matrices of width x mlp_hidden the MLP has: three if it is gated."""
        return 2 if self.mlp == "mlp" else 3


@dataclass(frozen=True)
class ViTSpec:
    """The shape of a backbone. Everything that decides its parameters and its forward pass."""

    block: BlockSpec
    depth: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int = 3
    class_token: bool = True
    distilled: bool = False  # a distillation token follows the class token (DeiT)
    registers: int = 0
    position: bool = True  # a position embedding is added
    position_fixed: bool = False  # not trained (MoCo-v3's sin-cos table)
    position_prefix: bool = True  # the position embedding has entries for the prefix tokens
    relative_position: bool = False  # a relative position bias in each block (BEiT)
    rotary: bool = False  # rotary position embeddings of the patches in each block
    rotary_mixed: bool = False  # whose angles are learned for each block and head (RoPE-mixed)
    patch_bias: bool = True
    patch_norm: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    pooled_norm: bool = False  # fc_norm: a norm after pooling
    # token | pair (mean of class and distillation token) | avg | avgmax | max | map (attention pooling) | none
    pool: str = "token"
    pool_prefix: bool = False
    fresh_norm_eps: float = 1e-6  # epsilon of the new norms in student and decoder

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width; a remainder of the image is ignored."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def patches(self) -> int:
        """The number of patches, N."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """The number of prefix tokens (class, distillation, registers), P."""
        return int(self.class_token) + int(self.distilled) + self.registers


def split_svit(name: str, kwargs: dict) -> tuple[str, dict, float | None]:
    """Translate a name that may be the authors' into timm's name, its arguments and the soft-cap (None = none).

    `svit_X` is `vit_X` with a cap, which the argument `max_attn_val` sets (default 30).
    """
    if not str(name).startswith("svit_"):
        return name, kwargs, None
    rest = dict(kwargs)
    cap = check_softcap(rest.pop("max_attn_val", AUTHORS_SOFTCAP), key="max_attn_val")
    if cap is None:
        raise UserError("max_attn_val must be a positive number, got None: omit it for 30")
    return name.removeprefix("s"), rest, float(cap)
