"""Sums over the pixels of one image, for the built-in Gaussian: exact derivatives of the likelihood, by moments.

With X = (x - x0) / sigma, Y = (y - y0) / sigma and E = exp(-q/2), every first derivative of the model is E times a
polynomial of degree 2 in X, Y and every second derivative E times one of degree 4. So the pixels enter the gradient
and the Hessian only through moments sum w X^i Y^j of a few weight maps w, which are products of small matrices; what is
left are sums of a few products of numbers. Equal to `likelihood.terms` to rounding, at a small part of its cost
(design: section 4).

What a caller wants of the pixels it asks for: a function of a `Tile` returns a tree of `Moments`, `Sum` and `Logs`, and
`total` gives back the tree of their values. On a processor the time goes into operations on maps, of which no compiler
makes fewer: so factors that are the same for all pixels are left to the sums, where they can be, and in float64 the
exponential is that of strips of rows, times small ones that lead from there to each row. Maps times powers of Y are
added along y (`pipeline.reductions`); what is left of each, one row, goes into one small product with the powers of X.

Coordinates move with the source and are measured in its width, which keeps float32 accurate anywhere in any image.
Pixels are taken in the floating-point type of the image, everything else in that of the parameters. Images too large
for the processor's cache are taken in tiles of some rows: all sums are sums over tiles.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pipeline.likelihood import Image
from pipeline.reductions import LARGEST, STRIP, column_sums, log_products

TILE_PIXELS = 1 << 17  # most pixels taken at once; the Hessian of 3000 x 3000 by 2^15 takes 1.2 times as long on one
# thread, 2.2 times on two
DEGREE = 6  # most that a moment has
LEAST = 1e-30  # in place of a sum that is 0
STEEPEST = 340.0  # exponent within a strip: the product of two is a number

Polynomial = dict[tuple[int, int], jax.Array]  # coefficients of X^i Y^j
MONOMIALS = ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2))  # all that a first derivative has

#: Some accelerators else take float32 for less than it is.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Frame(NamedTuple):
    """What the parameters mean for every tile: scalars, and the model's derivatives as polynomials in X and Y.

    slopes : d m / d p_i = factors[i] * E * slopes[i] for the six of the source, and ground[b] for the background.
    bends : d2 log E / d p_i d p_j for the six, in the lower triangle; that of amp makes the curvature of m in it 0.
    """

    x0: jax.Array
    y0: jax.Array
    amp: jax.Array
    sigma: jax.Array
    rho: jax.Array
    diff: jax.Array
    level: list
    scale: jax.Array
    factors: list
    slopes: list
    bends: dict
    ground: list


class Tile(NamedTuple):
    """Some rows of an image under a model: X (nx,), the powers of Y (7, rows), and maps (rows, nx).

    columns : (nx, 8), the powers of X in float64, and zeros: products of this width are the fastest. shape : E.
    weight : that of the image. t : data - model over the half-width, 0 where unused. v : 1 / (1 + t^2), 1 where unused.
    s : t^2 / (1 + t^2), 0 where unused.
    """

    x: jax.Array
    y: jax.Array
    columns: jax.Array
    shape: jax.Array
    weight: jax.Array
    t: jax.Array
    v: jax.Array
    s: jax.Array


class Moments(NamedTuple):
    """What is asked for: sum w X^i Y^j of a map w (rows, nx), i, j <= degree, at [j, i]; a scalar for degree 0."""

    weights: jax.Array
    degree: int


class Sum(NamedTuple):
    """What is asked for: the sum of a map (rows, nx)."""

    values: jax.Array


class Logs(NamedTuple):
    """What is asked for: sum log(1 + s) of a map s (rows, nx), 0 <= s <= LARGEST^2."""

    squares: jax.Array


def frame(free, image: Image) -> Frame:
    """The model at ``free``, a sequence of p scalars (see `pipeline.likelihood`)."""
    x0, y0, amp, log_sigma, rho, diff = free[:6]
    level, sigma, scale = list(free[6:-1]), jnp.exp(log_sigma), jnp.exp(free[-1])
    a, b, c, s = (1.0 + diff) / sigma, (1.0 - diff) / sigma, 0.5 * rho / sigma, 1.0 / sigma
    width = {(2, 0): 1.0 + diff, (1, 1): rho, (0, 2): 1.0 - diff}
    slopes = [
        {(1, 0): a, (0, 1): c},
        {(1, 0): c, (0, 1): b},
        {(0, 0): 1.0},
        width,
        {(1, 1): -0.5},
        {(2, 0): -0.5, (0, 2): 0.5},
    ]
    bends = {
        (0, 0): {(0, 0): -a * s},
        (1, 0): {(0, 0): -c * s},
        (1, 1): {(0, 0): -b * s},
        (2, 2): {(0, 0): -1.0},
        (3, 0): {key: -2.0 * value for key, value in slopes[0].items()},
        (3, 1): {key: -2.0 * value for key, value in slopes[1].items()},
        (3, 3): {key: -2.0 * value for key, value in width.items()},
        (4, 0): {(0, 1): 0.5 * s},
        (4, 1): {(1, 0): 0.5 * s},
        (4, 3): {(1, 1): 1.0},
        (5, 0): {(1, 0): s},
        (5, 1): {(0, 1): -s},
        (5, 3): {(2, 0): 1.0, (0, 2): -1.0},
    }
    origin = image.origin.astype(x0.dtype)
    ground = [{(0, 0): 1.0}, {(0, 0): x0 - origin[0], (1, 0): sigma}, {(0, 0): y0 - origin[1], (0, 1): sigma}]
    factors = [amp, amp, jnp.ones_like(amp), amp, amp, amp]
    return Frame(x0, y0, amp, sigma, rho, diff, level, scale, factors, slopes, bends, ground[: len(level)])


def total(function, at: Frame, image: Image):
    """The values of what ``function(tile)`` asks for, summed over the tiles of an image: float64, in the same tree."""
    ny, nx = image.data.shape
    rows = ny
    if ny * nx > TILE_PIXELS:
        rows = max([8 * k for k in range(1, 1 + TILE_PIXELS // (8 * nx)) if ny % (8 * k) == 0], default=math.gcd(ny, 8))

    def values(data, weight, first):
        here = tile(at, data, weight, first)
        return _answer(function(here), here)

    if rows == ny:
        return values(image.data, image.weight, 0)

    def add(so_far, block):
        return jax.tree.map(jnp.add, so_far, values(*block)), None

    blocks = (
        image.data.reshape(-1, rows, nx),
        image.weight.reshape(-1, rows, nx),
        rows * np.arange(ny // rows, dtype=float),
    )
    shapes = jax.eval_shape(lambda: values(image.data[:rows], image.weight[:rows], 0))
    return jax.lax.scan(add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), blocks)[0]


def _answer(asked, tile: Tile):
    """The values of a tree of `Moments`, `Sum` and `Logs` in one tile, float64."""
    leaves, tree = jax.tree.flatten(asked, is_leaf=lambda node: isinstance(node, Moments | Sum | Logs))
    rows = [_times_powers(leaf, tile) for leaf in leaves if not isinstance(leaf, Logs)]
    table = matmul(jnp.stack(column_sums(rows)).astype(jnp.float64), tile.columns)
    parts = jnp.split(table, np.cumsum([len(maps) for maps in rows])[:-1])
    sums = iter([part[:, : len(part)] if len(part) > 1 else part[0, 0] for part in parts])
    logs = iter(log_products([leaf.squares for leaf in leaves if isinstance(leaf, Logs)]))
    return jax.tree.unflatten(tree, [next(logs if isinstance(leaf, Logs) else sums) for leaf in leaves])


def _times_powers(leaf, tile: Tile) -> list:
    """The map of a `Moments` or `Sum`, times the powers of Y as far as they are asked for."""
    degree = leaf.degree if isinstance(leaf, Moments) else 0
    return [leaf[0], *(leaf[0] * power[:, None] for power in tile.y[1 : degree + 1])]


def tile(at: Frame, data, weight, first) -> Tile:
    """Rows of an image, data and weight (rows, nx), of which the first is row ``first``, under the model."""
    rows, nx = data.shape
    dtype = data.dtype
    # Constants, not the compiler's counters: of these it makes new ones for each tile, and never sees that they agree.
    columns = (np.arange(nx, dtype=at.x0.dtype) - at.x0) / at.sigma
    x = jnp.asarray(columns, dtype)
    y = ((first + np.arange(rows, dtype=at.x0.dtype) - at.y0) / at.sigma).astype(dtype)
    rho, plus, minus = (value.astype(dtype) for value in (at.rho, 1.0 + at.diff, 1.0 - at.diff))

    if dtype == jnp.float64:
        # E at the middle of each strip, and what leads from there to each of its rows: less than half of the
        # exponentials. Not in float32, where they are too large or too small for sources that are narrow and long: at
        # sigma 0.3 and ellipticity 0.98 E would be off by a quarter of the peak, and everywhere by three roundings.
        strip = math.gcd(rows, STRIP)
        middle = ((first + np.arange(0.5 * (strip - 1), rows, strip) - at.y0) / at.sigma)[:, None]
        away = ((np.arange(strip) - 0.5 * (strip - 1)) / at.sigma)[None, :]
        at_middle = jnp.exp(-0.5 * (minus * middle * middle + x[None, :] * (plus * x[None, :] + rho * middle)))
        across = jnp.exp(jnp.minimum(-0.5 * rho * away.T * x[None, :], STEEPEST))
        along = jnp.exp(jnp.minimum(-0.5 * minus * away * (2.0 * middle + away), STEEPEST))
        shape = (at_middle[:, None, :] * (across[None, :, :] * along[:, :, None])).reshape(rows, nx)
    else:
        shape = jnp.exp(-0.5 * ((minus * y * y)[:, None] + x[None, :] * (plus * x[None, :] + (rho * y)[:, None])))

    predicted = at.amp.astype(dtype) * shape
    if at.level:
        plane = [c.astype(dtype) for c in _plane(at)]
        predicted = predicted + plane[0]
        if len(plane) > 1:
            predicted = predicted + (plane[1] * x)[None, :] + (plane[2] * y)[:, None]
    t = jnp.clip((data - predicted) * (weight * (1.0 / at.scale).astype(dtype)), -LARGEST, LARGEST)
    square = t * t
    v = 1.0 / (1.0 + square)
    powers = jnp.pad(_powers(columns).T, ((0, 0), (0, 7 - DEGREE)))
    return Tile(x, _powers(y), powers, shape, weight, t, v, square * v)


def _plane(at: Frame) -> list:
    """The background as coefficients of 1, X and Y, as many as it has parameters."""
    polys = list(zip(at.level, at.ground, strict=True))
    return [sum(c * poly.get(key, 0.0) for c, poly in polys) for key in MONOMIALS[: len(polys)]]


def _rounded(at: Frame, dtype) -> tuple[dict, jax.Array]:
    """How far the place that `tile` takes pixels at is from ``at``: {place: shift}, and that of the logarithm of h.

    Numbers that are the same for all pixels are rounded for all alike: in float32 to as much as a last step changes.
    """

    def shift(value):
        return value.astype(dtype).astype(value.dtype) - value

    plus, minus = shift(1.0 + at.diff), shift(1.0 - at.diff)
    both = 0.5 * (plus + minus)
    off = {2: shift(at.amp), 3: -0.5 * both, 4: shift(at.rho) - at.rho * both, 5: 0.5 * (plus - minus) - at.diff * both}
    if at.level:
        level, *tilt = map(shift, _plane(at))
        tilt = [slope / at.sigma for slope in tilt]
        off[6] = level - sum(slope * poly[0, 0] for slope, poly in zip(tilt, at.ground[1:], strict=True))
        off |= {7 + i: slope for i, slope in enumerate(tilt)}
    return off, shift(1.0 / at.scale) * at.scale


def _powers(x):
    powers = [jnp.ones_like(x)]
    for _ in range(DEGREE):
        powers.append(powers[-1] * x)
    return jnp.stack(powers)


def grid(poly: Polynomial, tile: Tile):
    """The values of a polynomial of degree <= 4 at the pixels of a tile (rows, nx), by Horner's rule along x."""
    dtype = tile.x.dtype
    x, zero = tile.x[None, :], jnp.zeros((tile.y.shape[1], 1), dtype)
    value = zero
    for i in range(max(i for i, _ in poly), -1, -1):
        terms = (jnp.asarray(c, dtype) * tile.y[j][:, None] for (k, j), c in poly.items() if k == i)
        value = value * x + sum(terms, start=zero)
    return value


