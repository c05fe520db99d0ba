"""Reads `probe.json`, what `python -m fastalign.probe` writes, and takes from it what a page shows."""

from pathlib import Path
from statistics import fmean

from pydantic import BaseModel, ConfigDict, ValidationError

from fastalign.utils.errors import UserError

BEFORE, ALIGNED = "before", "aligned"
METRICS = {"macro_recall": "Macro recall", "map": "mAP", "macro_f1": "Macro F1", "accuracy": "Accuracy"}
"""Those a page shows, best first, with their names."""
Setting = tuple[str, str, str]
"""Labels, head, skipped blocks: what two models must share to be compared."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class PerClass(_Part):
    """By class; None where the split has none of it."""

    recall: list[float | None]
    average_precision: list[float | None] | None = None
    positives: list[int | None]


class BySize(_Part):
    """By the share of an image's patches that hold the class: n bins, n + 1 edges."""

    edges: list[float]
    recall: list[float | None]
    positives: list[int]


class TestSplit(_Part):
    """What a page needs of a test split."""

    per_class: PerClass | None = None
    by_size: BySize | None = None


class Result(_Part):
    """One head of one model with one seed."""

    model: str
    labels: str
    head: str
    skip_blocks: int | str = 0
    test: TestSplit

    @property
    def setting(self) -> Setting:
        """What another model must share."""
        return (self.labels, self.head, str(self.skip_blocks))


class Score(_Part):
    """Over seeds; None where it could not be had."""

    mean: float | None
    std: float | None = None


class Summary(_Part):
    """All seeds of a head of a model."""

    model: str
    labels: str
    head: str
    skip_blocks: int | str = 0
    seeds: int
    test: dict[str, Score]

    @property
    def setting(self) -> Setting:
        """What another model must share."""
        return (self.labels, self.head, str(self.skip_blocks))


class Data(_Part):
    """What was probed on."""

    path: str | None = None
    classes: list[str]
    images: dict[str, int] = {}


class Probe(_Part):
    """probe.json"""

    command: str | None = None
    data: Data
    versions: dict[str, str | None] = {}
    results: list[Result]
    summary: list[Summary]

    def settings(self) -> list[Setting]:
        """Every setting: first those that both `before` and `aligned` were probed in, of these the patches' first."""
        models: dict[Setting, set[str]] = {}
        for row in self.summary:
            models.setdefault(row.setting, set()).add(row.model)

        def last(setting: Setting) -> tuple[bool, bool, bool]:
            labels, head, _ = setting
            return (
                not {BEFORE, ALIGNED} <= models[setting],
                labels.startswith("global"),
                head != "transformer",
            )

        return sorted(models, key=last)

    def score(self, model: str, setting: Setting, metric: str) -> Score | None:
        """A metric of the test split over seeds; None where it was not measured."""
        rows = [row for row in self.summary if (row.model, row.setting) == (model, setting)]
        return rows[0].test.get(metric) if rows else None

    def models(self, setting: Setting) -> list[str]:
        """The models to be compared in a setting: before and aligned, else the first two there are."""
        found = list(dict.fromkeys(row.model for row in self.results if row.setting == setting))
        pair = [name for name in (BEFORE, ALIGNED) if name in found]
        return (pair + [name for name in found if name not in pair])[:2]

    def per_class(self, model: str, setting: Setting, key: str) -> list[float | None] | None:
        """A list of `PerClass`, mean over seeds."""
        parts = [row.test.per_class for row in self._rows(model, setting)]
        return _mean([getattr(part, key) for part in parts if part and getattr(part, key) is not None])

    def by_size(self, model: str, setting: Setting) -> tuple[list[float], list[float | None]] | None:
        """Edges and recall by size, mean over seeds."""
        parts = [row.test.by_size for row in self._rows(model, setting) if row.test.by_size]
        return (parts[0].edges, _mean([part.recall for part in parts])) if parts else None

    def _rows(self, model: str, setting: Setting) -> list[Result]:
        return [row for row in self.results if (row.model, row.setting) == (model, setting)]


def read_probe(path: Path) -> Probe:
    """Read `probe.json`.

    Raises:
        UserError: no such file, not JSON, or not in the format of `python -m fastalign.probe`.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file; write one with python -m fastalign.probe --backbone RUN --data DATA"
        )
    remedy = "write it anew with python -m fastalign.probe, or remove it"
    try:
        probe = Probe.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {place + ': ' if place else ''}{first['msg']}; {remedy}") from None
    if not probe.summary:
        raise UserError(f"{path}: summary is empty; {remedy}")
    classes = len(probe.data.classes)
    for row in probe.results:
        part, sizes = row.test.per_class, row.test.by_size
        lists = [part.recall, part.positives, part.average_precision] if part else []
        if any(values is not None and len(values) != classes for values in lists):
            raise UserError(f"{path}: per_class has not one number for each of {classes} classes; {remedy}")
        if sizes and not len(sizes.edges) == len(sizes.recall) + 1 == len(sizes.positives) + 1 >= 2:
            raise UserError(f"{path}: by_size needs one edge more than bins; {remedy}")
    return probe


def _mean(lists: list[list[float | None]]) -> list[float | None] | None:
    columns = [[value for value in column if value is not None] for column in zip(*lists, strict=True)]
    return [fmean(column) if column else None for column in columns] if lists else None
