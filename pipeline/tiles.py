"""Pixels that are compressed tile by tile: looked at, then decoded by fitsio, and by astropy where fitsio cannot.

File names never reach fitsio: to the library under it ``a[1].fits`` is a filter and ``http:...`` a download.
"""

import io
import os
import tempfile
import warnings
import zlib
from functools import lru_cache
from typing import IO

import fitsio
import numpy as np
from astropy.io import fits

from pipeline import hdus, keywords
from pipeline.hdus import Hdu, Layout
from pipeline.places import Pixels


def _check(stream: IO[bytes], hdu: Hdu, start: int, stop: int) -> None:
    """Look at the compressed tiles of planes ``start`` to ``stop - 1`` before they are decoded.

    The library under fitsio takes memory without end for a gzip tile that ends too early, and believes the sizes that
    tiles of HCOMPRESS and PLIO tell of themselves, whatever memory it has for them.

    Raises
    ------
    ValueError
        A tile lies outside the file, is broken gzip or tells of another size than it has.
    """
    cards, lengths = hdu.cards, hdus.axes(hdu)
    sides = [*hdus.tile_sides(cards, lengths), 1]
    lengths.append(1)  # with a third axis there is one rule for all
    shape = [-(-n // side) for n, side in zip(lengths, sides, strict=True)]
    # Tiles are in the order of their pixels: the corners of the planes tell which rows of the table are theirs.
    corners = np.unravel_index(np.arange(start, stop), lengths[:1:-1])
    deep = [corner // side for corner, side in zip(corners, sides[:1:-1], strict=True)]
    layers = np.ravel_multi_index(deep, shape[:1:-1])
    layer = shape[0] * shape[1]
    first, last = int(layers.min()) * layer, int(layers.max() + 1) * layer
    row_bytes = keywords.whole_number(cards, "NAXIS1")
    stream.seek(hdu.data + first * row_bytes)
    rows = np.frombuffer(stream.read((last - first) * row_bytes), np.uint8).reshape(-1, row_bytes)
    heap = keywords.whole_number(cards, "THEAP", row_bytes * keywords.whole_number(cards, "NAXIS2"))
    room = hdu.end - hdu.data - heap
    places = np.unravel_index(np.arange(first, last), shape[::-1])
    ends = zip(places, sides[::-1], lengths[::-1], strict=True)
    pixels = np.prod([np.minimum(side, n - place * side) for place, side, n in ends], axis=0)
    offset = 0
    for i in keywords.fields(cards):
        _repeat, letter, width = keywords.form(cards, i)
        cells = rows[:, offset : offset + width]
        offset += width
        if letter not in "PQ":
            continue
        size, at = cells.copy().view(">i4" if letter == "P" else ">i8").astype(np.int64).reshape(-1, 2).T
        size *= keywords.WIDTH.get(keywords.text(cards, f"TFORM{i}").lstrip("01")[1:2], 1)
        if (size < 0).any() or (at < 0).any() or (size > room - at).any():
            msg = "some of its compressed tiles lie outside the file"
            raise ValueError(msg)
        codec = (
            "GZIP"
            if keywords.text(cards, f"TTYPE{i}") == "GZIP_COMPRESSED_DATA"
            else keywords.text(cards, "ZCMPTYPE").split("_")[0]
        )
        for tile in np.flatnonzero(size) if codec in _WHOLE else ():
            stream.seek(hdu.data + heap + int(at[tile]))
            if not _WHOLE[codec](stream.read(int(size[tile])), int(pixels[tile])):
                msg = "some of its compressed tiles are broken"
                raise ValueError(msg)


def _whole_gzip(packed: bytes, pixels: int) -> bool:
    try:
        decoder = zlib.decompressobj(wbits=47)  # gzip or zlib
        decoder.decompress(packed, 8 * pixels + 1)
        return decoder.eof
    except zlib.error:
        return False


def _whole_hcompress(packed: bytes, pixels: int) -> bool:
    """Magic number, nx and ny; the numbers of bit planes of the three parts of the transform are bytes 22 to 24."""
    ny, nx = np.frombuffer(packed[2:10].ljust(8, b"\0"), ">i4").tolist()
    return (
        packed.startswith(b"\xdd\x99") and min(nx, ny) > 0 and nx * ny == pixels and max(packed[22:25], default=99) < 64
    )


def _whole_plio(packed: bytes, pixels: int) -> bool:
    """Its length in words is the third of them, or if that is 0 the fourth and, in units of 2^15, the fifth."""
    words = np.frombuffer(packed[:10].ljust(10, b"\0"), ">i2").tolist()
    return 2 * (words[2] if words[2] > 0 else (words[4] << 15) + words[3]) == len(packed)


#: Whether a tile of so many pixels is what it tells of itself, by codec.
_WHOLE = {"GZIP": _whole_gzip, "HCOMPRESS": _whole_hcompress, "PLIO": _whole_plio}


def read_tiles(layout: Layout, hdu: Hdu, pixels: Pixels, start: int, stop: int) -> np.ndarray:
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
        _check(stream, hdu, start, stop)
    parts = None
    if not any(other.problem for other in layout.hdus):  # fitsio looks at them all, and some would crash it
        parts = _by_fitsio(layout, hdu, sections)
    if parts is None:
        parts = _by_astropy(layout, hdu, sections)
    if sum(part.size for part in parts) != (stop - start) * pixels.ny * pixels.nx:
        msg = "its compressed pixels are not as many as its header promises"
        raise ValueError(msg)
    planes = [part.reshape(-1, pixels.ny, pixels.nx) for part in parts]
    return planes[0] if len(planes) == 1 else np.concatenate(planes)  # a large one is not to be copied


def _by_fitsio(layout: Layout, hdu: Hdu, sections: list) -> list[np.ndarray] | None:
    """Tiles as stored, or None for what fitsio cannot decode, as 64-bit integers and tiles that are not compressed."""
    try:
        image = _open(layout.path, os.stat(layout.path).st_mtime_ns)[hdu.number]
        image.ignore_scaling = True
        return [image[section] for section in sections]
    except (OSError, ValueError, TypeError, AttributeError, SystemError):  # it raises all of these for broken data
        return None


@lru_cache(maxsize=2)
def _open(path: str, mtime_ns: int) -> fitsio.FITS:
    """Remembered because fitsio looks at every HDU of a file to open it."""
    with tempfile.TemporaryDirectory() as folder:
        alias = os.path.join(folder, "tiles.fits")  # a name without meaning
        os.symlink(os.path.abspath(path), alias)
        return fitsio.FITS(alias)


def _by_astropy(layout: Layout, hdu: Hdu, sections: list) -> list[np.ndarray]:
    """Tiles as stored, of this HDU alone: others may be broken."""
    with open(layout.path, "rb") as stream:
        stream.seek(hdu.header)
        alone = stream.read(hdu.end - hdu.header)
    padded = fits.PrimaryHDU().header.tostring().encode() + alone + bytes(-len(alone) % keywords.BLOCK)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fits.open(io.BytesIO(padded), do_not_scale_image_data=True) as file:
                return [np.asarray(file[1].section[section]) for section in sections]
    except Exception as error:  # decoders raise whatever they meet in broken data
        msg = "its compressed pixels cannot be decoded"
        raise ValueError(msg) from error
