"""A training step that can be timed, and measurement of several in turns, for `benchmarks.step` and others."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import fastalign as fa
from benchmarks.baseline import Baseline
from benchmarks.timing import attempt, free, in_turns, quantiles, timed, wait
from fastalign.backbones.precision import autocast, store_as
from fastalign.method.flops import flops_per_image, peak_flops

TINY_KWARGS = {"img_size": 32, "depth": 2}
FIXED_SIZE = {"dynamic_img_size": False}  # so that timm's model, too, makes its rotary table once
BACKBONES = {
    "B/16-224": ("vit_base_patch16_clip_quickgelu_224", 256, {}),
    "L/14-336": ("vit_large_patch14_clip_quickgelu_336", 32, {}),
    "SO400M/14-384": ("vit_so400m_patch14_siglip_384", 16, {}),
    "DINOv3-B/16-256": ("vit_base_patch16_dinov3", 192, FIXED_SIZE),
    "AIMv2-L/14-224": ("aimv2_large_patch14_224", 64, {}),
    "PE-L/14-336": ("vit_pe_core_large_patch14_336", 32, {}),
}
"""timm's name, images per step, and timm's arguments, on a GPU."""
FAMILIES = {
    "SigLIP2-SO400M/16-256": ("vit_so400m_patch16_siglip_256", 64, {}),
    "InternViT/14-448": ("vit_intern300m_patch14_448", 16, {}),
    "RADIO-B/16-512": ("vit_base_patch16_radio_v3", 32, {}),
}
"""The same for other families, measured only if asked for."""
SMALL = {"S/16-224": ("vit_small_patch16_224", 8, {}), "tiny": ("vit_tiny_patch16_224", 2, TINY_KWARGS)}
"""The same on a CPU."""
KNOWN = BACKBONES | FAMILIES | SMALL
MODES = ("zero", "drop", "fp8", "baseline")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP, STEPS, ROUNDS = 3, 5, 4


class Row(NamedTuple):
    """What is measured."""

    backbone: str
    mode: str = "zero"
    softcap: float | None = 30.0
    compiled: str = "compiled"
    precision: str = "bf16"

    @property
    def default_batch(self) -> int:
        """Images per step."""
        return KNOWN[self.backbone][1]

    def __str__(self) -> str:
        return f"{self.backbone}:{self.mode}:{self.softcap or 'none'}:{self.compiled}"


KEY = Row._fields


class StepBench:
    """A model with its optimizer and `batch` random images, ready to step."""

    def __init__(self, row: Row, batch: int, device: torch.device):
        name, _, kwargs = KNOWN[row.backbone]
        vit = fa.create_backbone(name, **kwargs)
        student = fa.MaskEmbedStudent.from_backbone(vit, softcap=row.softcap)
        teacher = fa.MaskedTeacher(vit, masking="drop" if row.mode == "drop" else "zero")
        self.model = fa.MaskEmbed(teacher, student, fa.UniformMasks())
        self.flops = flops_per_image(self.model)
        if row.mode == "baseline":
            self.model = Baseline(name, row.softcap, **kwargs)
        self.dtype = PRECISIONS[row.precision]
        if row.mode == "fp8":
            teacher.store_as(torch.float8_e4m3fn)
        elif row.precision == "bf16":
            store_as(self.model.teacher, torch.bfloat16)  # the baseline's too
        self.model.to(device)
        if row.compiled == "compiled":
            self.model.compile()
        elif row.compiled == "blocks":
            self.model.compile(blocks=True)
        options = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.01, "fused": True}
        self.optimizer = torch.optim.AdamW(self.model.student.parameters(), **options)
        self.images = torch.randn(batch, 3, *vit.spec.image_size, device=device)
        self.ids, self.epoch = torch.arange(batch, device=device), 0

    def step(self) -> None:
        """One update. The host does not wait for it."""
        with autocast(self.images.device, self.dtype):
            loss = self.model(self.images, self.ids, self.epoch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.epoch += 1


class Measured:
    """A bench that stays in memory between its rounds, with its times so far."""

    def __init__(self, row: Row, batch: int, device: torch.device):
        self.device, self.seconds, self.peak = device.type, [], 0
        before = self._allocated()
        self.bench = StepBench(row, batch, device)
        started = time.perf_counter()
        self.bench.step()
        wait(self.device)
        self.first = time.perf_counter() - started
        self.own = self._allocated() - before

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def round(self, steps: int, warm_up: int) -> None:
        """Time some steps."""
        free(self.device)
        others = self._allocated() - self.own
        for _ in range(warm_up):
            self.bench.step()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # without compilation's
        self.seconds += timed(self.bench.step, steps, self.device)
        if self.device == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - others)

    def figures(self) -> dict:
        """The columns of a row."""
        batch, found = len(self.bench.images), quantiles([1e3 * second for second in self.seconds])
        rate, cuda = 1e3 * batch / found["ms"], self.device == "cuda"
        peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
        return {
            "batch": batch,
            "images_per_second": rate,
            **found,
            "flops_per_second": rate * self.bench.flops,
            "mfu": rate * self.bench.flops / peak if peak else None,
            "peak_gib": self.peak / 2**30 if cuda else None,
            "first_step_s": self.first,
            "steps": len(self.seconds),
        }


def measure(
    rows: list[Row], batch: int, device: torch.device, rounds: int = ROUNDS, steps: int = STEPS,
    save: Callable[[list[dict]], object] = lambda results: None,
) -> list[dict]:  # fmt: skip
    """Measure rows of one backbone, all in memory together, in turns; `save` gets the results after each round."""
    torch._dynamo.reset()
    measured, failed, results = {}, {}, []

    def advance(row: Row) -> None:
        first = row not in measured
        if first:
            measured[row] = Measured(row, batch, device)
        measured[row].round(steps, WARM_UP if first else 1)

    for turn, row in enumerate(in_turns(rows, rounds), 1):
        if row not in failed:
            _, why = attempt(advance, row)
            if why:
                failed[row] = why
                measured.pop(row, None)
        if turn % len(rows) == 0:
            figures = {row: one.figures() for row, one in measured.items()}
            figures |= {row: {"batch": batch, "failed": why} for row, why in failed.items()}
            results = [row._asdict() | figures[row] for row in rows]
            save(results)
    measured.clear()
    free(device.type)
    return results
