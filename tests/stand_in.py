"""Jobs on images of nothing in particular, called as functions. The fit itself is a stand-in."""

import shutil
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table

import pipeline.fit
from pipeline import jobs, runtime
from pipeline.catalogue import read_origin, read_rows
from pipeline.columns import COLUMNS, COVARIANCES, DERIVED, empty_rows, parameter_names
from pipeline.config import check_config
from pipeline.correlation import kernel_fwhm
from pipeline.origin import content_digest, read_list, write_list

READING = {key: value for key, value in check_config({})["images"].items() if key != "files"}
FIT = {"background": "constant", "scale": "fit", "uncertainty": "pooled", "correlation": "none"}


def mean_as_fit(data, mask, noise_map, *, background, scale, uncertainty, correlation, near):
    """Stands in for the fit: ``amp`` is the mean of an image, the covariance the unit matrix, FWHM that of kernels."""
    p = len(parameter_names(background, scale))
    names = [c.name for c in COLUMNS if c.group in ("fitted", "derived", "quality")]
    rows = {name: empty_rows(len(data))[name] for name in names}
    rows |= {"x0": np.full(len(data), 2.0), "y0": np.full(len(data), 2.0), "sigma": np.ones(len(data))}
    rows |= dict.fromkeys(("rho", "diff"), np.full(len(data), 0.1)) | {"amp": data.mean(axis=(1, 2), dtype=float)}
    if not isinstance(correlation, str):
        rows["noise_fwhm"] = np.array([kernel_fwhm(kernel) for kernel in correlation])
    return rows, {kind: np.tile(np.eye(p), (len(data), 1, 1)) for kind in COVARIANCES}


def good_fit(data, mask, noise_map, *, background, scale, **settings):
    """Stands in for a fit that succeeds: a source of S/N 20 that has the mean of its image as amplitude."""
    rows, covariances = mean_as_fit(data, mask, noise_map, background=background, scale=scale, **settings)
    errors = {f"{name}_err": np.full(len(data), 0.1) for name in parameter_names(background, scale)}
    rest = {"snr": 20.0, "scale": 1.0, "background": 0.0, "x0_start": 2.0, "y0_start": 2.0}
    theirs = {name + end: np.full(len(data), 0.1) for name in DERIVED for end in ("", "_err")}
    return rows | errors | theirs | {name: np.full(len(data), value) for name, value in rest.items()}, covariances


def use_stand_in(monkeypatch) -> None:
    """Neither the log nor JAX of this process is a job's."""
    monkeypatch.setattr(runtime, "start_log", lambda path: None)
    monkeypatch.setattr(runtime, "start_jax", lambda **_: "cpu")
    monkeypatch.setattr(pipeline.fit, "fit_rows", mean_as_fit)


def scanned(folder: Path, files: list[str], shard_size: int = 1000, simulated=False, **reading) -> list[Path]:
    """Manifests of the shards of some files."""
    jobs.scan(
        folder / "shards.txt", folder / "shards", files=files, reading=READING | reading, shard_size=shard_size,
        simulated=simulated, own=[], run=folder / "run.json", detections=folder / "detections", log="",
    )  # fmt: skip
    _, names = read_list(folder / "shards.txt")
    return [folder / "shards" / f"{name}.csv" for name in names]


def fitted(folder: Path, manifest: Path, *, fit=FIT, again=False, **reading) -> dict[str, np.ndarray]:
    """Rows of the part that a manifest gives; again: with the part that is there."""
    if not again:
        (folder / "kept" / "part.h5").unlink(missing_ok=True)
    (folder / "part.h5").unlink(missing_ok=True)  # as Snakemake does
    jobs.fit(
        folder / "part.h5", kept=folder / "kept" / "part.h5", manifest=manifest, reading=READING | reading, fit=fit,
        detections=folder / "detections", run=folder / "run.json", log="", gpu=0, cache="",
    )  # fmt: skip
    return read_rows(folder / "part.h5")


def write(path: Path, shape: tuple[int, ...], value: float, **cards) -> None:
    """An image whose plane i is ``value + i`` throughout."""
    planes = np.full(shape, value, np.float32) + np.arange(shape[0] if len(shape) > 2 else 1)[:, None, None]
    fits.PrimaryHDU(planes.reshape(shape), fits.Header(cards)).writeto(path)


def table_of(path: Path, **columns) -> str:
    Table(columns).write(path, overwrite=True)
    return str(path)


def chosen_of(part: Path) -> dict[str, np.ndarray]:
    return jobs._chosen([part], [read_origin(part)["digest"]], 100)


def merged(folder: Path, manifest: Path, *, stacks=(), truths=(), fit=FIT, made_of=None, **reading) -> None:
    """The catalogue of one part."""
    part = shutil.copy(folder / "part.h5", folder / f"{manifest.stem}.h5")
    made_of, _ = read_list(folder / "shards.txt") if made_of is None else (made_of, "")
    jobs.catalogue(
        folder / "catalogue.h5", parts=[part], shards=folder / "shards.txt", made_of=made_of,
        reading=READING | reading, stacks=stacks, truths=truths, certificates=[],
        config={"fit": fit, "images": READING, "certificate": {"sources": 0}}, log="",
    )  # fmt: skip


def certified(folder: Path, manifests: list[Path], sources: int = 100, fit=FIT, **reading) -> dict[str, np.ndarray]:
    """The certificate of a run on these shards."""
    parts = []
    for manifest in manifests:
        fitted(folder, manifest, fit=fit, **reading)
        parts.append((folder / "part.h5").rename(manifest.with_suffix(".h5")))
    write_list(folder / "shards.txt", "as wanted", {path.stem: content_digest(path.read_bytes()) for path in manifests})
    jobs.certificate(
        folder / "certificate.h5", parts=parts, manifests=manifests, shards=folder / "shards.txt", made_of="as wanted",
        reading=READING | reading, fit=fit, sources=sources,
        detections=folder / "detections", run=folder / "run.json", log="", gpu=0, cache="",
    )  # fmt: skip
    return read_rows(folder / "certificate.h5", table="certificate")
