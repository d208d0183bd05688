"""The checked config, the names of all files, and the input functions. No rules here, and no functions elsewhere."""

import csv
import functools
import os
import shutil
import sys
from pathlib import Path

import yaml
from snakemake.io import IOFile
from snakemake.utils import update_config

from pipeline import __version__, origin
from pipeline.config import check_config


def complete(config):
    """Fill in the defaults, in place; a bad config stops here, with sentences and no traceback."""
    # Snakemake takes every number in a section given by --config for text.
    for entry in workflow.config_settings.config_args or ():
        key, _, text = entry.partition("=")
        if text.startswith("{"):
            update_config(config, {key: yaml.safe_load(text)})
    try:
        settings = check_config(config)
    except ValueError as problems:
        sys.exit(str(problems))
    if settings["source"] == "simulated" and settings["images"]["files"]:
        print(
            "Note: images.files is given but not used, since source is 'simulated'; for your own images: source: images",
            file=sys.stderr,
        )
    config.clear()
    config.update(settings)


complete(config)


onstart:
    # Now, and not once for each job.
    if workflow.executor_plugin.name == "slurm" and not shutil.which("sbatch"):
        sys.exit(
            "there is no sbatch here: give the command on a login node of the cluster, or leave out PROFILE=slurm"
        )
    # For a limit of 100 starts a second Snakemake 9.27 goes through its jobs once a second for each job that has ended:
    # after two hundred it does nothing else.
    workflow.scheduler.job_rate_limiter = None


RESULTS = Path(config["results"])
STACK = RESULTS / "simulated" / "{index}.fits"
TRUTH = RESULTS / "simulated" / "{index}.truth.fits"
LISTING = RESULTS / "listing.txt"
SHARDS = RESULTS / "shards.txt"
MANIFEST = RESULTS / "shards" / "{shard}.csv"
PART = RESULTS / "parts" / "{shard}.h5"
CERTIFICATE = RESULTS / "certificate.h5"
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

# Asked for by the catalogue and the report, or made by no job.
CERTIFIED = config["certificate"]["sources"] > 0
CERTIFICATES = [str(CERTIFICATE)] if CERTIFIED else []

# Simulated stacks are read as any other files; the section `images` is meant for the user's own.
IMAGES = (check_config({}) if SIMULATED else config)["images"]
FILES = STACKS if SIMULATED else IMAGES["files"]
READING = {key: value for key, value in IMAGES.items() if key != "files"}
CUTOUTS = IMAGES["cutouts"] or {}
POSITIONS = [CUTOUTS["positions"]] if "positions" in CUTOUTS else []


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
    """Digest of the names, sizes and times of all images, masks, maps and tables: the scan repeats when it changes.

    Of simulated images nothing: their stacks are inputs of the scan.
    """
    if SIMULATED:
        return ""
    # Here, because parsing a Snakefile should not import astropy.
    from pipeline import images, shards

    found, _ = images.list_files(FILES)
    companions = [
        other for file in found for other in images.companions(file, **READING)
    ]
    tables = [os.path.expanduser(path) for path in POSITIONS]
    return shards.listing_digest(found + companions + tables)


def lost_shards():
    """Shards whose manifests are gone, so that the scan has to write them again."""
    _, names = origin.read_list(SHARDS)
    return [
        shard for shard in names if not Path(str(MANIFEST).format(shard=shard)).exists()
    ]


def drives():
    """Whether this process is to make something: no dry run, no question, and none of the jobs."""
    return (
        workflow.is_main_process
        and workflow.executor_plugin is not None
        and not (workflow.dryrun or workflow.touch)
    )


def list_is_known():
    """Whether the list of shards is made of the images and settings of this run; images as they were when it began."""
    wanted = origin.list_digest(FILES, READING, config["shard_size"], listing())
    return origin.read_list(SHARDS)[0] == wanted


def listing_file(wildcards):
    """The listing of this run, in a file that is newer than a list of shards made of anything else.

    Records are not enough: there is none of a list that a job of an earlier run has written. And a file, because the
    images may be others by the time the scan begins.
    """
    listed = LISTING.read_text() if LISTING.exists() else None
    if drives() and not (listed == listing() and list_is_known()):
        LISTING.parent.mkdir(parents=True, exist_ok=True)
        LISTING.write_text(listing())
        # Snakemake may have looked through the folder before.
        workflow.iocache.exists_local[IOFile(str(LISTING))] = True
    return str(LISTING) if LISTING.exists() else []


def growing(amount):
    """A resource function: this much, and as much again with each attempt."""
    return lambda wildcards, attempt: amount * attempt


