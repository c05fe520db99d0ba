"""Speed of a training step, without data: ``python -m benchmarks.step [--backbones NAME ...] [--resume]``.

Forward, backward and AdamW on random images, in bf16 autocast with fp32 weights: our step in mode zero and drop
against `benchmarks.baseline`, compiled and eager, with and without the soft-cap. Images a second (medians of
repeated steps after warm-up, with the largest batch that fits), model FLOPs utilisation by `fastalign.flops`, peak
memory (where batches differ, ours is measured with the baseline's batch too), and in a pass of its own the time of
each part. What is compared is measured one after the other in one process: such a group is written as a whole.

On a GPU `benchmarks/results/step.json` is written after every group; ``--budget SECONDS`` ends a run early,
``--resume`` goes on where one of the same sources, versions and GPU ended, and at its end measures again the groups
in which one of ours failed, unless for want of memory. Exit code 1 if a row has no figure.

On a CPU, ``--ratios`` times eager steps of a ViT-S in turns, by processor time, and writes ratios only, to
`step_cpu.json`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial

import torch

import fastalign as fa
from benchmarks import plots, record
from benchmarks.baseline import Baseline
from benchmarks.measure import NO_ROOM, attempt, free
from benchmarks.parts import parts
from benchmarks.targets import step_cpu_targets, step_targets, summary
from fastalign.engine.flops import peak_flops
from fastalign.engine.memory import keep_freed_memory
from fastalign.engine.optim import adamw
from fastalign.flops import flops_per_image

BACKBONES = {
    "vit_base_patch16_clip_quickgelu_224": 256,
    "vit_large_patch14_clip_quickgelu_336": 32,
    "vit_so400m_patch14_siglip_384": 16,
}
"""With the batch that is tried first; it is halved until it fits."""
OURS_AND_BASELINE = ("baseline", "zero", "drop")
GROUPS = [
    (30.0, True, (*OURS_AND_BASELINE, "fp8")),
    (None, True, OURS_AND_BASELINE),
    (30.0, False, OURS_AND_BASELINE),
    (30.0, "blocks", ("zero", "drop")),
    (None, False, OURS_AND_BASELINE),
]
"""Soft-cap of the student, compiled, what is compared with these; the most important first."""
TINY = {"vit_tiny_patch16_224": 2}
WARM_UP, REPEATS = 5, 20


class Contestant:
    """A model with its optimiser and a batch of random images, ready to step.

    Args:
        implementation: "zero" and "drop", ours in these modes, "fp8", mode zero with the teacher's products in FP8,
            or "baseline".
        name: the backbone, random weights.
        batch: images a step.
        softcap: of the student.
        compiled: torch.compile student and teacher; "blocks", block by block.
        **kwargs: timm's arguments.
    """

    def __init__(
        self, implementation: str, name: str, batch: int, softcap, compiled: bool | str = False, **kwargs
    ):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.compiled = compiled
        vit = fa.create_backbone(name, **kwargs)
        masking = "drop" if implementation == "drop" else "zero"
        student = fa.MaskEmbedStudent.from_backbone(vit, softcap=softcap)
        self.model = fa.MaskEmbed(fa.MaskedTeacher(vit, masking=masking), student, fa.UniformMasks())
        self.flops = flops_per_image(self.model)
        if self.device.type == "cuda":
            fp8 = implementation == "fp8"
            self.model.teacher.store_as(torch.float8_e4m3fn if fp8 else torch.bfloat16)
        if implementation == "baseline":
            self.model = Baseline(name, softcap, **kwargs)
        self.model.to(self.device)
        if compiled:
            self.model.compile(**({"blocks": True} if compiled == "blocks" else {}))
        trained = self.model.student.parameters()
        self.optimizer = adamw(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
        self.images = torch.randn(batch, 3, *vit.spec.image_size, device=self.device)
        self.ids, self.epoch = torch.arange(batch, device=self.device), 0

    def autocast(self) -> torch.autocast:
        """bf16 on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def step(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """One step. Returns its seconds."""
        before = clock()
        with self.autocast():
            loss = self.model(self.images, self.ids, self.epoch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()  # waits for the device
        self.epoch += 1
        return clock() - before


def measure(
    implementation: str, name: str, batch: int, softcap, compiled: bool | str, repeats: int, **kwargs
) -> dict:
    """One row of the table; arguments as for `Contestant`."""
    torch._dynamo.reset()
    cuda = torch.cuda.is_available()
    free("cuda" if cuda else "cpu")
    held = torch.cuda.memory_allocated() if cuda else 0
    contestant = Contestant(implementation, name, batch, softcap, compiled, **kwargs)
    first = contestant.step()
    for _ in range(WARM_UP if repeats > 1 else 0):
        contestant.step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()  # what compiling took is not the step's
    timed = [contestant.step() for _ in range(repeats)]
    rate = batch / statistics.median(timed)
    gib = (torch.cuda.max_memory_allocated() - held) / 2**30 if cuda else None
    peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
    # A pass of its own: whatever happens in it, the figures above stand.
    cut, why = attempt(parts, contestant, 10 if repeats > 1 else 1)
    return {
        "batch": batch,
        "images_per_second": rate,
        "slowest_decile_ms": 1e3 * sorted(timed)[int(0.9 * (len(timed) - 1))],
        "mfu": rate * contestant.flops / peak if peak else None,
        "peak_gib": gib,
        "first_step_s": first,
        "parts_ms": cut or {},
        **({"parts_failed": why} if why else {}),
    }


def measure_fitting(implementation: str, name: str, batch: int, *arguments, **kwargs) -> dict:
    """`measure` with the largest batch that fits: the given one, halved until it does."""
    while True:
        row, why = attempt(partial(measure, implementation, name, batch, *arguments, **kwargs))
        if row:
            return row
        if batch == 1 or not (why == NO_ROOM or "out of memory" in why):
            return {"batch": batch, "failed": why}
        batch //= 2


def measure_group(name: str, batch: int, group: tuple, repeats: int, **kwargs) -> list[dict]:
    """The rows of what is compared: each with the batch that fits, and with the baseline's where that differs."""
    softcap, compiled, implementations = group
    run, rows = datetime.now(timezone.utc).isoformat(timespec="milliseconds"), []

    def add(implementation: str, batch: int) -> dict:
        row = {"backbone": name, "implementation": implementation, "softcap": softcap, "compiled": compiled}
        row |= {"run": run}
        row |= measure_fitting(implementation, name, batch, softcap, compiled, repeats, **kwargs)
        rows.append(row)
        show(row)
        return row

    fitting = {row["implementation"]: row["batch"] for row in [add(kind, batch) for kind in implementations]}
    common = fitting.pop("baseline", None)
    for kind, own in fitting.items():
        if common and own != common:
            add(kind if own > common else "baseline", min(own, common))
    return rows


def show(row: dict) -> None:
    """A line of the table, and one with the parts."""
    kind = {True: "compiled", "blocks": "blocks", False: "eager"}[row["compiled"]]
    start = f"{row['backbone']:38} {row['implementation']:9} cap {row['softcap'] or '-':5} {kind:8} batch "
    start += f"{row['batch']:4} "
    if "failed" in row:
        print(f"{start}not measured: {row['failed']}", flush=True)
        return
    mfu = f"{100 * row['mfu']:.1f}%" if row["mfu"] else "-"
    memory = f"{row['peak_gib']:.1f} GiB" if row["peak_gib"] else "-"
    print(
        f"{start}{row['images_per_second']:8.1f} images/s  MFU {mfu:6} {memory}  "
        f"first step {row['first_step_s']:.0f} s\n{'':10}"
        + ", ".join(f"{part} {value:.2f} ms" for part, value in row["parts_ms"].items()),
        flush=True,
    )


def ratios(name: str = "vit_small_patch16_224", batch: int = 8, rounds: int = 10, **kwargs) -> list[dict]:
    """Eager steps on a CPU in turns: how much faster each is than the others.

    One thread and processor time, so that what else runs on the machine does not decide. Freed memory is kept, as
    in training: else whoever allocates in an unlucky order pays for new pages.
    """
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    contestants = {
        kind: Contestant(kind, name, batch, 30.0, **kwargs) for kind in ("baseline", "zero", "drop")
    }
    seconds = {kind: [] for kind in contestants}
    for index in range(rounds + 1):
        order = list(contestants) if index % 2 else list(contestants)[::-1]
        for kind in order:
            taken = contestants[kind].step(time.process_time)
            if index:
                seconds[kind].append(taken)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    rows = []
    for kind in contestants:
        row = {"backbone": name, "batch": batch, "implementation": kind, "rounds": rounds, "threads": 1}
        row |= {f"speedup_over_{other}": median[other] / median[kind] for other in median if other != kind}
        found = parts(contestants[kind], rounds)
        # Shares, because a CPU's milliseconds mean nothing.
        row["parts"] = {part: ms / sum(found.values()) for part, ms in found.items()}
        rows.append(row)
        print(rows[-1], flush=True)
    torch.set_num_threads(threads)
    return rows


def _group(row: dict) -> tuple:
    return row["backbone"], row["softcap"], row["compiled"]


def run(chosen: dict[str, int], groups: list[tuple], options: argparse.Namespace, **kwargs) -> list[dict]:
    """Measure group by group and write; rows of earlier parts included."""
    identity, started, longest = record.identity(), time.perf_counter(), 0.0
    rows = record.resume("step", identity).get("rows", []) if options.resume else []
    compared = {(name, *group[:2]): group for group in groups for name in chosen}
    left = record.left(list(compared), rows, _group)
    for index, key in enumerate(left):
        before = time.perf_counter()
        if before - started + longest > options.budget:
            print(f"budget spent, {len(left) - index} groups left: run again with --resume")
            break
        name, repeats = key[0], 1 if options.tiny else REPEATS
        rows = [row for row in rows if _group(row) != key]
        rows += measure_group(name, chosen[name], compared[key], repeats, **kwargs)
        if not options.tiny:
            record.write("step", rows, {"identity": identity, "targets": step_targets(rows)})
        longest = max(longest, time.perf_counter() - before)
    print(summary(step_targets(rows)))
    if not options.tiny:
        plots.draw("step")
    return rows


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), help="timm names")
    parser.add_argument("--resume", action="store_true", help="keep the results of earlier parts")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds; begin no group that may end later"
    )
    parser.add_argument("--ratios", action="store_true", help="a CPU's ratios of eager steps of a ViT-S")
    parser.add_argument("--tiny", action="store_true", help="tiny models, two steps: checks that it runs")
    options = parser.parse_args(arguments)
    extra = {"img_size": 32, "depth": 2} if options.tiny else {}
    if options.ratios:
        rows = ratios(rounds=1, batch=2, **extra) if options.tiny else ratios()
        print(summary(step_cpu_targets(rows)))
        if not options.tiny:
            record.write("step_cpu", rows, {"targets": step_cpu_targets(rows)})
            plots.draw("step_cpu")
        return rows
    if options.tiny:
        return run(TINY, [group for group in GROUPS if not group[1]][:1], options, **extra)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.step needs a GPU: a CPU's figures mean nothing alone; --ratios compares there")
    return run({name: BACKBONES.get(name, 64) for name in options.backbones}, GROUPS, options)


if __name__ == "__main__":
    sys.exit(any("failed" in row for row in main()))
