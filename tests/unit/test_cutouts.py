"""Laws of cutouts: a stamp holds the pixels of its plane, positions are where the table says, and none is lost."""

import numpy as np
import pytest
from astropy import units
from astropy.io import fits
from astropy.table import MaskedColumn, Table
from hypothesis import given
from hypothesis.extra import numpy as hnp

from pipeline.columns import NEAR
from pipeline.cutouts import first_pixels, nowhere, of_others, read_positions, scan_stamps
from pipeline.images import LEAST, Block, Rejected, as_runs, of_runs, read_planes, scan_file

CELESTIAL = {
    "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.0, "CRVAL2": 2.0, "CRPIX1": 21.0, "CRPIX2": 16.0,
    "CDELT1": -1e-3, "CDELT2": 1e-3,
}  # fmt: skip


def ramp(*shape):
    return np.arange(np.prod(shape), dtype="f4").reshape(shape)


def put(path, data, *others, **header):
    fits.HDUList([fits.PrimaryHDU(data, fits.Header(header)), *others]).writeto(path)
    return str(path)


def positions(folder, name="positions.csv", **columns):
    file = folder / name
    Table(columns).write(file)
    return str(file)


def cut(file, cutouts, **section) -> Block:
    """The only block of a file, with its stamps."""
    (block,), rejected = scan_stamps(file, folder="", cutouts=cutouts, **section)
    assert rejected == []
    return block


def reason(file, cutouts):
    """The reason for which nothing is cut out of a file."""
    found, (rejected,) = scan_stamps(file, folder="", cutouts=cutouts)
    assert found == []
    assert rejected[:4] == (file, 0, -1, -1)
    return rejected.reason


def read(block, **section):
    return read_planes(block, block.start, block.stop, **section)


def padded(plane, x, y, size):
    """A stamp by the book: a plane with a wide margin of NaN, sliced."""
    wide = np.pad(plane.astype(float), 3 * size, constant_values=np.nan)
    return wide[y + 3 * size : y + 4 * size, x + 3 * size : x + 4 * size]


# ---- tables


@pytest.mark.parametrize("name", ["t.fits", "t.csv", "t.ecsv", "t.vot", "t.parquet", "t.dat"])
def test_every_format_gives_the_same_positions(tmp_path, name):
    file = tmp_path / name
    table = Table({"ID": ["a", "b"], "RA": [150.25, 0.5], "Dec": [-2.5, 89.0]})
    table.write(file, **{"t.dat": {"format": "ascii"}, "t.vot": {"format": "votable"}}.get(name, {}))
    found = read_positions(str(file))
    assert (found.kind, found.first.tolist(), found.second.tolist()) == ("sky", [150.25, 0.5], [-2.5, 89.0])
    assert found.first.dtype == found.second.dtype == np.float64


@pytest.mark.parametrize("pair", [("RAJ2000", "DEJ2000"), ("ra_deg", "DEC_deg"), ("RA_ICRS", "DE_ICRS"), ("x", "Y")])
def test_columns_go_by_several_names(tmp_path, pair):
    found = read_positions(positions(tmp_path, **dict(zip(pair, ([1.5], [2]), strict=True))))
    assert (found.kind, found.first.tolist(), found.second.tolist()) == ("pixel" if "x" in pair else "sky", [1.5], [2])


def test_the_sky_goes_first(tmp_path):
    assert read_positions(positions(tmp_path, x=[1], y=[2], ra=[3], dec=[4])).first.tolist() == [3]


def test_angles_have_units(tmp_path):
    file = positions(tmp_path, "t.ecsv", ra=[1.0] * units.hourangle, dec=[600.0] * units.arcmin)
    assert read_positions(file).first == pytest.approx(15)
    assert read_positions(file).second == pytest.approx(10)


def test_what_is_no_position_is_nan(tmp_path):
    table = Table({"ra": MaskedColumn([1.0, 2, np.nan, 4, 5], mask=[1, 0, 0, 0, 0]), "dec": [0, 91, 0, np.inf, -90.0]})
    table.write(tmp_path / "t.ecsv")
    found = read_positions(str(tmp_path / "t.ecsv"))
    np.testing.assert_array_equal(found.first, [np.nan] * 4 + [5])
    np.testing.assert_array_equal(found.second, [np.nan] * 4 + [-90])


