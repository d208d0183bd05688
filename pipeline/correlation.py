"""Noise whose pixels are not independent, as radio beams, drizzling and resampling leave it.

The model: Gaussian white noise, smoothed with an elliptical Gaussian. Pixels that are d apart are then correlated by
exp(-d^T K d / 4), K the inverse of the smoothing Gaussian's covariance matrix [pixel^-2]. What a robust fit adds up is
a bounded function of the residuals, correlated less than they are: by Mehler's formula, with the squared Hermite
coefficients of the function as weights,

    corr(f(x), f(y)) = sum_k w_k corr(x, y)^k.

A kernel is an array (3,): Kxx, Kxy, Kyy.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pipeline import likelihood, moments
from pipeline.model import FWHM_PER_SIGMA
from pipeline.newton import inverse

REACH = 2.0  # FWHM: pairs of pixels further apart than this are left out, 0.4 % of all correlation
SINGLY = 40  # pixels: noise that reaches further is smooth, and pairs a few pixels apart stand for those between
WIDEST = 6.0  # FWHM that is found from the residuals [pixel]; also the widest that is looked for
LEAST = 1e-4  # correlation of neighbours that counts as none
STEEPER = 0.18  # see `covariance`


class GaussianNoise(NamedTuple):
    """What Gaussian noise of variance 1 makes of a robust fit.

    half_width : with it chi = (1 - t^2) / (1 + t^2) has mean 0, t = noise / half_width. psi, mixed, chi : (10,) weights
    of Mehler's formula, of the odd powers for psi = t / (1 + t^2) and for psi with chi', and of the even ones
    for chi.
    """

    half_width: float
    psi: np.ndarray
    mixed: np.ndarray
    chi: np.ndarray


#: By quadrature (see the test), as numbers: what processors and versions of NumPy round otherwise would be in the bits
#: of every catalogue of correlated noise.
# fmt: off
GAUSSIAN = GaussianNoise(
    half_width=0.612003441788,
    psi=np.array([
        0.598840062101, 0.188573017803, 0.085394871215, 0.045467225546, 0.026622544150, 0.016615135290,
        0.010861556860, 0.007357204719, 0.005126507388, 0.003655932944,
    ]),
    mixed=np.array([
        0.410862146216, 0.204897646712, 0.119073399672, 0.075166642131, 0.050068571193, 0.034658371999,
        0.024703947366, 0.018022766226, 0.013401256849, 0.010125186330,
    ]),
    chi=np.array([
        0.522221845221, 0.206221843430, 0.102528002333, 0.057550954682, 0.034887094692, 0.022320648697,
        0.014868868702, 0.010222634122, 0.007209985576, 0.005193937824,
    ]),
)
# fmt: on


def of_psi(correlation):
    """Correlation of psi where that of the residuals is ``correlation`` < 1; of NumPy or JAX arrays."""
    return correlation * np.polynomial.polynomial.polyval(correlation * correlation, GAUSSIAN.psi)


def mixed(correlation):
    """E[psi_i chi'_j] over E[psi_i chi'_i] where the correlation of residuals i and j is ``correlation`` < 1."""
    return correlation * np.polynomial.polynomial.polyval(correlation * correlation, GAUSSIAN.mixed)


def of_chi(correlation):
    """Correlation of the scale's scores where that of the residuals is ``correlation`` < 1; likewise."""
    square = correlation * correlation
    return square * np.polynomial.polynomial.polyval(square, GAUSSIAN.chi)


def round_kernel(fwhm):
    """Kernel (..., 3) of noise that was smoothed with a round Gaussian of this FWHM [pixel]."""
    k = (FWHM_PER_SIGMA / np.asarray(fwhm, float)) ** 2
    return np.stack([k, np.zeros_like(k), k], axis=-1)


def kernel_fwhm(kernel):
    """FWHM [pixel] of the round Gaussian that correlates noise as much as a kernel (3,) does."""
    return FWHM_PER_SIGMA / (kernel[0] * kernel[2] - kernel[1] ** 2) ** 0.25


def reach_of(fwhm: float) -> int:
    """Up to how many pixels apart pairs count."""
    return math.ceil(REACH * fwhm)


