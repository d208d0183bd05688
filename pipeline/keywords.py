"""What the keywords of a header say: as text and as numbers, of the size of the data and of the columns of a table."""

import math
import re
from typing import IO

#: Bytes; a header, and the data after it, take a whole number of these.
BLOCK = 2880

#: Bytes of a value in a column, by the letter of TFORM, and the type of pixels by BITPIX.
WIDTH = {"L": 1, "B": 1, "A": 1, "I": 2, "J": 4, "E": 4, "K": 8, "D": 8, "C": 8, "P": 8, "M": 16, "Q": 16}
BITPIX = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}
_MAX_HEADER = 2**24


def read_cards(stream: IO[bytes], at: int) -> tuple[dict[str, str], int, str]:
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


def axes(cards: dict[str, str], prefix: str = "") -> list[int]:
    """Lengths of the axes, NAXIS1 first; with the prefix Z those of a tile-compressed image."""
    count = whole_number(cards, f"{prefix}NAXIS")
    if count > 999:
        msg = f"{prefix}NAXIS = {count}, wanted at most 999"
        raise ValueError(msg)
    return [whole_number(cards, f"{prefix}NAXIS{i}") for i in range(1, count + 1)]


def bitpix(cards: dict[str, str], prefix: str = "") -> int:
    """BITPIX or ZBITPIX, one of `BITPIX`."""
    value = number(cards, f"{prefix}BITPIX", 0)
    if value not in BITPIX:
        msg = f"{prefix}BITPIX = {text(cards, f'{prefix}BITPIX', 'missing')}, wanted 8, 16, 32, 64, -32 or -64"
        raise ValueError(msg)
    return int(value)


def data_size(cards: dict[str, str]) -> int:
    """Bytes of data that the header promises."""
    lengths = axes(cards)
    if not lengths:
        return 0
    groups = is_groups(cards)
    pixels = math.prod(lengths[1:] if groups else lengths)
    if groups or "XTENSION" in cards:
        pixels = whole_number(cards, "GCOUNT", 1) * (whole_number(cards, "PCOUNT", 0) + pixels)
    return abs(bitpix(cards)) // 8 * pixels


def is_groups(cards: dict[str, str]) -> bool:
    """Are the data random groups, of no use here?"""
    return text(cards, "GROUPS") == "T" and number(cards, "NAXIS1", -1) == 0 and "XTENSION" not in cards


def fields(cards: dict[str, str]) -> range:
    """Numbers of the columns of a table."""
    count = whole_number(cards, "TFIELDS", 0)
    if count > 999:
        msg = f"TFIELDS = {count}, wanted at most 999"
        raise ValueError(msg)
    return range(1, count + 1)


def form(cards: dict[str, str], i: int) -> tuple[int, str, int]:
    """Repeat count, letter and width in bytes of column ``i`` from 1."""
    form = re.match(r"(\d*)([LXBIJKAEDCMPQ])", text(cards, f"TFORM{i}"))
    if form is None:
        msg = f"has columns of a form that cannot be read: TFORM{i} = {text(cards, f'TFORM{i}', 'missing')}"
        raise ValueError(msg)
    repeat, letter = int(form[1] or 1), form[2]
    return repeat, letter, -(-repeat // 8) if letter == "X" else repeat * WIDTH[letter]
