"""Accuracy, by image and by class, over all ranks; and which epoch's is reported."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastalign.training.distributed import World
from fastalign.training.metrics import mean_and_spread

FIGURES = ("top1", "top5", "mean_per_class", "loss")


class Tally:
    """Sums over the batches of a split.

    Args:
        classes: C.
        device: where logits come from.
    """

    def __init__(self, classes: int, device: torch.device):
        self.classes = classes
        self.total = torch.zeros(2 + 2 * classes, dtype=torch.float64, device=device)  # one sum over ranks

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """logits [B, C] of any float dtype, labels [B] int64. Of equal logits the first class counts as the guess."""
        logits = logits.float()
        right = (logits.argmax(1) == labels).double()
        top5 = (logits.topk(min(5, self.classes)).indices == labels[:, None]).any(1)
        self.total[0] += functional.cross_entropy(logits, labels, reduction="sum").double()
        self.total[1] += top5.sum()
        self.total[2 : 2 + self.classes].index_add_(0, labels, right)
        self.total[2 + self.classes :].index_add_(0, labels, torch.ones_like(right))

    def figures(self, world: World) -> dict[str, float | None]:
        """`FIGURES` over all ranks' batches: shares in 0..1, and the mean cross-entropy in nats.

        `mean_per_class` is the mean of the accuracies of the classes that have images; `top5` is None with five
        classes or less, where it would be 1 for any model.
        """
        total = world.sum(self.total).cpu()
        hits, counts = total[2:].view(2, self.classes)
        seen, images = counts > 0, counts.sum().item()
        return {
            "top1": hits.sum().item() / images,
            "top5": total[1].item() / images if self.classes > 5 else None,
            "mean_per_class": (hits[seen] / counts[seen]).mean().item(),
            "loss": total[0].item() / images,
        }


def select(
    best: dict | None, epoch: int, epochs: int, evaluate: Callable[[str], dict], *, has_test: bool
) -> tuple[dict | None, dict]:
    """After an epoch: what is reported if training ends here.

    With a test split, the test figures of the epoch that is best on validation (the first of equals). Without one,
    the validation figures of the last epoch: a best epoch chosen on the split that is reported would flatter.

    Args:
        best: what this function returned after the epoch before.
        epoch: from 0.
        epochs: how many there are.
        evaluate: figures of a split, of the present weights.
        has_test: whether there is a test split.

    Returns:
        ``{"epoch", "val", "test"}`` or None, and the present validation figures.
    """
    val = evaluate("val")
    if not has_test:
        return ({"epoch": epoch + 1, "val": val} if epoch + 1 == epochs else None), val
    if best is None or val["top1"] > best["val"]["top1"]:
        return {"epoch": epoch + 1, "val": val, "test": evaluate("test")}, val
    return best, val


def summarise(results: list[dict], split: str) -> tuple[dict, dict]:
    """Mean and standard deviation (n - 1; None for one seed) of the figures over seeds."""
    mean, std = {}, {}
    for name in FIGURES:
        values = [result[split][name] for result in results]
        if None in values:
            mean[name] = std[name] = None
        else:
            mean[name], std[name] = mean_and_spread(values).values()
    return mean, std
