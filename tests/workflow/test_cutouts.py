"""Whole runs over stamps of one large image: what is in the catalogue, and what the next run repeats."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from tests.stamps import draw
from tests.workflow.runs import NO_CERTIFICATE, assert_identical, configure, copied, read, snakemake, times

SIDE = 16  # of the stamps, as of those that other tests compile for
GRID = 6


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """x, y of the sources in the large image."""
    _, params = stamps()
    y, x = np.divmod(np.arange(GRID * GRID), GRID) * np.array([[SIDE]])
    return np.stack([x + params[:, 0], y + params[:, 1]], axis=1)


def stamps():
    return draw(GRID * GRID, (50, 200), seed=4, shape=(SIDE, SIDE), noise="gaussian", sigma=(1.2, 1.6))


def large_image(file: Path) -> None:
    """Stamps side by side."""
    images, _ = stamps()
    rows = images.reshape(GRID, GRID, SIDE, SIDE).swapaxes(1, 2).reshape(GRID * SIDE, GRID * SIDE)
    fits.PrimaryHDU(rows.astype("f4"), fits.Header({"MJD-OBS": 59000.25})).writeto(file)


def settings(**cutouts) -> dict:
    images = {"files": ["large.fits"], "cutouts": {"size": SIDE} | cutouts, "carry": ["candid", "MJD-OBS"]}
    return {"source": "images", "images": images, "shard_size": 18} | NO_CERTIFICATE


def write_positions(file: Path, places: np.ndarray) -> None:
    table = Table(places, names=["x", "y"])
    table["candid"] = 2**60 + 1 + np.arange(len(places))
    table.write(file, overwrite=True)


@pytest.fixture(scope="module")
def positions_run(tmp_path_factory, truth) -> Path:
    folder = configure(tmp_path_factory.mktemp("positions") / "run", settings(positions="positions.csv"))
    large_image(folder / "large.fits")
    write_positions(folder / "positions.csv", np.concatenate([truth, [[-40, 3]]]))
    snakemake(folder)
    return folder


def test_sources_are_recovered_in_pixels_of_the_large_image(positions_run, truth):
    tables = read(positions_run)
    rows, rejected = tables["catalogue"], tables["rejected"]
    assert rows["source"].tolist() == list(range(GRID * GRID))
    for axis, column in enumerate(("x0", "y0")):
        pulls = (rows[column] - truth[:, axis]) / rows[f"{column}_err"]
        assert np.median(np.abs(pulls)) < 1
        assert np.abs(pulls).max() < 5
        assert np.abs(rows[f"{column}_start"] - truth[:, axis]).max() < 3
    assert [(row["file"], row["source"]) for row in rejected] == [(b"positions.csv", GRID * GRID)]
    assert rows["candid"].tolist() == [2**60 + 1 + i for i in range(GRID * GRID)]
    assert set(rows["MJD-OBS"]) == {59000.25}
    assert (positions_run / "results" / "report.html").stat().st_size > 10_000


def test_a_moved_position_repeats_its_shard_only(positions_run, truth, tmp_path):
    folder = copied(positions_run, tmp_path)
    parts = times(folder, "parts/*.h5")
    assert len(parts) == 3
    # To the copy the image is a new one, however old its times: fitted anew as a whole, and the same.
    snakemake(folder)
    assert_identical(folder, positions_run)
    parts = times(folder, "parts/*.h5")
    moved = np.concatenate([truth, [[-40, 3]]])
    moved[32] += 1  # far from those of the other shard, whose pixels it would else share out anew
    write_positions(folder / "positions.csv", moved)
    snakemake(folder)
    repeated = [name for name, time in times(folder, "parts/*.h5").items() if parts[name] != time]
    assert [name[-5:] for name in repeated] == ["-1.h5"]
    assert read(folder)["catalogue"]["x0_start"][32] == pytest.approx(truth[32, 0], abs=3)


def test_a_table_that_is_gone_is_said_to_be(positions_run, tmp_path):
    folder = configure(tmp_path / "run", settings(positions="gone.csv"))
    shutil.copy(positions_run / "large.fits", folder)
    said = snakemake(folder, fails=True)
    assert "images.cutouts.positions: gone.csv: No such file or directory, wanted a table" in said


def test_detection_finds_them_all_and_again_what_is_lost(positions_run, truth, tmp_path):
    folder = configure(tmp_path / "run", settings(detect={"threshold": 5.0}) | {"certificate": {}})
    shutil.copy(positions_run / "large.fits", folder)
    snakemake(folder)
    rows = read(folder)["catalogue"]
    assert len(rows) == len(truth)
    assert np.isnan(rows["candid"]).all()
    apart = np.hypot(rows["x0"][:, None] - truth[:, 0], rows["y0"][:, None] - truth[:, 1])
    assert sorted(apart.argmin(axis=1)) == list(range(len(truth)))
    assert apart.min(axis=1).max() < 0.3
    found = times(folder, "detections/*")
    assert len(found) == 1
    # What is lost is found again, the same, by the jobs that need it.
    before = configure(tmp_path / "before", {})
    shutil.copytree(folder / "results", before / "results")
    for lost in ("detections", "parts"):
        shutil.rmtree(folder / "results" / lost)
    (folder / "results" / "catalogue.h5").unlink()
    snakemake(folder)
    assert_identical(folder, before)
    assert times(folder, "detections/*").keys() == found.keys()
