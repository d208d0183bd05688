"""First guess of the parameters of one image: several candidates, the best likelihood kept.

Clipped residuals show bright sources, on which every robust weight vanishes; redescending ones show faint sources
among outliers. Each of these two maps is filtered with Gaussians of several widths, and the strongest peak of either
sign is a candidate. The peak of the 3 x 3 median is a third: it shows sources narrower than any filter, whose cores a
robust fit would otherwise take for outliers in their own wings. Hot pixels move none of the three.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pipeline.likelihood import Image, pixel_nll

CLIP = 4.0  # of the clipped map, in units of the half interquartile range
NARROWEST = 1.0  # pixel; widths of the filters go up from here
WIDENING = 1.7
BISECTIONS = 48
STRETCHES = (0.5, 0.8, 1.25)  # of the strongest filter's width, tried as sigma
WIDE = 0.3  # of the peak: a scale at which a first guess is near enough, and from which the continuation begins
CORE = 8.0  # most that a peak may exceed the median of its 9 pixels: a Gaussian of sigma 0.5 px
BRIGHT_WIDTHS = (0.6, 0.9, 1.4, 2.2, 3.5)  # pixel; tried at the brightest place of the 3 x 3 median
LEAST_SCALE = 1e-3  # in working units; a scale of zero has no likelihood


def quantile(values, used, probability):
    """Quantile of the used pixels by bisection: sorting is twenty times slower on a CPU.

    values, used : arrays of one shape, used 1.0 or 0.0. Returns a scalar; the midpoint of an interval of
    2^-48 of the range of values that holds the quantile.
    """
    low = jnp.min(jnp.where(used > 0, values, jnp.inf))
    high = jnp.max(jnp.where(used > 0, values, -jnp.inf))
    wanted = probability * jnp.sum(used)

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        below = jnp.sum(jnp.where(values <= middle, used, 0.0)) >= wanted
        return jnp.where(below, low, middle), jnp.where(below, middle, high)

    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (low, high))
    return 0.5 * (low + high)


def filter_widths(ny: int, nx: int) -> list[float]:
    """Widths [pixel] of the matched filters for images of ny x nx pixels."""
    widest = max(NARROWEST, 0.4 * min(max(ny, 2), max(nx, 2)))
    count = 1 + int(np.ceil(np.log(widest / NARROWEST) / np.log(WIDENING)))
    return [NARROWEST * WIDENING**i for i in range(count)]


def _strongest(maps, used, widths):
    """Place and width of the strongest response of either sign, for each map.

    maps : array (k, ny, nx), zero where unused. widths : array (w,) [pixel].
    Returns rows, columns (k,) int and widths (k,).
    """
    k, ny, nx = maps.shape

    def kernel(size, width):
        offsets = jnp.arange(size, dtype=maps.dtype)
        return jnp.exp(-0.5 * ((offsets[:, None] - offsets[None, :]) / width) ** 2)

    def peak(width):
        over_y, over_x = kernel(ny, width), kernel(nx, width)
        power = over_y**2 @ used @ over_x**2
        # Where most of the filter falls on unused pixels its response is mostly luck.
        enough = (power > 0.25 * jnp.max(power))[None]
        response = jnp.einsum("ij,mjk,kl->mil", over_y, maps, over_x)
        score = jnp.where(enough, jnp.abs(response) / jnp.sqrt(jnp.maximum(power, 1e-12))[None], 0.0).reshape(k, -1)
        return jnp.max(score, axis=1), jnp.argmax(score, axis=1)

    # One width after the other: one small program, and memory for one filter.
    scores, places = jax.lax.map(peak, widths)
    best = jnp.argmax(scores, axis=0)
    place = jnp.take_along_axis(places, best[None], axis=0)[0]
    return place // nx, place % nx, widths[best]


def _median9(image):
    """Median of each 3 x 3 neighbourhood, 0 beyond the edges, by a network of minima and maxima."""
    ny, nx = image.shape
    padded = jnp.pad(image, 1)
    shifted = [padded[i : i + ny, j : j + nx] for i in range(3) for j in range(3)]

    def order(a, b, c):
        low, high = jnp.minimum(a, b), jnp.maximum(a, b)
        return jnp.minimum(low, c), jnp.maximum(low, jnp.minimum(high, c)), jnp.maximum(high, c)

    lows, middles, highs = zip(*(order(*shifted[3 * i : 3 * i + 3]) for i in range(3)), strict=True)
    return order(order(*lows)[2], order(*middles)[1], order(*highs)[0])[1]


def _peak(image, row, column):
    """The brightest of the 9 pixels around one, and two estimates of the peak of a source there.

    Returns row, column, the median of the 9 pixels around the brightest, and the second highest of them, which is near
    the peak of a source narrower than the neighbourhood, but no more than CORE times the median: two hot pixels side
    by side are no source. The sign is that of the median.
    """
    ny, nx = image.shape
    padded = jnp.pad(image, 1)  # an edge repeated would make two hot pixels of one

    def around(row, column):
        return jax.lax.dynamic_slice(padded, (row, column), (3, 3)).reshape(-1)

    values = around(row, column)
    sign = jnp.sign(jnp.sort(values)[4])
    best = jnp.argmax(sign * values)
    row, column = jnp.clip(row + best // 3 - 1, 0, ny - 1), jnp.clip(column + best % 3 - 1, 0, nx - 1)
    ordered = jnp.sort(sign * around(row, column))
    return row, column, sign * ordered[4], sign * jnp.minimum(ordered[7], CORE * jnp.abs(ordered[4]))


def guess(image: Image):
    """First guess of one image.

    Parameters
    ----------
    image : Image
        In working units: background near 0, spread of the pixels near 1 (see `pipeline.fit`).

    Returns
    -------
    source : array (6,)
        x0, y0, amp, sigma, rho, diff.
    scale : array ()
        Half interquartile range of the used pixels over their noise map: the Cauchy half-width of pure noise.
    """
    data, used, noise = image.data, image.used, image.noise
    ny, nx = data.shape
    dtype = data.dtype
    residual = data * used
    ratio = residual / noise
    scale = 0.5 * (quantile(ratio, used, 0.75) - quantile(ratio, used, 0.25))
    scale = jnp.maximum(scale, LEAST_SCALE)
    z = ratio / scale
    maps = jnp.stack([used * jnp.clip(z, -CLIP, CLIP), used * 2.0 * z / (1.0 + z * z)])
    rows, columns, widths = _strongest(maps, used, jnp.asarray(filter_widths(ny, nx), dtype))
    xs, ys = jnp.arange(nx, dtype=dtype)[None, :], jnp.arange(ny, dtype=dtype)[:, None]

    def shape(x, y, sigma):
        return jnp.exp(-0.5 * ((xs - x) ** 2 + (ys - y) ** 2) / sigma**2)

    candidates = []
    for row, column, width in zip(rows, columns, widths, strict=True):
        x, y = column.astype(dtype), row.astype(dtype)
        _, _, middle, high = _peak(residual, row, column)
        limit = jnp.maximum(jnp.abs(high), CLIP * scale)
        for stretch in STRETCHES:
            sigma = width * stretch
            weight = used * shape(x, y, sigma)
            power = jnp.sum(weight * shape(x, y, sigma) / noise**2)
            mean = jnp.sum(weight * jnp.clip(residual, -limit, limit) / noise**2) / jnp.maximum(power, 1e-12)
            candidates += [(x, y, amp, sigma) for amp in (middle, high, mean)]
    brightest = jnp.argmax(jnp.abs(_median9(residual)))
    row, column, _, high = _peak(residual, brightest // nx, brightest % nx)
    for sigma in BRIGHT_WIDTHS:
        candidates.append((column.astype(dtype), row.astype(dtype), high, jnp.asarray(sigma, dtype)))
    table = jnp.stack([jnp.stack(candidate) for candidate in candidates])
    # All candidates are judged at one scale, wide enough for the brightest: near enough is then good enough.
    coarse = jnp.maximum(scale, WIDE * jnp.max(jnp.abs(table[:, 2])))

    def cost(candidate):
        x, y, amp, sigma = candidate
        return jnp.sum(used * pixel_nll(residual - amp * shape(x, y, sigma), coarse * noise))

    winner = table[jnp.argmin(jax.lax.map(cost, table))]
    source = jnp.concatenate([winner, jnp.zeros(2, dtype)])
    return source, scale
