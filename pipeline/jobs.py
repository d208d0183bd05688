"""What the rules do, one function a rule: from files to files, through the modules that each know one thing."""

import functools
import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from astropy.io import fits

from pipeline import __version__, batches, runtime
from pipeline.catalogue import merge, read_origin, read_rows, write_certificate, write_part
from pipeline.certificate import DONORS, NEEDED, certified, certify, choose, inject
from pipeline.columns import COVARIANCES, HARMLESS, empty_rows, parameter_names
from pipeline.detection import forget_others
from pipeline.files import keep
from pipeline.images import Block, near_middle, scan_file
from pipeline.listing import list_files, listing_digest
from pipeline.origin import (
    catalogue_digest,
    certificate_digest,
    check_run,
    content_digest,
    digest_in_header,
    list_digest,
    part_digest,
    read_list,
    read_run,
    rows_digest,
    write_list,
)
from pipeline.reuse import unchanged
from pipeline.shards import assign, block_digest, image_ids, parse_manifest, relatives, write_manifests
from pipeline.versions import RETRY

#: Seconds between two lines on how far a job has come.
PROGRESS_SECONDS = 5.0

#: Packages that the numbers of a catalogue depend on.
PACKAGES = ("numpy", "scipy", "jax", "jaxlib", "astropy", "fitsio", "sep", "h5py")


# ---- the rules ------------------------------------------------------------------------------------------------------


def simulate(
    stack: str,
    truth: str,
    *,
    start: int,
    stop: int,
    run: str | Path,
    log: str,
    threads: int,
    cache: str | Path,
    **simulated: Any,
) -> None:
    """Write images ``start`` to ``stop - 1`` and their truth, by the section ``simulated`` of the config.

    run : path
        What the run that goes on wants, see `origin.write_run`.
    """
    runtime.start_log(log)
    check = functools.partial(check_run, run, read_run(run))
    runtime.start_jax(threads=threads, gpu=0, cache=cache)
    from pipeline.simulate import write_stack  # here, because what imports jax must come after start_jax

    write_stack(stack, truth, start, stop, check=check, **simulated)


def scan(
    shards: str,
    manifests: str | Path,
    *,
    files: list[str],
    reading: Mapping[str, Any],
    shard_size: int,
    simulated: bool,
    own: Sequence[str],
    run: str | Path,
    detections: str | Path,
    log: str,
) -> None:
    """List the images and divide them into shards.

    Parameters
    ----------
    shards : path
        Written: the names of the shards in the order of the catalogue, see `origin.write_list`.
    manifests : path
        Folder of the manifests, one a shard; one whose bytes stay the same is not touched.
    files : list of str
        ``images.files`` of the config.
    reading : dict
        The section ``images`` of the config but its ``files``.
    shard_size : int
        Images a shard, about.
    simulated : bool
        Whether the files are made in the same run, so that nobody knew them when it began.
    own : sequence of str
        Folders with images that the pipeline writes, which are none of the user's.
    run : path
        As for `simulate`.
    detections : path
        Folder of what was found in larger images, see `pipeline.detection`.

    Raises
    ------
    ValueError
        If there is nothing at all under the names given, not even something to reject; if the table of positions is
        none; if another run has begun meanwhile.
    """
    runtime.start_log(log)
    wanted = read_run(run)
    listing = listing_digest(files) if simulated else wanted["listing"]
    found, rejected = list_files(files, own)
    blocks: list[Block] = []
    look: Callable = functools.partial(scan_file, **reading)
    if reading["cutouts"] is not None:
        from pipeline import cutouts  # here, because it imports jax, which others need not wait for

        look = functools.partial(cutouts.scan_stamps, folder=detections, **reading)
    tell = _progress(len(found), "files scanned")
    for number, file in enumerate(found):
        its_blocks, its_rejected = look(file)
        blocks += its_blocks
        rejected += its_rejected
        tell(number + 1)
    if reading["cutouts"] is not None:
        rejected += cutouts.nowhere(blocks, reading["cutouts"])
    forget_others(detections, blocks, **reading)
    shared = assign(blocks, shard_size, rejected)
    if not shared:
        msg = f"images.files: nothing found under {', '.join(files)}, wanted FITS files"
        raise ValueError(msg)
    check_run(run, wanted)
    # The list last, so that after a kill it is only there if all manifests are.
    digests = write_manifests(manifests, shared)
    write_list(shards, list_digest(files, reading, shard_size, listing), digests)
    images = sum(block.stop - block.start for block in blocks)
    runtime.LOG.info("%d images in %d files, %d shards; %d rejected", images, len(found), len(shared), len(rejected))


