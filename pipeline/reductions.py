"""Sums over the pixels of many maps, and of their logarithms, in few passes. Knows no model.

A map that is only added up is worked out in the pass that adds it. So one reduction of several maps shares what they
have in common. On a processor it is vectorised where few rows are combined to one at a time.
"""

import math

import jax
import jax.numpy as jnp

# Rows that are added in one go, and in float64 share exponentials; with 8 all takes twice as long.
STRIP = 4
MAPS_AT_ONCE = 8  # most maps in one pass; with 5 a step takes a quarter longer, with 6 or 7 about as long
LARGEST = 1e18  # residual over half-width, whose square still is a float32 number, and the product of 8 a float64 one


def column_sums(maps) -> list:
    """The sums of maps along y.

    maps : lists of arrays (rows, nx) of one type; what is in a list, at most MAPS_AT_ONCE, has work in common and is
    added in one pass. Returns arrays (nx,), in order, of all lists one after the other.
    """
    passes: list[list] = []
    for some in maps:
        if not passes or len(passes[-1]) + len(some) > MAPS_AT_ONCE:
            passes.append([])
        passes[-1] += some
    return [line for some in passes for line in _added(some)]


def _added(maps) -> list:
    """The sums along y of a few maps (rows, nx), in one pass over all of them; each (nx,)."""
    together = math.gcd(len(maps[0]), STRIP)
    while len(maps[0]) > 1:
        maps = _together(maps, together if together > 1 else len(maps[0]), jnp.add, 0)
        together = math.gcd(len(maps[0]), 8)
    return [one[0] for one in maps]


def _together(maps, count, combine, start) -> list:
    """Maps (rows, nx) with each ``count`` rows combined to one, all maps in one pass; arrays (rows / count, nx)."""
    return jax.lax.reduce(
        [one.reshape(-1, count, one.shape[1]) for one in maps],
        [jnp.asarray(start, one.dtype) for one in maps],
        lambda a, b: list(map(combine, a, b)),
        (1,),
    )


def log_products(maps) -> list:
    """sum log(1 + s) of some maps (rows, nx), 0 <= s <= LARGEST^2; float64 ().

    Of products, since logarithms are slow: of 8 numbers, then of the mantissas of up to 64 of these. 1 + s is taken in
    float64, because the sum of many s may be of weight where each is nothing beside 1.
    """
    if not maps:
        return []
    factors = [1.0 + squares.astype(jnp.float64) for squares in maps]
    products = _together(factors, math.gcd(len(factors[0]), 8), jnp.multiply, 1)
    parts = [jnp.frexp(one) for one in products]
    mantissas = [mantissa for mantissa, _ in parts]
    for _ in range(2):  # along y, then along x
        mantissas = [one.T for one in _together(mantissas, math.gcd(len(mantissas[0]), 8), jnp.multiply, 1)]
    return [
        math.log(2.0) * jnp.sum(exponent).astype(jnp.float64) + jnp.sum(jnp.log(mantissa))
        for (_, exponent), mantissa in zip(parts, mantissas, strict=True)
    ]
