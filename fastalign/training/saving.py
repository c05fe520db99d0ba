"""Saving a run: its checkpoint, and its backbone where that is the best so far."""

import json
import math
import time
from typing import NoReturn

from fastalign import __version__
from fastalign.config import to_yaml
from fastalign.training.build import teacher_of
from fastalign.training.checkpoint import snapshot
from fastalign.training.distributed import on_first_rank
from fastalign.training.hang import WAITING
from fastalign.training.preemption import StopReason, preempted
from fastalign.training.publish import publish_backbone
from fastalign.training.run import Run
from fastalign.utils.changes import Kind
from fastalign.utils.files import wrap_io_errors, write_atomically
from fastalign.utils.sections import only

CHANGES = "changes.jsonl"
"""in the run folder: what `resume=force` changed, a line each: step, key, before, now"""


def improves(run: Run, *, evaluated: bool = False) -> bool:
    """Whether this step has the best probe so far where that chooses, else the lowest validation loss."""
    none = run.best is None or math.isnan(run.best)
    if not run.config.probe.best:
        return evaluated and math.isfinite(run.val_loss) and (none or run.val_loss < run.best)
    return probed_now(run) is not None and (none or _score(run) > run.best)


def probed_now(run: Run) -> dict[str, float] | None:
    """The probe of this very step, if there was one."""
    return run.probed if run.probed and run.probed["step"] == run.step else None


def _score(run: Run) -> float:
    return -math.inf if math.isnan(run.probed["map"]) else run.probed["map"]


def save(run: Run, *, evaluated: bool = False) -> None:
    """Write a checkpoint, and the backbone where it is the best so far (the newest, where nothing chooses).

    It is written in the background from a copy: `finish` waits for it. Every rank must call this.

    Args:
        run: the run.
        evaluated: `val_loss` is that of this step.

    Raises:
        SharedError: the checkpoint before this one could not be written; on every rank.
    """
    finish(run)  # one copy in memory at a time
    run.saved_at = time.monotonic()
    best, by_probe = improves(run, evaluated=evaluated), run.config.probe.best
    if best:
        run.best = _score(run) if by_probe else run.val_loss
    run.beat("saving")
    if not (run.world.main or run.sharded):
        return
    published = (best or (run.val is None and not by_probe)) and not run.config.student.freeze
    facts = backbone_facts(run, evaluated=evaluated) if published else None
    state = snapshot({**run.state(), "is_best": best, "backbone": facts}, keep=run.world.main)
    if run.world.main:
        run.checkpoints.save(
            state,
            run.step,
            best=best,
            copied=True,
            publish=lambda written: publish_backbone(run.folder, written),
        )


def save_settings(run: Run) -> None:
    """Write `config.yaml`, and what `resume=force` ever changed; of rank 0, before the first update of a start.

    Raises:
        UserError: they cannot be written.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    config = run.config.model_copy(update={"resume": "auto"})  # which is of this start, not of the run
    lines = "".join(json.dumps(change) + "\n" for change in run.changes)
    for name, text in (("config.yaml", to_yaml(config)), (CHANGES, lines)):
        path = run.folder / name
        with wrap_io_errors(path):
            if text:
                write_atomically(path, lambda file, text=text: file.write(text.encode()))
            else:
                path.unlink(missing_ok=True)


def finish(run: Run) -> None:
    """Return when the newest checkpoint and its backbone are on the disk. Every rank must call this.

    Raises:
        SharedError: they could not be written; on every rank.
    """
    run.beat("writing a checkpoint" if run.world.main else WAITING)
    with run.unwatched():  # a large checkpoint on a slow disk
        on_first_rank(run.world, run.checkpoints.wait)


def leave(run: Run, reason: StopReason) -> NoReturn:
    """Save, and end the run as it was asked to; every rank calls this at the same step.

    Raises:
        Preempted: it is saved.
        SharedError: it could not be, or an earlier checkpoint could not.
    """
    save(run)
    finish(run)
    raise preempted(run.folder, reason, run.step, main=run.world.main)


def backbone_facts(run: Run, *, evaluated: bool) -> str:
    """What one must know to use the aligned backbone, as JSON: the text of `backbone.json`."""
    kwargs = {**run.backbone.recipe["kwargs"], "num_classes": 0}
    if run.backbone.spec.pool == "map":
        kwargs["global_pool"] = ""  # the student has no pooling to save
    teacher, weights, _ = teacher_of(run.config)
    facts = {
        "name": run.backbone.recipe["name"],
        "kwargs": kwargs,
        "softcap": run.config.student.softcap,
        "norm_eps": getattr(run.objective.student.encoder.norm, "eps", None),
        **run.backbone.data,
        "features": "the tokens after the final norm; prefix tokens first",
        "objective": run.config.objective,
        "teacher": {"name": teacher, "weights": weights},
        "step": run.step,
        "val_loss": _number(run.val_loss) if evaluated else None,
        "fastalign": __version__,
        "settings": only(run.config, Kind.RESULT),
        "changes": run.changes,
    }
    if probed_now(run):
        facts["probe"] = {name: _number(value) for name, value in probed_now(run).items()}
    return json.dumps(facts, indent=2, allow_nan=False) + "\n"


def _number(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None
