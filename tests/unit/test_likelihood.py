"""Derivatives: finite differences agree with automatic differentiation, and that with the moments."""

import jax
import jax.numpy as jnp
import numdifftools as nd
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from pipeline import likelihood, model, moments, uncertainty
from pipeline.likelihood import Image

by_autodiff = jax.jit(likelihood.terms)

LEVELS = {"none": 0, "constant": 1, "plane": 3}


@jax.jit
def by_moments(free, image):
    """The terms of `likelihood.terms`, from `moments` and from the covariances made of them."""
    places, n = list(free), jnp.sum(image.weight > 0).astype(free.dtype)
    exact, positive = (
        moments.step(places, image, n, free[-1], jnp.asarray(which), fit_scale=True) for which in (True, False)
    )
    sums = uncertainty.sums(free, image, n)
    p = len(free)
    return likelihood.Terms(
        sums.nll - jnp.sum(jnp.log(jnp.where(image.weight > 0, image.weight, 1.0))).astype(free.dtype),
        jnp.stack(exact.gradient),
        uncertainty.dense(exact.matrix, p),
        uncertainty.dense(positive.matrix, p),
        sums.scores,
    )


def case(seed, n_level, dtype=np.float64, shape=(14, 11), far=0.0):
    """An image of Cauchy noise with mask and noise map, and a free vector that need not fit it."""
    r = np.random.default_rng(seed)
    data = r.standard_cauchy(shape) + far
    weight = (r.random(shape) < 0.9) * np.exp(r.normal(0, 0.3, shape))
    image = Image(jnp.asarray(data, dtype), jnp.asarray(weight, dtype), jnp.asarray(r.uniform(0, 10, 2)))
    source = [*r.uniform(2, 9, 2), r.normal(0, 20), np.log(r.uniform(0.8, 4)), *r.uniform(-0.6, 0.6, 2)]
    return jnp.asarray(np.r_[source, r.normal(far, 0.3, n_level), r.normal(0, 0.5)]), image


def numpy_nll(public, image):
    """The contract's formula, in NumPy alone."""
    ny, nx = image.data.shape
    y, x = np.mgrid[:ny, :nx].astype(float)
    level = public[6:-1]
    slopes = [np.ones_like(x), x - image.origin[0], y - image.origin[1]]
    predicted = model.gaussian(public, x, y) + sum((c * s for c, s in zip(level, slopes, strict=False)), start=0.0)
    used = image.weight > 0
    g = public[-1] / image.weight[used]
    with np.errstate(over="ignore"):  # the first differences may leave the Gaussians that are bounded
        return np.sum(np.log(np.pi * g) + np.log(1 + ((image.data - predicted)[used] / g) ** 2))


@pytest.mark.parametrize("n_level", LEVELS.values(), ids=LEVELS)
def test_nll_agrees_with_numpy(n_level):
    free, image = case(1, n_level)
    public = likelihood.to_public(free)
    plain = numpy_nll(np.asarray(public), jax.tree.map(np.asarray, image))
    assert_allclose(likelihood.nll(public, image), plain, rtol=1e-13)


@pytest.mark.parametrize("n_level", LEVELS.values(), ids=LEVELS)
def test_autodiff_agrees_with_finite_differences_of_numpy(n_level):
    free, image = case(2, n_level)
    public = likelihood.to_public(free)
    plain = jax.tree.map(np.asarray, image)
    gradient = jax.jit(jax.grad(likelihood.nll))(public, image)
    hessian = jax.jit(jax.hessian(likelihood.nll))(public, image)
    numeric_gradient = nd.Gradient(lambda q: numpy_nll(q, plain))(np.asarray(public))
    numeric_hessian = nd.Hessian(lambda q: numpy_nll(q, plain))(np.asarray(public))
    assert_allclose(gradient, numeric_gradient, rtol=1e-6, atol=1e-6)
    assert_allclose(hessian, numeric_hessian, rtol=1e-4, atol=1e-4)


