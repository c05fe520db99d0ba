"""The public names and signatures of `fastalign.compat.locality_alignment`."""

import inspect

import pytest

import fastalign.compat.locality_alignment as la

SIGNATURES = {
    "MaskLayer": "image_width, patch_size",
    "MaskEmbedDecoder": "embed_dim, num_heads, num_patch_tokens, num_prefix_tokens, output_size, num_layers, "
    "prefix_only=False, qkv_bias=False, qk_norm=False, init_values=None, norm_layer=LayerNorm, act_layer=GELU, "
    "mlp_layer=Mlp",
    "MaskEmbedStudent": "encoder, decoder",
    "TransformerPooling": "embed_dim, num_heads, num_tokens, num_layers",
    "UniformMaskSampler": "mask_size, antithetical_sampling=True, include_null=True",
    "BernoulliMaskSampler": "mask_size, mask_ratio=0.5, antithetical_sampling=True, include_null=True",
    "BlockwiseMaskSampler": "mask_size, target_ratio=0.4, antithetical_sampling=True, include_null=True",
    "convert_to_teacher_model": "model, skip_blocks=0, prefix_only=False",
    "convert_to_mim_teacher_model": "model",
    "convert_to_student_model": "model, output_dim, output_head=linear",
    "convert_to_mim_student_model": "model, output_dim, output_head=linear",
    "load_checkpoint": "model, checkpoint_path, use_ema=True, device=cpu, strict=True, filter_fn=None",
    "load_checkpoint_auto": "model, checkpoint_path, use_ema=True, device=cpu, strict=True",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    found = [
        p.name if p.default is p.empty else f"{p.name}={getattr(p.default, '__name__', p.default)}"
        for p in inspect.signature(getattr(la, name)).parameters.values()
    ]
    assert ", ".join(found) == SIGNATURES[name]
