"""Results of heads: metrics from integer counts on the device, tables, files.

Classes without a positive are left out of macro averages; a class that is never predicted has precision 0.
"""

import json
import math
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from fastalign.training.distributed import World
from fastalign.training.metrics import mean_and_spread
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_atomically

PATCH_METRICS = ("macro_recall", "macro_precision", "macro_f1", "macro_accuracy", "accuracy", "map", "loss")
IMAGE_METRICS = ("top1", "top5", "mean_per_class", "loss")
SIZES = 10
_BINS, _RANGE = 4096, 16.0
_GROUP = ("model", "labels", "head", "skip_blocks")
_PATCH_COLUMNS = ("macro_recall", "macro_precision", "macro_f1", "map", "accuracy")
_IMAGE_COLUMNS = {"top-1": "{:.2%}", "top-5": "{:.2%}", "mean per class": "{:.2%}", "loss": "{:.4f}"}


def patch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy for int64 targets [b, N] (-1 = void, 0 if all are), else mean binary cross-entropy; fp32."""
    if targets.dtype == torch.int64:
        logits, targets = logits.float().flatten(0, 1), targets.flatten()
        total = functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        return total / (targets >= 0).sum().clamp(min=1)
    return functional.binary_cross_entropy_with_logits(logits.float(), targets.float())


class MultiLabelCounts:
    """Counts of patches that may have several classes, at probability 0.5; recall also by the share of patches."""

    def __init__(self, classes: int, device: torch.device | str = "cpu"):
        self.hits = torch.zeros(classes, dtype=torch.int64, device=device)
        self.predicted, self.positives = self.hits.clone(), self.hits.clone()
        self.total, self.images = 0, 0
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        # Histograms of the logits by class, of negatives and of positives: the precision-recall curve.
        self.curve = torch.zeros(2, classes * _BINS, dtype=torch.int64, device=device)
        self.sizes = torch.zeros(2, SIZES, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits [B, N, C], targets [B, N, C] bool."""
        self.loss += patch_loss(logits, targets).double() * len(logits)
        self.images += len(logits)
        predicted = logits > 0
        hits = predicted & targets
        self.hits += hits.sum((0, 1))
        self.predicted += predicted.sum((0, 1))
        self.positives += targets.sum((0, 1))
        self.total += targets.shape[0] * targets.shape[1]
        scaled = (logits.float() + _RANGE) * (_BINS / (2 * _RANGE))
        bins = scaled.nan_to_num(0.0).clamp(0, _BINS - 1).long()
        bins += torch.arange(targets.shape[-1], device=bins.device) * _BINS
        for kind, chosen in enumerate((~targets, targets)):
            self.curve[kind] += torch.bincount(bins[chosen], minlength=self.curve.shape[1])
        # (0, 0.1], (0.1, 0.2]... of the patches, in integers so that rounding cannot move a count.
        count = targets.sum(1)
        bucket = ((count * SIZES - 1).div(targets.shape[1], rounding_mode="floor")).clamp(min=0)
        for row, value in enumerate((hits.sum(1), count)):
            self.sizes[row].index_add_(0, bucket.flatten(), value.flatten())

    def results(self) -> dict:
        """The metrics and the mean loss; per class None where the split has no positive."""
        accuracy = 1 - (self.positives + self.predicted - 2 * self.hits).double() / max(self.total, 1)
        found = _summary(accuracy, self.hits, self.positives, self.predicted)
        # Average precision: the sum over thresholds, from the highest, of precision times the recall gained.
        negatives, positives = self.curve.view(2, -1, _BINS).flip(-1).double()
        true = positives.cumsum(-1)
        precision = true / (true + negatives.cumsum(-1)).clamp(min=1)
        ap = (precision * positives).sum(-1) / positives.sum(-1).clamp(min=1)
        present = self.positives > 0
        found |= {"accuracy": accuracy.mean().item(), "map": ap[present].mean().item()}
        found["per_class"]["average_precision"] = _listed(ap, present)
        hits, positives = self.sizes
        found["by_size"] = {
            "edges": [edge / SIZES for edge in range(SIZES + 1)],
            "recall": _listed(_ratio(hits, positives), positives > 0),
            "positives": positives.tolist(),
        }
        return {"loss": (self.loss / self.images).item()} | found


class MultiClassCounts:
    """Counts of patches that have one class each; void patches are left out."""

    def __init__(self, classes: int, device: torch.device | str = "cpu"):
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits [B, N, C], targets [B, N] int64, -1 = void."""
        classes, counted = len(self.matrix), targets >= 0
        self.loss += patch_loss(logits, targets).double() * counted.sum()
        cells = targets[counted] * classes + logits.argmax(-1)[counted]
        self.matrix += torch.bincount(cells, minlength=classes * classes).view(classes, classes)

    def results(self) -> dict:
        """The metrics and the mean loss; `accuracy` is the share of labelled patches that are correct."""
        hits, positives, predicted = self.matrix.diag(), self.matrix.sum(1), self.matrix.sum(0)
        total = self.matrix.sum().clamp(min=1)
        accuracy = (total - positives - predicted + 2 * hits).double() / total
        found = _summary(accuracy, hits, positives, predicted)
        loss = (self.loss / self.matrix.sum()).item()
        return {"loss": loss} | found | {"accuracy": (hits.sum().double() / total).item()}


class ImageCounts:
    """Counts of images that have one class each, over all ranks."""

    def __init__(self, classes: int, device: torch.device):
        self.classes = classes
        # loss, top-5 hits, then by class hits and images: one tensor, so that ranks sum once.
        self.total = torch.zeros(2 + 2 * classes, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits [B, C] of any float dtype, labels [B] int64. Of equal logits the first one counts."""
        logits = logits.float()
        right = (logits.argmax(1) == labels).double()
        top5 = (logits.topk(min(5, self.classes)).indices == labels[:, None]).any(1)
        self.total[0] += functional.cross_entropy(logits, labels, reduction="sum").double()
        self.total[1] += top5.sum()
        self.total[2 : 2 + self.classes].index_add_(0, labels, right)
        self.total[2 + self.classes :].index_add_(0, labels, torch.ones_like(right))

    def results(self, world: World) -> dict[str, float | None]:
        """`IMAGE_METRICS` over the batches of all ranks; `top5` is None with at most five classes."""
        total = world.sum(self.total).cpu()
        hits, counts = total[2:].view(2, self.classes)
        seen, images = counts > 0, counts.sum().item()
        return {
            "top1": hits.sum().item() / images,
            "top5": total[1].item() / images if self.classes > 5 else None,
            "mean_per_class": (hits[seen] / counts[seen]).mean().item(),
            "loss": total[0].item() / images,
        }


