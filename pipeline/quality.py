"""What a fit says about itself: outliers, misfit, condition, flags. One image."""

import jax.numpy as jnp

from pipeline import columns, likelihood, model, moments

OUTLIER = 10.0  # half-widths


def residuals(free, image: likelihood.Image, n):
    """Share of outliers and misfit of the residuals at ``free``, a sequence of p scalars; n used pixels. Two scalars.

    Outliers are used pixels with |residual| > 10 half-widths (6 % for Cauchy noise, none for Gaussian).

    Misfit tells whether residuals under the source are like those around it, in standard deviations: the correlation
    of log(1 + t^2), t = residual / half-width, with the shape of the source, times the root of the number of degrees of
    freedom: zero mean and unit variance when t has one distribution all over the image. An undersampled, blended,
    saturated or non-Gaussian source leaves large residuals where it is bright.
    """
    at = moments.frame(free, image)

    def sums(tile):
        used = (tile.weight > 0).astype(tile.v.dtype)
        loss = -jnp.log(tile.v.astype(jnp.float32)).astype(tile.v.dtype)  # 0 where unused; float32 is near enough
        shape = used * tile.shape
        outliers = jnp.sum(jnp.where(jnp.abs(tile.t) > OUTLIER, 1.0, 0.0))
        return [outliers, *map(jnp.sum, (shape, loss, shape * tile.shape, shape * loss, loss * loss))]

    outliers, w, loss, ww, wl, ll = (total.astype(n.dtype) for total in moments.total(sums, at, image))
    # Rounding may leave a negative square where all are equal.
    spread = jnp.maximum(ww - w * w / n, 0.0) * jnp.maximum(ll - loss * loss / n, 0.0)
    return outliers / n, (wl - w * loss / n) * jnp.sqrt(n / spread)


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
        "MISFIT": enough & ~(jnp.abs(found.misfit) <= columns.MISFIT_SIGMAS),
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
