"""How often the right minimum is found, and how often the truth lies within the errors: writes docs/calibration.md.

    make calibrate

Stamps are those of the tests (`tests.stamps`), with other seeds. Every share comes with its binomial standard error.
"""

import argparse
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["MPLBACKEND"] = "agg"

import jax
import matplotlib.pyplot as plt
import numpy as np
from scipy import special

jax.config.update("jax_enable_x64", True)

from benchmarks import workers  # noqa: E402
from pipeline import __version__, columns, fit, model, simulate, uncertainty  # noqa: E402  (after the precision is set)
from tests import stamps  # noqa: E402

PAGE = Path(__file__).resolve().parents[1] / "docs" / "calibration.md"
PICTURE = PAGE.parent / "pictures" / "coverage.png"
DECADES = ((5, 10), (10, 100), (100, 1e3), (1e3, 1e4))
NAMES = columns.parameter_names("constant", "fit")
SHOWN = (*NAMES, *columns.DERIVED)
derived = jax.jit(jax.vmap(uncertainty.derived))


def percent(hits) -> str:
    """A share with its standard error, in percent."""
    share, count = np.mean(hits), len(hits)
    # Never 0: with all of n hits the share is still uncertain by about 1 / n.
    error = np.sqrt(max(share * (1 - share), 1 / count) / count)
    return f"{100 * share:.2f} +- {100 * error:.2f}" if error < 0.002 else f"{100 * share:.1f} +- {100 * error:.1f}"


def convergence(count: int) -> list[str]:
    """Rows of the table of convergence: one a kind of noise, size and decade of amplitude/scale."""
    rows = []
    cases = [(noise, 32) for noise in ("cauchy", "gaussian", "contaminated")] + [("cauchy", 16), ("cauchy", 64)]
    for noise, side in cases:
        for i, amp in enumerate(DECADES):
            print(f"convergence: {noise}, {side} x {side}, amplitude/scale {amp[0]:g} to {amp[1]:g}", flush=True)
            images, params = stamps.draw(count, amp, seed=1000 + i, noise=noise, shape=(side, side))
            result = fit.fit_stack(images)
            converged = result.flags & columns.BIT["NOT_CONVERGED"] == 0
            right = converged & (result.nll <= stamps.nll_at_truth(images, params) + 0.05)
            near = np.all(np.abs(result.params[:, :6] - params) < 6 * result.errors[:, :6], axis=1)
            steps = result.n_steps
            rows.append(
                f"| {noise} | {side} | {amp[0]:g}..{amp[1]:g} | {percent(right)} | {percent(near)} "
                f"| {np.mean(steps):.1f} | {np.percentile(steps, 99):.0f} | {np.max(steps)} |"
            )
    return rows


class Cell(NamedTuple):
    """One kind of image: its label, how stamps are drawn and fitted, the share of masked pixels."""

    label: str
    draw: dict
    fit: dict
    masked: float = 0.0


CELLS = (
    *(Cell(noise, {"noise": noise}, {}) for noise in ("cauchy", "gaussian", "student", "contaminated")),
    Cell("cauchy, 16 x 16", {"shape": (16, 16)}, {}),
    Cell("cauchy, 64 x 64, sigma 5 to 8", {"shape": (64, 64), "sigma": (5, 8)}, {}),
    Cell("cauchy, plane", {}, {"background": "plane"}),
    Cell("cauchy, 20 % masked", {}, {}, 0.2),
    Cell("cauchy, float32", {}, {"precision": "float32"}),
    *(
        Cell(f"correlated, taken as {how}", {"noise": "correlated"}, {"correlation": how})
        for how in ("none", "estimate", stamps.SMOOTHED)
    ),
    Cell("cauchy, round", {"ellipticity": 0.0}, {}),
)
#: Bins of the true signal to noise, true amplitude over the error of the fit.
SNR = ((5, 10), (10, 30), (30, 100), (100, 1000))
#: Images in the memory at a time.
CHUNK = 5000


