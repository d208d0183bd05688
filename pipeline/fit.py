"""Images in, catalogue columns out: the one place where the mathematics of one image is lifted to stacks.

Each image is brought to working units (background near 0, spread near 1; a power of two, so that nothing is rounded),
given a first guess, minimised, and given its covariances and flags; then results return to the image's units. Images
are padded with masked pixels to a few sizes and fitted in batches of one shape, so few programs are compiled, and the
numbers of a row depend on nothing but its own pixels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pipeline import columns, likelihood, model, moments, newton, quality, start, uncertainty

#: Sides [pixel] to which images are padded.
SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512)
BATCH_PIXELS = 1 << 16  # pixels in a batch, about
MAX_BATCH = 64
LEAST_SCALE = 1e-3  # to start from, in working units
WILD = 1e12  # working units: where pixels are cut off


class FitResult(NamedTuple):
    """The fit of one image, or of n images with a leading axis n.

    params : (p,) fitted parameters in the order of `columns.parameter_names`. covariances : four (p, p), in the order
    of `columns.COVARIANCES`. derived, derived_err : (6,), the order of `columns.DERIVED`. origin : (2,) start x0, y0.
    The rest are scalars, see `columns.COLUMNS`.
    """

    params: jax.Array
    errors: jax.Array
    covariances: tuple[jax.Array, ...]
    derived: jax.Array
    derived_err: jax.Array
    origin: jax.Array
    nll: jax.Array
    n_steps: jax.Array
    n_pixels: jax.Array
    snr: jax.Array
    outlier_fraction: jax.Array
    misfit: jax.Array
    condition: jax.Array
    flags: jax.Array


def _power_of_two(value):
    """The power of two above a positive number: to divide by it rounds nothing."""
    return jnp.ldexp(jnp.ones_like(value), jnp.frexp(value)[1])


class Dials(NamedTuple):
    """Settings that are numbers to the compiled program, so that turning one compiles nothing anew.

    level : held background [image unit]. scale : held scale. tolerance, max_steps : as in the config section ``fit``.
    chosen : place of the covariance behind the errors in `columns.COVARIANCES`.
    """

    level: jax.Array
    scale: jax.Array
    tolerance: jax.Array
    max_steps: jax.Array
    chosen: jax.Array


def fit_image(data, mask, noise, shape, dials: Dials, *, n_background: int, fit_scale: bool, precision: str):
    """Fit one image; traced by JAX, never raises.

    Parameters
    ----------
    data : float64 array (ny, nx)
        Image; anything where masked.
    mask : bool array (ny, nx)
        True = not used.
    noise : float64 array (ny, nx) or None
        1-sigma map that multiplies the scale; None = 1 everywhere, in image units.
    shape : int array (2,)
        ny, nx before padding.
    dials : Dials
    n_background : int
        Fitted parameters of the background: 0 (held at ``dials.level``), 1 (constant) or 3 (plane).
    fit_scale : bool
        Whether the scale is fitted, or held at ``dials.scale``.
    precision : str
        Floating-point type of the minimiser.

    Returns
    -------
    FitResult
        NaN and flags where something could not be done.
    """
    dtype = precision
    p = 6 + n_background + fit_scale
    good = ~mask & jnp.isfinite(data)
    if noise is not None:
        good &= jnp.isfinite(noise) & (noise > 0)
    used = good.astype(data.dtype)
    n = jnp.sum(used)
    enough = n >= 2 * p
    data = jnp.where(good, data, 0.0)

    low, middle, high = start.quantiles(data, used, (0.25, 0.5, 0.75))
    offset = middle if n_background else dials.level
    half_spread = 0.5 * (high - low)
    mean_deviation = jnp.sum(used * jnp.abs(data - offset)) / jnp.maximum(n, 1.0)
    spread = jnp.where(half_spread > 0, half_spread, jnp.where(mean_deviation > 0, mean_deviation, 1.0))
    equal = jnp.sum(jnp.where(data == middle, used, 0.0))
    unit = _power_of_two(spread)
    if noise is None:
        noise, noise_unit, ratio_spread = jnp.ones_like(data), jnp.ones_like(unit), half_spread / unit
    else:
        typical = jnp.sqrt(jnp.sum(jnp.where(good, noise, 0.0) ** 2) / jnp.maximum(n, 1.0))
        noise_unit = _power_of_two(jnp.where(typical > 0, typical, 1.0))
        noise = jnp.where(good, noise / noise_unit, 1.0)
        ratio_spread = start.half_spread((data - offset) / (unit * noise), used)
    scale_unit = unit / noise_unit
    image = likelihood.Image(
        # A wild pixel weighs nothing wherever it is, but its square must not overflow.
        data=jnp.clip(jnp.where(good, data - offset, 0.0) / unit, -WILD, WILD).astype(dtype),
        used=used.astype(dtype),
        noise=noise.astype(dtype),
        origin=jnp.zeros(2, dtype),
    )

    # A scale of zero has no likelihood.
    first_scale = jnp.maximum(ratio_spread, LEAST_SCALE).astype(dtype)
    source = start.guess(image, first_scale)
    image = image._replace(origin=source[:2])
    target = first_scale if fit_scale else (dials.scale / scale_unit).astype(dtype)
    wide = jnp.maximum(target, start.WIDE * jnp.abs(source[2]))
    first = likelihood.to_free(jnp.concatenate([source, jnp.zeros(n_background, dtype), wide[None]]))
    state = newton.minimise(
        evaluate=lambda free: moments.terms(free, image),
        value=lambda free: likelihood.nll(likelihood.to_public(free), image),
        valid=lambda free: model.ellipticity(likelihood.to_public(free)) < 1.0,
        start=first,
        target=jnp.log(target),
        fit_scale=fit_scale,
        tolerance=dials.tolerance.astype(dtype),
        max_steps=jnp.where(enough, dials.max_steps, 0),
    )
    public = likelihood.to_public(state.free)
    four = uncertainty.covariances(public, state.terms, image, fit_scale)
    positive = jnp.all(jnp.isfinite(four.hessian))
    misfit = quality.misfit(public, image)
    outliers = quality.outlier_fraction(public, image)

    # Back to the image's own units, all linear, in float64: squares of small units are no float32 numbers.
    size = jnp.ones(p + (not fit_scale)).at[2].set(unit).at[6 : 6 + n_background].set(unit).at[-1].set(scale_unit)
    degenerate = (equal > 0.5 * n) | (public[-1] < columns.MIN_SCALE * first_scale)
    public = public.astype(float) * size
    if n_background:
        public = public.at[6].add(offset)
    nan = jnp.where(enough, 0.0, jnp.nan)
    public = public + nan
    size = size[:p]
    working = [getattr(four, kind).astype(float) + nan for kind in columns.COVARIANCES]
    covariances = tuple(matrix * size[:, None] * size[None, :] for matrix in working)
    # Roots before units: the square of a small unit may vanish.
    errors = jnp.sqrt(jnp.diag(jnp.stack(working)[dials.chosen])) * size
    chosen = jnp.stack(covariances)[dials.chosen]
    derived, derived_err = uncertainty.propagate(model.derived, public[:6], chosen[:6, :6])
    _, e_err = uncertainty.propagate(lambda q: model.ellipticity(q)[None], public[:6], chosen[:6, :6])
    flags = quality.flags(public, errors, e_err[0], image, shape, state.converged, positive, enough, degenerate, misfit)
    return FitResult(
        params=public[:p],
        errors=errors,
        covariances=covariances,
        derived=derived,
        derived_err=derived_err,
        origin=image.origin.astype(float) + nan,
        nll=state.terms.nll.astype(float) + n * jnp.log(unit) + nan,
        n_steps=jnp.where(enough, state.n_steps, 0),
        n_pixels=n.astype(int),
        snr=jnp.abs(public[2]) / errors[2],
        outlier_fraction=outliers.astype(float) + nan,
        misfit=misfit.astype(float) + nan,
        condition=quality.condition(four.hessian_matrix.astype(float)) + nan,
        flags=flags,
    )


@functools.cache
def _program(**form):
    """The compiled fit of a batch: (data, mask, noise or None, shape), each with axis B; `Dials`; images in it."""

    def batch(images, dials, count):
        def one(image):
            data, mask, noise, shape = image
            return fit_image(data, mask, noise, shape, dials, **form)

        if jax.default_backend() != "cpu":
            return jax.lax.map(one, images, batch_size=MAX_BATCH)

        # On a CPU one image after the other: vectors are filled by its pixels, no image waits for the slowest of a
        # batch, and a row's bits cannot depend on its place. An accelerator needs the whole batch at once.
        def put(i, results):
            result = one(jax.tree.map(lambda stack: stack[i], images))
            return jax.tree.map(lambda all_, new: all_.at[i].set(new), results, result)

        shapes = jax.eval_shape(one, jax.tree.map(lambda stack: stack[0], images))
        length = len(images[0])
        empty = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), shapes)
        return jax.lax.fori_loop(0, count, put, empty)

    return jax.jit(batch)


def padded_side(size: int) -> int:
    """The side to which an image side of ``size`` pixels is padded: a function of the image alone."""
    for side in SIDES:
        if size <= side:
            return side
    return -(-size // 128) * 128


def fit_stack(
    data,
    mask=None,
    noise_map=None,
    *,
    background="constant",
    scale="fit",
    uncertainty="pooled",
    precision="float64",
    tolerance=1e-6,
    max_steps=100,
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
    background, scale, uncertainty, precision, tolerance, max_steps
        The config section ``fit``.

    Returns
    -------
    FitResult
        Of NumPy arrays (float64) with leading axis n.

    Raises
    ------
    ValueError
        If the shapes do not agree.
    """
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
    batch = max(1, min(MAX_BATCH, BATCH_PIXELS // (sides[0] * sides[1])))
    names = columns.parameter_names(background, scale)
    fit_scale = "scale" in names
    program = _program(n_background=len(names) - 6 - fit_scale, fit_scale=fit_scale, precision=precision)
    dials = Dials(
        level=jnp.asarray(0.0 if isinstance(background, str) else background, float),
        scale=jnp.asarray(jnp.nan if fit_scale else scale, float),
        tolerance=jnp.asarray(tolerance, float),
        max_steps=jnp.asarray(max_steps),
        chosen=jnp.asarray(columns.COVARIANCES.index(uncertainty)),
    )
    shapes = np.broadcast_to(np.array([ny, nx]), (batch, 2))

    def padded(stack, low, dtype, fill):
        block = np.full((batch, *sides), fill, dtype=dtype)
        part = stack[low : low + batch]
        block[: len(part), :ny, :nx] = part
        return block

    results = []
    # An empty stack still runs once, for the shapes of nothing.
    for low in range(0, max(n, 1), batch):
        pixels = padded(data, low, np.float64, np.nan)
        hidden = padded(np.zeros(data.shape, bool) if mask is None else mask, low, bool, True)
        noise = None if noise_map is None else padded(noise_map, low, np.float64, np.nan)
        results.append(program((pixels, hidden, noise, shapes), dials, jnp.asarray(min(batch, n - low))))

    def join(*parts):
        whole = np.concatenate([np.asarray(part) for part in parts])[:n]
        return whole.astype(np.float64) if whole.dtype.kind == "f" else whole

    return jax.tree.map(join, *results)


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
    for i, name in enumerate(columns.DERIVED):
        rows[name], rows[f"{name}_err"] = np.asarray(result.derived[:, i]), np.asarray(result.derived_err[:, i])
    for name in ("nll", "n_steps", "n_pixels", "snr", "outlier_fraction", "misfit", "condition", "flags"):
        rows[name] = np.asarray(getattr(result, name))
    rows["x0_start"], rows["y0_start"] = np.asarray(result.origin).T
    return rows, dict(zip(columns.COVARIANCES, map(np.asarray, result.covariances), strict=True))
