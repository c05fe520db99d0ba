"""Save and resume a run, and compare its settings with those of its checkpoint."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastalign import __version__
from fastalign.backbones.weight_files import backbone_facts, facts_text
from fastalign.config import Config, kinds, resolve, to_yaml
from fastalign.data.sources import differ
from fastalign.training.build import teacher_of
from fastalign.training.command import WAITING
from fastalign.training.distributed import on_first_rank
from fastalign.training.metrics import plain_number
from fastalign.training.run import Run
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_atomically
from fastalign.utils.sections import Kind, get_key, select


class Change(NamedTuple):
    """A key whose value, or the data at the path that is its value, has changed."""

    key: str
    before: Any
    now: Any
    contents: str | None = None  # of a path: what has changed there

    def __str__(self) -> str:
        before, now = (json.dumps(value, ensure_ascii=False) for value in (self.before, self.now))
        if before == now:
            return f"{self.key} {now} has {self.contents} than before"
        return f"{self.key} was {before}, is {now}{f' with {self.contents}' if self.contents else ''}"


def checkpoint_state(run: Run) -> dict[str, Any]:
    """The content of a checkpoint: the run's own tensors, not copies, and plain values."""
    return {
        "student": run.objective.student.state_dict(),
        "target_scale": run.objective.target_scale.item(),
        "optimizer": run.optimizer.state_dict(),
        "average": run.average.state if run.average else None,
        **run.state.state_dict(),
        "contents": run.contents,
        "config": run.config.model_dump(mode="json"),
    }


def new_best(run: Run) -> float | None:
    """This step's score if it is the best so far: of the probe if `probe.best`, else the validation loss."""
    best, score = run.state.best, run.val_loss
    if not run.config.probe.best:
        better = score is not None and math.isfinite(score) and (best is None or score < best)
    elif (probed := run.state.current_probe) is None:
        return None
    else:
        score = -math.inf if math.isnan(probed["map"]) else probed["map"]
        better = best is None or score > best
    return score if better else None


def save(run: Run) -> None:
    """Write a checkpoint, and the backbone if it is the best so far (or the newest, if nothing selects).

    A copy is written in the background: `wait_for_checkpoint` waits for it. Every rank must call this. SharedError:
    the previous checkpoint could not be written.
    """
    wait_for_checkpoint(run)  # one copy in memory at a time
    score = new_best(run)
    if score is not None:
        run.state.best = score
    run.beat("saving")
    if not run.world.main:
        return
    best, selects = score is not None, run.val is not None or run.config.probe.best
    publish = (best or not selects) and not run.config.student.freeze
    facts = describe_backbone(run) if publish else None
    run.checkpoints.save({**checkpoint_state(run), "is_best": best, "backbone": facts}, run.state.step)


def wait_for_checkpoint(run: Run) -> None:
    """Return when the newest checkpoint and backbone are on the disk, else SharedError; every rank must call this."""
    run.beat("writing a checkpoint" if run.world.main else WAITING)
    with run.hang_timer.paused():  # a large checkpoint on a slow disk
        on_first_rank(run.world, run.checkpoints.wait)


def save_settings(run: Run) -> None:
    """Write `config.yaml` and all changes by `resume=force`; on rank 0, before the first update of a start."""
    config = run.config.model_copy(update={"resume": "auto"})  # applies to this start, not to the run
    lines = "".join(json.dumps(change) + "\n" for change in run.state.changes)
    for name, text in (("config.yaml", to_yaml(config)), ("changes.jsonl", lines)):
        path = run.folder / name
        if text:
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
        else:
            path.unlink(missing_ok=True)


def resume(run: Run) -> tuple[list[Change], list[str]]:
    """Continue from the newest undamaged checkpoint of the run folder, if there is one.

    Returns the settings that `resume=force` changes at this start, and lines for the user.
    """
    step, saved, notes = run.checkpoints.resume(run.world)
    if step is None:
        return [], notes
    path, state = run.checkpoints.path(step), run.state
    if not isinstance(saved, dict) or not checkpoint_state(run).keys() <= saved.keys():
        raise UserError(f"{path} is not a checkpoint of this version: remove it, or choose another output")
    state.load_state_dict(saved)

    before, now = saved["contents"], run.contents
    differs = {key: differ(before[key], now[key]) for key in now.keys() & before.keys()}
    changes, moved = changed_settings(saved, path, run.config, differs, finished=run.finished)
    notes += moved
    _load_tensors(run, saved, path, changes)
    state.changes += [{"step": step, **change._asdict()} for change in changes]
    if any(change.key == "data.train" for change in changes):
        state.bad = set()  # sample ids of the previous data set
    if changes:
        state.best = state.first_val_loss = None  # scores under different settings are not comparable
        notes += [f"resume=force: from step {step} on {change}" for change in changes]
        notes.append("the target scale is measured again; the best checkpoint is selected again")
    on_first_rank(run.world, lambda: run.checkpoints.complete(saved, step))
    return changes, notes


def _load_tensors(run: Run, saved: dict, path: Path, changes: list[Change]) -> None:
    try:
        run.objective.student.load_state_dict(saved["student"])
        run.optimizer.load_state_dict(saved["optimizer"])
        if run.average:
            run.average.load(saved["average"] or saved["student"])  # or start a new average
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        reason = "; ".join(map(str, changes)) or str(error).splitlines()[-1].strip()
        raise UserError(
            f"{path} is a checkpoint of another model ({reason}): choose another output"
        ) from error
    for group in run.optimizer.param_groups:  # the configuration's, not the checkpoint's
        group |= {"betas": run.config.optim.betas, "weight_decay": run.config.optim.weight_decay}
    run.objective.target_scale.fill_(saved["target_scale"])


def changed_settings(
    saved: dict, path: Path, config: Config, differs: Mapping[str, bool], *, finished: bool
) -> tuple[list[Change], list[str]]:
    """The changes since the checkpoint `saved` among the keys that decide the result, and notes about moved data.

    `differs`: whether contents have changed, by the key of their path. UserError: there are changes, and the run is
    `finished` or `resume` is not force.
    """
    before = resolve(saved["config"], [], path).model_dump(mode="json")
    after = config.model_dump(mode="json")
    changes, notes = [], []
    for key, kind in kinds().items():
        old, new = get_key(before, key), get_key(after, key)
        if kind is Kind.FREE or (kind is Kind.GROWS and (new is None or new >= saved["step"])):
            continue
        if differs.get(key, old != new):
            changes.append(Change(key, old, new, "other contents" if key in differs else None))
        elif old != new:
            notes.append(f"{Change(key, old, new)}: the contents are the same")
    if changes and (finished or config.resume != "force"):
        remedy = "set it back, choose another output, or use and record the new ones with resume=force"
        if finished:
            remedy = "it is finished, so nothing would be trained with them: choose another output"
        at = f"{config.output} is at step {saved['step']} with other settings"
        raise UserError(f"{at}: {'; '.join(map(str, changes))}; {remedy}")
    return changes, notes


def describe_backbone(run: Run) -> str:
    """The text of `backbone.json` for the student's backbone."""
    state = run.state
    teacher, weights, _ = teacher_of(run.config)
    facts = {
        "objective": run.config.objective,
        "teacher": {"name": teacher, "weights": weights},
        "step": state.step,
        "val_loss": plain_number(run.val_loss),
        "fastalign": __version__,
        "settings": select(run.config, Kind.RESULT),
        "changes": state.changes,
    }
    if state.current_probe:
        facts["probe"] = {name: plain_number(value) for name, value in state.current_probe.items()}
    return facts_text(backbone_facts(run.objective.student.encoder, **facts))
