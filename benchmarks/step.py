"""Speed of a training step, without data: ``python -m benchmarks.step [--backbones NAME ...] [--resume]``.

Images a second, model FLOPs utilisation by `fastalign.flops`, and peak memory of forward, backward and AdamW on
random images, in bf16 autocast with fp32 weights: our step in mode zero and drop against `benchmarks.baseline`,
compiled and eager, with and without the soft-cap. Medians of repeated steps after warm-up. On a GPU rows go to
`benchmarks/results/step.json` one by one; ``--budget SECONDS`` ends a run early, ``--resume`` goes on from there.

On a CPU, ``--ratios`` times eager steps of a ViT-S in turns and writes ratios only, to `step_cpu.json`.
"""

import argparse
import statistics
import sys
import time

import torch

import fastalign as fa
from benchmarks import record
from benchmarks.baseline import Baseline
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
VARIANTS = [
    ("zero", 30.0, True),
    ("baseline", 30.0, True),
    ("drop", 30.0, True),
    ("zero", 30.0, "blocks"),
    ("zero", None, True),
    ("baseline", None, True),
    ("zero", 30.0, False),
    ("baseline", 30.0, False),
]
"""Implementation, soft-cap of the student, compiled."""
TINY = {"vit_tiny_patch16_224": 2}
WARM_UP, REPEATS = 5, 20


class Contestant:
    """A model with its optimiser and a batch of random images, ready to step.

    Args:
        implementation: "zero" and "drop", ours in these modes, or "baseline".
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
        vit = fa.create_backbone(name, **kwargs)
        masking = "zero" if implementation == "baseline" else implementation
        student = fa.MaskEmbedStudent.from_backbone(vit, softcap=softcap)
        self.model = fa.MaskEmbed(fa.MaskedTeacher(vit, masking=masking), student, fa.UniformMasks())
        self.flops = flops_per_image(self.model)
        if self.device.type == "cuda":
            self.model.teacher.store_as(torch.bfloat16)
        if implementation == "baseline":
            self.model = Baseline(name, softcap, **kwargs)
        self.model.to(self.device)
        if compiled:
            self.model.compile(**({"blocks": True} if compiled == "blocks" else {}))
        trained = self.model.student.parameters()
        self.optimizer = adamw(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
        self.images = torch.randn(batch, 3, *vit.spec.image_size, device=self.device)
        self.ids, self.epoch = torch.arange(batch, device=self.device), 0

    def step(self) -> float:
        """One step. Returns its seconds."""
        before = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(self.images, self.ids, self.epoch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()  # waits for the device
        self.epoch += 1
        return time.perf_counter() - before


def measure(
    implementation: str, name: str, batch: int, softcap, compiled: bool | str, repeats: int, **kwargs
) -> dict:
    """One row of the table; arguments as for `Contestant`."""
    torch._dynamo.reset()
    contestant = Contestant(implementation, name, batch, softcap, compiled, **kwargs)
    first = contestant.step()
    for _ in range(WARM_UP if repeats > 1 else 0):
        contestant.step()
    timed = [contestant.step() for _ in range(repeats)]
    rate = batch / statistics.median(timed)
    cuda = contestant.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
    return {
        "backbone": name,
        "implementation": implementation,
        "softcap": softcap,
        "compiled": compiled,
        "batch": batch,
        "images_per_second": rate,
        "slowest_decile_ms": 1e3 * sorted(timed)[int(0.9 * (len(timed) - 1))],
        "mfu": rate * contestant.flops / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "first_step_s": first,
    }


def measure_fitting(implementation: str, name: str, batch: int, *arguments, **kwargs) -> dict | None:
    """`measure` with the largest batch that fits: the given one, halved until it does."""
    while batch:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            return measure(implementation, name, batch, *arguments, **kwargs)
        except torch.cuda.OutOfMemoryError:
            batch //= 2
    return None


def show(row: dict) -> None:
    """A line of the table."""
    mfu = f"{100 * row['mfu']:.1f}%" if row["mfu"] else "-"
    memory = f"{row['peak_gib']:.1f} GiB" if row["peak_gib"] else "-"
    kind = {True: "compiled", "blocks": "blocks", False: "eager"}[row["compiled"]]
    print(
        f"{row['backbone']:38} {row['implementation']:9} cap {row['softcap'] or '-':5} {kind:8} batch "
        f"{row['batch']:4} {row['images_per_second']:8.1f} images/s  MFU {mfu:6} {memory}  "
        f"first step {row['first_step_s']:.0f} s",
        flush=True,
    )


def key(row: dict) -> tuple:
    """What tells rows apart."""
    return tuple(row[name] for name in ("backbone", "implementation", "softcap", "compiled"))


def ratios(name: str = "vit_small_patch16_224", batch: int = 8, rounds: int = 10, **kwargs) -> list[dict]:
    """Eager steps on a CPU in turns: how much faster each is than the baseline and than mode zero.

    Freed memory is kept, as in training: else whoever allocates in an unlucky order pays for new pages.
    """
    keep_freed_memory()
    contestants = {
        kind: Contestant(kind, name, batch, 30.0, **kwargs) for kind in ("baseline", "zero", "drop")
    }
    seconds = {kind: [] for kind in contestants}
    for index in range(rounds + 1):
        order = list(contestants) if index % 2 else list(contestants)[::-1]
        for kind in order:
            taken = contestants[kind].step()
            if index:
                seconds[kind].append(taken)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    rows = []
    for kind in ("zero", "drop"):
        row = {"backbone": name, "batch": batch, "implementation": kind, "rounds": rounds}
        row |= {f"speedup_over_{other}": median[other] / median[kind] for other in median if other != kind}
        rows.append(row)
        print(row, flush=True)
    return rows


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), help="timm names")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier part")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds, after which no row begins"
    )
    parser.add_argument("--ratios", action="store_true", help="a CPU's ratios of eager steps of a ViT-S")
    parser.add_argument("--tiny", action="store_true", help="tiny models, two steps: checks that it runs")
    options = parser.parse_args(arguments)
    extra = {"img_size": 32, "depth": 2} if options.tiny else {}
    if options.ratios:
        rows = ratios(rounds=1, batch=2, **extra) if options.tiny else ratios()
        if not options.tiny:
            record.write("step_cpu", rows)
        return rows
    if not torch.cuda.is_available() and not options.tiny:
        sys.exit("benchmarks.step needs a GPU: a CPU's figures mean nothing alone; --ratios compares there")
    chosen = TINY if options.tiny else {name: BACKBONES.get(name, 64) for name in options.backbones}
    identity, started = record.identity(), time.perf_counter()
    rows = record.resume("step", identity).get("rows", []) if options.resume else []
    done = {key(row) for row in rows}
    for name, batch in chosen.items():
        for variant in VARIANTS:
            implementation, softcap, compiled = variant
            if (name, *variant) in done or (options.tiny and compiled):
                continue
            if time.perf_counter() - started > options.budget:
                print("budget spent: run again with --resume")
                return rows
            repeats = 1 if options.tiny else REPEATS
            if row := measure_fitting(implementation, name, batch, softcap, compiled, repeats, **extra):
                rows.append(row)
                show(row)
                if not options.tiny:
                    record.write("step", rows, {"identity": identity})
    return rows


if __name__ == "__main__":
    main()