def fitted(cell: Cell, snr: tuple[float, float], count: int, seed: int) -> dict[str, np.ndarray]:
    """Per stamp: ``offset`` from the truth and ``bias`` (n, k) over the default error, k of `SHOWN`; ``length`` of the
    default error, over what it is in proportion to at the truth; ``errors`` of the four covariances over the default
    one (n, 4, k); ``bound`` (n, k), offset over the Cramer-Rao error; and ``good``.
    """
    parts = []
    for low in range(0, count, CHUNK):
        n = min(CHUNK, count - low)
        r = np.random.default_rng([seed, low])
        # Near amplitude 1, where there is no source yet; then the one that gives the signal to noise asked for.
        images, params = stamps.draw(n, (1, 1), seed=[seed, low, 1], **cell.draw)
        shape = cell.draw.get("shape", (32, 32))
        y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
        unit = model.gaussian(params[:, None, None, :], x, y)
        amp = np.exp(r.uniform(*np.log(snr), n)) * error_of_amp(cell) / params[:, 3]
        images += (amp - 1)[:, None, None] * unit
        params[:, 2] = amp
        mask = r.random(images.shape) < cell.masked if cell.masked else None
        parts.append(pulls(cell, fit.fit_stack(images, mask, **cell.fit), params))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def error_of_amp(cell: Cell) -> float:
    """Error of the amplitude times sigma, about."""
    images, params = stamps.draw(400, (30, 30), seed=7, **cell.draw)
    result = fit.fit_stack(images, **cell.fit)
    return float(np.median(result.errors[:, 2] * params[:, 3]))


def pulls(cell: Cell, result, params) -> dict[str, np.ndarray]:
    """What `fitted` returns, for the results of one stack and its true sources."""
    n = len(params)
    names = columns.parameter_names(cell.fit.get("background", "constant"), "fit")
    kind = cell.draw.get("noise", "cauchy")
    noise = {"kind": "gaussian" if kind == "correlated" else kind, "scale": 1.0}
    scale = simulate.cauchy_scale(noise | {"fraction": 0.05, "factor": 10.0, "dof": 3.0})
    truth = dict(zip(columns.PARAMETERS[:6], params.T, strict=True)) | {"scale": np.full(n, scale)}
    truth |= dict(zip(columns.DERIVED, model.derived(params).T, strict=True))
    found = dict(zip((*names, *columns.DERIVED), [*result.params.T, *result.derived.T], strict=True))
    bias = dict(zip((*names, *columns.DERIVED[:-1]), [*result.bias.T, *result.derived_bias.T], strict=True))
    by_amp = dict.fromkeys(SHOWN, 1 / params[:, 2]) | {"amp": 1 / params[:, 3], "flux": params[:, 3]}
    by_amp |= dict.fromkeys(("rho", "diff", "theta"), 1 / params[:, 2] / params[:, 3])
    by_amp |= dict.fromkeys(("background", "scale"), np.ones(n))
    errors = {}
    for kind, covariance in zip(columns.COVARIANCES, result.covariances, strict=True):
        _, derived_err, _ = derived(result.params[:, :6], covariance[:, :6, :6])
        own = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2)).T
        errors[kind] = dict(zip((*names, *columns.DERIVED), [*own, *np.asarray(derived_err)], strict=True))
    offset, biases, lengths, ratios = [], [], [], []
    for name in SHOWN:
        default = errors["pooled"][name]
        away = found[name] - truth.get(name, 0.0)
        if name == "theta":
            away = (away + np.pi / 2) % np.pi - np.pi / 2
            offset.append(model.direction_pull(away, default))
        else:
            offset.append(away / default)
        biases.append(bias.get(name, np.zeros(n)) / default)
        lengths.append(default / by_amp[name])
        ratios.append([errors[kind][name] / default for kind in columns.COVARIANCES])
    bad = columns.BIT["NOT_CONVERGED"] | columns.BIT["HESSIAN_NOT_POSITIVE"]
    ratios = np.array(ratios).transpose(2, 1, 0)
    ratios[:, 1:, SHOWN.index("theta")] = np.nan  # a pull of theta times an error is no angle
    return {
        "offset": np.array(offset).T,
        "bias": np.array(biases).T,
        "length": np.array(lengths).T,
        "errors": ratios,
        "bound": np.array(offset).T / ratios[:, columns.COVARIANCES.index("fisher")],
        "good": (result.flags & bad == 0)[:, None] & np.isfinite(offset).T,
    }


