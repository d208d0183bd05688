"""Jobs: what cannot be read, what was made of something else, what outlives its run. The fit itself is a stand-in."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

import pipeline.fit
import pipeline.simulate
from pipeline import batches, jobs
from pipeline.catalogue import read_origin, read_rows, read_summary
from pipeline.columns import DERIVED
from pipeline.config import check_config
from pipeline.images import scan_file
from pipeline.listing import listing_digest
from pipeline.origin import content_digest, list_digest, read_list, write_list, write_run
from pipeline.simulate import draw
from tests.stand_in import FIT, READING, certified, fitted, good_fit, merged, scanned, table_of, use_stand_in, write


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    use_stand_in(monkeypatch)


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


def test_a_shard_without_an_image_gives_a_part_without_rows(tmp_path):
    (manifest,) = scanned(tmp_path, [str(tmp_path / "none.fits")])
    assert len(fitted(tmp_path, manifest)["amp"]) == 0
    assert read_rows(tmp_path / "part.h5", table="rejected")["reason"].tolist() == ["no such file or folder"]


def test_nothing_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing found under"):
        scanned(tmp_path, [])


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


def test_without_good_rows_the_certificate_is_empty_and_says_so(tmp_path, caplog):
    write(tmp_path / "a.fits", (6, 8, 8), 10)
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        table = certified(tmp_path, scanned(tmp_path, [str(tmp_path)]))
    assert not table["sources"].any()
    assert "no errors certified: fewer than 4 good rows of one image size" in caplog.text


def test_other_pixels_have_another_digest(tmp_path):
    digests = set()
    for value in (1, 1, 2):
        (tmp_path / "a.fits").unlink(missing_ok=True)
        write(tmp_path / "a.fits", (8, 8), value)
        fitted(tmp_path, *scanned(tmp_path, [str(tmp_path / "a.fits")]))
        digests.add(read_origin(tmp_path / "part.h5")["pixels"])
    assert len(digests) == 2


def test_progress_tells_rate_and_time_left(monkeypatch, caplog):
    """But of the first few, which may have waited for the compiler."""
    clock = iter([0.0, 1.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr(jobs.time, "monotonic", lambda: next(clock))
    tell = jobs._progress(400, "images fitted")
    with caplog.at_level(logging.INFO, logger="pipeline"):
        for done in (1, 30, 100, 110):
            tell(done)
    assert caplog.messages == ["30 of 400 images fitted", "100 of 400 images fitted, 5/s, about 60 s left"]
