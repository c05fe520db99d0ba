"""The door to the kernels: what it refuses, what it picks, and that whole models are right on kernels."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastalign as fa
from fastalign import ops
from fastalign.ops import extension, reference
from tests.numerics import DEVICE, gradient_error, needs_compiler, randomise, relative_error

ROOT = Path(__file__).parents[2]


def x(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


VISIBLE = torch.ones(2, 3, 4, dtype=torch.bool, device=DEVICE)
PACKING = reference.pack_masks(VISIBLE, 1, 30)
# The call, and what its one line must say.
WRONG = {
    "patches": (lambda: ops.mask_tokens(x(2, 4), x(8), VISIBLE), "patches must be floating point [B, N, D]"),
    "hidden": (lambda: ops.mask_tokens(x(2, 4, 8), x(7), VISIBLE), "hidden must be [D = 8]"),
    "images": (lambda: ops.mask_tokens(x(3, 4, 8), x(8), VISIBLE), "visible must be bool [B = 3, M, N = 4]"),
    "patches of masks": (
        lambda: ops.mask_tokens(x(2, 5, 8), x(8), VISIBLE),
        "visible must be bool [B = 2, M, N = 5]",
    ),
    "prefix": (lambda: ops.mask_tokens(x(2, 4, 8), x(8), VISIBLE, x(1, 7)), "prefix must be [P, D = 8]"),
    "position": (
        lambda: ops.expand_masked(x(2, 5, 8), VISIBLE, x(5, 8)),
        "position must be [1, T = 5, D = 8]",
    ),
    "mask dtype": (lambda: ops.expand_masked(x(2, 5, 8), VISIBLE.int(), x(1, 5, 8)), "visible must be bool"),
    "too few tokens": (lambda: ops.expand_masked(x(2, 3, 8), VISIBLE, x(1, 3, 8)), "with N <= T = 3"),
    "slots": (lambda: ops.pack(x(2, 4, 8), PACKING), "packing.slots must be [B = 2, M, P + N = 4]"),
    "packing": (
        lambda: ops.pack(x(2, 4, 8), PACKING._replace(slots=PACKING.slots.long()), x(1, 8)),
        "packing.slots must be int32",
    ),
    "packed": (lambda: ops.unpack(x(29, 8), PACKING), "packed must be floating point [L = 30, D]"),
    "k": (lambda: ops.softcap_attention(x(1, 1, 4, 8), x(1, 1, 5, 8), x(1, 1, 4, 8)), "k must be as q"),
    "v dtype": (
        lambda: ops.softcap_attention(x(1, 1, 4, 8), x(1, 1, 4, 8), x(1, 1, 4, 8, dtype=torch.bfloat16)),
        "v must be as q, torch.float32",
    ),
    "softcap": (
        lambda: ops.softcap_attention(*[x(1, 1, 4, 8)] * 3, softcap=-1.0),
        "softcap must be a positive",
    ),
    "max_seqlen": (
        lambda: ops.softcap_attention(*[x(4, 1, 8)] * 3, cu_seqlens=x(2, dtype=torch.int32)),
        "needs max_seqlen",
    ),
    "loss": (
        lambda: ops.reconstruction_loss(x(2, 3, 5, 8), x(2, 3, 5, 8), VISIBLE, loss="l2"),
        "loss must be one",
    ),
    "target": (
        lambda: ops.reconstruction_loss(x(2, 3, 5, 8), x(2, 3, 8), VISIBLE),
        "target must be broadcastable",
    ),
    "scale": (
        lambda: ops.reconstruction_loss(x(2, 3, 5, 8), x(2, 3, 5, 8), VISIBLE, scale=x(8)),
        "scale must be a single number",
    ),
    "packed target": (
        lambda: ops.reconstruction_loss(x(30, 8), x(31, 8), VISIBLE, packing=PACKING),
        "target must be [30, 8] or [2, 5, 8]",
    ),
    "device": (
        lambda: ops.expand_masked(torch.zeros(2, 5, 8, device="meta"), VISIBLE, x(1, 5, 8)),
        "all arguments must be on one device",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named_in_one_line(case):
    call, words = WRONG[case]
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_torch_compile_leaves_the_assembler_alone():
    """The one that Triton brings, and `benchmarks.aot` checks, also after Inductor has named another."""
    code = """
from fastalign.kernels import common
from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path
from triton import knobs
_set_triton_ptxas_path()
print(knobs.nvidia.ptxas.path)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_PTXAS_PATH"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("triton/backends/nvidia/bin/ptxas")


def test_what_runs_where(monkeypatch):
    monkeypatch.setattr(ops, "MODE", "auto")
    assert ops.uses_kernels(x(2)) == (DEVICE == "cuda")
    monkeypatch.setattr(ops, "MODE", "1")
    assert ops.uses_kernels(x(2), None)
    assert not ops.uses_kernels(x(2, dtype=torch.float64))
    monkeypatch.setattr(ops, "MODE", "0")
    assert not ops.uses_kernels(x(2))