def fit(
    part: str,
    *,
    kept: str | Path,
    manifest: str,
    reading: Mapping[str, Any],
    fit: Mapping[str, Any],
    detections: str | Path,
    run: str | Path,
    log: str,
    gpu: int,
    cache: str | Path,
) -> None:
    """Fit the images of one shard.

    Parameters
    ----------
    part : path
        Written: the shard's part of the catalogue, rows in the order of the manifest, and what they come from (device,
        versions, digests of manifest and settings, and of the pixels, how many images took how many seconds). Of
        older ones the rows of blocks that have not changed are used again.
    kept : path
        The older part, and afterwards another name of this one, where the file system has such: Snakemake removes
        outputs before a job begins, and when it fails. Beside it lie those of other shards.
    manifest : path
        The shard's blocks, by `scan`.
    reading, fit : dict
        As for `scan`, and the section ``fit`` of the config.
    detections, run : paths
        As for `scan`.

    Raises
    ------
    ValueError
        If a run with another config has begun meanwhile.
    """
    runtime.start_log(log)
    wanted = {"config": read_run(run)["config"]}
    # One thread, however many there are: sums of large images are divided among threads, and their bits with them.
    device = runtime.start_jax(threads=1, gpu=gpu, cache=cache)
    from pipeline.fit import fit_rows  # here, because what imports jax must come after start_jax

    began = time.monotonic()
    listed = Path(manifest).read_bytes()  # once: it may change while the job runs
    blocks, rejected = parse_manifest(listed)
    told = len(rejected)  # by the scan, and for good: another fit does not read them
    parameters = parameter_names(fit["background"], fit["scale"])
    settings = {**fit, "near": near_middle(reading["cutouts"])}
    made_on = rows_digest(reading, fit, _versions(), device)
    digests = [block_digest(block, made_on) for block in blocks]
    # The number of the block that each image is of.
    block_of = np.repeat(np.arange(len(blocks)), [block.stop - block.start for block in blocks])
    # More images may have divided shards since, or fewer joined them.
    olds = [Path(kept).with_stem(name) for name in relatives(Path(kept).stem)]
    old, again = unchanged(olds, digests, np.bincount(block_of, minlength=len(blocks)), parameters, reading["carry"])
    # Each number has its place before it is there: images of several sizes are fitted size by size, and the catalogue
    # has them in the order of the manifest.
    count, square = len(block_of), (len(parameters), len(parameters))
    rows, carried = empty_rows(count), {name: np.empty(count, object) for name in reading["carry"]}
    covariances = {kind: np.empty((count, *square)) for kind in COVARIANCES}
    kept_in: list[dict[str, np.ndarray]] = [rows, covariances, carried]
    known = np.zeros(count, bool)

    def put(places: np.ndarray, *tables: Mapping[str, Any]) -> None:
        for into, table in zip(kept_in, tables, strict=True):
            for name, values in into.items():
                values[places] = table[name]
        known[places] = True

    put(np.flatnonzero(again[block_of]), old.rows, old.covariance, old.carried)
    fresh = np.flatnonzero(~known)
    reused = count - len(fresh)
    units = old.blocks["unit"].tolist()
    # Of what processors have instructions for: twice as fast as any other.
    pixels = [hashlib.sha256() for _ in blocks]
    runtime.LOG.info("%d rows taken over, of images that have not changed", reused)
    tell = _progress(len(fresh), "images fitted")
    left = [block for block, same in zip(blocks, again, strict=True) if not same]
    for pieces in batches.of_blocks(left, {**reading, "folder": detections}, rejected):
        stack = batches.joined(pieces)
        kernels = {"correlation": batches.beam_kernels(pieces)} if fit["correlation"] == "beam" else {}
        fitted, covariance = fit_rows(*stack, **{**settings, **kernels})
        batch = empty_rows(len(stack.data)) | fitted
        batches.complete(batch, covariance[fit["uncertainty"]], pieces)
        places = [fresh[piece.position : piece.position + len(piece.stack.data)] for piece in pieces]
        along = {name: [value for piece in pieces for value in piece.carried[name]] for name in carried}
        put(np.concatenate(places), batch, covariance, along)
        for piece, place in zip(pieces, places, strict=True):
            number = block_of[place[0]]
            units[number] = piece.sky.unit
            data, mask, noise = piece.stack
            for array in (data, np.packbits(mask), noise):
                pixels[number].update(b"" if array is None else np.ravel(array))
        tell(int(np.count_nonzero(known)) - reused)
        # At once: the other jobs of a run have begun with this one, or soon will.
        runtime.share_cache()
    there = slice(None) if known.all() else known  # a view, where nothing could not be read
    number_of = block_of[there]
    pixels_of = np.where(again, old.blocks["pixels"], [digest.hexdigest() for digest in pixels])
    origin = {
        "images": len(number_of),
        "fitted": len(number_of) - reused,
        "rejected": len(rejected),
        "retry": any(row.reason.endswith(RETRY) for row in rejected[told:]),
        "seconds": round(time.monotonic() - began, 3),
        "device": device,
        "versions": _versions(),
        "digest": part_digest(content_digest(listed), reading, fit),
        "pixels": content_digest("".join(pixels_of).encode()),
    }
    check_run(run, wanted)
    write_part(
        part,
        {name: values[there] for name, values in rows.items()},
        {kind: matrices[there] for kind, matrices in covariances.items()},
        parameters,
        rejected,
        "\n".join(sorted({units[number] for number in np.unique(number_of)})),
        {name: values[there].tolist() for name, values in carried.items()},
        origin,
        {
            "digest": np.array(digests, dtype=object),
            "rows": np.bincount(number_of, minlength=len(blocks)),
            "pixels": pixels_of,
            "unit": np.array(units, dtype=object),
        },
    )
    if len(number_of):  # a disk with all its images may be away for a run
        keep(part, kept)
    runtime.LOG.info("%(images)d rows, %(fitted)d of them fitted now, in %(seconds)g s; %(rejected)d rejected", origin)


