"""What lower precision computes: against autocast with fp32 weights, and FP8 rounded by hand."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastalign as fa
from fastalign import doctor
from fastalign.backbones.precision import NATIVE_BF16, FP8Linear, compute_dtype
from fastalign.config import Config
from fastalign.training.build import teacher_dtype
from fastalign.training.distributed import World
from fastalign.training.run import Run
from tests.numerics import needs_compiler, randomise, relative_error
from tests.run_helpers import checkpoint

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16_OF_CPUS = NATIVE_BF16  # which the fixtures of a test hide
NARROW = {"embed_dim": 96, "num_heads": 3, "depth": 3}
SMALL = {"img_size": 48, **NARROW}
# timm's name and arguments, the teacher's options.
FAMILIES = {
    "plain": ("vit_tiny_patch16_224", SMALL, {}),
    "map pooling": ("vit_base_patch16_siglip_224", SMALL, {"skip_blocks": 0, "prefix_only": True}),
    "beit": ("beit_base_patch16_224", SMALL, {}),
    "eva": ("eva02_base_patch16_clip_224", SMALL, {}),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", SMALL, {}),
    "mixed rope": ("vit_base_patch16_rope_mixed_ape_224", SMALL, {}),
    "dinov2": ("vit_base_patch14_reg4_dinov2", {**SMALL, "img_size": 42}, {}),
    "aimv2": ("aimv2_large_patch14_224", {**SMALL, "img_size": 42, "embed_dim": 192}, {}),
    "packed swiglu": ("eva02_tiny_patch14_224", {**SMALL, "img_size": 42}, {}),
}
MODES = [
    (family, masking)
    for family in FAMILIES
    for masking in ("zero", "drop")
    if masking == "zero" or family not in ("beit", "map pooling")  # which support zero only
]


def build(family: str, masking: str = "zero") -> tuple[fa.MaskedTeacher, torch.Tensor, torch.Tensor]:
    """A teacher with random weights, images and masks."""
    name, kwargs, options = FAMILIES[family]
    vit = fa.create_backbone(name, **kwargs)
    randomise(vit)
    teacher = fa.MaskedTeacher(vit, masking=masking, **options)
    images = torch.randn(2, 3, *vit.spec.image_size)
    return teacher, images, fa.UniformMasks(seed=1)(torch.arange(2), vit.spec.grid, 0)


def autocast(teacher, *inputs):
    with torch.autocast("cpu", torch.bfloat16):
        return teacher(*inputs)


@pytest.mark.parametrize(("family", "masking"), MODES)
def test_bf16_weights_give_autocasts_bits_and_fp8_targets_are_near_those_of_fp32(family, masking):
    teacher, images, visible = build(family, masking)
    stored = copy.deepcopy(teacher).store_as(torch.bfloat16)
    for inputs in ((images, visible), (images,)):
        assert torch.equal(autocast(stored, *inputs), autocast(teacher, *inputs))
    fp8 = copy.deepcopy(teacher).store_as(torch.float8_e4m3fn)
    layers = sum(isinstance(part, nn.Linear) for part in teacher.vit.blocks.modules())
    assert sum(isinstance(part, FP8Linear) for part in fp8.vit.blocks.modules()) == layers
    assert relative_error(autocast(fp8, images, visible), teacher(images, visible)) < 0.1
    assert not any(parameter.requires_grad for parameter in fp8.parameters())
    kept = {name for name, value in stored.named_parameters() if value.dtype == torch.float32}
    assert not any(isinstance(stored.get_submodule(name.rpartition(".")[0]), nn.Linear) for name in kept)
    norm = {f"vit.blocks.0.norm1.{name}" for name, _ in teacher.vit.blocks[0].norm1.named_parameters()}
    assert norm <= kept
    assert not any("q_bias" in name for name in kept)
    ours, theirs = (sum(p.nbytes for p in model.vit.blocks.parameters()) for model in (stored, teacher))
    assert ours < 0.6 * theirs


def test_only_the_teacher_is_stored_in_bf16_and_no_other_dtype_is_taken():
    vit = fa.create_backbone("vit_tiny_patch16_224", **SMALL)
    teacher, student = fa.MaskedTeacher(vit), fa.MaskEmbedStudent.from_backbone(vit)
    teacher.store_as(torch.bfloat16)
    for module in (vit, student):
        assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    with pytest.raises(ValueError, match=r"torch\.bfloat16 or torch\.float8_e4m3fn"):
        teacher.store_as(torch.float16)


class Casts(TorchDispatchMode):
    """Counts casts to bf16 of fp32 matrices of one shape, which only a weight has."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.count += arguments[0].shape == self.shape and arguments[0].dtype == torch.float32
        return function(*arguments, **kwargs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_weight_is_cast_once_an_update_and_nothing_else_changes(recipe, monkeypatch, checkpointing):
    """Three passes per update, EMA and its evaluation, against a separate autocast in each pass."""
    options = ["efficiency.precision=bf16", f"efficiency.grad_checkpointing={checkpointing}", "max_steps=2"]
    options += ["data.train=synthetic:6", "data.val=synthetic:4", "optim.ema=0.9"]
    options += ["optim.batch_size=6", "optim.accumulate=3"]

    def trained(name):
        with Casts((3 * 192, 192)) as casts:  # qkv
            run = recipe(*options, name=name)
        return casts.count, checkpoint(run)

    count, state = trained("once")
    monkeypatch.setattr(Run, "cached_autocast", lambda run: nullcontext())
    usual, wanted = trained("usual")
    for part in ("student", "average"):
        assert all(torch.equal(state[part][name], value) for name, value in wanted[part].items())
    assert state["val_loss"] == wanted["val_loss"]
    teacher, student, updates, evaluations = 1, 4, 2, 3  # blocks, the decoder's among the student's
    assert count == teacher + student * (updates + evaluations)
    assert usual > 2 * count


def rounded_by_hand(x: torch.Tensor) -> torch.Tensor:
    """To the nearest number with a 3-bit mantissa, exponents from -6, after scaling each row's largest to 448."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    scaled = x / scale
    exponent = torch.floor(torch.log2(scaled.abs().clamp_min(2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return (scaled / step).round() * step * scale


@pytest.mark.parametrize("bias", [True, False])
def test_an_fp8_product_is_that_of_rounded_rows_and_columns(bias):
    layer = nn.Linear(48, 32, bias=bias)
    x = torch.randn(5, 7, 48) * torch.logspace(-6, 6, 7)[:, None]
    x[2, 3] = 0
    fp8 = FP8Linear(layer)
    wanted = rounded_by_hand(x.double()) @ rounded_by_hand(layer.weight.detach().double()).T
    wanted = wanted + (layer.bias.detach().bfloat16().double() if bias else 0)
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            found = fp8(x)
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted).abs().max() / wanted.abs().max() < 2**-8
        assert torch.allclose(found.double(), wanted, rtol=2**-7, atol=1e-5)


def test_widths_that_fp8_does_not_support_stay_in_bf16():
    vit = fa.create_backbone("vit_tiny_patch16_224", img_size=32, embed_dim=96, depth=2, mlp_ratio=1.5625)
    teacher = fa.MaskedTeacher(vit).store_as(torch.float8_e4m3fn)
    mlp = teacher.vit.blocks[0].mlp
    assert mlp.fc1.out_features == 150
    assert (mlp.fc1.weight.dtype, mlp.fc2.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert isinstance(teacher.vit.blocks[0].attn.qkv, FP8Linear)
    assert autocast(teacher, torch.randn(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(
    ("flags", "onednn", "wanted"),
    [
        ("avx2 avx512_f avx512_bw avx512_vnni", True, torch.float32),  # Ice Lake: oneDNN emulates
        ("avx2 avx512_f avx512_bf16", True, torch.bfloat16),  # Cooper Lake, Zen 4
        ("avx2 amx_tile amx_int8 amx_bf16", True, torch.bfloat16),
        ("neon bf16 sve", True, torch.bfloat16),  # Neoverse V1
        ("neon fp16_arith", True, torch.float32),  # Neoverse N1
        ("neon bf16", False, torch.float32),  # Apple's, where torch has no oneDNN
        ("", True, torch.float32),
    ],
)
def test_auto_is_bf16_where_the_hardware_has_it(monkeypatch, flags, onednn, wanted):
    monkeypatch.setattr("fastalign.backbones.precision.NATIVE_BF16", BF16_OF_CPUS)
    found = {"architecture": "x86_64", "avx512_bf16": False, **dict.fromkeys(flags.split(), True)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    assert compute_dtype("auto", CPU) == wanted
    assert compute_dtype("auto", GPU) == compute_dtype("bf16", CPU) == torch.bfloat16
    assert compute_dtype("fp32", GPU) == torch.float32
    words = "with bf16 instructions" if wanted == torch.bfloat16 else "without bf16 instructions"
    assert any(words in line for line in doctor.machine())
    assert doctor.smoke("cpu").startswith(f"a step on the cpu in {str(wanted).removeprefix('torch.')}")


def test_ranks_that_differ_are_refused(recipe, monkeypatch, capsys):
    for equal, message in (
        (str, "efficiency.precision=auto: not every rank's CPU has bf16"),
        ((), "the ranks have different settings: start every machine with the same command"),
    ):
        monkeypatch.setattr(World, "agree", lambda world, value, equal=equal: isinstance(value, equal))
        recipe("efficiency.precision=auto", expect=2)
        assert message in capsys.readouterr().err


@needs_compiler
def test_fp8_traces_without_a_break():
    teacher, images, visible = build("plain")
    wanted = teacher(images, visible)
    teacher.store_as(torch.float8_e4m3fn)
    eager = relative_error(autocast(teacher, images, visible), wanted)
    teacher.compile(fullgraph=True)
    assert relative_error(autocast(teacher, images, visible), wanted) < 1.2 * eager


def test_a_gpu_without_fp8_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    config = Config.model_validate({"efficiency": {"precision": "fp8"}})
    with pytest.raises(
        fa.UserError, match=r"efficiency.precision=fp8: Some GPU .* efficiency.precision=bf16"
    ):
        teacher_dtype(config, GPU)
    assert teacher_dtype(config, CPU) == torch.float8_e4m3fn
