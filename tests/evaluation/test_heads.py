"""Heads and what they read, against timm, torch and scikit-learn."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from sklearn import preprocessing
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from fastalign.backbones.spec import BlockSpec, ViTSpec
from fastalign.evaluation.heads import (
    AttentionHead,
    Classifier,
    ClassTokenTransformer,
    StandardizedLinear,
    make_patch_head,
)
from tests.evaluation.helpers import KWARGS, models

SPEC = ViTSpec(BlockSpec(24, 3, 96), 1, image_size=(3, 3), patch_size=(1, 1), registers=1)
BARE = replace(SPEC, class_token=False, registers=0)


def timm_head(classes, *, latent=0):
    """The transformer head, written with timm's blocks."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(latent or 11, 24))
            self.norm_pre, self.norm = nn.LayerNorm(24), nn.LayerNorm(24)
            block = partial(TimmBlock, 24, 3, init_values=0.01, norm_layer=nn.LayerNorm)
            self.blocks = nn.Sequential(block(), block())
            self.head = nn.Linear(24, classes)

        def forward(self, x):
            extra = self.pos_embed.expand(len(x), -1, -1)
            x = torch.cat([x, extra], 1) if latent else x + extra
            return self.head(self.norm(self.blocks(self.norm_pre(x))))

    return Head()


@pytest.mark.parametrize(
    ("name", "labels", "prefix", "take"),
    [
        ("transformer", "union", 2, lambda x: x[:, 2:]),
        ("transformer", "majority", 2, lambda x: x[:, 2:]),
        ("transformer", "global-union", 2, lambda x: x[:, :2].mean(1, keepdim=True)),
        ("transformer", "global-union", 0, lambda x: x.mean(1, keepdim=True)),
        ("latent", "union", 2, lambda x: x[:, -9:]),
        ("latent-global", "union", 2, lambda x: x[:, -9:]),
    ],
)
def test_transformer_heads_equal_timms_blocks(name, labels, prefix, take):
    torch.manual_seed(0)
    spec = SPEC if prefix else replace(BARE, image_size=(1, 11))
    head = make_patch_head(name, labels, spec, 4).double()
    theirs = timm_head(4, latent=9 if "latent" in name else 0).double()
    theirs.load_state_dict(head[1].state_dict())
    tokens = torch.randn(3, 11, 24, dtype=torch.float64)
    seen = tokens[:, :2].mean(1, keepdim=True) if name == "latent-global" else tokens
    torch.testing.assert_close(head(tokens), take(theirs(seen)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_simple_heads_read_the_right_tokens(name):
    torch.manual_seed(0)
    tokens = torch.randn(3, 11, 24)
    for labels, seen in (
        ("union", tokens[:, 2:]),
        ("global-in-patch", tokens[:, 2:]),
        ("global-union", tokens[:, :2].mean(1, keepdim=True)),
    ):
        head = make_patch_head(name, labels, SPEC, 4, hidden=16)
        assert torch.equal(head(tokens), head[1](seen))
    head = make_patch_head(name, "global-union", BARE, 4)
    assert torch.equal(head(tokens), head[1](tokens.mean(1, keepdim=True)))


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg", "reg_tokens": 1, "fc_norm": True}],
    ids=["class token", "class token and registers", "mean of patches and fc_norm"],
)
def test_what_a_linear_head_reads_is_what_timm_pools(kwargs):
    vit, model = models(**KWARGS, **kwargs)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(Classifier(vit, "linear", 6).features(images), model(images))
        everything = Classifier(vit, "attention", 6).features(images)
        torch.testing.assert_close(everything, model.forward_features(images))


def test_features_are_standardised_as_scikit_learn_does():
    features = torch.randn(100, 4) * torch.tensor([100.0, 1, 0.01, 0]) + torch.tensor([5.0, 0, 3, 7])
    head = StandardizedLinear(4, 4)
    head.standardize(features)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(4))
    expected = preprocessing.StandardScaler().fit_transform(features.double().numpy())
    torch.testing.assert_close(
        head(features)[:, :3].double(), torch.from_numpy(expected[:, :3]), atol=1e-4, rtol=1e-4
    )
    assert not head(features)[:, 3].any(), "a channel that never changes says nothing"


def test_the_attention_head_is_multihead_attention_of_one_query():
    head, tokens = AttentionHead(128, 2, 5).eval(), torch.randn(3, 7, 128)
    theirs = nn.MultiheadAttention(128, 2, batch_first=True)
    with torch.no_grad():
        nn.init.normal_(head.query)
        nn.init.normal_(head.kv.weight)
        theirs.in_proj_weight.copy_(torch.cat([torch.eye(128), head.kv.weight]))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.load_state_dict(head.proj.state_dict())
        normed = head.norm(tokens)
        pooled, _ = theirs(head.query.expand(3, 1, -1), normed, normed)
        expected = head.linear(head.norm_out(pooled[:, 0]))
        torch.testing.assert_close(head(tokens), expected)


def test_the_transformer_head_is_timms_blocks():
    head, tokens = ClassTokenTransformer(128, 2, 5, 7).eval(), torch.randn(3, 7, 128)
    x = torch.cat([head.query.expand(3, -1, -1), head.norm(tokens) + head.position], 1)
    for block in head.blocks:
        theirs = TimmBlock(128, 2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
        theirs.load_state_dict(block.state_dict())
        x = theirs.eval()(x)
    torch.testing.assert_close(head(tokens), head.linear(head.norm_out(x[:, 0])))
