"""What a fit says about itself: outliers, misfit, condition, flags. One image."""

import jax.numpy as jnp

from pipeline import columns, likelihood, model

OUTLIER = 10.0  # half-widths


def outlier_fraction(public, image: likelihood.Image):
    """Share of the used pixels with |residual| > 10 half-widths (6 % for Cauchy noise, none for Gaussian)."""
    t = (image.data - likelihood.predict(public, image)) / (public[-1] * image.noise)
    return jnp.sum(jnp.where(jnp.abs(t) > OUTLIER, image.used, 0.0)) / jnp.sum(image.used)


def misfit(public, image: likelihood.Image):
    """Whether residuals under the source are like those around it, in standard deviations.

    The correlation of log(1 + t^2), t = residual / half-width, with the shape of the source, times the root of the
    number of degrees of freedom: zero mean and unit variance when t has one distribution all over the image. An
    undersampled, blended, saturated or non-Gaussian source leaves large residuals where it is bright.
    """
    ny, nx = image.data.shape
    x = jnp.arange(nx, dtype=public.dtype)[None, :]
    y = jnp.arange(ny, dtype=public.dtype)[:, None]
    shape = model.gaussian(public[:6].at[2].set(1.0), x, y)
    t = (image.data - likelihood.predict(public, image)) / (public[-1] * image.noise)
    loss = jnp.log1p(t * t)
    used, n = image.used, jnp.sum(image.used)

    def centred(values):
        return used * (values - jnp.sum(used * values) / n)

    w, l0 = centred(shape), centred(loss)
    return jnp.sum(w * l0) * jnp.sqrt(n / (jnp.sum(w * w) * jnp.sum(l0 * l0)))


def condition(hessian_matrix):
    """Condition number of a Hessian (p, p) scaled to unit diagonal; NaN where it is not positive definite."""
    size = jnp.sqrt(jnp.diag(hessian_matrix))
    scaled = hessian_matrix / size[:, None] / size[None, :]
    eigenvalues = jnp.linalg.eigvalsh(jnp.where(jnp.isfinite(scaled), scaled, 0.0))
    return jnp.where(eigenvalues[0] > 0, eigenvalues[-1] / eigenvalues[0], jnp.nan)


def flags(public, errors, ellipticity_error, image, shape, converged, positive, enough, degenerate, misfit_value):
    """Bits of `pipeline.columns.FLAGS` that the fit itself can tell. int64 ().

    public, errors : (q,), (p,) parameters and chosen standard errors. shape : (2,) ny, nx of the image without its
    padding. converged, positive, enough, degenerate (too many equal pixels for a scale) : bools. misfit_value : as
    `misfit` gives it.
    """
    x0, y0, amp, sigma = (public[i] for i in range(4))
    e = model.ellipticity(public[:6])
    major = sigma / jnp.sqrt(1.0 - e)
    ny, nx = shape[0].astype(x0.dtype), shape[1].astype(x0.dtype)
    edge = jnp.minimum(jnp.minimum(x0 + 0.5, nx - 0.5 - x0), jnp.minimum(y0 + 0.5, ny - 0.5 - y0))
    row = jnp.clip(jnp.nan_to_num(jnp.round(y0)), 0.0, ny - 1.0).astype(int)
    column = jnp.clip(jnp.nan_to_num(jnp.round(x0)), 0.0, nx - 1.0).astype(int)
    conditions = {
        "NOT_CONVERGED": enough & ~converged,
        "HESSIAN_NOT_POSITIVE": enough & ~positive,
        "NEAR_EDGE": enough & ~(edge >= major),
        # Without noise the error vanishes with e itself.
        "ROUND": enough & ~(e >= columns.ROUND_ERRORS * ellipticity_error + 1e-6),
        "TOO_FEW_PIXELS": ~enough,
        "NON_FINITE": ~(jnp.all(jnp.isfinite(public)) & jnp.all(jnp.isfinite(errors))),
        "MISFIT": enough & ~(jnp.abs(misfit_value) <= columns.MISFIT_SIGMAS),
        "MASKED_PEAK": enough & (image.used[row, column] == 0),
        "AT_LIMIT": enough
        & ((sigma < columns.MIN_SIGMA) | (sigma > jnp.maximum(ny, nx)) | (e > columns.MAX_ELLIPTICITY) | degenerate),
        "LOW_SNR": enough & ~(jnp.abs(amp) >= columns.LOW_SNR * errors[2]),
    }
    return sum((jnp.where(on, columns.BIT[name], 0) for name, on in conditions.items()), start=jnp.int64(0))
