"""First guess of the parameters of one image: matched filters on two robust maps, the better likelihood kept.

Clipped residuals show bright sources, on which every robust weight vanishes; redescending ones show faint sources
among outliers. Each map is filtered with Gaussians of several widths; the strongest peak of either sign wins. Working
on filtered maps rather than on pixels is what makes hot pixels harmless.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pipeline.likelihood import Image, pixel_nll

CLIP = 4.0  # of the clipped map, in units of the half interquartile range
NARROWEST = 1.0  # pixel; widths of the filters go up from here
WIDENING = 1.7
BISECTIONS = 48
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


def _kernel(size: int, width: float, dtype) -> jax.Array:
    """(size, size) matrix that convolves with exp(-d^2 / (2 width^2))."""
    offsets = np.arange(size)[:, None] - np.arange(size)[None, :]
    return jnp.asarray(np.exp(-0.5 * (offsets / width) ** 2), dtype=dtype)


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
    variance = jnp.sum(maps**2, axis=(1, 2)) / jnp.maximum(jnp.sum(used), 1.0)

    scores, places, widths = [], [], filter_widths(ny, nx)
    for size in widths:
        column, row = _kernel(ny, size, dtype), _kernel(nx, size, dtype)
        power = (column**2) @ used @ (row**2)
        response = jnp.einsum("ij,mjk,kl->mil", column, maps, row)
        # Where most of the filter falls on unused pixels its response is mostly luck.
        enough = (power > 0.25 * jnp.max(power))[None]
        score = jnp.where(enough, response / jnp.sqrt(jnp.maximum(power, 1e-12))[None], 0.0)
        flat = jnp.abs(score).reshape(2, -1)
        places.append(jnp.argmax(flat, axis=1))
        scores.append(jnp.max(flat, axis=1) / jnp.sqrt(jnp.maximum(variance, 1e-12)))
    best = jnp.argmax(jnp.stack(scores), axis=0)
    place = jnp.stack(places)[best, jnp.arange(2)]
    width = jnp.asarray(widths, dtype)[best]
    xs, ys = jnp.arange(nx, dtype=dtype)[None, :], jnp.arange(ny, dtype=dtype)[:, None]

    candidates = []
    for m in range(2):
        row, column = place[m] // nx, place[m] % nx
        x, y = column.astype(dtype), row.astype(dtype)
        _, _, middle, peak = _peak(residual, row, column)
        for stretch in (0.5, 0.8, 1.25):
            sigma = width[m] * stretch
            shape = jnp.exp(-0.5 * ((xs - x) ** 2 + (ys - y) ** 2) / sigma**2)
            weight = used * shape / (noise * noise)
            limit = jnp.maximum(jnp.abs(peak), CLIP * scale)
            mean = jnp.sum(weight * jnp.clip(residual, -limit, limit)) / jnp.maximum(jnp.sum(weight * shape), 1e-12)
            candidates += [(x, y, amp, sigma) for amp in (middle, peak, mean)]
    smooth = jnp.abs(_median9(residual)).reshape(-1)
    row, column, middle, peak = _peak(residual, jnp.argmax(smooth) // nx, jnp.argmax(smooth) % nx)
    for bright in BRIGHT_WIDTHS:
        candidates.append((column.astype(dtype), row.astype(dtype), peak, jnp.asarray(bright, dtype)))
    table = jnp.stack([jnp.stack(c) for c in candidates])
    coarse = jnp.maximum(scale, 0.3 * jnp.max(jnp.abs(table[:, 2])))

    def cost(candidate):
        x, y, amp, sigma = candidate
        model = amp * jnp.exp(-0.5 * ((xs - x) ** 2 + (ys - y) ** 2) / sigma**2)
        return jnp.sum(used * pixel_nll(residual - model, coarse * noise))

    winner = table[jnp.argmin(jax.vmap(cost)(table))]
    source = jnp.concatenate([winner, jnp.zeros(2, dtype)])
    return source, scale
