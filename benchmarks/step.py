"""Speed of a training step, without data: ``python -m benchmarks.step [--backbones NAME ...] [--tiny]``.

Images a second, model FLOPs utilisation by `fastalign.flops`, and peak memory, for a student with and without
the soft-cap, eager and compiled, in bf16 with fp32 weights; forward, backward and AdamW, random images. Medians
of repeated steps after warm-up. Writes `benchmarks/results/step.json` on a GPU (a CPU's figures mean nothing
alone and are only printed).
"""

import argparse
import statistics
import time

import torch

import fastalign as fa
from benchmarks import record
from fastalign.engine.flops import peak_flops
from fastalign.engine.optim import adamw
from fastalign.flops import flops_per_image

BACKBONES = {
    "vit_base_patch16_clip_quickgelu_224": 256,
    "vit_large_patch14_clip_quickgelu_336": 32,
    "vit_so400m_patch14_siglip_384": 16,
}
"""With the batch that is tried first; it is halved until it fits."""
TINY = {"vit_tiny_patch16_224": 2}
WARM_UP, REPEATS = 5, 20


def measure(name: str, batch: int, *, softcap: float | None, compiled: bool, repeats: int, **kwargs) -> dict:
    """One row of the table.

    Args:
        name: the backbone, random weights.
        batch: images a step.
        softcap: of the student.
        compiled: torch.compile student and teacher.
        repeats: timed steps.
        **kwargs: timm's arguments.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch._dynamo.reset()
    vit = fa.create_backbone(name, **kwargs)
    student = fa.MaskEmbedStudent.from_backbone(vit, softcap=softcap)
    step = fa.MaskEmbed(fa.MaskedTeacher(vit), student, fa.UniformMasks()).to(device)
    if compiled:
        step.compile()
    optimizer = adamw(student.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
    images = torch.randn(batch, 3, *vit.spec.image_size, device=device)
    ids, seconds = torch.arange(batch, device=device), []
    started = time.perf_counter()
    for index in range(WARM_UP + repeats if repeats > 1 else 2):
        before = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = step(images, ids, index)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - before)
        if index == 0:
            first = time.perf_counter() - started
    timed = seconds[-repeats:]
    rate = batch / statistics.median(timed)
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return {
        "backbone": name,
        "batch": batch,
        "softcap": softcap,
        "compiled": compiled,
        "images_per_second": rate,
        "slowest_decile_ms": 1e3 * sorted(timed)[int(0.9 * (len(timed) - 1))],
        "mfu": rate * flops_per_image(step) / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "first_step_s": first,
    }


def measure_fitting(name: str, batch: int, **options) -> dict | None:
    """`measure` with the largest batch that fits: the given one, halved until it does."""
    while batch:
        try:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            return measure(name, batch, **options)
        except torch.cuda.OutOfMemoryError:
            batch //= 2
    return None


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), help="timm names")
    parser.add_argument(
        "--tiny", action="store_true", help="one tiny backbone, two steps: checks that it runs"
    )
    options = parser.parse_args(arguments)
    chosen = TINY if options.tiny else {name: BACKBONES.get(name, 64) for name in options.backbones}
    rows = []
    for name, batch in chosen.items():
        for softcap in (30.0, None):
            for compiled in (False,) if options.tiny else (False, True):
                extra = {"img_size": 32, "depth": 2} if options.tiny else {}
                repeats = 1 if options.tiny else REPEATS
                row = measure_fitting(
                    name, batch, softcap=softcap, compiled=compiled, repeats=repeats, **extra
                )
                if row:
                    rows.append(row)
                    mfu = f"{100 * row['mfu']:.1f}%" if row["mfu"] else "-"
                    memory = f"{row['peak_gib']:.1f} GiB" if row["peak_gib"] else "-"
                    kind = "compiled" if compiled else "eager"
                    print(
                        f"{name:40} batch {row['batch']:4} cap {softcap or '-':5} {kind:8} "
                        f"{row['images_per_second']:8.1f} images/s  MFU {mfu}  {memory}",
                        flush=True,
                    )
    if torch.cuda.is_available() and not options.tiny:
        record.write("step", rows)
    return rows


if __name__ == "__main__":
    main()
