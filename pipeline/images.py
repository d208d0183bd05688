"""FITS <-> arrays: which files hold images, their pixels, masks and maps.

Plain pixels and table columns are a read and a byte swap at the place that `hdus` found; tile-compressed ones are
decoded by fitsio, and by astropy where fitsio cannot. File names never reach fitsio: to the library under it
``a[1].fits`` is a filter and ``http:...`` a download.

``NAXIS1`` is x, ``NAXIS2`` is y; further axes are flattened in C order, so plane ``p`` is the ``p``-th run of
``ny * nx`` pixels. Rows of a table column count the same way: row, then plane within the row.
"""

import errno
import functools
import glob
import io
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import fitsio
import numpy as np
from astropy.io import fits

from pipeline import hdus
from pipeline.carry import Value, plain
from pipeline.columns import NEAR
from pipeline.hdus import Hdu, Layout, Pixels
from pipeline.headers import read_header
from pipeline.versions import as_found, version

#: Keys of the config section ``images`` that name what lies beside an image.
MAPS = ("mask", "uncertainty", "background")

#: Pixels that neighbours leave to a stamp, at least: twice as many as a fit with a constant background needs.
LEAST = 32

SUFFIXES = re.compile(r"\.(fits|fit|fts)(\.(gz|bz2|fz))?$", re.IGNORECASE)


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


class _Map(NamedTuple):
    """A mask or map as the config names it; ``kind``, of uncertainties, is sigma, variance or weight."""

    files: str | None
    hdu: int | str | None
    column: str | None
    bits: tuple[int, ...]
    kind: str


class _Cuts(NamedTuple):
    """Stamps (n, 4) as in `Block`, at least one, all of one shape (ny, nx)."""

    stamps: np.ndarray
    shape: tuple[int, int]

    def planes(self) -> tuple[int, int]:
        """The first plane that is needed, and the one after the last."""
        return int(self.stamps[:, 0].min()), int(self.stamps[:, 0].max()) + 1


#: Planes by number, or stamps.
_Which = range | _Cuts


# ---- files that belong together


def companions(file: str, **images: Any) -> list[str]:
    """Files of masks and maps that exist for an image file, by the config section ``images``."""
    settings = [images[key] for key in MAPS if images.get(key) is not None]
    patterns = [_as_map(setting).files for setting in settings]
    found = [path for pattern in patterns if pattern is not None for path in _companions(file, pattern)]
    return [path for path in found if os.path.exists(path)]


def _companions(file: str, pattern: str) -> list[str]:
    """The one path that the pattern names if it exists, else all that match."""
    pattern, stem = os.path.expanduser(pattern), SUFFIXES.sub("", os.path.basename(file))
    path = pattern.replace("{stem}", stem)
    if os.path.lexists(path):
        return [path]
    return sorted(glob.glob(pattern.replace("{stem}", glob.escape(stem)), recursive=True)) or [path]


def _version(file: str, images: dict[str, Any]) -> tuple[int, int]:
    return version([file, *companions(file, **images)], images.get("changed", "time"))


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
        The rest of the config section: the files of `MAPS` count in ``size`` and ``version``, with
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
                pixels = hdus.pixels(found, column)
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
        found = _matching(there, item)
        chosen.update(hdu.number for hdu in found)
        if not found:
            rejected.append(whole(file, hdus.absent(there, item), item if isinstance(item, int) else -1))
    return [there[number] for number in sorted(chosen)], rejected


def _matching(there: tuple[Hdu, ...], wanted: int | str) -> list[Hdu]:
    if isinstance(wanted, int):
        return [there[wanted]] if 0 <= wanted < len(there) else []
    return [hdu for hdu in there if hdus.name(hdu) == wanted.strip().upper()]


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
    masks, sigmas, levels = (None if one is None else _as_map(one) for one in (mask, uncertainty, background))
    maps = {"mask": mask, "uncertainty": uncertainty, "background": background}
    label = f"{block.file}: HDU {block.hdu}"
    with as_found(label, (block.size, block.version), lambda: [block.file, *companions(block.file, **maps)], changed):
        try:
            layout = hdus.layout(block.file)
            hdu = layout.hdus[block.hdu]
            pixels = hdus.pixels(hdu, column)
            which: _Which = range(start, stop)
            if block.stamps is not None:
                which = _Cuts(block.stamps[start - block.start : stop - block.start], image_shape(block, cutouts))
            data, unusable = _physical(_stored(layout, hdu, pixels, which), pixels)
            if saturation is not None:
                unusable |= data >= _saturation(saturation, layout, hdu, data.dtype)
        except hdus.TROUBLE as error:
            msg = f"{label}: {hdus.sentence(error)}"
            raise ValueError(msg) from error
        read = functools.partial(_read_map, block, hdu, pixels.planes, which)
        if masks is not None and not _is_of_rows(hdu, masks):
            unusable |= _mask(*read(masks), masks.bits)
        level = None if levels is None else _physical(*read(levels))[0]
        sigma = None if sigmas is None else _sigma(_physical(*read(sigmas))[0].astype(float), sigmas.kind)
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
    if isinstance(which, _Cuts):
        beyond = ~_inside(which, pixels)
        data[beyond] = np.nan
        unusable |= beyond
    if block.taken is not None:
        taken = np.stack(
            [of_runs(runs, data.shape[1:]) for runs in block.taken[start - block.start : stop - block.start]]
        )
        left = np.sum(~(unusable | taken), axis=(1, 2))
        unusable |= taken & (left >= LEAST)[:, None, None]
    return Stack(data, unusable, noise)