def summary(cell: Cell, snr: tuple[float, float], count: int, seed: int) -> dict[str, np.ndarray]:
    """Numbers of one row of each table, for the columns of `SHOWN`."""
    found = fitted(cell, snr, count, seed)
    good, offset = found["good"], np.where(found["good"], found["offset"], np.nan)
    near = np.abs(offset) < 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing

        def share(hits):
            return np.nanmean(np.where(good, hits, np.nan), axis=0)

        def over_error(offsets):
            # Errors of a few fits have no bound, and these would be the mean.
            most = 5 * np.nanmedian(np.where(near, found["length"], np.nan), axis=0)
            length = np.where(near & (found["length"] <= most), found["length"], np.nan)
            return np.nanmean(length * offsets, axis=0) / np.nanmean(length, axis=0)

        return {
            "count": np.sum(good, axis=0),
            "lost": 1 - np.mean(np.any(good, axis=1)),
            "one": share(np.abs(offset) < 1),
            "two": share(np.abs(offset) < 2),
            **{kind: share(np.abs(offset) < found["errors"][:, i]) for i, kind in enumerate(columns.COVARIANCES) if i},
            "raw": over_error(offset),
            "left": over_error(offset - found["bias"]),
            "variance": np.nanmean(np.where(near, found["bound"] ** 2, np.nan), axis=0),
        }


