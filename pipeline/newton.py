"""Damped Newton with continuation in the scale, one step at a time. Knows no images.

Far from the minimum the Cauchy likelihood is not convex. The scale therefore starts wide, where the likelihood is
nearly least squares, and shrinks to its target with each accepted step; until the target is reached, and as long as
the step is long, the positive Gauss-Newton matrix takes the place of the Hessian. After that the Hessian is exact
and convergence quadratic.

Squares with the weights of that matrix lie above the likelihood, so that its steps are safe, but short: in Cauchy noise
half as long as Newton's. So they are as long as if the Hessian were the share of it that the residuals tell
(`pipeline.moments.Step`), wherever these are noise, and the last step gained what such a step should.

All numbers are scalars, in lists, and a symmetric matrix is the dict of its lower triangle: under ``vmap`` every
operation then runs over the whole batch, where LAPACK would be called once a matrix.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SHRINK = 0.2  # of the scale, at each accepted step, at most; by 0.1 fits take a twentieth fewer, but of peaks in real
# images and of wide and negative sources 40 of 16,000 more end elsewhere
WARRANTED = 0.5  # of the scale that residuals ask for, below which it does not shrink either: where they do not yet
# follow the model it would be lost among them; without, a fifth of sources wider than their image never end
LEAST_SHARE = 0.5  # of the matrix of Gauss and Newton, that of Cauchy noise at its own scale
NOISY = 2.0  # times the target: residuals that ask for a larger scale are of the model, and their share says nothing
GAIN = 0.5  # of what a step promises, below which the next takes the whole matrix; without, sources as wide as their
# image take a quarter more steps
DAMPING = 1e-3  # at the start, and after a rejected step at least
EASIER, HARDER = 0.1, 8.0  # factors on the damping after an accepted, a rejected step
NO_DAMPING = 1e-4  # below which there is none
MOST_DAMPING = 1e8  # above which there is no use in going on
FLOOR = 1e-3  # least magnitude of a repaired pivot, in units of the Gauss-Newton diagonal
SLACK = 32.0  # in the nll, in units of what rounding leaves uncertain in a residual
NEAR = 1.0  # decrement, as a fraction like ``tolerance``, below which the next matrix is the Hessian. By 100 stamps
# as the model has them take 3 % fewer steps, but peaks of real images a tenth more, and beside neighbours 2 % never end
NOISE = 32.0  # what rounding leaves of a decrement, over its square in a residual: 0.4 in most fits, 30 in one of 10^3
ROUNDING = 0.02  # most that it may leave, as a fraction likewise: a fifth of an error
EPSILON = 2.0**-52


class State(NamedTuple):
    """Where one fit stands.

    free : the best place so far, p scalars, the logarithm of the scale last. move : what the next trial takes from it.
    nll, gradient, matrix, spread : there, see `pipeline.moments.Step`. size : the latest Gauss-Newton diagonal. exact :
    whether ``matrix`` is the Hessian; wanted : whether the next shall be. latched : whether the scale has reached its
    target. residual_scale : see `pipeline.moments.Step`. promised : by how much the move should lower the nll.
    """

    free: list
    move: list
    nll: jax.Array
    gradient: list
    matrix: dict
    spread: jax.Array
    size: list
    damping: jax.Array
    exact: jax.Array
    wanted: jax.Array
    latched: jax.Array
    residual_scale: jax.Array
    promised: jax.Array
    converged: jax.Array
    n_steps: jax.Array


def solve(matrix, right, floor):
    """Solve ``matrix @ solution = right`` for a symmetric matrix by unrolled LDL^T.

    Parameters
    ----------
    matrix : dict {(row, column): scalar}
        The lower triangle.
    right, floor : sequences of p scalars
        A pivot that is not positive is replaced by its magnitude, or by ``floor`` where that is larger: the step
        then goes downhill even where the matrix is indefinite (after Gill and Murray).

    Returns
    -------
    solution : list of p scalars
    positive : bool array ()
        Whether every pivot was positive as it came.
    """
    p = len(right)
    lower: dict[tuple[int, int], Any] = {}
    inverse_pivots: list[Any] = []
    y: list[Any] = []
    positive: Any = True
    for i in range(p):
        scaled: dict[int, Any] = {}
        for j in range(i):
            scaled[j] = matrix[i, j] - sum((scaled[k] * lower[j, k] for k in range(j)), start=0.0)
            lower[i, j] = scaled[j] * inverse_pivots[j]
        pivot = matrix[i, i] - sum((scaled[k] * lower[i, k] for k in range(i)), start=0.0)
        positive = (pivot > 0) & positive
        pivot = jnp.where(pivot > 0, pivot, jnp.maximum(-pivot, floor[i]))
        inverse_pivots.append(1.0 / pivot)
        y.append(right[i] - sum((lower[i, k] * y[k] for k in range(i)), start=0.0))
    solution: list[Any] = [None] * p
    for i in reversed(range(p)):
        rest = sum((lower[k, i] * solution[k] for k in range(i + 1, p)), start=0.0)
        solution[i] = y[i] * inverse_pivots[i] - rest
    return solution, positive


def inverse(matrix):
    """Inverse of a symmetric positive definite matrix (p, p); NaN where it is not positive definite.

    The matrix is first scaled to unit diagonal, so that parameters of any unit may stand in it.
    """
    size = jnp.sqrt(jnp.diag(matrix))
    places = np.arange(len(matrix))

    def sweep(k, carry):
        swept, positive = carry
        at_k = places == k
        row, column = swept[k, :], swept[:, k]
        pivot = row[k]
        inside = swept - (column / pivot)[:, None] * row[None, :]
        beside = jnp.where(at_k, -1.0, row)[None, :] / pivot
        swept = jnp.where(at_k[:, None], beside, jnp.where(at_k[None, :], beside.T, inside))
        return swept, positive & (pivot > 0)

    scaled = matrix / size[:, None] / size[None, :]
    swept, positive = jax.lax.fori_loop(0, len(matrix), sweep, (scaled, jnp.asarray(True)))
    result = -0.5 * (swept + swept.T) / size[:, None] / size[None, :]
    return jnp.where(positive, result, jnp.nan)


def fraction(decrement, rounding, spread):
    """What is left to the minimum as a fraction of the true error, squared: whatever the scale, down to rounding.

    Infinite where rounding itself is no small part of an error.
    decrement : Newton's, g^T H^-1 g / 2. rounding : what a residual over its half-width may be off by. spread :
    tr(H^-1 S) / p, the variance over that which the Hessian tells.
    """
    unit, noise = jnp.minimum(1.0, spread), NOISE * rounding * rounding
    return jnp.where(noise <= ROUNDING * unit, (decrement - noise) / unit, jnp.inf)


def begin(start, target, fit_scale: bool) -> State:
    """The state before the first step, which goes from nowhere to ``start``: so only steps evaluate anything.

    start : array (p,), its last entry the logarithm of the scale to start from. target : array (), that at which the
    continuation ends. fit_scale : whether the scale is fitted from then on, or held.
    """
    zero, no = jnp.zeros_like(target), jnp.zeros_like(target, bool)
    p = len(start) if fit_scale else len(start) - 1
    return State(
        free=list(start),
        move=[zero] * p,
        nll=jnp.full_like(target, jnp.inf),
        gradient=[zero] * p,
        matrix={(i, j): zero for i in range(p) for j in range(i + 1)},
        spread=zero,
        size=[zero] * p,
        damping=jnp.full_like(target, DAMPING),
        exact=no,
        wanted=no,
        latched=no,
        residual_scale=zero,
        promised=zero,
        converged=no,
        n_steps=jnp.zeros_like(target, int),
    )


def _moved(state: State) -> list:
    """The place of the next trial; a held scale stays."""
    return [a - b for a, b in zip(state.free, state.move, strict=False)] + state.free[len(state.move) :]


def step(state: State, evaluate, valid, target, tolerance, rounding) -> State:
    """One trial step, accepted or not, and the move of the next.

    Parameters
    ----------
    state : State
    evaluate : callable
        (place, logarithm of a scale, whether exact) -> `pipeline.moments.Step` or its like.
    valid : callable
        place -> bool; a step to where it is False is refused.
    target : array ()
        Logarithm of the scale at which the continuation ends.
    tolerance : array ()
        On `fraction`, before the last move.
    rounding : callable
        place -> what a residual over its half-width may be off by there, by rounding.
    """
    p = len(state.move)
    fit_scale = p == len(state.free)
    first = state.n_steps == 0
    trial = _moved(state)
    least = jnp.maximum(trial[-1] + math.log(SHRINK), state.residual_scale + math.log(WARRANTED))
    shrunk = jnp.maximum(target, jnp.where(first, trial[-1], least))
    log_scale = jnp.where(state.latched, trial[-1], shrunk)
    new = evaluate(trial, log_scale, state.wanted)
    # Rounding must neither refuse the last steps, nor ask for more of them. What it leaves at the trial itself is no
    # measure: a step far beyond all sense, to no scale at all, would be welcome.
    noise = rounding(trial)
    slack = jnp.where(first, 0.0, SLACK * (rounding(state.free) + EPSILON * jnp.abs(state.nll)))
    finite = jnp.isfinite(sum(new.gradient) + sum(new.matrix[i, i] for i in range(p)))
    accepted = valid(trial) & finite & (new.judged <= state.nll + slack)

    def choose(new, old):
        return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)

    trial[-1] = log_scale
    free, latched = choose(trial, state.free), state.latched | (accepted & (log_scale <= target))
    nll, gradient, matrix, spread, residual_scale, exact = choose(
        (new.nll, list(new.gradient), new.matrix, new.spread, new.residual_scale, state.wanted),
        (state.nll, state.gradient, state.matrix, state.spread, state.residual_scale, state.exact),
    )
    fresh = accepted & ~state.wanted
    size = [jnp.where(fresh, new.matrix[i, i], old) for i, old in enumerate(state.size)]
    damping = jnp.where(accepted, state.damping * EASIER, jnp.maximum(state.damping * HARDER, DAMPING))
    damped = jnp.where(damping > NO_DAMPING, damping, 0.0)

    pull, held = list(gradient), dict(matrix)
    if fit_scale:  # held until the continuation ends
        pull[-1] = jnp.where(latched, pull[-1], 0.0)
        for j in range(p):
            held[p - 1, j] = jnp.where(latched, held[p - 1, j], float(j == p - 1))
    for i in range(p):
        held[i, i] = held[i, i] + damped * size[i]
    move, positive = solve(held, pull, [FLOOR * s for s in size])
    known = fresh & (new.residual_scale < target + math.log(NOISY)) & (state.nll - new.judged > GAIN * state.promised)
    share = jnp.where(known, jnp.clip(new.share, LEAST_SHARE, 1.0), 1.0)
    move = [m / share for m in move[: len(free) - 1]] + move[len(free) - 1 :]
    decrement = 0.5 * sum(a * b for a, b in zip(pull, move, strict=True))
    left = fraction(decrement, noise, spread)
    return State(
        free=free,
        move=move,
        nll=nll,
        gradient=gradient,
        matrix=matrix,
        spread=spread,
        size=size,
        damping=damping,
        exact=exact,
        wanted=jnp.where(accepted, latched & (left < NEAR), state.wanted),
        latched=latched,
        residual_scale=residual_scale,
        promised=decrement,
        converged=latched & exact & positive & (damped == 0) & (left <= tolerance),
        n_steps=state.n_steps + 1,
    )


def place(state: State, valid) -> list:
    """Where a fit ends: the best place, after the last move if it converged. ``valid`` as in `step`."""
    moved = _moved(state)
    last = state.converged & valid(moved)
    return [jnp.where(last, a, b) for a, b in zip(moved, state.free, strict=True)]


def going(state: State, max_steps):
    """Whether a fit needs, and may take, a further step."""
    return ~state.converged & (state.n_steps < max_steps) & (state.damping < MOST_DAMPING)
