"""Planes of an HDU, or stamps cut out of them, as arrays: as stored, and as physical values.

Plain pixels and table columns are a read and a byte swap at the place that `places` tells.
"""

import errno
import os
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipeline import hdus, places
from pipeline.hdus import Hdu, Layout
from pipeline.places import Pixels
from pipeline.tiles import read_tiles


class Cuts(NamedTuple):
    """Stamps (n, 4) as in `Block`, at least one, all of one shape (ny, nx)."""

    stamps: np.ndarray
    shape: tuple[int, int]

    def planes(self) -> tuple[int, int]:
        """The first plane that is needed, and the one after the last."""
        return int(self.stamps[:, 0].min()), int(self.stamps[:, 0].max()) + 1


#: Planes by number, or stamps.
Which = range | Cuts


def stored(layout: Layout, hdu: Hdu, pixels: Pixels, which: Which) -> np.ndarray:
    """Planes or stamps as stored: ``(n, ny, nx)``, neither scaled nor in native byte order."""
    if hdu.problem:
        raise ValueError(hdu.problem)
    start, stop = (which.start, which.stop) if isinstance(which, range) else which.planes()
    if not 0 <= start < stop <= pixels.planes:
        msg = f"it has {pixels.planes} planes, wanted {start} to {stop - 1}"
        raise ValueError(msg)
    if isinstance(which, Cuts):
        return _stamps(layout, hdu, pixels, which)
    if hdus.is_tiled(hdu):
        return read_tiles(layout, hdu, pixels, start, stop)
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


def _stamps(layout: Layout, hdu: Hdu, pixels: Pixels, cuts: Cuts) -> np.ndarray:
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


def inside(cuts: Cuts, pixels: Pixels) -> np.ndarray:
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
    return read_tiles(layout, hdu, places.pixels(hdu, None), plane, plane + 1)[0]


def physical(stored: np.ndarray, pixels: Pixels) -> tuple[np.ndarray, np.ndarray]:
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
        data = wrapped(stored, pixels).astype(np.float64)  # near 0 a sum of large floats would lose every digit
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


def wrapped(stored: np.ndarray, pixels: Pixels) -> np.ndarray:
    """Integers plus a whole ``zero``, modulo 2^64: exact for the unsigned convention of FITS, and for bits."""
    return stored.astype(np.int64).view(np.uint64) + np.uint64(int(pixels.zero) % 2**64)
