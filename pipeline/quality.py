"""What a fit says about itself: outliers, misfit, condition, flags. One image."""

import jax.numpy as jnp

from pipeline import columns, likelihood, model, moments, uncertainty

OUTLIER = 10.0  # half-widths


def residuals(free, image: likelihood.Image, n, four: uncertainty.Covariances):
    """Share of outliers, misfit and misfit of the profile at a solution. Three scalars.

    Outliers are used pixels with |residual| > 10 half-widths (6 % for Cauchy noise, none for Gaussian). Both misfits
    have mean 0 and variance 1 where t = residual / half-width has one distribution all over the image and pixels are
    independent; where noise is correlated, misfit is off by -1.3 to 0.3 and narrower (see `correlation.covariance`).

    Misfit tells whether residuals under the source are as large as those around it: the correlation of log(1 + t^2)
    with the shape E of the source, times the root of n. The fit has made residuals smaller where it could follow them,
    by h E[psi^2] / (2 E[psi']) at a pixel of leverage h, which is put back. It finds sources that are bright and no
    Gaussian at all: saturated ones, and blends.

    Misfit of the profile tells whether what is left looks like a source with more peak and wings than a Gaussian (+) or
    less (-): Rao's score of the term (log E)^2 E, beside the parameters of the model. As large residuals do not count,
    it finds what is nearly a Gaussian at S/N of some ten to some hundred.

    Parameters
    ----------
    free : sequence of q scalars
    image : likelihood.Image
    n : scalar
        Number of used pixels.
    four : uncertainty.Covariances
    """
    at = moments.frame(free, image)

    def outliers(tile):
        return moments.Sum((jnp.abs(tile.t) > OUTLIER).astype(tile.v.dtype))

    if four.misfits is not None:
        return moments.total(outliers, at, image) / n, *four.misfits

    def asked(tile):
        loss = -jnp.log(tile.v.astype(jnp.float32)).astype(tile.v.dtype)  # 0 where unused; float32 is near enough
        bump = tile.weight * moments.bump(tile, at)
        return {
            "outliers": outliers(tile),
            "losses": [*map(moments.Sum, (loss, tile.shape * loss, loss * loss))],
            "score": moments.Sum(tile.t * tile.v * bump),
            "bump": moments.Sum(bump * bump),
        }

    found = moments.total(asked, at, image)
    loss, wl, ll = found["losses"]
    w, ww, wh = four.shape_sums
    # Rounding may leave a negative square where all are equal.
    spread = jnp.maximum(ww - w * w / n, 0.0) * jnp.maximum(ll - loss * loss / n, 0.0)
    taken = 0.5 * four.spread * (wh - w / n * len(four.inverse_products))
    square = moments.multiply(at.slopes[3], at.slopes[3])  # that of `moments.bump`
    along = jnp.stack(moments.slopes_times(square, at, four.tables))
    new = jnp.maximum(found["bump"] - jnp.sum(moments.dot(four.inverse_products, along) * along), 0.0)
    q1, q2 = four.powers[:2]
    misfit = (wl - w * loss / n + taken) * jnp.sqrt(n / spread)
    return found["outliers"] / n, misfit, found["score"] / jnp.sqrt((q1 - q2) * new)


def condition(hessian, covariance):
    """Condition number, in the 1-norm, of a Hessian (p, p) scaled to unit diagonal; ``covariance`` is its inverse."""
    size = jnp.sqrt(jnp.diag(hessian))
    outer = size[:, None] * size[None, :]
    norms = [jnp.max(jnp.sum(jnp.abs(matrix), axis=0)) for matrix in (hessian / outer, covariance * outer)]
    return norms[0] * norms[1]


def peak_used(public, image: likelihood.Image, shape):
    """Whether the pixel nearest to the centre is one that counts. shape : (2,) ny, nx without padding."""
    last = shape.astype(public.dtype) - 1.0
    row = jnp.clip(jnp.nan_to_num(jnp.round(public[1])), 0.0, last[0]).astype(int)
    column = jnp.clip(jnp.nan_to_num(jnp.round(public[0])), 0.0, last[1]).astype(int)
    return image.weight[row, column] > 0


def flags(found, ellipticity_error, shape):
    """Bits of `pipeline.columns.FLAGS` that the fit itself can tell. int64 ().

    found : `pipeline.program.Solution`; of its bools ``enough`` tells whether there are pixels enough to fit,
    ``positive`` whether the Hessian is positive definite, ``degenerate`` whether too many pixels are equal for a scale.
    shape : (2,) ny, nx of the image without its padding.
    """
    public, errors, enough = found.public, found.errors, found.enough
    x0, y0, amp, sigma = (public[i] for i in range(4))
    e = model.ellipticity(public[:6])
    major = sigma / jnp.sqrt(1.0 - e)
    ny, nx = shape[0].astype(x0.dtype), shape[1].astype(x0.dtype)
    edge = jnp.minimum(jnp.minimum(x0 + 0.5, nx - 0.5 - x0), jnp.minimum(y0 + 0.5, ny - 0.5 - y0))
    conditions = {
        "NOT_CONVERGED": enough & ~found.converged,
        "HESSIAN_NOT_POSITIVE": enough & ~found.positive,
        "NEAR_EDGE": enough & ~(edge >= major),
        # Without noise the error vanishes with e itself.
        "ROUND": enough & ~(e >= columns.ROUND_ERRORS * ellipticity_error + 1e-6),
        "TOO_FEW_PIXELS": ~enough,
        "NON_FINITE": ~(jnp.all(jnp.isfinite(public)) & jnp.all(jnp.isfinite(errors))),
        # One that is undefined is none that is small.
        "MISFIT": enough
        & ~(
            (jnp.abs(found.misfit) <= columns.MISFIT_SIGMAS) & (jnp.abs(found.misfit_profile) <= columns.MISFIT_SIGMAS)
        ),
        "MASKED_PEAK": enough & ~found.peak_used,
        "AT_LIMIT": enough
        & (
            (sigma < columns.MIN_SIGMA)
            | (sigma > jnp.maximum(ny, nx))
            | (e > columns.MAX_ELLIPTICITY)
            | found.degenerate
        ),
        "LOW_SNR": enough & ~(jnp.abs(amp) >= columns.LOW_SNR * errors[2]),
    }
    return sum((jnp.where(on, columns.BIT[name], 0) for name, on in conditions.items()), start=jnp.int64(0))