def _stored(layout: Layout, hdu: Hdu, pixels: Pixels, which: _Which) -> np.ndarray:
    """Planes or stamps as stored: ``(n, ny, nx)``, neither scaled nor in native byte order."""
    if hdu.problem:
        raise ValueError(hdu.problem)
    start, stop = (which.start, which.stop) if isinstance(which, range) else which.planes()
    if not 0 <= start < stop <= pixels.planes:
        msg = f"it has {pixels.planes} planes, wanted {start} to {stop - 1}"
        raise ValueError(msg)
    if isinstance(which, _Cuts):
        return _stamps(layout, hdu, pixels, which)
    if hdus.is_tiled(hdu):
        return _tiles(layout, hdu, pixels, start, stop)
    first, last = start // pixels.per_row, -(-stop // pixels.per_row)
    with open(layout.path, "rb") as stream:
        stream.seek(hdu.data + first * pixels.row_bytes)
        buffer = np.fromfile(stream, np.uint8, (last - first) * pixels.row_bytes)
    if len(buffer) < (last - first) * pixels.row_bytes:
        raise OSError(errno.EIO, "the file ended too early")  # NumPy swallows what the system said
    line = pixels.nx * pixels.dtype.itemsize
    shape = (last - first, pixels.per_row, pixels.ny, pixels.nx)
    strides = (pixels.row_bytes, pixels.ny * line, line, pixels.dtype.itemsize)
    planes = np.ndarray(shape, pixels.dtype, buffer.data, pixels.offset, strides).reshape(-1, pixels.ny, pixels.nx)
    return planes[start - first * pixels.per_row :][: stop - start]


def _stamps(layout: Layout, hdu: Hdu, pixels: Pixels, cuts: _Cuts) -> np.ndarray:
    """Stamps as stored, 0 beyond the edges: slices of one plane after the other, of which no copy is made."""
    ny, nx = cuts.shape
    of, changed_ns = cuts.stamps[:, 0], os.stat(layout.path).st_mtime_ns
    result = None
    for number in np.unique(of).tolist():
        if hdus.is_tiled(hdu):
            plane = _tiled_plane(layout.path, changed_ns, hdu.number, number)
        else:
            plane = _mapped_plane(layout, hdu, pixels, number)
        if result is None:  # decoders have their own idea of byte order
            result = np.zeros((len(of), ny, nx), plane.dtype)
        for i in np.flatnonzero(of == number).tolist():
            x, y = cuts.stamps[i, 2:].tolist()
            left, low = max(-x, 0), max(-y, 0)
            part = plane[y + low : max(y + ny, 0), x + left : max(x + nx, 0)]
            result[i, low : low + part.shape[0], left : left + part.shape[1]] = part
    assert result is not None
    return result


def _inside(cuts: _Cuts, pixels: Pixels) -> np.ndarray:
    """Which pixels of stamps lie in the plane, bool (n, ny, nx)."""
    ny, nx = cuts.shape
    x, y = cuts.stamps[:, 2, None] + np.arange(nx), cuts.stamps[:, 3, None] + np.arange(ny)
    return ((y >= 0) & (y < pixels.ny))[:, :, None] & ((x >= 0) & (x < pixels.nx))[:, None, :]


