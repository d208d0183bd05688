"""Laws of shards: every image in one of them, the same ones whatever else there is, and names that do not move."""

import hashlib
import os
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.images import Block, Rejected
from pipeline.origin import content_digest
from pipeline.shards import NAME, assign, image_ids, read_manifest, relatives, write_manifests

#: Any file name there can be: all bytes but NUL, as Python hands them to us.
names = (
    st.binary(min_size=1, max_size=12)
    .filter(lambda b: b"\0" not in b)
    .map(lambda b: b.decode("utf-8", "surrogateescape"))
)
blocks = st.builds(
    lambda file, hdu, count: Block(file, hdu, 0, count, 4, 5, 6, 7), names, st.integers(0, 3), st.integers(1, 45)
)
refusals = st.builds(Rejected, names, st.integers(-1, 3), st.just(-1), st.just(-1), st.text(max_size=9))


def singles(count, prefix="data/"):
    return [Block(f"{prefix}{i}.fits", 0, 0, 1, 8, 8, 2880, i) for i in range(count)]


def planes_of(rows):
    return [
        (row.file, row.hdu, plane) for row in rows if isinstance(row, Block) for plane in range(row.start, row.stop)
    ]


@given(st.lists(blocks, max_size=12, unique_by=lambda b: (b.file, b.hdu)), st.lists(refusals, max_size=4), st.randoms())
def test_every_image_is_in_one_shard(some, refused, random):
    shards = assign(some, 10, refused)
    rows = [row for shard in shards.values() for row in shard]
    assert sorted(planes_of(rows)) == sorted(planes_of(some))
    assert sorted(row for row in rows if isinstance(row, Rejected)) == sorted(refused)
    assert all(shards.values())
    assert all(re.fullmatch(NAME, name) and re.fullmatch("[0-9a-f-]+", name) for name in shards)
    for name, shard in shards.items():
        assert shard == sorted(shard, key=lambda row: (row.file, row.hdu, row[2]))
        if name.startswith("f-"):
            assert len(shard) == 1
            assert shard[0].stop - shard[0].start <= 10
    # The order in which files are found changes nothing.
    random.shuffle(some)
    random.shuffle(refused)
    assert list(assign(some, 10, refused).items()) == list(shards.items())


def test_large_hdus_are_cut_and_small_ones_stay_together():
    large = [Block("b.fits", 1, 0, 25, 8, 8, 1, 1), Block("a.fits", 2, 0, 10, 8, 8, 1, 1)]
    small = [Block("b.fits", hdu, 0, 3, 8, 8, 1, 1) for hdu in (2, 3)]
    shards = assign([*large, *small], 10)
    assert [[(row.file, row.hdu, row.start, row.stop) for row in rows] for rows in shards.values()] == [
        [("b.fits", 2, 0, 3), ("b.fits", 3, 0, 3)],
        [("a.fits", 2, 0, 10)],
        [("b.fits", 1, 0, 10)],
        [("b.fits", 1, 10, 20)],
        [("b.fits", 1, 20, 25)],
    ]
    digest = hashlib.blake2b(b"b.fits").hexdigest()[:16]
    assert list(shards)[2:] == [f"f-{digest}-1-{i}" for i in range(3)]


@pytest.mark.parametrize(("count", "k"), [(1, 0), (100, 0), (101, 1), (200, 1), (201, 2), (400, 2), (401, 3)])
def test_number_of_buckets(count, k):
    shards = assign(singles(count), 100)
    assert {name.split("-")[1] for name in shards} == {f"{k:02d}"}
    assert len(shards) <= 2**k


def test_one_image_more_changes_one_shard():
    before, after = (assign(singles(count), 100) for count in (3000, 3001))
    changed = [name for name in after if after[name] != before.get(name)]
    assert len(after) == 32
    assert len(changed) == 1
    # When their number doubles, each bucket becomes two.
    doubled = assign(singles(3201), 100)
    for i in range(32):
        parts = {row.file for half in (2 * i, 2 * i + 1) for row in doubled[f"b-06-{half:08d}"]}
        assert {row.file for row in before[f"b-05-{i:08d}"]} <= parts


