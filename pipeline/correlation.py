"""Noise whose pixels are not independent, as radio beams, drizzling and resampling leave it.

The model: Gaussian white noise, smoothed with an elliptical Gaussian. Pixels that are d apart are then correlated by
exp(-d^T K d / 4), K the inverse of the smoothing Gaussian's covariance matrix [pixel^-2]. What a robust fit adds up is
a bounded function of the residuals, correlated less than they are: by Mehler's formula, with the squared Hermite
coefficients of the function as weights,

    corr(f(x), f(y)) = sum_k w_k corr(x, y)^k.

A kernel is an array (3,): Kxx, Kxy, Kyy.
"""

import itertools
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
END = math.exp(-0.25 * (REACH * FWHM_PER_SIGMA) ** 2)  # correlation so far apart, 0.4 %
LEAST = 1e-4  # correlation of neighbours that counts as none


class GaussianNoise(NamedTuple):
    """What Gaussian noise of variance 1 makes of a robust fit.

    half_width : with it chi = (1 - t^2) / (1 + t^2) has mean 0, t = noise / half_width. slope : E psi' over psi'(0),
    psi = t / (1 + t^2). psi, mixed, chi : (10,) weights of Mehler's formula, of the odd powers for psi and for psi with
    chi', and of the even ones for chi and for log(1 + t^2), the loss.
    """

    half_width: float
    slope: float
    psi: np.ndarray
    mixed: np.ndarray
    chi: np.ndarray
    loss: np.ndarray


#: By quadrature (see the test), as numbers: what processors and versions of NumPy round otherwise would be in the bits
#: of every catalogue of correlated noise.
# fmt: off
GAUSSIAN = GaussianNoise(
    half_width=0.612003441788,
    slope=0.187271914102,
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
    loss=np.array([
        0.803501740179, 0.126510086924, 0.038193158438, 0.015251505200, 0.007144184954, 0.003715559900,
        0.002081918263, 0.001233928132, 0.000764262756, 0.000490520879,
    ]),
)
# fmt: on


#: The first of the weights for psi at any half-width: r times a polynomial in r, the square root of E psi' / psi'(0).
#: Also by quadrature, to 0.003. It is 1 where the half-width is far above the noise and psi linear.
LINEAR = 1.5978, -0.4970, 0.0976, -0.1973


def _of_square(correlation, weights):
    return np.polynomial.polynomial.polyval(correlation * correlation, weights)


def of_psi(correlation):
    """Correlation of psi where that of the residuals is ``correlation`` < 1; of NumPy or JAX arrays."""
    return correlation * _of_square(correlation, GAUSSIAN.psi)


def mixed(correlation):
    """E[psi_i chi'_j] over E[psi_i chi'_i] where the correlation of residuals i and j is ``correlation`` < 1."""
    return correlation * _of_square(correlation, GAUSSIAN.mixed)


def of_chi(correlation):
    """Correlation of the scale's scores where that of the residuals is ``correlation`` < 1; likewise."""
    return correlation * correlation * _of_square(correlation, GAUSSIAN.chi)


def of_loss(correlation):
    """Correlation of log(1 + t^2) where that of the residuals is ``correlation`` < 1; likewise."""
    return correlation * correlation * _of_square(correlation, GAUSSIAN.loss)


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


