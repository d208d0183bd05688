"""Every file ends as blocks or as reasons, nothing crashes or hangs, and pixels are what astropy says they are."""

import bz2
import gzip
import os
import re
import socket
import tempfile

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline import hdus
from pipeline.headers import read_header
from pipeline.images import read_planes, scan_file
from pipeline.listing import list_files
from tests.fits_files import fits_bytes, put, ramp

pytestmark = pytest.mark.filterwarnings("ignore::astropy.utils.exceptions.AstropyUserWarning")


def read(file, **section):
    """All planes of the only block of a file."""
    (block,), rejected = scan_file(file, **section)
    assert rejected == []
    return read_planes(block, block.start, block.stop, **section)


def reason(file, **section):
    """The reason for which nothing in a file could be used."""
    found, (rejected,) = scan_file(file, **section)
    assert found == []
    assert (rejected.file, rejected.plane, rejected.source) == (file, -1, -1)
    assert "Traceback" not in rejected.reason
    return rejected.reason


def table(array, **header):
    """A table of an index and the column FLUX with an image or more in each row."""
    dim = str(array.shape[:0:-1]).replace(" ", "")
    letter = {"f4": "E", "f8": "D", "i2": "I", "i4": "J", "i8": "K", "u1": "B"}[array.dtype.str[1:]]
    flux = fits.Column(name="FLUX", format=f"{array[0].size}{letter}", dim=dim, array=array)
    index = fits.Column(name="INDEX", format="J", array=np.arange(len(array)))
    hdu = fits.BinTableHDU.from_columns([index, flux], name="STAMPS")
    hdu.header.update(header)
    return hdu


# ---- real files

#: What becomes of each file: (hdu, planes, ny, nx) of its blocks with `hdu: all`, or words of the reason.
NASTY = {
    "arange.fits": [(0, 7, 10, 11)],
    "blank.fits": [(0, 1, 1, 1)],
    "carta_empty2.fits": "empty",
    "carta_noise_4d.fits": [(0, 10, 10, 10)],
    "carta_small_perplanebeam.fits": [(0, 11, 21, 20)],
    "checksum_false.fits": [(0, 1, 40, 30)],
    "compressed_float_bzero.fits": "one axis",
    "dist_lookup.fits.gz": [(1, 1, 100, 100), (2, 1, 1, 4096), (3, 1, 33, 65), (4, 1, 33, 65)],
    "git_lfs_pointer_tess_tp.fits.gz": "git lfs pull",
    "git_symlink_as_text.fits": "not FITS",
    "header_newlines.fits": [(0, 1, 1, 1)],
    "history_header.fits": "no pixels",
    "o4sp040b0_raw.fits": [(1, 1, 44, 62), (4, 1, 44, 62)],
    "random_groups.fits": "random groups",
    "scale.fits": [(0, 1, 21, 20)],
    "table.fits": "is a table",
    "test0.fits": [(hdu, 1, 40, 40) for hdu in range(1, 5)],
    "testUS.fits": [(0, 1, 5, 7)],
    "testUS.fits.bz2": [(0, 1, 5, 7)],
    "testUS.fits.fz": [(1, 1, 5, 7)],
    "testUS.fits.gz": [(0, 1, 5, 7)],
    "test_multiF.fits": [(hdu, 1, 5, 7) for hdu in range(12)],
    "test_multiF.fits.bz2": [(hdu, 1, 5, 7) for hdu in range(12)],
    "test_multiF.fits.fz": [(hdu, 1, 5, 7) for hdu in range(1, 13)],
    "test_multiF.fits.gz": [(hdu, 1, 5, 7) for hdu in range(12)],
    "validate.fits": "no pixels",
    "verify.fits": "no pixels",
    "zerowidth.fits": "its axes are 777777701 x 0",
}


def test_every_nasty_file_is_expected(shared_data):
    assert sorted(os.listdir(shared_data / "nasty")) == sorted(NASTY)


@pytest.mark.parametrize("name", NASTY)
def test_nasty(shared_data, name):
    file = str(shared_data / "nasty" / name)
    expected = NASTY[name]
    if isinstance(expected, str):
        assert expected in reason(file, hdu="all")
        assert expected in reason(file)
        return
    blocks, rejected = scan_file(file, hdu="all")
    assert rejected == []
    assert [(b.hdu, b.stop - b.start, b.ny, b.nx) for b in blocks] == expected
    assert scan_file(file)[0] == blocks[:1]
    with fits.open(file) as opened:
        for block in blocks:
            stack = read_planes(block, 0, block.stop)
            values = opened[block.hdu].data.reshape(stack.data.shape)
            np.testing.assert_allclose(stack.data, values, rtol=1e-6)  # astropy scales in float32
            assert not np.isinf(stack.data).any()
            np.testing.assert_array_equal(stack.mask, ~np.isfinite(values))