def test_what_is_no_table_of_positions_is_said_to_be_none(tmp_path):
    cases = {
        str(tmp_path / "gone.csv"): "No such file or directory, wanted a table",
        str(tmp_path): "wanted FITS, VOTable, ECSV, CSV or Parquet",
        positions(tmp_path, "a.csv", ra=[1], y=[2]): "it has the columns ra, y, wanted ra and dec [deg], or x and y",
        positions(tmp_path, "b.csv", x=np.zeros(0), y=np.zeros(0)): "empty",
        positions(tmp_path, "c.csv", ra=["1 2 3"], dec=["4 5 6"]): "column ra is <U5 of shape (1,), wanted one number",
        positions(tmp_path, "d.ecsv", ra=[1.0] * units.m, dec=[2.0] * units.m): "column ra is in m, wanted deg",
        positions(tmp_path, "e.fits", x=np.zeros((2, 3)), y=[1, 2]): "column x is >f8 of shape (2, 3), wanted one",
        put(tmp_path / "f.fits", ramp(4, 4)): "cannot be read as a table",
    }
    for file, sentence in cases.items():
        with pytest.raises(ValueError, match=r"^images\.cutouts") as refusal:
            read_positions(file)
        assert f"images.cutouts.positions: {file}: " in str(refusal.value)
        assert sentence in str(refusal.value)


def test_a_changed_table_is_read_again(tmp_path):
    assert read_positions(positions(tmp_path, x=[1], y=[2])).first.tolist() == [1]
    (tmp_path / "positions.csv").unlink()
    assert read_positions(positions(tmp_path, x=[7], y=[2])).first.tolist() == [7]


# ---- stamps


@pytest.mark.parametrize("size", [8, 9])
def test_a_position_is_in_the_middle_of_its_stamp(size):
    x = np.random.default_rng(3).uniform(-50, 50, 1000)
    off = x - (first_pixels(x, size) + (size - 1) / 2)
    assert (np.abs(off) <= 0.5).all()
    # Whole pixels move the stamp by as many.
    assert (first_pixels(np.arange(-5.0, 6), size) == np.arange(-5, 6) + first_pixels(np.zeros(1), size)).all()


@pytest.mark.parametrize("size", [8, 13, 100])
@pytest.mark.parametrize("how", ["plain", "gzip", "tiled"])
def test_stamps_are_slices_with_nothing_beyond_the_edge(tmp_path, how, size):
    data = ramp(3, 20, 40).astype("i2")
    file = put(tmp_path / "a.fits", data)
    if how != "plain":
        file = str(tmp_path / ("b.fits.gz" if how == "gzip" else "b.fits"))
        fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(data)] if how == "tiled" else fits.PrimaryHDU(data)).writeto(
            file
        )
    x, y = [20, 0, 39, -0.5, 20.4, 39.49], [10, 0, 19, 5, 19.49, -0.5]
    block = cut(file, {"positions": positions(tmp_path, x=x, y=y), "size": size})._replace(taken=None)
    assert (block.start, block.stop, block.ny, block.nx) == (0, 18, 20, 40)
    assert block.stamps[:, 0].tolist() == np.arange(3).repeat(6).tolist()
    assert block.stamps[:, 1].tolist() == [*range(6)] * 3
    stack = read(block, cutouts={"size": size})
    wanted = [padded(data[plane], x, y, size) for plane, _, x, y in block.stamps.tolist()]
    np.testing.assert_array_equal(stack.data, wanted)
    np.testing.assert_array_equal(stack.mask, np.isnan(wanted))
    parts = [read_planes(block, i, i + 1, cutouts={"size": size}).data[0] for i in range(18)]
    np.testing.assert_array_equal(parts, stack.data)


def test_stamps_of_a_table_column(tmp_path):
    data = ramp(4, 12, 10)
    column = fits.Column("Flux", "120E", dim="(10,12)", array=data)
    fits.BinTableHDU.from_columns([fits.Column("TIME", "D", array=np.arange(4)), column]).writeto(tmp_path / "t.fits")
    cutouts = {"positions": positions(tmp_path, x=[3, 9], y=[4, 0]), "size": 8}
    stack = read(cut(str(tmp_path / "t.fits"), cutouts, column="FLUX"), cutouts=cutouts, column="FLUX")
    np.testing.assert_array_equal(
        stack.data, [padded(plane, *corner, 8) for plane in data for corner in ((0, 1), (6, -3))]
    )


