"""The shapes of blocks and backbones: everything that decides parameters and forward pass."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockSpec:
    """The shape of a transformer block."""

    width: int
    heads: int
    mlp_hidden: int
    mlp: str = "mlp"
    """mlp (fc1, fc2) | swiglu (fc1_g, fc1_x, fc2)"""
    activation: str = "gelu"
    mlp_norm: bool = False
    qkv: str = "fused"
    """fused | no_k_bias (one weight, q_bias and v_bias: BEiT) | split (q_proj, k_proj, v_proj: EVA02)"""
    qkv_bias: bool = True
    qk_norm: bool = False
    attention_norm: bool = False
    """a norm between attention and its projection (EVA02)"""
    layer_scale: float | None = None
    layer_scale_keys: str = "ls"
    """ls (ls1.gamma) | gamma (gamma_1)"""
    norm: str = "layer_norm"
    """layer_norm | identity"""
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class ViTSpec:
    """The shape of a backbone. Everything that decides its parameters and its forward pass."""

    block: BlockSpec
    depth: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int = 3
    class_token: bool = True
    registers: int = 0
    position: bool = True
    """a position embedding is added"""
    position_fixed: bool = False
    """not trained (MoCo-v3's sin-cos table)"""
    position_prefix: bool = True
    """the position embedding has entries for the prefix tokens"""
    relative_position: bool = False
    """a relative position bias in each block (BEiT)"""
    rotary: bool = False
    patch_bias: bool = True
    patch_norm: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    pooled_norm: bool = False
    """fc_norm: a norm after pooling"""
    pool: str = "token"
    """token | avg | avgmax | max | map (attention pooling) | none"""
    pool_prefix: bool = False
    fresh_norm_eps: float = 1e-6
    """epsilon of a newly made norm of the backbone's norm class, which the student's norms and decoder get"""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width; a remainder of the image is ignored."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def patches(self) -> int:
        """N"""
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """P"""
        return int(self.class_token) + self.registers