def test_terms_are_the_derivatives_of_the_nll():
    free, image = case(3, 1)

    def value(free):
        return likelihood.nll(likelihood.to_public(free), image)

    terms = by_autodiff(free, image)
    assert_allclose(terms.nll, value(free))
    assert_allclose(terms.gradient, jax.grad(value)(free), rtol=1e-10, atol=1e-10)
    assert_allclose(terms.hessian, jax.hessian(value)(free), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_level", LEVELS.values(), ids=LEVELS)
def test_gauss_newton_is_the_matrix_of_reweighted_least_squares(n_level):
    """Slopes by finite differences; no entries between the model and the scale, whose own is the sum of the weights."""
    free, image = case(7, n_level)

    def predicted(free):
        return np.asarray(likelihood.predict(likelihood.to_public(jnp.asarray(free)), image)).reshape(-1)

    weight = np.asarray(image.weight).reshape(-1)
    h = weight / np.exp(free[-1])
    v = 1 / (1 + (h * (np.asarray(image.data).reshape(-1) - predicted(free))) ** 2)
    slopes = nd.Jacobian(predicted)(np.asarray(free))[:, :-1]
    expected = np.zeros((len(free), len(free)))
    expected[:-1, :-1] = slopes.T @ (2 * (v * h * h)[:, None] * slopes)
    expected[-1, -1] = np.sum(v[weight > 0])
    assert_allclose(by_autodiff(free, image).gauss_newton, expected, rtol=1e-7, atol=1e-7)
    assert np.linalg.eigvalsh(expected)[0] > 0


def test_scores_are_the_outer_products_of_the_pixels_gradients():
    free, image = case(4, 3, shape=(5, 4))
    total = 0.0
    for y in range(5):
        for x in range(4):
            alone = image._replace(weight=jnp.zeros((5, 4)).at[y, x].set(image.weight[y, x]))
            gradient = by_autodiff(free, alone).gradient
            total = total + np.outer(gradient, gradient)
    assert_allclose(by_autodiff(free, image).scores, total, rtol=1e-10, atol=1e-10)


def test_public_derivatives_undo_the_logarithms():
    free, image = case(5, 1)
    public = likelihood.to_public(free)
    terms = by_autodiff(free, image)
    hessian, _ = likelihood.to_public_matrices(public, terms.gradient, terms.hessian, terms.scores)
    assert_allclose(hessian, jax.hessian(likelihood.nll)(public, image), rtol=1e-9, atol=1e-9)


def largest_difference(free, image):
    """Largest difference of each term between moments and float64 autodiff, in units of what the term is made of."""
    exact = by_autodiff(free, jax.tree.map(lambda a: a.astype(jnp.float64), image))
    fast = by_moments(free, image)
    size = np.sqrt(np.diag(exact.gauss_newton))
    n = np.maximum(np.sum(image.weight > 0), 1)
    unit = {"nll": n, "gradient": size * np.sqrt(n)}
    return {
        name: np.max(np.abs(np.asarray(a) - np.asarray(b)) / unit.get(name, np.outer(size, size)))
        for name, a, b in zip(exact._fields, exact, fast, strict=True)
    }


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from(list(LEVELS.values())), st.sampled_from([np.float64, np.float32]))
def test_moments_equal_autodiff_to_rounding(seed, n_level, dtype):
    worst = largest_difference(*case(seed, n_level, dtype))
    limit = {np.float64: 1e-12, np.float32: 2e-5}[dtype]
    assert np.max(list(worst.values())) < limit, worst


@pytest.mark.parametrize(("dtype", "limit"), [(np.float64, 1e-11), (np.float32, 2e-4)])
def test_moments_equal_autodiff_far_from_the_centre_of_a_wide_image(dtype, limit):
    free, image = case(7, 3, dtype, shape=(9, 400))
    free = free.at[0].set(387.3)
    worst = largest_difference(free, image)
    assert np.max(list(worst.values())) < limit, worst


@pytest.mark.parametrize(
    ("n_level", "rows", "dtype", "limit"),
    [(3, 88, np.float64, 1e-11), (1, 88, np.float32, 2e-4), (0, 90, np.float64, 1e-11)],
)
def test_sums_over_tiles_equal_autodiff(n_level, rows, dtype, limit, monkeypatch):
    """An image in tiles of 8 rows, or of 2 where 8 do not divide it; the source on the border of two."""
    monkeypatch.setattr(moments, "TILE_PIXELS", 8 * 30)
    free, image = case(9, n_level, dtype, shape=(rows, 30))
    free = free.at[1].set(47.4).at[0].set(20.0)
    jax.clear_caches()  # traced with other tiles
    worst = largest_difference(free, image)
    jax.clear_caches()
    assert np.max(list(worst.values())) < limit, worst