def test_all_shared_files_scan_and_read(shared_data):
    files, rejected = list_files([str(shared_data)])
    assert rejected == []
    for file in files:
        blocks, rejected = scan_file(file, hdu="all")
        assert blocks or rejected
        for block in blocks:
            assert read_planes(block, block.start, block.stop).data.shape == (block.stop, block.ny, block.nx)
            assert len(dict(read_header(file, block.hdu).items())) > 3


def test_codecs_are_pixel_identical(shared_data):
    plain = read(str(shared_data / "m13" / "m13.fits")).data
    for codec in ("gzip", "hcomp", "plio", "rice"):
        np.testing.assert_array_equal(read(str(shared_data / "m13" / f"m13_{codec}.fits")).data, plain)


def test_compressed_nan(shared_data):
    file = str(shared_data / "m13" / "compressed_with_nan.fits")
    stack, values = read(file), fits.getdata(file, 1)
    np.testing.assert_array_equal(stack.data[0], values)
    assert stack.mask.sum() == np.isnan(values).sum() == 1


def test_degenerate_axes_vanish(shared_data):
    stacks = [read(str(shared_data / "parkes1904" / f"small{axes}.fits")) for axes in ("", "_3D", "_4D", "_5D")]
    for stack in stacks:
        assert stack.data.shape == (1, 20, 20)
        np.testing.assert_array_equal(stack.data, stacks[0].data)


def test_ztf_stamps(shared_data):
    files, _ = list_files([str(shared_data / "ztf" / "*.fits")])
    assert len(files) == 36
    for file in files:
        stack = read(file)
        assert stack.data.shape == (1, 63, 63)
        assert stack.data.dtype == np.float32


def test_masked_field(shared_data):
    stack = read(str(shared_data / "parkes1904" / "1904-66_SIN.fits"))
    assert stack.mask.sum() == 14837


# ---- files that are none


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
END = b"END" + b" " * 77


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


# ---- which HDUs


def test_hdu_settings(tmp_path):
    parts = [
        fits.ImageHDU(ramp(9), name="LINE"),
        fits.ImageHDU(ramp(3, 4), name="SCI", ver=1),
        fits.ImageHDU(name="ERR"),
        fits.ImageHDU(ramp(2, 5, 6), name="SCI", ver=2),
        table(ramp(2, 7, 8)),
    ]
    file = put(tmp_path / "a.fits", None, *parts)

    def found(hdu, column=None):
        blocks, rejected = scan_file(file, hdu=hdu, column=column)
        return [(b.hdu, b.stop, b.ny, b.nx) for b in blocks], [(r.hdu, r.reason) for r in rejected]

    assert found("auto") == ([(2, 1, 3, 4)], [])
    assert found("all") == found("SCI") == found(["sci"]) == found([4, 2]) == ([(2, 1, 3, 4), (4, 2, 5, 6)], [])
    assert found(4) == ([(4, 2, 5, 6)], [])
    assert found("auto", "FLUX") == found("all", "flux") == found("STAMPS", "FLUX") == ([(5, 2, 7, 8)], [])
    assert found(0) == ([], [(0, "HDU 0 has no pixels")])
    assert found(["ERR", 2]) == ([(2, 1, 3, 4)], [(3, "HDU 3 (ERR) has no pixels")])
    assert found(17) == ([], [(17, "no HDU 17: the file has HDUs 0 to 5")])
    assert found(["DQ"]) == ([], [(-1, "no HDU is called DQ: the file has PRIMARY, LINE, SCI, ERR, SCI, STAMPS")])
    assert found(5) == ([], [(5, "HDU 5 (STAMPS) is a table")])
    assert found(2, "FLUX") == ([], [(2, "HDU 2 (SCI) is no table")])
    assert "has no column RAW (it has INDEX, FLUX)" in found("auto", "RAW")[1][0][1]


# ---- pixels

scalings = st.sampled_from([(1, 0), (1, 32768), (2, -100), (0.5, 3), (0.1, 1500), (1, 2**31), (1e-3, -1e5), (1e30, 0)])


