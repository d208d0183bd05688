"""Jobs: the order of rows, images that cannot be read, what headers add. The fit itself is a stand-in."""

import json
import logging
from pathlib import Path

import h5py
import numpy as np
import pytest
from astropy.io import fits

import pipeline.fit
from pipeline import jobs, runtime
from pipeline.catalogue import read_rows, read_summary
from pipeline.columns import BIT, COLUMNS, COVARIANCES, empty_rows, parameter_names

READING = {"hdu": "auto", "column": None, "mask": None, "uncertainty": None}
FIT = {"background": "constant", "scale": "fit", "uncertainty": "pooled"}
CELESTIAL = {
    "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.0, "CRVAL2": 2.0, "CRPIX1": 3.0, "CRPIX2": 3.0,
    "CDELT1": -1e-4, "CDELT2": 1e-4,
}  # fmt: skip


def mean_as_fit(data, mask, noise_map, *, background, scale, uncertainty):
    """Stands in for the fit: ``amp`` is the mean of an image, the covariance the unit matrix."""
    p = len(parameter_names(background, scale))
    names = [c.name for c in COLUMNS if c.group in ("fitted", "derived", "quality")]
    rows = {name: empty_rows(len(data))[name] for name in names}
    rows |= dict.fromkeys(("x0", "y0"), np.full(len(data), 2.0)) | {"sigma": np.ones(len(data))}
    rows |= dict.fromkeys(("rho", "diff"), np.full(len(data), 0.1)) | {"amp": data.mean(axis=(1, 2), dtype=float)}
    return rows, {kind: np.tile(np.eye(p), (len(data), 1, 1)) for kind in COVARIANCES}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Neither the log nor JAX of this process is a job's."""
    monkeypatch.setattr(runtime, "start_log", lambda path: None)
    monkeypatch.setattr(runtime, "start_jax", lambda **_: "cpu")
    monkeypatch.setattr(pipeline.fit, "fit_rows", mean_as_fit)


def scanned(folder: Path, files: list[str], **reading) -> list[Path]:
    """Manifests of the shards of some files."""
    jobs.scan(folder / "shards.txt", folder / "shards", files=files, reading=READING | reading, shard_size=1000, log="")
    return [folder / "shards" / f"{name}.csv" for name in (folder / "shards.txt").read_text().split()]


def fitted(folder: Path, manifest: Path, **reading) -> dict[str, np.ndarray]:
    """Rows of the part that a manifest gives."""
    jobs.fit(
        folder / "part.h5", folder / "part.json", manifest=manifest, reading=READING | reading, fit=FIT,
        log="", gpu=0, cache="",
    )  # fmt: skip
    return read_rows(folder / "part.h5")


def write(path: Path, shape: tuple[int, ...], value: float, **cards) -> None:
    """An image whose plane i is ``value + i`` throughout."""
    planes = np.full(shape, value, np.float32) + np.arange(shape[0] if len(shape) > 2 else 1)[:, None, None]
    fits.PrimaryHDU(planes.reshape(shape), fits.Header(cards)).writeto(path)


def test_rows_keep_the_order_of_the_manifest_whatever_the_sizes_and_batches(tmp_path, monkeypatch):
    write(tmp_path / "a.fits", (5, 8, 8), 10)
    write(tmp_path / "b.fits", (6, 9), 20)
    write(tmp_path / "c.fits", (3, 8, 8), 30)
    (manifest,) = scanned(tmp_path, [str(tmp_path)])
    whole = fitted(tmp_path, manifest)
    assert whole["amp"].tolist() == [10, 11, 12, 13, 14, 20, 30, 31, 32]
    assert whole["plane"].tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2]
    assert [Path(file).name[0] for file in whole["file"]] == list("aaaaabccc")
    monkeypatch.setattr(jobs, "BATCH_PIXELS", 2 * 64)
    pieces = fitted(tmp_path, manifest)
    np.testing.assert_equal(pieces, whole)


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
    read = jobs.read_planes

    def broken(block, start, stop, **reading):
        if start <= 4 < stop:
            msg = "plane 4 is spoilt"
            raise ValueError(msg)
        return read(block, start, stop, **reading)

    monkeypatch.setattr(jobs, "read_planes", broken)
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


def test_the_unit_of_a_table_column_is_its_own(tmp_path):
    column = fits.Column("Flux", "64E", "e/s", dim="(8,8)", array=np.ones((4, 8, 8), np.float32))
    fits.BinTableHDU.from_columns([fits.Column("TIME", "D", "d", array=np.arange(4)), column]).writeto(
        tmp_path / "t.fits"
    )
    (manifest,) = scanned(tmp_path, [str(tmp_path)], column="FLUX")
    assert fitted(tmp_path, manifest, column="FLUX")["plane"].tolist() == [0, 1, 2, 3]
    with h5py.File(tmp_path / "part.h5") as part:
        assert part.attrs["unit"] == "e/s"


