"""The model: one formula in two namespaces, and the geometry derived from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from pipeline import model

sources = st.tuples(
    st.floats(2, 12),
    st.floats(2, 12),
    st.floats(-50, 50),
    st.floats(0.7, 4),
    st.floats(-0.9, 0.9),
    st.floats(-0.7, 0.7),
).map(lambda values: np.round(values, 6))  # no denormal numbers: JAX flushes them to zero
Y, X = np.mgrid[:15, :14].astype(float)


@given(sources)
def test_numpy_and_jax_agree(params):
    assert_allclose(
        jax.jit(model.gaussian)(jnp.asarray(params), X, Y), model.gaussian(params, X, Y), rtol=1e-12, atol=1e-300
    )
    assert_allclose(jax.jit(model.derived)(jnp.asarray(params)), model.derived(params), rtol=1e-12)


def test_leading_axes_are_many_sources():
    params = np.array([[5.0, 6.0, 3.0, 2.0, 0.2, 0.1], [7.0, 4.0, -3.0, 1.5, -0.2, 0.3]])
    stack = model.gaussian(params[:, None, None, :], X, Y)
    assert_allclose(stack, [model.gaussian(one, X, Y) for one in params])


def test_peak_is_amp_at_the_centre():
    params = np.array([5.0, 6.0, -3.0, 2.0, 0.2, 0.1])
    assert model.gaussian(params, 5.0, 6.0) == -3.0


@given(sources)
def test_flux_is_the_integral(params):
    y, x = np.mgrid[-80:95:0.5, -80:95:0.5]
    total = model.gaussian(params, x, y).sum() * 0.25
    assert_allclose(model.derived(params)[0], total, rtol=1e-4, atol=1e-6)


@given(st.floats(0.05, 0.9), st.floats(-1.5, 1.5))
def test_widths_and_angle_are_those_of_the_ellipse(e, theta):
    """The moments of the image along theta and across it are the squared widths."""
    phi = theta - np.pi / 2
    params = np.array([0.0, 0.0, 1.0, 2.0, 2 * e * np.sin(2 * phi), e * np.cos(2 * phi)])
    _, major, minor, fwhm_major, fwhm_minor, angle = model.derived(params)
    assert_allclose([major, minor], [2 / np.sqrt(1 - e), 2 / np.sqrt(1 + e)])
    assert_allclose([fwhm_major, fwhm_minor], np.sqrt(8 * np.log(2)) * np.array([major, minor]))
    assert_allclose(angle, theta, atol=1e-9)
    along = model.gaussian(params, major * np.cos(angle), major * np.sin(angle))
    across = model.gaussian(params, -minor * np.sin(angle), minor * np.cos(angle))
    assert_allclose([along, across], np.exp(-0.5))


@pytest.mark.parametrize(("diff", "theta"), [(0.3, np.pi / 2), (-0.3, 0.0)])
def test_theta_on_the_axes_is_in_the_half_open_range(diff, theta):
    assert model.derived(np.array([0, 0, 1.0, 2.0, 0.0, diff]))[5] == theta


def test_a_round_source_has_finite_width_errors_and_no_angle_error():
    slope = jax.jacfwd(model.derived)(jnp.array([5.0, 5.0, 1.0, 2.0, 0.0, 0.0]))
    assert np.isfinite(slope[:5]).all()
    assert np.isnan(slope[5]).any()
