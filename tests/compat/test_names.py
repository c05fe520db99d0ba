"""The public names and signatures of `fastalign.compat.locality_alignment`."""

import inspect

import pytest
import timm
from torch import nn

import fastalign.compat.locality_alignment as la

REQUIRED = inspect.Parameter.empty

SIGNATURES = {
    "MaskLayer": {"image_width": REQUIRED, "patch_size": REQUIRED},
    "MaskEmbedDecoder": {
        **dict.fromkeys(("embed_dim", "num_heads", "num_patch_tokens", "num_prefix_tokens"), REQUIRED),
        **dict.fromkeys(("output_size", "num_layers"), REQUIRED),
        **dict.fromkeys(("prefix_only", "qkv_bias", "qk_norm"), False),
        "init_values": None,
        "norm_layer": nn.LayerNorm,
        "act_layer": nn.GELU,
        "mlp_layer": timm.layers.Mlp,
    },
    "MaskEmbedStudent": {"encoder": REQUIRED, "decoder": REQUIRED},
    "TransformerPooling": dict.fromkeys(("embed_dim", "num_heads", "num_tokens", "num_layers"), REQUIRED),
    "UniformMaskSampler": {"mask_size": REQUIRED, "antithetical_sampling": True, "include_null": True},
    "BernoulliMaskSampler": {
        "mask_size": REQUIRED, "mask_ratio": 0.5, "antithetical_sampling": True, "include_null": True
    },
    "BlockwiseMaskSampler": {
        "mask_size": REQUIRED, "target_ratio": 0.4, "antithetical_sampling": True, "include_null": True
    },
    "convert_to_teacher_model": {"model": REQUIRED, "skip_blocks": 0, "prefix_only": False},
    "convert_to_mim_teacher_model": {"model": REQUIRED},
    "convert_to_student_model": {"model": REQUIRED, "output_dim": REQUIRED, "output_head": "linear"},
    "convert_to_mim_student_model": {"model": REQUIRED, "output_dim": REQUIRED, "output_head": "linear"},
    "load_checkpoint": {
        "model": REQUIRED, "checkpoint_path": REQUIRED, "use_ema": True, "device": "cpu", "strict": True,
        "filter_fn": None,
    },
    "load_checkpoint_auto": {
        "model": REQUIRED, "checkpoint_path": REQUIRED, "use_ema": True, "device": "cpu", "strict": True
    },
    "CheckpointSaver": {
        "model": REQUIRED, "optimizer": REQUIRED, "args": None, "model_ema": None, "amp_scaler": None,
        "checkpoint_prefix": "checkpoint", "recovery_prefix": "recovery", "checkpoint_dir": "",
        "recovery_dir": "", "decreasing": False, "max_history": 10, "retain_interval": None,
        "unwrap_fn": timm.utils.unwrap_model,
    },
}  # fmt: skip


def test_every_public_name_is_there():
    assert set(la.__all__) == {*SIGNATURES, "backbones"}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    found = inspect.signature(getattr(la, name)).parameters.values()
    assert [(p.name, p.default) for p in found] == list(SIGNATURES[name].items())
