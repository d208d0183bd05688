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
FILTER_WIDTH, FILTER_REACH = 1.2, 4  # pixel; of the narrowest matched filter
STRETCHES = (0.5, 0.8, 1.25)  # of the strongest filter's width, tried as sigma
WIDE = 0.3  # of the peak: a scale at which a first guess is near enough, and from which the continuation begins
CORE = 8.0  # most that a peak may exceed the median of its 9 pixels: a Gaussian of sigma 0.5 px
BRIGHT_WIDTHS = (0.6, 0.9, 1.4, 2.2, 3.5)  # pixel; tried at the brightest place of the 3 x 3 median


def _ordered(bits):
    """Bits (int64) of float64 numbers as integers that order as the numbers do, and back: it is its own inverse."""
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int64).max, bits)


def quantiles(values, used, probabilities):
    """Quantiles of the used pixels: the smallest value with at least that share of the pixels at or below it.

    By bisection of the bits of floating-point numbers: exact whatever the range of the values, and much faster than
    sorting on a CPU.

    values : float64 array, finite. used : array of its shape, 1.0 or 0.0. probabilities : k numbers. Returns (k,).
    """
    keys = _ordered(jax.lax.bitcast_convert_type(values, jnp.int64))
    limits = jnp.iinfo(jnp.int64)
    low = jnp.min(jnp.where(used > 0, keys, limits.max)) - 1
    high = jnp.max(jnp.where(used > 0, keys, limits.min + 1))
    wanted = [probability * jnp.sum(used) for probability in probabilities]

    def halve(_, ends):
        new = []
        for (low, high), share in zip(ends, wanted, strict=True):
            middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
            enough = jnp.sum(jnp.where(keys <= middle, used, 0.0)) >= share
            new.append((jnp.where(enough, low, middle), jnp.where(enough, middle, high)))
        return new

    ends = jax.lax.fori_loop(0, 64, halve, [(low, high)] * len(wanted))
    found = jnp.stack([high for _, high in ends])
    return jax.lax.bitcast_convert_type(_ordered(found), values.dtype)


def half_spread(values, used):
    """Half the interquartile range of the used pixels: the half-width of Cauchy noise."""
    low, high = quantiles(values, used, (0.25, 0.75))
    return 0.5 * (high - low)


def _smooth(maps, taps):
    """Convolve maps (k, ny, nx) with ``taps`` along both axes, zero beyond the edges."""
    _, ny, nx = maps.shape
    reach = len(taps) // 2
    padded = jnp.pad(maps, ((0, 0), (reach, reach), (0, 0)))
    maps = sum(float(tap) * padded[:, i : i + ny] for i, tap in enumerate(taps))
    padded = jnp.pad(maps, ((0, 0), (0, 0), (reach, reach)))
    return sum(float(tap) * padded[:, :, i : i + nx] for i, tap in enumerate(taps))


def _halve(maps):
    """Sums of 2 x 2 pixels; an odd last row or column is added to zeros."""
    maps = jnp.pad(maps, ((0, 0), (0, maps.shape[1] % 2), (0, maps.shape[2] % 2)))
    rows = maps[:, 0::2] + maps[:, 1::2]
    return rows[:, :, 0::2] + rows[:, :, 1::2]


def _strongest(maps, used):
    """Place and width of the strongest response of either sign to matched filters, for each map.

    Filters of doubling width: one and the same short filter on images halved again and again.

    maps : array (k, ny, nx), zero where unused. Returns y, x [pixel], widths [pixel], each (k,).
    """
    k, ny, nx = maps.shape
    offsets = np.arange(-FILTER_REACH, FILTER_REACH + 1)
    taps = np.exp(-0.5 * (offsets / FILTER_WIDTH) ** 2)
    used, found, binning = used[None], [], 1
    while True:
        power = _smooth(used, taps**2)
        # Where most of the filter falls on unused pixels its response is mostly luck.
        enough = power > 0.25 * jnp.max(power)
        score = jnp.where(enough, jnp.abs(_smooth(maps, taps)) / jnp.sqrt(jnp.maximum(power, 1e-12)), 0.0)
        columns = score.shape[2]
        score = score.reshape(k, -1)
        place = jnp.argmax(score, axis=1)
        where = [(axis.astype(maps.dtype) + 0.5) * binning - 0.5 for axis in (place // columns, place % columns)]
        width = jnp.full(k, binning * FILTER_WIDTH, maps.dtype)
        found.append(jnp.stack([jnp.max(score, axis=1), *where, width]))
        binning *= 2
        if binning * FILTER_WIDTH > max(0.4 * min(ny, nx), FILTER_WIDTH) or min(ny, nx) < 2 * binning:
            break
        maps, used = _halve(maps), _halve(used)
    table = jnp.stack(found)  # (levels, 4, k)
    best = jnp.argmax(table[:, 0], axis=0)
    return tuple(jnp.take_along_axis(table[:, i], best[None], axis=0)[0] for i in (1, 2, 3))


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


def guess(image: Image, scale):
    """First guess of one image.

    Parameters
    ----------
    image : Image
        In working units: background near 0, spread of the pixels near 1 (see `pipeline.fit`).
    scale : array ()
        First guess of the half-width of the noise.

    Returns
    -------
    array (6,)
        x0, y0, amp, sigma, rho, diff.
    """
    data, used, noise = image.data, image.used, image.noise
    ny, nx = data.shape
    dtype = data.dtype
    residual = data * used
    z = residual / (noise * scale)
    maps = jnp.stack([used * jnp.clip(z, -CLIP, CLIP), used * 2.0 * z / (1.0 + z * z)])
    places = zip(*_strongest(maps, used), strict=True)
    xs, ys = jnp.arange(nx, dtype=dtype)[None, :], jnp.arange(ny, dtype=dtype)[:, None]

    def shape(x, y, sigma):
        return jnp.exp(-0.5 * ((xs - x) ** 2 + (ys - y) ** 2) / sigma**2)

    candidates = []
    for y, x, width in places:
        row, column = jnp.clip(y, 0, ny - 1).astype(int), jnp.clip(x, 0, nx - 1).astype(int)
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
    return jnp.concatenate([winner, jnp.zeros(2, dtype)])