def _mapped_plane(layout: Layout, hdu: Hdu, pixels: Pixels, plane: int) -> np.ndarray:
    """A plane where it lies in the file: what is not looked at is not read."""
    row, place = divmod(plane, pixels.per_row)
    offset = hdu.data + row * pixels.row_bytes + pixels.offset + place * pixels.ny * pixels.nx * pixels.dtype.itemsize
    return np.asarray(np.memmap(layout.path, pixels.dtype, "r", offset, (pixels.ny, pixels.nx)))


@lru_cache(maxsize=4)
def _tiled_plane(path: str, changed_ns: int, number: int, plane: int) -> np.ndarray:
    """A tile-compressed plane, remembered with those of its mask and map: many batches of stamps come from it."""
    layout = hdus.layout(path)
    hdu = layout.hdus[number]
    return _tiles(layout, hdu, hdus.pixels(hdu, None), plane, plane + 1)[0]


def _tiles(layout: Layout, hdu: Hdu, pixels: Pixels, start: int, stop: int) -> np.ndarray:
    shape = hdus.axes(hdu)[:1:-1]
    long = [axis for axis, length in enumerate(shape) if length > 1]
    # A range of planes is one section if at most one of the further axes is longer than 1; else it is read by planes.
    ranges = [(start, stop)] if len(long) < 2 else [(plane, plane + 1) for plane in range(start, stop)]
    sections = []
    for first, last in ranges:
        section = [slice(int(at), int(at) + 1) for at in np.unravel_index(first, shape)]
        if long:
            section[long[-1]] = slice(section[long[-1]].start, section[long[-1]].start + last - first)
        sections.append((*section, slice(0, pixels.ny), slice(0, pixels.nx)))
    with open(layout.path, "rb") as stream:
        hdus.check_tiles(stream, hdu, start, stop)
    parts = None
    if not any(other.problem for other in layout.hdus):  # fitsio looks at them all, and some would crash it
        parts = _tiles_by_fitsio(layout, hdu, sections)
    if parts is None:
        parts = _tiles_by_astropy(layout, hdu, sections)
    if sum(part.size for part in parts) != (stop - start) * pixels.ny * pixels.nx:
        msg = "its compressed pixels are not as many as its header promises"
        raise ValueError(msg)
    planes = [part.reshape(-1, pixels.ny, pixels.nx) for part in parts]
    return planes[0] if len(planes) == 1 else np.concatenate(planes)  # a large one is not to be copied


def _tiles_by_fitsio(layout: Layout, hdu: Hdu, sections: list) -> list[np.ndarray] | None:
    """Tiles as stored, or None for what fitsio cannot decode, as 64-bit integers and tiles that are not compressed."""
    try:
        image = _open_tiles(layout.path, os.stat(layout.path).st_mtime_ns)[hdu.number]
        image.ignore_scaling = True
        return [image[section] for section in sections]
    except (OSError, ValueError, TypeError, AttributeError, SystemError):  # it raises all of these for broken data
        return None


@lru_cache(maxsize=2)
def _open_tiles(path: str, mtime_ns: int) -> fitsio.FITS:
    """Remembered because fitsio looks at every HDU of a file to open it."""
    with tempfile.TemporaryDirectory() as folder:
        alias = os.path.join(folder, "tiles.fits")  # a name without meaning
        os.symlink(os.path.abspath(path), alias)
        return fitsio.FITS(alias)


def _tiles_by_astropy(layout: Layout, hdu: Hdu, sections: list) -> list[np.ndarray]:
    """Tiles as stored, of this HDU alone: others may be broken."""
    with open(layout.path, "rb") as stream:
        stream.seek(hdu.header)
        alone = stream.read(hdu.end - hdu.header)
    padded = fits.PrimaryHDU().header.tostring().encode() + alone + bytes(-len(alone) % hdus.BLOCK)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fits.open(io.BytesIO(padded), do_not_scale_image_data=True) as file:
                return [np.asarray(file[1].section[section]) for section in sections]
    except Exception as error:  # decoders raise whatever they meet in broken data
        msg = "its compressed pixels cannot be decoded"
        raise ValueError(msg) from error


def _physical(stored: np.ndarray, pixels: Pixels) -> tuple[np.ndarray, np.ndarray]:
    """Values as float32 where that is exact, else float64, and where there are none (True; NaN in the values)."""
    scale, zero = pixels.scale, pixels.zero
    kind, size = stored.dtype.kind, stored.dtype.itemsize
    scaled = (scale, zero) != (1, 0)
    whole = float(scale).is_integer() and float(zero).is_integer()
    if kind == "f":
        narrow = size == 4 and not scaled
    else:
        narrow = size <= 2 and whole and abs(scale) * 2**15 + abs(zero) <= 2**24
    if kind == "i" and size == 8 and (scale, zero) == (1, 2**63):
        data = _wrapped(stored, pixels).astype(np.float64)  # near 0 a sum of large floats would lose every digit
    else:
        data = stored.astype(np.float32 if narrow else np.float64)
        if scaled:
            with np.errstate(over="ignore", invalid="ignore"):
                data *= scale
                data += zero
    missing = ~np.isfinite(data)
    if pixels.blank is not None:
        missing |= stored == pixels.blank
    data[missing] = np.nan
    return data, missing


