"""The section of pictures: each beside its maps, before and after."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from fastalign.report.features import Maps, ramp_colours, ramp_css
from fastalign.report.pictures import Pictures
from fastalign.report.probe import BEFORE

QUALITY = 85


def pictures_section(pictures: Pictures, maps: Maps) -> str:
    """Pictures, principal components and cosines."""
    rows = "\n".join(_row(pictures, maps, index) for index in range(len(pictures.names)))
    shares = ", ".join(f"{share:.0%} {name}" for name, share in maps.shares.items())
    order = (
        "The aligned model's are ordered and signed to go with those before. "
        if BEFORE in maps.shares
        else ""
    )
    first = next(iter(maps.shares))
    return (
        "<section>\n<h2>Patch features</h2>\n"
        "<p>Colours are the first three principal components (red, green, blue) of the patches of all pictures here, "
        f"fitted for each model, after the final norm and without prefix tokens. {order}They hold this share of the "
        f"variance: {shares}.</p>\n"
        "<p>Cosines compare every patch with one that is marked in the picture: A, the square, in the centre; B, the "
        f"circle, the patch least similar to it ({first}). One scale for all:</p>\n"
        f'<p class="scale"><span>{maps.low:.2f}</span><i style="background:{ramp_css()}"></i><span>1</span></p>\n'
        f"{rows}\n</section>"
    )


def _row(pictures: Pictures, maps: Maps, index: int) -> str:
    name = pictures.names[index]
    picture = _tile(
        _jpeg(pictures.shown[index]),
        f"{name}, with patches A and B marked",
        _mark(maps, index, 0) + _mark(maps, index, 1),
    )
    groups = [
        f'<div class="alone"><h3>{escape(name)}</h3><figure>{picture}</figure></div>',
        _group("Principal components", [_components(maps, model, index, name) for model in maps.colours]),
    ]
    for query, letter in enumerate("AB"):
        tiles = [_cosines(maps, model, index, query, f"{name}, patch {letter}") for model in maps.cosines]
        groups.append(_group(f"Cosine with patch {letter}", tiles))
    return f'<article class="picture" aria-label="{escape(name, quote=True)}">{"".join(groups)}</article>'


def _group(title: str, tiles: list[str]) -> str:
    return f"<div><h4>{title}</h4>{''.join(tiles)}</div>"


def _components(maps: Maps, model: str, index: int, name: str) -> str:
    image = _png(maps.colours[model][index])
    tile = _tile(image, f"Principal components of {name}, {model}", grid=maps.grid)
    return f"<figure>{tile}<figcaption>{model}</figcaption></figure>"


def _cosines(maps: Maps, model: str, index: int, query: int, name: str) -> str:
    values = maps.cosines[model][index, query]
    mean = f"mean {round(values.mean(), 2) + 0.0:.2f}"  # no -0.00
    alt = f"Cosines with {name}, {model}: {mean}, lowest {values.min():.2f}"
    tile = _tile(_png(ramp_colours(values, maps.low)), alt, _mark(maps, index, query), grid=maps.grid)
    return f"<figure>{tile}<figcaption>{model}, {mean}</figcaption></figure>"


def _mark(maps: Maps, index: int, query: int) -> str:
    rows, columns = maps.grid
    row, column = divmod(maps.queries[index][query], columns)
    place = {
        "left": column / columns,
        "top": row / rows,
        "width": 1 / columns,
        "height": 1 / rows,
    }
    style = ";".join(f"{key}:{100 * share:.4g}%" for key, share in place.items())
    return f'<span class="mark {"ab"[query]}" style="{style}"></span>'


def _tile(source: str, alt: str, marks: str = "", grid: tuple[int, int] | None = None) -> str:
    kind = f' class="map" style="--shape:{grid[1]}/{grid[0]}"' if grid else ""
    return f'<span class="tile"><img{kind} src="{source}" alt="{escape(alt, quote=True)}"/>{marks}</span>'


def _png(pixels: np.ndarray) -> str:
    return _uri(Image.fromarray(pixels), "png", optimize=True)


def _jpeg(image: Image.Image) -> str:
    return _uri(image, "jpeg", quality=QUALITY)


def _uri(image: Image.Image, kind: str, **options) -> str:
    image.save(buffer := io.BytesIO(), kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
