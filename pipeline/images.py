"""FITS <-> arrays: which files hold images, and their pixels with masks and maps.

``NAXIS1`` is x, ``NAXIS2`` is y; further axes are flattened in C order, so plane ``p`` is the ``p``-th run of
``ny * nx`` pixels. Rows of a table column count the same way: row, then plane within the row.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline import hdus, keywords, maps, places, planes
from pipeline.columns import NEAR
from pipeline.hdus import Hdu, Layout
from pipeline.versions import as_found, version

#: Pixels that neighbours leave to a stamp, at least: twice as many as a fit with a constant background needs.
LEAST = 32


class Block(NamedTuple):
    """Images ``start`` to ``stop - 1`` of one HDU with planes of ``(ny, nx)``: its planes, or stamps cut out of them.

    ``size`` [byte] and ``version`` are of the file and the files of its mask and maps together, so that any change
    shows: ``version`` is the sum of their times of change [ns], or a digest of what is in them. ``stamps``, int64
    ``(stop - start, 4)``, has of each stamp its plane, its source, and x and y of its first pixel, which may lie
    outside the plane; None: image i is plane i. ``carried`` has of each stamp what goes along with it from the table of
    positions, by name, and ``taken`` which of its pixels belong to other positions, as `as_runs` has them.
    """

    file: str
    hdu: int
    start: int
    stop: int
    ny: int
    nx: int
    size: int
    version: int
    stamps: np.ndarray | None = None
    carried: Sequence[dict[str, Any]] | None = None
    taken: Sequence[str] | None = None


class Rejected(NamedTuple):
    """What could not be read, and why; -1 = the whole file (hdu), HDU (plane) or plane (source)."""

    file: str
    hdu: int
    plane: int
    source: int
    reason: str


class Stack(NamedTuple):
    """Images as arrays.

    Attributes
    ----------
    data : (n, ny, nx) float32 or float64 ndarray
        Pixel values less the background map, in the unit of the image, native byte order; NaN where the file says NaN,
        infinity or BLANK.
    mask : (n, ny, nx) bool ndarray
        True = not used: no finite value, masked, saturated, without a known background or a usable uncertainty, or, of
        a stamp, beyond the plane's edge or taken by another position.
    noise_map : (n, ny, nx) ndarray of the dtype of ``data``, or None
        1-sigma uncertainty; 1 where it is not usable, and ``mask`` is True there.
    """

    data: np.ndarray
    mask: np.ndarray
    noise_map: np.ndarray | None


def _version(file: str, images: dict[str, Any]) -> tuple[int, int]:
    return version([file, *maps.companions(file, **images)], images.get("changed", "time"))


# ---- which images


def scan_file(
    file: str, *, hdu: int | str | list[int | str] = "auto", column: str | None = None, **images: Any
) -> tuple[list[Block], list[Rejected]]:
    """Find the images of a file without reading a pixel.

    Parameters
    ----------
    file : str
        Any path; one that leads to a pipe, a folder or nothing is answered with a reason.
    hdu : "auto", "all", number, EXTNAME, or a list of numbers and names
        ``auto`` is the first HDU with pixels in two or more dimensions, ``all`` every such HDU; with ``column`` the
        tables that have it. A name means every HDU of that name, in capitals or not.
    column : str, optional
        Column of a binary table whose cells are images (by TDIM).
    **images
        The rest of the config section: the files of `maps.MAPS` count in ``size`` and ``version``, with
        ``changed: content`` a digest of them.

    Returns
    -------
    blocks : list of Block
        One for each HDU with images, by number.
    rejected : list of Rejected
        HDUs that announce images but are broken, those asked for that are not there, or the file if it has no image.
    """
    try:
        size, changed = _version(file, images)
        chosen, rejected = _chosen(file, hdus.layout(file).hdus, hdu)
    except hdus.TROUBLE as error:
        return [], [whole(file, hdus.sentence(error))]
    blocks, others = [], []
    for found in chosen:
        label = f"HDU {found.number}" + (f" ({hdus.name(found)})" if found.number and hdus.name(found) else "")
        if found.problem and hdus.is_table(found) == (column is not None):
            rejected.append(whole(file, f"{label}: {found.problem}", found.number))
        else:
            try:
                pixels = places.pixels(found, column)
            except ValueError as error:
                others.append(whole(file, f"{label} {error}", found.number))
                continue
            blocks.append(Block(file, found.number, 0, pixels.planes, pixels.ny, pixels.nx, size, changed))
        if hdu == "auto":
            break
    if hdu not in ("auto", "all"):
        rejected += others  # asked for one by one: none may go without a word
    elif not blocks and not rejected:
        hint = " (images.column reads images from tables)" if column is None and any(map(hdus.is_table, chosen)) else ""
        rejected.append(whole(file, f"no image in it: {hdus.few([other.reason for other in others])}{hint}"))
    return blocks, sorted(rejected)


def whole(file: str, reason: str, hdu: int = -1) -> Rejected:
    """A file, or one of its HDUs, of which nothing can be read."""
    return Rejected(file, hdu, -1, -1, reason)


def _chosen(file: str, there: tuple[Hdu, ...], wanted: Any) -> tuple[list[Hdu], list[Rejected]]:
    if wanted in ("auto", "all"):
        return list(there), []
    chosen: set[int] = set()
    rejected = []
    for item in wanted if isinstance(wanted, list | tuple) else [wanted]:
        found = hdus.matching(there, item)
        chosen.update(hdu.number for hdu in found)
        if not found:
            rejected.append(whole(file, hdus.absent(there, item), item if isinstance(item, int) else -1))
    return [there[number] for number in sorted(chosen)], rejected


# ---- pixels


def image_shape(block: Block, cutouts: dict[str, Any] | None) -> tuple[int, int]:
    """``(ny, nx)`` of the images of a block, by the setting ``cutouts`` of the config."""
    return (block.ny, block.nx) if cutouts is None else (cutouts["size"], cutouts["size"])


def near_middle(cutouts: dict[str, Any] | None) -> float:
    """How far from the middle of an image, along x and y, its source is looked for [pixel]: of a stamp, there."""
    return np.inf if cutouts is None else NEAR


def identities(block: Block, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Plane and source, int64 ``(stop - start,)`` each, of images ``start`` to ``stop - 1`` of an HDU."""
    if block.stamps is None:
        return np.arange(start, stop), np.zeros(stop - start, np.int64)
    stamps = block.stamps[start - block.start : stop - block.start]
    return stamps[:, 0], stamps[:, 1]


