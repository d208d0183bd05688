"""The images of shards: their order, stamps, what headers say of sky and beam. The fit itself is a stand-in."""

import logging
from pathlib import Path

import h5py
import numpy as np
import pytest
from astropy.io import fits

import pipeline.fit
from pipeline import batches
from pipeline.catalogue import read_rows
from pipeline.columns import BIT
from pipeline.correlation import kernel_fwhm
from tests.stand_in import (
    FIT,
    READING,
    certified,
    chosen_of,
    fitted,
    good_fit,
    mean_as_fit,
    scanned,
    table_of,
    use_stand_in,
    write,
)

CELESTIAL = {
    "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.0, "CRVAL2": 2.0, "CRPIX1": 3.0, "CRPIX2": 3.0,
    "CDELT1": -1e-4, "CDELT2": 1e-4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    use_stand_in(monkeypatch)


def test_rows_keep_the_order_of_the_manifest_whatever_the_sizes_and_batches(tmp_path, monkeypatch):
    write(tmp_path / "a.fits", (5, 8, 8), 10)
    write(tmp_path / "b.fits", (6, 9), 20)
    write(tmp_path / "c.fits", (3, 8, 8), 30)
    (manifest,) = scanned(tmp_path, [str(tmp_path)])
    whole = fitted(tmp_path, manifest)
    assert whole["amp"].tolist() == [10, 11, 12, 13, 14, 20, 30, 31, 32]
    assert whole["plane"].tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2]
    assert [Path(file).name[0] for file in whole["file"]] == list("aaaaabccc")
    monkeypatch.setattr(batches, "BATCH_PIXELS", 2 * 64)
    pieces = fitted(tmp_path, manifest)
    np.testing.assert_equal(pieces, whole)


def test_pixels_keep_their_type_whatever_is_fitted_beside_them(tmp_path, monkeypatch):
    """Else a row would depend on its neighbours."""
    for name, value, dtype in (("a", 10, np.float32), ("b", 20, np.float64), ("c", 30, np.float32)):
        fits.PrimaryHDU(np.full((8, 8), value, dtype)).writeto(tmp_path / f"{name}.fits")
    seen = {}

    def fit(data, *args, **settings):
        seen[data.dtype.name] = data[:, 0, 0].tolist()
        return mean_as_fit(data, *args, **settings)

    monkeypatch.setattr(pipeline.fit, "fit_rows", fit)
    (manifest,) = scanned(tmp_path, [str(tmp_path)])
    assert fitted(tmp_path, manifest)["amp"].tolist() == [10, 20, 30]
    assert seen == {"float32": [10, 30], "float64": [20]}


def test_one_bad_plane_costs_itself_alone(tmp_path, monkeypatch):
    write(tmp_path / "a.fits", (7, 8, 8), 10)
    (manifest,) = scanned(tmp_path, [str(tmp_path)])
    read = batches.read_images

    def broken(block, start, stop, **reading):
        if start <= 4 < stop:
            msg = "plane 4 is spoilt"
            raise ValueError(msg)
        return read(block, start, stop, **reading)

    monkeypatch.setattr(batches, "read_images", broken)
    rows = fitted(tmp_path, manifest)
    assert rows["plane"].tolist() == [0, 1, 2, 3, 5, 6]
    assert rows["amp"].tolist() == [10, 11, 12, 13, 15, 16]
    rejected = read_rows(tmp_path / "part.h5", table="rejected")
    assert [(row, reason) for row, reason in zip(rejected["plane"], rejected["reason"], strict=True)] == [
        (4, "plane 4 is spoilt")
    ]