def _wrapped(stored: np.ndarray, pixels: Pixels) -> np.ndarray:
    """Integers plus a whole ``zero``, modulo 2^64: exact for the unsigned convention of FITS, and for bits."""
    return stored.astype(np.int64).view(np.uint64) + np.uint64(int(pixels.zero) % 2**64)


# ---- masks and maps


def _saturation(setting: float | str, layout: Layout, hdu: Hdu, dtype: np.dtype) -> np.generic:
    """The value of saturated pixels, as pixels of this type have it."""
    level = setting
    if isinstance(setting, str):
        key = setting.strip().upper()
        cards = next((cards for cards in (hdu.cards, layout.hdus[0].cards) if key in cards), {})
        level = hdus.number(cards, key, np.nan)
        if np.isnan(level):
            got = f"{key} = {hdus.text(cards, key)}" if cards else f"its header has no {key}"
            msg = f"{got}, wanted the value of saturated pixels (images.saturation)"
            raise ValueError(msg)
    with np.errstate(over="ignore"):
        return dtype.type(level)


def _as_map(setting: Any) -> _Map:
    if not isinstance(setting, dict):
        return _Map(None, setting, None, (), "sigma")
    for kind in ("variance", "weight"):
        if kind in setting:
            return _as_map(setting[kind])._replace(kind=kind)
    bits = tuple(setting.get("bits") or ())
    return _Map(setting.get("files"), setting.get("hdu"), setting.get("column"), bits, "sigma")


def _read_map(block: Block, of: Hdu, planes: int, which: _Which, wanted: _Map) -> tuple[np.ndarray, Pixels]:
    """Stored planes or stamps of a map, those of the images or of the one plane there is, and how they lie."""
    files = [block.file] if wanted.files is None else _companions(block.file, wanted.files)
    if len(files) > 1:
        msg = f"{block.file}: {len(files)} files match {wanted.files}, wanted one ({hdus.few(files, 2)})"
        raise ValueError(msg)
    try:
        layout = hdus.layout(files[0])
        hdu, pixels = _map_hdu(layout.hdus, of, wanted)
        if (pixels.ny, pixels.nx) != (block.ny, block.nx) or pixels.planes not in (1, planes):
            got = f"{pixels.planes} x {pixels.ny} x {pixels.nx} (planes, NAXIS2, NAXIS1)"
            msg = f"HDU {hdu.number} is {got}, wanted 1 or {planes} x {block.ny} x {block.nx} as in {block.file}"
            raise ValueError(msg)
        if pixels.planes == 1:
            which = range(1) if isinstance(which, range) else which._replace(stamps=which.stamps * [0, 1, 1, 1])
        return _stored(layout, hdu, pixels, which), pixels
    except hdus.TROUBLE as error:
        msg = f"{files[0]}: {hdus.sentence(error)}"
        raise ValueError(msg) from error


def _map_hdu(there: tuple[Hdu, ...], of: Hdu, wanted: _Map) -> tuple[Hdu, Pixels]:
    if wanted.hdu is None or wanted.hdu == "auto":
        candidates = [*there[of.number : of.number + 1], *there]
    else:
        candidates = _matching(there, wanted.hdu)
        if not candidates:
            raise ValueError(hdus.absent(there, wanted.hdu))
    if len(candidates) > 1 and wanted.hdu not in (None, "auto"):
        version = hdus.number(of.cards, "EXTVER", 1)
        same = [hdu for hdu in candidates if hdus.number(hdu.cards, "EXTVER", 1) == version]
        if len(same) != 1:
            found = f"{len(candidates)} HDUs are called {wanted.hdu}"
            msg = f"{found}, {len(same)} of them with EXTVER = {version} as the image's, wanted one"
            raise ValueError(msg)
        candidates = same
    reasons = []
    for hdu in candidates:
        try:
            return hdu, hdus.pixels(hdu, wanted.column)
        except ValueError as error:
            reasons.append(f"HDU {hdu.number} {error}")
    raise ValueError(reasons[0])


