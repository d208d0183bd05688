"""What is no FITS file, or a broken one, is told in words, and hides nothing else."""

import bz2
import gzip
import os
import re
import socket

import numpy as np
import pytest
from astropy.io import fits

from pipeline import hdus
from pipeline.headers import read_header
from pipeline.images import read_planes, scan_file
from tests.fits_files import END, fits_bytes, put, ramp, read, reason

pytestmark = pytest.mark.filterwarnings("ignore::astropy.utils.exceptions.AstropyUserWarning")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.fits")
    os.symlink("nowhere", tmp_path / "link.fits")
    os.symlink("loop.fits", tmp_path / "loop.fits")
    (tmp_path / "empty.fits").touch()
    assert "a folder" in reason(str(tmp_path))
    assert "a pipe" in reason(str(tmp_path / "pipe.fits"))
    assert "a link to a file that is gone" in reason(str(tmp_path / "link.fits"))
    assert "symbolic links" in reason(str(tmp_path / "loop.fits"))
    assert "empty (0 bytes)" in reason(str(tmp_path / "empty.fits"))
    assert "no such file" in reason(str(tmp_path / "nothing.fits"))
    assert "a device" in reason("/dev/null")
    assert "too long" in reason("x" * 300)
    assert re.search("null (byte|character)", reason("a\0b"))  # the latter since Python 3.13


def test_socket(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("s.fits")
        assert "a socket" in reason("s.fits")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    file = put(tmp_path / "a.fits", ramp(4, 4))
    os.chmod(file, 0)
    assert "no permission" in reason(file)


def test_permission_lost(tmp_path, monkeypatch):
    file = put(tmp_path / "a.fits", ramp(4, 4))

    def refuse(*_args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(hdus, "open", refuse, raising=False)
    assert "no permission" in reason(file)
    with pytest.raises(ValueError, match=r"a\.fits: no permission"):
        read_header(file, 0)


GOOD = fits_bytes(ramp(20, 32, 32))
AXIS = b"NAXIS1  =                   32"


def change(old, new):
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def zipped(data):
    """Gzip without the time of day, so that every process collects the same tests."""
    return gzip.compress(data, mtime=0)


#: Bytes of a file by what is wrong with it, and what the reason says.
DAMAGE = {
    "half": (GOOD[: len(GOOD) // 2], "truncated: its header promises 81920 bytes of data"),
    "odd length": (GOOD[: 2880 * 7 + 17], "truncated: its header promises 81920 bytes of data, 17297 are there"),
    "cut header": (GOOD[:1000], "truncated"),
    "short header": (GOOD[:200], "no END"),
    "BITPIX -33": (change(b"BITPIX  =                  -32", b"BITPIX  =                  -33"), "BITPIX = -33"),
    "BITPIX -64": (change(b"BITPIX  =                  -32", b"BITPIX  =                  -64"), "truncated"),
    "NAXIS1 double": (change(AXIS, b"NAXIS1  =                   64"), "truncated"),
    "NAXIS1 huge": (change(AXIS, b"NAXIS1  =    32000000000000000"), "truncated"),
    "NAXIS1 beyond int64": (change(AXIS, b"NAXIS1  = 99999999999999999999"), "NAXIS1 = 99999999999999999999"),
    "NAXIS1 negative": (change(AXIS, b"NAXIS1  =                  -32"), "NAXIS1 = -32"),
    "NAXIS1 text": (change(AXIS, b"NAXIS1  =                'abc'"), "NAXIS1 = abc"),
    "NAXIS1 fraction": (change(AXIS, b"NAXIS1  =                  3.5"), "NAXIS1 = 3.5"),
    "NAXIS1 misspelt": (change(AXIS, b"NAXIX1  =                   32"), "NAXIS1 is missing"),
    "NAXIS1 zero": (change(AXIS, b"NAXIS1  =                    0"), "83520 bytes that are no HDU"),
    "NAXIS 1": (change(b"NAXIS   =                    3", b"NAXIS   =                    1"), "bytes that are no HDU"),
    "NAXIS 99999": (change(b"NAXIS   =                    3", b"NAXIS   =                99999"), "NAXIS = 99999"),
    "BITPIX of odd bytes": (
        change(b"BITPIX  =                  -32", b"BITPIX  =      \0\xff\x80\n           "),
        "BITPIX = ?",
    ),
    "no END": (change(END, b" " * 80), "no END"),
    "no SIMPLE": (b"XIMPLE" + GOOD[6:], "not FITS"),
    "web page": (b"<!DOCTYPE html><html>", "web page"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "zeros": (b"\0" * 9000, "not FITS"),
    "not gzip": (b"\x1f\x8bnot gzip at all", "nothing can be decompressed"),
    "gzip of nothing": (zipped(b""), "nothing can be decompressed"),
    "gzip of text": (zipped(b"text"), "not FITS"),
    "gzip truncated": (zipped(GOOD)[:9000], "truncated"),
    "bz2 truncated": (bz2.compress(GOOD)[:-100], "decompressed"),
    "gzip broken": (zipped(GOOD)[:-1500], "the compressed data are broken"),
}


@pytest.mark.parametrize(("data", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged(tmp_path, data, words):
    file = put(tmp_path / "a.fits", data)
    assert words in reason(file, hdu="all")
    assert words in reason(file)


def test_harmless_damage(tmp_path):
    values = ramp(20, 32, 32)
    free, exponent = (change(AXIS, card.ljust(len(AXIS))) for card in (b"NAXIS1  =32/ no blanks", b"NAXIS1  = 3.2E1"))
    for data in (GOOD[: 81920 + 2880], GOOD + bytes(28800), free, exponent):
        np.testing.assert_array_equal(read(put(tmp_path / "a.fits", data)).data, values)


def test_one_bad_hdu_does_not_hide_the_others(tmp_path):
    images = [ramp(24, 40) + k for k in range(4)]
    good = fits_bytes(None, *(fits.ImageHDU(image, name="SCI") for image in images))
    starts = [match.start() for match in re.finditer(b"XTENSION=", good)]
    axis = b"NAXIS1  =                   40"

    def damage(old, new):
        second = good[starts[1] : starts[2]]
        assert old in second
        return good[: starts[1]] + second.replace(old, new, 1) + good[starts[2] :]

    cases = {
        "BITPIX": damage(b"BITPIX  =                  -32", b"BITPIX  =                  -31"),
        "more data than lie before the next HDU": damage(axis, b"NAXIS1  =                   80"),
        "more data than lie before": damage(axis, b"NAXIS1  =            800000000"),
        "no END": damage(END, b" " * 80),
        "bytes that are no HDU": damage(b"XTENSION", b"YTENSION"),
    }
    for words, data in cases.items():
        file = put(tmp_path / "a.fits", data)
        blocks, (rejected,) = scan_file(file, hdu="all")
        assert [block.hdu for block in blocks] == [1, 3, 4]
        assert rejected.hdu == 2
        assert words in rejected.reason
        for block in blocks:
            np.testing.assert_array_equal(read_planes(block, 0, 1).data[0], images[block.hdu - 1])
        assert scan_file(file) == (blocks[:1], [])
    blocks, (rejected,) = scan_file(put(tmp_path / "a.fits", good[:-6000]), hdu="all")
    assert [block.hdu for block in blocks] == [1, 2, 3]
    assert "HDU 4 (SCI): truncated" in rejected.reason
    _, (rejected,) = scan_file(put(tmp_path / "a.fits", good + b"abc" * 1000), hdu="all")
    assert "3000 bytes that are no HDU" in rejected.reason
