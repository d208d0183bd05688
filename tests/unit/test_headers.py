"""Headers as astropy has them, however broken."""

import warnings

import pytest
from astropy.io import fits

from pipeline.headers import read_header
from pipeline.images import read_planes, scan_file
from tests.fits_files import put, ramp


def test_header_is_lenient(tmp_path):
    cards = [
        "SIMPLE  = T",
        "BITPIX  = 8",
        "NAXIS   = 2",
        "NAXIS1  = 3",
        "NAXIS2  =3",
        "OBJECT  = '<script>alert(1)</script>'",
        "CRVAL1  = 12h30m",
        "CRVAL2  = 1.5D1 / free format",
        "CTYPE1  = 'RA---TAN",
        "ESO-LOG 00:00> DATE = '1992' / no keyword",
        "HIERARCH ESO TEL ALT = 65.1",
        "COMMENT caf\xe9\n and more",
        "BAD KEY = 4",
        "NOSPACE ='text'",
        "END",
    ]
    raw = "".join(card.ljust(80) for card in cards).ljust(2880).encode("latin-1") + bytes(2880)
    file = put(tmp_path / "a.fits", raw)
    (block,), rejected = scan_file(file)
    assert rejected == []
    assert read_planes(block, 0, 1).data.shape == (1, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        header = read_header(file, 0)
        assert len(list(header.items())) == len(cards) - 1
    assert header["NOSPACE"] == "text"
    assert header["OBJECT"] == "<script>alert(1)</script>"
    assert header["CRVAL1"] == "12h30m"
    assert header["CRVAL2"] == 15
    assert header["NAXIS2"] == 3
    assert header["CTYPE1"] == "RA---TAN"
    assert header["ESO TEL ALT"] == 65.1
    assert "caf??" in str(header["COMMENT"])
    with pytest.raises(ValueError, match=r"a\.fits: no HDU 3"):
        read_header(file, 3)
    with pytest.raises(ValueError, match=r"b\.fits: no such file"):
        read_header(str(tmp_path / "b.fits"), 0)


def test_header_of_tiles_is_that_of_the_image(tmp_path):
    image = fits.ImageHDU(ramp(3, 8, 9, dtype="i2"), name="SCI")
    image.header.update(
        {"CRVAL1": 12.5, "CTYPE1": "RA---SIN", "BUNIT": "Jy/beam", "ZMAG": 25.0, "OBJECT": "it's", "LONG": "x y " * 50}
    )
    file = put(tmp_path / "a.fits", None, fits.CompImageHDU(image.data, header=image.header), image)
    packed, plain = read_header(file, 1), read_header(file, 2)
    kept = [key for key in plain if key not in ("XTENSION", "PCOUNT", "GCOUNT")]
    assert {key: packed[key] for key in packed} == {key: plain[key] for key in kept}
