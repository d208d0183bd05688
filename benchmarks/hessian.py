"""Value, gradient and Hessian of one large image: automatic differentiation, numerical differences, moments."""

import functools

import jax
import jax.numpy as jnp
import numdifftools
import numpy as np

from benchmarks import workers
from benchmarks.peers import numpy_nll, objective
from pipeline import likelihood, moments, uncertainty
from tests import stamps

#: The ways; the last, which is slow, on an image of a tenth of the side.
MOMENTS, AUTODIFF = "moments (this package)", "`jit` of value, `grad`, `jacfwd(jacrev)`"
JITTED, NUMPY = "numdifftools on the jitted function", "numdifftools on NumPy"


@functools.cache
def draw(side):
    """One image and a point near its truth in the free vector (8,)."""
    width = side / 10
    (image,), (source,) = stamps.draw(1, (20, 20), seed=4000, shape=(side, side), sigma=(width, 1.2 * width))
    near = np.array([*source, 0.0, 1.0]) * 1.01 + 0.01
    near[[3, 7]] = np.log(near[[3, 7]])
    return image, near


def public(free):
    """`likelihood.to_public` in NumPy."""
    values = np.array(free)
    values[[3, 7]] = np.exp(values[[3, 7]])
    return values


def by_moments(image, point):
    """A function without arguments that computes all three; here and nowhere else a benchmark knows `moments`."""
    whole = likelihood.Image(jnp.asarray(image), jnp.ones_like(image), jnp.zeros(2))

    @jax.jit
    def program(point, image):
        places, n = list(point), jnp.asarray(float(image.data.size))
        step = moments.step(places, image, n, point[-1], jnp.asarray(True), fit_scale=True)
        return step.nll, jnp.stack(step.gradient), uncertainty.dense(step.matrix, 8)

    return lambda: program(point, whole)


def by_autodiff(image, point):
    """Likewise, in one compiled program."""
    image = jnp.asarray(image)

    @jax.jit
    def program(point, image):
        value, _ = objective(likelihood.to_public(point), image, 8)
        return value(point), jax.grad(value)(point), jax.jacfwd(jax.jacrev(value))(point)

    return lambda: program(point, image)


def by_differences(image, point, jitted):
    """Likewise, with the function compiled by JAX or in NumPy."""
    program = jax.jit(lambda point, image: objective(likelihood.to_public(point), image, 8)[0](point))
    pixels = jnp.asarray(image) if jitted else image

    def value(point):
        return float(program(point, pixels)) if jitted else numpy_nll(public(point), pixels)

    return lambda: (value(point), numdifftools.Gradient(value)(point), numdifftools.Hessian(value)(point))


WAYS = {
    MOMENTS: by_moments,
    AUTODIFF: by_autodiff,
    JITTED: functools.partial(by_differences, jitted=True),
    NUMPY: functools.partial(by_differences, jitted=False),
}


def run(name, side):
    """Seconds, peak memory above that of JAX and the image alone [MB], and the Hessian (8, 8)."""
    image, point = draw(side)
    jax.block_until_ready(jax.jit(jnp.sum)(jnp.ones(8)))
    workers.forget_peak()
    before = workers.peak_memory()
    evaluate = WAYS[name](image, point)
    if name in (MOMENTS, AUTODIFF):  # compiles; for the differences that is one of very many calls
        jax.block_until_ready(evaluate())
    workers.forget_peak()
    began = workers.clock()
    with np.errstate(over="ignore"):  # the longest of the steps that numdifftools tries
        hessian = jax.block_until_ready(evaluate())[2]
    return workers.clock() - began, workers.peak_memory() - before, np.asarray(hessian)


def study(arguments) -> dict:
    """Seconds of every repeat, peak memory [MB] and largest error in units of sqrt(H_ii H_jj), for each way."""
    sides = dict.fromkeys(WAYS, arguments.side) | {NUMPY: arguments.side // 10}
    repeats = {MOMENTS: arguments.repeats, AUTODIFF: min(3, arguments.repeats), JITTED: 1, NUMPY: 1}
    rows: dict = {name: {"side": sides[name], "seconds": [], "memory": []} for name in WAYS}
    hessians = {}
    for repeat in range(arguments.repeats):
        for name, row in rows.items():
            if repeat >= repeats[name]:
                continue
            seconds, memory, hessians[name] = workers.alone(workers.cores(), run, name, sides[name])
            row["seconds"].append(seconds)
            row["memory"].append(memory)
            print(f"Hessian of {row['side']}^2, {name}: {seconds:.3g} s, {memory:.0f} MB", flush=True)
    small = workers.alone(workers.cores(), run, AUTODIFF, sides[NUMPY])[2]
    for name, row in rows.items():
        exact = small if name == NUMPY else hessians[AUTODIFF]
        size = np.sqrt(np.abs(np.diag(exact)))
        row["error"] = float(np.max(np.abs(hessians[name] - exact) / (size[:, None] * size[None, :])))
    return rows
