"""The Cauchy negative log-likelihood of one image, and its exact derivatives.

Everything here is one image in exact mathematics; `pipeline.program` lifts it to stacks. Automatic differentiation
is the definition of every derivative.

Parameters of the fit, the *free vector*: ``x0, y0, amp, log sigma, rho, diff``, then ``background`` (constant) or
``background, background_x, background_y`` (plane), then ``log scale``, always, even where it is held. Logarithms
keep widths positive whatever step is tried; `to_public` undoes them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pipeline import model

_SIGMA = 3  # place of log sigma in the free vector


class Image(NamedTuple):
    """One image as the likelihood sees it.

    data : array (ny, nx), finite everywhere. weight : array (ny, nx), 1 / noise where the pixel counts, 0 elsewhere;
    the half-width of a pixel is scale / weight. origin : array (2,), x and y about which a background plane is
    defined.
    """

    data: jax.Array
    weight: jax.Array
    origin: jax.Array


class Terms(NamedTuple):
    """Value and derivatives at one point: nll (), gradient (p,), and three (p, p) matrices.

    ``hessian`` is exact; ``gauss_newton`` is the matrix of iteratively reweighted least squares, with nothing between
    the model and the log scale, whose own is the sum of v: in Cauchy noise that of the Hessian, at the mean. It has no
    negative eigenvalue. ``scores`` sums the outer products of the pixels' gradients.
    """

    nll: jax.Array
    gradient: jax.Array
    hessian: jax.Array
    gauss_newton: jax.Array
    scores: jax.Array


def to_public(free):
    """Parameters of `pipeline.columns` (sigma and scale instead of their logarithms) from the free vector (p,)."""
    return free.at[_SIGMA].set(jnp.exp(free[_SIGMA])).at[-1].set(jnp.exp(free[-1]))


def to_free(public):
    """The inverse of `to_public`."""
    return public.at[_SIGMA].set(jnp.log(public[_SIGMA])).at[-1].set(jnp.log(public[-1]))


def to_public_matrices(public, gradient, hessian, scores):
    """Hessian and score products (q, q) in the public parameters from those in the free vector.

    With s = exp(l): d/ds = (1/s) d/dl and d2/ds2 = (1/s^2) (d2/dl2 - d/dl).
    """
    logs = jnp.zeros(public.shape[0], bool).at[_SIGMA].set(True).at[-1].set(True)
    slope = jnp.where(logs, 1.0 / public, 1.0)
    outer = slope[:, None] * slope[None, :]
    bend = jnp.diag(jnp.where(logs, gradient * slope * slope, 0.0))
    return hessian * outer - bend, scores * outer


def predict(public, image: Image):
    """Model image (ny, nx): Gaussian plus background, from the public parameter vector."""
    ny, nx = image.data.shape
    x = jnp.arange(nx, dtype=public.dtype)[None, :]
    y = jnp.arange(ny, dtype=public.dtype)[:, None]
    source = model.gaussian(public[:6], x, y)
    level = public[6:-1]
    if level.size == 0:
        return source
    if level.size == 1:
        return source + level[0]
    return source + level[0] + level[1] * (x - image.origin[0]) + level[2] * (y - image.origin[1])


def nll(public, image: Image):
    """Negative log-likelihood: the sum over used pixels of log(pi g) + log(1 + (r/g)^2) (design: section 3)."""
    used = image.weight > 0
    t = (image.data - predict(public, image)) * image.weight / public[-1]
    log_g = jnp.log(jnp.pi * public[-1]) - jnp.log(jnp.where(used, image.weight, 1.0))
    return jnp.sum(jnp.where(used, log_g + jnp.log1p(t * t), 0.0))


def terms(free, image: Image) -> Terms:
    """Value and derivatives in the free vector (p,)."""

    def value(free):
        return nll(to_public(free), image)

    def pixels(free):
        public = to_public(free)
        return predict(public, image), jnp.full(image.data.shape, jnp.log(public[-1]))

    predicted, log_scale = pixels(free)
    slope_m, slope_s = jax.jacfwd(pixels)(free)
    h = image.weight * jnp.exp(-log_scale)  # 1 / g, 0 where unused
    t = (image.data - predicted) * h
    v = 1.0 / (1.0 + t * t)
    used = (image.weight > 0).astype(free.dtype)
    psi = 2.0 * t * v * h  # d nll / d residual
    chi = used * (1.0 - t * t) * v  # d nll / d log scale
    score = chi[..., None] * slope_s - psi[..., None] * slope_m
    gauss_newton = jnp.einsum("yx,yxi,yxj->ij", 2.0 * v * h * h, slope_m, slope_m) + jnp.einsum(
        "yx,yxi,yxj->ij", used * v, slope_s, slope_s
    )
    return Terms(
        nll=value(free),
        gradient=jnp.sum(score, axis=(0, 1)),
        hessian=jax.jacfwd(jax.jacrev(value))(free),
        gauss_newton=gauss_newton,
        scores=jnp.einsum("yxi,yxj->ij", score, score),
    )