@pytest.mark.parametrize(("count", "other"), [(3000, 3201), (3201, 3000), (3000, 30_000), (200, 101)])
def test_relatives_of_a_shard_had_its_images(count, other):
    before, after = (assign(singles(n), 100) for n in (count, other))
    had = {row.file: name for name, rows in before.items() for row in rows}
    for name, rows in after.items():
        old = {had[row.file] for row in rows if row.file in had}
        assert old <= set(relatives(name))
        assert relatives(name)[0] == name
    assert relatives("f-0123456789abcdef-1-2") == ["f-0123456789abcdef-1-2"]


def test_files_that_are_only_rejected_have_a_shard():
    shards = assign([], 100, [Rejected("x.fits", -1, -1, -1, "no such file")])
    assert list(shards) == ["b-00-00000000"]
    assert assign([], 100) == {}


@given(st.lists(blocks, max_size=8, unique_by=lambda b: (b.file, b.hdu)), st.lists(refusals, max_size=4))
def test_manifests_keep_every_name(tmp_path_factory, some, refused):
    folder = tmp_path_factory.mktemp("manifests")
    shards = assign(some, 10, refused)
    written = write_manifests(folder, shards)
    assert list(written) == list(shards)
    for name, digest in written.items():
        assert digest == content_digest((folder / f"{name}.csv").read_bytes())
    assert sorted(os.listdir(folder)) == sorted(f"{name}.csv" for name in shards)
    for name, rows in shards.items():
        kept, gone = read_manifest(folder / f"{name}.csv")
        assert kept == [row for row in rows if isinstance(row, Block)]
        assert gone == [row for row in rows if isinstance(row, Rejected)]


@pytest.mark.parametrize(
    "name", ["a,b.fits", 'a"b.fits', "a\nb.fits", "a\r\nb.fits", "a\rb", " é.fits ", "\udcff\udc80", "=1+1"]
)
def test_manifest_keeps_odd_name(tmp_path, name):
    rows = [Block(name, 0, 1, 2, 3, 4, 5, 2**62), Rejected(name, -1, -1, -1, "not FITS, it says; 'no'\n")]
    write_manifests(tmp_path, {"b-00-00000000": rows})
    assert read_manifest(tmp_path / "b-00-00000000.csv") == ([rows[0]], [rows[1]])


def test_stamps_are_cut_into_blocks_and_kept_by_manifests(tmp_path):
    stamps = np.random.default_rng(5).integers(-9, 10**6, (25, 4))
    some = [Block("b.fits", 1, 0, 25, 8, 9, 1, 1, stamps), Block("a.fits", 0, 0, 2, 8, 9, 1, 1, stamps[:2])]
    shards = assign(some, 10)
    assert [(row.file, row.start, row.stop) for rows in shards.values() for row in rows] == [
        ("a.fits", 0, 2), ("b.fits", 0, 10), ("b.fits", 10, 20), ("b.fits", 20, 25),
    ]  # fmt: skip
    write_manifests(tmp_path, shards)
    kept = [read_manifest(tmp_path / f"{name}.csv") for name in shards]
    assert [[block[:8] for block in blocks] for blocks, _ in kept] == [
        [b[:8] for b in rows] for rows in shards.values()
    ]
    np.testing.assert_array_equal(np.concatenate([block.stamps for (block,), _ in kept]), [*stamps[:2], *stamps])
    # One position more at the end changes the last block only.
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    more = some[0]._replace(stop=26, stamps=np.concatenate([stamps, stamps[:1]]))
    write_manifests(tmp_path, assign([more, some[1]], 10))
    changed = [path.name for path in tmp_path.iterdir() if path.read_bytes() != before.get(path.name)]
    assert changed == [f"{list(shards)[-1]}.csv"]


