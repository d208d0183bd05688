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
from pipeline.carry import Value
from pipeline.catalogue import merge, read_origin, read_rows, write_certificate, write_part
from pipeline.certificate import DONORS, NEEDED, certified, certify, choose, inject
from pipeline.columns import BIT, COLUMNS, COVARIANCES, HARMLESS, PARAMETERS, empty_rows, parameter_names
from pipeline.detection import forget_others
from pipeline.images import Block, corners_of, identities, list_files, near_middle, scan_file
from pipeline.origin import list_digest, part_digest, write_list
from pipeline.shards import assign, image_ids, read_manifest, write_manifests

#: Seconds between two lines on how far a job has come.
PROGRESS_SECONDS = 5.0

#: Packages that the numbers of a catalogue depend on.
PACKAGES = ("numpy", "scipy", "jax", "jaxlib", "astropy", "fitsio", "sep", "h5py")


# ---- the rules ------------------------------------------------------------------------------------------------------


def simulate(
    stack: str, truth: str, *, start: int, stop: int, log: str, threads: int, cache: str | Path, **simulated: Any
) -> None:
    """Write images ``start`` to ``stop - 1`` and their truth, by the section ``simulated`` of the config."""
    runtime.start_log(log)
    runtime.start_jax(threads=threads, gpu=0, cache=cache)
    from pipeline.simulate import write_stack  # here, because what imports jax must come after start_jax

    write_stack(stack, truth, start, stop, **simulated)


def scan(
    shards: str,
    manifests: str | Path,
    *,
    files: list[str],
    reading: Mapping[str, Any],
    shard_size: int,
    listing: str | Path,
    detections: str | Path,
    log: str,
) -> None:
    """List the images and divide them into shards.

    Parameters
    ----------
    shards : path
        Written: the names of the shards in the order of the catalogue, see `pipeline.origin`.
    manifests : path
        Folder of the manifests, one a shard; one whose bytes stay the same is not touched.
    files : list of str
        ``images.files`` of the config.
    reading : dict
        The section ``images`` of the config but its ``files``.
    shard_size : int
        Images a shard, about.
    listing : path
        Holds the digest of the files as they were when the run began.
    detections : path
        Folder of what was found in larger images, see `pipeline.detection`.

    Raises
    ------
    ValueError
        If there is nothing at all under the names given, not even something to reject; if the table of positions is
        none.
    """
    runtime.start_log(log)
    made_of = list_digest(files, reading, shard_size, Path(listing).read_text())  # now, as in `fit`
    found, rejected = list_files(files)
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
    names = write_manifests(manifests, assign(blocks, shard_size, rejected))
    if not names:
        msg = f"images.files: nothing found under {', '.join(files)}, wanted FITS files"
        raise ValueError(msg)
    # Last, so that after a kill the list is only there if all manifests are.
    write_list(shards, made_of, names)
    images = sum(block.stop - block.start for block in blocks)
    runtime.LOG.info("%d images in %d files, %d shards; %d rejected", images, len(found), len(names), len(rejected))


