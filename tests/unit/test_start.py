"""The first guess: near enough for every kind of source that the minimiser must find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import model, start
from pipeline.likelihood import Image

quantiles = jax.jit(start.quantiles, static_argnums=2)


SHAPE = (32, 32)
MIDDLE = np.array([15.5, 15.5])


@jax.jit
def guess(image, near=np.inf):
    scale = start.half_spread(image.data * image.weight, image.weight > 0)
    return start.guess(image, scale, jnp.asarray(MIDDLE), jnp.asarray(near, float)), scale


def image_of(params, seed=0, noise=1.0, mask=None):
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    data = model.gaussian(np.array(params, float), x, y) + noise * np.random.default_rng(seed).standard_normal(SHAPE)
    used = np.ones(SHAPE) if mask is None else 1.0 - mask
    return Image(data * used, used, np.zeros(2))


def distance(source, params):
    return np.hypot(source[0] - params[0], source[1] - params[1])


@given(st.integers(0, 10**6), st.sampled_from([np.float64, np.float32]))
def test_quantiles_agree_with_sorting(seed, dtype):
    r = np.random.default_rng(seed)
    values, used = r.standard_cauchy(64).astype(dtype), r.random(64) < 0.8
    ordered = np.sort(values[used])
    probabilities = (0.25, 0.5, 0.75)
    expected = [ordered[int(np.ceil(p * len(ordered))) - 1] for p in probabilities]
    found = quantiles(jnp.asarray(values), jnp.asarray(used), probabilities)
    assert np.max(np.abs(found - np.array(expected))) <= start.ACCURACY * (expected[2] - expected[0])


@pytest.mark.parametrize("offset", [0.0, 1e9, -1e-300])
def test_quantiles_are_exact_where_most_pixels_are_equal(offset):
    values = np.r_[np.full(60, offset), np.random.default_rng(0).standard_cauchy(30) * 1e200]
    single = np.clip(values, -3e38, 3e38).astype(np.float32)
    assert np.array_equal(quantiles(jnp.asarray(single), jnp.ones(90, bool), (0.25, 0.5, 0.75)), single[:3])
    assert np.array_equal(quantiles(jnp.asarray(values), jnp.ones(90, bool), (0.25, 0.5, 0.75)), [offset] * 3)


@pytest.mark.parametrize("shape", [(9, 7), (127, 3), (128, 3), (600, 2)])
@pytest.mark.parametrize("offset", [0.0, 1e9])
def test_quantiles_of_images_of_any_height(shape, offset):
    values = np.random.default_rng(shape[0]).standard_cauchy(shape) + offset
    ordered = np.sort(values, axis=None)
    expected = ordered[[int(np.ceil(p * values.size)) - 1 for p in (0.01, 0.5, 0.99)]]
    found = quantiles(jnp.asarray(values), jnp.ones(shape, bool), (0.01, 0.5, 0.99))
    assert np.max(np.abs(found - expected)) <= start.ACCURACY * (expected[2] - expected[0])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_quantiles_survive_any_range(dtype):
    values = np.array([-3.4e38, -1.0, -1e-300, 0.0, 2.0, 3.0, 1e300 if dtype == np.float64 else 3.4e38], dtype)
    low, middle, high = quantiles(jnp.asarray(values), jnp.ones(7, bool), (0.3, 0.5, 0.7))
    assert -1.0 < low < 1e-2
    assert abs(middle) < 2e-2
    assert abs(high - 2.0) < 2e-2


SOURCES = {
    "typical": (15.3, 16.8, 30, 2.2, 0.2, -0.1),
    "faint": (14.6, 15.1, 5, 2.5, 0, 0),
    "bright": (15.3, 16.8, 1e4, 2.2, 0.2, -0.1),
    "negative": (15.3, 16.8, -30, 2.2, 0.2, -0.1),
    "wide": (14.0, 17.0, 20, 7.0, 0.1, 0.1),
    "undersampled": (15.3, 16.4, 60, 0.75, 0, 0),
    "off-centre": (3.2, 27.5, 40, 2.0, 0, 0),
    "elongated": (15.0, 15.0, 40, 2.5, 1.0, 0.3),
}


@pytest.mark.parametrize("name", SOURCES)
def test_guess_is_near(name):
    params = SOURCES[name]
    source, scale = guess(image_of(params))
    assert distance(source, params) < 1.2 * params[3] + 0.7
    assert 0.25 < source[2] / params[2] < 2.5
    assert 0.3 < source[3] / params[3] < 3
    assert scale > 0


def test_hot_pixels_do_not_move_it():
    params = SOURCES["typical"]
    image = image_of(params)
    r = np.random.default_rng(1)
    data = image.data.copy()
    data.reshape(-1)[r.choice(data.size, 40, replace=False)] += 1e5
    source, _ = guess(image._replace(data=data))
    assert distance(source, params) < 2


def test_two_hot_pixels_side_by_side_in_a_corner_are_no_source():
    params = SOURCES["faint"]
    image = image_of(params)
    data = image.data.copy()
    data[0, :2] = 300.0
    source, _ = guess(image._replace(data=data))
    assert distance(source, params) < 3


@pytest.mark.parametrize("amp", [10, 100, -30])
@pytest.mark.parametrize("sigma", [1.0, 2.0, 4.0])
def test_of_two_sources_it_is_the_one_near_the_middle(sigma, amp):
    params = (15.5, 14.5, amp, sigma, 0, 0)
    brighter = (15.5 + 4.5 * sigma, 14.5 - 2 * sigma, 5 * abs(amp), sigma, 0, 0)
    one, other = image_of(params), image_of(brighter, noise=0)
    image = one._replace(data=one.data + other.data)
    assert distance(guess(image)[0], brighter) < sigma + 0.7
    assert distance(guess(image, 2.0)[0], params) < sigma + 0.7


@given(st.integers(0, 10**6))
def test_it_is_no_further_from_the_middle_than_told(seed):
    """Whatever there is elsewhere, and however wide."""
    r = np.random.default_rng(seed)
    wide = [*r.uniform(0.0, 32.0, 2), *r.uniform([-50.0, 1.0], [50.0, 8.0]), 0.0, 0.0]
    source, _ = guess(image_of(wide, seed=seed), 2.0)
    assert np.abs(source[:2] - MIDDLE).max() < 2.0 + 1e-5


def test_near_the_middle_of_everything_is_everywhere():
    image = image_of(SOURCES["off-centre"])
    np.testing.assert_array_equal(guess(image, 100.0)[0], guess(image)[0])


def test_masked_block_is_ignored():
    params = SOURCES["typical"]
    mask = np.zeros(SHAPE)
    mask[:12] = 1.0
    source, _ = guess(image_of(params, mask=mask))
    assert distance(source, params) < 2


def test_scale_is_the_half_width_of_cauchy_noise():
    data = np.random.default_rng(2).standard_cauchy((64, 64))
    _, scale = guess(Image(data, np.ones((64, 64)), np.zeros(2)))
    assert abs(scale - 1) < 0.1


def test_noise_map_counts():
    """A region of large noise outshines the source where its map is not known."""
    params = SOURCES["typical"]
    image = image_of(params)
    noise = np.ones(SHAPE)
    noise[:8] = 100.0
    data = image.data + np.where(noise > 1, 100.0 * np.random.default_rng(3).standard_normal(SHAPE), 0.0)
    source, _ = guess(image._replace(data=data, weight=1 / noise))
    assert distance(source, params) < 2