def _ratio(part: Tensor, total: Tensor) -> Tensor:
    """part / total in float64, 0 where total is 0."""
    return torch.where(total > 0, part.double() / total.clamp(min=1), 0.0)


def _listed(values: Tensor, present: Tensor) -> list[float | None]:
    return [value if there else None for value, there in zip(values.tolist(), present.tolist(), strict=True)]


def _summary(accuracy: Tensor, hits: Tensor, positives: Tensor, predicted: Tensor) -> dict:
    present = positives > 0
    parts = {
        "recall": _ratio(hits, positives),
        "precision": _ratio(hits, predicted),
        "f1": _ratio(2 * hits, positives + predicted),
        "accuracy": accuracy,
    }
    macro = {f"macro_{name}": values[present].mean().item() for name, values in parts.items()}
    per_class = {name: _listed(values, present) for name, values in parts.items()}
    return macro | {"per_class": per_class | {"positives": positives.tolist()}}


def summarize(results: list[dict]) -> list[dict]:
    """One row per head over all seeds: mean and standard deviation of each metric on the test split."""
    groups: dict[tuple, list[dict]] = {}
    for row in results:
        groups.setdefault(tuple(row[key] for key in _GROUP), []).append(row["test"])
    summary = []
    for key, tests in groups.items():
        names = [name for name in PATCH_METRICS if name in tests[0]]
        metrics = {name: mean_and_spread([test[name] for test in tests]) for name in names}
        summary.append({**dict(zip(_GROUP, key, strict=True)), "seeds": len(tests), "test": metrics})
    return summary


def patch_table(summary: list[dict], title: str) -> Table:
    """The summary of probes in percent, in 80 columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    shown = ["model"] * (len({row["model"] for row in summary}) > 1)
    shown += ["skip_blocks"] * any(row["skip_blocks"] for row in summary)
    for name in (*(key.removesuffix("_blocks") for key in shown), "probe"):
        table.add_column(name, overflow="fold")
    for name in _PATCH_COLUMNS:
        table.add_column(name.removeprefix("macro_"), justify="right", no_wrap=True)
    for row in summary:
        figures = (percent(row["test"].get(name)).replace(" ± ", "±") for name in _PATCH_COLUMNS)
        table.add_row(*(str(row[key]) for key in shown), f"{row['labels']} {row['head']}", *figures)
    return table


def image_table(results: dict, name: str) -> Table:
    """The results of image classification with the model `name`, a row for each seed."""
    split = results["reported"]
    reads, head = results["backbone"]["reads"], results["settings"]["head"]
    table = Table(title=f"{name}: {split} split, {reads} -> {head}")
    for column in ("seed", *_IMAGE_COLUMNS, "epoch"):
        table.add_column(column, justify="right")
    rows = [(str(seed["seed"]), seed[split], str(seed["epoch"])) for seed in results["seeds"]]
    rows += [(name, results[name], "") for name in ("mean", "std")[: len(rows)]]
    for number, (name, figures, epoch) in enumerate(rows, 1):
        values = zip(_IMAGE_COLUMNS.values(), (figures[key] for key in IMAGE_METRICS), strict=True)
        cells = ("-" if value is None else form.format(value) for form, value in values)
        table.add_row(name, *cells, epoch, end_section=number == len(results["seeds"]))
    return table


def percent(value: dict | None, sign: str = "-") -> str:
    """71.3 ± 0.4; of a difference, with `sign` "+", +1.2 ± 0.4."""
    if value is None or value["mean"] is None or math.isnan(value["mean"]):
        return "-"
    spread = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
    return f"{100 * value['mean']:{sign}.1f}{spread}"


def check_output(path: Path, facts: dict) -> None:
    """Refuse to overwrite results of other facts, such as `settings` and `data`; create the file's folder."""
    if path.is_dir():
        raise UserError(f"--output {path}: it is a folder; name a file, such as {path / 'probe.json'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_bytes())
        changed = difference({key: before.get(key) for key in facts}, facts)
    except (ValueError, AttributeError):
        changed = "it is not a file of results"
    if changed:
        raise UserError(
            f"--output: {path} has the results of another setting ({changed}); name another output, or remove it"
        )


def difference(before: dict, now: dict, path: str = "") -> str:
    """The first difference of two trees of plain values, as in "section.key was 1, is 2"; "" if they are equal."""
    for key in sorted((before.keys() | now.keys()) - {"path", "root"}):  # the data set may be elsewhere
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if changed := difference(old, new, f"{path}{key}."):
                return changed
        elif old != new:
            return f"{path}{key} was {old}, is {new}"
    return ""


def write_results(path: Path, facts: dict) -> None:
    """Write results as JSON; a number that is not finite becomes null."""
    finite = json.loads(json.dumps(facts), parse_constant=lambda number: None)
    text = json.dumps(finite, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