def bump(tile: Tile, at: Frame):
    """4 (log E)^2 E: how a source with more peak and wings differs from a Gaussian."""
    return tile.shape * grid(at.slopes[3], tile) ** 2  # this slope is -2 log E


def multiply(a: Polynomial, b: Polynomial) -> Polynomial:
    """The product of two polynomials."""
    product: Polynomial = {}
    for (i, j), u in a.items():
        for (k, m), v in b.items():
            place = i + k, j + m
            product[place] = product[place] + u * v if place in product else u * v
    return product


def integral(poly: Polynomial, moments):
    """The sum over the pixels of a weight map times a polynomial, from its moments, a scalar if of degree 0."""
    return sum(value * (moments[j, i] if moments.ndim else moments) for (i, j), value in poly.items())


def tables(weights, tile: Tile, at: Frame, more: int = 0) -> list:
    """To ask for: the moments of a map w that sum w (d m / d p_i) (d m / d p_j) is made of: of w E^2, w E and w.

    more : by how much higher a degree those with E have, for `slopes_times`.
    """
    shaped = weights * tile.shape
    source = Moments(shaped * tile.shape, 4 + more)  # of E times E the compiler makes another exponential
    if not at.level:
        return [source]
    degree = len(at.level) // 2
    return [source, Moments(shaped, 2 + degree + more), Moments(weights, 2 * degree)]


