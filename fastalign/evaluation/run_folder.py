"""Checkpoints and metrics.jsonl of one fit, which continues from the newest checkpoint."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastalign.evaluation.fit import Fit
from fastalign.evaluation.image_options import ImageOptions
from fastalign.evaluation.results import difference
from fastalign.training.checkpoint_files import Checkpoints, snapshot
from fastalign.training.distributed import on_first_rank
from fastalign.training.metrics import MetricLog, Speed
from fastalign.utils.errors import UserError

_SAY_SECONDS = 30.0


class RunFolder:
    """Keeps a fit resumable.

    Args:
        folder: of this fit alone.
        fit: not started; it is set to the newest checkpoint.
        progress: plain values that the owner changes; saved, and restored in place.
        identity: plain values; a checkpoint with others is refused.
        options: batch size, and updates between checkpoints within an epoch.
        say: gets a line now and then.
        name: of the fit, begins each line.

    Raises:
        UserError: the folder has a checkpoint of something else.
    """

    def __init__(
        self,
        folder: Path,
        fit: Fit,
        progress: dict[str, Any],
        identity: dict,
        options: ImageOptions,
        say: Callable[[str], None],
        name: str,
    ):
        self.fit, self.progress, self.identity = fit, progress, identity
        self.save_every, self.say, self.name = options.save_every, say, name
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=1)
        world = fit.world
        if world.main:
            folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints.clean()
        world.barrier()
        self._resume()
        self.log = MetricLog(folder, step=fit.step or -1, main=world.main)
        self.speed = Speed(images=options.batch_size, ranks=world.size, flops=0, device=world.device)
        self.said = time.monotonic()

    def after_update(self, epoch: int, measured: dict) -> None:
        """Logs an update, and saves within an epoch where that is due."""
        fit = self.fit
        at_end = fit.step % fit.epoch_steps == 0
        saving = bool(self.save_every) and fit.step % self.save_every == 0 and not at_end
        self.speed.tick(measured.pop("waited"))
        self.log.add(step=fit.step, epoch=epoch, **measured)
        if saving or at_end or time.monotonic() - self.said > _SAY_SECONDS:
            self.said = time.monotonic()
            for line in self.log.flush(self.speed)[-1:]:
                self.say(
                    f"{self.name} step {line['step']}/{fit.total}  loss {line['loss']:.4f}  "
                    f"{line['images_per_second']:.0f} images/s  data wait {100 * line['data_wait']:.1f}%"
                )
        if saving:
            self.save()

    def save(self) -> None:
        """Writes a checkpoint in the background."""
        fit = self.fit
        on_first_rank(fit.world, self.checkpoints.wait)
        if fit.world.main:
            frozen = {name for name, value in fit.module.named_parameters() if not value.requires_grad}
            weights = {name: value for name, value in fit.module.state_dict().items() if name not in frozen}
            state = {"weights": weights, "optimizer": fit.optimizer.state_dict(), "step": fit.step}
            state |= {"loss": fit.loss_sum.item(), "identity": self.identity, **self.progress}
            self.checkpoints.save(snapshot(state), fit.step)
        self.speed.start()

    def close(self) -> None:
        """Waits for the last checkpoint."""
        self.log.close()
        on_first_rank(self.fit.world, self.checkpoints.wait)

    def _resume(self) -> None:
        fit, folder = self.fit, self.checkpoints.folder
        step, state, notes = self.checkpoints.resume(fit.world)
        if step is None:
            return
        for note in notes:
            self.say(note)
        if not isinstance(state, dict) or not {"weights", "identity", "step"} <= state.keys():
            raise UserError(f"{folder} has no checkpoint of this command: choose another --output")
        if state["identity"] != self.identity:
            raise UserError(
                f"{folder} is of another setting ({difference(state['identity'], self.identity)}): set it back, "
                "remove the folder, or choose another --output"
            )
        fit.module.load_state_dict(state["weights"], strict=False)  # frozen weights are the backbone's own
        fit.optimizer.load_state_dict(state["optimizer"])
        fit.step = state["step"]
        fit.loss_sum.fill_(state["loss"])
        self.progress.update({name: state[name] for name in self.progress})
        self.say(f"{self.name}: resuming at step {fit.step} of {fit.total}")