def certificate(
    path: str,
    *,
    parts: Sequence[str],
    manifests: Sequence[str],
    shards: str | Path,
    made_of: str,
    reading: Mapping[str, Any],
    fit: Mapping[str, Any],
    sources: int,
    detections: str | Path,
    run: str | Path,
    log: str,
    gpu: int,
    cache: str | Path,
) -> None:
    """Put sources into the residuals of the run, and say how often the errors of their fits hold.

    Parameters
    ----------
    path : path
        Written: the certificate, and how many sources took how many seconds, on what.
    parts, manifests : sequences of paths
        What `fit` wrote and what it was given, by shard.
    shards, made_of : path, str
        The list that `scan` wrote, and the digest it must have.
    reading, fit : dict
        As for `fit`.
    sources : int
        To put in at most.
    detections, run : paths
        As for `fit`.

    Raises
    ------
    ValueError
        If list, manifests or parts are of other images or settings than these, or a run has begun meanwhile.
    """
    runtime.start_log(log)
    device = runtime.start_jax(threads=1, gpu=gpu, cache=cache)
    from pipeline.fit import fit_rows  # here, because what imports jax must come after start_jax

    began = time.monotonic()
    wanted = {"config": read_run(run)["config"]}
    digests = _digests(parts, shards, made_of, reading, fit)
    listed = {Path(manifest).stem: content_digest(Path(manifest).read_bytes()) for manifest in manifests}
    if listed != read_list(shards)[1]:
        msg = f"{shards}: a job of an earlier run has written a manifest meanwhile; give the command again"
        raise ValueError(msg)
    rows = _chosen(parts, digests, sources)
    beams = fit["correlation"] == "beam"
    images = batches.of_rows(rows, manifests, DONORS, {**reading, "folder": detections}, beams=beams)
    settings = {**fit, "near": near_middle(reading["cutouts"])}
    trials = [
        inject(stack, found, fit_rows, {**settings, "correlation": found["kernel"]} if beams else settings)
        for stack, found in images
    ]
    table = certify(trials, certified(fit))
    count = sum(len(part.snr) for part in trials)
    origin = {
        "sources": count,
        "seconds": round(time.monotonic() - began, 3),
        "device": device,
        "digest": certificate_digest(digests, sources),
    }
    check_run(run, wanted)
    write_certificate(path, table, origin)
    runtime.LOG.info("%(sources)d sources put in and fitted in %(seconds)g s", origin)
    if not count:
        runtime.LOG.warning("no errors certified: fewer than %d good rows of one image size", DONORS)


