"""What jobs ask for, from the images in their shards."""

import os
from pathlib import Path

import pytest

from pipeline import resources
from pipeline.images import Block, Rejected
from pipeline.resources import Contents, contents, together
from pipeline.shards import write_manifests


def block(count: int, shape=(32, 32), file="a.fits") -> Block:
    return Block(file, 0, 0, count, *shape, 2880, 1)


@pytest.fixture
def manifest(tmp_path) -> Path:
    """Of one shard with 150,000 stamps, one image of 3000 x 2000, and a file that nobody could read."""
    rows = [block(150_000), block(1, (3000, 2000), "b.fits"), Rejected("c.fits", -1, -1, -1, "empty")]
    write_manifests(tmp_path, {"b-00": rows})
    return tmp_path / "b-00.csv"


def test_what_a_shard_holds(manifest):
    assert contents(manifest) == Contents(150_001, 150_000 * 1024 + 6_000_000, 6_000_000, 0)
    assert contents(manifest, 16) == Contents(150_001, 150_001 * 256, 256, 6_000_000, 6_001_024)


def test_a_manifest_that_changed_is_read_again(manifest):
    before = contents(manifest)
    write_manifests(manifest.parent, {"b-00": [block(7)]})
    os.utime(manifest, ns=(1, 1))  # however coarse the clock of the file system
    assert contents(manifest) == Contents(7, 7 * 1024, 1024, 0) != before


def test_what_several_shards_hold():
    one, other = Contents(3, 30, 10, 0, 0), Contents(2, 80, 40, 7, 9)
    assert together([one, other]) == Contents(5, 110, 40, 7, 9)
    assert together([]) == Contents()


@pytest.mark.parametrize(
    "amount",
    [
        resources.fit_mb,
        resources.fit_minutes,
        resources.certificate_mb,
        lambda run: resources.certificate_minutes(run, 10**9),
        resources.catalogue_minutes,
        resources.report_mb,
    ],
)
def test_more_is_never_given_less(amount):
    small, many, wide = (
        Contents(1, 1024, 1024, 0),
        Contents(10**6, 10**9, 1024, 0),
        Contents(1, 10**8, 10**8, 10**9, 10**9),
    )
    assert 0 < amount(small) <= min(amount(many), amount(wide))
    assert max(amount(many), amount(wide)) > amount(small)
    assert all(isinstance(amount(run), int) for run in (small, many, wide))


def test_a_certificate_of_few_sources_is_short_however_many_images():
    run = Contents(10**6, 2**10 * 10**6, 2**10, 0)
    assert resources.certificate_minutes(run, 2000) < resources.certificate_minutes(run, 10**6) / 0.7
    assert resources.certificate_minutes(run, 2000) == resources.certificate_minutes(run, 2001)