def _mask(stored: np.ndarray, pixels: Pixels, bits: tuple[int, ...]) -> np.ndarray:
    values, missing = _physical(stored, pixels)
    if not bits:
        return (values != 0) | missing
    chosen = np.uint64(sum({1 << bit for bit in bits}))
    # Bits of the integers themselves: a float would lose the lower ones of a 64-bit mask.
    exact = stored.dtype.kind in "iu" and pixels.scale == 1 and float(pixels.zero).is_integer()
    whole = _wrapped(stored, pixels) if exact else np.where(missing, 0, values).astype(np.int64).view(np.uint64)
    return (whole & chosen != 0) | missing


def _sigma(values: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if kind == "sigma":
            return values
        return np.sqrt(values if kind == "variance" else 1 / values)


def _is_of_rows(hdu: Hdu, mask: _Map) -> bool:
    """Is a mask a column of the table that holds the images, with one whole number for each row?"""
    here = mask.files is None and mask.hdu in (None, hdu.number, hdus.name(hdu))
    return here and mask.column is not None and hdus.has_integer(hdu, mask.column)


# ---- headers and cells


def read_carried(
    block: Block, start: int, stop: int, *, carry: Sequence[str] = (), column: str | None = None, **_: Any
) -> dict[str, list[Value]]:
    """What goes along with images ``start`` to ``stop - 1`` of an HDU, by name, a value an image.

    A name is looked up in the table of positions, in the table that holds the images, in the header of the HDU and in
    the first one; where none of them has it the values are missing.

    Raises
    ------
    ValueError
        A sentence that names the file: it cannot be read, or a column has neither one number nor text a row.
    """
    found = {}
    for name in carry:
        listed = [] if block.carried is None else block.carried[start - block.start : stop - block.start]
        if listed and name in listed[0]:
            found[name] = [of_source[name] for of_source in listed]
        else:
            cells = None if column is None else _cells(block, start, stop, column, name)
            found[name] = [_keyword(block, name)] * (stop - start) if cells is None else cells
    return found


def spoilt(
    block: Block, start: int, stop: int, *, column: str | None = None, mask: Any = None, **_: Any
) -> dict[int, str]:
    """Why images among ``start`` to ``stop - 1`` of an HDU are not to be used at all, by their number.

    They are in rows of a table that the mask, a column of the same table with one whole number a row, spoils: it is not
    0 there, or missing, or with ``bits`` one of these bits is set.

    Raises
    ------
    ValueError
        A sentence that names the file: it cannot be read.
    """
    masks = _as_map(mask)
    if column is None or masks.column is None:
        return {}
    try:
        if not _is_of_rows(hdus.layout(block.file).hdus[block.hdu], masks):
            return {}
    except hdus.TROUBLE as error:
        msg = f"{block.file}: HDU {block.hdu}: {hdus.sentence(error)}"
        raise ValueError(msg) from error
    bad = sum({1 << bit for bit in masks.bits}) or -1
    values = _cells(block, start, stop, column, masks.column) or []
    return {
        number: f"{masks.column} of its row is {'missing' if value is None else value} (images.mask)"
        for number, value in enumerate(values, start)
        if value is None or int(value) & bad
    }


def _keyword(block: Block, name: str) -> Value:
    headers = (_header(block.file, number, block.version) for number in (block.hdu, 0))
    return next((plain(header[name]) for header in headers if name in header), None)


@lru_cache(maxsize=2)
def _header(file: str, hdu: int, _version: int) -> fits.Header:
    """Remembered for names that are looked up one after the other."""
    return read_header(file, hdu)


def _cells(block: Block, start: int, stop: int, column: str, name: str) -> list[Value] | None:
    """Cells of another column of the table that holds the images, or None if it has no such column."""
    try:
        layout = hdus.layout(block.file)
        hdu = layout.hdus[block.hdu]
        cell = hdus.cell(hdu, name)
        if cell is None:
            return None
        if hdu.problem:
            raise ValueError(hdu.problem)
        pixels = hdus.pixels(hdu, column)
        whole = np.memmap(layout.path, np.uint8, "r")
        count = pixels.planes // pixels.per_row
        stored = np.ndarray((count,), cell.dtype, whole.data, hdu.data + cell.offset, (pixels.row_bytes,))
        planes, _sources = identities(block, start, stop)
        return [cell.value(one) for one in stored[planes // pixels.per_row]]
    except hdus.TROUBLE as error:
        msg = f"{block.file}: HDU {block.hdu}: {hdus.sentence(error)}"
        raise ValueError(msg) from error
