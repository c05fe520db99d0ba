"""A table of goals and measured figures from `benchmarks/results/`: ``python -m benchmarks.summary``."""

from collections.abc import Iterator

from benchmarks import record
from benchmarks.kernels import KEY as OPERATION_KEY
from benchmarks.step_bench import KEY as STEP_KEY
from benchmarks.step_bench import Row

SPEEDUP = {"B/16-224": 1.8, "L/14-336": 2.5, "SO400M/14-384": 2.5}
MFU = {"B/16-224": 0.45, "L/14-336": 0.50}
MOVING = ("mask_tokens", "expand_masked", "pack", "unpack", "reconstruction_loss")
Goal = tuple[str, float | None, str]
"""Name, figure (None: not measured), target."""


def step_goals(rows: list[dict]) -> Iterator[Goal]:
    """Compiled steps with the soft-cap: speed over the baseline, MFU, drop over zero, memory at the same batch."""
    found = {tuple(row[key] for key in STEP_KEY): row for row in rows if "failed" not in row}

    def ratio(column: str, ours: Row, other: Row) -> float | None:
        a, b = found.get(tuple(ours)), found.get(tuple(other))
        return a[column] / b[column] if a and b and a["batch"] == b["batch"] and b[column] else None

    for name, wanted in SPEEDUP.items():
        zero, drop, baseline = (Row(name, mode) for mode in ("zero", "drop", "baseline"))
        eager = baseline._replace(compiled="eager")
        speed = "images_per_second"
        yield f"{name}: zero over the compiled baseline", ratio(speed, zero, baseline), f">= {wanted}"
        yield f"{name}: zero over the eager baseline", ratio(speed, zero, eager), "reported"
        if name in MFU:
            yield f"{name}: MFU of zero", found.get(tuple(zero), {}).get("mfu"), f">= {MFU[name]}"
        yield f"{name}: drop over zero", ratio(speed, drop, zero), ">= 1.2"
        yield f"{name}: peak memory of zero over the baseline's", ratio("peak_gib", zero, baseline), "<= 0.6"


def kernel_goals(rows: list[dict]) -> Iterator[Goal]:
    """Memory-bound kernels, forward and backward: share of the copy bandwidth, speed over torch.compile."""
    for name in MOVING:
        ours = [row for row in rows if (row["op"], row["implementation"]) == (name, "ours")]
        ours = [row for row in ours if row.get("copy_share")]
        shares = [row["copy_share"] for row in ours if not row.get("derived")]
        faster = [x for row in ours if (x := row["times_faster_than"].get("compile")) is not None]
        yield f"{name}: least share of the copy bandwidth", min(shares, default=None), ">= 0.85"
        yield f"{name}: least speed over torch.compile", min(faster, default=None), ">= 1"


def attention_goals(rows: list[dict]) -> Iterator[Goal]:
    """Capped attention at CLIP's lengths, forward plus backward."""
    found = {tuple(row.get(key) for key in OPERATION_KEY): row for row in rows if "ms" in row}
    for length in (197, 577):
        for packed in ("", " packed"):
            label = f"T {length} d 64 cap{packed}"
            faster = found.get(("softcap_attention", label, "ours", "full"), {}).get("times_faster_than", {})
            yield f"attention, {label}: over FlexAttention", faster.get("flex"), ">= 1.5"
            uncapped = f"attention, {label}: over uncapped FlashAttention of torch"
            yield uncapped, faster.get("sdpa_flash"), "reported"


GOALS = {"step": step_goals, "attention": attention_goals, "kernels": kernel_goals}


def failures() -> list[str]:
    """The failed rows of all results."""
    rows = [row for name in GOALS for row in record.read(name).get("rows", []) if "failed" in row]
    keys = dict.fromkeys((*STEP_KEY, *OPERATION_KEY))
    return [
        f"failed: {' '.join(str(row[key]) for key in keys if row.get(key))}: {row['failed']}" for row in rows
    ]


def main() -> str:
    """Print the table as Markdown."""
    rows = []
    for name, goals in GOALS.items():
        for label, figure, wanted in goals(record.read(name).get("rows", [])):
            rows.append([label, "not measured" if figure is None else f"{figure:.2f}", wanted])
    text = record.markdown("| goal | measured | wanted |", rows) + "\n".join(failures())
    print(text)
    return text


if __name__ == "__main__":
    main()
