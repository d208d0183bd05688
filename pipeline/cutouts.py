"""Sources in images larger than one source: where they are, by a table or by detection, and the stamps that show them.

A stamp is ``size`` pixels wide and high, and its middle is as near to the position as whole pixels allow. Pixels of a
stamp that are nearer to another position of the table than to its own are not used, see `of_others`.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from astropy import units
from astropy.io import ascii, registry
from astropy.table import Column, MaskedColumn, Table
from scipy.spatial import KDTree

from pipeline.carry import Value, plain
from pipeline.columns import NEAR
from pipeline.detection import find_sources
from pipeline.hdus import few
from pipeline.headers import read_header
from pipeline.images import LEAST, Block, Rejected, as_runs, scan_file
from pipeline.places import spelt
from pipeline.sky import pixel_position, read_celestial

#: Names of the columns, in small letters: right ascension and declination as catalogues call them (also VizieR and
#: SExtractor), and pixels. Of two pairs in a table the first counts.
NAMES = {
    "sky": (
        ("ra", "raj2000", "ra_icrs", "ra_deg", "alpha_j2000"),
        ("dec", "dej2000", "de_icrs", "dec_deg", "delta_j2000"),
    ),
    "pixel": (("x",), ("y",)),
}


class Positions(NamedTuple):
    """Positions from a table, float64 ``(n,)`` each, NaN where there is none.

    ``kind`` is ``sky`` (right ascension and declination [deg, ICRS]) or ``pixel`` (x and y, 0-based, of the plane).
    ``carried`` has n values of each column asked for that is there.
    """

    file: str
    kind: str
    first: np.ndarray
    second: np.ndarray
    carried: dict[str, list[Value]]


def read_positions(file: str, carry: Sequence[str] = ()) -> Positions:
    """Positions of sources from any table that astropy reads: columns ra and dec, or x and y (see `NAMES`).

    Angles without a unit are degrees. What is masked, not finite or beyond a pole is NaN. carry : names of columns to
    keep as they are.

    Raises
    ------
    ValueError
        A sentence that names the file: it is not there, no table, empty, or without such columns of numbers.
    """
    path = os.path.expanduser(file)
    try:
        return _read_positions(file, path, os.stat(path).st_mtime_ns, tuple(carry))
    except OSError as error:
        msg = f"images.cutouts.positions: {file}: {error.strerror or error}, wanted a table"
        raise ValueError(msg) from error
    except ValueError as error:
        msg = f"images.cutouts.positions: {file}: {error}"
        raise ValueError(msg) from error


def scan_stamps(file: str, *, folder: str | Path, **images: Any) -> tuple[list[Block], list[Rejected]]:
    """`images.scan_file`, and then `cut` of each block that it found."""
    blocks, rejected = scan_file(file, **images)
    parts = [cut(block, folder=folder, **images) for block in blocks]
    return [block for found, _ in parts for block in found], rejected + [row for _, rows in parts for row in rows]


def cut(block: Block, *, folder: str | Path, **images: Any) -> tuple[list[Block], list[Rejected]]:
    """The stamps that are cut out of the planes of a block.

    Parameters
    ----------
    block : Block
        Whole planes, as `images.scan_file` found them.
    folder : path
        Where `detection` keeps what it finds.
    **images
        The config section.

    Returns
    -------
    blocks : list of Block
        One, with a stamp for each plane and source in it, in this order. ``source`` is the number, from 0, of the
        position in its table, or of the source among those found. In a plane is what is nearer to one of its pixels
        than to any beyond. None if there is not one stamp.
    rejected : list of Rejected
        The HDU if no position lies in it, or planes in which no source was found, with the reason.

    Raises
    ------
    ValueError
        As `read_positions`: without a table there is no image.
    """
    planes = range(block.start, block.stop)
    places: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    rejected = []
    carried: dict[str, list[Value]] = {}
    taken: list[str] = []
    if "positions" in images["cutouts"]:
        positions = read_positions(images["cutouts"]["positions"], images.get("carry", ()))
        carried = positions.carried
        try:
            sources, x, y = _positions_in(block, positions, images.get("column"))
            places = dict.fromkeys(planes, (sources, x, y))
            taken = [as_runs(pixels) for pixels in of_others(x, y, images["cutouts"]["size"])] * len(planes)
        except (ValueError, OSError) as error:
            rejected.append(Rejected(block.file, block.hdu, -1, -1, str(error)))
    else:
        for plane in planes:
            try:
                x, y = find_sources(block, plane, folder, **images)
                places[plane] = np.arange(len(x)), x, y
            except ValueError as error:
                rejected.append(Rejected(block.file, block.hdu, plane, -1, str(error)))
    if not places:
        return [], rejected
    stamps = np.concatenate([_as_stamps(plane, *place, images["cutouts"]["size"]) for plane, place in places.items()])
    along = [{name: values[i] for name, values in carried.items()} for i in stamps[:, 1].tolist()] if carried else None
    return [
        block._replace(start=0, stop=len(stamps), stamps=stamps, carried=along, taken=taken if any(taken) else None)
    ], rejected


def _as_stamps(plane: int, sources: np.ndarray, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    return np.stack([np.full(len(x), plane), sources, first_pixels(x, size), first_pixels(y, size)], axis=1)


def first_pixels(centres: np.ndarray, size: int) -> np.ndarray:
    """First pixel, int64, along one axis of stamps of ``size`` pixels around ``centres`` [pixel]."""
    return np.floor(centres - (size - 1) / 2 + 0.5).astype(np.int64)


def of_others(x: np.ndarray, y: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Which pixels of each stamp are nearer to another position than to its own, bool ``(size, size)``.

    Positions that are no farther than NEAR from its own do not count: a fit that begins at a peak so near to a position
    cannot tell them apart, and tables list sources twice. LEAST pixels are left in any case, those least far on the
    other side.

    x, y : (n,) float64 ndarray
        All positions in a plane [pixel].
    """
    places = np.stack([x, y], axis=1)
    tree = KDTree(places)
    grid = np.arange(size)
    for place, first in zip(places, np.stack([first_pixels(x, size), first_pixels(y, size)], axis=1), strict=True):
        # Half of the way to what takes a pixel is not longer than that to the farthest corner.
        others = places[tree.query_ball_point(place, np.sqrt(2) * (size + 1))] - place
        far = np.sqrt(np.sum(others**2, axis=1))
        (dx, dy), far = (others[far > NEAR] / far[far > NEAR, None]).T[..., None, None], far[far > NEAR, None, None]
        along_x, along_y = grid + first[0] - place[0], grid + first[1] - place[1]
        # How far beyond the line that is as near to the other position as to its own.
        beyond = np.max(dx * along_x + dy * along_y[:, None] - 0.5 * far, axis=0, initial=-np.inf)
        yield beyond > max(0.0, np.sort(beyond, axis=None)[LEAST - 1])