def corners_of(block: Block, start: int, stop: int) -> np.ndarray:
    """x, y of the first pixel of images ``start`` to ``stop - 1`` in their planes, int64 ``(stop - start, 2)``."""
    if block.stamps is None:
        return np.zeros((stop - start, 2), np.int64)
    return block.stamps[start - block.start : stop - block.start, 2:]


def as_runs(chosen: np.ndarray) -> str:
    """Pixels of an image (True) as the numbers, in C order, where runs of them begin and end; "" = none."""
    return " ".join(map(str, np.flatnonzero(np.diff(chosen.ravel(), prepend=False, append=False))))


def of_runs(runs: str, shape: tuple[int, ...]) -> np.ndarray:
    """The pixels that `as_runs` tells of, bool ``shape``."""
    ends = np.zeros(np.prod(shape) + 1, bool)
    ends[np.array(runs.split(), int)] = True
    return np.logical_xor.accumulate(ends)[:-1].reshape(shape)


def read_planes(
    block: Block,
    start: int,
    stop: int,
    *,
    column: str | None = None,
    mask: Any = None,
    uncertainty: Any = None,
    background: Any = None,
    saturation: float | str | None = None,
    cutouts: dict[str, Any] | None = None,
    changed: str = "time",
    **_: Any,
) -> Stack:
    """Read images ``start`` to ``stop - 1``, counted from the first of the HDU, with mask and maps.

    Parameters
    ----------
    block : Block
        As `scan_file` found it, or a part of that; with ``stamps`` these are read, without them whole planes.
    column : str, optional
        The image column, as for `scan_file`.
    mask : int, str or dict, optional
        HDU of the same file, or ``{files, hdu, column, bits}``. Not used is what is not 0, or NaN; with ``bits``, where
        one of these bits is set (numbered from 0). A column of one number a row is for `spoilt`.
    uncertainty : int, str or dict, optional
        1-sigma map: HDU of the same file, or ``{files, hdu, column}``; or one of these within ``{variance: ...}`` or
        ``{weight: ...}``. What is not finite or not above 0 is not used.
    background : int, str or dict, optional
        Map to subtract: HDU of the same file, or ``{files, hdu, column}``. What is not finite is not used.
    saturation : float or str, optional
        Pixels of this value or above, before the background is subtracted, are not used; or the keyword that holds it,
        in the header of the HDU or else in the first one.
    cutouts : dict, optional
        ``size``: side of the stamps [pixel].
    changed : "time" or "content"
        What tells whether the file has changed since the scan.

    Notes
    -----
    In ``files``, ``{stem}`` stands for the name of the image file without FITS suffixes. Without ``hdu``, the HDU with
    the number of the image's is taken if it holds planes, else the first that does. Of several HDUs of one name, the
    one with the EXTVER of the image's HDU is taken. A mask or map has as many planes as the HDU of the images, or one
    for all of them.

    Integers of 8 and 16 bits and float32 become float32 unless their scaling asks for more, all others float64.

    Raises
    ------
    ValueError
        A sentence that names the file: it cannot be read, has changed since the scan, a map does not match it, or the
        keyword of saturation is not there.
    """
    masks, sigmas, levels = (None if one is None else maps.as_map(one) for one in (mask, uncertainty, background))
    beside = {"mask": mask, "uncertainty": uncertainty, "background": background}
    label = f"{block.file}: HDU {block.hdu}"
    with as_found(
        label, (block.size, block.version), lambda: [block.file, *maps.companions(block.file, **beside)], changed
    ):
        try:
            layout = hdus.layout(block.file)
            hdu = layout.hdus[block.hdu]
            pixels = places.pixels(hdu, column)
            which: planes.Which = range(start, stop)
            if block.stamps is not None:
                which = planes.Cuts(block.stamps[start - block.start : stop - block.start], image_shape(block, cutouts))
            data, unusable = planes.physical(planes.stored(layout, hdu, pixels, which), pixels)
            if saturation is not None:
                unusable |= data >= _saturation(saturation, layout, hdu, data.dtype)
        except hdus.TROUBLE as error:
            msg = f"{label}: {hdus.sentence(error)}"
            raise ValueError(msg) from error
        read = functools.partial(maps.read_map, block.file, (block.ny, block.nx), hdu, pixels.planes, which)
        if masks is not None and not maps.is_of_rows(hdu, masks):
            unusable |= maps.as_mask(*read(masks), masks.bits)
        level = None if levels is None else planes.physical(*read(levels))[0]
        sigma = None if sigmas is None else maps.as_sigma(planes.physical(*read(sigmas))[0].astype(float), sigmas.kind)
    noise = None
    if level is not None:
        with np.errstate(over="ignore"):
            np.subtract(data, level, out=data, casting="same_kind")
        data[np.isinf(data)] = np.nan
        unusable |= np.isnan(data)
    if sigma is not None:
        with np.errstate(over="ignore"):
            noise = np.broadcast_to(sigma, data.shape).astype(data.dtype)
        useless = ~(np.isfinite(noise) & (noise > 0))  # after the conversion, which may overflow or underflow
        noise[useless] = 1
        unusable |= useless
    if isinstance(which, planes.Cuts):
        beyond = ~planes.inside(which, pixels)
        data[beyond] = np.nan
        unusable |= beyond
    if block.taken is not None:
        taken = np.stack(
            [of_runs(runs, data.shape[1:]) for runs in block.taken[start - block.start : stop - block.start]]
        )
        left = np.sum(~(unusable | taken), axis=(1, 2))
        unusable |= taken & (left >= LEAST)[:, None, None]
    return Stack(data, unusable, noise)


def _saturation(setting: float | str, layout: Layout, hdu: Hdu, dtype: np.dtype) -> np.generic:
    """The value of saturated pixels, as pixels of this type have it."""
    level = setting
    if isinstance(setting, str):
        key = setting.strip().upper()
        cards = next((cards for cards in (hdu.cards, layout.hdus[0].cards) if key in cards), {})
        level = keywords.number(cards, key, np.nan)
        if np.isnan(level):
            got = f"{key} = {keywords.text(cards, key)}" if cards else f"its header has no {key}"
            msg = f"{got}, wanted the value of saturated pixels (images.saturation)"
            raise ValueError(msg)
    with np.errstate(over="ignore"):
        return dtype.type(level)
