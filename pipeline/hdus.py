"""What a FITS file holds: its HDUs, and where the planes of an image lie. Reads headers, never a pixel.

A header is only a claim. Each is held here against the bytes that are there, so that nothing is allocated on its word,
and a broken HDU does not hide the good ones before and after it. What cannot be used is told in words for users.
"""

import bz2
import gzip
import math
import os
import re
import stat
import tempfile
import weakref
import zlib
from functools import lru_cache
from typing import IO, Any, NamedTuple

import numpy as np

from pipeline.carry import Value, plain

#: What reading a file may raise; of memory, because one image may be too large where the next is not.
TROUBLE = (ValueError, OSError, MemoryError)

#: What compressed data may grow to: a decompressed file in bytes, a tile-compressed plane in pixels. Beyond it the
#: reason asks for decompression first, and then the size of the file itself proves the claim.
MAX_FILE = 2**32
MAX_PLANE = 2**29

#: Pixels that a byte of a tile-compressed image may stand for in planes of more than SMALL_PLANE pixels: gzip comes to
#: 1032, a mask of nothing in PLIO to some thousands.
MAX_RATIO, SMALL_PLANE = 2**13, 2**24

BLOCK = 2880
_MAX_HEADER = 2**24
_BITPIX = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}
_LETTER = {"B": "u1", "I": ">i2", "J": ">i4", "K": ">i8", "E": ">f4", "D": ">f8"}
WIDTH = {"L": 1, "B": 1, "A": 1, "I": 2, "J": 4, "E": 4, "K": 8, "D": 8, "C": 8, "P": 8, "M": 16, "Q": 16}


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


class Pixels(NamedTuple):
    """How planes of ``(ny, nx)`` lie in the data: ``per_row`` of them from byte ``offset`` of every ``row_bytes``.

    Their values are ``zero + scale * stored``; ``blank`` is the stored integer that means nothing is there.
    """

    planes: int
    ny: int
    nx: int
    dtype: np.dtype
    row_bytes: int
    offset: int
    per_row: int
    scale: float
    zero: float
    blank: float | None


