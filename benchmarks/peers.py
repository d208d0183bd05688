"""This package's fit and what a user would take instead, one function each, all with the same arguments.

A fit takes images (n, ny, nx), starts (n, 8) and the number p of free parameters, the first p of ``PARAMETERS``; the
others are held at their start. It returns parameters (n, 8), NaN where it gave up. No image has a mask or noise map.
"""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import iminuit
import jax
import jax.numpy as jnp
import lmfit
import numpy as np
import optimistix
from astropy.modeling import fitting, models
from astropy.utils.exceptions import AstropyUserWarning
from scipy import optimize

from pipeline import fit, likelihood, model

PARAMETERS = ("x0", "y0", "amp", "sigma", "rho", "diff", "background", "scale")

#: Images in one call of a vmapped minimiser: all of them wait for the slowest. The fastest of 16, 64 and 256 on a core.
BATCH = 16
MAX_STEPS = 200


class Peer(NamedTuple):
    """One row of a table: the fit, the most parameters that it can free, what it says of their errors, and the type of
    the pixels that it is given and computes in."""

    fit: Callable
    most: int
    errors: str
    pixels: str = "float64"


# ---- this package ---------------------------------------------------------------------------------------------------


def ours(images, starts, p, precision):
    """`pipeline.fit.fit_stack`, which makes its own starts; of ``starts`` it takes only what is held."""
    result = fit.fit_stack(
        images,
        background="constant" if p > 6 else float(starts[0, 6]),
        scale="fit" if p > 7 else float(starts[0, 7]),
        precision=precision,
    )
    return np.hstack([result.params, starts[:, p:]])


# ---- one image at a time, in NumPy ----------------------------------------------------------------------------------


def residuals(params, data):
    """(model - data) / scale, a vector over the pixels."""
    ny, nx = data.shape
    predicted = model.gaussian(params[:6], np.arange(nx)[None, :], np.arange(ny)[:, None]) + params[6]
    return ((predicted - data) / params[7]).ravel()


def jacobian(params, data):
    """Derivatives (pixels, 7) of `residuals` in all parameters but the scale."""
    x0, y0, amp, sigma, rho, diff = params[:6]
    dx, dy = np.arange(data.shape[1])[None, :] - x0, np.arange(data.shape[0])[:, None] - y0
    across = dx * dy
    q = ((1 + diff) * dx * dx + (1 - diff) * dy * dy + rho * across) / sigma**2
    shape = np.exp(-0.5 * q)
    source = amp * shape
    slopes = [
        source * ((1 + diff) * dx + 0.5 * rho * dy) / sigma**2,
        source * ((1 - diff) * dy + 0.5 * rho * dx) / sigma**2,
        shape,
        source * q / sigma,
        source * across * (-0.5 / sigma**2),
        source * (dx * dx - dy * dy) * (-0.5 / sigma**2),
        np.ones_like(data),
    ]
    return np.stack([slope.ravel() for slope in slopes], axis=-1) / params[7]


def numpy_nll(params, data):
    """The nll of one image: `likelihood.nll` in NumPy."""
    return data.size * np.log(np.pi * params[7]) + np.sum(np.log1p(residuals(params, data) ** 2))


def one_by_one(minimise):
    """Lift ``minimise(data, start, p)`` to stacks; a start that it cannot get away from is no reason to stop."""

    @functools.wraps(minimise)
    def fit_all(images, starts, p, **settings):
        params = np.full(starts.shape, np.nan)
        # Trial steps overflow, and some peers warn of each fit that they doubt.
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", (AstropyUserWarning, RuntimeWarning, iminuit.util.IMinuitWarning))
            for row, data, start in zip(params, images, starts, strict=True):
                try:
                    row[:p], row[p:] = minimise(data, start, p, **settings), start[p:]
                except (ValueError, RuntimeError, np.linalg.LinAlgError):
                    row[:] = np.nan
        return params

    return fit_all


@one_by_one
def scipy_least_squares(data, start, p, analytic=False):
    """`scipy.optimize.least_squares`, whose Cauchy loss has the nll's minimum while the scale is held."""

    def full(free):
        return np.concatenate([free, start[p:]])

    def slopes(free):
        return jacobian(full(free), data)[:, :p]

    return optimize.least_squares(
        lambda free: residuals(full(free), data), start[:p], jac=slopes if analytic else "2-point", loss="cauchy"
    ).x


@one_by_one
def lmfit_least_squares(data, start, p):
    """lmfit's way to the same, with its covariance."""
    params = lmfit.Parameters()
    for i, name in enumerate(PARAMETERS):
        params.add(name, value=start[i], vary=i < p)

    def all_residuals(params):
        return residuals(np.array([params[name].value for name in PARAMETERS]), data)

    found = lmfit.minimize(all_residuals, params, method="least_squares", loss="cauchy").params
    return np.array([found[name].value for name in PARAMETERS[:p]])


@one_by_one
def iminuit_migrad(data, start, p):
    """MIGRAD and HESSE on the nll."""
    minuit = iminuit.Minuit(lambda free: numpy_nll(np.concatenate([free, start[p:]]), data), start[:p])
    minuit.errordef = iminuit.Minuit.LIKELIHOOD
    for i in (3, 7):
        if i < p:
            minuit.limits[i] = (1e-3, None)
    minuit.migrad()
    minuit.hesse()
    return np.array(minuit.values)


