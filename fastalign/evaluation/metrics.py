"""Metrics of heads, from integer counts on the device; classes without a positive are left out of macro averages.

A class that is never predicted has precision 0.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fastalign.training.distributed import World

PATCH_METRICS = ("macro_recall", "macro_precision", "macro_f1", "macro_accuracy", "accuracy", "map", "loss")
IMAGE_METRICS = ("top1", "top5", "mean_per_class", "loss")
SIZES = 10
_BINS, _RANGE = 4096, 16.0


def patch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy for int64 targets [b, N] (-1 = void, 0 if all are), else mean binary cross-entropy; fp32."""
    if targets.dtype == torch.int64:
        logits, targets = logits.float().flatten(0, 1), targets.flatten()
        total = functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        return total / (targets >= 0).sum().clamp(min=1)
    return functional.binary_cross_entropy_with_logits(logits.float(), targets.float())


class MultiLabelCounts:
    """Of patches that may have several classes, at probability 0.5; with `by_size` also by the share of patches."""

    def __init__(self, classes: int, device: torch.device | str = "cpu", *, by_size: bool = True):
        self.hits = torch.zeros(classes, dtype=torch.int64, device=device)
        self.predicted, self.positives = self.hits.clone(), self.hits.clone()
        self.total, self.images = 0, 0
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        # Histograms of the logits by class, of negatives and of positives: the precision-recall curve.
        self.curve = torch.zeros(2, classes * _BINS, dtype=torch.int64, device=device)
        self.sizes = torch.zeros(2, SIZES, dtype=torch.int64, device=device) if by_size else None

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Counts a batch: logits [B, N, C], targets [B, N, C] bool."""
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
        if self.sizes is not None:
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
        if self.sizes is not None:
            hits, positives = self.sizes
            found["by_size"] = {
                "edges": [edge / SIZES for edge in range(SIZES + 1)],
                "recall": _listed(_ratio(hits, positives), positives > 0),
                "positives": positives.tolist(),
            }
        return {"loss": (self.loss / self.images).item()} | found


class MultiClassCounts:
    """Of patches that have one class each; void patches are not counted."""

    def __init__(self, classes: int, device: torch.device | str = "cpu"):
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Counts a batch: logits [B, N, C], targets [B, N] int64, -1 = void."""
        classes, counted = len(self.matrix), targets >= 0
        self.loss += patch_loss(logits, targets).double() * counted.sum()
        cells = targets[counted] * classes + logits.argmax(-1)[counted]
        self.matrix += torch.bincount(cells, minlength=classes * classes).view(classes, classes)

    def results(self) -> dict:
        """The metrics and the mean loss; `accuracy` is the share of labelled patches that are right."""
        hits, positives, predicted = self.matrix.diag(), self.matrix.sum(1), self.matrix.sum(0)
        total = self.matrix.sum().clamp(min=1)
        accuracy = (total - positives - predicted + 2 * hits).double() / total
        found = _summary(accuracy, hits, positives, predicted)
        loss = (self.loss / self.matrix.sum()).item()
        return {"loss": loss} | found | {"accuracy": (hits.sum().double() / total).item()}


class ImageCounts:
    """Of images that have one class each, over all ranks."""

    def __init__(self, classes: int, device: torch.device):
        self.classes = classes
        # loss, top-5 hits, then by class hits and images: one tensor, so that ranks sum once.
        self.total = torch.zeros(2 + 2 * classes, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch: logits [B, C] of any float dtype, labels [B] int64. The first of equal logits is taken."""
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
