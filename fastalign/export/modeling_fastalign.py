"""Vision towers aligned with fastalign, for transformers. The file needs only transformers (5.20 or newer).

Every export for transformers carries it: ``AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`` runs it.
The classes extend transformers' own in two ways:

- Attention logits s become ``softcap * tanh(s / softcap)`` where the configuration has a soft-cap, whichever
  attention implementation is selected, here or in an enclosing model.
- `last_hidden_state` and `hidden_states[-1]` are both the normed tokens, prefix first. transformers' own classes
  never norm `hidden_states`, which LLaVA reads, and CLIP's does not norm `last_hidden_state`.

Importing it also registers the classes with `AutoConfig` and `AutoModel`. Licence: Apache-2.0.
"""

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel, CLIPImageProcessorPil, PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.utils import can_return_tuple

SOFTCAP = "fastalign_softcap"  # the attention below in transformers' registry


def softcap_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    output_attentions: bool = False,
    **_,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: [B, H, T, d] -> [B, T, H, d]; the cap is the module's `config.softcap`.

    In 16 bits on a GPU it runs FlexAttention and returns no weights, unless `output_attentions` asks for them.
    """
    if attention_mask is not None:
        raise ValueError("soft-capped attention takes no attention mask")
    cap = module.config.softcap
    if query.is_cuda and query.dtype.itemsize == 2 and not (dropout or output_attentions):
        out, _ = flex_attention_forward(module, query, key, value, None, scaling=scaling, softcap=cap)
        return out, None
    logits = (query * scaling) @ key.transpose(2, 3)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = (cap * torch.tanh(logits / cap)).softmax(-1).to(value.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(SOFTCAP, softcap_attention)


class AlignedConfig(PreTrainedConfig):
    """A configuration of transformers with the fields that alignment adds."""

    _auto_class = "AutoConfig"  # saving copies this file
    softcap: float | None = None  # the cap of the attention logits; None = plain attention
    final_norm_eps: float | None = None  # the epsilon of the final norm; None = that of the blocks

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict, dict]:
        """Exports without a cap have the model type of transformers' own class, which loads them too."""
        config, kwargs = super().get_config_dict(*args, **kwargs)
        return config | {"model_type": cls.model_type}, kwargs

    @property
    def _attn_implementation(self) -> str | None:
        return SOFTCAP if self.softcap is not None else PreTrainedConfig._attn_implementation.fget(self)

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None) -> None:
        PreTrainedConfig._attn_implementation.fset(self, value)

    def to_dict(self) -> dict:
        """Also record the attention's name, so that transformers' own class refuses a capped model."""
        named = {} if self.softcap is None else {"attn_implementation": SOFTCAP}
        return super().to_dict() | named

    def llava_config(self, text_config: PreTrainedConfig, **kwargs) -> "LlavaConfig":
        """The configuration of a LLaVA that reads this tower's last, aligned layer (LLaVA's default is -2).

        The class token is left out, as in LLaVA; registers, which LLaVA does not know, stay before the patches.
        `text_config` is the language model's; `kwargs` are other arguments of `LlavaConfig` and take precedence.
        """
        registers = getattr(self, "num_register_tokens", 0)
        drop_class = not isinstance(self, transformers.SiglipVisionConfig) and not registers
        patches = (self.image_size // self.patch_size) ** 2
        settings = {
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default" if drop_class else "full",
            "image_seq_length": patches + (1 + registers if registers else 0),
        }
        return LlavaConfig(vision_config=self, text_config=text_config, **{**settings, **kwargs})


class LlavaConfig(transformers.LlavaConfig):
    """transformers' own, except that saving copies this file, which defines the tower's type."""

    _auto_class = "AutoConfig"


class AlignedModel:
    """Norms the tokens that transformers' class leaves unnormed."""

    _auto_class = "AutoModel"

    def __init__(self, config: AlignedConfig):
        super().__init__(config)
        if config.final_norm_eps is not None:
            getattr(self, self.final_norm).eps = config.final_norm_eps

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs):
        """Normalized images [B, C, height, width] -> the output of transformers' class."""
        out = super().forward(pixel_values, return_dict=True, **kwargs)
        if isinstance(self, transformers.CLIPVisionModel):
            out.last_hidden_state = self.post_layernorm(out.last_hidden_state)
        if out.hidden_states:
            out.hidden_states = (*out.hidden_states[:-1], out.last_hidden_state)
        return out


class AlignedImageProcessor(CLIPImageProcessorPil):
    """The evaluation transform of timm and fastalign, to the pixel: PIL's resampling, torchvision's centre crop."""

    _auto_class = "AutoImageProcessor"

    def convert_to_rgb(self, image, **kwargs):
        """Drop the alpha channel, as PIL does; transformers' own blends it with white."""
        if hasattr(image, "convert"):  # of PIL
            return np.array(image.convert("RGB"))
        return super().convert_to_rgb(image, **kwargs)  # transformers 5.20 gives none

    def center_crop(self, image, size, **_):
        """Crop [C, height, width]; a half-integer offset is rounded to even, as in torchvision, not down."""
        crop = (size.height, size.width)
        top, left = (round((side - cropped) / 2) for side, cropped in zip(image.shape[1:], crop, strict=True))
        return image[:, top : top + size.height, left : left + size.width]


TOWERS: dict[str, type] = {}  # by model type: each class's own, and that of the class that it extends
for _kind, _name, _norm in (
    ("clip", "CLIPVisionModel", "post_layernorm"),
    ("siglip", "SiglipVisionModel", "post_layernorm"),
    ("dinov2", "Dinov2Model", "layernorm"),
    ("dinov2_with_registers", "Dinov2WithRegistersModel", "layernorm"),
    ("dinov3", "DINOv3ViTModel", "norm"),
):
    _stock = getattr(transformers, _name)
    _config = type(
        f"Aligned{_stock.config_class.__name__}",
        (AlignedConfig, _stock.config_class),
        {"model_type": f"fastalign_{_kind}", "__module__": __name__},
    )
    _model = type(
        f"Aligned{_name}",
        (AlignedModel, _stock),
        {"config_class": _config, "final_norm": _norm, "__module__": __name__},
    )
    globals().update({_config.__name__: _config, _model.__name__: _model})
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    # In files, weights have the names that the extended class uses.
    _renaming = get_checkpoint_conversion_mapping(_name) or get_checkpoint_conversion_mapping(
        _stock.config_class.model_type
    )
    register_checkpoint_conversion_mapping(_model.__name__, _renaming, overwrite=True)
    TOWERS |= dict.fromkeys((_config.model_type, _stock.config_class.model_type), _model)
