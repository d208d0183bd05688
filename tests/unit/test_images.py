"""Every file ends as blocks or as reasons, nothing crashes or hangs, and pixels are what astropy says they are."""

import bz2
import gzip
import os
import tempfile

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.headers import read_header
from pipeline.images import read_planes, scan_file
from pipeline.listing import list_files
from tests.fits_files import fits_bytes, put, ramp, read, reason, table

pytestmark = pytest.mark.filterwarnings("ignore::astropy.utils.exceptions.AstropyUserWarning")


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
