"""Compressed pixels are what astropy says they are, and broken tiles reach no decoder."""

import gzip
import re

import numpy as np
import pytest
from astropy.io import fits

from pipeline import hdus
from pipeline.images import read_planes, scan_file
from tests.fits_files import END, fits_bytes, put, ramp, read, reason

pytestmark = pytest.mark.filterwarnings("ignore::astropy.utils.exceptions.AstropyUserWarning")


def test_codecs_are_pixel_identical(shared_data):
    plain = read(str(shared_data / "m13" / "m13.fits")).data
    for codec in ("gzip", "hcomp", "plio", "rice"):
        np.testing.assert_array_equal(read(str(shared_data / "m13" / f"m13_{codec}.fits")).data, plain)


def test_compressed_nan(shared_data):
    file = str(shared_data / "m13" / "compressed_with_nan.fits")
    stack, values = read(file), fits.getdata(file, 1)
    np.testing.assert_array_equal(stack.data[0], values)
    assert stack.mask.sum() == np.isnan(values).sum() == 1


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
