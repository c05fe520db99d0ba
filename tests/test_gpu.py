"""What needs a GPU: the same bits of masks, the same loss, bf16, compilation, no synchronization."""

import itertools
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
import torch

import fastalign as fa
from fastalign.backbones.precision import FP8_CAPABILITY, FP8Linear
from fastalign.backbones.spec import BlockSpec, ViTSpec
from fastalign.data.loader import Loader
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform
from fastalign.evaluation.features import PatchFeatures
from fastalign.evaluation.options import Plan, Recipe
from fastalign.evaluation.patches import Task, evaluate_head, fit_head
from fastalign.train import update
from tests.numerics import gradient_error, randomise, relative_error
from tests.run_helpers import ROOT, SYNTHETIC, losses, run_of_batches

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
both_modes = pytest.mark.parametrize("masking", ["zero", "drop"])


def objective(masking="zero"):
    """A small MaskEmbed with perturbed weights."""
    vit = fa.create_backbone("vit_tiny_patch16_224", img_size=64, depth=3)
    teacher, student = fa.MaskedTeacher(vit, masking=masking), fa.MaskEmbedStudent.from_backbone(vit)
    step = fa.MaskEmbed(teacher, student, fa.UniformMasks())
    randomise(step)
    return step


def batch(device="cuda"):
    return torch.randn(4, 3, 64, 64).to(device), torch.arange(4).to(device)


def loss_and_gradient(step, images, ids):
    """The loss, and the gradient by name."""
    step.zero_grad()
    loss = step(images, ids)
    loss.backward()
    return loss.detach().cpu(), {n: p.grad.cpu().clone() for n, p in step.student.named_parameters()}


@pytest.mark.parametrize("kind", [fa.UniformMasks, fa.BernoulliMasks, fa.BlockwiseMasks])
def test_masks_are_the_same_bits_without_the_extension(kind):
    masks, ids = kind(seed=1), torch.arange(4096)
    assert torch.equal(masks.eager(ids.cuda(), 196, 2).cpu(), masks(ids, 196, 2))


def test_masks_of_varying_lengths_do_not_wait_for_the_gpu():
    """Their copies, of more than 64 KB, are queued behind what the GPU still has to do."""
    step, ids = objective("drop").cuda(), torch.arange(512)
    step.masks = fa.UniformMasks(complement=False)
    images = torch.empty(512, 3, 64, 64, device="cuda")
    for _ in range(2):  # the first allocates pinned memory, which waits
        done = torch.cuda.Event()
        torch.cuda._sleep(10**9)  # half a second
        done.record()
        step.draw(images, ids, 0)
        finished = done.query()
        torch.cuda.synchronize()
    assert not finished


@both_modes
def test_loss_and_gradient_equal_float64_on_the_cpu(masking):
    step, (images, ids) = objective(masking), batch("cpu")
    loss, gradient = loss_and_gradient(step.double(), images.double(), ids)
    found, found_gradient = loss_and_gradient(step.float().cuda(), images.cuda(), ids.cuda())
    assert relative_error(found, loss) < 1e-5
    assert gradient_error(found_gradient, gradient) < 1e-3


@both_modes
@pytest.mark.parametrize("compiled", [False, True, "blocks"])
def test_bf16_stays_close(compiled, masking):
    torch._dynamo.reset()
    step, (images, ids) = objective(masking).cuda(), batch()
    loss, _ = loss_and_gradient(step, images, ids)
    if compiled:
        step.compile(blocks=compiled == "blocks")
    with torch.autocast("cuda", torch.bfloat16):
        found, _ = loss_and_gradient(step, images.bfloat16(), ids)
    assert relative_error(found, loss) < 0.02


MODES = ("masks.mode=zero", "masks.mode=drop", "masks.mode=drop masks.complement=false")
UPDATES = [
    f"{mode} masks.distribution={masks} efficiency.grad_checkpointing=true"
    for mode, masks in itertools.product(MODES, ("uniform", "bernoulli", "blockwise"))
]
UPDATES += [
    f"{mode} efficiency.compile={how}" for mode, how in itertools.product(MODES[:2], ("true", "blocks"))
]


