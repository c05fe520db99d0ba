"""Rotary backbones: the angles against the papers' formulas in float64, everything else against timm."""

import copy
from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional

import fastalign as fa
from fastalign import ops
from fastalign.backbones.blocks import pack_table, rotate
from fastalign.backbones.zoo import from_timm
from tests.backbones.helpers import capped
from tests.numerics import gradient_error, randomise, relative_error

NARROW = {"depth": 3, "embed_dim": 96, "num_heads": 3, "num_classes": 0}
FAMILIES = {
    "DINOv3": ("vit_small_patch16_dinov3", {}),
    "DINOv3 plus": ("vit_small_plus_patch16_dinov3_qkvb", {}),
    "LingBot": ("vit_large_patch16_lingbot", {}),
    "PE core": ("vit_pe_core_base_patch16_224", {"attn_pool_num_heads": 3}),
    "PE core, no class token": ("vit_pe_core_gigantic_patch14_448", {"attn_pool_num_heads": 3}),
    "PE spatial": ("vit_pe_spatial_base_patch16_512", {}),
    "registers": ("vit_betwixt_patch16_rope_reg4_gap_256", {}),
    "axial": ("vit_base_patch16_rope_224", {}),
    "axial, position": ("vit_base_patch16_rope_ape_224", {}),
    "mixed": ("vit_base_patch16_rope_mixed_224", {}),
    "mixed, position": ("vit_base_patch16_rope_mixed_ape_224", {}),
}
GRIDS = [(3, 3), (2, 5)]


def build(family: str, grid: tuple[int, int] | None = (2, 3), **kwargs):
    """timm's model in evaluation mode with every weight moved, ours with the same weights, and images."""
    name, options = FAMILIES[family]
    patch = 14 if "patch14" in name else 16
    size = {} if grid is None else {"img_size": (grid[0] * patch, grid[1] * patch)}
    torch.manual_seed(0)
    theirs = timm.create_model(name, **NARROW, **options, **size, **kwargs).eval()
    randomise(theirs, 0.1)
    ours = fa.create_backbone(name, **NARROW, **options, **size, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.eval(), torch.randn(2, 3, *ours.spec.image_size)


def gradients(model) -> dict:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["DINOv3 plus", "PE core", "axial, position", "mixed, position"])
def test_layers_softcap_and_checkpointing_equal_timm(family, monkeypatch):
    theirs, ours, images = build(family)
    options = {"norm": True, "output_fmt": "NLC", "intermediates_only": True}
    layers = theirs.forward_intermediates(images, **options)
    found = [layer[:, ours.spec.prefix :] for layer in ours.forward_layers(images, [2, 1, 0])]
    assert all(map(torch.equal, found, layers))
    monkeypatch.setattr(functional, "scaled_dot_product_attention", capped(0.5))
    wanted = theirs.forward_features(images)
    cotangent = torch.randn_like(wanted)
    wanted.backward(cotangent)
    monkeypatch.undo()
    plain = ours(images)
    ours.softcap = 0.5
    assert relative_error(ours(images), plain) > 1e-4
    for checkpointing in (False, True):
        ours.zero_grad()
        ours.train().grad_checkpointing = checkpointing
        found = ours.forward_features(images)
        found.backward(cotangent)
        assert relative_error(found, wanted) < 1e-6
        assert gradient_error(gradients(ours), gradients(theirs)) < 1e-5


