"""A tiny ViT, the results of a probe, and a parser of pages."""

from pathlib import Path
from xml.etree import ElementTree

from fastalign.report.__main__ import main

MODEL = {"name": "vit_tiny_patch16_224", "weights": "random"}
MODEL["kwargs"] = {"img_size": [32, 48], "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
GRID = (4, 6)


def split(recall):
    counts = [None if value is None else 10 for value in recall]
    per_class = {"recall": recall, "average_precision": recall, "positives": counts}
    sizes = {"edges": [0, 0.5, 1.0], "recall": [recall[0], None], "positives": [7, 0]}
    return {"macro_recall": recall[0], "per_class": per_class, "by_size": sizes}


def probe_facts() -> dict:
    """A probe of three classes, one of them absent, with two seeds."""
    recalls = {
        "before": ([0.2, 0.9, None], [0.4, 0.7, None]),
        "aligned": ([0.6, 0.5, None], [0.8, 0.7, None]),
    }
    key = {"labels": "union", "head": "linear", "skip_blocks": 0}
    results = [
        {"model": model, **key, "seed": seed, "epoch": 4, "val": {}, "test": split(recall)}
        for model, both in recalls.items()
        for seed, recall in enumerate(both)
    ]
    scores = {"before": (0.55, 0.1), "aligned": (0.65, None)}
    summary = [
        {"model": m, **key, "seeds": 2, "test": {"macro_recall": {"mean": mean, "std": std}}}
        for m, (mean, std) in scores.items()
    ]
    data = {"path": "scenes", "classes": ["a<b>&c", "dog", "sea"], "images": {"train": 3, "test": 2}}
    about = {"command": "probe it", "data": data, "versions": {"torch": "2"}}
    return {**about, "results": results, "summary": summary}


class Page:
    """A page, which is well-formed XML: its text, its tags, and the attributes of one kind of them."""

    def __init__(self, text: str):
        root = ElementTree.fromstring(text)
        self.text, self.tags = "".join(root.itertext()), [(tag.tag, tag.attrib) for tag in root.iter()]

    def all(self, kind: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == kind]


def render(folder: Path, *arguments: str) -> Page:
    assert main([str(folder), *arguments]) == 0
    return Page((folder / "report.html").read_text())


def refused(capsys, *arguments) -> str:
    """The one line with which the command refuses."""
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message