class Cell(NamedTuple):
    """How single values lie in the rows of a table: ``letter`` is that of TFORM, the rest as in `Pixels`."""

    letter: str
    dtype: np.dtype
    offset: int
    scale: float
    zero: float
    blank: float | None

    def value(self, stored: Any) -> Value:
        """The value of a cell; None where there is none."""
        if self.letter in "AL":
            return plain(bytes(stored)) if self.letter == "A" else {b"T": 1, b"F": 0}.get(bytes(stored))
        if stored == self.blank:
            return None
        if self.dtype.kind in "iu" and self.scale == 1 and float(self.zero).is_integer():
            return int(stored) + int(self.zero)  # exact, also in the unsigned convention
        return plain(float(stored) * self.scale + self.zero)


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
        cards, data, problem = _cards(stream, at)
        end = data
        if not problem:
            try:
                end = data + _data_size(cards)
                problem = _tile_problem(cards)
            except ValueError as error:
                problem = f"broken header: {error}"
        padded = -(-end // BLOCK) * BLOCK
        following: int | None = padded
        stream.seek(min(padded, size))
        after = stream.read(BLOCK)
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


# ---- headers


def _cards(stream: IO[bytes], at: int) -> tuple[dict[str, str], int, str]:
    """Keywords of the header at byte ``at`` (the first of each name), the byte where its data begin, and a problem."""
    cards: dict[str, str] = {}
    stream.seek(at)
    end = at
    while end - at < _MAX_HEADER and (block := stream.read(BLOCK)):
        if end > at and block.startswith(b"XTENSION="):
            break
        end += BLOCK
        text = block.decode("latin-1")
        for first in range(0, len(text), 80):
            if text[first + 8 : first + 9] == "=":
                cards.setdefault(text[first : first + 8].rstrip(), text[first + 9 : first + 80])
            elif text.startswith("HIERARCH ", first):
                long, _, value = text[first + 9 : first + 80].partition("=")
                cards.setdefault(long.strip().upper(), value)
            elif text[first : first + 8].rstrip() == "END":
                return cards, end, ""
    return cards, end, "broken header: it has no END"


def _find_header(stream: IO[bytes], at: int) -> int | None:
    stream.seek(at)
    while chunk := stream.read(1024 * BLOCK):
        for first in range(0, len(chunk), BLOCK):
            if chunk.startswith(b"XTENSION=", first):
                return at + first
        at += len(chunk)
    return None


def text(cards: dict[str, str], key: str, default: str = "") -> str:
    """Value of a keyword without quotes and comment; what cannot be printed is ``?``."""
    raw = cards.get(key)
    if raw is None:
        return default
    quoted = re.match(r"\s*'((?:[^']|'')*)", raw)
    value = quoted[1].replace("''", "'").strip() if quoted else raw.split("/")[0].strip()
    return value if value.isprintable() else "".join(c if c.isprintable() else "?" for c in value)


def number(cards: dict[str, str], key: str, default: float) -> float:
    """Value of a keyword as int or float; the default if it is missing or no number."""
    shown = text(cards, key).upper().replace("D", "E")
    for convert in (int, float):
        try:
            return convert(shown)
        except ValueError:
            continue
    return default


def whole_number(cards: dict[str, str], key: str, default: int | None = None) -> int:
    """Value of a keyword that counts; ValueError if it is no whole number from 0, or missing without a default."""
    if key not in cards and default is not None:
        return default
    value = number(cards, key, -1)
    if not 0 <= value < 2**63 or value != math.floor(value):
        msg = f"{key} = {text(cards, key)}, wanted a whole number" if key in cards else f"{key} is missing"
        raise ValueError(msg)
    return int(value)


def axes(hdu: Hdu) -> list[int]:
    """Lengths of the axes of an image, NAXIS1 first, whether tile-compressed or not."""
    return _axes(hdu.cards, "Z" if is_tiled(hdu) else "")


def _axes(cards: dict[str, str], prefix: str = "") -> list[int]:
    count = whole_number(cards, f"{prefix}NAXIS")
    if count > 999:
        msg = f"{prefix}NAXIS = {count}, wanted at most 999"
        raise ValueError(msg)
    return [whole_number(cards, f"{prefix}NAXIS{i}") for i in range(1, count + 1)]


def _bitpix(cards: dict[str, str], prefix: str = "") -> int:
    value = number(cards, f"{prefix}BITPIX", 0)
    if value not in _BITPIX:
        msg = f"{prefix}BITPIX = {text(cards, f'{prefix}BITPIX', 'missing')}, wanted 8, 16, 32, 64, -32 or -64"
        raise ValueError(msg)
    return int(value)


def _data_size(cards: dict[str, str]) -> int:
    lengths = _axes(cards)
    if not lengths:
        return 0
    groups = _is_groups(cards)
    pixels = math.prod(lengths[1:] if groups else lengths)
    if groups or "XTENSION" in cards:
        pixels = whole_number(cards, "GCOUNT", 1) * (whole_number(cards, "PCOUNT", 0) + pixels)
    return abs(_bitpix(cards)) // 8 * pixels


def _is_groups(cards: dict[str, str]) -> bool:
    return text(cards, "GROUPS") == "T" and number(cards, "NAXIS1", -1) == 0 and "XTENSION" not in cards


def is_tiled(hdu: Hdu) -> bool:
    """Is it a tile-compressed image, which is stored as a table?"""
    return text(hdu.cards, "ZIMAGE") == "T"


def is_table(hdu: Hdu) -> bool:
    """Is it a table that is no tile-compressed image?"""
    return text(hdu.cards, "XTENSION") in ("BINTABLE", "A3DTABLE", "TABLE") and not is_tiled(hdu)


def name(hdu: Hdu) -> str:
    """EXTNAME in capitals; PRIMARY for the first HDU if it has none."""
    return text(hdu.cards, "EXTNAME").upper() or ("PRIMARY" if hdu.number == 0 else "")


# ---- images


def _tile_problem(cards: dict[str, str]) -> str:
    """Why a tile-compressed image cannot be what it claims: each tile is a row, and a plane must fit in memory."""
    if text(cards, "ZIMAGE") != "T":
        return ""
    _bitpix(cards, "Z")
    wanted, there = sum(form(cards, i)[2] for i in fields(cards)), whole_number(cards, "NAXIS1")
    if wanted > there:
        return f"its compressed tiles have columns of {wanted} bytes, and rows of {there}"
    lengths = _axes(cards, "Z")
    sides = tile_sides(cards, lengths)
    if 0 in sides:
        return "its header promises compressed tiles without pixels"
    tiles = math.prod(-(-n // side) for n, side in zip(lengths, sides, strict=True))
    rows = whole_number(cards, "NAXIS2")
    if tiles != rows:
        return f"its header promises {tiles} compressed tiles, the table has {rows}"
    tile = math.prod(min(n, side) for n, side in zip(lengths, sides, strict=True))
    room = _data_size(cards)
    if math.prod(lengths[2:]) > room or max(math.prod(lengths[:2]), tile) > max(SMALL_PLANE, MAX_RATIO * room):
        return f"its header promises {' x '.join(map(str, lengths))} compressed pixels in {room} bytes"
    if max(math.prod(lengths[:2]), tile) > MAX_PLANE:
        return f"it is compressed and has planes of {lengths[0]} x {lengths[1]} pixels: decompress it first"
    return ""


def tile_sides(cards: dict[str, str], lengths: list[int]) -> list[int]:
    """Sides of the compressed tiles of an image with axes of these lengths."""
    return [whole_number(cards, f"ZTILE{i}", n if i == 1 else 1) for i, n in enumerate(lengths, 1)]


def matching(there: tuple[Hdu, ...], wanted: int | str) -> list[Hdu]:
    """The HDU of this number, or all of this name, in capitals or not."""
    if isinstance(wanted, int):
        return [there[wanted]] if 0 <= wanted < len(there) else []
    return [hdu for hdu in there if name(hdu) == wanted.strip().upper()]


def pixels(hdu: Hdu, column: str | None) -> Pixels:
    """Where the planes are: of an image, or with ``column`` of a table. ValueError: why the HDU holds no images."""
    cards = hdu.cards
    if is_table(hdu) != (column is not None):
        msg = "is a table" if column is None else "is no table"
        raise ValueError(msg)
    if column is not None:
        return _column(cards, column)
    lengths = axes(hdu)
    msg = ""
    if _is_groups(cards):
        msg = "holds random groups (visibilities), not an image"
    elif len(lengths) < 2:
        msg = "has only one axis" if lengths else "has no pixels"
    elif 0 in lengths:
        msg = f"has no pixels: its axes are {' x '.join(map(str, lengths))}"
    if msg:
        raise ValueError(msg)
    prefix = "Z" if is_tiled(hdu) else ""
    dtype = np.dtype(_BITPIX[_bitpix(cards, prefix)])
    nx, ny, *more = lengths
    scale, zero = number(cards, "BSCALE", 1), number(cards, "BZERO", 0)
    blank = _blank(cards, "BLANK" if "BLANK" in cards else f"{prefix}BLANK", dtype)
    return Pixels(math.prod(more), ny, nx, dtype, ny * nx * dtype.itemsize, 0, 1, scale, zero, blank)


def _blank(cards: dict[str, str], key: str, dtype: np.dtype) -> float | None:
    """The value that means nothing is there: of integers only, and only one that the type can hold."""
    value = number(cards, key, math.nan)
    return value if dtype.kind in "iu" and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max else None


def cell(hdu: Hdu, column: str) -> Cell | None:
    """Where the cells of a column are that has one number or text a row; None if the table has no such column.

    Raises
    ------
    ValueError
        The column has something else.
    """
    cards, names = hdu.cards, _names(hdu.cards)
    found = spelt(names, column)
    if found is None:
        return None
    i = 1 + names.index(found)
    repeat, letter, width, offset = _place(cards, i)
    dtype = np.dtype(_LETTER.get(letter, f"S{width}"))
    if letter not in (*_LETTER, "A", "L") or repeat == 0 or (repeat > 1 and letter != "A"):
        msg = f"column {column} has neither one number nor text a row (TFORM{i} = {text(cards, f'TFORM{i}')})"
        raise ValueError(msg)
    if offset + width > whole_number(cards, "NAXIS1"):
        msg = f"its header is broken: column {column} does not fit into rows of {whole_number(cards, 'NAXIS1')} bytes"
        raise ValueError(msg)
    scale, zero = number(cards, f"TSCAL{i}", 1), number(cards, f"TZERO{i}", 0)
    return Cell(letter, dtype, offset, scale, zero, _blank(cards, f"TNULL{i}", dtype))


def has_integer(hdu: Hdu, column: str) -> bool:
    """Is it a table with a column of this name that has one whole number a row?"""
    if not is_table(hdu):
        return False
    names = _names(hdu.cards)
    found = spelt(names, column)
    return found is not None and form(hdu.cards, 1 + names.index(found))[:2] in [(1, letter) for letter in "BIJK"]


def _names(cards: dict[str, str]) -> list[str]:
    return [text(cards, f"TTYPE{i}") for i in fields(cards)]


def fields(cards: dict[str, str]) -> range:
    """Numbers of the columns of a table."""
    count = whole_number(cards, "TFIELDS", 0)
    if count > 999:
        msg = f"TFIELDS = {count}, wanted at most 999"
        raise ValueError(msg)
    return range(1, count + 1)


def spelt(names: list[str], name: str) -> str | None:
    """The one of some names that is this one but for capitals, at best in them too; None if there is none."""
    return name if name in names else next((other for other in names if other.upper() == name.upper()), None)


def _place(cards: dict[str, str], i: int) -> tuple[int, str, int, int]:
    """Repeat count, letter, width in bytes and first byte in a row of column ``i`` from 1."""
    forms = [form(cards, j) for j in range(1, i + 1)]
    return *forms[-1], sum(form[2] for form in forms[:-1])


def _column(cards: dict[str, str], column: str) -> Pixels:
    names = _names(cards)
    found = spelt(names, column)
    if found is None:
        msg = f"has no column {column} (it has {few(names)})"
        raise ValueError(msg)
    i = 1 + names.index(found)
    repeat, letter, width, offset = _place(cards, i)
    row_bytes, rows = whole_number(cards, "NAXIS1"), whole_number(cards, "NAXIS2")
    shape = [int(length) for length in re.findall(r"\d+", text(cards, f"TDIM{i}"))]
    msg = ""
    if text(cards, "ZTABLE") == "T":
        msg = "is a compressed table: funpack it first"
    elif letter in "PQ":
        msg = f"has arrays of variable length in column {column}: only fixed ones can be read"
    elif letter not in _LETTER:
        msg = f"has no numbers in column {column} (TFORM{i} = {text(cards, f'TFORM{i}')})"
    elif len(shape) < 2 or math.prod(shape) != repeat or repeat == 0:
        msg = f"has no images in column {column}: TDIM{i} = {text(cards, f'TDIM{i}', 'missing')}, {repeat} values a row"
    elif rows == 0:
        msg = "has no rows"
    elif offset + width > row_bytes or len(_axes(cards)) != 2:
        msg = f"has a broken header: column {column} does not fit into rows of {row_bytes} bytes"
    if msg:
        raise ValueError(msg)
    nx, ny, *more = shape
    per_row, dtype = math.prod(more), np.dtype(_LETTER[letter])
    scale, zero = number(cards, f"TSCAL{i}", 1), number(cards, f"TZERO{i}", 0)
    blank = _blank(cards, f"TNULL{i}", dtype)
    return Pixels(rows * per_row, ny, nx, dtype, row_bytes, offset, per_row, scale, zero, blank)


def form(cards: dict[str, str], i: int) -> tuple[int, str, int]:
    """Repeat count, letter and width in bytes of column ``i`` from 1."""
    form = re.match(r"(\d*)([LXBIJKAEDCMPQ])", text(cards, f"TFORM{i}"))
    if form is None:
        msg = f"has columns of a form that cannot be read: TFORM{i} = {text(cards, f'TFORM{i}', 'missing')}"
        raise ValueError(msg)
    repeat, letter = int(form[1] or 1), form[2]
    return repeat, letter, -(-repeat // 8) if letter == "X" else repeat * WIDTH[letter]


def few(entries: list[str], limit: int = 6) -> str:
    """The first of many, for a message."""
    more = [f"{len(entries) - limit} more"] if len(entries) > limit else []
    return ", ".join([*entries[:limit], *more]) or "none"