def fit(
    part: str,
    *,
    manifest: str,
    reading: Mapping[str, Any],
    fit: Mapping[str, Any],
    detections: str | Path,
    log: str,
    gpu: int,
    cache: str | Path,
) -> None:
    """Fit the images of one shard.

    Parameters
    ----------
    part : path
        Written: the shard's part of the catalogue, rows in the order of the manifest, and what they come from (device,
        versions, digests of manifest and settings, and of the pixels, how many images took how many seconds).
    manifest : path
        The shard's blocks, by `scan`.
    reading, fit : dict
        As for `scan`, and the section ``fit`` of the config.
    detections : path
        As for `scan`.
    """
    runtime.start_log(log)
    # One thread, however many there are: sums of large images are divided among threads, and their bits with them.
    device = runtime.start_jax(threads=1, gpu=gpu, cache=cache)
    from pipeline.fit import fit_rows  # here, because what imports jax must come after start_jax

    began = time.monotonic()
    made_of = part_digest(manifest, reading, fit)  # now: the manifest may change while the job runs
    blocks, rejected = read_manifest(manifest)
    parameters = parameter_names(fit["background"], fit["scale"])
    settings = {**fit, "near": near_middle(reading["cutouts"])}
    # A shard may hold nothing but files that give no image.
    rows = [empty_rows(0)]
    covariances = [{kind: np.empty((0, len(parameters), len(parameters))) for kind in COVARIANCES}]
    positions = [np.empty(0, np.int64)]
    carried: dict[str, list[Value]] = {name: [] for name in reading["carry"]}
    units: set[str] = set()
    pixels = hashlib.blake2b(digest_size=16)
    tell = _progress(sum(block.stop - block.start for block in blocks), "images fitted")
    for pieces in batches.of_blocks(blocks, {**reading, "folder": detections}, rejected):
        stack = batches.joined(pieces)
        kernels = {"correlation": batches.beam_kernels(pieces)} if fit["correlation"] == "beam" else {}
        fitted, covariance = fit_rows(*stack, **{**settings, **kernels})
        batch = empty_rows(len(stack.data)) | fitted
        _complete(batch, covariance[fit["uncertainty"]], pieces)
        units |= {piece.sky.unit for piece in pieces}
        rows.append(batch)
        covariances.append(covariance)
        positions += [piece.position + np.arange(len(piece.stack.data)) for piece in pieces]
        for name, values in carried.items():
            values += [value for piece in pieces for value in piece.carried[name]]
        for array in stack:
            pixels.update(b"" if array is None else array.tobytes())
        tell(sum(map(len, positions)))
        # At once: the other jobs of a run have begun with this one, or soon will.
        runtime.share_cache()
    # Images of several sizes are fitted size by size; the catalogue has them in the order of the manifest.
    order = np.argsort(np.concatenate(positions))
    origin = {
        "images": len(order),
        "rejected": len(rejected),
        "seconds": round(time.monotonic() - began, 3),
        "device": device,
        "versions": _versions(),
        "digest": made_of,
        "pixels": pixels.hexdigest(),
    }
    write_part(
        part,
        {column.name: np.concatenate([batch[column.name] for batch in rows])[order] for column in COLUMNS},
        {kind: np.concatenate([batch[kind] for batch in covariances])[order] for kind in COVARIANCES},
        parameters,
        rejected,
        "\n".join(sorted(units)),
        {name: [values[i] for i in order.tolist()] for name, values in carried.items()},
        origin,
    )
    runtime.LOG.info("%(images)d images fitted in %(seconds)g s, %(rejected)d rejected", origin)


