"""The model card of an export: its README.md."""

from pathlib import Path
from typing import Any


def model_card(facts: dict[str, Any], library: str, usage: str, how_capped: str | None) -> str:
    """README.md of an export.

    Args:
        facts: of fastalign.json.
        library: that loads it.
        usage: Python that computes the tokens of images.
        how_capped: a sentence about how the library applies the soft-cap.
    """
    source, read, data, decoder = facts["source"], facts["read"], facts["data"], facts["decoder"]
    grid = read["patch_grid"]
    rows = {
        "backbone": _link(f"`{source['name']}`", source["page"]),
        "started from": _weights(source["weights"]),
        "licence": _licence(source),
        "tokens": f"of the last layer{', after the final norm' if read['normed'] else ''}: {read['prefix_tokens']} "
        f"prefix tokens, then {grid[0]} x {grid[1]} patches, row by row, of width {read['width']}",
        "images": ", ".join(f"{name} {value}" for name, value in facts["images"].items()),
        "training": _training(facts),
        "data": f"train `{data['train']}`, validation `{data['val']}`" if data else "not recorded",
        "MaskEmbed decoder": "`fastalign.export.load_decoder`" if decoder else "none",
    }
    lines = [
        *_front_matter(source, library),
        f"# {source['name']}, locality-aligned",
        "",
        *([_softcap(facts["softcap"], how_capped), ""] if facts["softcap"]["value"] is not None else []),
        "A vision transformer after locality alignment, which makes each patch token describe what its patch shows "
        f"([MaskEmbed](https://arxiv.org/abs/2410.11087)), by fastalign {facts['fastalign']}; files for {library}.",
        "",
        "```python",
        usage,
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "| number | value | meaning |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in _numbers(facts)),
        "",
        "`fastalign.json` has all of this, the recipe, and mean and standard deviation by channel.",
        *(["", *(f"- {note}" for note in facts["notes"])] if facts["notes"] else []),
    ]
    return "\n".join(lines) + "\n"


def change_in_words(effect: dict[str, dict[str, float]]) -> str:
    """How much the features change without the soft-cap."""
    return ", ".join(
        f"{100 * change['relative_change']:.2g}% on {name} (lowest cosine of a token {change['lowest_cosine']:.4f})"
        for name, change in effect.items()
    )


def _front_matter(source: dict[str, Any], library: str) -> list[str]:
    """YAML that model hubs read."""
    licence = [f"license: {source['licence']}"]
    if source["licence"] is None:
        licence = ["license: other", "license_name: see-source"]
        licence += [f"license_link: {source['page']}"] if source["page"] else []
    _, _, base = (source["page"] or "").partition("huggingface.co/")
    known = [f"base_model: {base}"] if base and source["weights"] == "pretrained" else []
    shared = ["pipeline_tag: image-feature-extraction", "tags: [locality-alignment, fastalign]"]
    return ["---", *licence, *known, f"library_name: {library}", *shared, "---"]


def _link(text: str, page: str | None) -> str:
    return f"[{text}]({page})" if page else text


def _weights(weights: str | None) -> str:
    words = {None: "not recorded", "pretrained": "its published weights", "random": "random weights"}
    return words.get(weights) or f"`{Path(weights).name}`"


def _licence(source: dict[str, Any]) -> str:
    if source["licence"] is not None:
        return f"{source['licence']}, as timm records it; {_link('see source', source['page'])}"
    return f"unknown, that of the weights it started from: {_link('see source', source['page'])}"


def _training(facts: dict[str, Any]) -> str:
    updates = None if facts["step"] is None else f"{facts['step']} updates"
    return ", ".join(filter(None, (facts["objective"], updates))) or "not recorded"


def _softcap(softcap: dict[str, Any], how_capped: str | None) -> str:
    value, change = f"{softcap['value']:g}", change_in_words(softcap["effect"])
    if softcap["applied"]:
        return f"**Soft-cap: its attention logits are capped at {value}. {how_capped}**"
    return f"**Soft-cap dropped: trained with attention logits capped at {value}; now features change {change}.**"


def _numbers(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and meaning of what was measured."""
    parity, features, probe = facts["parity"], facts["features"], facts["probe"]
    rows = [
        (
            "error of the export",
            f"{parity['largest_relative_error']:.1e}",
            f"difference from fastalign's own model, relative, in the Euclidean norm: the largest of {parity['of']}",
        )
    ]
    if facts["softcap"]["value"] is not None:
        meaning = "how much the features change without the cap, relative, in the Euclidean norm"
        rows.append(("effect of the soft-cap", change_in_words(facts["softcap"]["effect"]), meaning))
    if facts["val_loss"] is not None:
        meaning = "error in reconstructing the teacher's masked views; comparable only within the same recipe"
        rows.append(("validation loss", f"{facts['val_loss']:.4f}", meaning))
    for row in (probe or {}).get("summary", []):
        name = f"patch probe: {row['model']}, {row['head']} head on {row['labels']} labels"
        recall = row["test"].get("macro_recall", {}).get("mean")
        if recall is not None:
            rows.append((name, f"{100 * recall:.1f}%", "macro recall over classes, on the test split"))
    measured = (
        features["of"] if features["mean"] is None else f"{features['images']} images, {features['of']}"
    )
    rows.append(("feature mean and std", measured, "of each channel of the patch tokens, in fastalign.json"))
    return rows
