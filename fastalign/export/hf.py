"""transformers' vision towers as they were aligned: attention soft-capped, the last hidden state normed.

Import it before loading a folder that ``python -m fastalign.export --to hf-*`` wrote: it registers the classes below
with `AutoConfig` and `AutoModel`. Without it transformers refuses a capped export, as an unknown model type, instead
of silently dropping the cap.

CLIP's own class leaves its tokens unnormed, and LLaVA reads `hidden_states`, which no class norms. Here
`last_hidden_state` and `hidden_states[-1]` are both what `fastalign.load_backbone(run).forward_features` gives.
"""

import json
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
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
logger = logging.get_logger(__name__)


def softcap_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, output_attentions: bool = False, **_
) -> tuple:
    """transformers' attention interface: [B, H, T, d] -> [B, T, H, d]; the cap is the module's `config.softcap`.

    It computes no attention weights, and warns if they are requested, as transformers' sdpa does.
    """
    if output_attentions:
        logger.warning_once(
            "fastalign's soft-capped attention does not support `output_attentions=True`: `attentions` will be None. "
            "Export with --drop-softcap to get the weights of plain attention, which differ."
        )
    if attention_mask is not None:
        raise ValueError("fastalign's soft-capped attention takes no attention mask")
    out = attention(query, key, value, softcap=module.config.softcap)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(SOFTCAP, softcap_attention)


class AlignedConfig(PreTrainedConfig):
    """Adds `softcap`, the cap of the attention logits, to a configuration; None = plain attention."""

    softcap: float | None = None

    @property
    def _attn_implementation(self) -> str | None:
        # The features need the cap: choosing another attention, here or in an enclosing model, must not drop it.
        return SOFTCAP if self.softcap is not None else PreTrainedConfig._attn_implementation.fget(self)

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None) -> None:
        PreTrainedConfig._attn_implementation.fset(self, value)


class AlignedModel:
    """Makes `last_hidden_state` and `hidden_states[-1]` of a model the normed tokens, prefix first."""

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None, **kwargs):
        """[B, C, height, width] -> as transformers' class, which this one inherits."""
        out = super().forward(pixel_values, return_dict=True, **kwargs)
        tokens = out.last_hidden_state
        if isinstance(self, transformers.CLIPVisionModel):
            tokens = self.post_layernorm(tokens)
        hidden = out.hidden_states and (*out.hidden_states[:-1], tokens)
        out = BaseModelOutputWithPooling(tokens, tokens[:, 0], hidden, out.attentions or None)
        return out.to_tuple() if return_dict is False else out


TOWERS: dict[str, type[PreTrainedModel]] = {}
"""Our classes by model type, both ours and that of the class that each extends."""
for _kind, _name in (
    ("clip", "CLIPVisionModel"),
    ("siglip", "SiglipVisionModel"),
    ("dinov2", "Dinov2Model"),
    ("dinov2_with_registers", "Dinov2WithRegistersModel"),
):
    _stock = getattr(transformers, _name)
    _config = type(
        f"Aligned{_stock.config_class.__name__}",
        (AlignedConfig, _stock.config_class),
        {"model_type": f"fastalign_{_kind}", "__module__": __name__},
    )
    _model = type(
        f"Aligned{_name}", (AlignedModel, _stock), {"config_class": _config, "__module__": __name__}
    )
    globals().update({_config.__name__: _config, _model.__name__: _model})
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    # The names that files have: transformers looks them up by the class.
    register_checkpoint_conversion_mapping(_model.__name__, get_checkpoint_conversion_mapping(_name))
    TOWERS |= dict.fromkeys((_config.model_type, _stock.config_class.model_type), _model)


def load_tower(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tower of an ``hf-*`` export. Its `hidden_states[-1]` is our features, cap and norm included.

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
    kind = facts.pop("model_type", "")
    if kind not in TOWERS:
        raise UserError(f"{path}: model type {kind!r} is not one of an export --to hf-*")
    model = TOWERS[kind]
    return model.from_pretrained(folder, config=model.config_class(**facts), dtype=dtype)


def llava_config(folder: str | Path, text_config: PreTrainedConfig, **kwargs) -> LlavaConfig:
    """LLaVA around the tower of an export, reading the aligned layer: the last, not LLaVA's default of -2.

    The class token is left out, as in LLaVA; registers, which LLaVA does not know, stay before the patches.

    Args:
        folder: the export.
        text_config: of the language model.
        **kwargs: other arguments of `LlavaConfig`, which take precedence.
    """
    config = load_tower(folder).config
    registers = getattr(config, "num_register_tokens", 0)
    drop_class = not isinstance(config, transformers.SiglipVisionConfig) and not registers
    patches = (config.image_size // config.patch_size) ** 2
    settings = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if drop_class else "full",
        "image_seq_length": patches + (1 + registers if registers else 0),
    }
    return LlavaConfig(vision_config=config, text_config=text_config, **{**settings, **kwargs})