def _lags(reach: int, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dy, dx of a table of lags (k + 1, 2 k + 1), and which count: one of each pair d, -d within ``reach``."""
    k = reach // step
    dy, dx = step * np.mgrid[: k + 1, -k : k + 1]
    return dy, dx, (dx * dx + dy * dy <= reach * reach) & ((dy > 0) | (dx > 0))


def _maps(at: moments.Frame, tile: moments.Tile):
    """The derivatives of the model over the noise, in all free parameters but the scale: (q - 1, ny, nx)."""
    source = [
        factor.astype(tile.shape.dtype) * tile.shape * moments.grid(poly, tile)
        for factor, poly in zip(at.factors, at.slopes, strict=True)
    ]
    return jnp.stack(source + [moments.grid(poly, tile) for poly in at.ground]) * tile.weight[None]


def _of_slope(slope):
    """w_1 and a of `covariance` for Gaussian noise where E psi' / psi'(0), array (), is ``slope``."""
    r = jnp.sqrt(jnp.clip(slope, 0.0, 1.0))
    return r * np.polynomial.polynomial.polyval(r, LINEAR), (1.0 - r * r) / (1.0 - GAUSSIAN.slope)


class Pairs(NamedTuple):
    """Pairs of pixels whose noise goes together: what sums over them need to know.

    kernel : (3,). reach : up to how many pixels apart they are. step : every how many pixels they are taken. dtype : of
    sums.
    """

    kernel: jax.Array
    reach: int
    step: int
    dtype: np.dtype


def _flat(maps):
    return maps.reshape(len(maps), -1)


def _product(left, right, dtype):
    return moments.matmul(_flat(left), _flat(right).T).astype(dtype)


def _at_each(matrix, maps, others):
    """g_i^T matrix g'_i of maps g, g' (k, ny, nx), in each pixel: (ny, nx)."""
    # As a sum over one index: a sum over both is three times as slow.
    found = jnp.sum(moments.matmul(matrix.astype(maps.dtype), _flat(maps)) * _flat(others), axis=0)
    return found.reshape(maps.shape[1:])


def _neighbours(maps, function, pairs: Pairs, own=1.0, end=END):
    """sum_j function(corr(r_i, r_j)) m_j of maps (k, ny, nx), over half of the pairs, and half of a pixel itself.

    ``own`` is the function of a pixel itself; pairs correlated by no more than ``end`` do not count.
    """
    reach, step = pairs.reach, pairs.step
    ny, nx = maps.shape[1:]
    dy, dx, counts = _lags(reach, step)
    squares = (square.astype(pairs.dtype) for square in (dx * dx, 2 * dx * dy, dy * dy))
    correlation = jnp.exp(-0.25 * sum(k * square for k, square in zip(pairs.kernel, squares, strict=True)))
    counts = counts & (correlation > end)
    # Errors need no more digits than float32 has, which takes half the time.
    weights, narrow = jnp.where(counts, function(correlation), 0.0).astype(jnp.float32), maps.astype(jnp.float32)
    padded = jnp.pad(narrow, ((0, 0), (0, reach), (reach, reach)))

    # A row of lags at a time: all of it in one pass over the maps. As many rows as this noise needs; a number not
    # known beforehand also keeps XLA from a form of loops that takes five times as long.
    def add(i, neighbours):
        rows = jax.lax.dynamic_slice_in_dim(padded, i * step, ny, axis=1)
        shifted = (weights[i, j] * rows[:, :, reach + x : reach + x + nx] for j, x in enumerate(dx[0].tolist()))
        return neighbours + sum(shifted)

    rows = jnp.max(jnp.where(counts, dy // step, 0)) + 1
    return jax.lax.fori_loop(0, rows, add, 0.5 * own * narrow).astype(maps.dtype)


def _folded(maps, neighbours, pairs: Pairs):
    """The sum over all pairs, (k, k), of `_neighbours` of maps."""
    half = _product(maps, neighbours, pairs.dtype)
    return pairs.step * pairs.step * (half + half.T)


def _over_pairs(maps, function, pairs: Pairs, own=1.0, end=END):
    """sum_ij function(corr(r_i, r_j)) m_i m_j^T, (k, k) of maps (k, ny, nx)."""
    return _folded(maps, _neighbours(maps, function, pairs, own, end), pairs)


def _higher(maps, weights, pairs: Pairs):
    """`_over_pairs` of what Mehler's formula has with these weights beyond its first power."""
    reach, step = pairs.reach, pairs.step
    # c^3 ends, like c, where it is 0.4 %; no sooner than the image (padded here) if this may have ended c.
    close = reach if 2 * reach >= max(maps.shape[1:]) else step * math.ceil(reach / (math.sqrt(3.0) * step))
    own, end = 1.0 - float(weights[0]), END ** (1.0 / 3.0)
    return _over_pairs(maps, lambda c: c * (_of_square(c, weights) - weights[0]), pairs._replace(reach=close), own, end)


def _sandwich(maps, bump, left, first, steeper, pairs: Pairs):
    """Meat (q, q) and bread (q - 1, q - 1) of `covariance`, and a contrast (q,) of scores.

    ``maps`` (q - 1, ny, nx) are the g, ``bump`` (ny, nx) one direction more, last in the meat; ``left`` (ny, nx) is
    1 - h, ``first`` w_1 and ``steeper`` a. The contrast is what the score of the bump has beyond those of the maps.
    """
    heavy = jnp.concatenate([maps, bump[None]]) * (1.0 + jnp.asarray(steeper, maps.dtype) * (1.0 - left))[None]
    rest = _higher(heavy * jnp.sqrt(left)[None], GAUSSIAN.psi, pairs)
    meat = first * _over_pairs(heavy, lambda c: c, pairs) + (1.0 - first) / (1.0 - GAUSSIAN.psi[0]) * rest
    along = _product(heavy, maps, pairs.dtype)
    bread = inverse(along[:-1])
    return meat, bread, jnp.append(-along[-1] @ bread, 1.0)


class Correlated(NamedTuple):
    """What a fit to correlated noise is like, see `covariance`.

    block : (q - 1, q - 1), the covariance of all but the scale, in the free vector. more : the factor on the variance
    of the scale that independent noise would give it, without correction for the number of parameters. others, mixed :
    tr (sum g_i g_i^T)^-1 sum corr_ij g_i g_j^T, corr_ij as in `of_psi` and `mixed`; q - 1 for independent noise.
    uneven : by how much the logarithm of the scale comes out too small, beyond what these say, because the fit takes
    noise from some pixels and not from others. misfit, misfit_profile : as in `quality.residuals`.
    """

    block: jax.Array
    more: jax.Array
    others: jax.Array
    mixed: jax.Array
    uneven: jax.Array
    misfit: jax.Array
    misfit_profile: jax.Array


def _through(values, taken):
    """A function of a share 0 to 1 from its values at equal steps from 0 to 1: Newton's polynomial through these."""
    differences, row = [], list(values)
    while row:
        differences.append(row[0].astype(taken.dtype))
        row = [after - before for before, after in itertools.pairwise(row)]
    at = taken * float(len(values) - 1)
    found = jnp.zeros_like(taken)
    for i, difference in reversed(list(enumerate(differences))):
        found = difference + found * (at - float(i)) / float(i + 1)
    return found


def covariance(free, image: likelihood.Image, n, kernel, reach: int, fit_scale: bool) -> Correlated:
    """How far the fit to correlated noise may be off, and whether what is left is noise.

    Parameters
    ----------
    free : sequence of q scalars
        The free vector.
    image : likelihood.Image
    n : array ()
        Number of used pixels.
    kernel : array (3,)
    reach : int
        Most pixels that a pair is apart.
    fit_scale : bool
        Whether the scale is fitted.

    Notes
    -----
    With g the gradient of the model over the noise, r the residuals and sums over pixels and pairs of pixels,

        cov = E psi^2 / (E psi')^2 A^-1 [sum c_ij W_i g_i W_j g_j^T] A^-1,  A = sum W_i g_i g_i^T,
        c_ij = w_1 corr(r_i, r_j) + [corr(psi_i, psi_j) - w_1 corr(r_i, r_j)] sqrt((1 - h_i) (1 - h_j)),
        W_i = 1 + a h_i,

    w_1 the first weight of Mehler's formula. To a source no larger than the noise is correlated noise looks like a part
    of it, and the fit takes it away, the more the larger is h_i = g_i^T M^-1 [sum corr(r_i, r_j) g_i g_j^T] M^-1 g_i,
    M = sum g_i g_i^T, the variance of the fitted model in pixel i over that of the noise; 1 stands for all that is
    larger, as under a source narrower than the noise. In the little that is left psi is linear, and the terms beyond
    its linear part, w_1, vanish; and psi is steeper, so that the fit follows these pixels more than others, W. The
    expectations are of pixels that the fit left alone, weighted by (1 - h)^4, and psi^2 of these is taken for 1 - h of
    what it was (so it is of independent noise; of smooth noise more is left).

    Why these go with h is theory, how fast is measured: on noise of FWHM 2, 3 and 4 pixel (sources of sigma 1.5 to 3.2
    pixel in 32 x 32, S/N 30 to 100) the interval of 68 % of sigma covers 67, 70 and 72 %, that of x0 67, 71 and 69 %,
    of the background 70, 67 and 68 %. With h = 0 that of sigma covers 71, 75 and 77 %.

    a = 1 and w_1 is a constant if the scale is fitted. If it is given, psi is the more linear the larger it is: w_1
    (see `LINEAR`) goes to 1 with the mean slope E psi' / psi'(0), and a to 0 as 1 minus that slope, for so does what
    the slope gains where there is less noise; the other terms of corr(psi_i, psi_j) are those of a fitted scale, made
    to fit w_1. A scale far above the noise is least squares: the constants of a fitted scale would cover 53 to 59 %
    there, not 66 to 70. Of a scale far below the noise errors come out too long.

    ``uneven`` is mean(h^2) / 2, measured: the scale at which the mean of chi vanishes is less than the mean scale of
    what is left.

    Misfit of the profile is the score of one direction more, its variance that of a contrast of scores: on noise of
    FWHM 2 to 6 pixel, of sources that are the model, its standard deviation is 0.93 to 1.17. For misfit the fit takes
    from the variance of pixel i the share 2 g_i^T M^-1 sum_j corr(r_i, r_j) g_j - h_i, and the mean and the variance of
    the loss of what it leaves are those of the pixels left alone, had their residuals been as much smaller. What it
    leaves is correlated over shorter ways than noise is, which is not allowed for: the standard deviation is 0.5 to 1,
    the mean 0.3 to -0.7 (-1.3 on 8 x 8 pixels), so limits meant for 1 and 0 are safe. They are not where a stamp is
    no wider than the noise, or where a given scale is a third of its standard deviation (-1.7) or less (a tenth: -4).
    """
    at = moments.frame(free, image)
    tile = moments.tile(at, image.data, image.weight, 0)
    used = (image.weight > 0).astype(image.weight.dtype)
    maps = _maps(at, tile)
    pairs = Pairs(kernel, reach, int(_step(reach)), free[0].dtype)

    def whole(map_):
        return jnp.sum(map_.astype(free[0].dtype))

    after = _neighbours(maps, lambda c: c, pairs)
    before = _neighbours(maps[:, ::-1, ::-1], lambda c: c, pairs)[:, ::-1, ::-1]
    plain, linear = inverse(_product(maps, maps, free[0].dtype)), _folded(maps, after, pairs)
    share = _at_each(plain @ linear @ plain, maps, maps)
    left = jnp.maximum(1.0 - share, 0.0)
    alone, s = used * left**4, tile.t * tile.t * tile.v
    q1, q2 = (whole(alone * power) for power in (s, s * s))
    count, noise = whole(alone), whole(alone * left)
    # psi^2 = 4 (s - s^2) and psi' = 2 - 6 s + 4 s^2, over the half-width and its square.
    slope = 1.0 - (3.0 * q1 - 2.0 * q2) / count
    ratio = (q1 - q2) / noise * (jnp.exp(free[-1]) / slope) ** 2
    first, steeper = (GAUSSIAN.psi[0], 1.0) if fit_scale else _of_slope(slope)

    bump = tile.weight * moments.bump(tile, at)
    meat, bread, contrast = _sandwich(maps, bump, left, first, steeper, pairs)
    new = (q1 - q2) / noise * (contrast @ meat @ contrast)

    taken = jnp.clip(2.0 * pairs.step**2 * _at_each(plain, maps, after + before) - share, 0.0, 1.0)
    losses = [jnp.log1p((1.0 - k / 5.0) * tile.t * tile.t) for k in range(6)]
    means = [whole(alone * loss) / count for loss in losses]
    variances = [whole(alone * loss * loss) / count - mean * mean for loss, mean in zip(losses, means, strict=True)]
    spread = jnp.sqrt(jnp.maximum(_through([variance / variances[0] for variance in variances], taken), 0.0))
    over = used * (tile.shape - (whole(used * tile.shape) / n).astype(used.dtype))
    excess = whole(over * (losses[0] - _through(means, taken)))

    more = n / (n - jnp.sum(plain * linear) - float(fit_scale))
    others, others_mixed = (
        jnp.sum(plain * (weights[0] * linear + _higher(maps, weights, pairs)))
        for weights in (GAUSSIAN.psi, GAUSSIAN.mixed)
    )
    return Correlated(
        block=ratio * bread @ meat[:-1, :-1] @ bread,
        more=more * _over_pairs(used[None], of_chi, pairs)[0, 0] / n,
        others=others,
        mixed=others_mixed,
        uneven=0.5 * whole(used * share * share) / n,
        misfit=excess / jnp.sqrt(variances[0] * _over_pairs((over * spread)[None], of_loss, pairs)[0, 0]),
        misfit_profile=whole(tile.t * tile.v * bump) / jnp.sqrt(new),
    )


def estimate(free, image: likelihood.Image, n):
    """The kernel (3,) that explains how residuals of neighbouring pixels go together, at a solution.

    From psi, which outliers do not move, of pixels outside the source: the fit has made the residuals under it smaller.
    The fitted background takes the mean of all correlations away, which is put back.

    free : sequence of q scalars. image : likelihood.Image. n : number of used pixels.
    """
    at = moments.frame(free, image)
    tile = moments.tile(at, image.data, image.weight, 0)
    outside = jnp.where(image.weight > 0, 1.0 - tile.shape, 0.0).astype(tile.t.dtype)
    psi = outside * tile.t * tile.v
    ny, nx = psi.shape

    def covariance(dy, dx):
        def product(a):
            left = a[: ny - dy, max(0, -dx) : nx - max(0, dx)]
            right = a[dy:, max(0, dx) : nx + min(0, dx)]
            return jnp.sum((left * right).astype(free[0].dtype))

        return product(psi) / jnp.maximum(product(outside), 1e-12)

    whole, *lagged = [covariance(*lag) for lag in ((0, 0), (0, 1), (1, 0), (1, 1), (1, -1))]
    observed = [one / jnp.maximum(whole, 1e-300) for one in lagged]
    table = np.linspace(0.0, 1.0, 513)
    grid, of_grid = jnp.asarray(table, free[0].dtype), jnp.asarray(of_psi(table), free[0].dtype)
    most = math.exp(-0.25 * (FWHM_PER_SIGMA / WIDEST) ** 2)
    lost, kernel = jnp.zeros_like(n), jnp.zeros(3, free[0].dtype)
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
