"""What heads read, and what they compute, against timm, torch and scikit-learn."""

from functools import partial

import pytest
import timm
import torch
from sklearn import preprocessing
from torch import nn

import fastalign as fa
from fastalign.evaluation.image_heads import AttentionHead, LinearHead, TransformerHead, represent
from tests.classify.helpers import KWARGS, NAME


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg", "reg_tokens": 1, "fc_norm": True}],
    ids=["class token", "class token and registers", "mean of patches and fc_norm"],
)
def test_what_a_linear_head_reads_is_what_timm_pools(kwargs):
    vit = fa.create_backbone(NAME, **KWARGS, **kwargs)
    model = timm.create_model(NAME, num_classes=0, **KWARGS, **kwargs)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.load_state_dict(vit.state_dict())
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        ours = represent(vit.eval(), vit.forward_features(images), "linear")
        torch.testing.assert_close(ours, model.eval()(images))
        everything = represent(vit, vit.forward_features(images), "attention")
        torch.testing.assert_close(everything, model.forward_features(images))


def test_features_are_standardised_as_scikit_learn_does():
    features = torch.randn(100, 4) * torch.tensor([100.0, 1, 0.01, 0]) + torch.tensor([5.0, 0, 3, 7])
    head = LinearHead(4, 4)
    head.standardise(features)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(4))
    expected = preprocessing.StandardScaler().fit_transform(features.double().numpy())
    torch.testing.assert_close(
        head(features)[:, :3].double(), torch.from_numpy(expected[:, :3]), atol=1e-4, rtol=1e-4
    )
    assert not head(features)[:, 3].any(), "a channel that never changes says nothing"


def test_the_attention_head_is_multihead_attention_of_one_query():
    head, tokens = AttentionHead(128, 5).eval(), torch.randn(3, 7, 128)
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
    head, tokens = TransformerHead(128, 5, 7).eval(), torch.randn(3, 7, 128)
    x = torch.cat([head.query.expand(3, -1, -1), head.norm(tokens) + head.position], 1)
    for block in head.blocks:
        theirs = timm.models.vision_transformer.Block(
            128, 2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)
        )
        theirs.load_state_dict(block.state_dict())
        x = theirs.eval()(x)
    torch.testing.assert_close(head(tokens), head.linear(head.norm_out(x[:, 0])))