@pytest.mark.parametrize("keys", UPDATES)
def test_an_update_never_synchronizes(tmp_path, keys):
    """All of `update`: accumulation, bf16, clipping, AdamW, moving average; three to warm up, then three."""
    torch._dynamo.reset()
    run, batches = run_of_batches(tmp_path, *keys.split())
    for _ in range(3):
        update(run, batches, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        measured = [update(run, batches, 0)["loss"] for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(torch.stack(measured)).all()


def test_a_bad_update_changes_no_weight_and_is_seen_one_update_later(tmp_path, monkeypatch):
    run, batches = run_of_batches(tmp_path)
    forward, poisoned = fa.MaskEmbed.forward, [False]

    def bad(self, *arguments):
        return forward(self, *arguments) * (float("nan") if poisoned[0] else 1)

    monkeypatch.setattr(fa.MaskEmbed, "forward", bad)
    update(run, batches, 0)
    before = [parameter.detach().clone() for parameter in run.trained]
    poisoned[0] = True
    update(run, batches, 0)
    assert all(map(torch.equal, before, run.trained))
    assert [(seen.step, seen.skipped) for seen in run.status.read()] == [(1, False)]
    poisoned[0] = False
    update(run, batches, 0)
    assert [(seen.step, seen.skipped, seen.ranks) for seen in run.status.read()] == [(2, True, (0,))]
    assert not all(map(torch.equal, before, run.trained))
    assert [seen.step for seen in run.status.read(everything=True)] == [3]


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY, reason="no FP8 here"
)
@pytest.mark.parametrize(("rows", "bias"), [(1, True), (17, False), (1030, True)])
def test_an_fp8_product_equals_the_reference(rows, bias):
    """Both sides have the same FP8 numbers; only the accumulation differs."""
    layer = FP8Linear(torch.nn.Linear(192, 48, bias=bias))
    x = torch.randn(rows, 192) * torch.logspace(-3, 3, rows)[:, None]
    wanted = layer(x).float()
    found = layer.cuda()(x.cuda()).float().cpu()
    assert ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 0.01


@both_modes
def test_updates_leak_no_memory(tmp_path, masking):
    """After the first pass over the batches, allocated memory is constant to the byte."""
    run, batches = run_of_batches(tmp_path, f"masks.mode={masking}")
    batches, allocated = itertools.cycle(list(batches)), []
    for step in range(330):
        update(run, batches, 0)
        if step % 30 == 29:
            allocated.append(torch.cuda.memory_allocated())
    assert len(set(allocated[1:])) == 1, allocated


def test_an_epoch_uses_the_loaders_memory_of_the_epoch_before():
    """torch gives memory that was freed on one stream to no other."""
    source, transform = open_source("synthetic:256"), Transform((224, 224), (0.5,) * 3, (0.5,) * 3)
    torch.cuda.empty_cache()
    reserved, options = [torch.cuda.memory_reserved()], {"batch_size": 32, "device": "cuda"}
    for epoch in range(4):
        with closing(Loader(source, transform, **options)) as loader:
            for _ in loader.batches(epoch):
                pass
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[4] - reserved[0] < 2 * (reserved[1] - reserved[0]), reserved


@both_modes
def test_a_step_is_captured_in_a_cuda_graph_and_replayed(masking):
    step, (images, ids) = objective(masking).cuda(), batch()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            wanted, gradient = loss_and_gradient(step, images, ids)
    torch.cuda.current_stream().wait_stream(side)
    step.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(images, ids)
        loss.backward()
    graph.replay()
    assert torch.equal(loss.cpu(), wanted)
    assert gradient_error({n: p.grad.cpu() for n, p in step.student.named_parameters()}, gradient) < 1e-5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensors_are():
    """Triton launches on the current device, here the first GPU."""
    step, (images, ids) = objective(), batch("cpu")
    wanted, _ = loss_and_gradient(step.cuda(), images.cuda(), ids.cuda())
    found, _ = loss_and_gradient(step.to("cuda:1"), images.to("cuda:1"), ids.to("cuda:1"))
    assert relative_error(found, wanted) < 1e-6


def test_the_command_trains_on_the_gpu(tmp_path):
    command = [
        sys.executable,
        "-m",
        "fastalign.train",
        *SYNTHETIC,
        f"output={tmp_path}/run",
        "optim.ema=null",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    validation = losses(tmp_path / "run", "val_loss")
    assert validation[-1] < validation[0]


@pytest.mark.parametrize("labels", ["union", "majority", "global-union"])
def test_a_probe_learns_as_on_the_cpu(labels):
    torch.manual_seed(0)
    spec, images = ViTSpec(BlockSpec(32, 2, 128), 1, image_size=(4, 4), patch_size=(1, 1)), 96
    union = torch.rand(images, 16, 5) < 0.3
    tokens = torch.randn(images, 17, 32)
    tokens[:, 1:, :5] += 3 * union
    tokens[:, 0, :5] += 3 * union.any(1)
    packed, majority = torch.from_numpy(np.packbits(union.numpy(), axis=-1)), union.int().argmax(-1).short()
    features = PatchFeatures({0: tokens.bfloat16()}, packed, majority, union.any(1), 5)
    found = {}
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        task, plan = Task("transformer", labels, 0, 0), Plan(recipe=Recipe(epochs=40, lr=3e-3))
        where = {"device": torch.device(device), "dtype": dtype}
        head, *_ = fit_head(task, spec, features, None, plan, **where)
        found[device, dtype] = evaluate_head(head, task, features, **where)["macro_f1"]
    reference = found["cpu", torch.float32]
    assert reference > 0.5
    assert found["cuda", torch.float32] == pytest.approx(reference, abs=0.02)
    assert found["cuda", torch.bfloat16] == pytest.approx(reference, abs=0.05)
