"""What older parts give to new ones: rows of images that have not changed. The fit itself is a stand-in."""

import errno
import shutil
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

import pipeline.catalogue
import pipeline.fit
from pipeline import batches, hdus, jobs, runtime
from pipeline.catalogue import digest_of, read_origin, read_part, read_rows
from pipeline.origin import write_run
from pipeline.versions import RETRY
from tests.stand_in import FIT, READING, fitted, mean_as_fit, scanned, use_stand_in, write

#: Of images of two sizes in two units, with what goes along; of single files, a cube and two HDUs.
CARRYING = {"carry": ["NAME", "EXPTIME"], "hdu": "all"}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    use_stand_in(monkeypatch)


@pytest.fixture
def shard(tmp_path) -> Path:
    """A shard that has been fitted; what had been fitted is ``before.h5``, too."""
    write(tmp_path / "a.fits", (8, 8), 10, BUNIT="Jy", NAME="a", EXPTIME=3)
    write(tmp_path / "b.fits", (3, 8, 9), 20, BUNIT="adu", NAME=7, EXPTIME=1.5)
    write(tmp_path / "c.fits", (8, 8), 30, BUNIT="Jy")
    write(tmp_path / "d.fits", (2, 8, 8), 40, BUNIT="Jy", NAME="12", EXPTIME=2**70)
    (manifest,) = scanned(tmp_path, [str(tmp_path / "*.fits")], **CARRYING)
    fitted(tmp_path, manifest, **CARRYING)
    shutil.copy(tmp_path / "part.h5", tmp_path / "before.h5")
    return manifest


def content(part: Path) -> dict[str, object]:
    """All that a part holds but how it came about."""
    with h5py.File(part) as file:
        found = {
            name: (file[name].dtype, file[name][:].tobytes()) for name in ("catalogue", "rejected", "carried", "blocks")
        }
        found |= {name: matrices[:].tobytes() for name, matrices in file["covariance"].items()}
        kinds = file["carried"].attrs["kinds"].tolist()
        origin = {k: v for k, v in read_origin(part).items() if k not in ("seconds", "fitted")}
        return found | {"unit": file.attrs["unit"], "kinds": kinds, "origin": origin}


def afresh(folder: Path, manifest: Path, **reading) -> dict[str, object]:
    """What a part holds that is made with no older one."""
    (folder / "afresh").mkdir()
    fitted(folder / "afresh", manifest, **reading)
    assert read_origin(folder / "afresh" / "part.h5")["fitted"] == read_origin(folder / "part.h5")["images"]
    return content(folder / "afresh" / "part.h5")


def test_a_fit_that_fails_leaves_the_older_part(shard, tmp_path, monkeypatch):
    before = (tmp_path / "kept" / "part.h5").read_bytes()
    add(tmp_path)
    (manifest,) = scanned(tmp_path, [str(tmp_path / "*.fits")], **CARRYING)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.fit, "fit_rows", None)
        with pytest.raises(TypeError):
            fitted(tmp_path, manifest, again=True, **CARRYING)
    assert (tmp_path / "kept" / "part.h5").read_bytes() == before
    fitted(tmp_path, manifest, again=True, **CARRYING)
    assert read_origin(tmp_path / "part.h5")["fitted"] == 4