def test_manifests_keep_what_goes_along_with_stamps(tmp_path):
    stamps = np.arange(12).reshape(3, 4)
    carried = [
        {"id": 2**60 + 1, "t": 0.1, "n": 'a,"é\n'},
        {"id": 2, "t": None, "n": None},
        {"id": 3, "t": 1e300, "n": ""},
    ]
    some = [
        Block("a.fits", 0, 0, 3, 8, 9, 1, 1, stamps, carried), Block("b.fits", 0, 0, 3, 8, 9, 1, 1, stamps),
    ]  # fmt: skip
    taken = ["", "3 5 11 12", "0 64"]
    some[1] = some[1]._replace(taken=taken)
    for size, wanted in ((100, [None, taken]), (2, [None, None, taken[:2], taken[2:]])):
        names = write_manifests(tmp_path, assign(some, size))
        blocks = [block for name in names for block in read_manifest(tmp_path / f"{name}.csv")[0]]
        assert [block.taken for block in sorted(blocks, key=lambda block: (block.file, block.start))] == wanted
    for size, wanted in ((100, [carried, None]), (2, [carried[:2], carried[2:], None, None])):
        names = write_manifests(tmp_path, assign(some, size))
        blocks = [block for name in names for block in read_manifest(tmp_path / f"{name}.csv")[0]]
        assert [block.carried for block in sorted(blocks, key=lambda block: (block.file, block.start))] == wanted


def test_one_bucket_keeps_stamps_planes_and_what_was_rejected_apart(tmp_path):
    stamps = np.arange(8).reshape(2, 4)
    rows = [
        Block("a.fits", 0, 0, 2, 8, 9, 1, 1, stamps), Block("b.fits", 0, 0, 3, 8, 9, 1, 1),
        Block("c.fits", 0, 0, 1, 8, 9, 1, 1, stamps[1:]), Rejected("d.csv", -1, -1, 7, "nowhere"),
    ]  # fmt: skip
    write_manifests(tmp_path, assign(rows[:3], 10, rows[3:]))
    blocks, rejected = read_manifest(tmp_path / "b-00-00000000.csv")
    assert rejected == rows[3:]
    assert [None if b.stamps is None else b.stamps.tolist() for b in blocks] == [stamps.tolist(), None, [[4, 5, 6, 7]]]


def test_manifests_are_written_only_where_they_change(tmp_path):
    write_manifests(tmp_path, assign(singles(300), 100))
    (tmp_path / "notes.csv").write_text("mine")
    before = {path.name: path.stat() for path in tmp_path.iterdir()}
    write_manifests(tmp_path, assign(singles(301), 100))
    after = {path.name: path.stat() for path in tmp_path.iterdir()}
    assert before.keys() == after.keys()
    assert sum(before[name].st_ino != after[name].st_ino for name in before) == 1
    # Shards that are no more go, what is not ours stays.
    (name,) = write_manifests(tmp_path, assign(singles(100), 100))
    assert sorted(os.listdir(tmp_path)) == [f"{name}.csv", "notes.csv"]


def test_image_ids_follow_their_definition():
    ids = image_ids("dir/a.fits", 3, np.arange(5), np.array([0, 0, 1, 0, 2]))
    text = [f"dir/a.fits\0{3}\0{plane}\0{source}" for plane, source in zip(range(5), (0, 0, 1, 0, 2), strict=True)]
    expected = [int.from_bytes(hashlib.blake2b(t.encode()).digest(), "big") >> (512 - 63) for t in text]
    assert ids.dtype == np.int64
    assert ids.tolist() == expected
    assert image_ids("dir/a.fits", 3, np.array([1]))[0] == expected[1]
    assert image_ids("dir/a.fits", 3, 2, np.array([1]))[0] == expected[2]
    assert image_ids("\udcff", 0, np.arange(2)).min() >= 0
    assert image_ids("a", 0, np.arange(0)).shape == (0,)


def test_image_ids_differ():
    ids = np.concatenate([image_ids(file, hdu, np.arange(1000)) for file in ("a", "b") for hdu in (0, 1)])
    assert len(set(ids.tolist())) == 4000
    assert ids.min() >= 0
