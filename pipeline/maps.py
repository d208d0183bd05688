"""What lies beside an image pixel by pixel: masks, uncertainty and background maps."""

import glob
import os
import re
from typing import Any, NamedTuple

import numpy as np

from pipeline import hdus, keywords, places, planes
from pipeline.hdus import Hdu
from pipeline.places import Pixels

#: Keys of the config section ``images`` that name what lies beside an image.
MAPS = ("mask", "uncertainty", "background")
SUFFIXES = re.compile(r"\.(fits|fit|fts)(\.(gz|bz2|fz))?$", re.IGNORECASE)


class Map(NamedTuple):
    """A mask or map as the config names it; ``kind``, of uncertainties, is sigma, variance or weight."""

    files: str | None
    hdu: int | str | None
    column: str | None
    bits: tuple[int, ...]
    kind: str


def companions(file: str, **images: Any) -> list[str]:
    """Files of masks and maps that exist for an image file, by the config section ``images``."""
    settings = [images[key] for key in MAPS if images.get(key) is not None]
    patterns = [as_map(setting).files for setting in settings]
    found = [path for pattern in patterns if pattern is not None for path in _companions(file, pattern)]
    return [path for path in found if os.path.exists(path)]


def _companions(file: str, pattern: str) -> list[str]:
    """The one path that the pattern names if it exists, else all that match."""
    pattern, stem = os.path.expanduser(pattern), SUFFIXES.sub("", os.path.basename(file))
    path = pattern.replace("{stem}", stem)
    if os.path.lexists(path):
        return [path]
    return sorted(glob.glob(pattern.replace("{stem}", glob.escape(stem)), recursive=True)) or [path]


def as_map(setting: Any) -> Map:
    """A setting of the config as a `Map`."""
    if not isinstance(setting, dict):
        return Map(None, setting, None, (), "sigma")
    for kind in ("variance", "weight"):
        if kind in setting:
            return as_map(setting[kind])._replace(kind=kind)
    bits = tuple(setting.get("bits") or ())
    return Map(setting.get("files"), setting.get("hdu"), setting.get("column"), bits, "sigma")


def read_map(
    file: str, shape: tuple[int, int], of: Hdu, count: int, which: planes.Which, wanted: Map
) -> tuple[np.ndarray, Pixels]:
    """Stored planes or stamps of a map, those of the images or of the one plane there is, and how they lie.

    file, shape, of, count : the file of the image, (ny, nx) and number of its planes, and their HDU. ValueError: a
    sentence that names the file.
    """
    files = [file] if wanted.files is None else _companions(file, wanted.files)
    if len(files) > 1:
        msg = f"{file}: {len(files)} files match {wanted.files}, wanted one ({hdus.few(files, 2)})"
        raise ValueError(msg)
    try:
        layout = hdus.layout(files[0])
        hdu, pixels = _map_hdu(layout.hdus, of, wanted)
        if (pixels.ny, pixels.nx) != shape or pixels.planes not in (1, count):
            got = f"{pixels.planes} x {pixels.ny} x {pixels.nx} (planes, NAXIS2, NAXIS1)"
            msg = f"HDU {hdu.number} is {got}, wanted 1 or {count} x {shape[0]} x {shape[1]} as in {file}"
            raise ValueError(msg)
        if pixels.planes == 1:
            which = range(1) if isinstance(which, range) else which._replace(stamps=which.stamps * [0, 1, 1, 1])
        return planes.stored(layout, hdu, pixels, which), pixels
    except hdus.TROUBLE as error:
        msg = f"{files[0]}: {hdus.sentence(error)}"
        raise ValueError(msg) from error


def _map_hdu(there: tuple[Hdu, ...], of: Hdu, wanted: Map) -> tuple[Hdu, Pixels]:
    if wanted.hdu is None or wanted.hdu == "auto":
        candidates = [*there[of.number : of.number + 1], *there]
    else:
        candidates = hdus.matching(there, wanted.hdu)
        if not candidates:
            raise ValueError(hdus.absent(there, wanted.hdu))
    if len(candidates) > 1 and wanted.hdu not in (None, "auto"):
        version = keywords.number(of.cards, "EXTVER", 1)
        same = [hdu for hdu in candidates if keywords.number(hdu.cards, "EXTVER", 1) == version]
        if len(same) != 1:
            found = f"{len(candidates)} HDUs are called {wanted.hdu}"
            msg = f"{found}, {len(same)} of them with EXTVER = {version} as the image's, wanted one"
            raise ValueError(msg)
        candidates = same
    reasons = []
    for hdu in candidates:
        try:
            return hdu, places.pixels(hdu, wanted.column)
        except ValueError as error:
            reasons.append(f"HDU {hdu.number} {error}")
    raise ValueError(reasons[0])


def as_mask(stored: np.ndarray, pixels: Pixels, bits: tuple[int, ...]) -> np.ndarray:
    """Which pixels a stored mask leaves out (True)."""
    values, missing = planes.physical(stored, pixels)
    if not bits:
        return (values != 0) | missing
    chosen = np.uint64(sum({1 << bit for bit in bits}))
    # Bits of the integers themselves: a float would lose the lower ones of a 64-bit mask.
    exact = stored.dtype.kind in "iu" and pixels.scale == 1 and float(pixels.zero).is_integer()
    whole = planes.wrapped(stored, pixels) if exact else np.where(missing, 0, values).astype(np.int64).view(np.uint64)
    return (whole & chosen != 0) | missing


def as_sigma(values: np.ndarray, kind: str) -> np.ndarray:
    """Uncertainties of one of the kinds of `Map` as 1-sigma values; what is not finite, or not above 0, is none."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if kind == "sigma":
            return values
        return np.sqrt(values if kind == "variance" else 1 / values)


def is_of_rows(hdu: Hdu, mask: Map) -> bool:
    """Is a mask a column of the table that holds the images, with one whole number for each row?"""
    here = mask.files is None and mask.hdu in (None, hdu.number, hdus.name(hdu))
    return here and mask.column is not None and places.has_integer(hdu, mask.column)
