"""The state of a run that is neither weights nor moments: small, plain, and part of every checkpoint."""

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class TrainState:
    """Counters and scores. `state_dict` and `load_state_dict` are its form in a checkpoint."""

    step: int = 0
    """updates done"""
    best: float | None = None
    """best score so far: of the probe (mAP) with `probe.best`, else the lowest validation loss"""
    val_loss: float | None = None
    """of the last validation"""
    probed: dict[str, float] | None = None
    """the last probe: step, macro_recall, map, loss"""
    last_eval_step: int = field(default=0, metadata={"key": "judged_at"})
    """the step up to which the evaluations at the ends of epochs are done"""
    skipped_in_a_row: int = 0
    """updates skipped one after the other because the loss or the gradient was not finite"""
    bad: set[int] = field(default_factory=set)
    """training samples that every rank knows to be bad, without the quarantined ones"""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """what `resume=force` ever changed: step, key, before, now"""

    def state_dict(self) -> dict[str, Any]:
        """Plain values, by the keys of a checkpoint."""
        state = {each.metadata.get("key", each.name): getattr(self, each.name) for each in fields(self)}
        return state | {"bad": sorted(self.bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the values from a checkpoint."""
        for each in fields(self):
            setattr(self, each.name, state[each.metadata.get("key", each.name)])
        self.bad = set(self.bad)

    @property
    def current_probe(self) -> dict[str, float] | None:
        """The probe of this very step, if there was one."""
        return self.probed if self.probed and self.probed["step"] == self.step else None


def itstime(step: int, every: int | None, last: int | None = None) -> bool:
    """Whether something that happens every so many steps (None = never), and at the `last`, happens at this one."""
    return step == last or (every is not None and step % every == 0)
