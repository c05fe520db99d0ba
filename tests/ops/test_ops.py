"""Dispatch: refused arguments, the selection of kernels, and whole models on kernels."""

import inspect
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
from tests.method.helpers import gradients
from tests.numerics import DEVICE, gradient_error, needs_compiler, randomise, relative_error

ROOT = Path(__file__).parents[2]


def x(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


VISIBLE = torch.ones(2, 3, 4, dtype=torch.bool, device=DEVICE)
PACKING = reference.pack_masks(VISIBLE, 1, 30)
DENSE = x(2, 3, 5, 8)
# The call, and a part of its message.
WRONG = [
    (lambda: ops.mask_tokens(x(2, 4), x(8), VISIBLE), "patches must be float [B, N, D], got torch.float32 ["),
    (lambda: ops.mask_tokens(x(2, 5, 8), x(8), VISIBLE), "visible must be bool [B = 2, M, N = 5]"),
    (lambda: ops.mask_tokens(x(2, 4, 8), x(8), None), "visible must be a tensor, got NoneType"),
    (lambda: ops.expand_masked(x(2, 5, 8), VISIBLE.int(), x(1, 5, 8)), "visible must be bool"),
    (lambda: ops.expand_masked(x(2, 3, 8), VISIBLE, x(1, 3, 8)), "with N <= T = 3"),
    (lambda: ops.pack(x(2, 4, 8), PACKING), "packing.slots must be int32 [B, M, P + N = 4]"),
    (lambda: ops.unpack(x(29, 8), PACKING), "packed must be float [L = 30, D]"),
    (lambda: ops.softcap_attention(x(1, 1, 4, 8), x(1, 1, 5, 8), x(1, 1, 4, 8)), "k must be as q, torch."),
    (lambda: ops.softcap_attention(*[x(1, 1, 4, 8)] * 3, softcap=-1.0), "softcap must be a positive"),
    (lambda: ops.softcap_attention(*[x(1, 1, 4, 8)] * 3, softcap=float("inf")), "softcap must be a positive"),
    (lambda: ops.softcap_attention(*[x(4, 1, 8)] * 3, cu_seqlens=VISIBLE[0, 0].int()), "needs max_seqlen"),
    (lambda: ops.reconstruction_loss(DENSE, DENSE, VISIBLE, loss="l2"), "loss must be one of mse, cosine"),
    (lambda: ops.reconstruction_loss(DENSE, x(2, 3, 8), VISIBLE), "target must be broadcastable"),
    (lambda: ops.reconstruction_loss(DENSE, DENSE, VISIBLE, scale=x(8)), "scale must be float []"),
    (
        lambda: ops.reconstruction_loss(x(30, 8), x(31, 8), VISIBLE, packing=PACKING),
        "target must be [30, 8] or [2, 5, 8]",
    ),
    (
        lambda: ops.expand_masked(torch.zeros(2, 5, 8, device="meta"), VISIBLE, x(1, 5, 8)),
        "expand_masked: all arguments must be on one device, got tokens on meta",
    ),
]


@pytest.mark.parametrize(("call", "words"), WRONG, ids=[words[:20] for _, words in WRONG])
def test_wrong_arguments_are_named_in_one_line(call, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ops.KERNELS)
def test_the_reference_the_kernel_and_the_operation_have_one_signature(name):
    wanted, kernel = inspect.signature(getattr(reference, name)), inspect.signature(ops.KERNELS[name])
    assert inspect.signature(getattr(ops, name)) == wanted
    parameters = {p.name: (p.kind, p.default) for p in wanted.parameters.values() if p.name != "bias"}
    assert {p.name: (p.kind, p.default) for p in kernel.parameters.values()} == parameters
    assert inspect.getdoc(getattr(ops, name)) == inspect.getdoc(getattr(reference, name))


def test_torch_compile_does_not_change_the_assembler():
    """All kernels use Triton's own, also after Inductor has set another."""
    code = """
from fastalign.kernels import common
from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path
from triton import knobs
_set_triton_ptxas_path()
print(knobs.nvidia.ptxas.path)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_PTXAS_PATH"}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)
    assert printed.strip().endswith("triton/backends/nvidia/bin/ptxas")


def test_kernels_are_selected_by_device_dtype_and_environment(monkeypatch):
    monkeypatch.setattr(ops, "MODE", "auto")
    assert ops.kernels_on("cuda", torch.float32)
    assert not ops.kernels_on("cpu", torch.float32)
    monkeypatch.setattr(ops, "MODE", "1")
    assert ops.kernels_on("cpu", torch.float32)
    assert not ops.kernels_on("cuda", torch.float64)
    monkeypatch.setattr(ops, "MODE", "0")
    assert not ops.kernels_on("cuda", torch.float32)


def test_lengths_of_packed_rows_are_few_and_enough():
    packing = ops.pack_masks(VISIBLE[..., :0], 2)  # a grid without patches
    assert packing.cu_seqlens[-1] == len(packing.indices) == 2 * 3 * 2
    lengths = set()
    for share in torch.linspace(0, 1, 50):
        visible = torch.rand(3, 2, 30, device=DEVICE) < share
        packing = ops.pack_masks(visible, 1)
        assert packing.cu_seqlens[-1] == visible.sum() + 6
        assert len(packing.indices) >= packing.cu_seqlens[-1]
        lengths.add(len(packing.indices))
    assert len(lengths) <= 16


def test_a_learned_scale_gets_its_gradient(monkeypatch):
    monkeypatch.setattr(ops, "MODE", "1")
    scale = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    ops.reconstruction_loss(x(2, 3, 5, 8), x(2, 3, 5, 8) + 1, VISIBLE, scale=scale).backward()
    assert scale.grad == 1.0


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU asserts asynchronously")
@pytest.mark.parametrize("with_extension", [True, False])
def test_a_length_that_is_too_small_is_an_error(with_extension, monkeypatch):
    if not with_extension:
        monkeypatch.setattr(extension, "available", lambda device: False)
    with pytest.raises(RuntimeError, match="pack_masks"):
        ops.pack_masks(VISIBLE.cpu(), 1, 29)


BACKBONES = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 48}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {"img_size": 48}),
    "so400m": ("vit_so400m_patch14_siglip_224", {"img_size": 42, "embed_dim": 144, "num_heads": 2}),
    "dinov2": ("vit_base_patch14_reg4_dinov2", {"img_size": 42}),
    "eva": ("eva02_base_patch16_clip_224", {"img_size": 48}),
}


def objectives(name, masking="zero"):
    """MaskEmbed and MIM of a small backbone with moved weights, images and ids."""
    timm_name, kwargs = BACKBONES[name]
    vit = fa.create_backbone(timm_name, **{"embed_dim": 96, "num_heads": 3, "depth": 2, **kwargs})
    randomise(vit)
    both = (
        fa.MaskEmbed(
            fa.MaskedTeacher(vit, masking=masking), fa.MaskEmbedStudent.from_backbone(vit), fa.UniformMasks()
        ),
        fa.MaskedImageModeling(
            fa.MaskedTeacher(vit, 0), fa.MIMStudent.from_backbone(vit, masking=masking), fa.BernoulliMasks()
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
    return loss.detach(), gradients(objective.student)


@pytest.mark.parametrize("masking", ["zero", "drop"])
@pytest.mark.parametrize("name", BACKBONES)
def test_objectives_on_kernels_equal_eager(name, masking, monkeypatch):
    """The whole step, forward and backward, with every operation in Triton, against float64."""
    both, images, ids = objectives(name, masking)
    for objective in both:
        monkeypatch.setattr(ops, "MODE", "1")
        loss, gradient = loss_and_gradient(objective, images, ids)
        monkeypatch.setattr(ops, "MODE", "0")
        wanted, wanted_gradient = loss_and_gradient(objective.double(), images.double(), ids)
        assert relative_error(loss, wanted) < 1e-5
        assert gradient_error(gradient, wanted_gradient) < 1e-3


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["0", "1"], ids=["eager", "kernels"])
def test_student_and_teacher_compile_as_one_graph_each(mode, monkeypatch):
    monkeypatch.setattr(ops, "MODE", mode)
    both, images, ids = objectives("vit")
    for objective in both:
        loss, gradient = loss_and_gradient(objective, images, ids)
        torch._dynamo.reset()
        objective.compile()  # fullgraph: a break is an error
        found, found_gradient = loss_and_gradient(objective, images, ids)
        assert relative_error(found, loss) < 1e-5
        assert gradient_error(found_gradient, gradient) < 1e-4


@pytest.mark.slow
def test_every_kernel_compiles_without_a_gpu_and_spills_nothing():
    """Ahead of time for sm_80, sm_90 and sm_100: the interpreter accepts kernels that do not compile."""
    command = [sys.executable, "-m", "benchmarks.aot", "--no-write"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    for arch in (80, 90, 100):
        kernels = re.findall(rf"^sm_{arch} +(\S+)", result.stdout, re.M)
        found = {kernel.partition(".")[0] for kernel in kernels}
        attention = {"softcap_attention_forward", "softcap_attention_backward"}
        assert found == attention | {"mask_tokens", "pack", "unpack", "reconstruction_loss"}