def nowhere(blocks: Iterable[Block], cutouts: Mapping[str, Any]) -> list[Rejected]:
    """Positions of the table of which no block has a stamp, each with the reason; ``file`` is that of the table."""
    if "positions" not in cutouts:
        return []
    positions = read_positions(cutouts["positions"])
    missing = np.ones(len(positions.first), bool)
    for block in blocks:
        if block.stamps is not None:
            missing[block.stamps[:, 1]] = False
    known = np.isfinite(positions.first)
    no_number = "no position: masked, or not finite" + " or beyond a pole" * (positions.kind == "sky")
    reasons = np.where(known, "this position lies in none of the images", no_number)
    return [Rejected(positions.file, -1, -1, i, str(reasons[i])) for i in np.flatnonzero(missing).tolist()]


def _positions_in(block: Block, positions: Positions, column: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the positions in the planes of a block, and their x and y there; ValueError if there are none."""
    x, y = _on_plane(positions, block, column)
    # The comparison is false for NaN.
    sources = np.flatnonzero((x >= -0.5) & (x < block.nx - 0.5) & (y >= -0.5) & (y < block.ny - 0.5))
    if len(sources) == 0:
        msg = f"none of the {len(x)} positions of {positions.file} lies in it"
        raise ValueError(msg)
    return sources, x[sources], y[sources]


def _on_plane(positions: Positions, block: Block, column: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Positions on the planes of a block [pixel], NaN where they have none."""
    if positions.kind == "pixel":
        return positions.first, positions.second
    wcs = read_celestial(block.file, read_header(block.file, block.hdu), column)
    if wcs is None:
        msg = f"{positions.file} has positions on the sky, and its header says nothing of the sky (no CTYPE of RA, Dec)"
        raise ValueError(msg)
    x, y = np.full((2, len(positions.first)), np.nan)
    known = np.isfinite(positions.first)
    x[known], y[known] = pixel_position(wcs, positions.first[known], positions.second[known])
    return x, y


@lru_cache(maxsize=1)
def _read_positions(file: str, path: str, mtime_ns: int, carry: tuple[str, ...]) -> Positions:
    """Remembered, because every image asks for them."""
    table = _read_table(path)
    folded = {name.lower(): name for name in reversed(table.colnames)}
    pairs = {
        kind: [next((folded[name] for name in names if name in folded), "") for names in pair]
        for kind, pair in NAMES.items()
    }
    kind = next((kind for kind, pair in pairs.items() if all(pair)), "")
    if not kind:
        msg = f"it has the columns {few(table.colnames)}, wanted ra and dec [deg], or x and y [pixel from 0]"
        raise ValueError(msg)
    if len(table) == 0:
        msg = "the table is empty, wanted at least one position"
        raise ValueError(msg)
    first, second = (_numbers(table[name], "deg" if kind == "sky" else "pix") for name in pairs[kind])
    good = np.isfinite(first) & np.isfinite(second)
    if kind == "sky":
        good &= np.abs(second) <= 90
    carried = {name: _as_they_are(table[column]) for name in carry if (column := spelt(table.colnames, name))}
    return Positions(file, kind, np.where(good, first, np.nan), np.where(good, second, np.nan), carried)


def _as_they_are(column: Any) -> list[Value]:
    """The entries of a column, those that are neither number nor text as text; None where masked."""
    if len(column.shape) > 1:
        msg = f"column {column.info.name} is of shape {column.shape}, wanted one value a row for images.carry"
        raise ValueError(msg)
    return [plain(value) for value in (column if isinstance(column, Column) else map(str, column))]


def _read_table(path: str) -> Table:
    try:
        return Table.read(path)
    except registry.IORegistryError:  # a name that says nothing
        try:
            return ascii.read(path)
        except Exception:
            msg = "it is no table that astropy reads, wanted FITS, VOTable, ECSV, CSV or Parquet"
            raise ValueError(msg) from None
    except OSError:
        raise
    except Exception as error:  # readers raise whatever they meet
        msg = f"it cannot be read as a table ({error})"
        raise ValueError(msg) from error


def _numbers(column: Column | MaskedColumn, unit: str) -> np.ndarray:
    """A column as float64 in ``unit``, masked entries NaN."""
    if column.dtype.kind not in "fiu" or column.ndim != 1:
        msg = f"column {column.name} is {column.dtype} of shape {column.shape}, wanted one number [{unit}] a row"
        raise ValueError(msg)
    values = np.ma.filled(np.ma.asarray(column).astype(np.float64), np.nan)
    given = getattr(column, "unit", None)
    if unit == "pix" or given is None:
        return values
    try:
        return units.Quantity(values, given).to_value(unit)
    except (units.UnitConversionError, TypeError):
        msg = f"column {column.name} is in {given}, wanted {unit}"
        raise ValueError(msg) from None