def dot(left, right):
    """left @ right.T of two small matrices, or of a matrix and a vector.

    Term by term: all of a batch in one go. Of 6 x 6 numbers a matrix product, a call for each, takes 5 times as long,
    and a sum along an axis 6 times.
    """
    if right.ndim == 1:
        return sum(left[:, k] * right[k] for k in range(len(right)))
    terms = (left[:, k, None] * right[None, :, k] for k in range(left.shape[1]))
    return sum(terms, start=jnp.zeros((len(left), len(right)), left.dtype))


def enclosed(outer, inner):
    """outer @ inner @ outer of two small symmetric matrices."""
    return dot(dot(outer, inner), outer)


def coefficients(at: Frame) -> tuple[jax.Array, jax.Array]:
    """The derivatives of the model as rows of coefficients: (6, 6) of E times MONOMIALS, (b, 3 or 1) of the first."""

    def rows(polys, factors, keys):
        entries = [f * jnp.asarray(poly.get(key, 0.0)) for poly, f in zip(polys, factors, strict=True) for key in keys]
        return jnp.stack(entries).reshape(len(polys), len(keys))

    ground = MONOMIALS[: len(at.ground)]
    level = rows(at.ground, [1.0] * len(ground), ground) if ground else jnp.zeros((0, 0))
    return rows(at.slopes, at.factors, MONOMIALS), level