def reaches(kernels, side: int):
    """Up to how many pixels apart pairs count in images whose longer side is ``side``, int (n,) for kernels (n, 3).

    By the longest axis, and rounded up, so that the many beams of a survey share few compiled programs. Where a kernel
    is NaN it is to be found from the residuals.
    """
    along, skew, across = np.asarray(kernels, float).T
    least = 0.5 * (along + across) - np.hypot(0.5 * (along - across), skew)
    with np.errstate(divide="ignore"):
        fwhm = FWHM_PER_SIGMA / np.sqrt(np.maximum(least, 0.0))
    reach = np.ceil(np.where(np.isnan(least), REACH * WIDEST, np.minimum(REACH * fwhm, side))).astype(int)
    unit = 4 * _step(reach)
    return -(-reach // unit) * unit


def _step(reach):
    """Every how many pixels lags are taken, int array like ``reach``."""
    return np.maximum(-(-reach // SINGLY), 1)


def _lags(reach: int) -> np.ndarray:
    """One of each pair d, -d of lags (dy, dx) within ``reach``, nearest first; int array (k, 2)."""
    step = int(_step(reach))
    dy, dx = step * np.mgrid[0 : reach // step + 1, -(reach // step) : reach // step + 1].reshape(2, -1)
    half = (dx * dx + dy * dy <= reach * reach) & ((dy > 0) | (dx > 0))
    order = np.lexsort((dx[half], dy[half], (dx * dx + dy * dy)[half]))
    return np.stack([dy[half], dx[half]], axis=-1)[order]


def _maps(at: moments.Frame, tile: moments.Tile):
    """The derivatives of the model over the noise, in all free parameters but the scale: (q - 1, ny, nx)."""
    source = [
        factor.astype(tile.shape.dtype) * tile.shape * moments.grid(poly, tile)
        for factor, poly in zip(at.factors, at.slopes, strict=True)
    ]
    return jnp.stack(source + [moments.grid(poly, tile) for poly in at.ground]) * tile.weight[None]


def covariance(free, image: likelihood.Image, n, kernel, reach: int, ratio, fit_scale: bool):
    """Covariance of the fit to correlated noise, in the free vector.

    Parameters
    ----------
    free : array (q,)
        The free vector.
    image : likelihood.Image
    n : array ()
        Number of used pixels.
    kernel : array (3,)
    reach : int
        Most pixels that a pair is apart.
    ratio : array ()
        E psi^2 / (E psi')^2, of residuals over the noise.
    fit_scale : bool
        Whether the scale is fitted.

    Returns
    -------
    array (q - 1, q - 1)
        Of all but the scale.
    more : array ()
        The factor on the variance of the scale that independent noise would give it, without correction for the
        number of parameters.
    others, others_mixed : array ()
        tr (sum g_i g_i^T)^-1 sum corr_ij g_i g_j^T, corr_ij as in `of_psi` and `mixed`; q - 1 for independent noise.

    Notes
    -----
    With g the gradient of the model over the noise, and sums over pixels and pairs of pixels,

        cov = E psi^2 / (E psi')^2 n / (n - d) A^-1 [sum corr(psi_i, psi_j) g_i g_j^T] A^-1,  A = sum a_i g_i g_i^T,
        d = tr (sum g_i g_i^T)^-1 sum corr(r_i, r_j) g_i g_j^T + 1 for a fitted scale.

    a = 1 where a source is larger than the noise is correlated. To a smaller one noise looks like a part of it; the fit
    takes it away, and what is left meets a steeper psi than the noise did: a_i = 1 + STEEPER h_i^2, where
    h_i = g_i^T cov g_i with all factors and a left out is the share that the fit takes. Measured, not derived: with 0
    the interval of 68 % of sigma covers 71, 75 and 77 % on noise of FWHM 2, 3 and 4 pixel (sources of sigma 1.5 to 3.2
    pixel in 32 x 32), that of x0 69, 70 and 71 %; with 0.18 these are 70, 73, 74 and 67, 66, 65 %.
    """
    at = moments.frame(list(free), image)
    tile = moments.tile(at, image.data, image.weight, 0)
    used = (image.weight > 0).astype(image.weight.dtype)
    maps = _maps(at, tile)
    lags, each = _lags(reach), int(_step(reach)) ** 2
    dy, dx = jnp.asarray(lags.T, free.dtype)
    residuals = jnp.exp(-0.25 * (kernel[0] * dx * dx + 2.0 * kernel[1] * dx * dy + kernel[2] * dy * dy))
    places = jnp.asarray(lags)

    def pairs(maps, correlations):
        """sum_ij correlation_ij m_i m_j^T of maps (k, ny, nx), with correlations by lag."""
        padded = jnp.pad(maps, ((0, 0), (0, reach), (reach, reach)))
        weights = correlations.astype(maps.dtype)

        def add(i, neighbours):
            shift = 0, places[i, 0], reach + places[i, 1]
            return neighbours + weights[i] * jax.lax.dynamic_slice(padded, shift, maps.shape)

        half = product(maps, jax.lax.fori_loop(0, len(lags), add, 0.5 * maps))
        return each * (half + half.T)

    def product(left, right):
        return jnp.einsum("ayx,byx->ab", left, right, precision=jax.lax.Precision.HIGHEST).astype(free.dtype)

    plain, paired = inverse(product(maps, maps)), pairs(maps, of_psi(residuals))
    others = jnp.sum(plain * paired)
    lost = jnp.sum(plain * pairs(maps, residuals)) + float(fit_scale)
    more = n / (n - lost)
    meat = (plain @ paired @ plain).astype(maps.dtype)
    share = jnp.einsum("ab,ayx,byx->yx", meat, maps, maps, precision=jax.lax.Precision.HIGHEST)
    bread = inverse(product(maps * (1.0 + STEEPER * share * share)[None], maps))
    return (
        ratio * more * bread @ paired @ bread,
        more * pairs(used[None], of_chi(residuals))[0, 0] / n,
        others,
        jnp.sum(plain * pairs(maps, mixed(residuals))),
    )


def estimate(free, image: likelihood.Image, n):
    """The kernel (3,) that explains how residuals of neighbouring pixels go together, at a solution.

    From psi, which outliers do not move, of pixels outside the source: the fit has made the residuals under it smaller.
    The fitted background takes the mean of all correlations away, which is put back.

    free : array (q,). image : likelihood.Image. n : number of used pixels.
    """
    at = moments.frame(list(free), image)
    tile = moments.tile(at, image.data, image.weight, 0)
    outside = jnp.where(image.weight > 0, 1.0 - tile.shape, 0.0).astype(tile.t.dtype)
    psi = outside * tile.t * tile.v
    ny, nx = psi.shape

    def covariance(dy, dx):
        def product(a):
            left = a[: ny - dy, max(0, -dx) : nx - max(0, dx)]
            right = a[dy:, max(0, dx) : nx + min(0, dx)]
            return jnp.sum((left * right).astype(free.dtype))

        return product(psi) / jnp.maximum(product(outside), 1e-12)

    whole, *lagged = [covariance(*lag) for lag in ((0, 0), (0, 1), (1, 0), (1, 1), (1, -1))]
    observed = [one / jnp.maximum(whole, 1e-300) for one in lagged]
    table = np.linspace(0.0, 1.0, 513)
    grid, of_grid = jnp.asarray(table, free.dtype), jnp.asarray(of_psi(table), free.dtype)
    most = math.exp(-0.25 * (FWHM_PER_SIGMA / WIDEST) ** 2)
    lost, kernel = jnp.zeros_like(n), jnp.zeros(3, free.dtype)
    for _ in range(3):
        along, across, up, down = (
            -4.0 * jnp.log(jnp.clip(jnp.interp((one + lost) / (1.0 + lost), of_grid, grid), LEAST, most))
            for one in observed
        )
        skew = jnp.sqrt(along * across)
        kernel = jnp.stack([along, jnp.clip(0.25 * (up - down), -0.9 * skew, 0.9 * skew), across])
        if at.level:
            whole_plane = sum(w / (2 * i + 1) for i, w in enumerate(GAUSSIAN.psi)) * 4.0 * math.pi
            area = whole_plane / jnp.sqrt(kernel[0] * kernel[2] - kernel[1] ** 2)
            # Twice, for the source takes some too: found FWHM are then 2 to 4 % short, 3 to 6 % else.
            lost = jnp.minimum(2.0 * area / n, 0.2)
    return kernel
