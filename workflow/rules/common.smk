"""The checked config, the names of all files, and the input functions. No rules here, and no functions elsewhere."""

import functools
import os
import shutil
import sys
import time
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError
from snakemake.utils import update_config

from pipeline import origin, resources
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


RESULTS = Path(config["results"])
STACK = RESULTS / "simulated" / "{index}.fits"
TRUTH = RESULTS / "simulated" / "{index}.truth.fits"
RUN = RESULTS / "run.json"
SHARDS = RESULTS / "shards.txt"
MANIFEST = RESULTS / "shards" / "{shard}.csv"
PART = RESULTS / "parts" / "{shard}.h5"
KEPT = str(RESULTS / "kept" / "{shard}.h5")
CERTIFICATE = RESULTS / "certificate.h5"
CATALOGUE = RESULTS / "catalogue.h5"
REPORT = RESULTS / "report.html"
# Images of ours, which are not found in a folder of the user's that results lie in.
OWN = [str(RESULTS / name) for name in ("simulated", "detections")]
LOGS = RESULTS / "logs"
BENCHMARKS = RESULTS / "benchmarks"

SIMULATED = config["source"] == "simulated"
FIRST_IMAGES = range(
    0, config["simulated"]["count"] if SIMULATED else 0, config["shard_size"]
)
# What decides on a stack; not how many images there are in all.
SIMULATION = {
    key: value for key, value in config["simulated"].items() if key != "count"
}
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


def stop_of(first):
    """One more than the number of the last image in the stack that begins with image ``first``."""
    return min(first + config["shard_size"], config["simulated"]["count"])


def first_image(wildcards):
    """Number of the first image in a stack."""
    return int(wildcards.index) * config["shard_size"]


def stop_image(wildcards):
    return stop_of(first_image(wildcards))


@functools.cache
def found_images():
    """The user's images, by name, and what is none."""
    # Here, because parsing a Snakefile should not import astropy.
    from pipeline.listing import list_files

    return list_files(FILES, OWN)


@functools.cache
def images_as_they_were():
    """Digest of the names, sizes and times of the user's images, masks, maps and tables when this run began."""
    if SIMULATED:
        return ""
    if not workflow.is_main_process:
        return origin.read_run(RUN)["listing"]
    from pipeline.listing import run_digest

    return run_digest(*found_images(), READING, POSITIONS)


def wanted_list():
    """Digest that the list of shards must have; of simulated images as they are now, for they are made in the run."""
    from pipeline.listing import listing_digest

    seen = listing_digest(STACKS) if SIMULATED else images_as_they_were()
    return origin.list_digest(FILES, READING, config["shard_size"], seen)


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
    RESULTS.mkdir(parents=True, exist_ok=True)
    origin.write_run(RUN, config, images_as_they_were())


def check_config_of_run():
    """A job stops that waited until its config was changed, or another run had begun: what it makes nobody wants."""
    own = origin.config_digest(config)
    # Shared file systems show for up to half a minute what a folder held before.
    for seconds in (0, 2, 8, 20):
        time.sleep(seconds)
        if origin.read_run(RUN)["config"] == own:
            return
    sys.exit(
        "since this job was submitted its config was changed, or another run has begun on these results; "
        "give the command again"
    )


if not workflow.is_main_process:
    check_config_of_run()


def want(digest, path, digest_of):
    """Have a file that is there made again if it was made of anything but this: Snakemake knows only times of files."""
    if workflow.is_main_process and os.path.exists(path) and digest_of(path) != digest:
        workflow.dag.forcefiles.add(str(path))


def scanned_stacks(wildcards):
    """The simulated stacks; those of other images are made again, and a list of shards of anything else."""
    if workflow.is_main_process and getattr(
        workflow.execution_settings, "no_hooks", False
    ):
        raise WorkflowError("--no-hooks: the run could not tell its jobs what it wants")
    for first, stack, truth in zip(FIRST_IMAGES, STACKS, TRUTHS, strict=True):
        digest = origin.stack_digest(SIMULATION, first, stop_of(first))
        want(digest, stack, origin.digest_in_header)
        want(digest, truth, origin.digest_in_header)
    if workflow.is_main_process:
        digest, manifests = origin.read_list(SHARDS)
        there = {shard: manifest_digest(shard) for shard in manifests}
        if digest != wanted_list() or there != manifests:
            # Also if there is none: a list alone that is lost is nothing to Snakemake.
            workflow.dag.forcefiles.add(str(SHARDS))
    return STACKS


def manifest_digest(shard):
    """Digest of the manifest of a shard, "" if it is lost."""
    manifest = Path(str(MANIFEST).format(shard=shard))
    return origin.content_digest(manifest.read_bytes()) if manifest.exists() else ""


def growing(amount):
    """A resource function: this much, and as much again with each attempt."""
    return lambda wildcards, attempt: amount * attempt


def simulate_mb(wildcards, attempt):
    images = stop_image(wildcards) - first_image(wildcards)
    return attempt * resources.simulate_mb(images, config["simulated"]["shape"])


def scan_mb(wildcards, attempt):
    found, _ = found_images() if "detect" in CUTOUTS else ([], None)
    sizes = (os.stat(file).st_size for file in found if os.path.exists(file))
    return attempt * resources.scan_mb(max(sizes, default=0))


def of_shard(amount):
    """A resource function of a fit: this much of what its shard holds, and as much again with each attempt."""
    return lambda wildcards, input, attempt: (
        attempt * amount(resources.contents(input.manifest, CUTOUTS.get("size", 0)))
    )


def of_run(amount, *more):
    """A resource function of what comes after the fits: this much of what all shards hold; before the scan, of nothing."""

    def asked(wildcards, attempt):
        # Until then nobody knows the shards.
        _, names = origin.read_list(SHARDS)
        paths = [str(MANIFEST).format(shard=shard) for shard in names]
        shards = [
            resources.contents(path, CUTOUTS.get("size", 0))
            for path in paths
            if os.path.exists(path)
        ]
        return attempt * amount(resources.together(shards), *more)

    return asked


@functools.cache
def listed_shards(changed_ns):
    """Names of all shards, in order. What is made of them and was made of anything else is made again."""
    digest, manifests = origin.read_list(SHARDS)
    if digest != wanted_list():
        raise WorkflowError(
            f"{SHARDS}: a job of an earlier run has written it; give the command again"
        )
    # Here, because parsing a Snakefile should not import astropy.
    from pipeline.catalogue import digest_of

    digests = [
        origin.part_digest(manifest, READING, config["fit"])
        for manifest in manifests.values()
    ]
    for shard, digest in zip(manifests, digests, strict=True):
        want(digest, str(PART).format(shard=shard), digest_of)
    sources = config["certificate"]["sources"]
    want(origin.certificate_digest(digests, sources), CERTIFICATE, digest_of)
    made = origin.catalogue_digest(digests, config)
    want(made, CATALOGUE, digest_of)
    want(made, REPORT, origin.digest_in_page)
    return list(manifests)


def shard_files(pattern):
    """An input function: the file of every shard, in the order of the catalogue; known once the scan has run."""

    def files(wildcards):
        checkpoints.scan.get()
        names = listed_shards(SHARDS.stat().st_mtime_ns)
        return [str(pattern).format(shard=shard) for shard in names]

    return files