def test_scaled_and_blank_pixels_are_those_of_the_plane(tmp_path):
    hdu = fits.PrimaryHDU(np.arange(400, dtype="i2").reshape(20, 20), fits.Header({"BLANK": 5}))
    hdu.header["BSCALE"], hdu.header["BZERO"] = 0.5, 100.25
    hdu.writeto(tmp_path / "a.fits")
    cutouts = {"positions": positions(tmp_path, x=[5], y=[0]), "size": 8}
    block = cut(str(tmp_path / "a.fits"), cutouts)
    (whole,), _ = scan_file(block.file)
    np.testing.assert_array_equal(
        read(block, cutouts=cutouts).data[0], padded(read(whole).data[0], *block.stamps[0, 2:], 8)
    )


@pytest.mark.parametrize("planes", [1, 2])
def test_mask_and_maps_are_cut_alike(tmp_path, planes):
    r = np.random.default_rng(7)
    masks, sigmas = (r.random((planes, 20, 20)) < 0.1).astype("u1"), r.uniform(-0.2, 1, (planes, 20, 20)).astype("f4")
    levels = r.normal(size=(planes, 20, 20))
    others = [fits.ImageHDU(values) for values in (masks, sigmas, levels)]
    file = put(tmp_path / "a.fits", ramp(2, 20, 20), *others)
    section = {"mask": 1, "uncertainty": 2, "background": 3, "saturation": 700}
    cutouts = {"positions": positions(tmp_path, x=[3, 12], y=[2, 19]), "size": 10}
    block = cut(file, cutouts, **section)
    (whole,), _ = scan_file(file, **section)
    block = block._replace(taken=None)
    planes_, stamps = read(whole, **section), read(block, cutouts=cutouts, **section)
    for i, (plane, _, *corner) in enumerate(block.stamps.tolist()):
        np.testing.assert_array_equal(stamps.data[i], padded(planes_.data[plane], *corner, 10))
        hidden = padded(planes_.mask[plane], *corner, 10)
        np.testing.assert_array_equal(stamps.mask[i], np.where(np.isnan(hidden), True, hidden))
        noise = padded(planes_.noise_map[plane], *corner, 10)
        np.testing.assert_array_equal(stamps.noise_map[i], np.where(np.isnan(noise), 1, noise))


def test_positions_on_the_sky_are_placed_by_the_header(tmp_path):
    file = put(tmp_path / "a.fits", ramp(30, 40), **CELESTIAL)
    # At the reference pixel, one pixel east of it and one north; on the other side of the sky; nowhere.
    east = 150 + 1e-3 / np.cos(np.radians(2.0))
    table = positions(tmp_path, ra=[150, east, 150, 330, np.nan], dec=[2, 2, 2.001, -2, 0])
    block = cut(file, {"positions": table, "size": 9})
    assert block.stamps.tolist() == [[0, 0, 16, 11], [0, 1, 15, 11], [0, 2, 16, 12]]


def test_what_shows_no_source_says_why(tmp_path):
    file = put(tmp_path / "a.fits", ramp(30, 40))
    assert "its header says nothing of the sky" in reason(
        file, {"positions": positions(tmp_path, ra=[150], dec=[2]), "size": 9}
    )
    table = positions(tmp_path, "far.csv", x=[40, 3], y=[3, 29.5])
    assert reason(file, {"positions": table, "size": 9}) == f"none of the 2 positions of {table} lies in it"


def test_no_position_is_lost(tmp_path):
    files = [put(tmp_path / "a.fits", ramp(30, 40)), put(tmp_path / "b.fits", ramp(50, 10))]
    cutouts = {"positions": positions(tmp_path, x=[5, 39, 3, 39, np.nan], y=[5, 2, 45, 45, 1]), "size": 9}
    blocks = [cut(file, cutouts) for file in files]
    assert [block.stamps[:, 1].tolist() for block in blocks] == [[0, 1], [0, 2]]
    table = cutouts["positions"]
    assert nowhere(blocks, cutouts) == [
        Rejected(table, -1, -1, 3, "this position lies in none of the images"),
        Rejected(table, -1, -1, 4, "no position: masked, or not finite"),
    ]
    assert len(nowhere([], cutouts)) == 5


# ---- neighbours


