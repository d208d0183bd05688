"""The linear algebra and the minimiser, on problems with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from pipeline import newton
from pipeline.likelihood import Terms

solve = jax.jit(newton.solve)


def spd(seed, p=7):
    a = np.random.default_rng(seed).normal(size=(p, p))
    return jnp.asarray(a @ a.T + 0.1 * np.eye(p))


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 8]))
def test_solve_agrees_with_lapack(seed, p):
    matrix = spd(seed, p)
    right = jnp.asarray(np.random.default_rng(seed + 1).normal(size=(p, 3)))
    solution, positive = solve(matrix, right)
    assert positive
    assert_allclose(solution, np.linalg.solve(matrix, right), rtol=1e-6, atol=1e-8)
    assert_allclose(solve(matrix, right[:, 0])[0], solution[:, 0], rtol=1e-12)


def test_solve_tells_an_indefinite_matrix_and_still_goes_downhill():
    matrix = jnp.diag(jnp.array([2.0, -1.0, 3.0])) + 0.1
    gradient = jnp.array([1.0, 2.0, -1.0])
    step, positive = newton.solve(matrix, gradient, floor=jnp.full(3, 0.1))
    assert not positive
    assert jnp.dot(step, gradient) > 0


def test_inverse_survives_parameters_of_very_different_units():
    size = jnp.asarray(10.0 ** np.arange(-6, 1))
    matrix = spd(3) * size[:, None] * size[None, :]
    assert_allclose(newton.inverse(matrix) @ matrix, np.eye(7), atol=1e-6)


def test_inverse_of_an_indefinite_matrix_is_nan():
    assert np.isnan(newton.inverse(jnp.diag(jnp.array([1.0, -1.0])))).all()


def rosenbrock(free):
    x, y = free[0], free[1]
    return 100.0 * (y - x * x) ** 2 + (1.0 - x) ** 2 + 0.5 * (free[2] - 0.3) ** 2


def terms_of(function):
    def evaluate(free):
        hessian = jax.hessian(function)(free)
        eigenvalues, vectors = jnp.linalg.eigh(hessian)
        positive = (vectors * jnp.maximum(jnp.abs(eigenvalues), 1e-3)[None, :]) @ vectors.T
        return Terms(function(free), jax.grad(function)(free), hessian, positive, jnp.eye(3))

    return evaluate


def minimise(start, target, *, fit_scale, max_steps=200, valid=lambda free: jnp.asarray(True)):
    return newton.minimise(
        terms_of(rosenbrock), rosenbrock, valid, jnp.asarray(start), jnp.asarray(target), fit_scale, 1e-12, max_steps
    )


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
