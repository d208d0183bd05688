"""FITS files with something wrong: cards and bytes of good ones changed at random."""

import io
import random
import re

import numpy as np
from astropy.io import fits

#: What a value may be changed to: numbers at the limits of types, and what is none.
VALUES = (
    *("0", "1", "-1", "2", "3", "8", "16", "-32", "-64", "33", "999", "1000", "65536", "1000000", "2147483647"),
    *("2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "-9223372036854775808", "1E30"),
    *(
        "-1E308",
        "1E-320",
        "NaN",
        "INF",
        "1.5",
        "1D400",
        "T",
        "F",
        "''",
        "'abc'",
        "'caf\xe9'",
        "'unclosed",
        "",
        "\0",
        "/",
    ),
    *("'1PB(0)'", "'1QD(9999999)'", "'0E'", "'99999999999E'", "'12X'", "'(3,4)'", "'(0,0)'", "'(99999,99999)'"),
    *("'GZIP_1'", "'GZIP_2'", "'RICE_1'", "'HCOMPRESS_1'", "'PLIO_1'", "'NOCOMPRESS'", "'RA---TAN'", "'DEC--TPV'"),
    *("'RA---SIP'", "'GLON-CAR'", "'FREQ'", "'deg'", "'BINTABLE'", "'IMAGE'"),
)

#: Keywords that decide how a file is read.
KEYS = (
    *(
        "SIMPLE",
        "XTENSION",
        "BITPIX",
        "NAXIS",
        "NAXIS1",
        "NAXIS2",
        "NAXIS3",
        "NAXIS4",
        "PCOUNT",
        "GCOUNT",
        "GROUPS",
        "END",
    ),
    *("TFIELDS", "TFORM1", "TFORM2", "TTYPE1", "TTYPE2", "TDIM1", "TDIM2", "TSCAL1", "TZERO1", "TNULL1", "THEAP"),
    *("ZIMAGE", "ZBITPIX", "ZNAXIS", "ZNAXIS1", "ZNAXIS2", "ZNAXIS3", "ZTILE1", "ZTILE2", "ZTILE3", "ZCMPTYPE"),
    *("ZQUANTIZ", "ZDITHER0", "ZBLANK", "ZSCALE", "ZZERO", "ZNAME1", "ZVAL1", "BSCALE", "BZERO", "BLANK", "EXTNAME"),
    *(
        "EXTVER",
        "INHERIT",
        "CTYPE1",
        "CTYPE2",
        "CRVAL1",
        "CRPIX1",
        "CDELT1",
        "CD1_1",
        "CD2_2",
        "PC1_1",
        "PV1_1",
        "A_ORDER",
    ),
    *("LONPOLE", "EQUINOX", "RADESYS", "WCSAXES", "BMAJ", "BMIN", "BPA", "SATURATE", "BUNIT", "DATE-OBS", "CONTINUE"),
)


def damaged(good: bytes, draw: random.Random, *, times: int = 5) -> bytes:
    """The bytes of a file with up to ``times`` changes; the same for the same state of ``draw``."""
    raw = bytearray(good)
    for _ in range(draw.randint(1, times)):
        if len(raw) > 80:
            draw.choice(_CHANGES)(raw, draw)
    return bytes(raw)


def _card(raw: bytearray, draw: random.Random) -> int:
    """Where a card begins."""
    cards = [match.start() for match in re.finditer(rb"[A-Z][A-Z0-9_-]{0,7} *= ", raw) if match.start() % 80 == 0]
    return draw.choice(cards) if cards else 0


def _put(raw: bytearray, at: int, card: str) -> None:
    raw[at : at + 80] = card.ljust(80)[:80].encode("latin-1")


def _value(raw: bytearray, draw: random.Random) -> None:
    at = _card(raw, draw)
    key = raw[at : at + 8].decode("latin-1")
    _put(raw, at, f"{key}= {draw.choice(VALUES):>20}")


def _known_key(raw: bytearray, draw: random.Random) -> None:
    _put(raw, _card(raw, draw), f"{draw.choice(KEYS):8}= {draw.choice(VALUES):>20}")


def _near_value(raw: bytearray, draw: random.Random) -> None:
    """A whole number a little other than it was, or many times as large."""
    at = _card(raw, draw)
    number = re.match(rb"(.{8}= *)(-?\d+)", raw[at : at + 80])
    if number:
        old = int(number[2])
        new = draw.choice([old - 1, old + 1, 2 * old, 1000 * old, old // 2, old * 10**9, -old])
        _put(raw, at, f"{raw[at : at + 8].decode('latin-1')}= {new:>20}")


def _gone(raw: bytearray, draw: random.Random) -> None:
    _put(raw, _card(raw, draw), "")


def _repeated(raw: bytearray, draw: random.Random) -> None:
    one, other = _card(raw, draw), _card(raw, draw)
    raw[one : one + 80] = raw[other : other + 80]


def _swapped(raw: bytearray, draw: random.Random) -> None:
    one, other = _card(raw, draw), _card(raw, draw)
    raw[one : one + 72], raw[other : other + 72] = raw[other : other + 72], raw[one : one + 72]


def _some_bytes(raw: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(raw))
    few = draw.randint(1, 16)
    raw[at : at + few] = draw.choice([bytes(few), b"\xff" * few, draw.randbytes(few), b"\x7f\xf0" * (few // 2)])[
        : len(raw) - at
    ]


def _one_bit(raw: bytearray, draw: random.Random) -> None:
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)


def _shorter(raw: bytearray, draw: random.Random) -> None:
    del raw[draw.choice([draw.randrange(len(raw)), len(raw) // 2880 * 2880 - 2880, len(raw) - 1]) :]


def _block(raw: bytearray, draw: random.Random) -> None:
    """A block of a FITS file taken out, or put in twice, or somewhere else."""
    one, other = (2880 * draw.randrange(len(raw) // 2880 + 1) for _ in range(2))
    block = raw[one : one + 2880]
    draw.choice(
        [lambda: raw.__delitem__(slice(one, one + 2880)), lambda: raw.__setitem__(slice(other, other), block)]
    )()


_CHANGES = (
    *(_value, _value, _known_key, _known_key, _near_value, _near_value, _gone, _repeated, _swapped),
    *(_some_bytes, _some_bytes, _one_bit, _shorter, _block),
)


def good_files() -> dict[str, bytes]:
    """Small files of every kind that is read: images, cubes, extensions, tables, compressed images with every codec."""
    r = np.random.default_rng(11)
    y, x = np.mgrid[:24, :20]
    star = (200 * np.exp(-((x - 9.3) ** 2 + (y - 12.4) ** 2) / 8) + r.normal(0, 5, y.shape) + 50).astype("f4")
    sky = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.0, "CRVAL2": 2.0, "CRPIX1": 10.0, "CRPIX2": 12.0}
    sky |= {"CDELT1": -1e-3, "CDELT2": 1e-3, "BMAJ": 4e-3, "BMIN": 3e-3, "BPA": 20.0, "SATURATE": 240.0, "BUNIT": "Jy"}
    cube = np.stack([star, star + 1, star[::-1]])
    whole = np.round(cube).astype("i2")
    flux = fits.Column("FLUX", f"{star.size}E", dim="(20,24)", array=cube)
    error = fits.Column("FLUX_ERR", f"{star.size}E", dim="(20,24)", array=np.full_like(cube, 5))
    quality = fits.Column("QUALITY", "J", array=np.array([0, 4, 128]))
    time = fits.Column("TIME", "D", array=np.array([1.5, np.nan, 3.5]))
    pixel_file = fits.BinTableHDU.from_columns([time, flux, error, quality], name="PIXELS")
    scaled = fits.PrimaryHDU(whole)
    scaled.header.update({"BSCALE": 0.5, "BZERO": 32768.0, "BLANK": 7} | sky)
    maps = [fits.ImageHDU(star, fits.Header(sky), name="SCI"), fits.ImageHDU((star > 150).astype("u1"), name="DQ")]
    maps.append(fits.ImageHDU(np.full_like(star, 5), name="ERR"))
    hdus: dict[str, list] = {
        "image": [fits.PrimaryHDU(star, fits.Header(sky))],
        "cube": [scaled],
        "extensions": [fits.PrimaryHDU(), *maps],
        "table": [fits.PrimaryHDU(), pixel_file],
    }
    for codec in ("RICE_1", "GZIP_1", "GZIP_2", "PLIO_1", "HCOMPRESS_1"):
        hdus[codec] = [fits.PrimaryHDU(), fits.CompImageHDU(whole, fits.Header(sky), compression_type=codec)]
        if codec not in ("PLIO_1", "HCOMPRESS_1"):
            hdus[f"float {codec}"] = [
                fits.PrimaryHDU(),
                fits.CompImageHDU(cube, compression_type=codec, quantize_level=4),
            ]
    return {name: _bytes(parts) for name, parts in hdus.items()}


def _bytes(parts: list) -> bytes:
    stream = io.BytesIO()
    fits.HDUList(parts).writeto(stream)
    return stream.getvalue()
