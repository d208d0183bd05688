"""Where planes and cells lie in the data of an HDU, and what the numbers stored there mean."""

import math
import re
from typing import Any, NamedTuple

import numpy as np

from pipeline import hdus, keywords
from pipeline.carry import Value, plain
from pipeline.hdus import Hdu
from pipeline.keywords import fields, form, number, text, whole_number

_LETTER = {"B": "u1", "I": ">i2", "J": ">i4", "K": ">i8", "E": ">f4", "D": ">f8"}


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


def pixels(hdu: Hdu, column: str | None) -> Pixels:
    """Where the planes are: of an image, or with ``column`` of a table. ValueError: why the HDU holds no images."""
    cards = hdu.cards
    if hdus.is_table(hdu) != (column is not None):
        msg = "is a table" if column is None else "is no table"
        raise ValueError(msg)
    if column is not None:
        return _column(cards, column)
    lengths = hdus.axes(hdu)
    msg = ""
    if keywords.is_groups(cards):
        msg = "holds random groups (visibilities), not an image"
    elif len(lengths) < 2:
        msg = "has only one axis" if lengths else "has no pixels"
    elif 0 in lengths:
        msg = f"has no pixels: its axes are {' x '.join(map(str, lengths))}"
    if msg:
        raise ValueError(msg)
    prefix = "Z" if hdus.is_tiled(hdu) else ""
    dtype = np.dtype(keywords.BITPIX[keywords.bitpix(cards, prefix)])
    nx, ny, *more = lengths
    scale, zero = number(cards, "BSCALE", 1), number(cards, "BZERO", 0)
    blank = _blank(cards, "BLANK" if "BLANK" in cards else f"{prefix}BLANK", dtype)
    return Pixels(math.prod(more), ny, nx, dtype, ny * nx * dtype.itemsize, 0, 1, scale, zero, blank)


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
    if not hdus.is_table(hdu):
        return False
    names = _names(hdu.cards)
    found = spelt(names, column)
    return found is not None and form(hdu.cards, 1 + names.index(found))[:2] in [(1, letter) for letter in "BIJK"]


def spelt(names: list[str], name: str) -> str | None:
    """The one of some names that is this one but for capitals, at best in them too; None if there is none."""
    return name if name in names else next((other for other in names if other.upper() == name.upper()), None)


def _names(cards: dict[str, str]) -> list[str]:
    return [text(cards, f"TTYPE{i}") for i in fields(cards)]


def _place(cards: dict[str, str], i: int) -> tuple[int, str, int, int]:
    """Repeat count, letter, width in bytes and first byte in a row of column ``i`` from 1."""
    forms = [form(cards, j) for j in range(1, i + 1)]
    return *forms[-1], sum(form[2] for form in forms[:-1])


def _column(cards: dict[str, str], column: str) -> Pixels:
    names = _names(cards)
    found = spelt(names, column)
    if found is None:
        msg = f"has no column {column} (it has {hdus.few(names)})"
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
    elif offset + width > row_bytes or len(keywords.axes(cards)) != 2:
        msg = f"has a broken header: column {column} does not fit into rows of {row_bytes} bytes"
    if msg:
        raise ValueError(msg)
    nx, ny, *more = shape
    per_row, dtype = math.prod(more), np.dtype(_LETTER[letter])
    scale, zero = number(cards, f"TSCAL{i}", 1), number(cards, f"TZERO{i}", 0)
    blank = _blank(cards, f"TNULL{i}", dtype)
    return Pixels(rows * per_row, ny, nx, dtype, row_bytes, offset, per_row, scale, zero, blank)


def _blank(cards: dict[str, str], key: str, dtype: np.dtype) -> float | None:
    """The value that means nothing is there: of integers only, and only one that the type can hold."""
    value = number(cards, key, math.nan)
    return value if dtype.kind in "iu" and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max else None
