"""What a probe is judged by. Counts are integers on the device; everything else follows from them.

A class counts in a macro average where the split has at least one positive. A class that is never predicted has
precision 0.
"""

import math

import torch
from torch import Tensor

SIZES = 10
_BINS, _RANGE = 4096, 16.0


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole in float64, 0 where there is nothing."""
    return torch.where(whole > 0, part.double() / whole.clamp(min=1), 0.0)


def _macro(values: Tensor, present: Tensor) -> float:
    return values[present].mean().item() if present.any() else math.nan


def _listed(values: Tensor, present: Tensor) -> list[float | None]:
    return [value if there else None for value, there in zip(values.tolist(), present.tolist(), strict=True)]


class MultiLabelCounts:
    """Hits and misses by class, for labels that may hold together; the threshold is probability 0.5.

    Args:
        classes: C.
        device: of logits and targets.
        by_size: also count by the share of the image's patches that hold the class.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu", *, by_size: bool = True):
        self.hits = torch.zeros(classes, dtype=torch.int64, device=device)
        self.predicted, self.positives = self.hits.clone(), self.hits.clone()
        self.total = 0
        # Logits by class in 4,096 bins, negatives and positives: the precision-recall curve.
        self.curve = torch.zeros(2, classes * _BINS, dtype=torch.int64, device=device)
        self.sizes = torch.zeros(2, SIZES, dtype=torch.int64, device=device) if by_size else None

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Takes a batch in.

        Args:
            logits: [B, N, C].
            targets: [B, N, C] bool.
        """
        predicted = logits > 0
        hits = predicted & targets
        self.hits += hits.sum((0, 1))
        self.predicted += predicted.sum((0, 1))
        self.positives += targets.sum((0, 1))
        self.total += targets.shape[0] * targets.shape[1]
        scaled = (logits.float() + _RANGE) * (_BINS / (2 * _RANGE))
        place = scaled.nan_to_num(0.0).clamp(0, _BINS - 1).long()
        place += torch.arange(targets.shape[-1], device=place.device) * _BINS
        for kind, chosen in enumerate((~targets, targets)):
            self.curve[kind] += torch.bincount(place[chosen], minlength=self.curve.shape[1])
        if self.sizes is not None:
            # (0, 0.1], (0.1, 0.2]... of the patches, in whole numbers: no rounding decides.
            count = targets.sum(1)
            bucket = ((count * SIZES - 1).div(targets.shape[1], rounding_mode="floor")).clamp(min=0)
            for row, value in enumerate((hits.sum(1), count)):
                self.sizes[row].index_add_(0, bucket.flatten(), value.flatten())

    def average_precision(self) -> Tensor:
        """[C] float64: the sum over thresholds, from the highest, of precision times the recall gained."""
        negatives, positives = self.curve.view(2, -1, _BINS).flip(-1).double()
        found = positives.cumsum(-1)
        precision = found / (found + negatives.cumsum(-1)).clamp(min=1)
        return (precision * positives).sum(-1) / positives.sum(-1).clamp(min=1)

    def results(self) -> dict:
        """The metrics; per class None where the split has no positive of it."""
        present = self.positives > 0
        recall, precision = _ratio(self.hits, self.positives), _ratio(self.hits, self.predicted)
        wrong = self.positives + self.predicted - 2 * self.hits
        accuracy = 1 - wrong.double() / max(self.total, 1)
        f1 = _ratio(2 * self.hits, self.positives + self.predicted)
        found = _summary(accuracy, recall, precision, f1, present, self.positives)
        ap = self.average_precision()
        found |= {"accuracy": accuracy.mean().item(), "map": _macro(ap, present)}
        found["per_class"]["average_precision"] = _listed(ap, present)
        if self.sizes is not None:
            hits, positives = self.sizes
            found["by_size"] = {
                "edges": [edge / SIZES for edge in range(SIZES + 1)],
                "recall": _listed(_ratio(hits, positives), positives > 0),
                "positives": positives.tolist(),
            }
        return found


class MultiClassCounts:
    """The confusion matrix, for labels of which each patch has one; VOID patches count nowhere.

    Args:
        classes: C.
        device: of logits and targets.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu"):
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Takes a batch in: logits [B, N, C], targets [B, N] int64, -1 = void."""
        classes = len(self.matrix)
        counted = targets >= 0
        place = targets[counted] * classes + logits.argmax(-1)[counted]
        self.matrix += torch.bincount(place, minlength=classes * classes).view(classes, classes)

    def results(self) -> dict:
        """The metrics, `accuracy` being the share of patches that are right."""
        hits, positives, predicted = self.matrix.diag(), self.matrix.sum(1), self.matrix.sum(0)
        total = self.matrix.sum().clamp(min=1)
        recall, precision = _ratio(hits, positives), _ratio(hits, predicted)
        accuracy = (total - positives - predicted + 2 * hits).double() / total
        f1 = _ratio(2 * hits, positives + predicted)
        found = _summary(accuracy, recall, precision, f1, positives > 0, positives)
        return found | {"accuracy": (hits.sum().double() / total).item()}


def _summary(
    accuracy: Tensor, recall: Tensor, precision: Tensor, f1: Tensor, present: Tensor, positives: Tensor
) -> dict:
    parts = {"recall": recall, "precision": precision, "f1": f1, "accuracy": accuracy}
    macro = {f"macro_{name}": _macro(values, present) for name, values in parts.items()}
    per_class = {name: _listed(values, present) for name, values in parts.items()}
    return macro | {"per_class": per_class | {"positives": positives.tolist()}}