def coverage(count: int) -> list[dict]:
    """`summary` of all cells and bins, in `CELLS` times `SNR` order: a process a core."""
    jobs = [(cell, snr) for cell in CELLS for snr in SNR]
    with workers.one_a_core() as processes:
        # All bins of a cell in one process, which then compiles its program once.
        futures = [
            processes[(i // len(SNR)) % len(processes)].submit(summary, cell, snr, count, 2000 + i)
            for i, (cell, snr) in enumerate(jobs)
        ]
        results = []
        for (cell, snr), future in zip(jobs, futures, strict=True):
            results.append({"label": cell.label, "snr": f"{snr[0]} to {snr[1]}"} | future.result())
            print(f"coverage: {cell.label}, S/N {snr[0]} to {snr[1]}", flush=True)
    return results


def tabulate(results: list[dict], key: str, names: tuple[str, ...], form: Callable, labels=None) -> str:
    """A Markdown table: a row a cell and bin, a column each of ``names``."""
    place = [SHOWN.index(name) for name in names]
    lines = [f"| noise, image | S/N | {' | '.join(names)} |", "|" + " --- |" * (2 + len(names))]
    for row in results:
        if labels is None or row["label"] in labels:
            cells = [form(row[key][i]) for i in place]
            lines.append(f"| {row['label']} | {row['snr']} | {' | '.join(cells)} |")
    return "\n".join(lines)


#: Side of the stamps and range of widths for the false alarms; what is no Gaussian, with its parameter.
SIZES = ((8, (1.0, 1.3)), (16, (1.2, 2.2)), (32, (1.5, 3.2)), (64, (1.5, 3.2)))
STRANGE = (
    *(("blend, widths apart", apart) for apart in (1.5, 2.0, 3.0)),
    *(("saturated at, of its peak", level) for level in (0.5, 0.8)),
    *(("Moffat, beta", beta) for beta in (2.5, 4.0)),
    ("exponential, scale [px]", 2.0),
    ("undersampled, sigma [px]", 0.5),
)


def strange(kind: str, number: float, count: int, r: np.random.Generator) -> np.ndarray:
    """Images (count, 32, 32) without noise of what is no Gaussian, with a peak of 1 or so."""
    y, x = np.mgrid[:32, :32].astype(float)
    x0, y0 = 15.5 + r.uniform(-1, 1, (2, count, 1, 1))
    radius, turn = np.hypot(x - x0, y - y0), r.uniform(0, np.pi, (count, 1, 1))
    if kind.startswith("blend"):
        away = number * np.cos(turn), number * np.sin(turn)  # half of it, of a width of 2
        both = [np.exp(-((x - x0 - s * away[0]) ** 2 + (y - y0 - s * away[1]) ** 2) / 8) for s in (1, -1)]
        image = both[0] + both[1]
        return image / image.max(axis=(1, 2), keepdims=True)
    if kind.startswith("saturated"):
        return np.minimum(np.exp(-(radius**2) / 8), number)
    if kind.startswith("Moffat"):
        return (1 + (2 ** (1 / number) - 1) * (radius / 2.35) ** 2) ** -number
    if kind.startswith("exponential"):
        return np.exp(-radius / number)
    edges = [special.ndtr((axis - centre + 0.5) / number) for axis, centre in ((x, x0), (y, y0))]
    starts = [special.ndtr((axis - centre - 0.5) / number) for axis, centre in ((x, x0), (y, y0))]
    return (edges[0] - starts[0]) * (edges[1] - starts[1]) / (2 * special.ndtr(0.5 / number) - 1) ** 2


def misfits(count: int) -> tuple[list[str], list[str]]:
    """Rows of two tables: misfits of sources that are the model, and of such that are not."""
    told = []
    for noise in ("cauchy", "gaussian", "student", "contaminated"):
        for side, sigma in SIZES:
            for snr in (6, 30, 1000):
                print(f"misfit: {noise}, {side} x {side}, S/N {snr}", flush=True)
                cell = Cell("", {"noise": noise, "shape": (side, side), "sigma": sigma}, {})
                amp = snr * error_of_amp(cell) / np.mean(sigma)
                images, _ = stamps.draw(count, (amp, amp), seed=[side, snr], **cell.draw)
                kind = {"kind": noise, "scale": 1.0, "fraction": 0.05, "factor": 10.0, "dof": 3.0}
                for scale in ("fit", simulate.cauchy_scale(kind)):
                    told.append(f"| {noise} | {side} | {snr} | {scale if scale == 'fit' else 'held'} | ")
                    told[-1] += _misfit(fit.fit_stack(images, scale=scale))
    for side, sigma in SIZES[1:]:
        for peak in (6, 30, 1000):
            print(f"misfit: correlated, {side} x {side}, peak {peak}", flush=True)
            images, _ = stamps.draw(count, (peak, peak), seed=peak, noise="correlated", shape=(side, side), sigma=sigma)
            for how in ("estimate", stamps.SMOOTHED):
                told.append(f"| correlated, taken as {how} | {side} | {peak} | fit | ")
                told[-1] += _misfit(fit.fit_stack(images, correlation=how))
    found = []
    for kind, number in STRANGE:
        for noise in ("cauchy", "gaussian", "correlated"):
            how = "estimate" if noise == "correlated" else "none"
            cells = []
            for amp in (20, 50, 100, 300, 1000):
                print(f"misfit: {kind} {number:g}, {noise}, peak {amp}", flush=True)
                r = np.random.default_rng([amp, int(10 * number)])
                images, _ = stamps.draw(count // 10, (1, 1), seed=amp, noise=noise)
                result = fit.fit_stack(images + amp * strange(kind, number, count // 10, r), correlation=how)
                flagged = np.mean(result.flags & columns.BIT["MISFIT"] > 0)
                medians = (np.nanmedian(misfit) for misfit in (result.misfit, result.misfit_profile))
                cells.append(f"{100 * flagged:.0f} ({', '.join(f'{median:+.1f}' for median in medians)})")
            found.append(f"| {kind} {number:g} | {noise} | {' | '.join(cells)} |")
    return told, found


def _misfit(result) -> str:
    """Mean and spread of both misfits, and the share of flags."""
    good = result.flags & columns.BIT["NOT_CONVERGED"] == 0
    each = [f"{v.mean():+.2f} | {v.std():.2f}" for v in (result.misfit[good], result.misfit_profile[good])]
    return f"{each[0]} | {each[1]} | {100 * np.mean(result.flags[good] & columns.BIT['MISFIT'] > 0):.2f} |"


def draw(results: list[dict]) -> None:
    """The picture: coverage of every column, by kind of image and signal to noise."""
    figure, axes = plt.subplots(3, 5, figsize=(14, 7), sharex=True, sharey=True, layout="constrained")
    for axis in axes.flat[len(CELLS) :]:
        axis.remove()
    for axis, cell in zip(axes.flat[: len(CELLS)], CELLS, strict=True):
        rows = [row for row in results if row["label"] == cell.label]
        axis.axhspan(66.8, 69.8, color="0.9")
        axis.axhline(68.27, color="0.5", linewidth=0.8)
        for i, name in enumerate(SHOWN):
            axis.plot(range(len(rows)), [100 * row["one"][i] for row in rows], ".-", linewidth=0.8, label=name)
        axis.set_title(cell.label, fontsize=9)
        axis.set_xticks(range(len(rows)), [row["snr"] for row in rows], fontsize=7)
    axes[0, 0].set_ylim(55, 80)
    figure.supxlabel("true signal to noise")
    figure.supylabel("truths within one error [%]; below 55 is below the frame")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Run the study and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="stamps for each row of the convergence table")
    parser.add_argument("--coverage", type=int, default=100_000, help="stamps for each row of the coverage tables")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        covered = coverage(arguments.coverage)
    converged = convergence(arguments.count)
    told, found = misfits(arguments.count)
    draw(covered)
    few = 100 * np.sqrt(0.683 * 0.317 / arguments.coverage), 100 * np.sqrt(0.954 * 0.046 / arguments.coverage)
    noises, widths = [cell.label for cell in CELLS[:4]], ("x0", "amp", "sigma", "rho", "background", "scale", "flux")

    correlated = [cell.label for cell in CELLS if cell.label.startswith("correlated")]

    def share(value):
        return f"{100 * value:.1f}"

    def signed(value):
        return f"{value:+.3f}"

    others = "\n\n".join(
        f"`{kind}`:\n\n{tabulate(covered, kind, widths, share, [*noises, *correlated])}"
        for kind in columns.COVARIANCES[1:]
    )
    PAGE.write_text(
        f"""# Calibration

Written by `make calibrate` (version {__version__}, jax {jax.__version__}, numpy {np.__version__}, Python
{platform.python_version()}, {jax.default_backend()}) in {time.monotonic() - began:.0f} s.

![coverage](pictures/coverage.png)

## Coverage

{arguments.coverage} stamps a row; 32 x 32 pixels, widths 1.5 to 3.2 px, constant background, scale free,
where the label says nothing else. Rows are by true signal to noise, log-uniform in its range: true amplitude over the
typical error of a fitted one. *Correlated* is Gaussian noise smoothed to a FWHM of {stamps.SMOOTHED:g} px,
*contaminated* has 5 % of pixels with ten times the noise, *student* 3 degrees of freedom. `rho` and `diff` are uniform
from -0.3 to 0.3, and 0 of *round* sources: noise makes these longer along one axis, whichever. Fits that did not
converge are left out, rows flagged `ROUND` are not: {100 * max(row["lost"] for row in covered):.2f} % at most.

Truths within one default error (`pooled`), nominally 68.3 %; the Monte Carlo error is {few[0]:.2f}:

{tabulate(covered, "one", SHOWN, share)}

Within two, nominally 95.4 %, of `theta` within the interval for two errors (see *Conventions* in the README; within
twice `theta_err` are fewer); the Monte Carlo error is {few[1]:.2f}:

{tabulate(covered, "two", SHOWN, share)}

## Bias

Mean offset from the truth over the mean error, offsets beyond 8 errors left out; the Monte Carlo error is
{1 / np.sqrt(arguments.coverage):.3f}. The errors are those at the truth, but for chance: those found are shorter where
`amp` has come out too large and `sigma` too small. As fitted:

{tabulate(covered, "raw", SHOWN[:-1], signed)}

After `<name>_bias` has been subtracted:

{tabulate(covered, "left", SHOWN[:-1], signed)}

## Variance over the Cramer-Rao bound

Mean square of offset over the error of `fisher`, for Cauchy noise; the bound is for many pixels, and a source of width
sigma has about 4 pi sigma^2.

{tabulate(covered, "variance", NAMES, "{:.2f}".format, [c.label for c in CELLS if c.label.startswith("cauchy")])}

## The other covariances

Truths within one error, nominally 68.3 %. Where the noise is not Cauchy's, `hessian` and `fisher` are wrong, because
they take it for that. None of the three knows of correlation.

{others}

## Misfit

`misfit` and `misfit_profile` of sources that are the model, {arguments.count} stamps a row: mean and spread (0 and 1 in
theory), and the share that has the flag `MISFIT` [%]. S/N are those of a typical width; on correlated noise, peaks over
its rms.

| noise | side [px] | S/N | scale | misfit, mean | spread | misfit_profile, mean | spread | flagged [%] |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(told)}

And of sources that are not, {arguments.count // 10} stamps a cell, by peak over the noise (half-width or rms): the
share that has the flag [%] and the medians of both where they are defined. Blends are of two equal sources of width
2 px, so many widths apart. Correlated noise is taken as estimated.

| source | noise | 20 | 50 | 100 | 300 | 1000 |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(found)}

## The right minimum

{arguments.count} stamps a row, widths 1.5 to 3.2 px, amplitude/scale log-uniform in its range, background and scale
free. *Right*: converged, and the nll is no more than 0.05 above that of the true source with scale and background at
their best. *Within 6 errors*: all six parameters of the source. Steps count the first evaluation and refused steps.
Shares are in percent, each with its Monte Carlo standard error.

| noise | side [px] | amplitude/scale | right [%] | within 6 errors [%] | mean steps | 99th percentile | most |
| --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(converged)}
"""
    )
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
