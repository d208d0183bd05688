"""What a job asks of a cluster: memory in MB and time in minutes, from the images in its manifests.

Generous, for a job that gets too little is lost, and small, for one that asks for too much waits. With each attempt the
rules ask for as much again. Imports neither jax nor astropy.
"""

import csv
import functools
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Contents(NamedTuple):
    """What one or more shards hold."""

    images: int = 0
    #: Of all images together.
    pixels: int = 0
    #: Pixels of the largest image that is fitted.
    largest: int = 0
    #: Pixels of the largest image that stamps are cut from, and of all of these together.
    parent: int = 0
    parents: int = 0


def contents(manifest: str | os.PathLike, stamp: int = 0) -> Contents:
    """What a shard holds; ``stamp`` is the width of what is cut from its images, if anything is.

    Raises ``FileNotFoundError``.
    """
    return _contents(os.fspath(manifest), stamp, os.stat(manifest).st_mtime_ns)


@functools.cache
def _contents(manifest: str, stamp: int, changed_ns: int) -> Contents:
    # The time of change is there for the cache alone.
    with open(manifest, encoding="utf-8", errors="surrogateescape", newline="") as table:
        blocks = [
            (int(row["stop"]) - int(row["start"]), int(row["ny"]) * int(row["nx"]))
            for row in csv.DictReader(table)
            if row["kind"] == "image"
        ]
    images = sum(count for count, _ in blocks)
    largest = max((size for _, size in blocks), default=0)
    if stamp:
        return Contents(images, images * stamp**2, stamp**2, largest, sum(size for _, size in blocks))
    return Contents(images, sum(count * size for count, size in blocks), largest)


def together(shards: Iterable[Contents]) -> Contents:
    """What several shards hold."""
    images, pixels, largest, parent, parents = zip(Contents(), *shards, strict=True)
    return Contents(sum(images), sum(pixels), max(largest), max(parent), sum(parents))


def simulate_mb(images: int, shape: Sequence[int]) -> int:
    """About twice what a simulation takes: JAX, and a stack and its noise in float64."""
    ny, nx = shape
    return round(2000 + images * ny * nx * 5e-5)


def scan_mb(largest: int) -> int:
    """About twice what detection takes in the largest file [bytes], unless it is compressed to less than a third."""
    return round(4000 + largest * 1e-5)


def fit_minutes(shard: Contents) -> int:
    """Several times what a fit takes on one core of today: starting, 10 ms an image to read, 2 us a pixel to fit.

    Images that stamps are cut from: 0.2 us a pixel to decompress.
    """
    return round(10 + (shard.images * 0.01 + shard.pixels * 2e-6 + shard.parents * 2e-7) / 60)


def fit_mb(shard: Contents) -> int:
    """About twice what a fit takes: JAX and its compiler, 10 kB a row, 300 bytes a pixel of the largest image.

    Of an image that stamps are cut from, 20 bytes a pixel, with its mask and map.
    """
    return round(2000 + shard.images * 0.02 + shard.largest * 6e-4 + shard.parent * 4e-5)


def certificate_minutes(run: Contents, sources: int) -> int:
    """Several times what a certificate takes: starting, reading all rows, 4 us a pixel to put in and fit again."""
    fitted = min(run.images, sources) * run.largest
    return round(60 + (run.images * 1e-4 + fitted * 4e-6) / 60)


def certificate_mb(run: Contents) -> int:
    """About twice what a certificate takes: 900 bytes a pixel of the largest image, of which it has four at a time.

    Of an image that stamps are cut from, 20 bytes a pixel.
    """
    return round(8000 + run.largest * 1.8e-3 + run.parent * 4e-5)


def report_mb(run: Contents) -> int:
    """About twice what drawing takes: of an image that stamps are cut from, 20 bytes a pixel."""
    return round(4000 + run.parent * 4e-5)


def catalogue_minutes(run: Contents) -> int:
    """Twelve times what merging takes where files are quick, 4 us a row: they may be slow."""
    return round(60 + run.images * 5e-5 / 60)
