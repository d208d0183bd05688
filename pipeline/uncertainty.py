"""Covariances of the fitted parameters of one image, and errors of what is derived from them.

The four covariances of the contract: ``hessian`` (inverse observed information), ``fisher`` (the Cramer-Rao bound for
Cauchy noise), ``sandwich`` (H^-1 S H^-1, S the sum of outer products of the pixels' scores) and ``pooled`` (Huber's
form: it assumes no more than that residual / noise has one distribution all over the image).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pipeline import likelihood
from pipeline.newton import inverse


class Covariances(NamedTuple):
    """Four covariances (p, p) of the fitted parameters; NaN where one is undefined. ``hessian_matrix`` is H itself."""

    pooled: jax.Array
    sandwich: jax.Array
    hessian: jax.Array
    fisher: jax.Array
    hessian_matrix: jax.Array


def covariances(public, terms: likelihood.Terms, image: likelihood.Image, fit_scale: bool) -> Covariances:
    """The four covariances at a solution.

    Parameters
    ----------
    public : array (q,)
        Public parameters, the scale last, fitted or not.
    terms : likelihood.Terms
        Value and derivatives there, in the free vector.
    image : likelihood.Image
    fit_scale : bool
        Whether the scale is one of the p fitted parameters (p = q) or held (p = q - 1).

    Notes
    -----
    pooled: with a = psi u, a' = psi' u^2 (u the noise map) and M_i = grad m_i / u_i,
    cov = [sum a^2 / (n - p)] / mean(a')^2 * M^-1 [sum (1 + k h_i) M_i M_i^T] M^-1, M = sum M_i M_i^T, where
    h_i = M_i^T M^-1 M_i is the leverage and k is `inflation`. It is Huber's form (Robust Statistics, section 7.6) with
    the correction put where the leverage is, because a small source has only some 4 pi sigma^2 pixels of its own.
    The scale is uncorrelated with the rest for symmetric noise; its variance is that of a one-parameter M-estimator.
    """
    q = public.shape[0]
    p = q if fit_scale else q - 1
    used, u = image.used, image.noise
    n = jnp.sum(used)
    scale = public[-1]

    observed, scores = likelihood.public_derivatives(public, terms)
    hessian_matrix = observed[:p, :p]
    hessian = inverse(hessian_matrix)
    sandwich = hessian @ scores[:p, :p] @ hessian

    predicted = likelihood.predict(public, image)
    # The model does not depend on the scale.
    slope = jax.jacfwd(likelihood.predict)(public, image)[..., : q - 1]
    g = scale * u
    t = (image.data - predicted) / g
    inv = 1.0 / (1.0 + t * t)
    psi = 2.0 * t * inv / g
    psi_slope = 2.0 * (2.0 * inv - 1.0) * inv / (g * g)
    chi = (1.0 - t * t) * inv / scale  # d nll / d scale
    # chi = (2 inv - 1) / scale, and d inv / d scale = 2 t^2 inv^2 / scale.
    chi_slope = (4.0 * t * t * inv * inv - (2.0 * inv - 1.0)) / (scale * scale)

    def with_scale(block, scale_variance):
        full = jnp.zeros((q, q), block.dtype).at[: q - 1, : q - 1].set(block).at[-1, -1].set(scale_variance)
        return full[:p, :p]

    fisher = with_scale(
        inverse(jnp.einsum("yx,yxi,yxj->ij", 0.5 * used / (g * g), slope, slope)), 2.0 * scale * scale / n
    )

    m = slope / u[..., None]
    a, a_slope = psi * u, psi_slope * u * u
    mean_slope = jnp.sum(used * a_slope) / n
    m_inverse = inverse(jnp.einsum("yx,yxi,yxj->ij", used, m, m))
    leverage = jnp.einsum("yxi,ij,yxj->yx", m, m_inverse, m)
    middle = jnp.einsum("yx,yxi,yxj->ij", used * (1.0 + inflation(t, used) * leverage), m, m)
    bracket = jnp.sum(used * a * a) / (n - p) / mean_slope**2
    scale_variance = jnp.sum(used * chi * chi) / (n - p) * n / jnp.sum(used * chi_slope) ** 2
    pooled = with_scale(bracket * m_inverse @ middle @ m_inverse, scale_variance)
    return Covariances(pooled, sandwich, hessian, fisher, hessian_matrix)


def inflation(t, used):
    """How much the variance of an M-estimator exceeds its limit for many pixels, per unit of leverage. Scalar, >= 0.

    From the second-order expansion of a location T with sum psi(r - T) = 0, for symmetric noise: with psi_k the k-th
    derivative of psi, A = E psi_1, B = E psi^2 and C = var psi_1,

        n A^2 var(T) / B = 1 + k / n,
        k = 3 C / A^2 - 2 E[psi^2 (psi_1 - A)] / (A B) + 3 E[psi psi_2] / A^2 - E[psi_3] B / A^3.

    k is 2.5 for Cauchy noise fitted with its own scale, 1.2 for Student's t with 3 degrees of freedom, 0.1 for
    Gaussian noise; C / A^2 alone, which is 2.5, 3.4 and 4.1, would be right for Cauchy noise only. The expectations
    are means over the used pixels.

    t : array (ny, nx), residual over half-width. used : array (ny, nx).
    """
    inv = 1.0 / (1.0 + t * t)
    s = 1.0 - inv  # t^2 / (1 + t^2): no power of a large t overflows
    psi = 2.0 * t * inv
    psi_1 = 2.0 * (inv - s) * inv
    psi_2 = 2.0 * psi * (s - 3.0 * inv) * inv
    psi_3 = -12.0 * (s * s - 6.0 * s * inv + inv * inv) * inv**2

    def mean(values):
        return jnp.sum(used * values) / jnp.sum(used)

    a, b = mean(psi_1), mean(psi**2)
    c, d = mean((psi_1 - a) ** 2), mean(psi**2 * (psi_1 - a))
    k = 3.0 * c / a**2 - 2.0 * d / (a * b) + 3.0 * mean(psi * psi_2) / a**2 - mean(psi_3) * b / a**3
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
    values, errors : arrays (d,)
    """
    slope = jax.jacfwd(function)(params)
    return function(params), jnp.sqrt(jnp.einsum("di,ij,dj->d", slope, covariance, slope))
