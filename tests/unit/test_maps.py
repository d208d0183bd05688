"""Masks, uncertainty maps and backgrounds: found, fitting, and what they say."""

import gzip
import os

import numpy as np
import pytest
from astropy.io import fits

from pipeline.images import read_planes, scan_file
from tests.fits_files import fits_bytes, put, ramp, read, table

pytestmark = pytest.mark.filterwarnings("ignore::astropy.utils.exceptions.AstropyUserWarning")


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
