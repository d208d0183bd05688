"""What lies beside an image as a single value: header keywords, and cells of the table that holds it."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from astropy.io import fits

from pipeline import hdus, maps, places
from pipeline.carry import Value, plain
from pipeline.headers import read_header
from pipeline.images import Block, identities


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
    masks = maps.as_map(mask)
    if column is None or masks.column is None:
        return {}
    try:
        if not maps.is_of_rows(hdus.layout(block.file).hdus[block.hdu], masks):
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
        cell = places.cell(hdu, name)
        if cell is None:
            return None
        if hdu.problem:
            raise ValueError(hdu.problem)
        pixels = places.pixels(hdu, column)
        whole = np.memmap(layout.path, np.uint8, "r")
        count = pixels.planes // pixels.per_row
        stored = np.ndarray((count,), cell.dtype, whole.data, hdu.data + cell.offset, (pixels.row_bytes,))
        planes, _sources = identities(block, start, stop)
        return [cell.value(one) for one in stored[planes // pixels.per_row]]
    except hdus.TROUBLE as error:
        msg = f"{block.file}: HDU {block.hdu}: {hdus.sentence(error)}"
        raise ValueError(msg) from error
