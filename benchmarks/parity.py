"""Errors of our backbones relative to timm's on random weights: ``python -m benchmarks.parity [NAME ...]``.

fp32, each backbone of the method at its native size and full depth, forward pass and every gradient with a
random cotangent. Writes `benchmarks/results/parity.json`; with names other rows stay.
"""

import argparse
import copy

import timm
import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.tolerance import gradient_error
from fastalign.backbones import naflex
from fastalign.backbones.vit import ViT
from fastalign.backbones.zoo import MOCO, from_timm

BACKBONES = [
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "vit_base_patch16_224.mae",
    "vit_base_patch16_224.dino",
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch16_clip_quickgelu_224.openai",
    "vit_large_patch14_clip_quickgelu_224.openai",
    "vit_large_patch14_clip_quickgelu_336.openai",
    "vit_base_patch16_clip_224.laion2b",
    "vit_base_patch16_clip_224.dfn2b",
    "vit_base_patch16_siglip_224.webli",
    "vit_so400m_patch14_siglip_224",
    "vit_so400m_patch14_siglip_384",
    "beit_base_patch16_224.in22k_ft_in22k_in1k",
    "beitv2_base_patch16_224.in1k_ft_in22k_in1k",
    "eva02_base_patch16_clip_224.merged2b",
    "vit_base_patch16_dinov3.lvd1689m",
    "vit_small_plus_patch16_dinov3_qkvb.lvd1689m",
    "vit_pe_core_base_patch16_224.fb",
    "vit_pe_spatial_tiny_patch16_512.fb",
    "vit_small_patch16_rope_ape_224.naver_in1k",
    "vit_small_patch16_rope_mixed_224.naver_in1k",
    MOCO,
]


def measure(name: str, images: int = 1, **kwargs) -> dict[str, float]:
    """Relative errors, in the Euclidean norm, of tokens, pooled output and gradients against timm's."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, **{"num_classes": 0, **kwargs})
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return compare(theirs, from_timm(copy.deepcopy(theirs)), images)


def compare(theirs: nn.Module, ours: ViT, images: int = 1) -> dict[str, float]:
    """As `measure`, of a timm model and ours with the same weights; for the gradient the largest of a parameter."""
    theirs.eval(), ours.eval()
    pixels = torch.randn(images, ours.spec.channels, *ours.spec.image_size)
    cotangent = torch.randn(images, ours.spec.prefix + ours.spec.patches, ours.embed_dim)
    results = [_run(model, pixels, cotangent) for model in (theirs, ours)]
    (tokens, pooled, gradient), (our_tokens, our_pooled, our_gradient) = results
    if isinstance(theirs, naflex.NaFlexVit):
        our_gradient = _naflex_gradient(theirs, our_gradient, ours.spec.grid)
    assert gradient.keys() == our_gradient.keys(), "the trained parameters differ"
    return {
        "tokens": _error(our_tokens, tokens),
        "pooled": _error(our_pooled, pooled),
        "gradient": gradient_error(our_gradient, gradient, floor=1e-3),
    }


def _naflex_gradient(theirs: nn.Module, gradient: dict[str, Tensor], grid: tuple) -> dict[str, Tensor]:
    """Our gradient by timm's parameters, of which ours are functions: through the position table's resampling."""
    names, parameters = zip(*theirs.named_parameters(), strict=True)
    state = naflex.vit_state(theirs, grid)
    outputs = [state[name] for name in gradient]
    found = torch.autograd.grad(outputs, parameters, list(gradient.values()), allow_unused=True)
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


def _run(model: nn.Module, pixels: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    tokens = model.forward_features(pixels)
    pooled = model.forward_head(tokens)
    ((tokens * cotangent).sum() + pooled.square().sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return tokens.detach(), pooled.detach(), gradients


def _error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).double().norm() / wanted.double().norm()).item()


def main(names: list[str]) -> None:
    """Measure, print, write."""
    rows = []
    for name in names or BACKBONES:
        rows.append({"backbone": name, **measure(name)})
        line = "{backbone:48} tokens {tokens:.1e}  pooled {pooled:.1e}  gradient {gradient:.1e}"
        print(line.format(**rows[-1]))
    record.write("parity", rows, key=("backbone",))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of timm; default a selection")
    main(parser.parse_args().names)
