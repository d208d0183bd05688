"""First guess of the parameters of one image: several candidates, the best likelihood kept.

Clipped residuals show bright sources, on which every robust weight vanishes; redescending ones show faint sources
among outliers. Each of these two maps is filtered with Gaussians of several widths, and the strongest peak of either
sign is a candidate. The peak of the 3 x 3 median is a third: it shows sources narrower than any filter, whose cores a
robust fit would otherwise take for outliers in their own wings. Hot pixels move none of the three. Where the place of
the source is known, the three are peaks near it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pipeline.likelihood import Image
from pipeline.moments import LARGEST, log_product

ACCURACY = 5e-3  # of quantiles
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
    """Quantiles of the used pixels, off by no more than ACCURACY of the distance of the first from the last.

    By bisection of the bits of floating-point numbers: its cost does not depend on the range of the values, and is a
    fifth of that of sorting on a CPU. Where first and last are equal, they are exact.

    values : float64 array, finite. used : bool array of its shape. probabilities : k rising numbers. Returns (k,).
    """
    limits = jnp.iinfo(jnp.int64)
    keys = jnp.where(used, _ordered(jax.lax.bitcast_convert_type(values, jnp.int64)), limits.max)
    count = jnp.sum(used, dtype=jnp.int32).astype(float)
    low, high = jnp.min(keys) - 1, jnp.max(jnp.where(used, keys, limits.min + 1))
    ranks = [jnp.ceil(probability * count) for probability in probabilities]

    def value(key):
        return jax.lax.bitcast_convert_type(_ordered(key), values.dtype)

    def halve(carry):
        n, ends = carry
        new = []
        for (low, high), rank in zip(ends, ranks, strict=True):
            middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
            # Along one axis in whole numbers, along the other not: two sums of one kind are not vectorised.
            columns = jnp.sum(keys <= middle, axis=0, dtype=jnp.int32)
            enough = jnp.sum(columns.astype(float)) >= rank
            new.append((jnp.where(enough, low, middle), jnp.where(enough, middle, high)))
        return n + 1, new

    def unclear(carry):
        n, ends = carry
        widest = jnp.max(jnp.stack([value(high) - value(low) for low, high in ends]))
        return (n < 64) & ~(widest < ACCURACY * (value(ends[-1][0]) - value(ends[0][1])))

    _, ends = jax.lax.while_loop(unclear, halve, (0, [(low, high)] * len(ranks)))
    return jnp.stack([value(high) for _, high in ends])


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


def _brightest(image):
    """Row and column of the largest value: of its row first, which vectorises as a search of all pixels does not."""
    row = jnp.argmax(jnp.max(image, axis=1))
    return row, jnp.argmax(image[row])


def _peaks(image, binning, centre, near):
    """An image (ny, nx) of values >= 0 where it has a peak near the centre, else negative, least far from the centre.

    A peak, because what is near may hold the wing of a brighter source that is not. Pixels are ``binning`` wide. Where
    there is no peak the centre is the largest, the larger the higher the image is there.
    """
    ny, nx = image.shape
    padded = jnp.pad(image, 1)
    highest = jnp.max(jnp.stack([padded[i : i + ny] for i in range(3)]), axis=0)
    highest = jnp.max(jnp.stack([highest[:, j : j + nx] for j in range(3)]), axis=0)

    def within(reach):
        rows, columns = (
            jnp.abs((jnp.arange(length, dtype=at.dtype) + 0.5) * binning - 0.5 - at)
            <= jnp.maximum(reach, 0.5 * binning)
            for length, at in zip(image.shape, centre, strict=True)
        )
        return rows[:, None] & columns[None, :]

    at_centre = jnp.where(within(0.0), -1.0 / (1.0 + image), -2.0)
    return jnp.where(within(near) & (image >= highest), image, at_centre)


def _strongest(maps, used, centre, near):
    """Place and width of the strongest response of either sign to matched filters near the centre, for each map.

    Filters of doubling width: one and the same short filter on images halved again and again.

    maps : array (k, ny, nx), zero where unused. centre, near : as in `guess`. Returns k of (y, x, width) [pixel].
    """
    k, ny, nx = maps.shape
    offsets = np.arange(-FILTER_REACH, FILTER_REACH + 1)
    taps = np.exp(-0.5 * (offsets / FILTER_WIDTH) ** 2)
    maps, binning = jnp.concatenate([maps, used[None]]), 1
    best: list[tuple] = [(jnp.full((), -2.0, maps.dtype),) * 4] * k
    while True:
        power = _smooth(maps[k:], taps**2)[0]
        # Where most of the filter falls on unused pixels its response is mostly luck.
        enough = power > 0.25 * jnp.max(power)
        norm = jnp.where(enough, jax.lax.rsqrt(jnp.maximum(power, 1e-12)), 0.0)
        for i, response in enumerate(_smooth(maps[:k], taps)):
            score = _peaks(jnp.abs(response) * norm, binning, centre, near)
            place = _brightest(score)
            where = [(axis.astype(maps.dtype) + 0.5) * binning - 0.5 for axis in place]
            found = (score[place], *where, jnp.full((), binning * FILTER_WIDTH, maps.dtype))
            best[i] = tuple(jnp.where(found[0] > best[i][0], new, old) for new, old in zip(found, best[i], strict=True))
        binning *= 2
        if binning * FILTER_WIDTH > max(0.4 * min(ny, nx), FILTER_WIDTH) or min(ny, nx) < 2 * binning:
            break
        maps = _halve(maps)
    return [found[1:] for found in best]


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


def guess(image: Image, scale, centre, near):
    """First guess of one image.

    Parameters
    ----------
    image : Image
        In working units: background near 0, spread of the pixels near 1 (see `pipeline.program`).
    scale : array ()
        First guess of the half-width of the noise.
    centre : array (2,)
        y, x of the place around which the source is looked for [pixel].
    near : array ()
        How far from it along y and x [pixel]; infinite: in the whole image.

    Returns
    -------
    array (6,)
        x0, y0, amp, sigma, rho, diff.
    """
    # Near enough is good enough: float32 is twice as fast.
    data, weight, scale, centre, near = (a.astype(jnp.float32) for a in (image.data, image.weight, scale, centre, near))
    used = (weight > 0).astype(data.dtype)
    ny, nx = data.shape
    dtype = data.dtype
    residual = data * used
    z = jnp.clip(residual * weight / scale, -LARGEST, LARGEST)
    maps = jnp.stack([jnp.clip(z, -CLIP, CLIP), 2.0 * z / (1.0 + z * z)])
    places = _strongest(maps, used, centre, near)
    xs, ys = jnp.arange(nx, dtype=dtype), jnp.arange(ny, dtype=dtype)

    def shape(x, y, sigma):
        """The two factors of a round Gaussian."""
        return jnp.exp(-0.5 * ((xs - x) / sigma) ** 2), jnp.exp(-0.5 * ((ys - y) / sigma) ** 2)

    candidates = []
    square = weight * weight
    for y, x, width in places:
        row, column = jnp.clip(y, 0, ny - 1).astype(int), jnp.clip(x, 0, nx - 1).astype(int)
        _, _, middle, high = _peak(residual, row, column)
        limit = jnp.maximum(jnp.abs(high), CLIP * scale)
        clipped = square * jnp.clip(residual, -limit, limit)
        for stretch in STRETCHES:
            sigma = width * stretch
            along, across = shape(x, y, sigma)
            power = across**2 @ (square @ along**2)
            mean = (across @ (clipped @ along)) / jnp.maximum(power, 1e-12)
            candidates += [(x, y, amp, sigma) for amp in (middle, high, mean)]
    row, column, _, high = _peak(residual, *_brightest(_peaks(jnp.abs(_median9(residual)), 1, centre, near)))
    for sigma in BRIGHT_WIDTHS:
        candidates.append((column.astype(dtype), row.astype(dtype), high, jnp.asarray(sigma, dtype)))
    table = jnp.stack([jnp.stack(candidate) for candidate in candidates])
    # All candidates are judged at one scale, wide enough for the brightest: near enough is then good enough.
    h = weight / jnp.maximum(scale, WIDE * jnp.max(jnp.abs(table[:, 2])))
    # And by what is near: a candidate that explains some of a brighter source elsewhere would win by it.
    along, across = shape(centre[1], centre[0], near)
    h = h * (across[:, None] * along[None, :])

    def cost(candidate):
        x, y, amp, sigma = candidate
        along, across = shape(x, y, sigma)
        t = (residual - (amp * across)[:, None] * along[None, :]) * h
        return log_product(jnp.clip(t, -LARGEST, LARGEST) ** 2)

    winner = table[jnp.argmin(jax.vmap(cost)(table))]
    return jnp.concatenate([winner, jnp.zeros(2, dtype)]).astype(image.origin.dtype)