def nearest(x, y, size):
    """Of each stamp by the book: pixels (True) whose nearest position is another, and how far beyond the middle."""
    for x0, y0, left, low in zip(x, y, first_pixels(x, size), first_pixels(y, size), strict=True):
        rows, columns = np.mgrid[low : low + size, left : left + size]
        counted = np.hypot(x - x0, y - y0) > NEAR
        far = np.hypot(columns[..., None] - x[counted], rows[..., None] - y[counted]).min(axis=2, initial=np.inf)
        yield far < np.hypot(columns - x0, rows - y0)


@pytest.mark.parametrize("size", [8, 17])
@pytest.mark.parametrize("width", [30, 60, 400])
def test_a_pixel_belongs_to_the_nearest_position(width, size):
    x, y = np.random.default_rng(width).uniform(0, width, (2, 60))
    some = 0
    for taken, wanted in zip(of_others(x, y, size), nearest(x, y, size), strict=True):
        assert (~taken).sum() >= LEAST
        assert not (taken & ~wanted).any()
        if (~wanted).sum() >= LEAST:
            np.testing.assert_array_equal(taken, wanted)
            some += 1
    assert some > 5


def test_pixels_are_shared_out_and_none_is_lost():
    x, y = np.array([20.0, 27.3]), np.array([20.0, 21.1])
    owner = np.zeros((40, 40), int)
    for taken, left, low in zip(of_others(x, y, 16), first_pixels(x, 16), first_pixels(y, 16), strict=True):
        owner[low : low + 16, left : left + 16] += ~taken
    assert owner.max() == 1
    assert (owner[14:29, 13:36] == 1).all()


def test_positions_that_are_far_or_the_same_take_nothing():
    for off, takes in ((0, False), (0.7, False), (NEAR - 0.01, False), (NEAR + 0.01, True), (20, True), (23.1, False)):
        turned = off * np.array([0.6, 0.8])
        x, y = np.array([[50.3], [50.1]]) + np.array([[0, turned[0]], [0, turned[1]]])
        assert [taken.any() for taken in of_others(x, y, 16)] == [takes, takes], off


def test_the_order_of_the_table_and_far_positions_change_nothing():
    x, y = np.random.default_rng(8).uniform(0, 60, (2, 40))
    wanted = list(of_others(x, y, 16))
    for i, taken in zip(np.arange(40)[::-1], of_others(x[::-1], y[::-1], 16), strict=True):
        np.testing.assert_array_equal(taken, wanted[i])
    far = np.append(x, 500), np.append(y, 500)
    for taken, before in zip(of_others(*far, 16), wanted, strict=False):
        np.testing.assert_array_equal(taken, before)


def test_stamps_leave_out_what_is_nearer_to_others(tmp_path):
    file = put(tmp_path / "a.fits", ramp(3, 40, 50))
    x, y = np.array([10.2, 15.4, 40, 20]), np.array([12.1, 14.9, 30, 60])
    cutouts = {"positions": positions(tmp_path, x=x, y=y), "size": 12}
    block = cut(file, cutouts)
    stack = read(block, cutouts=cutouts)
    # The fourth lies in no plane: it counts nowhere.
    wanted = list(nearest(x[:3], y[:3], 12)) * 3
    np.testing.assert_array_equal(stack.mask, wanted)
    assert [bool(runs) for runs in block.taken] == [True, True, False] * 3
    np.testing.assert_array_equal(read_planes(block, 4, 6, cutouts=cutouts).mask, wanted[4:6])
    alone = cut(file, {"positions": positions(tmp_path, "b.csv", x=x[2:], y=y[2:]), "size": 12})
    assert alone.taken is None


def test_what_neighbours_leave_is_enough_for_a_fit(tmp_path):
    data = ramp(40, 50)
    data[:, :13] = np.nan  # the edge of what was seen, of which the table knows nothing
    cutouts = {"positions": positions(tmp_path, x=[12.0, 17.0], y=[20.0, 20.0]), "size": 12}
    stack = read(cut(put(tmp_path / "a.fits", data), cutouts), cutouts=cutouts)
    np.testing.assert_array_equal(stack.mask[0], np.isnan(stack.data[0]))
    assert (~stack.mask[1]).sum() == 12 * 9  # columns 15 to 23


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_runs_tell_of_every_pixel(chosen):
    np.testing.assert_array_equal(of_runs(as_runs(chosen), chosen.shape), chosen)
    assert (as_runs(chosen) == "") == (not chosen.any())
