"""The linear algebra and the minimiser, on problems with known answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from pipeline import newton
from pipeline.moments import Step


def spd(seed, p=7):
    a = np.random.default_rng(seed).normal(size=(p, p))
    return jnp.asarray(a @ a.T + 0.1 * np.eye(p))


def lower(matrix):
    return {(i, j): matrix[i, j] for i in range(len(matrix)) for j in range(i + 1)}


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 8]))
def test_solve_agrees_with_lapack(seed, p):
    matrix = spd(seed, p)
    right = jnp.asarray(np.random.default_rng(seed + 1).normal(size=p))
    solution, positive = newton.solve(lower(matrix), list(right), [0.0] * p)
    assert positive
    assert_allclose(solution, np.linalg.solve(matrix, right), rtol=1e-6, atol=1e-8)


def test_solve_tells_an_indefinite_matrix_and_still_goes_downhill():
    matrix = jnp.diag(jnp.array([2.0, -1.0, 3.0])) + 0.1
    gradient = jnp.array([1.0, 2.0, -1.0])
    step, positive = newton.solve(lower(matrix), list(gradient), [0.1] * 3)
    assert not positive
    assert jnp.dot(jnp.stack(step), gradient) > 0


def test_inverse_survives_parameters_of_very_different_units():
    size = jnp.asarray(10.0 ** np.arange(-6, 1))
    matrix = spd(3) * size[:, None] * size[None, :]
    assert_allclose(newton.inverse(matrix) @ matrix, np.eye(7), atol=1e-6)


def test_inverse_of_an_indefinite_matrix_is_nan():
    assert np.isnan(newton.inverse(jnp.diag(jnp.array([1.0, -1.0])))).all()


def rosenbrock(free):
    x, y = free[0], free[1]
    return 100.0 * (y - x * x) ** 2 + (1.0 - x) ** 2 + 0.5 * (free[2] - 0.3) ** 2


def evaluate(place, log_scale, exact):
    """The Rosenbrock function as a likelihood whose scale is its third parameter."""
    place = jnp.stack(place)
    there = place.at[-1].set(log_scale)
    hessian = jax.hessian(rosenbrock)(there)
    eigenvalues, vectors = jnp.linalg.eigh(hessian)
    positive = (vectors * jnp.maximum(jnp.abs(eigenvalues), 1e-3)[None, :]) @ vectors.T
    matrix = jnp.where(exact, hessian, positive)
    lower = {(i, j): matrix[i, j] for i in range(3) for j in range(i + 1)}
    return Step(
        judged=rosenbrock(place),
        nll=rosenbrock(there),
        gradient=list(jax.grad(rosenbrock)(there)),
        matrix=lower,
        spread=jnp.asarray(1.0),
        share=jnp.asarray(1.0),
        residual_scale=jnp.asarray(-9.0),
    )


def evaluate_held(place, log_scale, exact, **residuals):
    """`evaluate` without the derivatives by the scale. residuals : fields of `Step` to replace."""
    found = evaluate(place, log_scale, exact)
    matrix = {place: entry for place, entry in found.matrix.items() if place[0] < 2}
    return found._replace(gradient=found.gradient[:2], matrix=matrix, **residuals)


@functools.partial(jax.jit, static_argnames=("fit_scale", "valid"))
def _minimise(start, target, max_steps, *, fit_scale, valid):
    def step(state):
        return newton.step(
            state, evaluate if fit_scale else evaluate_held, valid, target, 1e-12, lambda place: jnp.asarray(1e-14)
        )

    return jax.lax.while_loop(lambda s: newton.going(s, max_steps), step, newton.begin(start, target, fit_scale))


def anywhere(free):
    return jnp.asarray(True)


def minimise(start, target, *, fit_scale, max_steps=200, valid=anywhere):
    return _minimise(jnp.asarray(start), jnp.asarray(target), max_steps, fit_scale=fit_scale, valid=valid)


def test_minimum_of_rosenbrock_with_the_last_parameter_latched_free():
    state = minimise([-1.2, 1.0, 4.0], 1.0, fit_scale=True)
    assert state.converged
    assert_allclose(state.free, [1.0, 1.0, 0.3], atol=1e-5)


def test_held_scale_ends_at_its_target():
    state = minimise([-1.2, 1.0, 4.0], 1.0, fit_scale=False)
    assert state.converged
    assert_allclose(state.free, [1.0, 1.0, 1.0], atol=1e-5)


@pytest.mark.parametrize("max_steps", [0, 3])
def test_max_steps_stops_without_convergence(max_steps):
    state = minimise([-1.2, 1.0, 4.0], 1.0, fit_scale=True, max_steps=max_steps)
    assert not state.converged
    assert state.n_steps == max_steps


def test_steps_to_invalid_places_are_refused():
    state = minimise([-1.2, 1.0, 0.3], 1.0, fit_scale=True, valid=lambda free: free[0] < 0.5, max_steps=60)
    assert state.free[0] < 0.5


def test_a_rejected_step_is_damped_at_once():
    """The same step is not tried again with a damping too small to change it."""
    start = newton.begin(jnp.asarray([-1.2, 1.0, 0.3]), jnp.asarray(0.3), True)
    state = newton.step(start, evaluate, anywhere, jnp.asarray(0.3), 1e-12, lambda place: jnp.asarray(0.0))
    state = state._replace(damping=jnp.asarray(1e-9))
    refused = newton.step(state, evaluate, lambda free: jnp.asarray(False), jnp.asarray(0.3), 1e-12, lambda place: 0.0)
    assert refused.damping >= newton.DAMPING
    assert not np.allclose(jnp.stack(refused.move), jnp.stack(state.move), rtol=1e-6)
    assert_allclose(jnp.stack(refused.free), jnp.stack(state.free))


def steps(count, *, share=1.0, residual_scale=-9.0, promised=None, start=(1.1, 1.2, 5.0)):
    """The state after a few steps with the scale held, of which the last one finds residuals like this.

    promised : instead of what that step was to gain.
    """
    target, state = jnp.asarray(0.0), newton.begin(jnp.asarray(start), jnp.asarray(0.0), False)
    said = functools.partial(evaluate_held, share=jnp.asarray(share), residual_scale=jnp.asarray(residual_scale))
    for i in range(count):
        last = i == count - 1
        if last and promised is not None:
            state = state._replace(promised=jnp.asarray(promised))
        state = newton.step(state, said if last else evaluate_held, anywhere, target, 1e-12, lambda place: 0.0)
    return state


def test_the_scale_shrinks_by_no_more_than_residuals_warrant():
    def scale(start, residual_scale):
        first = steps(1, start=start, residual_scale=residual_scale)
        second = newton.step(first, evaluate_held, anywhere, jnp.asarray(0.0), 1e-12, lambda place: 0.0)
        return second.free[-1]

    assert_allclose(scale((1.1, 1.2, 5.0), -9.0), 5.0 + np.log(newton.SHRINK))
    assert_allclose(scale((1.1, 1.2, 5.0), 4.9), 4.9 + np.log(newton.WARRANTED))
    assert_allclose(scale((1.1, 1.2, 0.5), 0.4), 0.0)


@pytest.mark.parametrize(("share", "longer"), [(0.8, 1.25), (0.1, 1 / newton.LEAST_SHARE), (1.5, 1.0)])
def test_steps_are_as_long_as_residuals_tell_where_these_are_noise(share, longer):
    plain, long = steps(1), steps(1, share=share)
    assert_allclose(long.move, longer * np.array(plain.move))
    assert_allclose(long.promised, longer * plain.promised)
    assert_allclose(steps(1, share=share, residual_scale=0.01 + np.log(newton.NOISY)).move, plain.move)


def test_steps_are_shorter_after_one_that_gained_less_than_promised():
    plain, gained = steps(2), steps(1).nll - rosenbrock(jnp.asarray([*steps(2).free[:2], 5.0]))
    enough, too_little = (steps(2, share=0.8, promised=by * gained / newton.GAIN) for by in (0.99, 1.01))
    assert_allclose(enough.move, 1.25 * np.array(plain.move))
    assert_allclose(too_little.move, plain.move)