def test_without_links_all_is_fitted_again(shard, tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    fitted(tmp_path, shard, **CARRYING)
    assert not list((tmp_path / "kept").iterdir())
    fitted(tmp_path, shard, again=True, **CARRYING)
    assert read_origin(tmp_path / "part.h5")["fitted"] == 7


def test_an_older_part_that_is_replaced_while_it_is_read_is_read_as_one(shard, tmp_path, monkeypatch):
    """By a job that outlived its run."""
    kept = tmp_path / "kept" / "part.h5"
    wanted = read_part(kept)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["catalogue"] = 1
    read = pipeline.catalogue._read
    monkeypatch.setattr(
        pipeline.catalogue,
        "_read",
        lambda *of: (shutil.copy(tmp_path / "other.h5", tmp_path / "x"), (tmp_path / "x").replace(kept), read(*of))[-1],
    )
    np.testing.assert_equal(read_part(kept)._asdict(), wanted._asdict())


def test_a_fit_of_another_config_that_outlives_its_run_writes_nothing(shard, tmp_path, monkeypatch):
    write_run(tmp_path / "run.json", {}, "as it was")

    def while_another_run_begins(*of, **settings):
        write_run(tmp_path / "run.json", {"another": "config"}, "as it was")
        return mean_as_fit(*of, **settings)

    def while_the_same_begins(*of, **settings):
        write_run(tmp_path / "run.json", {}, "as it is")
        return mean_as_fit(*of, **settings)

    monkeypatch.setattr(pipeline.fit, "fit_rows", while_another_run_begins)
    with pytest.raises(ValueError, match="begun"):
        fitted(tmp_path, shard, **CARRYING)
    assert not (tmp_path / "part.h5").exists()
    write_run(tmp_path / "run.json", {}, "as it was")
    monkeypatch.setattr(pipeline.fit, "fit_rows", while_the_same_begins)
    assert len(fitted(tmp_path, shard, **CARRYING)["amp"]) == 7


def test_what_has_not_changed_is_not_fitted_again(shard, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.fit, "fit_rows", None)
    fitted(tmp_path, shard, again=True, **CARRYING)
    assert read_origin(tmp_path / "part.h5")["fitted"] == 0
    assert content(tmp_path / "part.h5") == content(tmp_path / "before.h5")


def add(folder: Path) -> None:
    write(folder / "aa.fits", (4, 8, 8), 15, BUNIT="K", NAME=5.5)


def change(folder: Path) -> None:
    write(folder / "new", (3, 8, 9), 25, NAME="x")
    (folder / "new").replace(folder / "b.fits")


def remove(folder: Path) -> None:
    (folder / "a.fits").unlink()


@pytest.mark.parametrize(("events", "count"), [((add,), 4), ((change,), 3), ((remove,), 0), ((add, change, remove), 7)])
def test_one_new_image_costs_one_image(shard, tmp_path, events, count):
    for event in events:
        event(tmp_path)
    (manifest,) = scanned(tmp_path, [str(tmp_path / "*.fits")], **CARRYING)
    fitted(tmp_path, manifest, again=True, **CARRYING)
    assert read_origin(tmp_path / "part.h5")["fitted"] == count
    assert content(tmp_path / "part.h5") == afresh(tmp_path, manifest, **CARRYING) != content(tmp_path / "before.h5")


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: {"fit": FIT | {"scale": 2.0}},
        lambda patch: {"saturation": 45},
        lambda patch: patch.setattr(jobs, "_versions", lambda: {"jax": "0"}),
        lambda patch: patch.setattr(runtime, "start_jax", lambda **_: "gpu"),
    ],
    ids=["fit", "reading", "version", "device"],
)
def test_what_was_made_otherwise_is_fitted_again(shard, tmp_path, monkeypatch, change):
    settings = change(monkeypatch) or {}
    fitted(tmp_path, shard, again=True, **(CARRYING | settings))
    assert read_origin(tmp_path / "part.h5")["fitted"] == 7


def test_a_folder_that_was_away_for_a_run_costs_no_fits(shard, tmp_path):
    entry = tmp_path / "night"
    entry.mkdir()
    for image in list(tmp_path.glob("*.fits")):
        image.rename(entry / image.name)
    (manifest,) = scanned(tmp_path, [str(entry)], **CARRYING)
    fitted(tmp_path, manifest, again=True, **CARRYING)
    before = content(tmp_path / "part.h5")
    entry.rename(tmp_path / "away")
    (manifest,) = scanned(tmp_path, [str(entry)], **CARRYING)
    assert len(fitted(tmp_path, manifest, again=True, **CARRYING)["amp"]) == 0
    (tmp_path / "away").rename(entry)
    (manifest,) = scanned(tmp_path, [str(entry)], **CARRYING)
    fitted(tmp_path, manifest, again=True, **CARRYING)
    assert read_origin(tmp_path / "part.h5")["fitted"] == 0
    assert content(tmp_path / "part.h5") == before


def test_shards_that_are_divided_or_joined_take_their_rows_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # shards go by names
    for i in range(12):
        write(tmp_path / f"{i:02d}.fits", (8, 8), i, NAME=f"n{i}")

    def run(shard_size: int) -> tuple[int, int, dict[float, str]]:
        """Shards, images fitted, and what goes along with each image."""
        manifests = scanned(tmp_path, ["*.fits"], shard_size, **CARRYING)
        count, along = 0, {}
        for manifest in manifests:
            part = tmp_path / "parts" / f"{manifest.stem}.h5"
            part.parent.mkdir(exist_ok=True)
            jobs.fit(
                part, kept=tmp_path / "kept" / part.name, manifest=manifest, reading=READING | CARRYING, fit=FIT,
                detections=tmp_path / "detections", run=tmp_path / "run.json", log="", gpu=0, cache="",
            )  # fmt: skip
            held = read_part(part)
            along |= dict(zip(held.rows["amp"].tolist(), held.carried["NAME"], strict=True))
            assert (held.rows["file"] == sorted(held.rows["file"])).all()
            count += read_origin(part)["fitted"]
        return len(manifests), count, along

    shards, count, along = run(100)
    assert (shards, count, along) == (1, 12, {float(i): f"n{i}" for i in range(12)})
    assert run(3)[1:] == (0, along)
    shards, count, again = run(6)
    assert (shards, count, again) == (2, 0, along)
    # Another image to fit, in shards that are new.
    for kept in (tmp_path / "kept").glob("b-02-*"):
        kept.unlink()
    write(tmp_path / "12.fits", (8, 8), 12, NAME="n12")
    shards, count, again = run(6)
    assert (shards > 2, count, again) == (True, 1, along | {12.0: "n12"})