def test_stamps_are_rows_in_pixels_of_their_plane(tmp_path, monkeypatch):
    write(tmp_path / "a.fits", (2, 30, 40), 10, **CELESTIAL)
    table = table_of(tmp_path / "p.csv", x=[20, 50, 0, 39, 20], y=[15, 5, 0, 29, 28])
    cutouts = {"positions": table, "size": 8}
    (manifest,) = scanned(tmp_path, [str(tmp_path / "a.fits")], cutouts=cutouts)
    rows = fitted(tmp_path, manifest, cutouts=cutouts)
    assert rows["plane"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert rows["source"].tolist() == [0, 2, 3, 4] * 2
    assert len(set(rows["image_id"])) == 8
    # The stand-in finds everything at pixel (2, 2) of the stamp.
    assert rows["x0"].tolist() == [19, -1, 38, 19] * 2
    assert rows["y0"].tolist() == [14, -1, 28, 27] * 2
    # Coordinates of the plane: CRPIX is the pixel (2, 2).
    assert rows["dec"] == pytest.approx(2 + (rows["y0"] - 2) * 1e-4, abs=1e-7)
    rejected = read_rows(tmp_path / "part.h5", table="rejected")
    assert [(Path(rejected["file"][0]).name, rejected["source"][0])] == [("p.csv", 1)]
    monkeypatch.setattr(batches, "BATCH_PIXELS", 3 * 64)
    np.testing.assert_equal(fitted(tmp_path, manifest, cutouts=cutouts), rows)


def test_the_source_of_a_stamp_is_looked_for_near_its_middle(tmp_path, monkeypatch):
    asked = []

    def listening(*stack, near, **settings):
        asked.append(near)
        return good_fit(*stack, near=near, **settings)

    monkeypatch.setattr(pipeline.fit, "fit_rows", listening)
    write(tmp_path / "a.fits", (4, 30, 40), 10)
    cutouts = {"positions": table_of(tmp_path / "p.csv", x=[20], y=[15]), "size": 8}
    certified(tmp_path, scanned(tmp_path, [str(tmp_path / "a.fits")], cutouts=cutouts), cutouts=cutouts)
    certified(tmp_path, scanned(tmp_path, [str(tmp_path / "a.fits")]))
    assert asked == [2.0, 2.0, np.inf, np.inf]


def test_a_fit_that_leaves_the_middle_of_its_stamp_is_flagged(tmp_path, monkeypatch):
    """By more than 2 pixels along x or y, and more than the width of what it has found."""
    away, wide = np.array([[0, 0], [2, -2], [2.1, 0], [0, -2.1], [2.1, 2.1], [np.nan, 0]]).T, [1, 1, 1, 1, 3, 1]

    def leaving(*stack, **settings):
        rows, covariance = mean_as_fit(*stack, **settings)
        places = {name: 3.5 + offset for name, offset in zip(("x0", "y0"), away, strict=True)}
        return rows | places | {"sigma_major": np.array(wide, float)}, covariance

    monkeypatch.setattr(pipeline.fit, "fit_rows", leaving)
    write(tmp_path / "a.fits", (30, 40), 10)
    cutouts = {"positions": table_of(tmp_path / "p.csv", x=[5, 10, 15, 20, 25, 30], y=[15.0] * 6), "size": 8}
    rows = fitted(tmp_path, *scanned(tmp_path, [str(tmp_path / "a.fits")], cutouts=cutouts), cutouts=cutouts)
    assert (rows["flags"] & BIT["OFF_POSITION"] > 0).tolist() == [False, False, True, True, False, False]


def test_the_edge_of_the_plane_is_an_edge(tmp_path, monkeypatch):
    def wide(*stack, **settings):
        rows, covariance = mean_as_fit(*stack, **settings)
        return rows | {"sigma_major": np.full(len(stack[0]), 3.0)}, covariance

    monkeypatch.setattr(pipeline.fit, "fit_rows", wide)
    write(tmp_path / "a.fits", (30, 40), 10)
    # The edges are at -0.5 and 39.5.
    cutouts = {"positions": table_of(tmp_path / "p.csv", x=[3, 4, 37, 38, 20], y=[15.0] * 5), "size": 8}
    (manifest,) = scanned(tmp_path, [str(tmp_path / "a.fits")], cutouts=cutouts)
    rows = fitted(tmp_path, manifest, cutouts=cutouts)
    assert rows["x0"].tolist() == [2, 3, 36, 37, 19]
    assert (rows["flags"] & BIT["NEAR_EDGE"] > 0).tolist() == [True, False, False, True, False]


def test_a_plane_that_cannot_be_read_costs_its_stamps_a_row_each(tmp_path, monkeypatch):
    write(tmp_path / "a.fits", (3, 30, 40), 10)
    cutouts = {"positions": table_of(tmp_path / "p.csv", x=[5, 25], y=[5, 25]), "size": 8}
    (manifest,) = scanned(tmp_path, [str(tmp_path / "a.fits")], cutouts=cutouts)
    read, calls = batches.read_images, []

    def broken(block, start, stop, **reading):
        calls.append(start)
        if 1 in block.stamps[start:stop, 0]:
            msg = "plane 1 is spoilt"
            raise ValueError(msg)
        return read(block, start, stop, **reading)

    monkeypatch.setattr(batches, "read_images", broken)
    rows = fitted(tmp_path, manifest, cutouts=cutouts)
    assert list(zip(rows["plane"], rows["source"], strict=True)) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    rejected = read_rows(tmp_path / "part.h5", table="rejected")
    assert list(zip(rejected["plane"], rejected["source"], strict=True)) == [(1, 0), (1, 1)]
    assert set(rejected["reason"]) == {"plane 1 is spoilt"}


def test_headers_give_sky_units_and_flags(tmp_path):
    write(tmp_path / "a.fits", (8, 8), 1, BUNIT="Jy/beam", **CELESTIAL)
    write(tmp_path / "b.fits", (8, 8), 2, BUNIT="Jy/beam", **CELESTIAL | {"CDELT1": 0.0})
    write(tmp_path / "c.fits", (8, 8), 3, BUNIT="Jy/beam")
    (manifest,) = scanned(tmp_path, [str(tmp_path)])
    rows = fitted(tmp_path, manifest)
    assert np.isfinite(rows["ra"]).tolist() == [True, False, False]
    assert rows["dec"][0] == pytest.approx(2.0, abs=1e-9)
    assert (rows["flags"] & BIT["NO_SKY"] > 0).tolist() == [False, True, False]
    assert rows["ra_err"][0] == pytest.approx(3600e-4, rel=1e-6)
    with h5py.File(tmp_path / "part.h5") as part:
        assert part.attrs["unit"] == "Jy/beam"


#: 4 x 2 pixels where the scale is that of CELESTIAL.
BEAM = {"BMAJ": 4e-4, "BMIN": 2e-4, "BPA": 30.0}


def test_the_beam_smooths_the_noise_of_its_own_images(tmp_path, caplog):
    write(tmp_path / "a.fits", (2, 8, 8), 1, **CELESTIAL | BEAM)
    write(tmp_path / "b.fits", (8, 8), 2, **CELESTIAL)
    write(tmp_path / "c.fits", (8, 8), 3, **BEAM)
    write(tmp_path / "d.fits", (8, 8), 4, **CELESTIAL | BEAM | {"CDELT1": -2e-4, "CDELT2": 2e-4})
    (manifest,) = scanned(tmp_path, [str(tmp_path)])
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        rows = fitted(tmp_path, manifest, fit=FIT | {"correlation": "beam"})
    pixels = np.sqrt(8)
    assert rows["noise_fwhm"] == pytest.approx([pixels, pixels, np.nan, np.nan, pixels / 2], rel=1e-6, nan_ok=True)
    assert "2 of 5 images: no beam in pixels; noise_fwhm is estimated" in caplog.text


def test_a_source_no_larger_than_the_beam_is_unresolved(tmp_path):
    for name, beam in (("a", {}), ("b", BEAM), ("c", {"BMAJ": 1e-5, "BMIN": 1e-5})):
        write(tmp_path / f"{name}.fits", (8, 8), 1, **CELESTIAL | beam)
    (manifest,) = scanned(tmp_path, [str(tmp_path)])
    rows = fitted(tmp_path, manifest)
    assert np.isfinite(rows["deconvolved_major_limit"]).tolist() == [False, True, True]
    assert (rows["flags"] & BIT["UNRESOLVED"] > 0).tolist() == [False, True, True]  # errors of the stand-in are large
    assert rows["deconvolved_major"][2] > 0


def test_the_beam_of_a_stamp_is_that_of_its_middle(tmp_path, monkeypatch):
    """Here on a map of the whole sky, where it is narrower in pixels towards a pole; also of the certificate's."""
    monkeypatch.setattr(pipeline.fit, "fit_rows", good_fit)
    sky = {"CTYPE1": "RA---CAR", "CTYPE2": "DEC--CAR", "CRVAL2": 0.0, "CRPIX1": 1.0, "CRPIX2": 1.0}
    write(tmp_path / "a.fits", (100, 40), 1, **CELESTIAL | sky | {"CDELT1": -0.8, "CDELT2": 0.8, "BMAJ": 2, "BMIN": 2})
    cutouts = {"positions": table_of(tmp_path / "p.csv", x=[20] * 4, y=[10, 40, 60, 90]), "size": 8}
    (manifest,) = scanned(tmp_path, [str(tmp_path / "a.fits")], cutouts=cutouts)
    rows = fitted(tmp_path, manifest, fit=FIT | {"correlation": "beam"}, cutouts=cutouts)
    middle = np.radians(0.8 * (rows["y0"] - 2 + 3.5))  # the stand-in finds everything at (2, 2)
    assert rows["noise_fwhm"] == pytest.approx(2.5 / np.sqrt(np.cos(middle)), rel=1e-3)
    chosen, reading = chosen_of(tmp_path / "part.h5"), READING | {"cutouts": cutouts, "folder": tmp_path}
    ((_, found),) = batches.of_rows(chosen, [manifest], 4, reading, beams=True)
    again = dict(zip(found["image_id"], map(kernel_fwhm, found["kernel"]), strict=True))
    assert again == dict(zip(rows["image_id"], rows["noise_fwhm"], strict=True))


def test_the_certificate_knows_the_beam(tmp_path, monkeypatch):
    seen = []

    def watched(*stack, correlation, **settings):
        seen.append(correlation)
        return good_fit(*stack, correlation=correlation, **settings)

    monkeypatch.setattr(pipeline.fit, "fit_rows", watched)
    write(tmp_path / "a.fits", (4, 8, 8), 1, **CELESTIAL | BEAM)
    certified(tmp_path, scanned(tmp_path, [str(tmp_path / "a.fits")]), fit=FIT | {"correlation": "beam"})
    run, again = seen
    assert run.shape == (4, 3)
    np.testing.assert_array_equal(again, run)


def test_the_unit_of_a_table_column_is_its_own(tmp_path):
    column = fits.Column("Flux", "64E", "e/s", dim="(8,8)", array=np.ones((4, 8, 8), np.float32))
    fits.BinTableHDU.from_columns([fits.Column("TIME", "D", "d", array=np.arange(4)), column]).writeto(
        tmp_path / "t.fits"
    )
    (manifest,) = scanned(tmp_path, [str(tmp_path)], column="FLUX")
    assert fitted(tmp_path, manifest, column="FLUX")["plane"].tolist() == [0, 1, 2, 3]
    with h5py.File(tmp_path / "part.h5") as part:
        assert part.attrs["unit"] == "e/s"


def test_the_certificate_counts_from_the_first_pixel_of_stamps(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.fit, "fit_rows", good_fit)
    write(tmp_path / "a.fits", (2, 30, 40), 10)
    cutouts = {"positions": table_of(tmp_path / "p.csv", x=[20, 12], y=[15, 9]), "size": 8}
    (manifest,) = scanned(tmp_path, [str(tmp_path / "a.fits")], cutouts=cutouts)
    assert fitted(tmp_path, manifest, cutouts=cutouts)["x0"].tolist() == [19, 11] * 2
    rows = chosen_of(tmp_path / "part.h5")
    ((stack, found),) = batches.of_rows(rows, [manifest], 4, READING | {"cutouts": cutouts, "folder": tmp_path})
    assert stack.data.shape == (4, 8, 8)
    for name in ("x0", "y0", "x0_start", "y0_start"):
        assert found[name].tolist() == [2] * 4, name


def test_images_that_have_gone_are_left_out_of_the_certificate(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pipeline.fit, "fit_rows", good_fit)
    write(tmp_path / "a.fits", (4, 8, 8), 10)
    write(tmp_path / "b.fits", (4, 8, 8), 20)
    (manifest,) = scanned(tmp_path, [str(tmp_path)])
    whole = certified(tmp_path, [manifest])
    read = batches.read_images

    def gone(block, start, stop, **reading):
        if block.file.endswith("b.fits"):
            msg = f"{block.file}: it is gone"
            raise ValueError(msg)
        return read(block, start, stop, **reading)

    rows = chosen_of(manifest.with_suffix(".h5"))
    monkeypatch.setattr(batches, "read_images", gone)
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        ((stack, found),) = batches.of_rows(rows, [manifest], 4, READING | {"folder": tmp_path})
    assert len(stack.data) == len(found["snr"]) == 4
    assert "b.fits: it is gone" in caplog.text
    assert whole["sources"].max() == 8
