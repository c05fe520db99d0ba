"""The aligned backbone of a run as two files that fit each other: weights with timm's keys, and facts."""

import json
from pathlib import Path

from fastalign.backbones.weight_files import embedded_facts
from fastalign.utils.files import write_atomically, write_tensors


def publish_backbone(folder: Path, state: dict) -> None:
    """The aligned backbone of a checkpoint with timm's keys, without the student's head, and its facts.

    `backbone.safetensors` holds the text of `backbone.json` too: where a kill left one without the other, the next
    start knows. Nothing is written that is there already, nor for a checkpoint that was not the best.
    """
    text = state.get("backbone")
    if text is None:
        return
    place, beside = folder / "backbone.safetensors", folder / "backbone.json"
    if embedded_facts(place) != text:
        source = state["average"] or state["student"]
        weights = {
            name.removeprefix("encoder."): value.contiguous().float()
            for name, value in source.items()
            if name.startswith("encoder.") and not name.startswith("encoder.head.")
        }
        write_tensors(place, weights, softcap=str(json.loads(text)["softcap"]), facts=text)
    if not beside.exists() or beside.read_text() != text:
        write_atomically(beside, lambda file: file.write(text.encode()))