@pytest.mark.parametrize("damage", ["half of it", "of no blocks"])
def test_an_older_part_that_is_none_is_not_used(shard, tmp_path, damage):
    old = tmp_path / "kept" / "part.h5"
    if damage == "half of it":
        old.write_bytes(old.read_bytes()[:2000])
    else:
        with h5py.File(old, "r+") as file:
            del file["blocks"]
    fitted(tmp_path, shard, again=True, **CARRYING)
    assert read_origin(tmp_path / "part.h5")["fitted"] == 7
    assert content(tmp_path / "part.h5") == content(tmp_path / "before.h5")


def test_an_image_that_could_not_be_read_is_tried_again(tmp_path, monkeypatch):
    write(tmp_path / "a.fits", (2, 8, 8), 1)
    write(tmp_path / "b.fits", (8, 8), 5)
    (manifest,) = scanned(tmp_path, [str(tmp_path / "*.fits")])
    with monkeypatch.context() as patch:
        patch.setattr(batches, "read_images", fails_once(batches.read_images, "a.fits", plane=1))
        assert len(fitted(tmp_path, manifest)["amp"]) == 2
    assert len(read_rows(tmp_path / "part.h5", table="rejected")["reason"]) == 1
    assert fitted(tmp_path, manifest, again=True)["amp"].tolist() == [1, 2, 5]
    assert read_origin(tmp_path / "part.h5")["fitted"] == 2
    assert len(read_rows(tmp_path / "part.h5", table="rejected")["reason"]) == 0


@pytest.mark.parametrize("how", ["gone", "being copied", "no answer"])
@pytest.mark.parametrize("changed", ["time", "content"])
def test_an_image_that_may_be_there_again_has_its_part_made_again(tmp_path, monkeypatch, how, changed):
    for name, values in (("a", 1), ("b", 5), ("c", 7)):
        write(tmp_path / f"{name}.fits", (2, 8, 8), values)
    (tmp_path / "c.fits").write_bytes((tmp_path / "c.fits").read_bytes()[:3000])  # broken for good
    (manifest,) = scanned(tmp_path, [str(tmp_path / "*.fits")], changed=changed)
    listed, file = manifest.read_bytes(), tmp_path / "b.fits"
    whole = file.read_bytes()
    with monkeypatch.context() as patch:
        if how == "gone":
            file.rename(tmp_path / "b")
        elif how == "being copied":
            time.sleep(0.02)  # clocks of file systems tick by milliseconds
            file.write_bytes(whole[:4000])
        else:
            patch.setattr(hdus, "_read_layout", fails_on(hdus._read_layout, file, OSError(errno.EIO, "no answer")))
        assert len(fitted(tmp_path, manifest, changed=changed)["amp"]) == 2
    reasons = read_rows(tmp_path / "part.h5", table="rejected")["reason"].tolist()
    assert sum(reason.endswith(RETRY) for reason in reasons) == 2 < len(reasons)
    # Whoever looks at it takes it for made of something else; the catalogue of this run takes it as it is.
    assert (digest_of(tmp_path / "part.h5"), len(read_origin(tmp_path / "part.h5")["digest"])) == ("", 32)
    if how == "gone":
        (tmp_path / "b").rename(file)
    elif how == "being copied":
        file.write_bytes(whole)
    (again,) = scanned(tmp_path, [str(tmp_path / "*.fits")], changed=changed)
    assert again.read_bytes() == listed or changed == "time"
    assert fitted(tmp_path, again, again=True, changed=changed)["amp"].tolist() == [1, 2, 5, 6]
    assert read_origin(tmp_path / "part.h5")["fitted"] == 2
    assert digest_of(tmp_path / "part.h5")


def fails_on(read, file: Path, error: OSError):
    def reading(path, *arguments):
        if path == str(file):
            raise error
        return read(path, *arguments)

    return reading


def fails_once(read, name: str, plane: int):
    """`read_images`, but one plane of one file cannot be read."""

    def reading(block, start, stop, **settings):
        if block.file.endswith(name) and start <= plane < stop:
            msg = f"{block.file}: the disk is on fire"
            raise OSError(msg)
        return read(block, start, stop, **settings)

    return reading
