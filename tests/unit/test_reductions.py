"""Sums of maps and of logarithms, against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from pipeline import reductions


@given(st.integers(0, 10**6))
def test_log_products_are_sums_of_logarithms(seed):
    """Of squares as far apart as they may be, in any number of rows and columns."""
    r = np.random.default_rng(seed)
    squares = 10.0 ** r.uniform(-20, 36, (int(r.integers(1, 50)), int(r.integers(1, 50))))
    squares.flat[0] = reductions.LARGEST**2
    for dtype in (np.float64, np.float32):
        there = np.asarray(squares, dtype)
        maps = [there, np.sqrt(there)]
        for found, squares_of_one in zip(reductions.log_products(list(map(jnp.asarray, maps))), maps, strict=True):
            assert_allclose(found, np.sum(np.log1p(squares_of_one.astype(float))), rtol=1e-13)


@pytest.mark.parametrize("rows", [1, 8, 12, 64])
def test_log_products_of_the_largest_squares(rows):
    squares = np.full((rows, 16), reductions.LARGEST**2)
    assert_allclose(reductions.log_products([jnp.asarray(squares)])[0], np.sum(np.log1p(squares)), rtol=1e-13)


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_a_number_that_is_none_is_not_lost_in_a_sum_of_logarithms(lost):
    squares = jnp.ones((16, 8)).at[3, 5].set(lost)
    assert_array_equal(reductions.log_products([squares])[0], lost)


@pytest.mark.parametrize("rows", [1, 3, 4, 6, 8, 20, 32, 40])
def test_column_sums(rows):
    r = np.random.default_rng(rows)
    maps = [[r.normal(size=(rows, 5)) for _ in range(k)] for k in (4, 3, 1, 5, 7, 6, 8, 2)]
    found = reductions.column_sums(jax.tree.map(jnp.asarray, maps))
    for one, values in zip(found, (one for some in maps for one in some), strict=True):
        assert_allclose(one, np.sum(values, axis=0), rtol=1e-13, atol=1e-13)
