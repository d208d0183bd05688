"""What goes along with an image: values of headers and tables that its row of the catalogue repeats.

A part keeps them as text, and of each column which kinds of values it has. Only all parts together tell the type of a
column, so it depends neither on how images are divided into shards nor on their order. Imports neither jax nor astropy.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from pipeline.columns import Column

#: One of them; None = missing.
Value = int | float | str | None

#: Kinds of values: whole numbers that float64 can hold, other whole numbers, other numbers, text, missing.
SMALL, LARGE, FRACTION, TEXT, MISSING = KINDS = "ilfsm"

_READ: dict[str, Callable[[str], Value]] = {
    SMALL: int, LARGE: int, FRACTION: float, TEXT: str, MISSING: lambda _: None
}  # fmt: skip


def plain(value: object) -> Value:
    """A value of a header or table as one of Python's: logical ones are 1 and 0; NaN and what is no value are None."""
    if isinstance(value, bytes):
        value = value.decode("latin-1").split("\0")[0]
    if isinstance(value, str):
        return value.rstrip() or None
    if isinstance(value, bool | np.bool_ | int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating) and not math.isnan(value):
        return float(value)
    return None


def as_text(values: Iterable[Value]) -> list[str]:
    """Values as text, from which `from_text` has them back: the kind, one letter, and what is written of them."""
    return [_kind(value) + ("" if value is None else str(value)) for value in values]


def from_text(texts: Iterable[str]) -> list[Value]:
    """Values of which there are texts by `as_text`."""
    return [_READ[text[0]](text[1:]) for text in texts]


def kinds(values: Iterable[Value]) -> str:
    """The kinds that are among the values, in the order of KINDS."""
    found = {_kind(value) for value in values}
    return "".join(kind for kind in KINDS if kind in found)


def _kind(value: Value) -> str:
    if value is None:
        return MISSING
    if isinstance(value, int):
        return SMALL if abs(value) <= 2**53 else LARGE if -(2**63) <= value < 2**63 else TEXT
    return FRACTION if isinstance(value, float) else TEXT


def column_of(name: str, of_parts: Sequence[str]) -> Column:
    """The column of the catalogue, from the kinds of values that each part has.

    Integers if all values are, else float64; text if one is, or if float64 would lose digits.
    """
    found = set("".join(of_parts))
    whole = bool(found) and found <= {SMALL, LARGE}
    text = TEXT in found or (LARGE in found and not whole)
    return Column(name, "S" if text else "i8" if whole else "f8", "", f"{name} of the header or table", "carried")


def of_text(texts: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Texts (n,), as `as_text` has them in UTF-8, as values of the type of their column; NaN or empty where missing."""
    written = [text[1:] for text in texts.tolist()]
    if dtype.kind == "S":
        return np.array(written, dtype)
    number = int if dtype.kind == "i" else float
    return np.array([number(text) if text else math.nan for text in written], dtype)
