"""Whole runs over real images: every image is accounted for, and the numbers are those of the references."""

import csv
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from tests.workflow.runs import NO_CERTIFICATE, configure, read, snakemake

CODECS = ("m13", "m13_gzip", "m13_hcomp", "m13_plio", "m13_rice")
IDENTITY = ("image_id", "file", "hdu")
CENTRE = 31  # of a ZTF stamp: the pixel that the alert's position is rounded to

#: Files that astropy cannot open.
NO_FITS = {"carta_empty2.fits", "git_lfs_pointer_tess_tp.fits.gz", "git_symlink_as_text.fits"}
#: What a user does not want to read in a reason.
JARGON = re.compile(r"Traceback|[A-Za-z]*(Error|Exception|Warning)\b|\b0x[0-9a-f]+|\n")


def run(folder: Path, files: list[Path], **sections: dict) -> dict[str, np.ndarray]:
    """Catalogue of some files by default settings but for ``sections``, and without a certificate."""
    images = {"files": [str(file) for file in files]} | sections.pop("images", {})
    snakemake(configure(folder / "run", {"source": "images", "images": images} | NO_CERTIFICATE | sections))
    return read(folder / "run")


def names(rows: np.ndarray) -> list[str]:
    return [Path(file.decode()).name for file in rows["file"]]


def assert_one_image(rows: np.ndarray) -> None:
    """All rows are the same to the bit but for where the image was found."""
    for column in set(rows.dtype.names) - set(IDENTITY):
        assert len({value.tobytes() for value in rows[column]}) == 1, column


# ---- images with references -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def listed(shared_data) -> list[Path]:
    stamps = sorted((shared_data / "ztf").glob("*_difference.fits"))
    small = sorted((shared_data / "parkes1904").glob("small*.fits"))
    return [*stamps, *small, *(shared_data / "m13" / f"{codec}.fits" for codec in CODECS)]


@pytest.fixture(scope="module")
def tables(listed, tmp_path_factory) -> dict[str, np.ndarray]:
    return run(tmp_path_factory.mktemp("references"), listed)


def test_every_image_is_a_row(tables, listed):
    assert sorted(names(tables["catalogue"])) == sorted(file.name for file in listed)
    assert len(listed) == 12 + 4 + len(CODECS)
    assert len(tables["rejected"]) == 0


def test_a_codec_changes_no_bit_of_a_row(tables):
    of_m13 = [name.startswith("m13") for name in names(tables["catalogue"])]
    rows = tables["catalogue"][of_m13]
    assert len(rows) == len(CODECS)
    assert np.isfinite(rows["ra"]).all()
    assert_one_image(rows)
    for table in (table for name, table in tables.items() if name.startswith("covariance")):
        assert len({matrix.tobytes() for matrix in table[of_m13]}) == 1


def test_axes_of_length_one_change_no_bit_of_a_row(tables):
    rows = tables["catalogue"][[name.startswith("small") for name in names(tables["catalogue"])]]
    assert len(rows) == 4
    assert np.isfinite([rows[column] for column in ("ra", "dec", "fwhm_major_sky", "pa_sky", "snr")]).all()
    assert_one_image(rows)


@pytest.mark.parametrize(("scale", "limit"), [("fit", 0.2), (100.0, 0.06)])
def test_difference_stamps_lie_where_the_alerts_say(scale, limit, tables, listed, shared_data, tmp_path):
    """``scale: 100``, far above the noise, is least squares, as the reference positions are."""
    if scale != "fit":
        tables = run(tmp_path, [file for file in listed if file.name.startswith("ztf")], fit={"scale": scale})
    with (shared_data / "ztf" / "candidates.csv").open() as stream:
        alerts = {alert["difference_file"]: alert for alert in csv.DictReader(stream)}
    alerts = {name: alert for name, alert in alerts.items() if 1.0857 / float(alert["sigmapsf"]) > 7}
    rows = tables["catalogue"][[name in alerts for name in names(tables["catalogue"])]]
    assert len(rows) == len(alerts) > 5
    off, error = np.empty((2, 2, len(rows)))
    for axis, (column, position) in enumerate({"x0": "xpos", "y0": "ypos"}.items()):
        place = np.array([float(alerts[name][position]) for name in names(rows)])
        off[axis] = np.abs(rows[column] - CENTRE - (place - np.round(place)))
        error[axis] = rows[f"{column}_err"]
    assert (np.median(off, axis=1) < limit).all()
    if scale == "fit":  # errors of a fit so far from its noise are not meant to hold
        assert np.mean((off < 6 * error).all(axis=0)) >= 0.85


# ---- sources cut out of larger images -------------------------------------------------------------------------------


def isolated(x: np.ndarray, y: np.ndarray, distance: float) -> np.ndarray:
    """Which points have no other within a distance."""
    apart = np.hypot(x[:, None] - x, y[:, None] - y)
    return np.sort(apart, axis=1)[:, 1] > distance