def test_the_catalogue_joins_parts_truth_and_provenance(tmp_path):
    write(tmp_path / "00000.fits", (3, 8, 8), 7)
    truth = np.zeros(3, [("plane", "i8"), ("amp", "f8")])
    truth["plane"], truth["amp"] = [2, 0, 1], [9, 7, 8]
    fits.BinTableHDU(truth).writeto(tmp_path / "00000.truth.fits")
    stack = str(tmp_path / "00000.fits")
    (manifest,) = scanned(tmp_path, [stack])
    fitted(tmp_path, manifest)
    jobs.catalogue(
        tmp_path / "catalogue.h5", parts=[tmp_path / "part.h5"], origins=[tmp_path / "part.json"], stacks=[stack],
        truths=[str(tmp_path / "00000.truth.fits")], certificates=[], config={"fit": FIT, "images": READING}, log="",
    )  # fmt: skip
    assert read_rows(tmp_path / "catalogue.h5")["amp"].tolist() == [7, 8, 9]
    assert read_rows(tmp_path / "catalogue.h5", table="truth")["amp"].tolist() == [7, 8, 9]
    provenance = read_summary(tmp_path / "catalogue.h5").provenance
    assert set(provenance) == {"config", "versions", "device", "inputs"}
    assert json.loads((tmp_path / "part.json").read_text())["pixels"] in provenance["inputs"]


def good_fit(data, mask, noise_map, *, background, scale, uncertainty):
    """Stands in for a fit that succeeds: a source of S/N 20 that has the mean of its image as amplitude."""
    rows, covariances = mean_as_fit(data, mask, noise_map, background=background, scale=scale, uncertainty=uncertainty)
    errors = {f"{name}_err": np.full(len(data), 0.1) for name in parameter_names(background, scale)}
    rest = {"snr": 20.0, "scale": 1.0, "background": 0.0, "x0_start": 2.0, "y0_start": 2.0}
    return rows | errors | {name: np.full(len(data), value) for name, value in rest.items()}, covariances


def certified(folder: Path, manifests: list[Path], sources: int = 100, **reading) -> dict[str, np.ndarray]:
    """The certificate of a run on these shards."""
    parts = []
    for manifest in manifests:
        fitted(folder, manifest, **reading)
        parts.append((folder / "part.h5").rename(manifest.with_suffix(".h5")))
    jobs.certificate(
        folder / "certificate.h5", folder / "certificate.json", parts=parts, manifests=manifests,
        reading=READING | reading, fit=FIT, sources=sources, log="", gpu=0, cache="",
    )  # fmt: skip
    return read_rows(folder / "certificate.h5", table="certificate")


def test_a_certificate_needs_groups_of_one_size_and_does_not_mind_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.fit, "fit_rows", good_fit)
    write(tmp_path / "a.fits", (6, 8, 8), 10)
    write(tmp_path / "b.fits", (3, 8, 8), 20)
    write(tmp_path / "c.fits", (3, 9, 8), 30)
    whole = certified(tmp_path, scanned(tmp_path, [str(tmp_path)]))
    assert whole["sources"].tolist() == [0, 8, 0, 0] * 8
    assert json.loads((tmp_path / "certificate.json").read_text())["sources"] == 8
    monkeypatch.setattr(jobs, "BATCH_PIXELS", 4 * 64)
    files = [str(tmp_path / name) for name in ("a.fits", "b.fits", "c.fits")]
    shards = [scanned(tmp_path, [file])[0].rename(f"{file}.csv") for file in reversed(files)]
    np.testing.assert_equal(certified(tmp_path, shards), whole)
    assert certified(tmp_path, shards, sources=7)["sources"].max() == 4


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
    read = jobs.read_planes

    def gone(block, start, stop, **reading):
        if block.file.endswith("b.fits"):
            msg = f"{block.file}: it is gone"
            raise ValueError(msg)
        return read(block, start, stop, **reading)

    rows = jobs._chosen([manifest.with_suffix(".h5")], 100)
    monkeypatch.setattr(jobs, "read_planes", gone)
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        ((stack, found),) = jobs._images(rows, [manifest], READING)
    assert len(stack.data) == len(found["snr"]) == 4
    assert "b.fits: it is gone" in caplog.text
    assert whole["sources"].max() == 8


def test_other_pixels_have_another_digest(tmp_path):
    digests = set()
    for value in (1, 1, 2):
        (tmp_path / "a.fits").unlink(missing_ok=True)
        write(tmp_path / "a.fits", (8, 8), value)
        fitted(tmp_path, *scanned(tmp_path, [str(tmp_path / "a.fits")]))
        digests.add(json.loads((tmp_path / "part.json").read_text())["pixels"])
    assert len(digests) == 2


def test_progress_tells_rate_and_time_left(monkeypatch, caplog):
    clock = iter([0.0, 1.0, 10.0, 11.0])
    monkeypatch.setattr(jobs.time, "monotonic", lambda: next(clock))
    tell = jobs._progress(400, "images fitted")
    with caplog.at_level(logging.INFO, logger="pipeline"):
        for done in (50, 100, 110):
            tell(done)
    assert caplog.messages == ["100 of 400 images fitted, 10/s, about 30 s left"]
