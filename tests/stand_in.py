"""Jobs on images of nothing in particular, called as functions. The fit itself is a stand-in."""

from pathlib import Path

import numpy as np
from astropy.io import fits

import pipeline.fit
from pipeline import jobs, runtime
from pipeline.catalogue import read_rows
from pipeline.columns import COLUMNS, COVARIANCES, empty_rows, parameter_names
from pipeline.config import check_config
from pipeline.correlation import kernel_fwhm
from pipeline.origin import read_list

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
