"""transformers' vision towers as they were aligned: attention soft-capped, the last hidden state normed.

Import it before loading a folder that ``python -m fastalign.export --to hf-*`` wrote: it registers the classes below
with `AutoConfig` and `AutoModel`. Without it transformers refuses a capped export, as a model type it does not
know, instead of dropping the cap in silence.

CLIP's own class leaves its tokens unnormed, and LLaVA reads `hidden_states`, which no class norms. Here
`last_hidden_state` and `hidden_states[-1]` are both what `fastalign.load_backbone(run).forward_features` gives.
"""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from fastalign.ops.attention import attention
from fastalign.utils.errors import UserError

SOFTCAP = "fastalign_softcap"
"""The name of our attention in transformers' registry."""


def softcap_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, output_attentions: bool = False, **_
) -> tuple:
    """transformers' attention interface: [B, H, T, d] -> [B, T, H, d]; the cap is the module's `config.softcap`.

    It computes no attention weights, and says so where they are asked for, as transformers' sdpa does.
    """
    if output_attentions:
        logger.warning_once(
            "fastalign's soft-capped attention does not support `output_attentions=True`: `attentions` will be None. "
            "Export with --drop-softcap to get the weights of plain attention, which are other ones."
        )
    if attention_mask is not None:
        raise ValueError("fastalign's soft-capped attention takes no attention mask")
    out = attention(query, key, value, softcap=module.config.softcap)
    return out.transpose(1, 2).contiguous(), None


logger = logging.get_logger(__name__)
AttentionInterface.register(SOFTCAP, softcap_attention)


class AlignedConfig(PreTrainedConfig):
    """What the configurations below add: `softcap`, the cap of the attention logits; None = plain attention."""

    softcap: float | None = None

    @property
    def _attn_implementation(self) -> str | None:
        # Features are those of the cap: choosing another attention, here or in a model around, must not drop it.
        return SOFTCAP if self.softcap is not None else PreTrainedConfig._attn_implementation.fget(self)

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None) -> None:
        PreTrainedConfig._attn_implementation.fset(self, value)


class AlignedModel:
    """What the models below add: `last_hidden_state` and `hidden_states[-1]` are the normed tokens, prefix first."""

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None, **kwargs):
        """[B, C, height, width] -> as the class of transformers, which this one inherits."""
        out = super().forward(pixel_values, return_dict=True, **kwargs)
        tokens = self.normed(out.last_hidden_state)
        hidden = out.hidden_states and (*out.hidden_states[:-1], tokens)
        out = BaseModelOutputWithPooling(tokens, tokens[:, 0], hidden, out.attentions or None)
        return out.to_tuple() if return_dict is False else out

    def normed(self, tokens: Tensor) -> Tensor:
        """The tokens that the class of transformers returns, normed."""
        return tokens


class AlignedCLIPVisionConfig(AlignedConfig, CLIPVisionConfig):
    model_type = "fastalign_clip"


class AlignedCLIPVisionModel(AlignedModel, CLIPVisionModel):
    config_class = AlignedCLIPVisionConfig

    def normed(self, tokens: Tensor) -> Tensor:
        return self.post_layernorm(tokens)


class AlignedSiglipVisionConfig(AlignedConfig, SiglipVisionConfig):
    model_type = "fastalign_siglip"


class AlignedSiglipVisionModel(AlignedModel, SiglipVisionModel):
    config_class = AlignedSiglipVisionConfig


class AlignedDinov2Config(AlignedConfig, Dinov2Config):
    model_type = "fastalign_dinov2"


class AlignedDinov2Model(AlignedModel, Dinov2Model):
    config_class = AlignedDinov2Config


class AlignedDinov2WithRegistersConfig(AlignedConfig, Dinov2WithRegistersConfig):
    model_type = "fastalign_dinov2_with_registers"


class AlignedDinov2WithRegistersModel(AlignedModel, Dinov2WithRegistersModel):
    config_class = AlignedDinov2WithRegistersConfig


TOWERS = (
    AlignedCLIPVisionModel,
    AlignedSiglipVisionModel,
    AlignedDinov2Model,
    AlignedDinov2WithRegistersModel,
)
for _model in TOWERS:
    _config, _stock = _model.config_class, _model.__mro__[2]
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    # The names that files have: transformers knows them by the class.
    register_checkpoint_conversion_mapping(
        _model.__name__, get_checkpoint_conversion_mapping(_stock.__name__)
    )


def aligned_class(model_type: str) -> type[PreTrainedModel]:
    """The class above for a model type, its own or that of transformers' class that it extends."""
    for model in TOWERS:
        if model_type in (model.config_class.model_type, model.__mro__[2].config_class.model_type):
            return model
    raise UserError(
        f"model type {model_type!r} is none that fastalign exports: --to hf-clip, hf-siglip or hf-dinov2"
    )


def load_tower(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tower that an ``hf-*`` export holds, whose `hidden_states[-1]` is our features, cap and norm included.

    Args:
        folder: the export, of a class of transformers or of one above.
        dtype: of the weights.

    Raises:
        UserError: not an export.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"no config.json in {folder}: give the folder of an export --to hf-*")
    facts = json.loads(path.read_text())
    model = aligned_class(facts.pop("model_type", ""))
    return model.from_pretrained(folder, config=model.config_class(**facts), dtype=dtype)


def llava_config(folder: str | Path, text_config: PreTrainedConfig, **kwargs) -> LlavaConfig:
    """LLaVA around the tower of an export, reading the layer that was aligned: the last, not LLaVA's default of -2.

    The class token is left out, as LLaVA does; registers, which it knows nothing of, stay before the patches.

    Args:
        folder: the export.
        text_config: of the language model.
        **kwargs: other arguments of `LlavaConfig`, which win.
    """
    config = load_tower(folder).config
    registers = getattr(config, "num_register_tokens", 0)
    drop_class = not isinstance(config, SiglipVisionConfig) and not registers
    patches = (config.image_size // config.patch_size) ** 2
    settings = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if drop_class else "full",
        "image_seq_length": patches + (1 + registers if registers else 0),
    }
    return LlavaConfig(vision_config=config, text_config=text_config, **{**settings, **kwargs})
