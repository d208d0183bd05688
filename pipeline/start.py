"""First guess of the parameters of one image: several candidates, the best likelihood kept.

Residuals over the noise, t, as t / sqrt(1 + t^2), show faint sources among outliers, and bright ones too. This map is
filtered with Gaussians of several widths, and the strongest peak of either sign is one place. Of two bright sources
it may show the fainter, and it knows nothing narrower than two pixels; so the other place is the peak of a middle value
of each 2 x 2 pixels. Hot pixels move neither. Where the place of the source is known, both are peaks near it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pipeline.likelihood import Image
from pipeline.moments import matmul
from pipeline.reductions import LARGEST

ACCURACY = 5e-3  # of quantiles
FILTER_WIDTH, FILTER_REACH = 0.8, 3  # binned pixels, from 2 x 2 up
STRETCHES = (0.3, 0.5, 0.8, 1.25)  # of the strongest filter's width, tried as sigma
BRIGHT_WIDTHS = (0.6, 0.9, 1.4, 2.2, 3.5)  # pixel; tried at the brightest place
SAMPLES = 16  # pixels along each axis that candidates are judged by
CLOSE = 3.5  # pixel; most sigma of candidates that are judged by pixels side by side
SLOPE = 2.2  # half-widths of Cauchy noise that a faint source has for each unit of the mean of the map
WIDE = 0.3  # of the peak: a scale at which a first guess is near enough, and from which the continuation begins; at 0.1
# faint sources take a seventh more steps
CORE = 8.0  # most that a peak may exceed the median of its 9 pixels: a Gaussian of sigma 0.5 px


def _ordered(bits):
    """Bits of floating-point numbers as integers that order as the numbers do, and back: it is its own inverse."""
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def count(mask, dtype=float):
    """How many pixels of a mask (ny, nx) are True, of a floating-point type; float32 counts to 2^24.

    Along one axis in whole numbers, along the other not: two sums of one kind are made one that is not vectorised.
    """
    narrow = jnp.int8 if mask.shape[0] <= jnp.iinfo(jnp.int8).max else jnp.int32
    return jnp.sum(jnp.sum(mask, axis=0, dtype=narrow).astype(dtype))


def quantiles(values, used, probabilities):
    """Quantiles of the used pixels, off by no more than ACCURACY of the distance of the first from the last.

    By bisection of the bits of floating-point numbers: its cost does not depend on the range of the values. Eight bits
    at a time, from the highest, so that pixels are compared as numbers of one byte, 64 at once on a CPU: a tenth of the
    time of sorting. Where first and last are equal, they are exact.

    values : float64 or float32 array, finite. used : bool array of its shape. probabilities : k rising numbers. Returns
    (k,), of the type of the values.
    """
    limits = jnp.iinfo({4: jnp.int32, 8: jnp.int64}[values.dtype.itemsize])
    keys = jnp.where(used, _ordered(jax.lax.bitcast_convert_type(values, limits.dtype)), limits.max)
    total = count(used)
    ranks = jnp.stack([jnp.ceil(probability * total) for probability in probabilities]).astype(jnp.float32)

    def value(key):
        return jax.lax.bitcast_convert_type(_ordered(key), values.dtype)

    def last(first, unknown):
        """The largest key that differs from the first, the smallest, in no more than the lowest, unknown bits."""
        return first + (jnp.left_shift(jnp.ones_like(first), unknown) - 1)

    def descend(first, rank, unknown):
        shift = unknown - 8
        within = jnp.clip(keys, first, last(first, unknown)) - first
        digits = (jax.lax.shift_right_logical(within, jnp.full_like(within, shift)) - 128).astype(jnp.int8)

        def settle(i, digit):
            larger = digit + jnp.right_shift(128, i)
            return jnp.where(count(digits < (larger - 128).astype(jnp.int8), jnp.float32) < rank, larger, digit)

        return first + jnp.left_shift(jax.lax.fori_loop(0, 8, settle, jnp.zeros_like(first)), shift)

    def descend_all(carry):
        firsts, unknown = carry
        return jax.vmap(descend, (0, 0, None))(firsts, ranks, unknown), unknown - 8

    def unclear(carry):
        firsts, unknown = carry
        low, high = value(firsts), value(last(firsts, unknown))
        return (unknown > 0) & ~(jnp.max(high - low) < ACCURACY * (low[-1] - high[0]))

    nothing = (jnp.full(len(probabilities), limits.min, limits.dtype), jnp.asarray(limits.bits, limits.dtype))
    return value(jax.lax.while_loop(unclear, descend_all, nothing)[0])


def half_spread(values, used):
    """Half the interquartile range of the used pixels: the half-width of Cauchy noise."""
    low, high = quantiles(values, used, (0.25, 0.75))
    return 0.5 * (high - low)


def _brightest(image):
    """Row and column of the largest value: of its column first, which vectorises as a search of all pixels does not."""
    column = jnp.argmax(jnp.max(image, axis=0))
    return jnp.argmax(image[:, column]), column


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


def _filters(side: int, level: int, power: int):
    """Matrix (side, side / 2^level): sums of 2^level pixels, then the matched filter, its taps to this power."""
    length = -(-side // 2**level)
    binned = np.arange(side)[:, None] >> level == np.arange(length)
    apart = np.subtract.outer(np.arange(length), np.arange(length))
    taps = np.exp(-0.5 * power * (apart / FILTER_WIDTH) ** 2) * (abs(apart) <= FILTER_REACH)
    return np.asarray(binned @ taps, np.float32)


def _filtered(image, levels, power):
    """An image (ny, nx) after the matched filters: of each level >= 1 one image, x along its first axis."""
    ny, nx = image.shape
    image = image[0::2] + image[1::2]  # which halves the products
    banks = [_filters(nx, level, power) for level in levels]
    along = matmul(image, np.concatenate(banks, axis=1))
    ends = np.cumsum([bank.shape[1] for bank in banks])[:-1]
    parts = jnp.split(along, ends, axis=1)
    return [matmul(part.T, _filters(ny // 2, level - 1, power)) for part, level in zip(parts, levels, strict=True)]


def _middle(image, row, column):
    """How far the top of a parabola through a peak and its neighbours is from it along both axes, -1/2 to 1/2."""

    def along(line, i):
        before, top, after = line[jnp.maximum(i - 1, 0)], line[i], line[jnp.minimum(i + 1, len(line) - 1)]
        bend = jnp.maximum(2.0 * top - before - after, 1e-12)
        return jnp.clip(0.5 * (after - before) / bend, -0.5, 0.5)

    return along(image[:, column], row), along(image[row], column)


def _strongest(image, used, centre, near):
    """The strongest response of either sign to matched filters near the centre.

    image : array (ny, nx), zero where unused. used : array of its shape, 1 or 0. centre, near : as in `guess`. Returns
    x, y, width of the filter [pixel], and the mean of the image under it.
    """
    ny, nx = image.shape
    levels = [1]
    while FILTER_WIDTH * 2 ** (levels[-1] + 1) <= max(0.4 * min(ny, nx), 2.0) and min(ny, nx) >= 2 ** (levels[-1] + 2):
        levels.append(levels[-1] + 1)
    best: tuple = (jnp.full((), -2.0, image.dtype),) * 5
    responses, powers = _filtered(image, levels, 1), _filtered(used, levels, 2)
    for level, response, power in zip(levels, responses, powers, strict=True):
        binning = 2**level
        # Where most of the filter falls on unused pixels its response is mostly luck.
        enough = power > 0.25 * jnp.max(jnp.max(power, axis=0))
        norm = jnp.where(enough, jax.lax.rsqrt(jnp.maximum(power, 1e-12)), 0.0)
        score = jnp.abs(response) * norm
        peaks = _peaks(score, binning, centre[::-1], near)
        column, row = _brightest(peaks)
        shifts = _middle(score, column, row)
        x, y = (
            (axis.astype(image.dtype) + 0.5 + shift) * binning - 0.5
            for axis, shift in zip((column, row), shifts, strict=True)
        )
        mean = 0.5 * response[column, row] / jnp.maximum(power[column, row], 1e-12)
        found = (peaks[column, row], x, y, jnp.full((), binning * FILTER_WIDTH, image.dtype), mean)
        best = tuple(jnp.where(found[0] > best[0], new, old) for new, old in zip(found, best, strict=True))
    return best[1:]


def _steady(image):
    """The smaller of the two middle values of each 2 x 2 pixels, as a magnitude; 0 where their signs differ."""
    nx = image.shape[1]
    low, high = jnp.minimum(image[0::2], image[1::2]), jnp.maximum(image[0::2], image[1::2])
    one, other = jnp.maximum(low[:, :-1], low[:, 1:]), jnp.minimum(high[:, :-1], high[:, 1:])
    steady = jnp.maximum(jnp.minimum(one, other), 0.0) - jnp.minimum(jnp.maximum(one, other), 0.0)
    # Every other column by a product with ones and zeros, which is exact: all this would be done again for each of the
    # neighbours that `_peaks` compares, were it slices with a stride.
    return matmul(steady, np.eye(nx, dtype=np.float32)[:-1, ::2])


def _rising(values):
    """A few numbers in rising order, by exchanges of neighbours: a tenth of the time of a sort on a CPU."""
    values = list(values)
    for turn in range(len(values)):
        for i in range(turn % 2, len(values) - 1, 2):
            values[i : i + 2] = jnp.minimum(*values[i : i + 2]), jnp.maximum(*values[i : i + 2])
    return values


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
    sign = jnp.sign(_rising(values)[4])
    best = jnp.argmax(sign * values)
    row, column = jnp.clip(row + best // 3 - 1, 0, ny - 1), jnp.clip(column + best % 3 - 1, 0, nx - 1)
    ordered = _rising(sign * around(row, column))
    return row, column, sign * ordered[4], sign * jnp.minimum(ordered[7], CORE * jnp.abs(ordered[4]))


def _gains(residual, weight, scale, centre, near, table):
    """By how much the nll of an image (ny, nx) is smaller with each of some sources (4, k) than without; (k,).

    x, y, amp, sigma of the sources; x and y are the same for all. From SAMPLES x SAMPLES pixels around them, so far
    apart that the widest fits in: those of 32 x 32 would take four times as long. Pixels count by how near they are:
    a candidate that explains some of a brighter source elsewhere would else win by it.
    """
    dtype = residual.dtype
    x, y, amp, sigma = table
    apart = jnp.maximum(jnp.max(sigma) / CLOSE, 1.0)
    offsets = apart * (jnp.arange(SAMPLES, dtype=dtype) - 0.5 * (SAMPLES - 1))
    xs, ys = jnp.round(x[0] + offsets), jnp.round(y[0] + offsets)
    places = ys.astype(jnp.int32)[:, None], xs.astype(jnp.int32)[None, :]
    residual, h = (one.at[places].get(mode="clip") for one in (residual, weight))
    # Multiplied by h row by row, in the loop: as a map of its own the compiler does it one pixel after the other.
    down, right = (
        jnp.where((at >= 0) & (at < length), jnp.exp(-0.5 * ((at - middle) / near) ** 2), 0.0)
        for at, length, middle in zip((ys, xs), weight.shape, centre, strict=True)
    )
    right = right / scale
    amp, sigma = jnp.append(amp, 0.0), jnp.append(sigma, 1.0)
    along, across = (
        jnp.exp(-0.5 * ((at[:, None] - middle) / sigma[None, :]) ** 2) for at, middle in ((xs, x[0]), (ys, y[0]))
    )
    across = amp[None, :] * across

    def add(i, total):
        product = jnp.ones_like(along)
        for k in range(4):
            row = h[4 * i + k] * down[4 * i + k] * right
            t = (residual[4 * i + k][:, None] - across[4 * i + k][None, :] * along) * row[:, None]
            product = product * (1.0 + jnp.minimum(t * t, 1e9))
        return total + jnp.log(product)

    nll = jnp.sum(jax.lax.fori_loop(0, SAMPLES // 4, add, jnp.zeros_like(along)), axis=0)
    return apart * apart * (nll[-1] - nll[:-1])


def _nearby(x, y, centre, near):
    """The place nearest to x, y that is no further from the centre (y, x) than ``near`` along both axes."""
    return jnp.clip(x, centre[1] - near, centre[1] + near), jnp.clip(y, centre[0] - near, centre[0] + near)


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
    x, y, width, mean = _strongest(z * jax.lax.rsqrt(1.0 + z * z), used, centre, near)
    x, y = _nearby(x, y, centre, near)  # binned pixels are wide
    row, column = (jnp.clip(jnp.round(at), 0, length - 1).astype(int) for at, length in ((y, ny), (x, nx)))
    _, _, middle, high = _peak(residual, row, column)
    faint = SLOPE * mean * jax.lax.rsqrt(jnp.maximum(1.0 - mean * mean, 1e-6)) * scale
    places = [[(x, y, amp, width * stretch) for stretch in STRETCHES for amp in (middle, high, faint)]]
    row, column = _brightest(_peaks(_steady(residual), 2, centre, near))
    row, column, _, high = _peak(residual, 2 * row, 2 * column)
    up, right = _middle(jnp.sign(high) * residual, row, column)
    x, y = _nearby(column.astype(dtype) + right, row.astype(dtype) + up, centre, near)
    places.append([(x, y, high, jnp.asarray(sigma, dtype)) for sigma in BRIGHT_WIDTHS])
    tables = [jnp.stack([jnp.stack(column) for column in zip(*place, strict=True)]) for place in places]
    # Barriers, because the compiler would work these out again for each pixel that is judged.
    tables = jax.lax.optimization_barrier(tables)
    # All candidates are judged at one scale, halfway from that of the noise to one at which the brightest is near
    # enough. At the latter hot pixels side by side win over a source: 27 fits of 90,000 ended elsewhere, not 4.
    widest = jnp.maximum(scale, WIDE * jnp.max(jnp.abs(jnp.concatenate([table[2] for table in tables]))))
    scale = jax.lax.optimization_barrier(jnp.sqrt(scale * widest))
    gains = [_gains(residual, weight, scale, centre, near, table) for table in tables]
    winner = jnp.concatenate(tables, axis=1)[:, jnp.argmax(jnp.concatenate(gains))]
    return jnp.concatenate([winner, jnp.zeros(2, dtype)]).astype(image.origin.dtype)
