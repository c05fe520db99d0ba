"""Every vision transformer of timm: equal to timm's, or refused in one line before anything is read."""

import re
from collections import Counter

import timm
import torch
from torch import nn

import fastalign as fa
from fastalign.backbones.describe import describe
from fastalign.backbones.zoo import create_backbone
from tests.numerics import randomise, relative_error

FILES = ["vision_transformer", *(f"vision_transformer_{kind}" for kind in ("hybrid", "relpos", "sam"))]
FILES += ["naflexvit", "beit", "eva", "deit", "vitamin"]
NARROW = {"depth": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 0}
BOUND = 1e-5


def build(name: str) -> tuple[nn.Module, dict]:
    """timm's model without weights, narrow where it can be, and the arguments."""
    for kwargs in (NARROW, {"depth": 1, "num_classes": 0}, {"num_classes": 0}):
        try:
            with torch.device("meta"):
                return timm.create_model(name, **kwargs), kwargs
        except (TypeError, ValueError, AssertionError):
            continue
    raise AssertionError(f"timm cannot build {name}")


def refusal(name: str, kwargs: dict) -> str | None:
    """The error before the file of weights is read; None if it is read."""
    try:
        create_backbone(name, checkpoint="none.pth", **kwargs)
    except Read:
        return None
    except fa.UserError as error:
        return str(error)


class Read(Exception):
    """A file of weights was to be read."""


def test_every_name_equals_timm_or_is_refused_in_one_line(monkeypatch):
    """Names that differ in weights, image size, depth and width only are computed once."""

    def read(path):
        raise Read

    monkeypatch.setattr("fastalign.backbones.zoo.read_checkpoint", read)
    supported, refused, computed = [], Counter(), set()
    for name in [name for module in FILES for name in timm.list_models(module=module)]:
        model, kwargs = build(name)
        if reason := refusal(name, kwargs):
            found = re.fullmatch(f"backbone {name}: (.+) is not supported: choose .+", reason)
            assert found, reason
            assert found[1].startswith(type(model).__name__)
            refused[found[1]] += 1
            continue
        supported.append(name)
        spec = describe(model)
        shape = str(spec).replace(str(spec.image_size), "") + rotary(model)
        if shape not in computed:
            computed.add(shape)
            rows, columns = spec.patch_size
            assert error_against_timm(name, {**kwargs, "img_size": (2 * rows, 3 * columns)}) < BOUND, name
    assert len(supported) >= 211
    assert len(supported) + refused.total() >= 310


def rotary(model: nn.Module) -> str:
    """What a rotary table depends on besides the size."""
    rope = getattr(model, "rope", None)
    keys = ("temperature", "grid_offset", "grid_indexing", "ref_feat_shape")
    return type(rope).__name__ + str([getattr(rope, key, None) for key in keys])


def error_against_timm(name: str, kwargs: dict) -> float:
    """Of the pooled output and the tokens, random weights."""
    theirs = timm.create_model(name, **kwargs).eval()
    randomise(theirs)
    ours = create_backbone(name, **kwargs).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, *ours.spec.image_size)
    with torch.no_grad():
        tokens = theirs.forward_features(images)
        pairs = ((ours.forward_features(images), tokens), (ours(images), theirs.forward_head(tokens)))
        return max(relative_error(*pair) for pair in pairs)
