"""Images in, catalogue columns out: stacks of any length and size, for `pipeline.program`.

Images are padded with unused pixels to a few sizes and fitted in batches of one shape, so few programs are compiled,
and the numbers of a row depend on nothing but its own pixels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pipeline import columns, program
from pipeline.correlation import WIDEST, reach_of, reaches, round_kernel
from pipeline.program import FitResult

#: Sides [pixel] to which images are padded.
SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512)
#: Bytes and images taken at once, and pixels in the memory of the device, about. On a processor what is taken at once
#: is to stay in its cache: of 32 x 32 pixels 32 images in float64 (16 or 48 are no faster), 64 in float32 (32 take a
#: tenth longer). An accelerator wants to be full.
BATCH_BYTES, MAX_BATCH, QUEUE_PIXELS = 1 << 18, 64, 1 << 21
ACCELERATOR_BYTES, ACCELERATOR_BATCH, ACCELERATOR_QUEUE = 1 << 26, 1 << 13, 1 << 26
DESCRIBED_AT_ONCE = 1 << 11  # fits


def padded_side(size: int) -> int:
    """The side to which an image side of ``size`` pixels is padded: a function of the image alone."""
    for side in SIDES:
        if size <= side:
            return side
    return -(-size // 128) * 128


def _batch_and_length(area: int, precision: str) -> tuple[int, int]:
    """How many images of ``area`` pixels are taken at once, and how many wait in a queue."""
    here = jax.default_backend() == "cpu"
    size, most = (BATCH_BYTES, MAX_BATCH) if here else (ACCELERATOR_BYTES, ACCELERATOR_BATCH)
    batch = max(1, min(most, size // (area * np.dtype(precision).itemsize)))
    return batch, batch * max(1, (QUEUE_PIXELS if here else ACCELERATOR_QUEUE) // (batch * area))


def _kernels(correlation: str | float | np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray | None, np.ndarray]:
    """Kernels (n, 3) of correlated noise, or None, and how far they reach (n,), for a stack of shape (n, ny, nx)."""
    n = shape[0]
    if isinstance(correlation, np.ndarray):
        if correlation.shape != (n, 3):
            msg = f"correlation: got an array of shape {correlation.shape}, wanted the kernels of the images, {(n, 3)}"
            raise ValueError(msg)
        return correlation, reaches(correlation, max(shape[1:]))
    if not isinstance(correlation, str):
        return np.tile(round_kernel(correlation), (n, 1)), np.full(n, reach_of(correlation))
    if correlation == "estimate":
        return np.full((n, 3), np.nan), np.full(n, reach_of(WIDEST))
    if correlation == "none":
        return None, np.zeros(n, int)
    msg = f"correlation: got {correlation!r}, wanted none, estimate, a number or an array of kernels"
    raise ValueError(msg)


def fit_stack(
    data,
    mask=None,
    noise_map=None,
    *,
    background="constant",
    scale="fit",
    uncertainty="pooled",
    correlation="none",
    precision="float64",
    tolerance=1e-6,
    max_steps=100,
    near=np.inf,
) -> FitResult:
    """Fit a 2-D Gaussian to each image of a stack by maximum Cauchy likelihood.

    Parameters
    ----------
    data : array (n, ny, nx)
        Images. NaN and infinite pixels are not used.
    mask : bool array (n, ny, nx), optional
        True = pixel not used.
    noise_map : array (n, ny, nx), optional
        1-sigma map; the half-width of a pixel's noise is ``scale`` times it.
    background, scale, uncertainty, correlation, precision, tolerance, max_steps
        The config section ``fit``; ``correlation`` may also be an array (n, 3), the kernel of each image, see
        `pipeline.correlation`; a row of NaN = estimated. What a beam is in pixels, a stack does not know.
    near : float
        How far from the middle of the image, along x and y, the source is looked for [pixel].

    Returns
    -------
    FitResult
        Of NumPy arrays (float64) with leading axis n.

    Raises
    ------
    ValueError
        If the shapes do not agree, or ``correlation`` is a word that means nothing here.
    RuntimeError
        If JAX has numbers of 32 bits only.
    """
    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]  # which JAX makes when it is imported
        msg = "JAX: got jax_enable_x64 off, wanted it on, for any precision: set JAX_ENABLE_X64=1 before Python starts"
        raise RuntimeError(msg)
    data = np.asarray(data)
    if data.ndim != 3:
        msg = f"images: got an array of shape {data.shape}, wanted a stack (n, ny, nx)"
        raise ValueError(msg)
    for name, other in (("mask", mask), ("noise_map", noise_map)):
        if other is not None and np.shape(other) != data.shape:
            msg = f"{name}: got shape {np.shape(other)}, wanted that of the images, {data.shape}"
            raise ValueError(msg)
    n, ny, nx = data.shape
    sides = padded_side(ny), padded_side(nx)
    batch, length = _batch_and_length(sides[0] * sides[1], precision)
    names = columns.parameter_names(background, scale)
    fit_scale = "scale" in names
    # An empty stack still runs once, for the shapes of nothing.
    kernels, reach = _kernels(correlation, data.shape) if n else (None, np.zeros(0, int))
    dials = program.Dials(
        level=jnp.asarray(0.0 if isinstance(background, str) else background, float),
        scale=jnp.asarray(jnp.nan if fit_scale else scale, float),
        tolerance=jnp.asarray(tolerance, float),
        max_steps=jnp.asarray(max_steps),
        chosen=jnp.asarray(columns.COVARIANCES.index(uncertainty)),
        near=jnp.asarray(near, float),
    )
    settings = {"fit_scale": fit_scale, "precision": precision, "batch": batch}
    shapes = np.broadcast_to(np.array([ny, nx]), (length, 2))

    # Pixels of most files are float32, and as such half as much to move and to sort.
    narrow = data.dtype.kind == "f" and data.dtype.itemsize <= 4
    pixel = np.float32 if narrow else np.float64

    def padded(stack, queue, dtype, fill):
        images = np.asarray(stack)[queue]
        if images.shape == (length, *sides):
            return images.astype(dtype, copy=False)
        block = np.full((length, *sides), fill, dtype=dtype)
        block[: len(images), :ny, :nx] = images
        return block

    if mask is None:
        mask = np.zeros(data.shape, bool)  # a view of one number would be copied pixel by pixel: 4 us an image

    def solved(queue, count, distance) -> program.Solution:
        """Of some rows. What is only needed on the way is forgotten on leaving."""
        count = jnp.asarray(count)
        pixels = padded(data, queue, pixel, np.nan)
        hidden = padded(mask, queue, bool, True)
        noise = None if noise_map is None else padded(noise_map, queue, np.float64, np.nan)
        kernel = None if kernels is None else np.resize(kernels[queue], (length, 3))
        problems, units = program.prepare_all(
            pixels, hidden, noise, shapes, count, dials, n_background=len(names) - 6 - fit_scale, **settings
        )
        found = program.minimise(problems, count, dials, **settings)
        arrays = found, problems, units, shapes, kernel, count, dials
        return program.solve_all(*arrays, fit_scale=fit_scale, reach=int(distance), batch=batch)

    solutions, counts, together = [], [], [np.flatnonzero(reach == distance) for distance in np.unique(reach)]
    for rows in together or [np.arange(0)]:
        for low in range(0, max(len(rows), 1), length):
            # Rows one after the other are not copied.
            queue = rows[low : low + length] if len(together) > 1 else slice(low, min(low + length, n))
            counts.append(min(length, len(rows) - low))
            solutions.append(solved(queue, counts[-1], reach[rows[0]] if n else 0))
    joined = jax.tree.map(lambda *parts: _joined(parts, counts), *solutions)
    if len(together) > 1:
        order = np.argsort(np.concatenate(together))
        joined = jax.tree.map(lambda leaf: leaf[order], joined)
    return _described(joined, (ny, nx), dials)


def _joined(parts, counts) -> np.ndarray:
    """The first rows of each part, one after the other; floating-point numbers as float64."""
    whole = np.concatenate([np.asarray(part)[:count] for part, count in zip(parts, counts, strict=True)])
    return whole.astype(np.float64, copy=False) if whole.dtype.kind == "f" else whole


def _described(solutions: program.Solution, shape: tuple[int, int], dials: program.Dials) -> FitResult:
    """Fits with all that is derived from them, by a program that is the same for all image sizes."""
    batch, length = (MAX_BATCH, DESCRIBED_AT_ONCE) if jax.default_backend() == "cpu" else (ACCELERATOR_BATCH,) * 2
    n = len(solutions.n_pixels)
    shapes = np.broadcast_to(np.array(shape), (length, 2))

    def padded(leaf, low):
        rows = leaf[low : low + length]
        return rows if len(rows) == length else np.resize(rows, (length, *leaf.shape[1:]))

    parts, counts = [], []
    for low in range(0, max(n, 1), length):
        counts.append(min(length, n - low))
        queue = jax.tree.map(functools.partial(padded, low=low), solutions)
        parts.append(program.describe_all(queue, shapes, jnp.asarray(counts[-1]), dials, batch=batch))
    return jax.tree.map(lambda *leaves: _joined(leaves, counts), *parts)


def fit_rows(data, mask=None, noise_map=None, **settings) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Fit a stack; the fitted, derived and quality columns of its rows, and the four covariances.

    Arguments are those of `fit_stack`. Returns a dict of columns (n,) and a dict of covariances (n, p, p).
    """
    result = fit_stack(data, mask, noise_map, **settings)
    background, scale = settings.get("background", "constant"), settings.get("scale", "fit")
    names = columns.parameter_names(background, scale)
    rows = {
        c.name: v
        for c, v in zip(columns.COLUMNS, columns.empty_rows(len(data)).values(), strict=True)
        if c.group in ("fitted", "derived", "quality")
    }
    for held, value in (("background", background), ("scale", scale)):
        if not isinstance(value, str):
            rows[held][:] = value
    for i, name in enumerate(names):
        rows[name], rows[f"{name}_err"] = np.asarray(result.params[:, i]), np.asarray(result.errors[:, i])
        rows[f"{name}_bias"] = np.asarray(result.bias[:, i])
    for i, name in enumerate(columns.DERIVED):
        rows[name], rows[f"{name}_err"] = np.asarray(result.derived[:, i]), np.asarray(result.derived_err[:, i])
    for i, name in enumerate(columns.DERIVED[:-1]):
        rows[f"{name}_bias"] = np.asarray(result.derived_bias[:, i])
    for name in rows.keys() & set(FitResult._fields):
        rows[name] = np.asarray(getattr(result, name))
    rows["x0_start"], rows["y0_start"] = np.asarray(result.origin).T
    return rows, dict(zip(columns.COVARIANCES, map(np.asarray, result.covariances), strict=True))
