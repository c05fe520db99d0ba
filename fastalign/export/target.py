"""What a target is: a library's format, written from a run and read back by the library's own classes."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from fastalign.backbones.spec import ViTSpec
from fastalign.export.source import Run

Tokens = Callable[[Tensor], Tensor]
"""From images to our features: every token, prefix first."""


class Target:
    """A library's format. The soft-cap to write is the backbone's, which is None where it is dropped."""

    package = "timm"
    """that must be installed"""

    def misfits(self, spec: ViTSpec) -> list[str]:
        """What of a backbone it cannot express; empty = it fits."""
        return []

    def can_cap(self, spec: ViTSpec) -> bool:
        """Whether the soft-cap can be applied there."""
        raise NotImplementedError

    def write(self, run: Run, folder: Path) -> None:
        """Write the files."""
        raise NotImplementedError

    def read(self, folder: Path) -> Tokens:
        """Load the files as a user would."""
        raise NotImplementedError

    def notes(self, run: Run) -> list[str]:
        """What else its user must know, a sentence each."""
        return []

    def usage(self, run: Run) -> str:
        """Lines of Python for the model card."""
        raise NotImplementedError