def catalogue(
    path: str,
    *,
    parts: Sequence[str],
    shards: str | Path,
    made_of: str,
    reading: Mapping[str, Any],
    stacks: Sequence[str],
    truths: Sequence[str],
    certificates: Sequence[str],
    config: Mapping[str, Any],
    log: str,
) -> None:
    """Merge the parts, in the order given, and where simulated the truth.

    Parameters
    ----------
    path : path
        Written: the catalogue.
    parts : sequence of paths
        What `fit` wrote, by shard.
    shards, made_of : path, str
        As for `certificate`.
    reading : dict
        As for `scan`.
    stacks, truths : sequences of paths
        What `simulate` wrote; empty for the user's own images.
    certificates : sequence of paths
        What `certificate` wrote, or empty.
    config : dict
        The whole config, kept in the provenance.

    Raises
    ------
    ValueError
        If list, parts, truth or certificate are of other images or settings than these.
    """
    runtime.start_log(log)
    digests = _digests(parts, shards, made_of, reading, config["fit"])
    made = certificate_digest(digests, config["certificate"]["sources"])
    merge(
        parts,
        path,
        digests=digests,
        truth=_truth(stacks, truths) if truths else None,
        certificate=read_rows(certificates[0], table="certificate", digest=made) if certificates else None,
        provenance=_provenance(parts, config),
        origin={"digest": catalogue_digest(digests, config)},
        image_units={"scale": ""} if config["images"]["uncertainty"] is not None else {},
    )
    flags, rejected = read_rows(path, ["flags"])["flags"], read_rows(path, ["file", "reason"], table="rejected")
    told = (len(flags), np.count_nonzero(flags & ~HARMLESS), len(rejected["file"]))
    counted = "%s: %d images fitted, %d of them flagged (ROUND, UNRESOLVED not counted), %d rejected"
    runtime.LOG.info(counted, path, *told)
    if not len(flags):
        runtime.LOG.warning(
            "%s: nothing could be fitted; the first reason: %s: %s", path, *(v[0] for v in rejected.values())
        )


def report(
    path: str,
    *,
    catalogue: str,
    parts: Sequence[str],
    certificates: Sequence[str],
    reading: Mapping[str, Any],
    config: Mapping[str, Any],
    detections: str | Path,
    log: str,
) -> None:
    """Write the report on a catalogue, with the time that each shard and the certificate took."""
    runtime.start_log(log)
    from pipeline.report import write_report  # here, because no other job draws

    origins = _origins(parts)
    benchmarks = [(shard, origin["seconds"], origin["fitted"]) for shard, origin in origins.items()]
    images = {**reading, "folder": detections}
    seconds = sum(origin["seconds"] for origin in _origins(certificates).values())
    write_report(
        catalogue,
        path,
        images=images,
        benchmarks=benchmarks,
        config=config,
        certificate_seconds=seconds,
        digest=read_origin(catalogue)["digest"],
    )


