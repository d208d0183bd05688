"""How often the right minimum is found, and how often the truth lies within the errors: writes docs/calibration.md.

    make calibrate

Stamps are those of the tests (`tests.stamps`), with other seeds. Every share comes with its binomial standard error.
"""

import argparse
import functools
import platform
import time
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

from pipeline import __version__, columns, fit, model, simulate, uncertainty  # noqa: E402  (after the precision is set)
from tests import stamps  # noqa: E402

PAGE = Path(__file__).resolve().parents[1] / "docs" / "calibration.md"
DECADES = ((5, 10), (10, 100), (100, 1e3), (1e3, 1e4))
NAMES = columns.parameter_names("constant", "fit")
SHOWN = (*NAMES, *columns.DERIVED)
propagate = jax.jit(jax.vmap(functools.partial(uncertainty.propagate, model.derived)))


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


def coverage(count: int) -> list[str]:
    """Rows of the tables of coverage: one a column, for each kind of noise and covariance."""
    rows = []
    for noise in ("cauchy", "gaussian", "student", "contaminated"):
        print(f"coverage: {noise}", flush=True)
        images, params = stamps.draw(count, (10, 100), seed=2000, noise=noise)
        scale = simulate.cauchy_scale({"kind": noise, "scale": 1.0, "fraction": 0.05, "factor": 10.0, "dof": 3.0})
        truth = dict(zip(NAMES, [*params.T, np.zeros(count), np.full(count, scale)], strict=True))
        truth |= dict(zip(columns.DERIVED, model.derived(params).T, strict=True))
        result = fit.fit_stack(images)
        found = dict(zip(SHOWN, [*result.params.T, *result.derived.T], strict=True))
        pulls = {}
        for kind, covariance in zip(columns.COVARIANCES, result.covariances, strict=True):
            _, derived_errors = propagate(result.params[:, :6], covariance[:, :6, :6])
            errors = [*np.sqrt(np.diagonal(covariance, axis1=1, axis2=2)).T, *np.asarray(derived_errors)]
            for name, error in zip(SHOWN, errors, strict=True):
                offset = found[name] - truth[name]
                if name == "theta":
                    offset = (offset + np.pi / 2) % np.pi - np.pi / 2
                good = np.isfinite(error)
                if name == "theta":
                    good &= result.flags & columns.BIT["ROUND"] == 0
                pulls[kind, name] = (offset / error)[good]
        for name in SHOWN:
            default = pulls["pooled", name]
            spread = np.std(np.clip(default, -5, 5))
            cells = [percent(np.abs(pulls[kind, name]) < 1) for kind in columns.COVARIANCES]
            rows.append(
                f"| {noise} | {name} | {' | '.join(cells)} | {percent(np.abs(default) < 2)} "
                f"| {np.median(default):+.3f} | {spread:.3f} |"
            )
    return rows


def main() -> None:
    """Run the study and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="stamps for each row of the convergence table")
    parser.add_argument(
        "--coverage", type=int, default=4000, help="stamps for each kind of noise in the coverage table"
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    converged, covered = convergence(arguments.count), coverage(arguments.coverage)
    kinds = " | ".join(f"68.3: {kind}" for kind in columns.COVARIANCES)
    PAGE.write_text(
        f"""# Calibration

Written by `make calibrate` (version {__version__}, jax {jax.__version__}, numpy {np.__version__}, Python
{platform.python_version()}, {jax.default_backend()}) in {time.monotonic() - began:.0f} s.
Shares are in percent, each with its Monte Carlo standard error.

## The right minimum

{arguments.count} stamps a row, widths 1.5 to 3.2 px, amplitude/scale log-uniform in its range, background and scale
free. *Right*: converged, and the nll is no more than 0.05 above that of the true source with scale and background at
their best. *Within 6 errors*: all six parameters of the source. Steps count the first evaluation and refused steps.

| noise | side [px] | amplitude/scale | right [%] | within 6 errors [%] | mean steps | 99th percentile | most |
| --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(converged)}

## Coverage

{arguments.coverage} stamps of 32 x 32 a kind of noise, widths 1.5 to 3.2 px, amplitude/scale log-uniform, 10 to 100,
background and scale free. Shares of truths within one error of the fit, nominally 68.3 %, for the four covariances;
then, for the default (`pooled`), within two errors (95.4 %), the median pull and the standard deviation of the pulls
(clipped at 5). `theta` leaves out rows flagged `ROUND`.

| noise | column | {kinds} | 95.4: pooled | median pull | spread |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(covered)}

The scale is short by about 2 p / n of itself (p parameters, n pixels), as every maximum-likelihood width is: hence its
median pull. Where the noise is not Cauchy's, `hessian` and `fisher` are wrong, because they take it for that; `pooled`
and `sandwich` do not.
"""
    )
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