def products(at: Frame, moments: list):
    """sum w (d m / d p_i) (d m / d p_j) by the values of `tables`, (p, p), for source and background."""
    source, ground = coefficients(at)

    def between(left, table, right):
        (i, j), (k, m) = (np.array(MONOMIALS[: side.shape[1]]).T[:, None, :] for side in (left, right))
        middle = table[m.T + j, k.T + i] if table.ndim else table[None, None]
        return dot(dot(left, middle), right)

    corner = between(source, moments[0], source)
    if not at.level:
        return corner
    side = between(ground, moments[1], source)
    return jnp.block([[corner, side.T], [side, between(ground, moments[2], ground)]])


def _ground_products(at: Frame, moments: list) -> dict:
    """The rows of sum w (d m / d p_i) (d m / d p_j) that belong to the background, from two `Moments` of w."""
    lower = {}
    for i, ground in enumerate(at.ground):
        for j in range(6):
            lower[6 + i, j] = at.factors[j] * integral(multiply(ground, at.slopes[j]), moments[0])
        for j in range(i + 1):
            lower[6 + i, 6 + j] = integral(multiply(ground, at.ground[j]), moments[1])
    return lower


def slope_tables(weights, tile: Tile, at: Frame) -> list:
    """To ask for: the moments of a map w that sum w (d m / d p_i) is made of: of w E and w."""
    shaped = Moments(weights * tile.shape, 2)
    return [shaped, Moments(weights, len(at.level) // 2)] if at.level else [shaped]


def slopes(at: Frame, moments: list) -> list:
    """sum w (d m / d p_i) from the values of `slope_tables`, for source and background."""
    source = [factor * integral(poly, moments[0]) for factor, poly in zip(at.factors, at.slopes, strict=True)]
    return source + [integral(poly, moments[1]) for poly in at.ground]


def slopes_times(poly: Polynomial, at: Frame, found: list) -> list:
    """sum w E P (d m / d p_i) for a polynomial P from the values of `tables` of w, ``more`` the degree of P - 2.

    Moments of a map times a polynomial are moments of the map: no pixel is looked at again. Of long sources along a
    diagonal terms cancel: by 1e2 at an ellipticity of 0.9, by 1e4 at 0.98.
    """

    def times(table, degree):
        shifted = (value * table[j : j + degree + 1, i : i + degree + 1] for (i, j), value in poly.items())
        return sum(shifted, start=jnp.zeros((degree + 1, degree + 1), table.dtype))

    return slopes(at, [times(table, degree) for table, degree in zip(found, (2, len(at.level) // 2), strict=False)])


class Step(NamedTuple):
    """What the minimiser wants to know of a place: scalars; matrices as {(row, column): entry}, column <= row.

    judged : nll at the scale of the place itself. nll, gradient, matrix : at the scale asked for; the matrix is the
    Hessian where ``exact`` was true, else that of Gauss and Newton, see `pipeline.likelihood.Terms`. spread :
    tr(H^-1 S) / p, as far as residuals have one distribution all over the image; so far, the Hessian is ``share`` times
    the matrix of Gauss and Newton, but for the scale: the mean of psi' over that of the weights, 2 v / g^2.
    residual_scale : logarithm of the scale that the residuals ask for, by one step of expectation and maximisation. All
    nll are without the terms that do not depend on the parameters.
    """

    judged: jax.Array
    nll: jax.Array
    gradient: list
    matrix: dict
    spread: jax.Array
    share: jax.Array
    residual_scale: jax.Array


def step(free, image: Image, n, log_scale, exact, *, fit_scale: bool) -> Step:
    """Derivatives in the free vector at another scale than that of ``free``.

    Parameters
    ----------
    free : sequence of p scalars
        The place.
    image : Image
    n : scalar
        Number of used pixels.
    log_scale : scalar
        Logarithm of the scale at which derivatives are taken.
    exact : scalar bool
        Whether the matrix is the Hessian.
    fit_scale : bool
        Whether the scale is a parameter; its entries are 0 if not.
    """
    at = frame([*free[:-1], log_scale], image)
    dtype = image.data.dtype
    ratio = jnp.exp(2.0 * (log_scale - free[-1])).astype(dtype)
    newton, amp = exact.astype(dtype), at.amp.astype(dtype)
    flat, curved, bending = 1.0 - 2.0 * newton, 2.0 * newton, newton * at.scale.astype(dtype)
    degree = len(at.level) // 2

    def asked(tile):
        # Times the scale, half of psi, the derivative of the nll in a pixel; times its square, half of psi', that of
        # psi, where the matrix is not exact the weight of least squares; and of psi's derivative in log scale, a
        # quarter. Both parts of the Hessian, psi' (d m / d p)^2 and -psi d2 m / d p^2, have the same polynomials but
        # for the bends: so one map for both, over amp. The model is linear in amp, so that its own entry, the sum of
        # psi' E^2, has no other part.
        e, v, square = tile.shape, tile.v, tile.t * tile.t
        light = tile.weight * v
        psi = light * tile.t
        bent = tile.weight * light * (flat + curved * v)
        shaped = e * bent
        return {
            "cross": slope_tables(psi * v, tile, at) if fit_scale else [],
            "ground": [Moments(shaped, 2 + degree), Moments(bent, 2 * degree)] if at.level else [],
            "psi": slope_tables(psi, tile, at),
            "s": [Sum(tile.s), Sum(tile.s * v)],
            "source": [Moments(e * (amp * shaped - bending * psi), 4), Sum(e * shaped)],
            "logs": [Logs(square), Logs(jnp.minimum(ratio * square, LARGEST**2))],
        }

    found = total(asked, at, image)
    unit = 1.0 / at.scale
    psi, ground, source, cross = (
        [by * table for table in found[name]]
        for name, by in (
            ("psi", 2.0 * unit),
            ("ground", 2.0 * unit * unit),
            ("source", 2.0 * unit * unit),
            ("cross", 4.0 * unit),
        )
    )
    (s, sv), (nll, judged) = found["s"], found["logs"]
    matrix = _ground_products(at, ground)
    matrix[2, 2] = source[1]
    for place in [(i, j) for i in range(6) for j in range(i + 1) if (i, j) != (2, 2)]:
        entry = integral(multiply(*(at.slopes[i] for i in place)), source[0])
        entry = entry - jnp.where(exact, integral(at.bends.get(place, {}), psi[0]), 0.0)
        matrix[place] = entry if 2 in place else at.amp * entry
    gradient = [-slope for slope in slopes(at, psi)]
    last = len(gradient)
    if fit_scale:
        for j, entry in enumerate(slopes(at, cross)):
            matrix[last, j] = jnp.where(exact, entry, 0.0)
        matrix[last, last] = jnp.where(exact, 4.0 * sv, n - s)
        gradient.append(n - 2.0 * s)  # the sum of 2 v - 1
    # First order puts right what was rounded for all pixels alike. Not so for ``judged`` at another scale than the
    # place's own, nor for the gradient where the matrix is not its derivative: no last step is there.
    off, of_scale = _rounded(at, dtype)
    rounding = 2.0 * s * of_scale + sum(gradient[j] * by for j, by in off.items())
    gradient = [
        slope - jnp.where(exact, sum(matrix[max(i, j), min(i, j)] * by for j, by in off.items()), 0.0)
        for i, slope in enumerate(gradient)
    ]
    return Step(
        judged=judged + n * free[-1] - jnp.where(log_scale == free[-1], rounding, 0.0),
        nll=nll + n * log_scale - rounding,
        gradient=gradient,
        matrix=matrix,
        spread=spread(s, sv, n),
        share=(n - s - 2.0 * sv) / jnp.maximum(n - s, LEAST),  # the sums of v (2 v - 1) and of v
        residual_scale=log_scale + 0.5 * jnp.log(2.0 * jnp.maximum(s, LEAST) / jnp.maximum(n, 1.0)),
    )


def spread(s, sv, n):
    """tr(H^-1 S) / p from the sums of s and s v over n used pixels, as E psi^2 / E psi'; positive."""
    return jnp.maximum(2.0 * sv / jnp.maximum(n - s - 2.0 * sv, 1e-12 * n), LEAST)
