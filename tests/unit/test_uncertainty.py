"""Covariances: closed forms where there are any, and the relations between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from pipeline import columns, fit, likelihood, model, uncertainty
from tests import stamps

IMAGES, PARAMS = stamps.draw(3, (50, 100), seed=11, shape=(24, 24))


covariances = jax.jit(uncertainty.covariances, static_argnums=3)


def at(params, image, *, fit_scale=True):
    """Covariances of one image at public parameters."""
    one = likelihood.Image(jnp.asarray(image), jnp.ones(image.shape), jnp.zeros(2))
    public = jnp.asarray(params)
    n = jnp.asarray(float(image.size))
    return covariances(likelihood.to_free(public), one, n, fit_scale), public, one


@pytest.fixture(scope="module")
def solved():
    result = fit.fit_stack(IMAGES, tolerance=1e-14)
    return at(result.params[0], IMAGES[0])


def test_hessian_is_the_inverse_of_the_autodiff_hessian(solved):
    four, public, image = solved
    assert_allclose(four.hessian @ jax.hessian(likelihood.nll)(public, image), np.eye(8), atol=1e-7)


def test_sandwich_is_made_of_the_pixels_scores(solved):
    four, public, image = solved

    def pixel(public, y, x):
        alone = image._replace(weight=jnp.zeros((24, 24)).at[y, x].set(1.0))
        return likelihood.nll(public, alone)

    yy, xx = jnp.meshgrid(jnp.arange(24), jnp.arange(24), indexing="ij")
    score = jax.vmap(jax.grad(pixel), in_axes=(None, 0, 0))(public, yy.ravel(), xx.ravel())
    assert_allclose(four.sandwich, four.hessian @ (score.T @ score) @ four.hessian, rtol=1e-6, atol=1e-12)


def test_fisher_is_the_closed_form(solved):
    four, public, image = solved
    slope = jax.jacfwd(likelihood.predict)(public, image)[..., :7].reshape(-1, 7)
    information = np.zeros((8, 8))
    information[:7, :7] = slope.T @ slope / (2 * public[-1] ** 2)
    information[7, 7] = 24 * 24 / (2 * public[-1] ** 2)
    assert_allclose(four.fisher @ information, np.eye(8), atol=1e-9)


def test_bias_is_boxs_with_the_pooled_covariance_larger_as_leverage_makes_variance(solved):
    four, public, image = solved
    slope = jax.jacfwd(likelihood.predict)(public, image)[..., :7].reshape(-1, 7)
    bend = jax.jacfwd(jax.jacfwd(likelihood.predict))(public, image)[..., :7, :7].reshape(-1, 7, 7)
    spread = np.einsum("nij,ij->n", bend, four.pooled[:7, :7])
    box = -0.5 * np.linalg.solve(slope.T @ slope, slope.T @ spread)
    t = (image.data - likelihood.predict(public, image)) / public[-1]
    s = np.ravel(t**2 / (1 + t**2))
    inverse = np.linalg.inv(slope.T @ slope)
    k = uncertainty.inflation([np.mean(s**power) for power in (1, 2, 3, 4)])
    lever = k * np.einsum("ni,ij,nj->n", slope, inverse, slope)
    larger = 1 + np.einsum("in,n,in->i", inverse @ slope.T, lever, inverse @ slope.T) / np.diag(inverse)
    assert np.all(larger > 1)
    # Of sigma it is that of its logarithm.
    curved = np.where(np.arange(7) == 3, 0.5 * np.diag(four.pooled)[:7] / public[3], 0.0)
    assert_allclose(four.bias[:7], larger * (box - curved) + curved, rtol=1e-6)


@pytest.mark.parametrize(("noise", "n"), [("cauchy", 50), ("gaussian", 50)])
def test_bias_of_the_scale_is_that_of_a_simulation(noise, n):
    """A level and a scale fitted to n numbers."""
    r, repeats = np.random.default_rng(5), 20_000
    draw = {"cauchy": r.standard_cauchy, "gaussian": r.standard_normal}[noise]
    data, true = draw((repeats, n)), {"cauchy": 1.0, "gaussian": 0.6120034}[noise]
    level, scale = np.median(data, axis=1, keepdims=True), np.ones((repeats, 1))
    for _ in range(200):
        weight = 1 / (1 + ((data - level) / scale) ** 2)
        level = np.sum(weight * data, axis=1, keepdims=True) / np.sum(weight, axis=1, keepdims=True)
        scale = scale * np.sqrt(2 * (1 - np.mean(weight, axis=1, keepdims=True)))
    found = np.log(scale / true)
    s = 1 - 1 / (1 + (draw(2_000_000) / true) ** 2)
    wanted = uncertainty.scale_bias([np.mean(s**k) for k in (1, 2, 3, 4)], n, 1, 1)
    # Three standard errors and the next order.
    assert_allclose(np.mean(found), wanted, atol=3 * np.std(found) / np.sqrt(repeats) + 0.2 * abs(wanted))


def test_held_scale_leaves_its_row_out(solved):
    four, public, _ = solved
    held, _, _ = at(public, IMAGES[0], fit_scale=False)
    assert held.pooled.shape == (7, 7)
    assert_allclose(held.fisher, four.fisher[:7, :7], rtol=1e-9)


def test_indefinite_hessian_gives_nan_in_its_two_covariances_only():
    """Far from the source the Hessian is indefinite; what is made of expectations stays finite."""
    far = np.array([3.0, 3.0, 80.0, 2.0, 0.0, 0.0, 0.0, 1.0])
    four, _, _ = at(far, IMAGES[0])
    assert np.isnan(four.hessian).all()
    assert np.isnan(four.sandwich).all()
    assert np.isfinite(four.fisher).all()
    assert np.isfinite(four.pooled).all()


@pytest.mark.parametrize("short", [1e-9, 1e-10, 3e-11, 1e-11, 3e-12])
def test_no_variance_is_negative(short):
    """Where a source is hardly bounded, the matrices that are inverted are singular but for rounding."""
    diff = -np.sqrt((1 - short) ** 2 - 0.15**2)
    source = [18.2125, 27.6265, -0.3737, 6.0222, 0.3, diff, 0.1122, 1.0076]
    four, _, _ = at(source, stamps.draw(1, (5, 10), seed=1)[0][0])
    for kind in columns.COVARIANCES:
        variances = np.diag(getattr(four, kind))
        assert not (variances < 0).any()  # NaN is no number below 0


def test_all_are_symmetric_and_positive(solved):
    four, _, _ = solved
    for kind in columns.COVARIANCES:
        matrix = np.asarray(getattr(four, kind))
        assert_allclose(matrix, matrix.T, rtol=1e-6, atol=1e-15)
        assert np.linalg.eigvalsh(matrix / np.sqrt(np.outer(np.diag(matrix), np.diag(matrix))))[0] > 0


def test_newton_step_leads_to_the_minimum():
    """From a thousandth of an error away, to a millionth."""
    result = fit.fit_stack(IMAGES, tolerance=1e-14)
    off = result.params[0] + 1e-3 * result.errors[0]
    four, _, _ = at(off, IMAGES[0])
    assert np.max(np.abs(off - four.newton_step - result.params[0]) / result.errors[0]) < 1e-5


def test_a_wide_scale_tends_to_least_squares():
    """At 100 noise widths pooled is the covariance of least squares, s^2 (J^T J)^-1, on Gaussian noise of rms s."""
    images, _ = stamps.draw(8, (20, 60), seed=12, shape=(24, 24), noise="gaussian", sigma=(2.0, 3.0))
    result = fit.fit_stack(images, scale=100.0)
    y, x = np.mgrid[:24, :24].astype(float)
    for i in range(8):
        p = jnp.asarray(result.params[i])
        slope = jax.jacfwd(lambda q: (model.gaussian(q[:6], x, y) + q[6]).ravel())(p)
        residual = images[i].ravel() - (model.gaussian(p[:6], x, y) + p[6]).ravel()
        expected = jnp.sum(residual**2) / (24 * 24 - 7) * jnp.linalg.inv(slope.T @ slope)
        assert_allclose(np.sqrt(np.diag(result.covariances[0][i])), np.sqrt(np.diag(expected)), rtol=0.01)


@pytest.mark.parametrize(
    ("noise", "g", "expected"),
    [(stats.cauchy, 1.0, 2.5), (stats.norm, 0.612, 0.127), (stats.t(3), 0.71744, 1.172)],
    ids=["cauchy", "gaussian", "t3"],
)
def test_inflation_of_known_noise(noise, g, expected):
    """Against quadrature over the density, here as quantiles of a fine grid of probabilities."""
    probability = (np.arange(400_000) + 0.5) / 400_000
    t = jnp.asarray(noise.ppf(probability) / g)
    s = t * t / (1 + t * t)
    assert_allclose(uncertainty.inflation([jnp.mean(s**k) for k in (1, 2, 3, 4)]), expected, atol=0.01)


def test_inflation_is_that_of_simulated_locations():
    """Variance of the location of 25 Cauchy pixels over its limit 2/n: 1 + 2.5/25 to this order."""
    r = np.random.default_rng(3).standard_cauchy((40_000, 25))
    place = np.median(r, axis=1, keepdims=True)
    for _ in range(60):
        weight = 1 / (1 + (r - place) ** 2)
        place = np.sum(weight * r, axis=1, keepdims=True) / np.sum(weight, axis=1, keepdims=True)
    assert abs(np.mean(place**2) / (2 / 25) - (1 + 2.5 / 25)) < 0.04


def test_bias_of_what_is_derived_is_the_delta_method():
    source = jnp.array([3.0, 4.0, 20.0, 2.0, 0.3, -0.2])
    root = np.random.default_rng(8).normal(size=(6, 6)) * np.array([0.1, 0.1, 0.5, 0.05, 0.04, 0.03])[:, None]
    covariance, bias = jnp.asarray(root @ root.T), jnp.asarray(0.1 * root[:, 0])
    slopes, bends = jax.jacfwd(model.derived)(source), jax.jacfwd(jax.jacfwd(model.derived))(source)
    wanted = slopes @ bias + 0.5 * np.einsum("kij,ij->k", bends, covariance)
    assert_allclose(uncertainty.derived_bias(source, covariance, bias), wanted[:5], rtol=1e-9)


def test_bias_of_the_axes_is_that_of_a_simulation():
    """Of ellipticities 2 errors and more. Four Monte Carlo errors and the next order."""
    source = jnp.array([3.0, 4.0, 20.0, 2.0, 0.25, 0.2])
    covariance = jnp.diag(jnp.array([0.0, 0.0, 0.5, 0.1, 0.2, 0.1]) ** 2)
    drawn = np.random.default_rng(9).multivariate_normal(source, covariance, 20_000)
    offset = model.derived(drawn)[:, :5] - np.asarray(model.derived(source))[:5]
    bias = jax.vmap(lambda one: jnp.stack(uncertainty.derived_bias(one, covariance, jnp.zeros(6))))(jnp.asarray(drawn))
    spread = offset.std(axis=0)
    assert np.all(np.mean(offset, axis=0)[1:] * [1, -1, 1, -1] > 0.1 * spread[1:])
    assert_allclose(np.mean(offset - bias, axis=0) / spread, 0, atol=4 / np.sqrt(20_000) + 0.03)


def test_no_bias_is_larger_than_noise_alone_can_make_it():
    source, covariance = jnp.array([3.0, 4.0, 20.0, 2.0, 1e-9, 1e-9]), 0.01 * jnp.eye(6)
    _, errors, _ = uncertainty.derived(source, covariance)
    found = np.abs(uncertainty.derived_bias(source, covariance, jnp.zeros(6)))
    assert np.all(found <= np.sqrt(np.pi / 2) * np.array(errors[:5]) * (1 + 1e-12))
    assert found[1] == pytest.approx(np.sqrt(np.pi / 2) * errors[1])


def test_propagate_is_the_delta_method():
    covariance = jnp.array([[0.04, 0.01], [0.01, 0.09]])
    values, errors = uncertainty.propagate(lambda p: jnp.stack([p[0] * p[1], p[0]]), jnp.array([2.0, 3.0]), covariance)
    assert_allclose(values, [6.0, 2.0])
    assert_allclose(errors, [np.sqrt(9 * 0.04 + 4 * 0.09 + 2 * 6 * 0.01), 0.2])


@pytest.mark.parametrize("ellipticity", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_the_error_of_a_direction_holds_for_round_sources_too(ellipticity):
    """Whatever the true ellipticity, here in units of its error. Monte Carlo error 0.2 points."""
    x, y = np.random.default_rng(4).standard_normal((2, 40_000)) + np.array([[ellipticity], [0.0]])
    linear = 0.5 / np.hypot(x, y)
    errors = np.asarray(uncertainty.direction_error(linear))
    inside = np.mean(np.abs(0.5 * np.arctan2(y, x)) <= errors)
    assert 0.61 < inside < 0.71
    assert (np.mean(np.abs(0.5 * np.arctan2(y, x)) < linear) < 0.6) == (ellipticity <= 1)


@pytest.mark.parametrize(
    ("ellipticity", "held"), [(0.0, 91.0), (0.5, 93.9), (1.0, 95.0), (2.0, 95.5), (3.0, 95.4), (4.0, 95.4), (8.0, 95.4)]
)
def test_intervals_of_a_direction_at_two_errors(ellipticity, held):
    """By the true ellipticity in units of its error, as measured [%]; twice the error holds fewer. MC error 0.1."""
    x, y = np.random.default_rng(5).standard_normal((2, 40_000)) + np.array([[ellipticity], [0.0]])
    offset, errors = 0.5 * np.arctan2(y, x), np.asarray(uncertainty.direction_error(0.5 / np.hypot(x, y)))
    pull = model.direction_pull(offset, errors)
    assert_array_equal(np.abs(pull) <= 1, np.abs(offset) <= errors)
    assert 100 * np.mean(np.abs(pull) <= 2) == pytest.approx(held, abs=0.5)
    # As the README says it.
    limit = 2 * np.sin(2 * errors)
    said = (errors >= np.pi / 4) | (limit >= 1) | ((np.abs(offset) < np.pi / 4) & (np.abs(np.sin(2 * offset)) < limit))
    assert_array_equal(np.abs(pull) < 2, said)
    assert (np.mean(np.abs(offset) <= 2 * errors) < 0.935) == (ellipticity <= 2)


def test_pulls_of_a_direction_far_off():
    offset, errors = np.array([1.0, -1.0, 1.5, 1e-6, 0.1]), np.array([0.1, 0.4, np.pi / 2, 1e-6, np.nan])
    expected = [1 / np.sin(0.2), -1 / np.sin(0.8), 1 / 1.25, 1.0, np.nan]
    assert_allclose(model.direction_pull(offset, errors), expected)
    # With a quarter of the variance pulls are twice as long, but where all directions are within one error.
    stretched = [2 / np.sin(0.2), -2 / np.sin(0.8), 1 / 1.25, 2.0, np.nan]
    assert_allclose(model.direction_pull(offset, errors, np.full(5, 0.25)), stretched)


def test_errors_of_a_direction_that_are_longer():
    """So that pulls are as much shorter; all directions stay so, and become so where 0.8 is passed."""
    errors, factor = np.array([0.1, 0.4, np.pi / 2, np.nan, 0.1]), np.array([1.2, 1.3, 0.9, 1.2, 1.0])
    longer = model.direction_stretched(errors, factor)
    assert_allclose(longer[[1, 2]], np.pi / 2)
    assert np.isnan(longer[3])
    assert longer[4] == 0.1
    pulls = (model.direction_pull(np.array([0.05]), error) for error in (errors[:1], longer[:1]))
    assert_allclose(next(pulls), 1.2 * next(pulls))


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.3, 2.9])
def test_a_source_without_the_bias_of_its_ellipticity(angle):
    """Half the variance across it over the length; and no more than half of it."""
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    for length, share in (
        (0.3, 1 - 0.5 * 0.1**2 / 0.3**2),
        (0.11, 1 - 0.5 * 0.1**2 / 0.11**2),
        (0.01, 0.5),
        (0.0, 1.0),
    ):
        diff, half_rho = length * along
        source = jnp.array([3.0, 4.0, 20.0, 2.0, 2 * half_rho, diff])
        block = 0.04**2 * np.outer(along, along) + 0.1**2 * np.outer(across, across)
        covariance = jnp.zeros((6, 6)).at[4, 4].set(4 * block[1, 1]).at[5, 5].set(block[0, 0])
        covariance = covariance.at[4, 5].set(2 * block[0, 1]).at[5, 4].set(2 * block[0, 1])
        rounder, left = uncertainty.rounder(source, covariance)
        assert_allclose(left, share)
        assert_allclose(rounder, [3, 4, 20, 2, 2 * share * half_rho, share * diff], atol=1e-15)


def test_errors_of_what_is_derived_are_those_without_bias():
    """But for the direction, which is that of the source as found; measured by the calibration."""
    source = jnp.array([3.0, 4.0, 20.0, 2.0, 0.3, 0.15])
    covariance = jnp.diag(jnp.array([0.0, 0.0, 0.5, 0.1, 0.2, 0.1]) ** 2)
    values, errors, _ = uncertainty.derived(source, covariance)
    assert_allclose(values, model.derived(source))
    rounder, _ = uncertainty.rounder(source, covariance)
    assert_allclose(errors[:5], uncertainty.propagate(model.derived, rounder, covariance)[1][:5])
    linear = uncertainty.propagate(model.derived, source, covariance)[1][5]
    assert_allclose(errors[5], uncertainty.direction_error(linear))


def test_an_error_of_what_is_biased_holds():
    for bias in (0.0, -0.3, 0.75, 1.0):
        more = float(uncertainty.of_biased(bias))
        assert stats.norm.cdf(more - abs(bias)) - stats.norm.cdf(-more - abs(bias)) == pytest.approx(0.683, abs=0.01)


def test_what_is_not_known_has_no_error_of_its_direction():
    assert np.isnan(uncertainty.direction_error(jnp.nan))
    assert_allclose(uncertainty.direction_error(jnp.inf), np.pi / 2)
    assert_allclose(uncertainty.direction_error(1e-9), 1e-9)
