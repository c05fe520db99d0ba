"""Checkpoints in the authors' layout: `state_dict`, optional `state_dict_ema`, keys `encoder.*` and `decoder.*`."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.utils.model import get_state_dict
from torch import Tensor, nn

from fastalign.backbones.weight_files import read_file, unwrapped
from fastalign.backbones.weights import STATES, fold_layer_scale, trained_as
from fastalign.compat.locality_alignment.model_utils import MaskEmbedStudent


class CheckpointSaver(timm.utils.CheckpointSaver):
    """timm's saver of the best checkpoints, which also keeps every `retain_interval`-th epoch. Arguments are timm's.

    A checkpoint holds tensors and plain values only, and the student's soft-cap under `softcap`.
    """

    def __init__(self, *args, retain_interval: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.retain_interval = retain_interval

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        state = {
            "epoch": epoch,
            "arch": type(self.model).__name__.lower(),
            "state_dict": get_state_dict(self.model, self.unwrap_fn),
            "optimizer": self.optimizer.state_dict(),
            "version": 2,  # timm: the epoch is the one that was finished
            "softcap": softcap_of(self.model),
        }
        if self.args is not None:
            state |= {"arch": self.args.model, "args": json.loads(json.dumps(vars(self.args), default=str))}
        if self.amp_scaler is not None:
            state[self.amp_scaler.state_dict_key] = self.amp_scaler.state_dict()
        if self.model_ema is not None:
            state["state_dict_ema"] = get_state_dict(self.model_ema, self.unwrap_fn)
        if metric is not None:
            state["metric"] = metric
        torch.save(state, save_path)

    def _cleanup_checkpoints(self, trim: int = 0) -> None:
        keep = max(self.max_history - trim, 0)
        for path, *_ in self.checkpoint_files[keep:]:
            epoch = int(Path(path).name.removesuffix(self.extension).rpartition("-")[2])
            if not self.retain_interval or (epoch + 1) % self.retain_interval:
                Path(path).unlink(missing_ok=True)
        self.checkpoint_files = self.checkpoint_files[:keep]


def softcap_of(model: nn.Module) -> float | None:
    """The cap of a model's attention logits; None = plain attention."""
    caps = (getattr(module, "softcap", None) for module in model.modules())
    return next((cap for cap in caps if cap is not None), None)


def load_checkpoint(
    model: nn.Module,
    checkpoint_path: str,
    use_ema: bool = True,
    device: str | torch.device = "cpu",
    strict: bool = True,
    filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
):
    """Load the weights in a `.pth.tar`, `.pth` or `.safetensors` file into a model; no code in the file is run.

    `use_ema` prefers a moving average; `filter_fn`, (state dict, model) -> state dict, chooses what is loaded.
    Returns torch's record of missing and unexpected keys, which `strict` refuses. UserError for an unsafe file.
    """
    checkpoint = read_file(Path(checkpoint_path), device)
    names = STATES if use_ema else STATES[2:]  # the first two are averages
    name = next((name for name in names if isinstance(checkpoint.get(name), dict)), None)
    state = {unwrapped(key): value for key, value in (checkpoint[name] if name else checkpoint).items()}
    softcap = trained_as(checkpoint, str(checkpoint_path))[1] if name else None
    if softcap and softcap != softcap_of(model):
        warnings.warn(
            f"{checkpoint_path} was trained with attention logits capped at {softcap:g}, unlike this model: "
            f"create it as svit_..., with max_attn_val={softcap:g}, or its features will differ",
            stacklevel=2,
        )
    return model.load_state_dict(filter_fn(state, model) if filter_fn else state, strict=strict)


def load_checkpoint_auto(model: nn.Module, checkpoint_path: str, use_ema=True, device="cpu", strict=True):
    """As `load_checkpoint`; a student's checkpoint is fitted to a plain backbone by `auto_filter_fn`."""
    return load_checkpoint(model, checkpoint_path, use_ema, device, strict, auto_filter_fn)


def auto_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The encoder of a `MaskEmbedStudent` for a plain backbone, whose pooling is removed; other weights unchanged.

    LayerScale is folded into the layers before it if the backbone has none.
    """
    parts = {key.partition(".")[0] for key in state_dict}
    if isinstance(model, MaskEmbedStudent) or not parts <= {"encoder", "decoder"}:
        return state_dict
    model.attn_pool = model.global_pool = None
    state = {key.removeprefix("encoder."): v for key, v in state_dict.items() if key.startswith("encoder.")}
    return fold_layer_scale(state, model.state_dict().keys())
