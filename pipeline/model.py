"""The model: an elliptical Gaussian on a background, and what astronomers derive from its parameters.

Each function takes one source, or many in leading axes, and computes in the namespace of its arrays: NumPy
arrays in, NumPy arrays out; JAX arrays, traced or not, likewise.
The derivatives that a fit takes of this model stand in `pipeline.moments`.

Parameters, in order: ``x0, y0, amp, sigma, rho, diff`` (see `pipeline.columns`).
"""

import math

import numpy as np

from pipeline.columns import PARAMETERS

FWHM_PER_SIGMA = math.sqrt(8.0 * math.log(2.0))
#: Below so many of its errors an ellipticity tells no direction; see `pipeline.uncertainty.direction_error`.
UNDIRECTED = 1.25


def gaussian(params, x, y):
    """Elliptical Gaussian without background.

    Parameters
    ----------
    params : array, shape (..., 6)
        x0, y0 [pixel], amp [image unit], sigma [pixel], rho, diff.
    x, y : arrays, broadcast against ``params[..., i]``
        Pixel coordinates, 0-based, integer = pixel centre.

    Returns
    -------
    array
        amp exp(-[dx^2 + dy^2 + rho dx dy + diff (dx^2 - dy^2)] / (2 sigma^2)), in image units.
    """
    xp = params.__array_namespace__()
    x0, y0, amp, sigma, rho, diff = (params[..., i] for i in range(6))
    dx, dy = x - x0, y - y0
    q = ((1.0 + diff) * dx * dx + (1.0 - diff) * dy * dy + rho * dx * dy) / (sigma * sigma)
    return amp * xp.exp(-0.5 * q)


def ellipticity(params):
    """Ellipticity e = sqrt(diff^2 + rho^2/4) of ``params`` (..., 6); the Gaussian is bounded where e < 1."""
    xp = params.__array_namespace__()
    square = params[..., 5] ** 2 + 0.25 * params[..., 4] ** 2
    # The root has no slope at zero; a tiny floor makes the derivative of a round source zero instead of NaN.
    return xp.sqrt(xp.maximum(square, xp.asarray(1e-30, dtype=square.dtype)))


def of_rows(rows, x, y):
    """The Gaussian and the background of rows of the catalogue, at pixels.

    rows : mapping of the fitted columns and ``x0_start, y0_start``, each () or (n,); a background that is NaN is none.
    x, y : NumPy arrays (ny, nx) [pixel]. Returns (ny, nx) or (n, ny, nx).
    """
    sources = np.stack([rows[name] for name in PARAMETERS[:6]], axis=-1)
    level, slope_x, slope_y, start_x, start_y = (
        np.nan_to_num(rows[name])[..., None, None]
        for name in ("background", "background_x", "background_y", "x0_start", "y0_start")
    )
    gaussians = gaussian(sources[..., None, None, :], x, y)
    return gaussians + level + slope_x * (x - start_x) + slope_y * (y - start_y)


def derived(params):
    """Flux, widths and angle from the parameters.

    Parameters
    ----------
    params : array, shape (..., 6)

    Returns
    -------
    array, shape (..., 6)
        flux [image unit pixel^2], sigma_major, sigma_minor, fwhm_major, fwhm_minor [pixel] and
        theta [rad, counter-clockwise from +x, (-pi/2, pi/2]], the order of `pipeline.columns.DERIVED`.
    """
    xp = params.__array_namespace__()
    amp, sigma, rho, diff = (params[..., i] for i in range(2, 6))
    e = ellipticity(params)
    major, minor = sigma / xp.sqrt(1.0 - e), sigma / xp.sqrt(1.0 + e)
    flux = 2.0 * math.pi * amp * major * minor
    # 0.0 - rho, not -rho: a negative zero would turn +pi/2 into -pi/2.
    theta = 0.5 * xp.atan2(0.0 - 0.5 * rho, 0.0 - diff)
    return xp.stack([flux, major, minor, FWHM_PER_SIGMA * major, FWHM_PER_SIGMA * minor, theta], axis=-1)


def direction_pull(offset, error, kept=1.0):
    """Offsets of the direction of an axis over their errors, such that those within k errors are an interval.

    What is normal is the sine of twice the offset, see `pipeline.uncertainty.direction_error`. So within k errors are
    offsets below 45 degrees with |sin 2 offset| < k sin(2 error), or all directions where the error is pi / 2 or
    k sin(2 error) no less than 1. Of sources whose true ellipticity is 1 or more of its errors 68 % are within one, and
    95.0 to 95.5 % within two; of those at 0.5 93.9 %, of round ones 91.0 %. Those with |offset| < 2 error are 72 % of
    round ones, and 93 % at 4.

    offset, error : NumPy arrays (n,) [rad], offsets between -pi/2 and pi/2. kept : array (n,), the share of the
    variance that the offsets have; where all directions are within one error, nothing is changed by it. Returns an
    array (n,).
    """
    sine = np.where(np.abs(offset) < 0.25 * np.pi, np.sin(2.0 * offset), np.sign(offset))
    known = np.where(error < 0.25 * np.pi, np.sin(2.0 * error) * np.sqrt(kept), UNDIRECTED)
    return np.where(np.isnan(error), np.nan, sine / known)


def direction_stretched(error, factor):
    """Errors of the direction of an axis that are ``factor`` times as long where pulls are `direction_pull`.

    error : NumPy array (n,) [rad]. factor : array (n,). Returns an array (n,).
    """
    sine = factor * np.sin(2.0 * error)
    all_ = (error >= 0.25 * np.pi) | (sine > 1.0 / UNDIRECTED)
    longer = np.where(all_, 0.5 * np.pi, 0.5 * np.arcsin(np.minimum(sine, 1.0)))
    return np.where((factor == 1.0) | np.isnan(error), error, longer)
