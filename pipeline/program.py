"""The compiled fit of a queue of images of one shape. All of it is traced by JAX and nothing raises.

Each image is brought to working units (background near 0, spread near 1; a power of two, so that nothing is rounded)
and given a first guess (`prepare_all`), minimised in slots (`minimise`), and given its covariances, in the image's own
units (`solve_all`), derived quantities and flags (`describe_all`). Four programs, so that settings and sizes which
differ for one of them share the others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pipeline import columns, likelihood, moments, newton, quality, slots, start, traced, uncertainty

#: Steps between two looks at which slots are done. On a processor with 2 or 3 fits take 2 and 7 % longer; an
#: accelerator moves the images of all slots after each look.
BURST, ACCELERATOR_BURST = 1, 2
LEAST_SCALE = 1e-3  # to start from, in working units
MOST_NOISE = 1e6  # times that of the quieter pixels: beyond it a pixel is not used, it only says that it knows nothing
WILD = 1e12  # working units: where pixels are cut off


class FitResult(NamedTuple):
    """The fit of one image, or of n images with a leading axis n.

    params, errors, bias : (p,) fitted parameters, in the order of `columns.parameter_names`. covariances : four (p, p),
    in the order of `columns.COVARIANCES`. derived, derived_err : (6,), the order of `columns.DERIVED`; derived_bias :
    (5,), of all but the angle. origin : (2,) start x0, y0. The rest are scalars, see `columns.COLUMNS`.
    """

    params: jax.Array
    errors: jax.Array
    bias: jax.Array
    covariances: tuple[jax.Array, ...]
    derived: jax.Array
    derived_err: jax.Array
    derived_bias: jax.Array
    origin: jax.Array
    nll: jax.Array
    n_steps: jax.Array
    n_pixels: jax.Array
    snr: jax.Array
    outlier_fraction: jax.Array
    misfit: jax.Array
    misfit_profile: jax.Array
    condition: jax.Array
    noise_fwhm: jax.Array
    flags: jax.Array


def _power_of_two(value):
    """The power of two above a positive number: to divide by it rounds nothing."""
    return jnp.ldexp(jnp.ones_like(value), jnp.frexp(value)[1])


def _widened(values):
    """Floating-point numbers as float64, exactly: by itself the compiler takes subnormal ones of float32 for 0."""
    if values.dtype == jnp.float64:
        return values
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    magnitude = bits & jnp.iinfo(jnp.int32).max
    subnormal = jnp.where(bits < 0, -magnitude, magnitude).astype(float) * 2.0**-149
    return jnp.where(magnitude < 1 << 23, subnormal, values.astype(float))


class Dials(NamedTuple):
    """Settings that are numbers to the compiled program, so that turning one compiles nothing anew.

    level : held background [image unit]. scale : held scale. tolerance, max_steps : as in the config section ``fit``.
    chosen : place of the covariance behind the errors in `columns.COVARIANCES`. near : how far from the middle of the
    image, along x and y, the source is looked for [pixel]; may be infinite.
    """

    level: jax.Array
    scale: jax.Array
    tolerance: jax.Array
    max_steps: jax.Array
    chosen: jax.Array
    near: jax.Array


class Problem(NamedTuple):
    """What the minimiser is given of one image.

    image : likelihood.Image in working units. n : number of used pixels. start : (q,) free vector. target : logarithm
    of the scale at which the continuation ends. max_steps : 0 where pixels are too few.
    """

    image: likelihood.Image
    n: jax.Array
    start: jax.Array
    target: jax.Array
    max_steps: jax.Array


class Units(NamedTuple):
    """What leads from working units back to those of the image; scalars.

    unit : of pixel values. scale_unit : of the scale. log_noise : sum of the logarithms of the noise map, in working
    units. offset : background taken off. first_scale : guess of the scale, in working units. enough : whether there are
    pixels enough to fit. degenerate : whether more than half are equal.
    """

    unit: jax.Array
    scale_unit: jax.Array
    log_noise: jax.Array
    offset: jax.Array
    first_scale: jax.Array
    enough: jax.Array
    degenerate: jax.Array


def prepare(data, mask, noise, shape, dials: Dials, *, n_background: int, fit_scale: bool, precision: str):
    """Working units and first guess of one image; traced by JAX, never raises.

    Parameters
    ----------
    data : float64 or float32 array (ny, nx)
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
        Floating-point type of the pixels in the minimiser.

    Returns
    -------
    Problem, Units
    """
    dtype = precision
    good = ~mask & jnp.isfinite(data)
    if noise is not None:
        good &= jnp.isfinite(noise) & (noise > 0)
        # The quieter pixels set the unit: amplitudes are compared with their noise.
        typical = start.quantiles(jnp.where(good, noise, 1.0), good, (0.25, 0.5, 0.75))[0]
        noise_unit = _power_of_two(jnp.where(jnp.any(good), typical, 1.0))
        relative = jnp.maximum(noise / noise_unit, 1.0 / MOST_NOISE)
        good &= relative <= MOST_NOISE
        relative = jnp.where(good, relative, 1.0)
    n = start.count(good)
    enough = n >= 2 * (6 + n_background + fit_scale)
    data = jnp.where(good, data, 0.0)

    low, middle, high = _widened(start.quantiles(data, good, (0.25, 0.5, 0.75)))
    data = _widened(data)
    offset = middle if n_background else dials.level
    half_spread = 0.5 * (high - low)
    mean_deviation = jnp.sum(jnp.where(good, jnp.abs(data - offset), 0.0)) / jnp.maximum(n, 1.0)
    spread = jnp.where(half_spread > 0, half_spread, jnp.where(mean_deviation > 0, mean_deviation, 1.0))
    near = good & (jnp.abs(data - middle) <= start.ACCURACY * half_spread)
    unit = _power_of_two(spread)
    if noise is None:
        weight, noise_unit, ratio_spread = good.astype(dtype), jnp.ones_like(unit), half_spread / unit
        log_noise = jnp.zeros_like(unit)
    else:
        ratio_spread = start.half_spread((data - offset) / (unit * relative), good)
        weight = jnp.where(good, 1.0 / relative, 0.0).astype(dtype)
        log_noise = jnp.sum(jnp.log(relative))
    scale_unit = unit / noise_unit
    image = likelihood.Image(
        # A wild pixel weighs nothing wherever it is, but its square must not overflow.
        data=jnp.clip(jnp.where(good, data - offset, 0.0) / unit, -WILD, WILD).astype(dtype),
        weight=weight,
        origin=jnp.zeros(2),
    )
    # A scale of zero has no likelihood.
    first_scale = jnp.maximum(ratio_spread, LEAST_SCALE)
    source = start.guess(image, first_scale, 0.5 * (shape.astype(float) - 1.0), dials.near)
    target = first_scale if fit_scale else dials.scale / scale_unit
    wide = jnp.maximum(target, start.WIDE * jnp.abs(source[2]))
    problem = Problem(
        image=image._replace(origin=source[:2]),
        n=n,
        start=likelihood.to_free(jnp.concatenate([source, jnp.zeros(n_background), wide[None]])),
        target=jnp.log(target),
        max_steps=jnp.where(enough, dials.max_steps, 0),
    )
    degenerate = 2 * start.count(near) > start.count(good)
    return problem, Units(unit, scale_unit, log_noise, offset, first_scale, enough, degenerate)


def _valid(free):
    """Whether the Gaussian at ``free`` is bounded."""
    return free[5] ** 2 + 0.25 * free[4] ** 2 < 1.0


def _rounding(free, precision):
    """What rounding leaves uncertain in a residual over its half-width."""
    return float(jnp.finfo(precision).eps) * (1.0 + jnp.abs(free[2]) * jnp.exp(-free[-1]))


@traced.kept
def minimise(problems: Problem, count, dials: Dials, *, fit_scale: bool, precision: str, batch: int):
    """The free vectors of a queue of problems, whether they converged, and the number of steps.

    Returns arrays (length, q), bool (length,), int (length,).
    """

    def step(problem, state):
        def evaluate(place, log_scale, exact):
            return moments.step(place, problem.image, problem.n, log_scale, exact, fit_scale=fit_scale)

        def rounding(place):
            return _rounding(place, precision)

        return newton.step(state, evaluate, _valid, problem.target, tolerance, rounding)

    # The last move squares what is left, or nearly so; `solution` looks whether it did.
    tolerance = jnp.maximum(dials.tolerance, 0.03 * jnp.sqrt(dials.tolerance))
    results = slots.run(
        problems,
        count,
        begin=lambda problem: newton.begin(problem.start, problem.target, fit_scale),
        step=step,
        going=lambda problem, state: newton.going(state, problem.max_steps),
        result=lambda state: jnp.stack(
            [*newton.place(state, _valid), state.converged.astype(float), state.n_steps.astype(float)]
        ),
        slots=batch,
        burst=BURST if jax.default_backend() == "cpu" else ACCELERATOR_BURST,
    )
    return results[:, :-2], results[:, -2] > 0, results[:, -1].astype(int)


class Solution(NamedTuple):
    """A solution in the units of its image, p parameters fitted of q = 6 + background + scale.

    public : (q,) parameters. errors, bias : (p,). covariances : four (p, p). converged, positive, enough, degenerate,
    peak_used : bools for the flags, see `quality.flags`. The rest are columns of the catalogue.
    """

    public: jax.Array
    errors: jax.Array
    bias: jax.Array
    covariances: tuple[jax.Array, ...]
    origin: jax.Array
    nll: jax.Array
    n_steps: jax.Array
    n_pixels: jax.Array
    outlier_fraction: jax.Array
    misfit: jax.Array
    misfit_profile: jax.Array
    condition: jax.Array
    noise_fwhm: jax.Array
    converged: jax.Array
    positive: jax.Array
    enough: jax.Array
    degenerate: jax.Array
    peak_used: jax.Array


def solution(
    found, problem: Problem, units: Units, shape, kernel, dials: Dials, *, fit_scale: bool, reach: int
) -> Solution:
    """Covariances of one image, and everything in its own units, from what `minimise` found.

    A last Newton step takes away what the tolerance has left. NaN where something could not be done. shape : int array
    (2,), ny, nx before padding. kernel, reach : as in `uncertainty.covariances`.
    """
    free, stopped, n_steps = found
    q = free.shape[0]
    p, n_background = q - (not fit_scale), q - 7
    n, unit, enough = problem.n, units.unit, units.enough
    image = problem.image
    places = list(free)  # once, or the compiler works out all maps of each user anew
    four = uncertainty.covariances(places, image, n, fit_scale, kernel, reach)
    positive = jnp.all(jnp.isfinite(four.hessian))
    left = newton.fraction(four.decrement, _rounding(free, image.data.dtype), four.spread)
    converged = stopped & positive & (left <= dials.tolerance)
    outliers, misfit, misfit_profile = quality.residuals(places, image, n, four)
    public = likelihood.to_public(free).at[:p].add(jnp.where(converged, -four.newton_step, 0.0))

    # Back to the image's own units, all linear.
    size = jnp.ones(q).at[2].set(unit).at[6 : 6 + n_background].set(unit).at[-1].set(units.scale_unit)
    size_of_data = jnp.maximum(jnp.abs(public[2]), units.first_scale)
    degenerate = units.degenerate | (fit_scale & (public[-1] < columns.MIN_SCALE * size_of_data))
    public = public * size
    if n_background:
        public = public.at[6].add(units.offset)
    nan = jnp.where(enough, 0.0, jnp.nan)
    size = size[:p]
    working = [getattr(four, kind) + nan for kind in columns.COVARIANCES]
    return Solution(
        public=public + nan,
        # Roots before units: the square of a small unit may vanish.
        errors=jnp.sqrt(jnp.diag(jnp.stack(working)[dials.chosen])) * size,
        bias=four.bias * size + nan,
        covariances=tuple(matrix * size[:, None] * size[None, :] for matrix in working),
        origin=image.origin + nan,
        nll=four.nll + units.log_noise + n * jnp.log(unit) + nan,
        n_steps=jnp.where(enough, n_steps, 0),
        n_pixels=n.astype(int),
        outlier_fraction=outliers + nan,
        misfit=misfit + nan,
        misfit_profile=misfit_profile + nan,
        condition=quality.condition(four.hessian_matrix, four.hessian) + nan,
        noise_fwhm=four.kernel_fwhm + nan,
        converged=converged,
        positive=positive,
        enough=enough,
        degenerate=degenerate,
        peak_used=quality.peak_used(public, image, shape),
    )


def describe(found: Solution, shape, dials: Dials) -> FitResult:
    """What is derived from a solution, with errors; and its flags. shape : int array (2,), ny, nx before padding."""
    chosen = jnp.stack(found.covariances)[dials.chosen][:6, :6]
    derived, derived_err, e_err = uncertainty.derived(found.public[:6], chosen)
    # The bias of the parameters is that of this covariance, whichever is chosen.
    derived_bias = uncertainty.derived_bias(found.public[:6], found.covariances[0][:6, :6], found.bias[:6])
    kept = {name: value for name, value in found._asdict().items() if name in FitResult._fields}
    return FitResult(
        **kept,
        params=found.public[: found.errors.shape[0]],
        derived=jnp.stack(derived),
        derived_err=jnp.stack(derived_err),
        derived_bias=jnp.stack(derived_bias),
        snr=jnp.abs(found.public[2]) / found.errors[2],
        flags=quality.flags(found, e_err, shape),
    )


def _batches(function, stacks, count, batch: int):
    """``function`` of one image, over the first ``count`` of stacks (length, ...), ``batch`` at a time."""
    # Traced once for the two places that need it; inlined, the compiler sees no difference.
    of_batch = jax.jit(jax.vmap(function), inline=True)

    def part(i):
        return jax.tree.map(lambda stack: jax.lax.dynamic_slice_in_dim(stack, i * batch, batch), stacks)

    length = jax.tree.leaves(stacks)[0].shape[0]
    empty = jax.tree.map(
        lambda leaf: jnp.zeros((length, *leaf.shape[1:]), leaf.dtype), jax.eval_shape(lambda: of_batch(part(0)))
    )

    def put(i, results):
        return jax.tree.map(
            lambda all_, new: jax.lax.dynamic_update_slice_in_dim(all_, new, i * batch, 0), results, of_batch(part(i))
        )

    return jax.lax.fori_loop(0, (count + batch - 1) // batch, put, empty)


@traced.kept
def prepare_all(
    data, mask, noise, shapes, count, dials: Dials, *, n_background: int, fit_scale: bool, precision: str, batch: int
) -> tuple[Problem, Units]:
    """`prepare` for the first ``count`` of a queue; arguments have an axis more, but noise may be None."""

    def one(queued):
        data, mask, noise, shape = queued
        return prepare(
            data, mask, noise, shape, dials, n_background=n_background, fit_scale=fit_scale, precision=precision
        )

    return _batches(one, (data, mask, noise, shapes), count, batch)


@traced.kept
def solve_all(
    found,
    problems: Problem,
    units: Units,
    shapes,
    kernels,
    count,
    dials: Dials,
    *,
    fit_scale: bool,
    reach: int,
    batch: int,
) -> Solution:
    """`solution` for the first ``count`` of a queue; arguments have an axis more, but kernels may be None."""

    def one(queued):
        found, problem, unit, shape, kernel = queued
        return solution(found, problem, unit, shape, kernel, dials, fit_scale=fit_scale, reach=reach)

    return _batches(one, (found, problems, units, shapes, kernels), count, batch)


@traced.kept
def describe_all(solutions: Solution, shapes, count, dials: Dials, *, batch: int) -> FitResult:
    """`describe` for the first ``count`` of a queue; arguments have an axis more."""
    return _batches(lambda queued: describe(queued[0], queued[1], dials), (solutions, shapes), count, batch)


traced.register((likelihood.Image, Dials, Problem, Units, Solution, FitResult))