@pytest.mark.parametrize(("dtype", "limit"), [(np.float64, 1e-11), (np.float32, 1e-4)])
@pytest.mark.parametrize("n_level", LEVELS.values(), ids=LEVELS)
def test_slopes_times_a_polynomial_are_moments_of_higher_degree(n_level, dtype, limit):
    free, image = case(10, n_level, dtype)
    at = moments.frame(list(free), image)
    r = np.random.default_rng(10)
    poly = {(i, j): r.normal() for i in range(5) for j in range(5 - i)}

    def asked(tile):
        tables = moments.tables(tile.weight, tile, at, more=2)
        return tables, moments.slope_tables(tile.weight * tile.shape * moments.grid(poly, tile), tile, at)

    tables, direct = moments.total(asked, at, image)
    assert_allclose(moments.slopes_times(poly, at, tables), moments.slopes(at, direct), rtol=limit)


@pytest.mark.parametrize("n_level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("seed", range(4))
def test_what_rounding_moves_is_a_move_of_the_place(seed, n_level):
    """The model of scalars in float32 is that of float64 some way off, but for what is of second order."""
    free, image = case(seed, n_level)
    free = free.at[2].set(1e5).at[6 : 6 + n_level].set(jnp.array([1e5, 3e4, -2e4])[:n_level])
    image = image._replace(weight=jnp.ones_like(image.weight))
    at = moments.frame(list(free), image)

    def predicted(free):
        tile = moments.tile(moments.frame(list(free), image), image.data, image.weight, 0)
        return np.asarray(image.data - tile.t * at.scale)

    def narrow(value):
        return float(np.float32(value))

    y, x = np.mgrid[: image.data.shape[0], : image.data.shape[1]].astype(float)
    x, y = (x - float(free[0])) / float(at.sigma), (y - float(free[1])) / float(at.sigma)
    rho, plus, minus = narrow(free[4]), narrow(1 + free[5]), narrow(1 - free[5])
    rounded = narrow(free[2]) * np.exp(-0.5 * (minus * y * y + x * (plus * x + rho * y)))
    rounded += sum(c * m for c, m in zip(map(narrow, moments._plane(at)), (1.0, x, y), strict=False))
    off, of_scale = moments._rounded(at, np.float32)
    moved = predicted(free.at[jnp.asarray(list(off))].add(jnp.asarray(list(off.values()))))
    assert np.max(np.abs(rounded - predicted(free))) > 1e-4
    assert_allclose(rounded, moved, rtol=0, atol=1e-7)
    assert_allclose(of_scale, narrow(1 / at.scale) * at.scale - 1, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("wider", [-1.5, 0.0, 1.5, 6.0])
def test_what_residuals_tell(dtype, wider):
    """The share, from next to 1 at a wide scale to less than 0.5 at a narrow one; and the scale they ask for."""
    free, image = case(8, 1, dtype)
    free, n = free.at[-1].add(wider), jnp.sum(image.weight > 0).astype(float)
    found = moments.step(list(free), image, n, free[-1], jnp.asarray(False), fit_scale=True)
    used = np.asarray(image.weight) > 0
    residual = np.asarray(image.data, float) - np.asarray(likelihood.predict(likelihood.to_public(free), image))
    square = (residual * np.asarray(image.weight, float))[used] ** 2
    scale = np.exp(float(free[-1]))
    v = 1 / (1 + square / scale**2)
    assert_allclose(found.share, np.mean(v * (2 * v - 1)) / np.mean(v), rtol=1e-4)
    assert_allclose(np.exp(found.residual_scale), np.sqrt(2 * np.mean(v * square)), rtol=1e-4)
    assert {-1.5: 0.0, 0.0: 0.0, 1.5: 0.4, 6.0: 0.9}[wider] < found.share < {-1.5: 0.4, 0.0: 0.5}.get(wider, 1.0)


def test_derivatives_at_another_scale():
    """What the continuation asks for: the nll where it stands, everything else at the next scale."""
    free, image = case(6, 1)
    places, n = list(free), jnp.sum(image.weight > 0).astype(float)
    there = free.at[-1].add(-1.2)
    moved = moments.step(places, image, n, there[-1], jnp.asarray(True), fit_scale=True)
    still = moments.step(list(there), image, n, there[-1], jnp.asarray(True), fit_scale=True)
    for a, b in zip(
        jax.tree.leaves(moved._replace(judged=0.0)), jax.tree.leaves(still._replace(judged=0.0)), strict=True
    ):
        assert_allclose(a, b, rtol=1e-13)
    assert_allclose(
        moved.judged - still.nll, likelihood.nll(likelihood.to_public(free), image) - by_autodiff(there, image).nll
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("ratio", [0.0784, 0.09, 0.2826, 0.34, 0.7, 1.0, 1.5])
def test_nll_at_another_scale_is_off_by_no_more_than_its_pixels(dtype, ratio):
    """Rounding that is the same for all pixels would refuse, or welcome, every step of a large image."""
    r = np.random.default_rng(3)
    image = Image(jnp.asarray(r.normal(0, 0.02, (128, 128)), dtype), jnp.ones((128, 128), dtype), jnp.zeros(2))
    free = jnp.asarray([60.3, 61.2, 100.0, np.log(5.0), 0.1, -0.2, 0.0, np.log(30.0)])
    n, to = jnp.asarray(128.0**2), free[-1] + 0.5 * np.log(ratio)
    found = moments.step(list(free), image, n, to, jnp.asarray(False), fit_scale=False)
    predicted = likelihood.predict(likelihood.to_public(free), image)
    squares = np.square((np.asarray(image.data, float) - np.asarray(predicted)) / 30.0)
    for nll, scale, of in ((found.judged, free[-1], squares), (found.nll, to, squares / ratio)):
        assert abs(float(nll - n * scale) - np.sum(np.log1p(of))) < (1e-9 if dtype == np.float64 else 1e-4)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("sigma", "e"), [(0.3, 0.0), (0.3, 0.7), (0.3, 0.98), (0.5, 0.98), (2.0, 0.9), (9.0, 0.5)])
@pytest.mark.parametrize("angle", [0.0, 0.25 * np.pi, 0.4 * np.pi])
def test_a_source_is_the_same_on_every_row(dtype, sigma, e, angle):
    """However narrow and long, and wherever between the rows that are taken together."""
    image = Image(jnp.zeros((64, 48), dtype), jnp.ones((64, 48), dtype), jnp.zeros(2))
    y, x = np.mgrid[:64, :48].astype(float)
    for y0 in (30.1, 31.4, 32.3, 33.8):
        source = [22.3, y0, 1.0, np.log(sigma), 2 * e * np.sin(2 * angle), e * np.cos(2 * angle)]
        at = moments.frame([*map(jnp.asarray, source), jnp.asarray(0.0)], image)
        found = moments.tile(at, image.data, image.weight, 0).shape
        wanted = model.gaussian(np.array([*source[:3], sigma, *source[4:]]), x, y)
        assert_allclose(found, wanted, rtol=0, atol=1e-13 if dtype == np.float64 else 2e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", [(8, 8), (16, 24), (32, 32), (64, 8)])
def test_moments_equal_autodiff_in_sizes_that_images_are_padded_to(dtype, shape):
    free, image = case(17, 1, dtype, shape)
    worst = largest_difference(free, image)
    assert np.max(list(worst.values())) < (1e-12 if dtype == np.float64 else 2e-5), worst


def test_vmap_equals_a_loop():
    cases = [case(seed, 1) for seed in range(4)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *cases)
    together = jax.jit(jax.vmap(by_moments))(*stacked)
    for i, one in enumerate(cases):
        alone = by_moments(*one)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            assert_allclose(a[i], b, rtol=1e-12, atol=1e-12)


def test_masked_pixels_count_for_nothing():
    free, image = case(8, 1)
    other = image._replace(data=jnp.where(image.weight > 0, image.data, 1e3))
    for a, b in zip(by_moments(free, image), by_moments(free, other), strict=True):
        assert_allclose(a, b, rtol=1e-14)
