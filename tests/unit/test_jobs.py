"""Jobs: the order of rows, images that cannot be read, what headers add. The fit itself is a stand-in."""

import logging
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import MaskedColumn, Table

import pipeline.catalogue
import pipeline.fit
import pipeline.simulate
from pipeline import batches, jobs
from pipeline.catalogue import merge, read_origin, read_part, read_rows, read_summary
from pipeline.columns import BIT, DERIVED, parameter_names
from pipeline.config import check_config
from pipeline.correlation import kernel_fwhm
from pipeline.images import scan_file
from pipeline.listing import listing_digest
from pipeline.origin import content_digest, list_digest, read_list, write_list, write_run
from pipeline.shards import read_manifest
from pipeline.simulate import draw
from tests.stand_in import FIT, READING, fitted, mean_as_fit, scanned, use_stand_in, write

CELESTIAL = {
    "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.0, "CRVAL2": 2.0, "CRPIX1": 3.0, "CRPIX2": 3.0,
    "CDELT1": -1e-4, "CDELT2": 1e-4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    use_stand_in(monkeypatch)


def chosen_of(part: Path) -> dict[str, np.ndarray]:
    return jobs._chosen([part], [read_origin(part)["digest"]], 100)


def merged(folder: Path, manifest: Path, *, stacks=(), truths=(), fit=FIT, made_of=None, **reading) -> None:
    """The catalogue of one part."""
    part = shutil.copy(folder / "part.h5", folder / f"{manifest.stem}.h5")
    made_of, _ = read_list(folder / "shards.txt") if made_of is None else (made_of, "")
    jobs.catalogue(
        folder / "catalogue.h5", parts=[part], shards=folder / "shards.txt", made_of=made_of,
        reading=READING | reading, stacks=stacks, truths=truths, certificates=[],
        config={"fit": fit, "images": READING, "certificate": {"sources": 0}}, log="",
    )  # fmt: skip


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


# ---- images that change or cannot be read ---------------------------------------------------------------------------


def test_an_image_that_cannot_be_read_any_more_is_a_row_of_rejected(tmp_path):
    write(tmp_path / "a.fits", (2, 8, 8), 1)
    write(tmp_path / "b.fits", (3, 8, 8), 5)
    (tmp_path / "c.fits").write_text("never an image")
    (manifest,) = scanned(tmp_path, [str(tmp_path / "*.fits")])
    write(tmp_path / "new.fits", (3, 8, 9), 5)
    (tmp_path / "new.fits").replace(tmp_path / "b.fits")
    rows = fitted(tmp_path, manifest)
    rejected = read_rows(tmp_path / "part.h5", table="rejected")
    assert rows["amp"].tolist() == [1, 2]
    assert [(Path(file).name, plane) for file, plane in zip(rejected["file"], rejected["plane"], strict=True)] == [
        ("c.fits", -1), ("b.fits", 0), ("b.fits", 1), ("b.fits", 2),
    ]  # fmt: skip
    assert "changed after" in rejected["reason"][1]


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


def test_a_shard_without_an_image_gives_a_part_without_rows(tmp_path):
    (manifest,) = scanned(tmp_path, [str(tmp_path / "none.fits")])
    assert len(fitted(tmp_path, manifest)["amp"]) == 0
    assert read_rows(tmp_path / "part.h5", table="rejected")["reason"].tolist() == ["no such file or folder"]


def test_nothing_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing found under"):
        scanned(tmp_path, [])


def table_of(path: Path, **columns) -> str:
    Table(columns).write(path, overwrite=True)
    return str(path)


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


def test_images_without_a_position_and_positions_without_an_image_are_rejected(tmp_path):
    write(tmp_path / "a.fits", (30, 40), 10)
    write(tmp_path / "b.fits", (10, 10), 10)
    cutouts = {"positions": table_of(tmp_path / "p.csv", x=[25, 55], y=[5, 25]), "size": 8}
    (manifest,) = scanned(tmp_path, [str(tmp_path / "*.fits")], cutouts=cutouts)
    assert [Path(file).name for file in fitted(tmp_path, manifest, cutouts=cutouts)["file"]] == ["a.fits"]
    rejected = read_rows(tmp_path / "part.h5", table="rejected")
    told = [(Path(file).name, source) for file, source in zip(rejected["file"], rejected["source"], strict=True)]
    assert told == [("b.fits", -1), ("p.csv", 1)]
    assert "none of the 2 positions" in rejected["reason"][0]


def test_a_moved_position_changes_the_manifest_of_its_shard_only(tmp_path):
    write(tmp_path / "a.fits", (30, 40), 10)
    x = np.arange(5.0, 35)
    manifests = []
    for moved in (0, 1):
        x[14] += moved
        cutouts = {"positions": table_of(tmp_path / "p.csv", x=x, y=x / 2), "size": 8}
        files = scanned(tmp_path, [str(tmp_path / "a.fits")], shard_size=10, cutouts=cutouts)
        manifests.append({path.name: path.read_bytes() for path in files})
    assert len(manifests[0]) == 3
    changed = [name for name, text in manifests[1].items() if text != manifests[0][name]]
    assert [name[-6:] for name in changed] == ["-1.csv"]


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


#: Rows of a pixel file with bits 0, 2 and 31 in their QUALITY, in none, and one without a number.
QUALITY = np.array([0, 1, 0, 4, -(2**31), -(2**31), 99, 0], "i4")


def pixel_file(folder: Path, per_row: int = 1) -> np.ndarray:
    """As Kepler's and TESS's are: a stamp or more, their errors and a number of quality a row. The stamps."""
    flux = np.arange(len(QUALITY) * per_row * 30, dtype="f4").reshape(len(QUALITY), per_row, 5, 6)
    dim = "(6,5)" if per_row == 1 else f"(6,5,{per_row})"
    columns = [
        fits.Column(name, f"{30 * per_row}E", dim=dim, array=values)
        for name, values in (("FLUX", flux), ("FLUX_ERR", np.where(flux % 7 == 0, np.nan, 2 + flux)))
    ]
    columns += [fits.Column("QUALITY", "J", null=99, array=QUALITY), fits.Column("SPARE", "2J", array=np.ones((8, 2)))]
    fits.BinTableHDU.from_columns(columns, name="PIXELS").writeto(folder / "tpf.fits")
    return flux.reshape(-1, 5, 6)


@pytest.mark.parametrize("per_row", [1, 2])
@pytest.mark.parametrize(
    ("mask", "good"),
    [
        ({"column": "QUALITY"}, [0, 2, 7]),
        ({"column": "quality", "bits": [0, 31]}, [0, 2, 3, 7]),
        ({"column": "QUALITY", "bits": [5], "hdu": "PIXELS"}, [0, 1, 2, 3, 4, 5, 7]),
        ({"column": "QUALITY", "bits": [2, 60], "hdu": 1}, [0, 1, 2, 7]),  # the sign is that of all higher bits
    ],
)
def test_rows_of_bad_quality_are_rejected(tmp_path, mask, good, per_row):
    flux = pixel_file(tmp_path, per_row)
    wanted = [row * per_row + i for row in good for i in range(per_row)]
    (manifest,) = scanned(tmp_path, [str(tmp_path)], column="FLUX", mask=mask)
    rows = fitted(tmp_path, manifest, column="FLUX", mask=mask)
    assert rows["plane"].tolist() == wanted
    assert rows["amp"].tolist() == flux[wanted].mean(axis=(1, 2), dtype=float).tolist()
    refused = read_rows(tmp_path / "part.h5", table="rejected")
    assert sorted(refused["plane"].tolist() + wanted) == list(range(len(flux)))
    for plane, source, reason in zip(*(refused[name] for name in ("plane", "source", "reason")), strict=True):
        value = QUALITY[plane // per_row]
        assert source == -1
        assert reason.endswith(f"{mask['column']} of its row is {'missing' if value == 99 else value} (images.mask)")


def test_rows_of_bad_quality_give_no_stamps(tmp_path):
    pixel_file(tmp_path)
    Table({"x": [2, 4], "y": [2, 2]}).write(tmp_path / "positions.csv")
    section = {"column": "FLUX", "mask": {"column": "QUALITY", "bits": [2]}}
    section |= {"cutouts": {"positions": str(tmp_path / "positions.csv"), "size": 8}}
    (manifest,) = scanned(tmp_path, [str(tmp_path / "*.fits")], **section)
    rows = fitted(tmp_path, manifest, **section)
    assert rows["plane"].tolist() == [0, 0, 1, 1, 2, 2, 4, 4, 5, 5, 7, 7]
    refused = read_rows(tmp_path / "part.h5", table="rejected")
    assert list(zip(refused["plane"].tolist(), refused["source"].tolist(), strict=True)) == [
        (3, 0), (3, 1), (6, 0), (6, 1),
    ]  # fmt: skip


def test_columns_of_the_same_table_are_uncertainty_and_mask(tmp_path):
    flux = pixel_file(tmp_path)
    section = {"uncertainty": {"column": "FLUX_ERR"}, "mask": {"column": "QUALITY"}}
    (manifest,) = scanned(tmp_path, [str(tmp_path)], column="FLUX", **section)
    (block,), _ = read_manifest(manifest)
    ((piece, *_),) = batches.of_blocks([block], READING | {"column": "FLUX", "folder": ""} | section, [])
    np.testing.assert_array_equal(piece.stack.mask[0], flux[0] % 7 == 0)
    np.testing.assert_array_equal(piece.stack.noise_map[0], np.where(flux[0] % 7 == 0, 1, 2 + flux[0]))


def test_a_column_of_something_else_is_no_quality(tmp_path):
    pixel_file(tmp_path)
    section = {"column": "FLUX", "mask": {"column": "SPARE"}}
    (manifest,) = scanned(tmp_path, [str(tmp_path)], **section)
    assert len(fitted(tmp_path, manifest, **section)["plane"]) == 0
    reasons = set(read_rows(tmp_path / "part.h5", table="rejected")["reason"])
    assert ["has no images in column SPARE" in reason for reason in reasons] == [True]


def carried(folder: Path, files: list[str], names: list[str], **reading) -> dict[str, list]:
    """What the catalogue of some files carries along, and their first rejection under the name ``reason``."""
    (manifest,) = scanned(folder, files, carry=names, **reading)
    fitted(folder, manifest, carry=names, **reading)
    merged(folder, manifest, carry=names, **reading)
    reasons = read_rows(folder / "catalogue.h5", table="rejected")["reason"].tolist()
    rows = read_rows(folder / "catalogue.h5", names) if names else {}
    return {name: values.tolist() for name, values in rows.items()} | ({"reason": reasons[0]} if reasons else {})


def test_keywords_go_along_from_the_header_of_the_image_or_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_PIXELS", 64)
    first, image = fits.PrimaryHDU(), fits.ImageHDU(np.ones((2, 8, 8), "f4"))
    first.header.update({"MJD-OBS": 59000.5, "OBJECT": "first", "DATE": "2020-05-31", "HIERARCH ESO TEL ALT": 65})
    image.header.update({"OBJECT": "<b>image</b> " + "long " * 20, "SEEING": True})
    fits.HDUList([first, image]).writeto(tmp_path / "a.fits")
    write(tmp_path / "b.fits", (9, 8), 1, **{"MJD-OBS": 59001, "OBJECT": "", "DATE": 20200601})
    write(tmp_path / "c.fits", (8, 8), 1)
    found = carried(tmp_path, [str(tmp_path)], ["OBJECT", "MJD-OBS", "date", "ESO TEL ALT", "SEEING", "GONE"])
    image_object = ("<b>image</b> " + "long " * 20).rstrip()
    np.testing.assert_equal(found, {
        "OBJECT": [image_object, image_object, "", ""],
        "MJD-OBS": [59000.5, 59000.5, 59001, np.nan],
        "date": ["2020-05-31", "2020-05-31", "20200601", ""],
        "ESO TEL ALT": [65, 65, np.nan, np.nan],
        "SEEING": [1, 1, np.nan, np.nan],
        "GONE": [np.nan] * 4,
    })  # fmt: skip


def test_cells_go_along_from_the_table_of_the_images(tmp_path):
    columns = [
        fits.Column("id", "K", array=np.array([2**60 + 1, 2, 3])),
        fits.Column("Flux", "128E", dim="(8,8,2)", array=np.ones((3, 2, 8, 8), np.float32)),
        fits.Column("TIME", "D", array=[0.5, np.nan, 1.5]),
        fits.Column("NAME", "5A", array=["a", "", "caf"]),
        fits.Column("GOOD", "L", array=[True, False, True]),
        fits.Column("COUNT", "I", bzero=32768, array=np.array([1, 40000, 3], "u2")),
        fits.Column("NULL", "J", null=-1, array=[5, -1, 7]),
        fits.Column("SCALED", "I", array=[1, 2, 4]),
        fits.Column("VECTOR", "3E", array=np.ones((3, 3))),
    ]
    hdu = fits.BinTableHDU.from_columns(columns, fits.Header({"EXPOSURE": 30}))
    hdu.header.update({"TSCAL8": 0.5, "TZERO8": 10.0})
    hdu.writeto(tmp_path / "t.fits")
    names = ["ID", "time", "NAME", "GOOD", "COUNT", "NULL", "SCALED", "EXPOSURE"]
    found = carried(tmp_path, [str(tmp_path)], names, column="FLUX")
    wanted = {
        "ID": [2**60 + 1, 2, 3], "time": [0.5, np.nan, 1.5], "NAME": ["a", "", "caf"], "GOOD": [1, 0, 1],
        "COUNT": [1, 40000, 3], "NULL": [5, np.nan, 7], "SCALED": [10.5, 11, 12], "EXPOSURE": [30] * 3,
    }  # fmt: skip
    np.testing.assert_equal(found, {name: np.repeat(values, 2).tolist() for name, values in wanted.items()})
    reason = carried(tmp_path, [str(tmp_path)], ["VECTOR"], column="FLUX")["reason"]
    assert reason.endswith("HDU 1: column VECTOR has neither one number nor text a row (TFORM9 = 3E)")


def test_columns_of_the_table_of_positions_go_along(tmp_path):
    write(tmp_path / "a.fits", (2, 30, 40), 10, OBJECT="field", Z=9)
    table = Table({"x": [20, 50, 0], "y": [15, 5, 0], "candid": [2**60 + 1, 2, 3], "Z": [0.5, 1, np.nan]})
    table["note"] = MaskedColumn(["a", "b", "c"], mask=[0, 0, 1])
    table.write(tmp_path / "p.ecsv")
    cutouts = {"positions": str(tmp_path / "p.ecsv"), "size": 8}
    found = carried(tmp_path, [str(tmp_path / "a.fits")], ["candid", "note", "z", "object"], cutouts=cutouts)
    assert found.pop("reason") == "this position lies in none of the images"
    np.testing.assert_equal(found, {
        "candid": [2**60 + 1, 3] * 2, "note": ["a", ""] * 2, "z": [0.5, np.nan] * 2, "object": ["field"] * 4,
    })  # fmt: skip


@pytest.mark.parametrize("shard_size", [1, 3, 4])
def test_what_goes_along_does_not_depend_on_the_shards(tmp_path, shard_size):
    """Whole and broken numbers, text and nothing in turn, and shards that see only some of them."""
    kinds = [1, 2.5, "3", None, 2**60 + 1, True]
    for i in range(8):
        write(
            tmp_path / f"{i}.fits",
            (8, 8),
            i,
            **{"MIXED": kinds[i % 6], "NUMBER": kinds[i % 2], "WHOLE": kinds[i % 6 // 4 * 4]},
        )
    found = []
    for size in (100, shard_size):
        parts = []
        for manifest in scanned(tmp_path, [str(tmp_path)], size, carry=["MIXED", "NUMBER", "WHOLE"]):
            fitted(tmp_path, manifest, carry=["MIXED", "NUMBER", "WHOLE"])
            parts.append((tmp_path / "part.h5").rename(manifest.with_suffix(".h5")))
        merge(parts, tmp_path / "c.h5", provenance={})
        with h5py.File(tmp_path / "c.h5") as file:
            rows = file["catalogue"][:]
        found.append(rows[np.argsort(rows["amp"])])
    assert len(parts) > 1
    assert found[0].dtype == found[1].dtype
    assert found[0].tobytes() == found[1].tobytes()
    assert [found[0].dtype[name].kind for name in ("MIXED", "NUMBER", "WHOLE")] == ["S", "f", "i"]


def test_what_goes_along_changes_the_manifest_of_its_shard_only(tmp_path):
    write(tmp_path / "a.fits", (30, 40), 10)
    x = np.arange(5.0, 35)
    manifests = []
    for changed in (0, 1):
        names = np.arange(30)
        names[14] += 100 * changed
        cutouts = {"positions": table_of(tmp_path / "p.csv", x=x, y=x / 2, name=names), "size": 8}
        files = scanned(tmp_path, [str(tmp_path / "a.fits")], shard_size=10, cutouts=cutouts, carry=["name"])
        manifests.append({path.name: path.read_bytes() for path in files})
        rows = fitted(tmp_path, files[1], cutouts=cutouts, carry=["name"])
        assert read_part(tmp_path / "part.h5").carried["name"] == names[rows["source"]].tolist()
    changed = [name for name, text in manifests[1].items() if text != manifests[0][name]]
    assert [name[-6:] for name in changed] == ["-1.csv"]


def test_the_catalogue_joins_parts_truth_and_provenance(tmp_path):
    write(tmp_path / "00000.fits", (3, 8, 8), 7)
    truth = np.zeros(3, [("plane", "i8"), ("amp", "f8")])
    truth["plane"], truth["amp"] = [2, 0, 1], [9, 7, 8]
    fits.BinTableHDU(truth).writeto(tmp_path / "00000.truth.fits")
    stack = str(tmp_path / "00000.fits")
    (manifest,) = scanned(tmp_path, [stack])
    fitted(tmp_path, manifest)
    merged(tmp_path, manifest, stacks=[stack], truths=[str(tmp_path / "00000.truth.fits")])
    assert read_rows(tmp_path / "catalogue.h5")["amp"].tolist() == [7, 8, 9]
    assert read_rows(tmp_path / "catalogue.h5", table="truth")["amp"].tolist() == [7, 8, 9]
    provenance = read_summary(tmp_path / "catalogue.h5").provenance
    assert set(provenance) == {"config", "versions", "device", "inputs"}
    assert read_origin(tmp_path / "part.h5")["pixels"] in provenance["inputs"]


def test_a_part_of_other_images_or_settings_is_refused(tmp_path):
    write(tmp_path / "a.fits", (3, 8, 8), 7)
    (manifest,) = scanned(tmp_path, [str(tmp_path / "a.fits")])
    fitted(tmp_path, manifest)
    merged(tmp_path, manifest)
    with pytest.raises(ValueError, match=r"\.h5: a job of an earlier run has written it"):
        merged(tmp_path, manifest, fit=FIT | {"uncertainty": "fisher"})
    with pytest.raises(ValueError, match="of other images or settings"):
        merged(tmp_path, manifest, hdu="all")
    write(tmp_path / "b.fits", (8, 8), 7)
    scanned(tmp_path, [str(tmp_path / "a.fits"), str(tmp_path / "b.fits")])
    with pytest.raises(ValueError, match="give the command again"):
        merged(tmp_path, manifest)


def test_a_list_or_manifest_of_other_images_is_refused(tmp_path):
    write(tmp_path / "a.fits", (3, 8, 8), 7)
    (manifest,) = scanned(tmp_path, [str(tmp_path / "a.fits")])
    fitted(tmp_path, manifest)
    listed = content_digest(manifest.read_bytes())
    for digest, manifests in (
        ("of others", {manifest.stem: listed}),
        ("as wanted", {manifest.stem: "of others"}),
        ("as wanted", {manifest.stem: listed, "one-more": listed}),
    ):
        write_list(tmp_path / "shards.txt", digest, manifests)
        with pytest.raises(ValueError, match="of other images or settings; give the command again"):
            merged(tmp_path, manifest, made_of="as wanted")
    write_list(tmp_path / "shards.txt", "as wanted", {manifest.stem: listed})
    merged(tmp_path, manifest, made_of="as wanted")


@pytest.mark.parametrize("simulated", [False, True])
def test_a_list_says_what_it_was_made_of(tmp_path, simulated):
    """The user's images as they were when the run began, its own as they are."""
    write(tmp_path / "a.fits", (3, 8, 8), 7)
    write_run(tmp_path / "run.json", {}, "as it was")
    files = [str(tmp_path / "a.fits")]
    scanned(tmp_path, files, simulated=simulated)
    seen = listing_digest(files) if simulated else "as it was"
    assert read_list(tmp_path / "shards.txt")[0] == list_digest(files, READING, 1000, seen)


def test_a_scan_that_outlives_its_run_writes_nothing(tmp_path, monkeypatch):
    write(tmp_path / "a.fits", (3, 8, 8), 7)
    write_run(tmp_path / "run.json", {}, "as it was")
    (manifest,) = scanned(tmp_path, [str(tmp_path / "a.fits")])
    before = (tmp_path / "shards.txt").read_text(), manifest.read_text()
    write(tmp_path / "b.fits", (3, 8, 8), 7)

    def while_another_run_begins(*block, **settings):
        write_run(tmp_path / "run.json", {}, "as it is")
        return scan_file(*block, **settings)

    monkeypatch.setattr(jobs, "scan_file", while_another_run_begins)
    with pytest.raises(ValueError, match="another run has begun"):
        scanned(tmp_path, [str(tmp_path / "*.fits")])
    assert ((tmp_path / "shards.txt").read_text(), manifest.read_text()) == before


def simulated(folder: Path, **change) -> None:
    section = {key: value for key, value in check_config({})["simulated"].items() if key != "count"}
    jobs.simulate(
        folder / "s.fits", folder / "t.fits", start=2, stop=5, run=folder / "run.json", log="", threads=1, cache="",
        **(section | {"shape": [8, 8]} | change),
    )  # fmt: skip


def test_simulated_images_that_are_there_are_not_written_again(tmp_path):
    write_run(tmp_path / "run.json", {}, "")
    simulated(tmp_path)
    files = tmp_path / "s.fits", tmp_path / "t.fits"
    first = [path.stat().st_ino for path in files]
    simulated(tmp_path)
    assert [path.stat().st_ino for path in files] == first
    simulated(tmp_path, seed=2)
    assert fits.getval(files[0], "SEED") == 2
    files[1].unlink()
    simulated(tmp_path, seed=2)
    assert files[1].exists()


def test_a_simulation_that_outlives_its_run_writes_nothing(tmp_path, monkeypatch):
    write_run(tmp_path / "run.json", {}, "")

    def while_another_run_begins(*numbers, **settings):
        write_run(tmp_path / "run.json", {"another": "config"}, "")
        return draw(*numbers, **settings)

    monkeypatch.setattr(pipeline.simulate, "draw", while_another_run_begins)
    with pytest.raises(ValueError, match="another run has begun"):
        simulated(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_truth_of_other_images_is_refused(tmp_path):
    write_run(tmp_path / "run.json", {}, "")
    simulated(tmp_path)
    shutil.copy(tmp_path / "t.fits", tmp_path / "other.fits")
    simulated(tmp_path, seed=2)
    jobs._truth([str(tmp_path / "s.fits")], [str(tmp_path / "t.fits")])
    with pytest.raises(ValueError, match="of other images; give the command again"):
        jobs._truth([str(tmp_path / "s.fits")], [str(tmp_path / "other.fits")])


def good_fit(data, mask, noise_map, *, background, scale, **settings):
    """Stands in for a fit that succeeds: a source of S/N 20 that has the mean of its image as amplitude."""
    rows, covariances = mean_as_fit(data, mask, noise_map, background=background, scale=scale, **settings)
    errors = {f"{name}_err": np.full(len(data), 0.1) for name in parameter_names(background, scale)}
    rest = {"snr": 20.0, "scale": 1.0, "background": 0.0, "x0_start": 2.0, "y0_start": 2.0}
    theirs = {name + end: np.full(len(data), 0.1) for name in DERIVED for end in ("", "_err")}
    return rows | errors | theirs | {name: np.full(len(data), value) for name, value in rest.items()}, covariances


def certified(folder: Path, manifests: list[Path], sources: int = 100, fit=FIT, **reading) -> dict[str, np.ndarray]:
    """The certificate of a run on these shards."""
    parts = []
    for manifest in manifests:
        fitted(folder, manifest, fit=fit, **reading)
        parts.append((folder / "part.h5").rename(manifest.with_suffix(".h5")))
    write_list(folder / "shards.txt", "as wanted", {path.stem: content_digest(path.read_bytes()) for path in manifests})
    jobs.certificate(
        folder / "certificate.h5", parts=parts, manifests=manifests, shards=folder / "shards.txt", made_of="as wanted",
        reading=READING | reading, fit=fit, sources=sources,
        detections=folder / "detections", run=folder / "run.json", log="", gpu=0, cache="",
    )  # fmt: skip
    return read_rows(folder / "certificate.h5", table="certificate")


def test_a_certificate_needs_groups_of_one_size_and_does_not_mind_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.fit, "fit_rows", good_fit)
    write(tmp_path / "a.fits", (6, 8, 8), 10)
    write(tmp_path / "b.fits", (3, 8, 8), 20)
    write(tmp_path / "c.fits", (3, 9, 8), 30)
    whole = certified(tmp_path, scanned(tmp_path, [str(tmp_path)]))
    assert whole["sources"].tolist() == [0, 8, 0, 0] * (8 + len(DERIVED))
    assert read_origin(tmp_path / "certificate.h5")["sources"] == 8
    monkeypatch.setattr(batches, "BATCH_PIXELS", 4 * 64)
    files = [str(tmp_path / name) for name in ("a.fits", "b.fits", "c.fits")]
    shards = [scanned(tmp_path, [file])[0].rename(f"{file}.csv") for file in reversed(files)]
    np.testing.assert_equal(certified(tmp_path, shards), whole)
    assert certified(tmp_path, shards, sources=7)["sources"].max() == 4


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


def test_without_good_rows_the_certificate_is_empty_and_says_so(tmp_path, caplog):
    write(tmp_path / "a.fits", (6, 8, 8), 10)
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        table = certified(tmp_path, scanned(tmp_path, [str(tmp_path)]))
    assert not table["sources"].any()
    assert "no errors certified: fewer than 4 good rows of one image size" in caplog.text


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


def test_other_pixels_have_another_digest(tmp_path):
    digests = set()
    for value in (1, 1, 2):
        (tmp_path / "a.fits").unlink(missing_ok=True)
        write(tmp_path / "a.fits", (8, 8), value)
        fitted(tmp_path, *scanned(tmp_path, [str(tmp_path / "a.fits")]))
        digests.add(read_origin(tmp_path / "part.h5")["pixels"])
    assert len(digests) == 2


def test_progress_tells_rate_and_time_left(monkeypatch, caplog):
    clock = iter([0.0, 1.0, 10.0, 11.0])
    monkeypatch.setattr(jobs.time, "monotonic", lambda: next(clock))
    tell = jobs._progress(400, "images fitted")
    with caplog.at_level(logging.INFO, logger="pipeline"):
        for done in (50, 100, 110):
            tell(done)
    assert caplog.messages == ["100 of 400 images fitted, 10/s, about 30 s left"]
