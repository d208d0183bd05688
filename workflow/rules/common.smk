"""The checked config, the names of all files, and the input functions. No rules here, and no functions elsewhere."""

import functools
import os
import shutil
import sys
from pathlib import Path

import yaml
from snakemake.io import IOFile
from snakemake.utils import update_config

from pipeline import __version__, origin, resources
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
    # For its own limit of 100 starts a second Snakemake 9.27 goes through its jobs once a second for each job that has
    # ended: after two hundred it does nothing else. A limit of the user's stays.
    limit = workflow.scheduler.job_rate_limiter
    if limit and (limit.max_jobs, limit.timespan) == (100, 1):
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
    images = stop_image(wildcards) - first_image(wildcards)
    return attempt * resources.simulate_mb(images, config["simulated"]["shape"])


def of_shard(amount):
    """A resource function of a fit: this much of what its shard holds, and as much again with each attempt."""
    return lambda wildcards, input, attempt: (
        attempt * amount(resources.contents(input.manifest, CUTOUTS.get("size", 0)))
    )


def of_run(amount, *more):
    """A resource function of what comes after the fits: this much of what all shards hold; before the scan, of nothing."""

    def asked(wildcards, input, attempt):
        # Until then nobody knows the shards, and Snakemake gives anything here.
        known = {
            str(MANIFEST).format(shard=shard) for shard in origin.read_list(SHARDS)[1]
        }
        found = [
            path for path in known.intersection(input.manifests) if os.path.exists(path)
        ]
        shards = [resources.contents(path, CUTOUTS.get("size", 0)) for path in found]
        return attempt * amount(resources.together(shards), *more)

    return asked


@functools.cache
def listed_shards(changed_ns):
    """Names of all shards, in order. Parts of other images or settings make room: the fit takes from them what it can.

    Records that are not of the part that is there, but of the one before it, are removed: they would have it made again.
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
                part.replace(part.with_suffix(".old"))
                continue
            part.with_suffix(".old").unlink(missing_ok=True)
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
