"""The model card of an export."""

from typing import Any

LIBRARIES = {"timm": "timm", "prismatic": "timm", "open-clip": "open_clip"}


def model_card(facts: dict[str, Any], usage: str) -> str:
    """README.md of an export.

    Args:
        facts: the content of fastalign.json.
        usage: lines of Python that load the export.
    """
    source, read, images, data = facts["source"], facts["read"], facts["images"], facts["data"]
    licence, parity = source["licence"], facts["parity"]
    loss = "not measured" if facts["val_loss"] is None else f"{facts['val_loss']:.4f}"
    rows = {
        "backbone": f"`{source['name']}`, weights: {source['weights'] or 'unknown'}",
        "licence of its weights": f"{licence}, as timm records it; see the source's own page"
        if licence
        else "unknown: that of the weights it started from",
        "soft-cap": _softcap(facts["softcap"]),
        "tokens to read": f"the last layer's{', normed' if read['normed'] else ''}: {read['prefix_tokens']} prefix "
        f"tokens, then {read['patch_grid'][0]} x {read['patch_grid'][1]} patches of width {read['width']}",
        "images": f"{images['size'][0]} x {images['size'][1]}, mean {_list(images['mean'])}, std "
        f"{_list(images['std'])}, {images['interpolation']}, crop {images['crop_pct']}",
        "data": f"train `{data['train']}`, validation `{data['val']}`" if data else "unknown",
        "trained": f"{facts['objective']}, {facts['step']} updates, validation loss {loss}",
        "patch probe": facts["probe"] if facts["probe"] is not None else "not measured",
        "feature mean and std": _features(facts["features"]),
        "difference from fastalign's own model": f"{parity['largest_relative_error']:.1e} ({parity['of']})",
        "MaskEmbed decoder": "`fastalign.export.load_decoder(FOLDER)`" if facts["decoder"] else "none",
    }
    lines = [
        "---",
        f"license: {licence or 'unknown'}",
        f"library_name: {LIBRARIES.get(facts['target'], 'transformers')}",
        "pipeline_tag: image-feature-extraction",
        "tags: [locality-alignment, fastalign]",
        "---",
        f"# {source['name']}, locality-aligned",
        "",
        "A vision transformer after [MaskEmbed](https://arxiv.org/abs/2410.11087) with fastalign "
        f"{facts['fastalign']}, for `{facts['target']}`.",
        "",
        "```python",
        usage,
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "`fastalign.json` has all of this, the whole recipe and the features' mean and std by channel.",
        *(["", *facts["notes"]] if facts["notes"] else []),
    ]
    return "\n".join(lines) + "\n"


def _softcap(softcap: dict[str, Any]) -> str:
    if softcap["value"] is None:
        return "none: trained with plain attention"
    if softcap["applied"]:
        return f"{softcap['value']:g}, applied by the import above; without it the features differ"
    changes = ", ".join(
        f"{100 * v['relative_change']:.2g}% on {name}" for name, v in softcap["dropped"].items()
    )
    return f"**dropped**: trained with {softcap['value']:g}; relative change of the features {changes}"


def _features(features: dict[str, Any]) -> str:
    if features["mean"] is None:
        return features["of"]
    mean, std = (sum(features[name]) / len(features[name]) for name in ("mean", "std"))
    return (
        f"{mean:.3g} and {std:.3g} on average over channels ({features['images']} images, {features['of']})"
    )


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
