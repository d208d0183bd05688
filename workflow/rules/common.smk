"""The checked config, the names of all files, and the input functions. No rules here, and no functions elsewhere."""

import functools
import sys
from pathlib import Path

from pipeline import __version__
from pipeline.config import check_config


def checked(raw):
    """The config with its defaults; a bad one stops here, with sentences and no traceback."""
    try:
        return check_config(raw)
    except ValueError as problems:
        sys.exit(str(problems))


config.update(checked(config))

RESULTS = Path(config["results"])
STACK = RESULTS / "simulated" / "{index}.fits"
TRUTH = RESULTS / "simulated" / "{index}.truth.fits"
SHARDS = RESULTS / "shards.txt"
UNREADABLE = RESULTS / "unreadable.json"
MANIFEST = RESULTS / "shards" / "{shard}.csv"
PART = RESULTS / "parts" / "{shard}.h5"
ORIGIN = RESULTS / "parts" / "{shard}.json"
CATALOGUE = RESULTS / "catalogue.h5"
REPORT = RESULTS / "report.html"
LOGS = RESULTS / "logs"
BENCHMARKS = RESULTS / "benchmarks"

SIMULATED = config["source"] == "simulated"
FIRST_IMAGES = range(
    0, config["simulated"]["count"] if SIMULATED else 0, config["shard_size"]
)
INDICES = [f"{index:05d}" for index in range(len(FIRST_IMAGES))]
STACKS = [str(STACK).format(index=index) for index in INDICES]
TRUTHS = [str(TRUTH).format(index=index) for index in INDICES]

# Simulated stacks are read as any other files; what the config says of files is meant for the user's own.
IMAGES = (
    checked({"images": {"files": STACKS}})["images"] if SIMULATED else config["images"]
)
READING = {key: IMAGES[key] for key in ("hdu", "column", "mask", "uncertainty")}


def first_image(wildcards):
    """Number of the first image in a stack."""
    return int(wildcards.index) * config["shard_size"]


def stop_image(wildcards):
    """One more than the number of the last image in a stack."""
    return min(
        first_image(wildcards) + config["shard_size"], config["simulated"]["count"]
    )


@functools.cache
def listing():
    """Digest of the names, sizes and times of the images: the scan repeats when it changes. Simulated stacks are inputs."""
    from pipeline import (
        images,
        shards,
    )  # here, because parsing a Snakefile should not import astropy

    return (
        ""
        if SIMULATED
        else shards.listing_digest(images.list_files(IMAGES["files"])[0])
    )


def shard_files(pattern):
    """An input function: the file of every shard, in the order of the catalogue; known once the scan has run."""
    return lambda wildcards: [
        str(pattern).format(shard=shard)
        for shard in Path(checkpoints.scan.get().output.shards).read_text().split()
    ]