class CauchyTRF(fitting.TRFLSQFitter):
    """astropy's fitter knows no loss: roots of the pixels' nll stand for residuals, so that their squares sum to it."""

    def objective_function(self, *arguments, **settings):
        """Residuals r, weighed, as sign(r) sqrt(log(1 + r^2))."""
        r = super().objective_function(*arguments, **settings)
        return np.copysign(np.sqrt(np.log1p(r * r)), r)


@one_by_one
def astropy_trf(data, start, p):
    """`TRFLSQFitter` with ``Gaussian2D + Const2D`` and its uncertainties."""
    x0, y0, amp, _, _, _, background, scale = start
    _, major, minor, _, _, theta = model.derived(start[:6])
    source = models.Gaussian2D(amp, x0, y0, major, minor, theta=theta)
    ground = models.Const2D(background, fixed={"amplitude": p < 7})
    y, x = np.mgrid[: data.shape[0], : data.shape[1]]
    weights = np.full(data.shape, 1 / scale)
    fitter = CauchyTRF(calc_uncertainties=True)
    found = fitter(source + ground, x, y, data, weights=weights, estimate_jacobian=True)
    amp, x0, y0, one, other, theta, background = found.parameters
    # Back from rms widths along theta and across it to sigma, rho, diff (design: e, phi).
    a, b = one**-2, other**-2
    e = (b - a) / (a + b)
    params = [x0, y0, amp, np.sqrt(2 / (a + b)), -2 * e * np.sin(2 * theta), -e * np.cos(2 * theta), background]
    return np.array(params[:p])


# ---- vmapped automatic differentiation ------------------------------------------------------------------------------


def objective(start, data, p):
    """The nll of one image as a function of the first p entries of the free vector, and these of the start."""
    image = likelihood.Image(data, jnp.ones_like(data), jnp.zeros(2, data.dtype))
    free = likelihood.to_free(start)

    def value(head, _=None):
        return likelihood.nll(likelihood.to_public(jnp.concatenate([head, free[p:]])), image)

    return value, free[:p]


def bfgs(start, data, p):
    """The minimum of one image by optimistix' BFGS."""
    value, first = objective(start, data, p)
    tolerance = 1e-6 if data.dtype == np.float64 else 1e-4
    solver = optimistix.BFGS(rtol=tolerance, atol=tolerance)
    return optimistix.minimise(value, solver, first, max_steps=MAX_STEPS, throw=False).value


def newton(start, data, p):
    """The minimum of one image by Newton's method with the Hessian of automatic differentiation, damped as Marquardt's.

    It ends where g^T H^-1 g / 2 < 1e-6.
    """
    value, first = objective(start, data, p)
    slope, bend = jax.grad(value), jax.jacfwd(jax.jacrev(value))

    def step(state):
        here, nll, damping, n, _ = state
        gradient, hessian = slope(here), bend(here)
        ridge = damping * jnp.diag(jnp.abs(jnp.diag(hessian)))
        move = -jnp.linalg.solve(hessian + ridge, gradient)
        there = here + move
        new = value(there)
        better = new < nll
        done = jnp.abs(gradient @ move) < 2e-6
        here, nll = jnp.where(better, there, here), jnp.where(better, new, nll)
        return here, nll, jnp.where(better, 0.1 * damping, 10 * damping), n + 1, done

    start_state = (first, value(first), jnp.asarray(1e-3, first.dtype), 0, jnp.asarray(False))
    return jax.lax.while_loop(lambda state: ~state[4] & (state[3] < MAX_STEPS), step, start_state)[0]


@functools.cache
def compiled(minimise, p):
    """``minimise`` for a batch of images and starts; all parameters, public."""

    def one(start, data):
        found = minimise(start, data, p)
        return likelihood.to_public(jnp.concatenate([found, likelihood.to_free(start)[p:]]))

    return jax.jit(jax.vmap(one))


def in_batches(images, starts, p, minimise, precision):
    """Batch after batch of one shape, the last one filled up with copies."""
    program = compiled(minimise, p)
    params = np.empty(starts.shape)
    for low in range(0, len(images), BATCH):
        rows = np.arange(low, low + BATCH).clip(max=len(images) - 1)
        found = program(starts[rows].astype(precision), images[rows].astype(precision))
        params[low : low + BATCH] = np.asarray(found)[: len(images) - low]
    return params


OURS = {
    f"**this package, {precision}**": Peer(
        functools.partial(ours, precision=precision), 8, "four covariances", precision
    )
    for precision in ("float64", "float32")
}
SCIPY = "scipy `least_squares`, numerical Jacobian"
PEERS = OURS | {
    SCIPY: Peer(scipy_least_squares, 7, "none"),
    "scipy `least_squares`, analytic Jacobian": Peer(functools.partial(scipy_least_squares, analytic=True), 7, "none"),
    "lmfit `least_squares`": Peer(lmfit_least_squares, 7, "(J^T J)^-1"),
    "iminuit `migrad`, `hesse`": Peer(iminuit_migrad, 8, "H^-1"),
    "astropy `TRFLSQFitter`": Peer(astropy_trf, 7, "(J^T J)^-1"),
    **{
        f"{name}, {precision}": Peer(
            functools.partial(in_batches, minimise=minimise, precision=precision), 8, "none", precision
        )
        for name, minimise in (("optimistix `BFGS`, vmapped", bfgs), ("Newton by autodiff, vmapped", newton))
        for precision in ("float64", "float32")
    },
}
