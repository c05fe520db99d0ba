"""What the figures have to reach, judged from the rows of the benchmarks: ``python -m benchmarks.targets``.

The command prints every target with its state and writes `benchmarks/results/SUMMARY.md`: the targets, and what has
been measured where. It reads results and measures nothing.
"""

import argparse
import sys
from collections.abc import Callable, Iterable

from benchmarks import record
from benchmarks.measure import MODES

ATTENTION = "softcap_attention"
BANDWIDTH = 0.85
LENGTHS = (197, 577)
AGAINST = {"flex": 1.5, "sdpa_flash": 1.0}
"""How many times faster than these capped attention must be, forward and backward together."""


BASE, LARGE, SO400M = (
    "vit_base_patch16_clip_quickgelu_224",
    "vit_large_patch14_clip_quickgelu_336",
    "vit_so400m_patch14_siglip_384",
)
SPEEDUP = {BASE: 1.8, LARGE: 2.5, SO400M: 2.5}
MFU = {BASE: 0.45, LARGE: 0.50}
DROP_SPEEDUP, DROP_SPEEDUP_CPU = 1.2, 1.15
MEMORY = 0.60


def judge(
    target: str, found: dict[str, float], needed: int = 1, *, least: float | None = None, most=None
) -> dict:
    """Met if every figure keeps the bound; unmeasured if there are fewer than needed and none misses it."""
    bound, sign = (least, 1) if most is None else (most, -1)
    # Not a number misses too.
    missed = {where: figure for where, figure in found.items() if not sign * figure >= sign * bound}
    state = "missed" if missed else "met" if len(found) >= needed else "unmeasured"
    worst = min(found, key=lambda where: sign * found[where]) if found else None
    return {
        "target": target,
        "state": state,
        **({"least": least} if most is None else {"most": most}),
        "rows": len(found),
        "worst": found.get(worst),
        "worst_at": worst,
        "missed": missed,
    }


def _verdict(
    target: str, rows: Iterable[dict], value: Callable[[dict], float | None], least: float, needed: int = 1
) -> dict:
    """`judge` of a figure of each row that has it."""
    found = {(row["op"], row["label"]): value(row) for row in rows}
    found = {f"{op} {label}": figure for (op, label), figure in found.items() if figure is not None}
    return judge(target, found, needed, least=least)


def targets(rows: list[dict]) -> list[dict]:
    """Each target with its state: met, missed or unmeasured."""
    wrong = {f"{row['op']} {row['label']}": row["failed"] for row in rows if row.get("wrong")}
    checked = {(row["op"], row["label"]) for row in rows if row["implementation"] == "ours"}
    found = [
        {
            "target": "every kernel is as right as eager PyTorch",
            "state": "missed" if wrong else "met" if checked else "unmeasured",
            "rows": len(checked),
            "missed": wrong,
        }
    ]
    ours = [row for row in rows if row["implementation"] == "ours" and "ms" in row]
    for mode in MODES:
        # The difference of two times is too noisy to be judged.
        moving = [
            row for row in ours if row["op"] != ATTENTION and row["mode"] == mode and not row.get("derived")
        ]
        found.append(
            _verdict(
                f"memory-bound kernels, {mode}: share of the copy bandwidth",
                moving,
                lambda row: row.get("copy_share"),
                BANDWIDTH,
            )
        )
        found.append(
            _verdict(
                f"memory-bound kernels, {mode}: times faster than torch.compile",
                moving,
                lambda row: row["times_faster_than"].get("compile"),
                1.0,
            )
        )
    return found


def attention_targets(rows: list[dict]) -> list[dict]:
    """The targets of `benchmarks.attention`: dense capped attention at the lengths of CLIP."""
    ours = [row for row in rows if row["implementation"] == "ours" and "ms" in row]
    found = []
    for length in LENGTHS:
        capped = [
            row
            for row in ours
            if row["op"] == ATTENTION
            and row["mode"] == "full"
            and row.get("softcap")
            and row.get("length") == length
            and not row.get("packed")
        ]
        for rival, least in AGAINST.items():
            found.append(
                _verdict(
                    f"soft-capped attention, T = {length}, full: times faster than {rival}",
                    capped,
                    lambda row, rival=rival: row["times_faster_than"].get(rival),
                    least,
                )
            )
    return found


