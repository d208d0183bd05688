"""Headers of HDUs, as astropy has them."""

import itertools
import re
import warnings
from collections.abc import Iterator

from astropy.io import fits

from pipeline import hdus


def read_header(file: str, hdu: int) -> fits.Header:
    """Header of one HDU; of a tile-compressed image, that of the image.

    Lenient: characters that FITS forbids become ``?``, and a value that cannot be parsed becomes text, so that a broken
    WCS keyword is seen to be broken by whoever reads it and all others are still there.

    Raises
    ------
    ValueError
        A sentence that names the file: it cannot be read or has no such HDU.
    """
    try:
        layout = hdus.layout(file)
        if not 0 <= hdu < len(layout.hdus):
            raise ValueError(hdus.absent(layout.hdus, hdu))
        found = layout.hdus[hdu]
        with open(layout.path, "rb") as stream:
            stream.seek(found.header)
            raw = stream.read(found.data - found.header).decode("latin-1")
    except hdus.TROUBLE as error:
        msg = f"{file}: {hdus.sentence(error)}"
        raise ValueError(msg) from error
    text = re.sub(r"[^ -~]", "?", raw)
    cards: Iterator[str] = (text[first : first + 80].ljust(80) for first in range(0, len(text), 80))
    cards = itertools.takewhile(lambda card: card[:8].rstrip() != "END", cards)
    if hdus.is_tiled(found):
        cards = _untiled(cards)
    return fits.Header.fromstring("".join(card if _PLAIN_CARD.match(card) else _mended(card) for card in cards))


#: Cards that need no second look: texts, and values in their usual form.
_PLAIN_CARD = re.compile(
    r"(COMMENT |HISTORY | {8})|"
    r"[A-Z0-9_-]{1,8} *(?<=^.{8})= +('([^']|'')*'|[-+]?\d+(\.\d*)?([ED][-+]?\d+)?|[TF])? *(/.*)?$"
)

#: Keywords of the table that holds a tile-compressed image.
_TILE_CARD = re.compile(
    r"(TTYPE|TFORM|TUNIT|TDISP|TNULL|TSCAL|TZERO|ZTILE|ZNAME|ZVAL)\d+ |"
    r"(XTENSION|BITPIX|NAXIS\d*|PCOUNT|GCOUNT|TFIELDS|THEAP|CHECKSUM|DATASUM) |"
    r"Z(IMAGE|TENSION|SIMPLE|EXTEND|PCOUNT|GCOUNT|CMPTYPE|MASKCMP|QUANTIZ|DITHER0|BLANK|HECKSUM|DATASUM) "
)


def _untiled(cards: Iterator[str]) -> Iterator[str]:
    for card in cards:
        if re.match(r"Z(BITPIX|NAXIS\d*) ", card):
            yield f"{card[1:8]} {card[8:]}"
        elif not _TILE_CARD.match(card[:8] + " "):
            yield card


def _mended(card: str) -> str:
    """The card if astropy can parse it without complaint, else one with its value as text, else a comment."""
    if card[8] == "=":
        card = f"{card[:8]}= {card[9:].strip()}".ljust(80)[:80]
    parsed = fits.Card.fromstring(card)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            str((parsed.keyword, parsed.value, parsed.comment))
        except (fits.VerifyError, ValueError, Warning):
            key = re.sub(r"[^A-Z0-9_-]", "_", card[:8].strip().upper())
            value = card[9:].split("/")[0].replace("'", "").strip()[:60]
            return str(fits.Card(key, value)).ljust(80) if key and card[8] == "=" else f"COMMENT {card[:72]}"
    return card