def axial(grid, width, temperature, *, offset=0.0, reference=None, columns_first=False):
    """[N, d / 2]: RoFormer's angles p / temperature^(t / (d / 4)), half of them for each coordinate of the patch."""
    place = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 2) + offset
    if reference is not None:  # the trained grid is stretched over the grid
        place = place / np.array(grid) * np.array(reference)
    place = place[:, ::-1] if columns_first else place
    frequency = temperature ** -(np.arange(width // 4) / (width // 4))
    return (place[:, :, None] * frequency).reshape(len(place), -1)


def dinov3(grid, width):
    """[N, d / 2]: 2 pi c / period, c the centre of the patch in [-1, 1], the periods from 1 to 100 geometrically."""
    centres = [2 * (np.arange(side) + 0.5) / side - 1 for side in grid]
    place = np.stack(np.meshgrid(*centres, indexing="ij"), -1).reshape(-1, 2)
    period = 100.0 ** (4 * np.arange(width // 4) / width)
    return (2 * np.pi * place[:, :, None] / period).reshape(len(place), -1)


ANGLES = {
    "DINOv3": dinov3,
    "LingBot": dinov3,
    "PE core": partial(axial, temperature=1e4, offset=1.0, reference=(14, 14), columns_first=True),
    "PE core, no class token": partial(axial, temperature=1e4, reference=(32, 32), columns_first=True),
    "PE spatial": partial(axial, temperature=1e4, offset=1.0, reference=(32, 32), columns_first=True),
    "registers": partial(axial, temperature=1e4, reference=(16, 16)),
    "axial": partial(axial, temperature=100.0, columns_first=True),
}


@pytest.mark.parametrize("grid", [*GRIDS, None])
@pytest.mark.parametrize("family", ANGLES)
def test_tables_are_the_papers_formulas(family, grid):
    """At other sizes and the native one; prefix tokens are not rotated."""
    _, vit, _ = build(family, grid)
    angles = np.pad(ANGLES[family](vit.spec.grid, 32), ((vit.spec.prefix, 0), (0, 0)))
    wanted = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], 1))[None]
    assert vit.spec.block.rotate_half == (family in ("DINOv3", "LingBot"))
    assert (vit.position - wanted).abs().max() < 1e-5  # an angle of 32, in fp32
    assert relative_error(vit.position, wanted) < 2e-6


@pytest.mark.parametrize("grid", GRIDS)
def test_mixed_tables_are_the_papers_formula(grid):
    """The angle of a patch in column x and row y is f x + g y, with f and g of the block and the head."""
    _, vit, _ = build("mixed", grid)
    f, g = vit.rope.freqs.detach().double().numpy()[..., None, :]
    y, x = (np.pad(c.reshape(-1), (1, 0))[:, None] for c in np.meshgrid(*map(np.arange, grid), indexing="ij"))
    angles = f * x + g * y
    wanted = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], -1))
    tables = torch.stack(list(vit.positions()))
    assert relative_error(tables, wanted) < 1e-6
    cotangent = torch.randn_like(tables)
    tables.backward(cotangent)
    sine, cosine = (c.numpy() for c in cotangent.double().chunk(2, -1))
    turned = sine * np.cos(angles) - cosine * np.sin(angles)
    exact = torch.from_numpy(np.stack([(turned * c).sum(-2) for c in (x, y)]))
    assert relative_error(vit.rope.freqs.grad, exact) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, vit.positions(), tables))
    rope, coordinates = vit.rope.bfloat16(), 3 * vit.position
    exact = copy.deepcopy(rope).double()(coordinates.double(), 2)
    assert relative_error(rope(coordinates, 2), exact) < 2**-8  # angles are computed in fp32


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("half", [False, True])
def test_rotation_is_a_complex_product(half, heads):
    """Of neighbours or halves, by head or for all heads; packed rows as in the dense form."""
    angles = torch.randn(heads, 9, 4, dtype=torch.float64)
    table = torch.cat([angles.sin(), angles.cos()], -1)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    pairs = x.unflatten(-1, (2, 4)).mT if half else x.unflatten(-1, (4, 2))
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()).double(), angles)
    )
    wanted = (turned.mT if half else turned).flatten(-2)
    found = rotate(x, table, half)
    assert relative_error(found, wanted) < 1e-14
    assert rotate(x.bfloat16(), table.float(), half).dtype == torch.bfloat16
    visible = torch.rand(2, 1, 7) < 0.5
    packing = ops.pack_masks(visible, 2)
    rows = [b * 9 + t for b in range(2) for t in (0, 1, *(2 + n for n in range(7) if visible[b, 0, n]))]
    packed = x.transpose(1, 2).flatten(0, 1)[rows]
    length = int(packing.cu_seqlens[-1])
    found = rotate(packed, pack_table(table, packing)[:length], half)
    assert torch.equal(found, rotate(x, table, half).transpose(1, 2).flatten(0, 1)[rows])


AUGMENTED = {"rope_shift_coords": 0.3, "rope_jitter_coords": 2.0, "rope_rescale_coords": 2.0}


@pytest.mark.parametrize("family", ["DINOv3", "PE core", "mixed"])
def test_the_augmentation_of_coordinates_is_off_in_training_too(family):
    theirs, ours, images = build(family, **AUGMENTED)
    wanted = theirs.forward_features(images)
    assert not torch.equal(theirs.train().forward_features(images), wanted)
    for vit in (ours, from_timm(theirs)):
        assert torch.equal(vit.train().forward_features(images), wanted)


def test_a_teacher_without_its_last_blocks_has_the_first_frequencies():
    theirs, ours, images = build("mixed")
    teacher = fa.MaskedTeacher(ours, skip_blocks=2)
    theirs.blocks = theirs.blocks[:1]
    assert torch.equal(teacher(images)[:, 0], theirs.forward_features(images))
    assert not teacher.vit.rope.freqs.requires_grad
