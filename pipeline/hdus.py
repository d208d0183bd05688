"""What a FITS file holds: its HDUs. Reads headers, never a pixel.

A header is only a claim. Each is held here against the bytes that are there, so that nothing is allocated on its word,
and a broken HDU does not hide the good ones before and after it. What cannot be used is told in words for users.
"""

import bz2
import gzip
import math
import os
import stat
import tempfile
import weakref
import zlib
from functools import lru_cache
from typing import IO, NamedTuple

from pipeline import keywords

#: What reading a file may raise; of memory, because one image may be too large where the next is not.
TROUBLE = (ValueError, OSError, MemoryError)

#: What compressed data may grow to: a decompressed file in bytes, a tile-compressed plane in pixels. Beyond it the
#: reason asks for decompression first, and then the size of the file itself proves the claim.
MAX_FILE = 2**32
MAX_PLANE = 2**29

#: Pixels that a byte of a tile-compressed image may stand for in planes of more than SMALL_PLANE pixels: gzip comes to
#: 1032, a mask of nothing in PLIO to some thousands.
MAX_RATIO, SMALL_PLANE = 2**13, 2**24


class Hdu(NamedTuple):
    """Bytes where header, data and padding begin, keywords as in the file, why the data are no use ("" if they are)."""

    number: int
    header: int
    data: int
    end: int
    cards: dict[str, str]
    problem: str


class Layout(NamedTuple):
    """A plain FITS file, which is the file itself or its decompressed ``copy``, and its HDUs."""

    path: str
    copy: "_Copy | None"
    hdus: tuple[Hdu, ...]


class _Copy:
    """A temporary file, deleted with the last layout that uses it."""

    def __init__(self, path: str) -> None:
        weakref.finalize(self, os.unlink, path)


# ---- files


def status(file: str) -> os.stat_result:
    """Status of a regular file with bytes in it, else a ValueError. Opens nothing: to open a pipe is to hang."""
    try:
        found = os.stat(file)
    except FileNotFoundError:
        msg = "a link to a file that is gone" if os.path.islink(file) else "no such file"
        raise ValueError(msg) from None
    except (OSError, ValueError) as error:
        raise ValueError(unreadable(error)) from None
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFSOCK: "a socket"}
        msg = f"{kinds.get(stat.S_IFMT(found.st_mode), 'a device')}, not a file"
        raise ValueError(msg)
    if found.st_size == 0:
        msg = "the file is empty (0 bytes)"
        raise ValueError(msg)
    return found


def sentence(error: Exception) -> str:
    """What is wrong with a file, of an error that is one of TROUBLE."""
    return str(error) if isinstance(error, ValueError) else unreadable(error)


def absent(there: tuple[Hdu, ...], wanted: int | str) -> str:
    """Sentence for an HDU that is not there."""
    if isinstance(wanted, int):
        return f"no HDU {wanted}: the file has HDUs 0 to {len(there) - 1}"
    return f"no HDU is called {wanted}: the file has {few([name(hdu) or str(hdu.number) for hdu in there])}"


def unreadable(error: Exception) -> str:
    """Sentence for an error of the operating system, or lack of memory."""
    if isinstance(error, PermissionError):
        return "no permission to read it"
    return f"it cannot be read: {getattr(error, 'strerror', None) or str(error) or 'not enough memory'}"


