"""Checkpoints of other projects' training scripts, with the names that each gives to timm's parameters, by hand."""

import pytest
import timm
import torch

import fastalign as fa
from tests.backbones.helpers import AT_16, DINO, IMAGES, ONE, REGISTERS, SMALL, VIT
from tests.numerics import randomise, relative_error


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def chunked(state: dict) -> dict:
    """As dinov2 with block_chunks=2: chunks of one block each here; a block keeps its number within."""
    return {
        key.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): v
        for key, v in state.items()
    }


def dinov2s(state: dict) -> dict:
    """timm's registers and class token under dinov2's names, where the class token has a position of its own."""
    if "reg_token" not in state:
        return state | {"mask_token": torch.zeros(1, 48)}
    place = torch.randn(1, 1, 48)
    rest = {key: value for key, value in state.items() if key != "reg_token"}
    return rest | {
        "mask_token": torch.zeros(1, 48),
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - place,
        "pos_embed": torch.cat([place, state["pos_embed"]], 1),
    }


def maes(state: dict) -> dict:
    decoder = {"decoder_embed.weight": (8, 48), "decoder_pos_embed": (1, 5, 8), "decoder_norm.weight": (8,)}
    decoder |= {"decoder_blocks.0.norm1.weight": (8,), "decoder_pred.bias": (768,), "mask_token": (1, 1, 8)}
    return state | {key: torch.randn(shape) for key, shape in decoder.items()}


def projector(prefix: str) -> dict:
    return {f"{prefix}mlp.0.weight": torch.randn(4, 48), f"{prefix}last_layer.weight": torch.randn(4, 4)}


SCRIPTS = {
    "dinov2's teacher": (
        DINO,
        lambda x, y: {"teacher": prefixed("backbone.", chunked(dinov2s(x))) | projector("dino_head.")},
    ),
    "dinov2's whole model": (
        REGISTERS,
        lambda x, y: {
            "model": prefixed("student.backbone.", dinov2s(y)) | prefixed("teacher.backbone.", dinov2s(x)),
            "iteration": 3,
        },
    ),
    "dinov2's backbone": (REGISTERS, lambda x, y: chunked(dinov2s(x))),
    "DINO": (
        VIT,
        lambda x, y: {
            "student": prefixed("module.backbone.", y) | projector("module.head."),
            "teacher": prefixed("backbone.", x) | projector("head."),
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
            "dino_loss": {"center": torch.zeros(1, 4)},
            "epoch": 7,
        },
    ),
    "MAE": (VIT, lambda x, y: {"model": maes(x), "optimizer": {}, "epoch": 1, "scaler": {}}),
    "MoCo-v3": (
        VIT,
        lambda x, y: {
            "arch": "vit_base",
            "state_dict": prefixed("module.base_encoder.", x | {"head.0.weight": torch.ones(4, 48)})
            | prefixed("module.momentum_encoder.", y),
        },
    ),
    "Lightning": (
        VIT,
        lambda x, y: {
            "state_dict": {**prefixed("model.", x | {"head.weight": ONE}), "criterion.scale": ONE},
            "pytorch-lightning_version": "2.5",
            "hyper_parameters": {"lr": 0.1},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        },
    ),
    "FSDP": (VIT, lambda x, y: {k.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): v for k, v in x.items()}),
    "I-JEPA": (
        VIT,
        lambda x, y: {"encoder": prefixed("module.", x), "target_encoder": prefixed("module.", y), "epoch": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
@torch.no_grad()
def test_checkpoints_of_training_scripts(tmp_path, script):
    """`y` are weights that must not be read."""
    name, save = SCRIPTS[script]
    kwargs = SMALL if name == VIT else {**SMALL, **AT_16}
    model, other = (timm.create_model(name, num_classes=0, **kwargs).eval() for _ in range(2))
    randomise(model, 0.2)
    torch.save(save(model.state_dict(), other.state_dict()), tmp_path / "last.ckpt")
    vit = fa.create_backbone(name, checkpoint=tmp_path / "last.ckpt", **kwargs).eval()
    found, wanted = vit.forward_features(IMAGES), model.forward_features(IMAGES)
    if name == REGISTERS:  # a sum that is taken apart and added up again
        assert relative_error(found, wanted.double()) < 1e-6
    else:
        assert torch.equal(found, wanted)