def certificate(
    path: str,
    *,
    parts: Sequence[str],
    manifests: Sequence[str],
    reading: Mapping[str, Any],
    fit: Mapping[str, Any],
    sources: int,
    detections: str | Path,
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
    reading, fit : dict
        As for `fit`.
    sources : int
        To put in at most.
    detections : path
        As for `fit`.
    """
    runtime.start_log(log)
    device = runtime.start_jax(threads=1, gpu=gpu, cache=cache)
    from pipeline.fit import fit_rows  # here, because what imports jax must come after start_jax

    began = time.monotonic()
    rows = _chosen(parts, [part_digest(manifest, reading, fit) for manifest in manifests], sources)
    beams = fit["correlation"] == "beam"
    images = batches.of_rows(rows, manifests, DONORS, {**reading, "folder": detections}, beams=beams)
    settings = {**fit, "near": near_middle(reading["cutouts"])}
    trials = [
        inject(stack, found, fit_rows, {**settings, "correlation": found["kernel"]} if beams else settings)
        for stack, found in images
    ]
    table = certify(trials, certified(fit))
    count = sum(len(part.snr) for part in trials)
    origin = {"sources": count, "seconds": round(time.monotonic() - began, 3), "device": device}
    write_certificate(path, table, origin)
    runtime.LOG.info("%(sources)d sources put in and fitted in %(seconds)g s", origin)
    if not count:
        runtime.LOG.warning("no errors certified: fewer than %d good rows of one image size", DONORS)


def catalogue(
    path: str,
    *,
    parts: Sequence[str],
    manifests: Sequence[str],
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
    parts, manifests : sequences of paths
        What `fit` wrote and what it was given, by shard.
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
        If a part is of other images or settings than these.
    """
    runtime.start_log(log)
    merge(
        parts,
        path,
        digests=[part_digest(manifest, reading, config["fit"]) for manifest in manifests],
        truth=_truth(stacks, truths) if truths else None,
        certificate=read_rows(certificates[0], table="certificate") if certificates else None,
        provenance=_provenance(parts, config),
        image_units={"scale": ""} if config["images"]["uncertainty"] is not None else {},
    )
    flags, rejected = read_rows(path, ["flags"])["flags"], read_rows(path, ["reason"], table="rejected")["reason"]
    told = (len(flags), np.count_nonzero(flags & ~HARMLESS), len(rejected))
    counted = "%s: %d images fitted, %d of them flagged (ROUND, UNRESOLVED not counted), %d rejected"
    runtime.LOG.info(counted, path, *told)
    if not len(flags):
        runtime.LOG.warning("%s: nothing could be fitted; the first reason: %s", path, rejected[0])


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
    benchmarks = [(shard, origin["seconds"], origin["images"]) for shard, origin in origins.items()]
    images = {**reading, "folder": detections}
    seconds = sum(origin["seconds"] for origin in _origins(certificates).values())
    write_report(catalogue, path, images=images, benchmarks=benchmarks, config=config, certificate_seconds=seconds)


# ---- rows -----------------------------------------------------------------------------------------------------------


def _complete(rows: dict[str, np.ndarray], cov: np.ndarray, pieces: Sequence[batches.Piece]) -> None:
    """Fill in the columns that come from the file and its header: identity, sky and beam; and their flags.

    rows: columns (n,), changed in place; cov: (n, p, p), the covariance behind the errors.
    """
    from pipeline.sky import sky_columns, unresolved

    counts = [len(piece.stack.data) for piece in pieces]
    for (block, start, *_, sky), stop, count in zip(pieces, np.cumsum(counts), counts, strict=True):
        here = slice(stop - count, stop)
        planes, sources = identities(block, start, start + count)
        rows["file"][here], rows["hdu"][here] = block.file, block.hdu
        rows["plane"][here], rows["source"][here] = planes, sources
        rows["image_id"][here] = image_ids(block.file, block.hdu, planes, sources)
        if block.stamps is not None:
            _move_to_parent(rows, here, block, start)
        rows["flags"][here] |= 0 if sky.usable else BIT["NO_SKY"]
    headers = [
        (piece.sky.wcs, piece.sky.beam, count)
        for piece, count in zip(pieces, counts, strict=True)
        if piece.sky.wcs is not None
    ]
    if headers:
        known = np.repeat([piece.sky.wcs is not None for piece in pieces], counts)
        params = np.stack([rows[name][known] for name in PARAMETERS[:6]], axis=1)
        for name, values in sky_columns(headers, params, cov[known, :6, :6]).items():
            rows[name][known] = values
    rows["flags"] |= np.where(unresolved(rows), BIT["UNRESOLVED"], 0)


def _move_to_parent(rows: dict[str, np.ndarray], here: slice, block: Block, start: int) -> None:
    """Count positions in stamps, the first of them image ``start``, from the first pixel of their planes.

    The edge of a plane is an edge as that of a stamp is.
    """
    corners = corners_of(block, start, start + here.stop - here.start).T
    edge = np.full(corners.shape[1], np.inf)
    for axis, corner, length in zip("xy", corners, (block.nx, block.ny), strict=True):
        for name in (f"{axis}0", f"{axis}0_start"):
            rows[name][here] += corner
        centre = rows[f"{axis}0"][here]
        edge = np.minimum(edge, np.minimum(centre + 0.5, length - 0.5 - centre))
    rows["flags"][here] |= np.where(edge < rows["sigma_major"][here], BIT["NEAR_EDGE"], 0)


def _chosen(parts: Sequence[str], digests: Sequence[str], sources: int) -> dict[str, np.ndarray]:
    """The rows of all parts whose sources are put in, with the number of their part as the column ``part``."""
    wanted = ["image_id", "flags", *NEEDED]
    chosen: dict[str, np.ndarray] = {}
    for number, (part, digest) in enumerate(zip(parts, digests, strict=True)):
        rows = read_rows(part, wanted, digest=digest)
        rows["part"] = np.full(len(rows["flags"]), number)
        rows = {name: values[choose(rows, sources)] for name, values in rows.items()}
        chosen = {name: np.concatenate([chosen.get(name, values[:0]), values]) for name, values in rows.items()}
        chosen = {name: values[choose(chosen, sources)] for name, values in chosen.items()}
    return chosen


# ---- what a catalogue tells beside its rows -------------------------------------------------------------------------


def _truth(stacks: Sequence[str], truths: Sequence[str]) -> dict[str, np.ndarray]:
    """The truth of all simulated images, with the ``image_id`` that they have in the catalogue."""
    tables = []
    for stack, truth in zip(stacks, truths, strict=True):
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
    """A function to be told how many are done, that logs it, with rate and time left, every few seconds."""
    began = latest = time.monotonic()

    def tell(done: int) -> None:
        nonlocal latest
        now = time.monotonic()
        if now - latest < PROGRESS_SECONDS or done == total:
            return
        latest = now
        rate = done / (now - began)
        left = (total - done) / rate
        runtime.LOG.info("%d of %d %s, %.0f/s, about %.0f s left", done, total, what, rate, left)

    return tell
