"""Rows to show with their pixels: data, model and residual, as pictures within a page."""

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.image import imsave
from scipy.ndimage import median_filter

from pipeline import numerals, tallies
from pipeline.catalogue import Summary, read_rows
from pipeline.columns import PARAMETERS, decode_flags
from pipeline.cutouts import scan_stamps
from pipeline.detection import read_images
from pipeline.images import corners_of, identities, scan_file
from pipeline.model import of_rows

MASKED_COLOUR = (0.91, 0.70, 0.25, 1.0)
# In half-widths, like the bound of outlier_fraction.
RESIDUAL_LIMIT = 10.0
# Sources in images larger than this are shown with their surroundings only.
LARGEST_PICTURE = 96


def choose(sample: Mapping[str, np.ndarray], tally: tallies.Tally, summary: Summary) -> list[tuple[int, str]]:
    """Rows to picture, and why: the worst, some that did not converge, and typical ones from faint to bright."""
    if summary.rows == 0:
        return []
    bad = dict.fromkeys([*tally.worst[:4], *tally.unconverged[:3]])
    typical = np.flatnonzero((sample["flags"] == 0) & np.isfinite(sample["snr"]) & ~np.isin(sample["row"], list(bad)))
    typical = typical[np.argsort(sample["snr"][typical], kind="stable")]
    room = min(tallies.PICTURES - len(bad), len(typical))
    places = (len(typical) * (np.arange(room) + 0.5) / max(room, 1)).astype(int)
    groups = [
        ("largest misfit", tally.worst[:4]),
        ("not converged", tally.unconverged[:3]),
        ("typical", sample["row"][typical[places]].tolist()),
        ("large misfit", tally.worst[4:]),
        ("not converged", tally.unconverged[3:]),
        ("one of the first", list(range(min(tallies.PICTURES, summary.rows)))),
    ]
    chosen: dict[int, str] = {}
    for why, rows in groups:
        for row in rows:
            chosen.setdefault(row, why)
    return list(chosen.items())[: tallies.PICTURES]


def picture(path: str | Path, index: int, why: str, summary: Summary, images: Mapping[str, Any]) -> dict[str, Any]:
    """Data, model and residual of one row, with its numbers."""
    row = {name: values[0] for name, values in read_rows(path, None, index, index + 1).items()}
    numbers = [
        (name, numerals.with_error(row[name], row[f"{name}_err"]), summary.units[name])
        for name in (*PARAMETERS, *tallies.SHAPES)
        if math.isfinite(row[name])
    ]
    if math.isfinite(row["ra"]) and math.isfinite(row["dec"]):
        numbers.append(("ra, dec", numerals.minus(f"{row['ra']:.5f}, {row['dec']:+.5f}"), summary.units["ra"]))
    # What goes along, where it is neither empty nor NaN.
    along = {name: row[name] for name in images.get("carry", ())}
    numbers += [(name, str(value), "") for name, value in along.items() if value != "" and value == value]
    try:
        data, used, noise, corner = _pixels(row, images)
        shown = row | {name: row[name] - corner["xy".index(name[0])] for name in ("x0", "y0", "x0_start", "y0_start")}
        # Fits that went astray overflow, and pixels that were not used may hold anything.
        with np.errstate(all="ignore"):
            panels, problem = _panels(shown, data, used, noise, summary.units["amp"]), ""
    except (OSError, ValueError) as error:
        panels, problem = [], f"The pixels could not be read again: {error}"
    return {"row": row, "why": why, "flags": decode_flags(int(row["flags"])), "numbers": numbers} | {
        "panels": panels,
        "problem": problem,
    }