def step_targets(rows: list[dict]) -> list[dict]:
    """The targets of `benchmarks.step`: compiled, with the soft-cap. Ratios are of rows of one process."""
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        if "failed" not in row and row["softcap"] and row["compiled"] is True:
            group = groups.setdefault((row["backbone"], row["run"]), {})
            group.setdefault(row["implementation"], []).append(row)
    speed, drop, mfu, memory = {}, {}, {}, {}
    for (name, _), group in groups.items():
        rate = {kind: max(row["images_per_second"] for row in found) for kind, found in group.items()}
        if {"zero", "baseline"} <= rate.keys():
            speed[name] = rate["zero"] / rate["baseline"]
            # Memory is compared at one batch.
            gib = {kind: {row["batch"]: row["peak_gib"] for row in group[kind]} for kind in group}
            for batch in gib["zero"].keys() & gib["baseline"].keys():
                memory[f"{name} batch {batch}"] = gib["zero"][batch] / gib["baseline"][batch]
        if {"zero", "drop"} <= rate.keys():
            drop[name] = rate["drop"] / rate["zero"]
        utilised = [row["mfu"] for row in group.get("zero", ()) if row["mfu"]]
        if utilised:
            mfu[name] = max(utilised)
    found = []
    for name, least in SPEEDUP.items():
        own = {where: figure for where, figure in speed.items() if where == name}
        found.append(judge(f"step, mode zero, {name}: times faster than the baseline", own, least=least))
    for name, least in MFU.items():
        own = {where: figure for where, figure in mfu.items() if where == name}
        found.append(judge(f"step, mode zero, {name}: MFU", own, least=least))
    every = len(SPEEDUP)
    found.append(judge("step: times mode drop is faster than zero", drop, every, least=DROP_SPEEDUP))
    target = "step, mode zero: peak memory over the baseline's at the same batch"
    return [*found, judge(target, memory, every, most=MEMORY)]


def step_cpu_targets(rows: list[dict]) -> list[dict]:
    """The targets of `benchmarks.step --ratios`."""
    wanted = (("zero", "baseline", 1.0), ("drop", "zero", DROP_SPEEDUP_CPU))
    found = []
    for kind, other, least in wanted:
        own = [row for row in rows if row["implementation"] == kind]
        figures = {row["backbone"]: row[f"speedup_over_{other}"] for row in own}
        found.append(
            judge(f"eager step on a CPU: times mode {kind} is faster than {other}", figures, least=least)
        )
    return found


def summary(found: list[dict]) -> str:
    """A line for each target, and one for each case that misses it."""
    lines = []
    for entry in found:
        figure = ""
        if entry.get("worst") is not None:
            bound = f"at least {entry['least']}" if "least" in entry else f"at most {entry['most']}"
            figure = f": {entry['worst']:.2f}, {bound} wanted, worst at {entry['worst_at']}"
        lines.append(f"{entry['state']:10} {entry['target']}{figure} ({entry['rows']} rows)")
        for where, value in entry["missed"].items():
            lines.append(f"{'':10}   {where}: {value if isinstance(value, str) else f'{value:.2f}'}")
    return "\n".join(lines)


JUDGES = {
    "step": step_targets,
    "step_cpu": step_cpu_targets,
    "kernels": targets,
    "attention": attention_targets,
}
MEASUREMENTS = (*JUDGES, "masks", "fp8", "profile", "data", "scaling")


def results() -> dict[str, dict]:
    """Every result by name; empty where a measurement has none yet."""
    names = {path.stem for path in record.RESULTS.glob("*.json")}
    return {name: record.read(name) for name in (*MEASUREMENTS, *sorted(names - {*MEASUREMENTS}))}


def judged(name: str, result: dict) -> list[dict]:
    """The targets of a result: judged here, or as the benchmark itself wrote them."""
    return JUDGES[name](result.get("rows", [])) if name in JUDGES else result.get("targets", [])


def _table(head: tuple[str, ...], rows: list[tuple]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines]


def markdown(found: dict[str, dict]) -> str:
    """The summary as a page."""
    rows = []
    for name, result in found.items():
        for entry in judged(name, result):
            bounds = [
                f"{how} {entry[key]}"
                for how, key in (("at least", "least"), ("at most", "most"))
                if key in entry
            ]
            wanted = "".join(bounds) or "all"
            worst = entry.get("worst")
            figure = "-" if worst is None else f"{worst:.2f}"
            where = entry.get("worst_at") or ", ".join(entry["missed"]) or "-"
            rows.append((entry["state"], entry["target"], figure, wanted, where))
    taken = []
    for name, result in found.items():
        place = result.get("environment", {})
        plot = f"[plot]({name}.png)" if (record.RESULTS / f"{name}.png").exists() else "-"
        machine = (place.get("gpu") or "CPU") if place else "not measured"
        command = f"`{place['command']}`" if place.get("command") else "-"
        taken.append((name, machine, place.get("date", "-"), place.get("commit") or "-", command, plot))
    lines = ["# Results", "", "Written by `python -m benchmarks.targets`.", "", "## Targets", ""]
    lines += _table(("state", "target", "worst figure", "wanted", "where"), rows)
    lines += ["", "## Measurements", ""]
    lines += _table(("result", "machine", "date", "commit", "command", "plot"), taken)
    feeding = found["data"].get("feeding")
    lines += ["", "## Data", "", *(f"- {line}" for line in feeding)] if feeding else []
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Print and write the summary. What is missed is no error: the tests say what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    found = results()
    entries = [entry for name, result in found.items() for entry in judged(name, result)]
    print(summary(entries))
    states = [entry["state"] for entry in entries]
    print(", ".join(f"{states.count(state)} {state}" for state in ("met", "missed", "unmeasured")))
    path = record.RESULTS / "SUMMARY.md"
    path.write_text(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