def layout(file: str) -> Layout:
    """Layout of a FITS file, plain or in gzip or bzip2; ValueError with a reason if there is none."""
    found = status(file)
    try:
        return _read_layout(file, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise ValueError(unreadable(error)) from None


@lru_cache(maxsize=4)
def _read_layout(file: str, size: int, mtime_ns: int) -> Layout:
    """Remembered for a few files: a stack is read in many chunks, and needs the layouts of its mask and map too."""
    with open(file, "rb") as stream:
        magic = stream.read(3)
        if magic[:2] == b"\x1f\x8b":
            with gzip.open(stream.name) as packed:
                return _unpack(packed)
        if magic == b"BZh":
            with bz2.open(stream.name) as packed:
                return _unpack(packed)
        return Layout(file, None, _walk(stream, size, ""))


def _unpack(packed: gzip.GzipFile | bz2.BZ2File) -> Layout:
    """Layout of the decompressed copy; what comes before an error in the compressed data is kept."""
    handle, path = tempfile.mkstemp(suffix=".fits")
    note, size, copy = "", 0, _Copy(path)
    with open(handle, "w+b") as stream:
        try:
            while chunk := packed.read1(2**20):
                size += stream.write(chunk)
                if size > MAX_FILE:
                    msg = f"it decompresses to more than {MAX_FILE / 2**30:g} GiB: decompress it first"
                    raise ValueError(msg)
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's; the decoders' have no number
            note = " (the compressed data are broken)"
        return Layout(path, copy, _walk(stream, size, note))


def _walk(stream: IO[bytes], size: int, note: str) -> tuple[Hdu, ...]:
    """Every HDU of a file of ``size`` bytes. One that is broken keeps its number and has a ``problem``."""
    stream.seek(0)
    magic = stream.read(20)
    if not magic.startswith(b"SIMPLE"):
        raise ValueError(_not_fits(magic) + note)
    hdus: list[Hdu] = []
    at: int | None = 0
    while at is not None and at < size:
        cards, data, problem = keywords.read_cards(stream, at)
        end = data
        if not problem:
            try:
                end = data + keywords.data_size(cards)
                problem = _tile_problem(cards)
            except ValueError as error:
                problem = f"broken header: {error}"
        padded = -(-end // keywords.BLOCK) * keywords.BLOCK
        following: int | None = padded
        stream.seek(min(padded, size))
        after = stream.read(keywords.BLOCK)
        junk = 0
        if end > size or (after and not after.startswith(b"XTENSION=")):
            # Something is wrong: go on at the next header there is, wherever the claims of this one lead.
            following = _find_header(stream, data)
            if following is not None and following < end:
                problem = problem or "its header promises more data than lie before the next HDU"
            elif end > size:
                there = max(size - data, 0)
                problem = problem or f"truncated: its header promises {end - data} bytes of data, {there} are there"
            elif not problem and after.strip(b"\0 "):
                junk = (following or size) - padded
        hdus.append(Hdu(len(hdus), at, data, end, cards, problem and problem + note))
        if junk:
            hdus.append(Hdu(len(hdus), padded, padded, padded, {}, f"{junk} bytes that are no HDU{note}"))
        at = following
    return tuple(hdus)


def _not_fits(magic: bytes) -> str:
    if not magic:
        return "nothing can be decompressed from it"
    if magic.startswith(b"version https://git"):
        return "not FITS: a Git LFS pointer, the file itself was never fetched (git lfs pull)"
    if magic.lstrip().startswith(b"<"):
        return "not FITS: it looks like a web page, perhaps a failed download"
    return f"not FITS: it does not begin with SIMPLE but with {magic.decode('latin-1')!r}"


def _find_header(stream: IO[bytes], at: int) -> int | None:
    stream.seek(at)
    while chunk := stream.read(1024 * keywords.BLOCK):
        for first in range(0, len(chunk), keywords.BLOCK):
            if chunk.startswith(b"XTENSION=", first):
                return at + first
        at += len(chunk)
    return None


# ---- HDUs


def axes(hdu: Hdu) -> list[int]:
    """Lengths of the axes of an image, NAXIS1 first, whether tile-compressed or not."""
    return keywords.axes(hdu.cards, "Z" if is_tiled(hdu) else "")


def is_tiled(hdu: Hdu) -> bool:
    """Is it a tile-compressed image, which is stored as a table?"""
    return keywords.text(hdu.cards, "ZIMAGE") == "T"


def is_table(hdu: Hdu) -> bool:
    """Is it a table that is no tile-compressed image?"""
    return keywords.text(hdu.cards, "XTENSION") in ("BINTABLE", "A3DTABLE", "TABLE") and not is_tiled(hdu)


def name(hdu: Hdu) -> str:
    """EXTNAME in capitals; PRIMARY for the first HDU if it has none."""
    return keywords.text(hdu.cards, "EXTNAME").upper() or ("PRIMARY" if hdu.number == 0 else "")


def matching(there: tuple[Hdu, ...], wanted: int | str) -> list[Hdu]:
    """The HDU of this number, or all of this name, in capitals or not."""
    if isinstance(wanted, int):
        return [there[wanted]] if 0 <= wanted < len(there) else []
    return [hdu for hdu in there if name(hdu) == wanted.strip().upper()]


def _tile_problem(cards: dict[str, str]) -> str:
    """Why a tile-compressed image cannot be what it claims: each tile is a row, and a plane must fit in memory."""
    if keywords.text(cards, "ZIMAGE") != "T":
        return ""
    keywords.bitpix(cards, "Z")
    wanted = sum(keywords.form(cards, i)[2] for i in keywords.fields(cards))
    there = keywords.whole_number(cards, "NAXIS1")
    if wanted > there:
        return f"its compressed tiles have columns of {wanted} bytes, and rows of {there}"
    lengths = keywords.axes(cards, "Z")
    sides = tile_sides(cards, lengths)
    if 0 in sides:
        return "its header promises compressed tiles without pixels"
    tiles = math.prod(-(-n // side) for n, side in zip(lengths, sides, strict=True))
    rows = keywords.whole_number(cards, "NAXIS2")
    if tiles != rows:
        return f"its header promises {tiles} compressed tiles, the table has {rows}"
    tile = math.prod(min(n, side) for n, side in zip(lengths, sides, strict=True))
    room = keywords.data_size(cards)
    if math.prod(lengths[2:]) > room or max(math.prod(lengths[:2]), tile) > max(SMALL_PLANE, MAX_RATIO * room):
        return f"its header promises {' x '.join(map(str, lengths))} compressed pixels in {room} bytes"
    if max(math.prod(lengths[:2]), tile) > MAX_PLANE:
        return f"it is compressed and has planes of {lengths[0]} x {lengths[1]} pixels: decompress it first"
    return ""


def tile_sides(cards: dict[str, str], lengths: list[int]) -> list[int]:
    """Sides of the compressed tiles of an image with axes of these lengths."""
    return [keywords.whole_number(cards, f"ZTILE{i}", n if i == 1 else 1) for i, n in enumerate(lengths, 1)]


def few(entries: list[str], limit: int = 6) -> str:
    """The first of many, for a message."""
    more = [f"{len(entries) - limit} more"] if len(entries) > limit else []
    return ", ".join([*entries[:limit], *more]) or "none"
