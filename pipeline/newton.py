"""Damped Newton with continuation in the scale. Knows no images: it is handed a function that gives `Terms`.

Far from the minimum the Cauchy likelihood is not convex. The scale therefore starts wide, where the likelihood is
nearly least squares, and shrinks to its target with each accepted step; until the target is reached, and as long as
the step is long, the positive Gauss-Newton matrix takes the place of the Hessian. After that the Hessian is exact
and convergence quadratic.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SHRINK = 0.3  # of the scale, at each accepted step
DAMPING = 1e-3  # at the start
EASIER, HARDER = 0.1, 8.0  # factors on the damping after an accepted, a rejected step
FLOOR = 1e-3  # least magnitude of a repaired pivot, in units of the Gauss-Newton diagonal
NEAR = 1.0  # Gauss-Newton decrement below which the Hessian is used
LEAST_DAMPING, MOST_DAMPING = 1e-9, 1e8


class State(NamedTuple):
    """Where one fit stands. ``terms`` are those at ``free``; ``latched`` says that the scale reached its target."""

    free: jax.Array
    terms: Any
    damping: jax.Array
    latched: jax.Array
    converged: jax.Array
    n_steps: jax.Array


def solve(matrix, right, floor=None):
    """Solve ``matrix @ solution = right`` for a symmetric matrix by unrolled LDL^T.

    Parameters
    ----------
    matrix : array (p, p)
    right : array (p,) or (p, k)
    floor : array (p,), optional
        A pivot that is not positive is replaced by its magnitude, or by ``floor`` where that is larger: the step
        then goes downhill even where the matrix is indefinite (after Gill and Murray).

    Returns
    -------
    solution : array, the shape of ``right``
    positive : bool array ()
        Whether every pivot was positive as it came; where it is False and there is no floor, the solution means
        nothing.

    Notes
    -----
    Unrolled, so that under ``vmap`` each scalar operation runs over the whole batch; LAPACK would be called once a
    matrix.
    """
    p = matrix.shape[0]
    lower: dict[tuple[int, int], Any] = {}
    pivots: list[Any] = []
    y: list[Any] = []
    positive = jnp.asarray(True)
    for i in range(p):
        scaled: dict[int, Any] = {}
        for j in range(i):
            scaled[j] = matrix[i, j] - sum((scaled[k] * lower[j, k] for k in range(j)), start=0.0)
            lower[i, j] = scaled[j] / pivots[j]
        pivot = matrix[i, i] - sum((scaled[k] * lower[i, k] for k in range(i)), start=0.0)
        positive &= pivot > 0
        pivots.append(pivot if floor is None else jnp.where(pivot > 0, pivot, jnp.maximum(-pivot, floor[i])))
        y.append(right[i] - sum((lower[i, k] * y[k] for k in range(i)), start=0.0))
    solution: list[Any] = [None] * p
    for i in reversed(range(p)):
        solution[i] = y[i] / pivots[i] - sum((lower[k, i] * solution[k] for k in range(i + 1, p)), start=0.0)
    return jnp.stack(solution), positive


def inverse(matrix):
    """Inverse of a symmetric positive definite matrix (p, p); NaN where it is not positive definite.

    The matrix is first scaled to unit diagonal, so that parameters of any unit may stand in it.
    """
    size = jnp.sqrt(jnp.diag(matrix))
    scaled = matrix / size[:, None] / size[None, :]
    result, positive = solve(scaled, jnp.eye(len(size), dtype=matrix.dtype))
    result = 0.5 * (result + result.T) / size[:, None] / size[None, :]
    return jnp.where(positive, result, jnp.nan)


def _hold(matrix, vector, free_mask):
    """Take the held parameters out of a linear system: unit diagonal, zero step."""
    both = free_mask[:, None] & free_mask[None, :]
    eye = jnp.eye(vector.shape[0], dtype=matrix.dtype)
    return jnp.where(both, matrix, eye), jnp.where(free_mask, vector, 0.0)


def minimise(evaluate, value, valid, start, target, fit_scale, tolerance, max_steps):
    """Minimise one negative log-likelihood.

    Parameters
    ----------
    evaluate : callable
        free vector (p,) -> Terms.
    value : callable
        free vector (p,) -> nll.
    valid : callable
        free vector (p,) -> bool; a step to where it is False is refused.
    start : array (p,)
        Free vector to start from; its last entry is the logarithm of the starting scale.
    target : array ()
        Logarithm of the scale at which the continuation ends.
    fit_scale : bool
        Whether the scale is fitted from then on, or held.
    tolerance : float
        On the Newton decrement g^T H^-1 g / 2 over min(1, tr(H^-1 S) / p).
    max_steps : int

    Returns
    -------
    State
    """
    p = start.shape[0]
    is_scale = jnp.arange(p) == p - 1
    n_free = p if fit_scale else p - 1
    eps = jnp.finfo(start.dtype).eps

    def step(state: State) -> State:
        terms = state.terms
        free_mask = ~is_scale | (state.latched & fit_scale)
        gauss, gradient = _hold(terms.gauss_newton, terms.gradient, free_mask)
        hessian, _ = _hold(terms.hessian, terms.gradient, free_mask)
        size = jnp.diag(gauss)
        damping = state.damping * jnp.diag(size)
        exact, _ = solve(hessian + damping, gradient, FLOOR * size)
        safe, _ = solve(gauss + damping, gradient)
        near = 0.5 * jnp.dot(gradient, safe) < NEAR
        move = jnp.where(state.latched & near, exact, safe)
        trial = state.free - move
        now = value(trial)
        # Rounding of the sum must not refuse the last steps.
        slack = jnp.where(state.n_steps > 0, 16 * eps * jnp.abs(terms.nll), 0.0)
        accepted = valid(trial) & (now <= terms.nll + slack)
        shrunk = jnp.maximum(target, trial[-1] + jnp.where(state.n_steps > 0, jnp.log(SHRINK), 0.0))
        scale = jnp.where(accepted & ~state.latched, shrunk, trial[-1])
        free = jnp.where(accepted, trial.at[-1].set(scale), state.free)
        latched = state.latched | (free[-1] <= target)
        terms = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), evaluate(free), terms)
        damping = jnp.where(accepted, state.damping * EASIER, state.damping * HARDER)
        damping = jnp.clip(damping, LEAST_DAMPING, MOST_DAMPING)

        free_mask = ~is_scale | (latched & fit_scale)
        hessian, gradient = _hold(terms.hessian, terms.gradient, free_mask)
        scores, _ = _hold(terms.scores, terms.gradient, free_mask)
        solved, positive = solve(hessian, jnp.concatenate([gradient[:, None], scores], axis=1))
        decrement = 0.5 * jnp.dot(gradient, solved[:, 0])
        spread = jnp.sum(jnp.where(free_mask, jnp.diag(solved[:, 1:]), 0.0)) / n_free
        converged = latched & positive & (decrement <= tolerance * jnp.minimum(1.0, spread))
        return State(free, terms, damping, latched, converged, state.n_steps + 1)

    def going(state: State):
        return ~state.converged & (state.n_steps < max_steps) & (state.damping < MOST_DAMPING)

    # A step from nowhere to the start: the loop then holds the only copy of the evaluation, which compiles slowly.
    shapes = jax.eval_shape(evaluate, start)
    nowhere = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    first = State(
        free=start,
        terms=nowhere._replace(nll=jnp.full_like(nowhere.nll, jnp.inf), gauss_newton=jnp.eye(p, dtype=start.dtype)),
        damping=jnp.asarray(DAMPING, start.dtype),
        latched=start[-1] <= target,
        converged=jnp.asarray(False),
        n_steps=jnp.asarray(0),
    )
    return jax.lax.while_loop(going, step, first)
