"""What the kernels have to reach, checked against the rows of `benchmarks.kernels`."""

from collections.abc import Callable, Iterable

from benchmarks.measure import MODES

ATTENTION = "softcap_attention"
BANDWIDTH = 0.85
LENGTHS = (197, 577)
AGAINST = {"flex_tanh_approx": 1.5, "sdpa_flash": 1.0}
"""How many times faster than these capped attention must be, forward and backward together."""


def _verdict(
    target: str, rows: Iterable[dict], value: Callable[[dict], float | None], least: float, needed: int = 1
) -> dict:
    """Met if every row reaches it; unmeasured if fewer rows than needed say anything and none misses."""
    found = {(row["op"], row["label"]): value(row) for row in rows}
    found = {f"{op} {label}": figure for (op, label), figure in found.items() if figure is not None}
    missed = {where: figure for where, figure in found.items() if not figure >= least}
    state = "missed" if missed else "met" if len(found) >= needed else "unmeasured"
    worst = min(found, key=found.get) if found else None
    return {
        "target": target,
        "state": state,
        "least": least,
        "rows": len(found),
        "worst": found.get(worst),
        "worst_at": worst,
        "missed": missed,
    }


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


def summary(found: list[dict]) -> str:
    """A line for each target, and one for each case that misses it."""
    lines = []
    for entry in found:
        figure = ""
        if entry.get("worst") is not None:
            figure = f": {entry['worst']:.2f}, at least {entry['least']} wanted, worst at {entry['worst_at']}"
        lines.append(f"{entry['state']:10} {entry['target']}{figure} ({entry['rows']} rows)")
        for where, value in entry["missed"].items():
            lines.append(f"{'':10}   {where}: {value if isinstance(value, str) else f'{value:.2f}'}")
    return "\n".join(lines)
