"""The model card of an export."""

from typing import Any


def model_card(facts: dict[str, Any], usage: str) -> str:
    """README.md.

    Args:
        facts: what fastalign.json holds.
        usage: lines of Python that load the export.
    """
    source, read, images = facts["source"], facts["read"], facts["images"]
    library = {"timm": "timm", "prismatic": "timm", "open-clip": "open_clip"}.get(
        facts["target"], "transformers"
    )
    lines = [
        "---",
        f"license: {source['licence'] or 'unknown'}",
        f"library_name: {library}",
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
        f"| backbone | `{source['name']}`, weights: {source['weights'] or 'unknown'} |",
        f"| licence of its weights | {_licence(source)} |",
        f"| soft-cap | {_softcap(facts['softcap'])} |",
        f"| tokens to read | the last layer's{', normed' if read['normed'] else ''}: {read['prefix_tokens']} prefix "
        f"tokens, then {read['patch_grid'][0]} x {read['patch_grid'][1]} patches of width {read['width']} |",
        f"| images | {images['size'][0]} x {images['size'][1]}, mean {_list(images['mean'])}, std "
        f"{_list(images['std'])}, {images['interpolation']}, crop {images['crop_pct']} |",
        f"| data | {_data(facts['data'])} |",
        f"| trained | {facts['objective']}, {facts['step']} updates, validation loss {_number(facts['val_loss'])} |",
        f"| patch probe | {facts['probe'] if facts['probe'] is not None else 'not measured'} |",
        f"| feature mean and std | {_features(facts['features'])} |",
        f"| difference from fastalign's own model | {facts['parity']['largest_relative_error']:.1e} "
        f"({facts['parity']['of']}) |",
        f"| MaskEmbed decoder | {'`fastalign.export.load_decoder(FOLDER)`' if facts['decoder'] else 'none'} |",
        "",
        "`fastalign.json` has all of this, the whole recipe and the features' mean and std by channel.",
    ]
    return "\n".join([*lines, *(["", *facts["notes"]] if facts["notes"] else [])]) + "\n"


def _licence(source: dict[str, Any]) -> str:
    if source["licence"]:
        return f"{source['licence']}, as timm records it; see the source's own page"
    return "unknown: that of the weights it started from"


def _softcap(softcap: dict[str, Any]) -> str:
    if softcap["value"] is None:
        return "none: trained with plain attention"
    if softcap["applied"]:
        return f"{softcap['value']:g}, applied by the import above; without it these are other features"
    changes = ", ".join(
        f"{100 * v['relative_change']:.2g}% on {name}" for name, v in softcap["dropped"].items()
    )
    return f"**dropped**: trained with {softcap['value']:g}; relative change of the features {changes}"


def _data(data: dict[str, Any] | None) -> str:
    return f"train `{data['train']}`, validation `{data['val']}`" if data else "unknown"


def _features(features: dict[str, Any]) -> str:
    if features["mean"] is None:
        return features["of"]
    mean, std = (sum(features[name]) / len(features[name]) for name in ("mean", "std"))
    return (
        f"{mean:.3g} and {std:.3g} on average over channels ({features['images']} images, {features['of']})"
    )


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