def test_sources_at_given_positions_are_those_of_the_reference(shared_data, tmp_path):
    """``scale: 1``, far above the noise, is least squares, as the reference is."""
    files = [shared_data / "parkes1904" / f"1904-66_{projection}.fits" for projection in ("AIT", "SIN")]
    table = shared_data / "parkes1904" / "1904_comp.fits"
    cutouts = {"positions": str(table), "size": 16}
    rows = run(tmp_path, files, images={"cutouts": cutouts}, fit={"scale": 1.0})["catalogue"]
    reference = Table.read(table)
    assert rows["source"].tolist() == [*range(len(reference))] * 2
    ra, dec = (np.asarray(reference[name]) for name in ("ra", "dec"))
    east = np.cos(np.radians(dec))
    good = isolated((ra - ra.mean()) * east, dec, 0.5) & np.asarray(
        reference["peak_flux"] > 14 * reference["local_rms"]
    )
    assert good.sum() > 9
    pixel = 240.0  # arcsec
    by_file = [rows[:51], rows[51:]]
    for here in by_file:
        off = 3600 / pixel * np.stack([(here["ra"] - ra) * east, here["dec"] - dec])[:, good]
        assert (np.abs(np.median(off, axis=1)) < 0.04).all()
        assert (np.median(np.abs(off), axis=1) < 0.06).all()
        assert np.median(here["amp"][good] / reference["peak_flux"][good]) == pytest.approx(1.013, abs=0.015)
        area = here["fwhm_major_sky"] * here["fwhm_minor_sky"] / (reference["a"] * reference["b"])
        assert np.sqrt(np.median(area[good])) == pytest.approx(1, abs=0.04)
    between = np.hypot(*(3600 / pixel * (by_file[0][name] - by_file[1][name])[good] for name in ("ra", "dec")))
    assert np.median(between) < 0.06


def test_detected_sources_lie_where_sextractor_has_them(shared_data, tmp_path):
    """``scale: 650``, ten times the noise, is least squares; the references count pixels from 1."""
    cutouts = {"detect": {"threshold": 5.0}, "size": 16}
    image = shared_data / "ntt" / "image.fits"
    rows = run(tmp_path, [image], images={"cutouts": cutouts}, fit={"scale": 650.0})["catalogue"]
    assert rows["source"].tolist() == list(range(len(rows)))
    listed = Table.read(shared_data / "ntt" / "image.cat", format="ascii.sextractor")
    x, y = (np.asarray(listed[name]) - 1 for name in ("XWIN_IMAGE", "YWIN_IMAGE"))
    bright = np.asarray((listed["FLAGS"] == 0) & (listed["FLUX_AUTO"] > 30 * listed["FLUXERR_AUTO"]))
    chosen = bright & isolated(x, y, 8)
    apart = np.hypot(rows["x0"] - x[chosen, None], rows["y0"] - y[chosen, None])
    nearest = np.argmin(apart, axis=1)
    found = np.min(apart, axis=1) < 1.5
    assert found.sum() > 5
    for column, place in (("x0", x), ("y0", y)):
        assert np.median(np.abs(rows[column][nearest] - place[chosen])[found]) <= 0.02, column


def test_a_codec_changes_no_bit_of_a_cutout(shared_data, tmp_path):
    files = [shared_data / "m13" / f"{codec}.fits" for codec in CODECS]
    tables = run(tmp_path, files, images={"cutouts": {"detect": {}, "size": 16}})
    count, rest = divmod(len(tables["catalogue"]), len(CODECS))
    assert (rest, len(tables["rejected"])) == (0, 0)
    assert count > 200
    for name, table in tables.items():
        for same in zip(*np.split(table, len(CODECS)), strict=True) if len(table) else ():
            if name == "catalogue":
                assert_one_image(np.array(same))
            else:
                assert len({matrix.tobytes() for matrix in same}) == 1, name


# ---- images that break readers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nasty_tables(shared_data, tmp_path_factory) -> dict[str, np.ndarray]:
    return run(tmp_path_factory.mktemp("nasty"), [shared_data / "nasty" / "*"], images={"hdu": "all"}, certificate={})


def planes(file: Path) -> dict[int, int]:
    """Images in each HDU of a file, by astropy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # astropy tells of everything that makes these files nasty
        with fits.open(file) as hdus:
            shapes = {number: hdu.shape for number, hdu in enumerate(hdus) if hdu.is_image}
    return {number: math.prod(shape[:-2]) for number, shape in shapes.items() if len(shape) > 1 and math.prod(shape)}


def test_nasty_files_end_as_rows_or_reasons(nasty_tables, shared_data):
    files = sorted((shared_data / "nasty").iterdir())
    wanted = {file.name: {} if file.name in NO_FITS else planes(file) for file in files}
    assert {file.name for file in files} >= NO_FITS
    rows, rejected = nasty_tables["catalogue"], nasty_tables["rejected"]
    found = sorted(zip(names(rows), rows["hdu"].tolist(), rows["plane"].tolist(), strict=True))
    images = ((name, hdu, range(count)) for name, hdus in wanted.items() for hdu, count in hdus.items())
    assert found == [(name, hdu, plane) for name, hdu, numbers in images for plane in numbers]
    assert names(rejected) == [name for name, hdus in wanted.items() if not hdus]
    for reason in (reason.decode() for reason in rejected["reason"]):
        assert not JARGON.search(reason), reason
        assert len(reason.split()) > 3, reason


@pytest.mark.parametrize(("name", "images"), [("testUS.fits", 1), ("test_multiF.fits", 12)])
def test_compression_changes_no_bit_of_a_row(name, images, nasty_tables):
    rows = nasty_tables["catalogue"]
    files = np.array(names(rows))
    copies = [rows[files == f"{name}{suffix}"] for suffix in ("", ".bz2", ".fz", ".gz")]
    for same in zip(*copies, strict=True):
        assert_one_image(np.array(same))
    assert len(copies[0]) == images