@given(
    st.sampled_from(["u1", ">i2", ">i4", ">i8", ">f4", ">f8"]).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=5, max_side=4))
    ),
    scalings,
    st.data(),
)
def test_pixels_agree_with_astropy(array, scaling, data):
    hdu = fits.PrimaryHDU(array)
    scale, zero = scaling
    header = hdu.header.copy()
    if scaling != (1, 0):
        header["BSCALE"], header["BZERO"] = scaling
    raw = header.tostring().encode() + array.tobytes()
    with tempfile.NamedTemporaryFile(suffix=".fits") as file:
        file.write(raw + bytes(-len(raw) % 2880))
        file.flush()
        (block,), _ = scan_file(file.name)
        start = data.draw(st.integers(0, block.stop - 1))
        stop = data.draw(st.integers(start + 1, block.stop))
        stack = read_planes(block, start, stop)
        with np.errstate(over="ignore", invalid="ignore"), fits.open(file.name) as opened:
            theirs = opened[0].data.reshape(-1, *array.shape[-2:])[start:stop]
            exact = array.reshape(theirs.shape if start == 0 and stop == block.stop else (-1, *array.shape[-2:]))
            exact = exact[start:stop] if len(exact) != stop - start else exact
            exact = exact.astype(float) * scale + zero
    assert stack.data.dtype.isnative
    assert stack.data.dtype in (np.float32, np.float64)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(stack.mask, ~finite)
    np.testing.assert_array_equal(np.isnan(stack.data), ~finite)
    np.testing.assert_array_equal(stack.data[finite].astype(float), exact[finite])
    near = np.isfinite(theirs) & finite
    tolerance = 1e-6 * (np.abs(zero) + np.abs(exact[near]))
    assert (np.abs(theirs[near].astype(float) - exact[near]) <= tolerance).all()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (ramp(3, 4, dtype="u1"), "f4"),
        (ramp(3, 4, dtype="i2"), "f4"),
        (ramp(3, 4, dtype="u2"), "f4"),
        (ramp(3, 4, dtype="i1"), "f4"),
        (ramp(3, 4, dtype="f4"), "f4"),
        (ramp(3, 4, dtype="i4"), "f8"),
        (ramp(3, 4, dtype="u4"), "f8"),
        (ramp(3, 4, dtype="i8"), "f8"),
        (ramp(3, 4, dtype="u8"), "f8"),
        (ramp(3, 4, dtype="f8"), "f8"),
    ],
)
def test_dtypes(tmp_path, array, expected):
    stack = read(put(tmp_path / "a.fits", array))
    assert stack.data.dtype == np.dtype(expected)
    np.testing.assert_array_equal(stack.data[0], array)
    assert stack.noise_map is None
    assert not stack.mask.any()


def test_scaled_sixteen_bits_lose_nothing(tmp_path):
    hdu = fits.PrimaryHDU(ramp(4, 5, dtype="i2"))
    hdu.header["BSCALE"], hdu.header["BZERO"] = 0.045777764213996, 1500.0
    raw = hdu.header.tostring().encode() + ramp(4, 5, dtype=">i2").tobytes()
    stack = read(put(tmp_path / "a.fits", raw))
    assert stack.data.dtype == np.float64
    np.testing.assert_array_equal(stack.data[0], ramp(4, 5, dtype="f8") * 0.045777764213996 + 1500)


def test_blank_is_masked(tmp_path):
    array = ramp(4, 5, dtype="i2")
    plain = fits.ImageHDU(array)
    plain.header["BLANK"] = 7
    packed = fits.CompImageHDU(array, header=plain.header)
    odd = fits.ImageHDU(array)
    odd.header["BLANK"] = 99999999  # not a 16-bit integer: means nothing
    file = put(tmp_path / "a.fits", None, plain, packed, odd)
    for block, count in zip(scan_file(file, hdu="all")[0], (1, 1, 0), strict=True):
        stack = read_planes(block, 0, 1)
        assert stack.mask.sum() == np.isnan(stack.data).sum() == count
        assert stack.mask[0, 1, 2] == bool(count)


def test_odd_pixels(tmp_path):
    image = ramp(4, 5)
    image[0, :3] = [np.nan, np.inf, -np.inf]
    stack = read(put(tmp_path / "a.fits", image))
    np.testing.assert_array_equal(stack.mask[0], ~np.isfinite(image))
    assert np.isnan(stack.data[stack.mask]).all()
    assert read(put(tmp_path / "a.fits", np.full((4, 5), np.nan))).mask.all()
    assert (read(put(tmp_path / "a.fits", np.full((4, 5), 3.0))).data == 3).all()
    assert read(put(tmp_path / "a.fits", ramp(1, 9))).data.shape == (1, 1, 9)
    assert read(put(tmp_path / "a.fits", ramp(9, 1))).data.shape == (1, 9, 1)