def _pixels(row: Mapping[str, Any], images: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Pixels (ny, nx) of a row, which were used, 1-sigma noise (1 where none is given), x and y of the first pixel."""
    reading = {key: value for key, value in images.items() if key != "files"}
    blocks, _ = scan_file(row["file"], **reading) if images["cutouts"] is None else scan_stamps(row["file"], **reading)
    for block in (block for block in blocks if block.hdu == row["hdu"]):
        planes, sources = identities(block, block.start, block.stop)
        for number in np.flatnonzero((planes == row["plane"]) & (sources == row["source"])).tolist():
            stack = read_images(block, number, number + 1, **reading)
            noise = np.ones(stack.data.shape[1:]) if stack.noise_map is None else stack.noise_map[0]
            (corner,) = corners_of(block, number, number + 1).tolist()
            return np.asarray(stack.data[0], dtype=np.float64), ~stack.mask[0], noise, corner
    source = "" if images["cutouts"] is None else f" source {row['source']} in"
    msg = f"{row['file']}: no{source} plane {row['plane']} in HDU {row['hdu']} any more"
    raise ValueError(msg)


def _window(row: Mapping[str, Any], ny: int, nx: int) -> tuple[slice, slice]:
    """Rows and columns of an image to show: all of a small one, of a large one the source and what surrounds it."""
    if max(ny, nx) <= LARGEST_PICTURE:
        return slice(0, ny), slice(0, nx)
    half = int(np.clip(3 * np.nan_to_num(row["fwhm_major"], nan=0.0), LARGEST_PICTURE // 4, 2 * LARGEST_PICTURE))

    def cut(centre: float, size: int) -> slice:
        start = int(np.clip((centre if math.isfinite(centre) else 0.5 * size) - half, 0, max(size - 2 * half, 0)))
        return slice(start, min(start + 2 * half, size))

    return cut(row["y0"], ny), cut(row["x0"], nx)


def _panels(
    row: Mapping[str, Any], data: np.ndarray, used: np.ndarray, noise: np.ndarray, unit: str
) -> list[dict[str, Any]]:
    """The three pictures of a row; without a model, its data alone."""
    window = _window(row, *data.shape)
    data, used, noise = data[window], used[window], noise[window]
    y, x = np.indices(data.shape, dtype=np.float64)
    y, x = y + window[0].start, x + window[1].start
    pixels = data[used] if used.any() else np.zeros(1)
    middle = float(np.median(pixels))
    spread = 1.4826 * float(np.median(np.abs(pixels - middle))) or 1.0

    def stretch(values: np.ndarray) -> np.ndarray:
        return np.arcsinh((values - middle) / (3.0 * spread))

    # What is left after a 3x3 median is the source and its surroundings; outliers would leave no shades for these. The
    # quantiles pass over stars in the way, and the model keeps a source that is smaller than they are.
    smooth = stretch(median_filter(np.where(used, data, middle), 3))
    low, high = np.quantile(smooth, [0.01, 0.99])
    model = of_rows(row, x, y) if np.isfinite([row[name] for name in PARAMETERS[:6]]).all() else None
    if model is not None and np.isfinite(model).all():
        peaks = np.clip(stretch(model), *stretch(np.array([pixels.min(), pixels.max()])))
        low, high = min(low, peaks.min()), max(high, peaks.max())
    low, high = low - 0.4, high + 0.1
    ends = [numerals.number(middle + 3.0 * spread * math.sinh(end)) for end in (low, high)]
    grey = f"{ends[0]} to {ends[1]} {numerals.unit(unit)}".strip()
    frame = {
        "width": data.shape[1],
        "height": data.shape[0],
        # In pixels from the corner, y upwards.
        "cx": row["x0"] - window[1].start + 0.5,
        "cy": data.shape[0] - (row["y0"] - window[0].start + 0.5),
        "rx": 0.5 * row["fwhm_major"],
        "ry": 0.5 * row["fwhm_minor"],
        "turn": -math.degrees(np.nan_to_num(row["theta"], nan=0.0)),
        "solved": all(math.isfinite(row[name]) for name in ("x0", "y0", "fwhm_major", "fwhm_minor")),
    }
    panels = [
        frame | {"name": "data", "range": grey, "src": _png((stretch(data) - low) / (high - low), used, "gray_r")}
    ]
    if model is not None:
        half_width = noise * (row["scale"] if math.isfinite(row["scale"]) and row["scale"] > 0 else spread)
        residual = 0.5 + (data - model) / half_width / (2 * RESIDUAL_LIMIT)
        clean = _png((stretch(model) - low) / (high - low), np.ones_like(used), "gray_r")
        panels += [
            frame | {"name": "model", "range": "", "src": clean},
            frame | {"name": "residual", "range": f"±{RESIDUAL_LIMIT:g} scale", "src": _png(residual, used, "RdBu_r")},
        ]
    return panels


def _png(values: np.ndarray, used: np.ndarray, colours: str) -> str:
    """Values 0..1 (ny, nx) as the address of a picture, y upwards; clipped; unused pixels in their own colour."""
    rgba = matplotlib.colormaps[colours](np.clip(np.nan_to_num(values, nan=0.5), 0.0, 1.0))
    rgba[~used] = MASKED_COLOUR
    buffer = io.BytesIO()
    imsave(buffer, rgba[::-1], format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
