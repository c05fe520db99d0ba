"""The time of each part of a training step: between device events, on a CPU in processor time."""

import itertools
import statistics
import time
from collections.abc import Iterator

import torch
from torch.nn import functional

import fastalign as fa
from fastalign import ops


def stages(contestant) -> Iterator[str]:
    """One step of a `benchmarks.step.Contestant`; yields the name of each part when it is done.

    Student and decoder are one part where they are one graph.
    """
    model, images = contestant.model, contestant.images
    ours, whole = isinstance(model, fa.MaskEmbed), contestant.compiled is True
    with contestant.autocast():
        if ours:
            visible, packing = model.draw(images, contestant.ids, contestant.epoch)
            masks = (visible, packing)
        else:
            masks = (model.draw(len(images)).to(images.device, non_blocking=True),)
        yield "masks"
        targets = model.targets(images, *masks)
        yield "teacher"
        if whole:
            predictions = model.student(images, *masks)
            yield "student"
        else:
            tokens = model.student.encoder(images) if ours else model.student.encode(images)
            yield "student's encoder"
            predictions = (model.student.decoder if ours else model.student.decode)(tokens, *masks)
            yield "decoder"
        if ours:
            options = {"loss": model.loss, "scale": model.target_scale, "packing": packing}
            loss = ops.reconstruction_loss(predictions, targets, visible, **options)
        else:
            loss = functional.mse_loss(predictions.float(), targets.float())
        yield "loss"
    del targets, predictions
    loss.backward()
    yield "backward"
    contestant.optimizer.step()
    contestant.optimizer.zero_grad()
    yield "optimiser"
    contestant.epoch += 1


def parts(contestant, steps: int = 10) -> dict[str, float]:
    """Median milliseconds of each part of a step, after one for warm-up."""
    cuda = contestant.device.type == "cuda"

    def mark():
        if not cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    taken: dict[str, list[float]] = {}
    for index in range(steps + 1):
        marks = [("", mark()), *((name, mark()) for name in stages(contestant))]
        if cuda:
            torch.cuda.synchronize()
        for (_, before), (name, after) in itertools.pairwise(marks):
            if index:
                milliseconds = before.elapsed_time(after) if cuda else 1e3 * (after - before)
                taken.setdefault(name, []).append(milliseconds)
    return {name: statistics.median(values) for name, values in taken.items()}