def test_planes_are_in_c_order(tmp_path):
    cube = ramp(2, 1, 3, 4, 5)
    file = put(tmp_path / "a.fits", cube)
    (block,), _ = scan_file(file)
    assert (block.start, block.stop) == (0, 6)
    for plane in range(6):
        np.testing.assert_array_equal(read_planes(block, plane, plane + 1).data[0], cube[plane // 3, 0, plane % 3])
    with pytest.raises(ValueError, match=r"a\.fits: HDU 0: it has 6 planes, wanted 5 to 6"):
        read_planes(block, 5, 7)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2"])
@pytest.mark.parametrize("named", ["a.fits", "a[1].fits", "http:x.fits", "\udcff.fits", "a b\n.fits"])
def test_file_names_and_compression(tmp_path, monkeypatch, suffix, named):
    monkeypatch.chdir(tmp_path)
    image = ramp(6, 7, dtype="i2")
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[suffix]
    name = named + suffix
    with open(name, "wb") as file:
        file.write(pack(fits_bytes(image, fits.CompImageHDU(image + 1))))
    assert list_files([name]) == ([name], [])
    blocks, _ = scan_file(name, hdu="all")
    assert [read_planes(block, 0, 1).data[0, 0, 1] for block in blocks] == [1, 2]
    assert read_header(name, 1)["NAXIS1"] == 7


@pytest.mark.parametrize("codec", ["RICE_1", "GZIP_1", "GZIP_2", "HCOMPRESS_1", "PLIO_1", "NOCOMPRESS"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "i8", "f4", "f8"])
def test_tiles_agree_with_astropy(tmp_path, codec, dtype):
    cube = np.random.default_rng(1).integers(0, 99, (2, 3, 8, 9)).astype(dtype)
    if dtype.startswith("f"):
        cube[0, 1, 2] = np.nan
        cube[1, 1, 4:] = 0
    for k, tile in enumerate([None, (1, 1, 8, 9), (2, 2, 4, 4)]):
        try:
            file = put(tmp_path / f"{k}.fits", None, fits.CompImageHDU(cube, compression_type=codec, tile_shape=tile))
        except (ValueError, fits.VerifyError):
            continue  # a codec that cannot hold these
        values = fits.getdata(file, 1).reshape(-1, 8, 9)
        (block,), _ = scan_file(file)
        for start, stop in [(0, 6), (1, 3), (5, 6)]:
            np.testing.assert_array_equal(read_planes(block, start, stop).data, values[start:stop])


def test_gzip_tile_that_ends_too_early(tmp_path):
    # The library under fitsio does not come back from this one.
    packed = fits_bytes(
        None, fits.CompImageHDU(ramp(2, 40, 40, dtype="i4"), compression_type="GZIP_1", tile_shape=(1, 40, 40))
    )
    data = bytearray(packed)
    streams = [match.start() for match in re.finditer(b"\x1f\x8b\x08", packed)]
    data[streams[1] + 200 :] = bytes(len(data) - streams[1] - 200)
    (block,), _ = scan_file(put(tmp_path / "a.fits", bytes(data)))
    assert read_planes(block, 0, 1).data.max() == 1599
    with pytest.raises(ValueError, match=r"a\.fits: HDU 1: some of its compressed tiles are broken"):
        read_planes(block, 1, 2)
    data = bytearray(packed)
    data[data.index(END, 2880) // 2880 * 2880 + 2880 + 4] = 127  # the place of the first tile
    (block,), _ = scan_file(put(tmp_path / "b.fits", bytes(data)))
    with pytest.raises(ValueError, match="lie outside the file"):
        read_planes(block, 0, 1)


@pytest.mark.parametrize(
    ("codec", "place", "bad"), [("HCOMPRESS_1", 5, 9), ("HCOMPRESS_1", 22, 255), ("PLIO_1", 7, 99)]
)
def test_tiles_that_tell_of_another_size(tmp_path, codec, place, bad):
    # The library under fitsio would write or read where it has no memory.
    tiles = fits.CompImageHDU(ramp(2, 20, 20, dtype="i2"), compression_type=codec, tile_shape=(1, 20, 20))
    packed = bytearray(fits_bytes(None, tiles))
    (block,), _ = scan_file(put(tmp_path / "a.fits", bytes(packed)))
    np.testing.assert_array_equal(read_planes(block, 0, 2).data, ramp(2, 20, 20))
    hdu = hdus.layout(block.file).hdus[1]
    second = int.from_bytes(packed[hdu.data + 12 : hdu.data + 16], "big")
    packed[hdu.data + 16 + second + place] = bad
    (block,), _ = scan_file(put(tmp_path / "b.fits", bytes(packed)))
    np.testing.assert_array_equal(read_planes(block, 0, 1).data, ramp(1, 20, 20))
    with pytest.raises(ValueError, match=r"b\.fits: HDU 1: some of its compressed tiles are broken"):
        read_planes(block, 1, 2)


def test_claims_of_compressed_data_are_bounded(tmp_path, monkeypatch):
    tiles = fits_bytes(None, fits.CompImageHDU(ramp(40, 40, dtype="i4")))
    claim = b"ZNAXIS2 =                   40"
    assert claim in tiles
    file = put(tmp_path / "a.fits", tiles.replace(claim, b"ZNAXIS2 =           4000000000"))
    assert "4000000000 compressed tiles, the table has 40" in reason(file)
    wide = tiles.replace(claim.replace(b"2", b"1"), b"ZNAXIS1 =           4000000000")
    wide = wide.replace(b"ZTILE1  =                   40", b"ZTILE1  =           4000000000")
    assert "its header promises 4000000000 x 40 compressed pixels in" in reason(put(tmp_path / "b.fits", wide))
    monkeypatch.setattr(hdus, "MAX_RATIO", 2**30)
    assert "4000000000 x 40 pixels: decompress it first" in reason(put(tmp_path / "b.fits", wide))
    deep = tiles.replace(b"ZNAXIS  =                    2", b"ZNAXIS  =                    3")
    deep = deep.replace(b"ZTILE1  =                   40", b"ZNAXIS3 =            400000000")
    deep = deep.replace(b"ZTILE2  =                    1", b"ZTILE3  =            400000000")
    assert "40 x 40 x 400000000 compressed pixels in" in reason(put(tmp_path / "e.fits", deep))
    empty = re.sub(rb"NAXIS1  =  .{19}", b"NAXIS1  =                    0", tiles)
    assert "columns of 8 bytes, and rows of 0" in reason(put(tmp_path / "f.fits", empty))
    zero = tiles.replace(b"ZTILE1  =                   40", b"ZTILE1  =                    0")
    assert "tiles without pixels" in reason(put(tmp_path / "c.fits", zero))
    monkeypatch.setattr(hdus, "MAX_FILE", 50000)
    file = put(tmp_path / "d.fits.gz", gzip.compress(fits_bytes(np.zeros((200, 200)))))
    assert "decompress it first" in reason(file)


def test_stack_equals_loop(tmp_path):
    file = put(tmp_path / "a.fits", np.random.default_rng(0).normal(size=(7, 5, 6)).astype("f4"))
    (block,), _ = scan_file(file)
    whole = read_planes(block, 0, 7).data
    np.testing.assert_array_equal(whole, np.concatenate([read_planes(block, i, i + 1).data for i in range(7)]))


def test_image_too_large_for_memory(tmp_path, monkeypatch):
    (block,), _ = scan_file(put(tmp_path / "a.fits", ramp(5, 6)))

    def refuse(*_args):
        raise MemoryError

    monkeypatch.setattr(np, "fromfile", refuse)
    with pytest.raises(ValueError, match=r"a\.fits: HDU 0: it cannot be read: not enough memory"):
        read_planes(block, 0, 1)


def test_file_changed_after_the_scan(tmp_path):
    file = put(tmp_path / "a.fits", ramp(5, 6))
    (block,), _ = scan_file(file)
    put(tmp_path / "a.fits", ramp(50, 60))
    with pytest.raises(ValueError, match=r"a\.fits: HDU 0: .* changed after the scan"):
        read_planes(block, 0, 1)
    os.remove(file)
    with pytest.raises(ValueError, match=r"a\.fits: HDU 0: no such file"):
        read_planes(block, 0, 1)


# ---- table columns


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "i8", "f4", "f8"])
@pytest.mark.parametrize("cell", [(4, 5), (3, 4, 5), (1, 4, 5), (2, 3, 1, 4, 5)])
def test_image_column(tmp_path, dtype, cell):
    array = ramp(6, *cell, dtype=f">{dtype}" if dtype != "u1" else dtype)
    array = array % 100
    file = put(tmp_path / "a.fits", None, table(array))
    (block,), rejected = scan_file(file, column="flux")
    assert rejected == []
    flat = array.reshape(-1, 4, 5)
    assert (block.hdu, block.stop, block.ny, block.nx) == (1, len(flat), 4, 5)
    for start, stop in [(0, block.stop), (1, 4), (block.stop - 1, block.stop)]:
        np.testing.assert_array_equal(read_planes(block, start, stop, column="flux").data, flat[start:stop])


def test_scaled_column_with_null(tmp_path):
    array = ramp(3, 2, 2, dtype=">i2")
    file = put(tmp_path / "a.fits", None, table(array, TSCAL2=0.5, TZERO2=10, TNULL2=3))
    stack = read(file, column="FLUX")
    expected = array * 0.5 + 10.0
    expected[0, 1, 1] = np.nan
    np.testing.assert_array_equal(stack.data, expected)
    np.testing.assert_array_equal(stack.mask, np.isnan(expected))


def test_columns_that_are_no_images(tmp_path):
    columns = [
        fits.Column(name="VECTOR", format="6E", array=ramp(2, 6)),
        fits.Column(name="TEXT", format="6A", array=np.array(["abcdef", "ghijkl"])),
        fits.Column(name="RAGGED", format="PE()", array=np.array([ramp(3), ramp(4)], dtype=object)),
    ]
    file = put(tmp_path / "a.fits", None, fits.BinTableHDU.from_columns(columns))
    assert "TDIM1 = missing, 6 values a row" in reason(file, column="VECTOR")
    assert "no numbers in column TEXT" in reason(file, column="TEXT")
    assert "variable length in column RAGGED" in reason(file, column="RAGGED")
    assert "no column FLUX (it has VECTOR, TEXT, RAGGED)" in reason(file, column="FLUX")
    rows = fits_bytes(None, table(ramp(3, 2, 2)))
    empty = rows.replace(b"NAXIS2  =                    3", b"NAXIS2  =                    0")
    assert "has no rows" in reason(put(tmp_path / "b.fits", empty), column="FLUX", hdu=1)
    narrow = rows.replace(b"NAXIS1  =                   20", b"NAXIS1  =                   10")
    assert "does not fit into rows of 10 bytes" in reason(put(tmp_path / "c.fits", narrow), column="FLUX", hdu=1)
    many = rows.replace(b"TFIELDS =                    2", b"TFIELDS =           3000000000")
    assert "TFIELDS = 3000000000, wanted at most 999" in reason(put(tmp_path / "d.fits", many), column="FLUX", hdu=1)


# ---- masks and uncertainty maps


def test_mask_in_the_same_file(tmp_path):
    image, mask = ramp(2, 3, 4), np.zeros((2, 3, 4), "i2")
    mask[1, 2, 3], mask[0, 0, 0] = 1, 4
    nan = np.where(mask == 4, np.nan, 0.0)
    file = put(
        tmp_path / "a.fits",
        image,
        fits.ImageHDU(mask, name="DQ"),
        fits.ImageHDU(nan),
        fits.CompImageHDU(mask, name="Z"),
    )
    for setting in (1, "dq", {"hdu": "DQ"}, {"hdu": 1, "bits": [0, 2]}, "Z"):
        np.testing.assert_array_equal(read(file, mask=setting).mask, mask != 0)
    np.testing.assert_array_equal(read(file, mask={"hdu": "DQ", "bits": [2]}).mask, mask == 4)
    np.testing.assert_array_equal(read(file, mask={"hdu": "Z", "bits": [0]}).mask, mask == 1)
    np.testing.assert_array_equal(read(file, mask=2).mask, mask == 4)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4"])
def test_mask_bits(tmp_path, dtype):
    bits = 8 * np.dtype(dtype).itemsize - (0 if dtype == "u1" or dtype[0] == "u" else 1)
    bits = min(bits, 24 if dtype == "f4" else 64)
    top = bits - 1
    mask = np.array([[0, 1], [2**top, 2**top + 1]], dtype=dtype)
    file = put(tmp_path / "a.fits", ramp(2, 2), fits.ImageHDU(mask))
    assert read(file, mask={"hdu": 1, "bits": [0]}).mask[0].tolist() == [[False, True], [False, True]]
    assert read(file, mask={"hdu": 1, "bits": [top]}).mask[0].tolist() == [[False, False], [True, True]]
    assert not read(file, mask={"hdu": 1, "bits": [1]}).mask.any()


def test_companion_files(tmp_path):
    os.mkdir(tmp_path / "maps")
    file = put(tmp_path / "field.v2.fits.gz", gzip.compress(fits_bytes(ramp(2, 3, 4))))
    mask, sigma = np.zeros((3, 4), "u1"), np.full((2, 3, 4), 2.0)
    mask[1, 1] = 1
    put(tmp_path / "maps" / "field.v2_mask.fits", None, fits.ImageHDU(mask))
    put(tmp_path / "maps" / "field.v2_rms.fit", sigma)
    put(tmp_path / "maps" / "field.v2_bkg.fits", np.full((3, 4), 5.0))
    section = {
        "mask": {"files": f"{tmp_path}/maps/{{stem}}_mask.fits", "hdu": 1},
        "uncertainty": {"files": f"{tmp_path}/maps/{{stem}}_rms.*"},
        "background": {"files": f"{tmp_path}/maps/{{stem}}_bkg.fits"},
    }
    (block,), _ = scan_file(file, **section)
    stack = read_planes(block, 0, 2, **section)
    np.testing.assert_array_equal(stack.mask, np.broadcast_to(mask == 1, (2, 3, 4)))
    assert (stack.noise_map == 2).all()
    assert stack.noise_map.dtype == stack.data.dtype == np.float32
    np.testing.assert_array_equal(stack.data, ramp(2, 3, 4) - 5)
    # They belong to the image: a change shows.
    for name, values in (("rms.fit", sigma), ("bkg.fits", np.full((3, 4), 5.0))):
        put(tmp_path / "maps" / f"field.v2_{name}", values[:1])
        assert scan_file(file, **section)[0] != [block]
        with pytest.raises(ValueError, match="changed after the scan"):
            read_planes(block, 0, 2, **section)
        put(tmp_path / "maps" / f"field.v2_{name}", values)
        (block,), _ = scan_file(file, **section)
    put(tmp_path / "maps" / "field.v2_rms.fits", sigma)
    with pytest.raises(ValueError, match="2 files match"):
        read(file, **section)
    os.remove(tmp_path / "maps" / "field.v2_mask.fits")
    with pytest.raises(ValueError, match=r"maps/field\.v2_mask\.fits: no such file"):
        read(file, **section)


def test_maps_must_fit(tmp_path):
    image = fits.PrimaryHDU(ramp(3, 4, 5))
    file = put(
        tmp_path / "a.fits", image, fits.ImageHDU(ramp(5, 4)), fits.ImageHDU(ramp(2, 4, 5)), fits.ImageHDU(ramp(9))
    )
    with pytest.raises(ValueError, match=r"a\.fits: HDU 1 is 1 x 5 x 4 .* wanted 1 or 3 x 4 x 5 as in .*a\.fits"):
        read(file, mask=1)
    with pytest.raises(ValueError, match="HDU 2 is 2 x 4 x 5"):
        read(file, uncertainty=2)
    with pytest.raises(ValueError, match=r"a\.fits: HDU 1 is 1 x 5 x 4 .* wanted 1 or 3 x 4 x 5 as in .*a\.fits"):
        read(file, background=1)
    with pytest.raises(ValueError, match="HDU 3 has only one axis"):
        read(file, uncertainty={"variance": 3})
    with pytest.raises(ValueError, match="no HDU is called DQ"):
        read(file, mask="DQ")
    with pytest.raises(ValueError, match="no HDU 9"):
        read(file, mask=9)


def test_maps_follow_extver(tmp_path):
    parts = [
        fits.ImageHDU(np.full((3, 4), value, "i2"), name=name, ver=ver)
        for ver, value in ((1, 0), (2, 1))
        for name in ("SCI", "DQ")
    ]
    file = put(tmp_path / "a.fits", None, *parts)
    first, second = scan_file(file, hdu="SCI")[0]
    assert not read_planes(first, 0, 1, mask="DQ").mask.any()
    assert read_planes(second, 0, 1, mask="DQ").mask.all()
    put(tmp_path / "a.fits", None, *parts, fits.ImageHDU(np.zeros((3, 4)), name="DQ", ver=2))
    _, second = scan_file(file, hdu="SCI")[0]
    with pytest.raises(ValueError, match="3 HDUs are called DQ, 2 of them with EXTVER = 2"):
        read_planes(second, 0, 1, mask="DQ")


def test_map_without_hdu_follows_the_image(tmp_path):
    file = put(tmp_path / "a.fits", None, fits.ImageHDU(ramp(3, 4)), fits.ImageHDU(ramp(3, 4)))
    put(tmp_path / "a_dq.fits", None, fits.ImageHDU(np.zeros((3, 4))), fits.ImageHDU(np.ones((3, 4))))
    section = {"mask": {"files": str(tmp_path / "{stem}_dq.fits")}}
    blocks, _ = scan_file(file, hdu="all", **section)
    assert [read_planes(block, 0, 1, **section).mask.all() for block in blocks] == [False, True]


@pytest.mark.parametrize("kind", ["sigma", "variance", "weight"])
def test_uncertainty_kinds(tmp_path, kind):
    sigma = np.array([0.5, 1, 2, 4])
    values = np.array([{"sigma": sigma, "variance": sigma**2, "weight": sigma**-2}[kind], [0, -1, np.nan, np.inf]])
    file = put(tmp_path / "a.fits", ramp(2, 2, 4), fits.ImageHDU(values, name="MAP"))
    stack = read(file, uncertainty="MAP" if kind == "sigma" else {kind: "MAP"})
    np.testing.assert_array_equal(stack.mask, [[[False] * 4, [True] * 4]] * 2)
    np.testing.assert_array_equal(stack.noise_map, [[[0.5, 1, 2, 4], [1] * 4]] * 2)


def test_uncertainty_out_of_range_of_float32(tmp_path):
    stack = read(put(tmp_path / "a.fits", ramp(1, 3), fits.ImageHDU(np.array([[1e-60, 1.0, 1e60]]))), uncertainty=1)
    np.testing.assert_array_equal(stack.mask[0, 0], [True, False, True])
    np.testing.assert_array_equal(stack.noise_map[0, 0], [1, 1, 1])


def test_uncertainty_column(tmp_path):
    flux = ramp(3, 2, 2, dtype=">f4")
    hdu = table(flux)
    errors = fits.Column(name="FLUX_ERR", format="4E", dim="(2,2)", array=flux + 1)
    hdu = fits.BinTableHDU.from_columns(hdu.columns + errors)
    stack = read(put(tmp_path / "a.fits", None, hdu), column="FLUX", uncertainty={"column": "FLUX_ERR"})
    np.testing.assert_array_equal(stack.noise_map, flux + 1)
    aperture = put(tmp_path / "b.fits", None, hdu, fits.ImageHDU(np.eye(2, dtype="i4"), name="APERTURE"))
    np.testing.assert_array_equal(read(aperture, column="FLUX", mask="APERTURE").mask, [np.eye(2, dtype=bool)] * 3)


@pytest.mark.parametrize(("dtype", "expected"), [("i2", "f4"), ("f4", "f4"), ("i4", "f8"), ("f8", "f8")])
def test_background_is_subtracted(tmp_path, dtype, expected):
    image, level = ramp(2, 3, 4, dtype=dtype), ramp(2, 3, 4, dtype="f8") / 7
    level[0, 1, 2] = np.nan
    stack = read(put(tmp_path / "a.fits", image, fits.ImageHDU(level, name="BKG")), background="BKG")
    assert stack.data.dtype == np.dtype(expected)
    np.testing.assert_array_equal(stack.data, (image - level).astype(expected))
    np.testing.assert_array_equal(stack.mask, np.isnan(level))
    one = read(put(tmp_path / "b.fits", image, fits.ImageHDU(level[1], name="BKG")), background={"hdu": 1})
    np.testing.assert_array_equal(one.data, (image - level[1]).astype(expected))


def test_a_map_of_sextractor_is_the_background_of_its_image(shared_data):
    file = str(shared_data / "ntt" / "image.fits")
    raw, flat = (read(file, background=maps).data for maps in (None, {"files": str(shared_data / "ntt" / "back.fits")}))
    assert 6800 < np.median(raw) < 6900
    assert abs(np.median(flat)) < 10


def test_background_out_of_range_of_float32(tmp_path):
    stack = read(put(tmp_path / "a.fits", ramp(1, 3), fits.ImageHDU(np.array([[0, 1e60, np.inf]]))), background=1)
    np.testing.assert_array_equal(stack.data[0, 0], [0, np.nan, np.nan])
    np.testing.assert_array_equal(stack.mask[0, 0], [False, True, True])


@pytest.mark.parametrize("dtype", ["u2", "i4", "f4", "f8"])
@pytest.mark.parametrize("setting", [7.5, "SATURATE", "saturate", "CELL.SATURATION"])
def test_saturated_pixels_are_not_used(tmp_path, setting, dtype):
    image = ramp(3, 4, dtype=dtype)
    plain = fits.ImageHDU(image, name="SCI")
    plain.header["SATURATE"] = plain.header["HIERARCH CELL.SATURATION"] = 7.5
    packed = fits.CompImageHDU(image.astype("i4"), header=plain.header)
    first = fits.PrimaryHDU()
    first.header["SATURATE"] = 99.0
    file = put(tmp_path / "a.fits", first, plain, packed, fits.ImageHDU(image + 1))
    for block in scan_file(file, hdu=[1, 2])[0]:
        stack = read_planes(block, 0, 1, saturation=setting, background=3)
        # Of the pixels as they are in the file: what is subtracted saturates nothing, and is none of it.
        np.testing.assert_array_equal(stack.mask[0], image > 7)
        np.testing.assert_array_equal(stack.data[0], -1)


def test_saturation_is_a_number_of_the_type_of_the_pixels(tmp_path):
    image = np.array([[1.3, np.nan], [1.2999997, 1.4]], "f4")
    stack = read(put(tmp_path / "a.fits", image), saturation=1.3)
    assert stack.mask[0].tolist() == [[True, True], [False, True]]
    assert not read(put(tmp_path / "b.fits", ramp(2, 2)), saturation=1e300).mask.any()


def test_the_keyword_of_saturation_may_be_in_the_first_header_and_must_be_somewhere(tmp_path):
    first = fits.PrimaryHDU()
    first.header["SATURATE"], first.header["LEVEL"] = 5, "high"
    file = put(tmp_path / "a.fits", first, fits.ImageHDU(ramp(3, 4)))
    np.testing.assert_array_equal(read(file, saturation="SATURATE").mask[0], ramp(3, 4) >= 5)
    for keyword, got in (("level", "LEVEL = high"), ("MAXLIN", "its header has no MAXLIN")):
        with pytest.raises(ValueError, match=rf"a\.fits: HDU 1: {got}, wanted the value of saturated pixels"):
            read(file, saturation=keyword)
