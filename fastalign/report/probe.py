"""The results of `python -m fastalign.probe` (`probe.json`), compared before and after alignment."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from fastalign.evaluation.results import percent
from fastalign.utils.errors import UserError

BEFORE, ALIGNED = "before", "aligned"
METRICS = {"macro_recall": "Macro recall", "map": "mAP", "macro_f1": "Macro F1", "accuracy": "Accuracy"}
Setting = tuple[str, str, str]
"""Labels, head, skipped blocks: what two models must share to be compared."""


@dataclass(frozen=True)
class Probe:
    """`probe.json`."""

    facts: dict
    results: list[tuple[str, Setting, dict]]
    """model, setting and test split of each head and seed"""
    summary: list[tuple[str, Setting, dict]]
    """the same over seeds: metric -> "mean", "std" """

    def settings(self) -> list[Setting]:
        """Every setting: those with both `before` and `aligned` first, then patch labels, then transformer heads."""
        models: dict[Setting, set[str]] = {}
        for model, setting, _ in self.summary:
            models.setdefault(setting, set()).add(model)

        def rank(setting: Setting) -> tuple[bool, bool, bool]:
            both = {BEFORE, ALIGNED} <= models[setting]
            return (not both, setting[0].startswith("global"), setting[1] != "transformer")

        return sorted(models, key=rank)

    def models(self, setting: Setting) -> list[str]:
        """At most two models to compare in a setting: before and aligned come first."""
        found = dict.fromkeys(model for model, other, _ in self.results if other == setting)
        return sorted(found, key=lambda name: {BEFORE: 0, ALIGNED: 1}.get(name, 2))[:2]

    def score(self, model: str, setting: Setting, metric: str) -> dict | None:
        """Mean and spread over seeds on the test split; None if it was not measured."""
        found = [test.get(metric) for *key, test in self.summary if key == [model, setting]]
        return found[0] if found else None

    def average(self, model: str, setting: Setting, part: str, key: str) -> list[float | None]:
        """A list of `per_class` or `by_size`, mean over seeds; empty if it was not measured."""
        tests = [test for *key, test in self.results if key == [model, setting]]
        lists = [values for test in tests if (values := test.get(part, {}).get(key))]
        columns = [[value for value in column if value is not None] for column in zip(*lists, strict=True)]
        return [fmean(column) if column else None for column in columns]

    def by_size(self, setting: Setting) -> tuple[list[float], dict[str, list[float | None]]]:
        """The upper edges of the bins, and each model's recall by size, if it was measured."""
        recall = {model: self.average(model, setting, "by_size", "recall") for model in self.models(setting)}
        recall = {model: values for model, values in recall.items() if values}
        return self.average(next(iter(recall), ""), setting, "by_size", "edges")[1:], recall


def read_probe(path: Path) -> Probe:
    """Read `probe.json`.

    Raises:
        UserError: it is missing, or not in the format of `python -m fastalign.probe`.
    """

    def rows(key: str) -> list[tuple[str, Setting, dict]]:
        return [
            (row["model"], (row["labels"], row["head"], str(row.get("skip_blocks", 0))), row["test"])
            for row in facts[key]
        ]

    if not path.is_file():
        raise UserError(
            f"{path}: no such file; write it with python -m fastalign.probe --backbone RUN --data DATA"
        )
    try:
        facts = json.loads(path.read_bytes())
        facts["data"]["classes"], facts["summary"][0]["seeds"]
        return Probe(facts, rows("results"), rows("summary"))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path} has no results of python -m fastalign.probe ({type(error).__name__}: {error}): run it again, "
            "or remove the file"
        ) from None


def score_text(score: dict | None) -> str:
    """In percent, with the standard deviation if there are several seeds: 71.3 ± 0.4"""
    return "–" if score is None or score["mean"] is None else percent(score)


def setting_text(setting: Setting) -> str:
    """A setting in words."""
    labels, head, skipped = setting
    return f"{labels} labels, {head} head" + (f", {skipped} blocks skipped" if skipped != "0" else "")
