"""Covariances of the fitted parameters of one image, and errors of what is derived from them.

The four covariances of the contract: ``hessian`` (inverse observed information), ``fisher`` (the Cramer-Rao bound for
Cauchy noise), ``sandwich`` (H^-1 S H^-1, S the sum of outer products of the pixels' scores) and ``pooled`` (Huber's
form: it assumes no more than that residual / noise has one distribution all over the image).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pipeline import correlation, likelihood, model, moments
from pipeline.newton import inverse


class Covariances(NamedTuple):
    """Four covariances (p, p) of the fitted parameters; NaN where one is undefined. ``hessian_matrix`` is H itself.

    ``bias`` (p,) is what to expect of the fitted parameters beyond the truth, see `_bias` and `scale_bias`.
    ``inverse_products`` (q - 1, q - 1) is M^-1 of `covariances`, in the free vector; ``tables`` and ``powers`` are
    those of `Sums`; ``shape_sums`` (3,) of the shape E of the source, of E^2, and of E times the leverage, over the
    used pixels, NaN for correlated noise. ``misfits``, two, are those of correlated noise, see `quality.residuals`, and
    None else. ``kernel_fwhm`` tells how far noise is correlated, NaN = not asked. ``nll`` is the value there, without
    what the noise map adds to it; ``newton_step`` (p,) H^-1 times the gradient, what is left to the minimum,
    ``decrement`` half the gradient times that, and ``spread`` as in `moments.Step`.
    """

    pooled: jax.Array
    sandwich: jax.Array
    hessian: jax.Array
    fisher: jax.Array
    bias: jax.Array
    hessian_matrix: jax.Array
    inverse_products: jax.Array
    tables: list
    powers: list
    shape_sums: jax.Array
    misfits: tuple[jax.Array, jax.Array] | None
    kernel_fwhm: jax.Array
    nll: jax.Array
    newton_step: jax.Array
    decrement: jax.Array
    spread: jax.Array


def dense(lower: dict, size: int):
    """The symmetric matrix (size, size) of a lower triangle {(row, column): entry}."""
    return jnp.stack([lower[max(i, j), min(i, j)] for i in range(size) for j in range(size)]).reshape(size, size)


def _leverage(at: moments.Frame, inverse_products) -> tuple[dict, dict, dict]:
    """Polynomials L4, L2, L0 with M_i^T A M_i = (L4 E^2 + L2 E + L0) weight^2 at each pixel, A (p, p) symmetric."""
    source, ground = moments.coefficients(at)

    def between(left, block, right):
        weights = moments.dot(moments.dot(left.T, block.T), right.T)
        found: dict = {}
        for a in range(left.shape[1]):
            for b in range(right.shape[1]):
                key = tuple(np.add(moments.MONOMIALS[a], moments.MONOMIALS[b]).tolist())
                found[key] = found.get(key, 0.0) + weights[a, b]
        return found

    own, cross, level = inverse_products[:6, :6], 2.0 * inverse_products[6:, :6], inverse_products[6:, 6:]
    return between(source, own, source), between(ground, cross, source), between(ground, level, ground)


class Sums(NamedTuple):
    """What the covariances are made of, at one place; matrices and gradient in the free vector (q,).

    nll : without the sum of log u, u the noise map, which does not depend on the parameters.
    scores : (q, q), the sum of outer products of the pixels' gradients. products : (q - 1, q - 1), the sum of
    grad m grad m^T / u^2, u the noise map. tables : what it is made of, `pipeline.moments.tables` of 1 / u^2, two
    degrees higher than it takes. powers : the means of s, s^2, s^3, s^4 over the used pixels, where
    s = t^2 / (1 + t^2) and t is the residual over the half-width.
    """

    nll: jax.Array
    gradient: jax.Array
    hessian: jax.Array
    scores: jax.Array
    products: jax.Array
    tables: list
    powers: list


def sums(free, image: likelihood.Image, n) -> Sums:
    """`Sums` at ``free``; arguments as those of `covariances`."""
    q = len(free)
    at = moments.frame(free, image)
    step = moments.step(free, image, n, free[-1], jnp.asarray(True), fit_scale=True)

    def of(tile):
        square = tile.weight * tile.weight
        score = tile.weight * tile.v * tile.t
        return {
            "powers": [moments.Sum(tile.s**k) for k in (3, 4)],
            "products": moments.tables(square, tile, at, more=2),
            "scores": moments.tables(score * score, tile, at),
        }

    found = moments.total(of, at, image)
    # A pixel's score in log scale is 1 - 2 s = 2 v - 1, and 4 s v its derivative there; the score in p_i is
    # -psi d m / d p_i, and -2 v times it its derivative in log scale: products of scores are sums of these.
    s, sv = 0.5 * (n - step.gradient[-1]), 0.25 * step.matrix[q - 1, q - 1]
    powers = [s / n, (s - sv) / n, *(power / n for power in found["powers"])]
    cross = -jnp.stack([step.matrix[q - 1, i] + step.gradient[i] for i in range(q - 1)])
    of_scale = n - 4.0 * sv  # (1 - 2 s)^2, summed
    scores = moments.products(at, found["scores"]) * (2.0 / at.scale) ** 2
    scores = jnp.block([[scores, cross[:, None]], [cross[None, :], of_scale]])
    return Sums(
        nll=step.nll + n * jnp.log(jnp.pi),
        gradient=jnp.stack(step.gradient),
        hessian=dense(step.matrix, q),
        scores=scores,
        products=moments.products(at, found["products"]),
        tables=found["products"],
        powers=powers,
    )


#: By this over snr^2 the variance of places and shapes exceeds what derivatives at the solution say; see `covariances`.
FAINT = 8.0


def _stretch(block, amp):
    """A covariance (q - 1, q - 1) in the free vector with what is not linear in faint sources, see FAINT."""
    more = jnp.sqrt(1.0 + FAINT * jnp.minimum(block[2, 2] / amp**2, 1.0))
    side = jnp.ones(len(block), block.dtype).at[:6].set(more).at[2].set(1.0)
    return block * side[:, None] * side[None, :]


def _independent(at: moments.Frame, image: likelihood.Image, here: Sums, inverse_products):
    """M^-1 [sum (1 + k h_i) M_i M_i^T] M^-1 of `covariances`, (q - 1, q - 1); and `shape_sums`."""
    lever = _leverage(at, inverse_products)

    def of(tile):
        square = tile.weight * tile.weight
        levers = moments.grid(lever[0], tile) * tile.shape
        if at.level:
            levers = levers + moments.grid(lever[1], tile)
        levers = levers * tile.shape
        if at.level:
            levers = levers + moments.grid(lever[2], tile)
        levers = square * levers
        seen = jnp.where(tile.weight > 0, tile.shape, 0.0)
        return moments.tables(square * levers, tile, at), [*map(moments.Sum, (seen, seen * tile.shape, levers * seen))]

    tables, shape_sums = moments.total(of, at, image)
    middle = here.products + inflation(here.powers) * moments.products(at, tables)
    return moments.enclosed(inverse_products, middle), jnp.stack(shape_sums)


def covariances(free, image: likelihood.Image, n, fit_scale: bool, kernel=None, reach: int = 0) -> Covariances:
    """The four covariances, in public parameters, at a solution.

    Parameters
    ----------
    free : sequence of q scalars
        The free vector, the logarithm of the scale last, fitted or not.
    image : likelihood.Image
    n : array ()
        Number of used pixels.
    fit_scale : bool
        Whether the scale is one of the p fitted parameters (p = q) or held (p = q - 1).
    kernel : array (3,), optional
        How the noise is correlated, see `pipeline.correlation`; NaN = to be found out. None = not at all.
    reach : int
        Up to how many pixels apart noise is correlated.

    Notes
    -----
    pooled: with a = psi u, a' = psi' u^2 (u the noise map) and M_i = grad m_i / u_i,
    cov = [sum a^2 / (n - p)] / mean(a')^2 * M^-1 [sum (1 + k h_i) M_i M_i^T] M^-1, M = sum M_i M_i^T, where
    h_i = M_i^T M^-1 M_i is the leverage and k is `inflation`. It is Huber's form (Robust Statistics, section 7.6) with
    the correction put where the leverage is, because a small source has only some 4 pi sigma^2 pixels of its own.
    The scale is uncorrelated with the rest for symmetric noise; its variance is that of a one-parameter M-estimator,
    made longer by its bias, a third of its error on 32 x 32 pixels, so that the error holds of the truth (`of_biased`).
    Places and shapes of faint sources scatter more than derivatives at the solution tell; their variance is made
    1 + FAINT / snr^2 times as large. Measured, not derived: with 0 the interval of 68 % of sigma, rho and diff covers
    66 to 67 % at S/N 10 to 30 and 58 % at 5 to 6.5, with 8 these are 67 to 68 and 64 %.
    Where noise is correlated, sums over pixels become sums over pairs of them, with other corrections, see
    `correlation.covariance`. The other three covariances know nothing of it.
    """
    q = len(free)
    p = q if fit_scale else q - 1
    public = likelihood.to_public(jnp.stack(free))
    scale = public[-1]
    here = sums(free, image, n)
    observed, scores = likelihood.to_public_matrices(public, here.gradient, here.hessian, here.scores)
    hessian_matrix = observed[:p, :p]
    hessian = inverse(hessian_matrix)
    sandwich = moments.enclosed(hessian, scores[:p, :p])

    inverse_products = inverse(here.products)
    at = moments.frame(free, image)
    # Log sigma and log scale to sigma and scale; what follows is linear in the derivatives.
    slope = jnp.ones(q, public.dtype).at[3].set(public[3]).at[-1].set(scale)

    def with_scale(block, log_scale_variance):
        full = jnp.zeros((q, q), block.dtype).at[: q - 1, : q - 1].set(block).at[-1, -1].set(log_scale_variance)
        return (full * slope[:, None] * slope[None, :])[:p, :p]

    q1, q2 = here.powers[:2]
    # a^2 = 4 (s - s^2) / scale^2 and a' = (2 - 6 s + 4 s^2) / scale^2.
    ratio = 4.0 * (q1 - q2) * (scale / (2.0 - 6.0 * q1 + 4.0 * q2)) ** 2
    # l = scale * d nll / d scale = 1 - 2 s for a pixel, and scale^2 * d2 nll / d scale^2 = 4 (s - s^2) - l.
    variance = (1.0 - 4.0 * (q1 - q2)) / (6.0 * q1 - 4.0 * q2 - 1.0) ** 2
    if kernel is None:
        block, shape_sums = _independent(at, image, here, inverse_products)
        # Leverage makes bias larger as it does variance: of small sources in Cauchy noise a fifth would else be left.
        larger = jnp.diag(block) / jnp.diag(inverse_products)
        block = _stretch(ratio * n / (n - p) * block, free[2])
        variance, of_scale = variance / (n - p), scale_bias(here.powers, n, q - 1.0, q - 1.0)
        kernel_fwhm, misfits = jnp.asarray(jnp.nan, public.dtype), None
    else:
        kernel = jnp.where(jnp.isnan(kernel), correlation.estimate(free, image, n), kernel)
        found = correlation.covariance(free, image, n, kernel, reach, fit_scale)
        block, shape_sums, larger = found.block, jnp.full(3, jnp.nan, public.dtype), jnp.ones((), public.dtype)
        variance = found.more * variance / n
        of_scale = scale_bias(here.powers, n, found.others, found.mixed, found.more) - found.uneven
        kernel_fwhm, misfits = correlation.kernel_fwhm(kernel), (found.misfit, found.misfit_profile)
    # From log sigma to sigma: the mean of exp(a) is exp(mean a + var a / 2).
    curved = jnp.zeros(q, public.dtype).at[3].set(0.5 * block[3, 3]).at[-1].set(0.5 * variance)
    expected = jnp.append(larger * _bias(at, here.tables, inverse_products, block), of_scale) + curved
    # Not more, also where errors are made longer by it: the scale of correlated noise would have 72 % within one.
    expected = within(expected, jnp.sqrt(jnp.append(jnp.diag(block), variance)))
    gradient = (here.gradient / slope)[:p]
    rest = moments.dot(hessian, gradient)
    return Covariances(
        pooled=_proper(with_scale(block, variance * of_biased(expected[-1] / jnp.sqrt(variance)) ** 2)),
        sandwich=_proper(sandwich),
        hessian=hessian,
        fisher=with_scale(2.0 * scale * scale * inverse_products, 2.0 / n),
        bias=(expected * slope)[:p],
        hessian_matrix=hessian_matrix,
        inverse_products=inverse_products,
        tables=here.tables,
        powers=here.powers,
        shape_sums=shape_sums,
        misfits=misfits,
        kernel_fwhm=kernel_fwhm,
        nll=here.nll,
        newton_step=rest,
        decrement=0.5 * jnp.sum(gradient * rest),
        spread=moments.spread(n * q1, n * (q1 - q2), n),
    )


def _proper(covariance):
    """NaN where rounding has left a variance that is none: where the matrix that is inverted is nearly singular."""
    return jnp.where(jnp.all(jnp.diag(covariance) >= 0.0), covariance, jnp.nan)


def of_biased(bias):
    """By how much an error must be longer to hold 68.3 % of all truths, from the bias in units of it, of 1 at most.

    To second order 1 + bias^2 / 2, and off by less than 0.03: the root of 1 + bias^2 is 0.03 short at 0.75 and 0.08 at
    1, where nearly all of it is what holds 68.3 % on one side.
    """
    return 1.0 + 0.5 * bias * bias


def _bias(at: moments.Frame, tables: list, inverse_products, covariance):
    """The bias of second order of all parameters but the scale, in the free vector; (q - 1,).

    -1/2 M^-1 sum M_i tr(cov grad grad m_i) / u_i (Box 1971, J. R. Stat. Soc. B 33, 171, for least squares). It holds
    for any M-estimator with symmetric noise: what curvature and noise do together cancels but for this term.
    """
    poly: moments.Polynomial = {}
    for i in range(6):
        for j in range(i + 1):
            # amp is no factor of a second derivative in amp.
            size = covariance[i, j] * (1.0 if i == j else 2.0) * (1.0 if 2 in (i, j) else at.amp)
            parts = moments.multiply(at.slopes[i], at.slopes[j]), at.bends.get((i, j), {})
            for key, value in (item for part in parts for item in part.items()):
                poly[key] = poly.get(key, 0.0) + size * value

    return -0.5 * moments.dot(inverse_products, jnp.stack(moments.slopes_times(poly, at, tables)))


def scale_bias(powers, n, others, mixed, more=1.0):
    """The bias of second order of the logarithm of the scale. Scalar.

    The scale solves sum chi(t) = 0 with chi = 1 - 2 s. Expanded to second order in its own error e and in those of the
    p ``others``, which are uncorrelated with it for symmetric noise, with D = E[t chi'],

        n D E[e] = -E[t chi' chi] / D + (D + E[t^2 chi'']) E[chi^2] / (2 D^2)
                   - p E[chi' psi] / E[psi'] + p E[chi''] E[psi^2] / (2 E[psi']^2).

    powers : as in `inflation`. n : number of used pixels. others, mixed, more : p in the last term, p in the one before
    it, and a factor on the first two; where noise is correlated, what `correlation.covariance` says of them.
    """
    q1, q2, q3, _ = powers
    d = -4.0 * (q1 - q2)
    own = (
        4.0 * (q1 - 3.0 * q2 + 2.0 * q3) / d
        + 0.5 * (d - 4.0 * (q1 - 5.0 * q2 + 4.0 * q3)) * (1.0 - 4.0 * (q1 - q2)) / d**2
    )
    a = 2.0 - 6.0 * q1 + 4.0 * q2
    theirs = mixed * 8.0 * (q1 - 2.0 * q2 + q3) / a
    theirs -= others * 8.0 * (1.0 - 6.0 * q1 + 9.0 * q2 - 4.0 * q3) * (q1 - q2) / a**2
    return (more * own + theirs) / (n * d)


def inflation(powers):
    """How much the variance of an M-estimator exceeds its limit for many pixels, per unit of leverage. Scalar, >= 0.

    From the second-order expansion of a location T with sum psi(r - T) = 0, for symmetric noise: with psi_k the k-th
    derivative of psi, A = E psi_1, B = E psi^2 and C = var psi_1,

        n A^2 var(T) / B = 1 + k / n,
        k = 3 C / A^2 - 2 E[psi^2 (psi_1 - A)] / (A B) + 3 E[psi psi_2] / A^2 - E[psi_3] B / A^3.

    k is 2.5 for Cauchy noise fitted with its own scale, 1.2 for Student's t with 3 degrees of freedom, 0.1 for
    Gaussian noise; C / A^2 alone, which is 2.5, 3.4 and 4.1, would be right for Cauchy noise only. The expectations
    are means over the used pixels.

    powers : the means of s, s^2, s^3 and s^4 with s = t^2 / (1 + t^2), t the residual over the half-width, of which all
    these are sums: psi^2 = 4 (s - s^2), psi_1 = 2 - 6 s + 4 s^2, and so on.
    """
    q1, q2, q3, q4 = powers
    slope = 4.0 * q2 - 6.0 * q1
    a, b = 2.0 + slope, 4.0 * (q1 - q2)
    c = 36.0 * q2 - 48.0 * q3 + 16.0 * q4 - slope * slope
    d = 8.0 * q1 - 32.0 * q2 + 40.0 * q3 - 16.0 * q4 - a * b
    psi_psi_2 = -24.0 * q1 + 80.0 * q2 - 88.0 * q3 + 32.0 * q4
    psi_3 = -12.0 + 120.0 * q1 - 300.0 * q2 + 288.0 * q3 - 96.0 * q4
    k = 3.0 * c / a**2 - 2.0 * d / (a * b) + 3.0 * psi_psi_2 / a**2 - psi_3 * b / a**3
    return jnp.maximum(k, 0.0)


def propagate(function, params, covariance):
    """Values and standard errors of ``function(params)`` by the delta method with the full covariance.

    Parameters
    ----------
    function : callable
        (k,) -> (d,), differentiable by JAX.
    params : array (k,)
    covariance : array (k, k)

    Returns
    -------
    values, errors : lists of d scalars
        Scalars, and nothing stacked: then all of a batch is computed by the same instructions, and the last bit does
        not depend on the place in it.
    """
    k = params.shape[0]
    values, linear = jax.linearize(function, params)
    slopes = [linear(direction) for direction in jnp.eye(k, dtype=params.dtype)]
    variances = [
        sum(slopes[i][d] * slopes[j][d] * covariance[i, j] for i in range(k) for j in range(k))
        for d in range(values.shape[0])
    ]
    return list(values), [jnp.sqrt(variance) for variance in variances]


def direction_error(linear):
    """Standard error [rad] of the direction of an axis, from that of the delta method.

    The ellipticity e and twice the angle are polar coordinates of a vector. The component of the found vector across
    the true direction, e sin 2 dtheta, is normal around 0 whatever the true ellipticity (Fieller 1954, J. R. Stat. Soc.
    B 16, 175), with an error that is 2 e times the linear one. So |sin 2 dtheta| < 2 linear holds 68.3 % of all truths.
    Where e is below `model.UNDIRECTED` of its errors that is no limit, and the error pi / 2: all directions. Without it
    the limit above would hold 54 % at the worst, of round sources; with it 62 to 69 %. The linear error alone holds 35.
    Intervals of other levels: `model.direction_pull`.
    """
    sine = jnp.minimum(2.0 * linear, 1.0)
    return jnp.where(2.0 * linear > 1.0 / model.UNDIRECTED, 0.5 * jnp.pi, 0.5 * jnp.arcsin(sine))


#: Least share of an ellipticity that `rounder` leaves: of one below its error the second order says nothing.
LEAST_ROUND = 0.5


def rounder(source, covariance):
    """A source (6,) without the bias of second order of its ellipticity; and the share that is left of that.

    The length of a vector comes out too large, by half of the variance across it over the length.
    """
    x, y = source[5], 0.5 * source[4]
    xx, xy, yy = covariance[5, 5], 0.5 * covariance[5, 4], 0.25 * covariance[4, 4]
    square = jnp.maximum(x * x + y * y, 1e-30)
    across = (y * y * xx - 2.0 * x * y * xy + x * x * yy) / square
    # No covariance, but one of a matrix that is not positive, would make it more than all.
    share = jnp.clip(1.0 - 0.5 * across / square, LEAST_ROUND, 1.0)
    return jnp.concatenate([source[:4], share * source[4:]]), share


def derived(source, covariance):
    """What `model.derived` says of a source (6,) with this covariance (6, 6), and how well it is known.

    Returns values and standard errors in the order of `pipeline.columns.DERIVED`, two lists of scalars, and the error
    of `model.ellipticity`. The longer an axis, the longer its error: errors of widths, and of the flux that is made of
    them, are those of the source as it is without bias, see `rounder`. Else those of Cauchy noise at S/N 10 to 30 hold
    69.6 % of true major axes and 67.8 % of minor ones, and two of them 96.0 and 94.2 %; at S/N 5 to 10 69 and 61 %.
    What these hold, docs/calibration.md says: about the same of both axes.
    """
    place, share = rounder(source, covariance)
    _, (*errors, e_err) = propagate(
        lambda one: jnp.concatenate([model.derived(one), model.ellipticity(one)[None]]), place, covariance
    )
    # The direction is that of the source as it was found.
    errors[-1] = direction_error(errors[-1] * share)
    values = model.derived(source)
    return [values[i] for i in range(values.shape[0])], errors, e_err


#: The mean length of a vector of two random components, in units of the error of one: the bias of a round source.
ROUND_BIAS = math.sqrt(0.5 * math.pi)


def derived_bias(source, covariance, bias):
    """The bias of second order of what `model.derived` says of a source (6,), but of the angle: a list of scalars.

    To that of the parameters, ``bias`` (6,), comes half the trace of the second derivatives times ``covariance``
    (6, 6). An ellipticity is the length of a vector: of a source that is rounder than its errors it comes out too
    large, and no function of it is without bias. What is more than noise alone can do is cut off: ROUND_BIAS errors of
    a width, and one of the flux.
    """
    _, errors, _ = derived(source, covariance)
    _, linear = jax.linearize(model.derived, source)
    # Of x0 and y0 there are no derivatives.
    bends = [
        jax.jvp(lambda at, unit=unit: jax.jvp(model.derived, (at,), (unit,))[1], (source,), (row,))[1]
        for unit, row in zip(jnp.eye(6, dtype=source.dtype)[2:], covariance[2:], strict=True)
    ]
    first = linear(bias)
    most = [errors[0], *(ROUND_BIAS * error for error in errors[1:5])]
    return [within(first[i] + 0.5 * sum(bend[i] for bend in bends), most[i]) for i in range(5)]


def within(bias, error):
    """A bias, but no more than an error: beyond it the second order is not enough, and tells its sign at most."""
    return jnp.clip(bias, -error, error)