def simulate_mb(wildcards, attempt):
    """About twice what a simulation takes: JAX, and a stack and its noise in float64."""
    ny, nx = config["simulated"]["shape"]
    images = stop_image(wildcards) - first_image(wildcards)
    return attempt * round(2000 + images * ny * nx * 5e-5)


@functools.cache
def contents(manifest, changed_ns):
    """Images in a shard, their pixels, the pixels of the largest one, and of the largest one that stamps are cut from."""
    with open(
        manifest, encoding="utf-8", errors="surrogateescape", newline=""
    ) as table:
        blocks = [
            (int(row["stop"]) - int(row["start"]), int(row["ny"]) * int(row["nx"]))
            for row in csv.DictReader(table)
            if row["kind"] == "image"
        ]
    images = sum(count for count, _ in blocks)
    largest = max((size for _, size in blocks), default=0)
    if CUTOUTS:
        return images, images * CUTOUTS["size"] ** 2, CUTOUTS["size"] ** 2, largest
    return images, sum(count * size for count, size in blocks), largest, 0


def fit_minutes(wildcards, input, attempt):
    """Several times what a fit takes on one core of today: starting, 10 ms an image to read, 2 us a pixel to fit."""
    images, pixels, *_ = contents(input.manifest, os.stat(input.manifest).st_mtime_ns)
    return attempt * round(10 + (images * 0.01 + pixels * 2e-6) / 60)


def fit_mb(wildcards, input, attempt):
    """About twice what a fit takes: JAX and its compiler, 20 kB a row, 300 bytes a pixel of the largest image; 20 for one
    that stamps are cut from, with its mask and map.
    """
    images, _, largest, parent = contents(
        input.manifest, os.stat(input.manifest).st_mtime_ns
    )
    return attempt * round(2000 + images * 0.04 + largest * 6e-4 + parent * 4e-5)


def all_contents(manifests):
    """Images in all shards, and the pixels of the largest one; nothing before the scan, when nobody knows them."""
    # Until then Snakemake gives anything here.
    known = {str(MANIFEST).format(shard=shard) for shard in origin.read_list(SHARDS)[1]}
    found = [
        contents(path, os.stat(path).st_mtime_ns)
        for path in known.intersection(manifests)
        if os.path.exists(path)
    ]
    return (
        sum(images for images, *_ in found),
        max((largest for *_, largest, _ in found), default=0),
    )


def certificate_minutes(wildcards, input, attempt):
    """Several times what a certificate takes: starting, reading all rows, 4 us a pixel to put in and fit again."""
    images, largest = all_contents(input.manifests)
    fitted = min(images, config["certificate"]["sources"]) * largest
    return attempt * round(60 + (images * 1e-4 + fitted * 4e-6) / 60)


def certificate_mb(wildcards, input, attempt):
    """About twice what a certificate takes: 900 bytes a pixel of the largest image, of which it has four at a time."""
    _, largest = all_contents(input.manifests)
    return attempt * round(8000 + largest * 1.8e-3)


def catalogue_minutes(wildcards, input, attempt):
    """About twice what merging takes: 25 us a row."""
    images, _ = all_contents(input.manifests)
    return attempt * round(60 + images * 5e-5 / 60)


@functools.cache
def listed_shards(changed_ns):
    """Names of all shards, in order. Parts of other images or settings, which jobs of earlier runs left, are removed.

    So are records that are not of the part that is there, but of the one before it: they would have it made again.
    """
    _, names = origin.read_list(SHARDS)
    if drives():
        if not list_is_known():
            sys.exit(
                f"{SHARDS}: a job of an earlier run has written it; give the command again"
            )
        # Here, because parsing a Snakefile should not import astropy.
        from pipeline import catalogue

        for shard in names:
            manifest, part = (
                Path(str(pattern).format(shard=shard)) for pattern in (MANIFEST, PART)
            )
            if not (manifest.exists() and part.exists()):
                continue
            if not catalogue.is_of(
                part, origin.part_digest(manifest, READING, config["fit"])
            ):
                part.unlink()
                continue
            record = workflow.persistence.metadata(IOFile(str(part)))
            if record and record.endtime != part.stat().st_mtime:
                workflow.persistence.cleanup_metadata(IOFile(str(part)))
    return names


def shard_files(pattern):
    """An input function: the file of every shard, in the order of the catalogue; known once the scan has run."""

    def files(wildcards):
        checkpoints.scan.get()
        names = listed_shards(SHARDS.stat().st_mtime_ns)
        return [str(pattern).format(shard=shard) for shard in names]

    return files