# ---- of all shards --------------------------------------------------------------------------------------------------


def _digests(
    parts: Sequence[str], shards: str | Path, made_of: str, reading: Mapping[str, Any], fit: Mapping[str, Any]
) -> list[str]:
    """What the parts must be made of, by the list of shards, which must be made of what has the digest ``made_of``."""
    digest, manifests = read_list(shards)
    if digest != made_of or list(manifests) != [Path(part).stem for part in parts]:
        msg = f"{shards}: a job of an earlier run has written it, of other images or settings; give the command again"
        raise ValueError(msg)
    return [part_digest(manifest, reading, fit) for manifest in manifests.values()]


def _chosen(parts: Sequence[str], digests: Sequence[str], sources: int) -> dict[str, np.ndarray]:
    """The rows of all parts whose sources are put in, with the number of their part as the column ``part``."""
    wanted = ["image_id", "flags", *NEEDED]
    chosen: dict[str, np.ndarray] = {}
    for number, (part, digest) in enumerate(zip(parts, digests, strict=True)):
        rows = read_rows(part, wanted, digest=digest)
        rows["part"] = np.full(len(rows["flags"]), number)
        best = choose(rows, sources)
        joined = {k: np.concatenate([chosen.get(k, v[:0]), v[best]]) for k, v in rows.items()}
        best = choose(joined, sources)
        chosen = {name: values[best] for name, values in joined.items()}
    return chosen


# ---- what a catalogue tells beside its rows -------------------------------------------------------------------------


def _truth(stacks: Sequence[str], truths: Sequence[str]) -> dict[str, np.ndarray]:
    """The truth of all simulated images, with the ``image_id`` that they have in the catalogue."""
    tables = []
    for stack, truth in zip(stacks, truths, strict=True):
        if digest_in_header(truth) != digest_in_header(stack):
            msg = f"{truth}: a job of an earlier run has written it, of other images; give the command again"
            raise ValueError(msg)
        table = fits.getdata(truth)
        columns = {name: table[name].astype(table[name].dtype.newbyteorder("=")) for name in table.names}
        planes = columns.pop("plane")
        tables.append(columns | {"image_id": image_ids(stack, 0, planes, np.zeros_like(planes))})
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _origins(files: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What `fit` told of each shard, by its name; or `certificate`."""
    return {Path(file).stem: read_origin(file) for file in files}


def _provenance(parts: Sequence[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Config, versions, device and inputs as texts; where shards differ in version or device, all there were."""
    facts = _origins(parts)
    versions = {name: {fact["versions"][name] for fact in facts.values()} for name in _versions()}
    inputs = {shard: {key: fact[key] for key in ("images", "digest", "pixels")} for shard, fact in facts.items()}
    return {
        "config": yaml.safe_dump(dict(config), sort_keys=False),
        "versions": yaml.safe_dump(
            {name: ", ".join(sorted(found)) for name, found in versions.items()}, sort_keys=False
        ),
        "device": ", ".join(sorted({fact["device"] for fact in facts.values()})),
        "inputs": yaml.safe_dump(inputs, sort_keys=False),
    }


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {"pipeline": __version__, "python": platform.python_version(), **packages}


def _progress(total: int, what: str) -> Callable[[int], None]:
    """A function to be told how many are done, that logs it every few seconds, from a tenth on with the time left."""
    began = latest = time.monotonic()

    def tell(done: int) -> None:
        nonlocal latest
        now = time.monotonic()
        if now - latest < PROGRESS_SECONDS or done == total:
            return
        latest = now
        rate = done / (now - began)
        # The first few may have waited for the compiler, once for each size.
        left = f", {rate:.3g}/s, about {(total - done) / rate:.0f} s left" if 10 * done >= total else ""
        runtime.LOG.info("%d of %d %s%s", done, total, what, left)

    return tell
