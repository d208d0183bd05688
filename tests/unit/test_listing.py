"""Which files are found, and whether a change of any of them shows."""

import os
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.images import Rejected
from pipeline.listing import list_files, listing_digest, run_digest


def test_list_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("data/deep/er")
    os.makedirs("bare")
    names = [
        "data/b.fits",
        "data/A.FITS",
        "data/a.fits.gz",
        "data/deep/c.fit",
        "data/deep/er/d.fts.bz2",
        "data/e.fits.fz",
    ]
    for name in [*names, "data/notes.txt", "data/image.dat", "data/a[1].fits", "data/x.fits.txt"]:
        open(name, "w").close()
    os.symlink("..", "data/deep/up")
    everything = sorted([*names, "data/a[1].fits"])
    assert list_files(["data"]) == (everything, [])
    assert list_files(["data", "data/*.fits", "data/b.fits"]) == (everything, [])
    assert list_files(["data/**/*.f?t*"])[0][-1] == "data/x.fits.txt"
    assert list_files(["data/image.dat", "data/a[1].fits"]) == (["data/a[1].fits", "data/image.dat"], [])
    assert list_files([]) == ([], [])
    files, rejected = list_files(["bare", "nothing.fits", "no/*.fits", "data/b.fits", "nothing.fits"])
    assert files == ["data/b.fits"]
    assert [(r.file, r.hdu) for r in rejected] == [("bare", -1), ("no/*.fits", -1), ("nothing.fits", -1)]
    assert [words in r.reason for words, r in zip(("in this folder", "matches", "no such file"), rejected, strict=True)]


@given(st.lists(st.sampled_from(["b.fits", "a/c.fit", "a", "*.fits", "a/*", "**", "none"]), max_size=6))
def test_listing_twice_changes_nothing(entries):
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/a")
        for name in ("b.fits", "a/c.fit", "a/d.fits.gz"):
            open(f"{folder}/{name}", "w").close()
        once, _ = list_files([f"{folder}/{entry}" for entry in entries])
        assert list_files(once) == (sorted(set(once)), [])
        assert list_files([f"{folder}/{entry}" for entry in reversed(entries)])[0] == once


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        (".", ["./a.fits", "./own2/c.fits"]),
        ("**/*.fits", ["a.fits", "own2/c.fits"]),
        ("*", ["a.fits", "own2/c.fits"]),
        ("own", ["own/b.fits", "own/in/d.fits"]),
        ("own/*.fits", ["own/b.fits"]),
        ("own/**/*.fits", ["own/b.fits", "own/in/d.fits"]),
        ("own/b.fits", ["own/b.fits"]),
        ("own*/*.fits", ["own2/c.fits"]),
    ],
)
def test_our_own_images_are_found_only_by_name(tmp_path, monkeypatch, entry, wanted):
    for name in ("a.fits", "own/b.fits", "own2/c.fits", "own/in/d.fits"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert list_files([entry], ["own"]) == (wanted, [])
    assert len(list_files(["."])[0]) == 4


def test_listing_digest_sees_every_change(tmp_path):
    first, second = tmp_path / "1.fits", tmp_path / "2.fits"
    first.write_bytes(b"one")
    seen = [listing_digest([str(first), str(second)])]
    assert seen[0] == listing_digest([str(second), str(first), str(first)])
    second.write_bytes(b"two")
    seen.append(listing_digest([str(first), str(second)]))
    seen.append(listing_digest([str(first)]))
    second.write_bytes(b"three")
    seen.append(listing_digest([str(first), str(second)]))
    os.utime(second, ns=(5, 5))
    seen.append(listing_digest([str(first), str(second)]))
    second.chmod(0o600)
    seen.append(listing_digest([str(first), str(second)]))
    assert len(set(seen)) == len(seen)
    assert listing_digest(["a\0b", "\udcff"]) != listing_digest([])


def test_digest_of_a_run_sees_all_that_it_reads(tmp_path):
    image, mask, table = tmp_path / "a.fits", tmp_path / "a.mask", tmp_path / "positions.csv"
    for file in (image, mask, table):
        file.write_bytes(b"one")
    bare = {"mask": None, "uncertainty": None, "background": None}
    reading = bare | {"mask": {"files": str(tmp_path / "{stem}.mask")}}
    found, rejected = [str(image)], [Rejected("b.fits", -1, -1, -1, "no such file or folder")]

    def seen():
        return run_digest(found, rejected, reading, [str(table)])

    digests = [seen(), run_digest(found, [], reading, [str(table)]), run_digest(found, rejected, bare, [str(table)])]
    digests.append(run_digest(found, rejected, reading, []))
    for file in (image, mask, table):
        file.write_bytes(b"changed")
        digests.append(seen())
    assert len(set(digests)) == len(digests)
    assert seen() == digests[-1]