@pytest.mark.parametrize("complement", [True, False])
@pytest.mark.parametrize("kind", [fa.UniformMasks, fa.BernoulliMasks, fa.BlockwiseMasks])
def test_masks_come_packed(kind, complement):
    masks, ids = kind(complement=complement, seed=3), torch.arange(5, device=DEVICE)
    visible, packing = masks.packed(ids, (6, 6), 2, epoch=4)
    assert torch.equal(visible, masks(ids, (6, 6), 4))
    wanted = reference.pack_masks(visible, 2, len(packing.indices))
    for name in packing._fields:
        assert torch.equal(getattr(packing, name), getattr(wanted, name)), name
    if complement:
        assert len(packing.indices) == packing.cu_seqlens[-1] == 5 * (2 * 36 + 3 * 2)


def test_lengths_of_packed_rows_are_few_and_enough():
    lengths = set()
    for share in torch.linspace(0, 1, 50):
        visible = torch.rand(3, 2, 30, device=DEVICE) < share
        packing = ops.pack_masks(visible, 1)
        assert packing.cu_seqlens[-1] == visible.sum() + 6
        assert len(packing.indices) >= packing.cu_seqlens[-1]
        lengths.add(len(packing.indices))
    assert len(lengths) <= 16


def test_a_grid_without_patches():
    packing = ops.pack_masks(VISIBLE[..., :0], 2)
    assert packing.cu_seqlens[-1] == len(packing.indices) == 2 * 3 * 2


def test_a_scale_that_is_learned_gets_its_gradient(monkeypatch):
    monkeypatch.setattr(ops, "MODE", "1")
    scale = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    ops.reconstruction_loss(x(2, 3, 5, 8), x(2, 3, 5, 8) + 1, VISIBLE, scale=scale).backward()
    assert scale.grad == 1.0


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU asserts asynchronously")
@pytest.mark.parametrize("there", [True, False])
def test_a_row_that_is_too_short_is_an_error(there, monkeypatch):
    if not there:
        monkeypatch.setattr(extension, "available", lambda device: False)
    with pytest.raises(RuntimeError, match="pack_masks"):
        ops.pack_masks(VISIBLE.cpu(), 1, 29)


BACKBONES = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 48}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {"img_size": 48}),
    "so400m": ("vit_so400m_patch14_siglip_224", {"img_size": 42, "embed_dim": 144, "num_heads": 2}),
    "dinov2": ("vit_base_patch14_reg4_dinov2", {"img_size": 42}),
}


def objectives(name):
    """MaskEmbed and MIM of a small backbone with moved weights, images and ids."""
    timm_name, kwargs = BACKBONES[name]
    vit = fa.create_backbone(timm_name, **{"embed_dim": 96, "num_heads": 3, "depth": 2, **kwargs})
    randomise(vit)
    both = (
        fa.MaskEmbed(fa.MaskedTeacher(vit), fa.MaskEmbedStudent.from_backbone(vit), fa.UniformMasks()),
        fa.MaskedImageModeling(
            fa.MaskedTeacher(vit, skip_blocks=0), fa.MIMStudent.from_backbone(vit), fa.BernoulliMasks()
        ),
    )
    for objective in both:
        randomise(objective.student)
    images = torch.randn(2, 3, *vit.spec.image_size, device=DEVICE)
    return [objective.to(DEVICE) for objective in both], images, torch.arange(2, device=DEVICE)


def loss_and_gradient(objective, images, ids):
    objective.zero_grad()
    loss = objective(images, ids)
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in objective.student.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("name", BACKBONES)
def test_objectives_on_kernels_equal_eager(name, monkeypatch):
    """The whole step, forward and backward, with every operation in Triton, against float64."""
    both, images, ids = objectives(name)
    launched, kernel = [], ops._mask_tokens
    monkeypatch.setattr(ops, "_mask_tokens", lambda *inputs: launched.append(1) or kernel(*inputs))
    for objective in both:
        monkeypatch.setattr(ops, "MODE", "1")
        launched.clear()
        loss, gradient = loss_and_gradient(objective, images, ids)
        assert launched == [1]  # the teacher's copies, or the masked student's
        monkeypatch.setattr(ops, "MODE", "0")
        wanted, wanted_gradient = loss_and_gradient(objective.double(), images.double(), ids)
        assert relative_error(loss, wanted) < 1e-5
        assert gradient_error(gradient, wanted_gradient) < 1e-3


@needs_compiler
@pytest.mark.slow
def test_student_and_teacher_on_kernels_compile_as_one_graph(monkeypatch):
    monkeypatch.setattr(ops, "MODE", "1")
    (objective, _), images, ids = objectives("vit")
    loss, gradient = loss_and_gradient(objective, images, ids)
    torch._dynamo.reset()
    objective.compile()
    found, found_gradient = loss_and_gradient(objective, images, ids)
    assert relative_error(found, loss) < 1e-5
    assert gradient_error(found_gradient, gradient) < 1e-3


@pytest.mark.slow
def test_every_kernel_compiles_without_a_gpu_and_spills_nothing():
    """Ahead of time for sm_80, sm_90 and sm_100: the interpreter accepts what the compiler does not."""
    command = [sys.executable, "-m", "benchmarks.aot", "--no-write"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    for arch in (80, 90, 100):
        kernels = re.findall(rf"^sm_{arch} +(\S+)", result.stdout, re.M)
        assert {kernel.partition(".")[0] for kernel in kernels} == {
            "mask_tokens",  # and expand_masked, which runs on it
            "pack",
            "unpack",
            "reconstruction_loss",
            "softcap_attention_forward",
            "softcap_attention_backward",
        }
