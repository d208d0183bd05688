"""Simulated stamps with known truth, as FITS stacks.

Every random number comes from one key folded with the number of the image, so image 17 is the same in a run of 20 and
of 20 million, whatever the stacks it is written in.
"""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from astropy.io import fits
from astropy.table import Table
from scipy import integrate, optimize, stats

from pipeline import columns, model
from pipeline.files import replacing
from pipeline.origin import KEYWORD, digest_in_header, stack_digest

BLOCK = 256  # images drawn in one call
OFFSET = 1.5  # pixels around the image centre in which x0, y0 are drawn where the config says nothing
_DRAWN = ("x0", "y0", "amp", "sigma", "rho", "diff", "background")


def _draw_parameters(key, shape, parameters):
    """Parameters (7,) of one image: ``_DRAWN``, in order. See the config section ``simulated.parameters``."""
    ny, nx = shape
    centred = {"x0": (nx - 1) / 2, "y0": (ny - 1) / 2}
    values = []
    for i, name in enumerate(_DRAWN):
        if parameters.get(name) is None:
            low, high = centred[name] - OFFSET, centred[name] + OFFSET
        else:
            low, high = parameters[name]
        draw = jax.random.uniform(jax.random.fold_in(key, i), dtype=jnp.float64)
        if name == "amp" and low * high > 0:
            values.append(low * (high / low) ** draw)
        else:
            values.append(low + (high - low) * draw)
    return jnp.stack(values)


def _draw_noise(key, shape, noise):
    """Noise (ny, nx) of one image. See the config section ``simulated.noise``."""
    kind, scale = noise["kind"], noise["scale"]
    if kind == "cauchy":
        return scale * jax.random.cauchy(key, shape, dtype=jnp.float64)
    if kind == "student":
        return scale * jax.random.t(key, noise["dof"], shape, dtype=jnp.float64)
    values = scale * jax.random.normal(key, shape, dtype=jnp.float64)
    if kind == "contaminated":
        hit = jax.random.bernoulli(jax.random.fold_in(key, 1), noise["fraction"], shape)
        values = jnp.where(hit, noise["factor"] * values, values)
    return values


def draw(start: int, stop: int, *, shape, seed, noise, parameters) -> tuple[np.ndarray, np.ndarray]:
    """Images ``start`` to ``stop - 1`` of a simulation.

    Parameters
    ----------
    start, stop : int
        Numbers of the images.
    shape, seed, noise, parameters
        The config section ``simulated``.

    Returns
    -------
    images : float32 array (n, ny, nx)
    params : float64 array (n, 7)
        x0, y0, amp, sigma, rho, diff, background.
    """
    ny, nx = shape
    root = jax.random.key(seed)
    x, y = jnp.arange(nx, dtype=float)[None, :], jnp.arange(ny, dtype=float)[:, None]

    def one(index):
        key = jax.random.fold_in(root, index)
        params = _draw_parameters(jax.random.fold_in(key, 0), (ny, nx), parameters)
        image = model.gaussian(params[:6], x, y) + params[6]
        return (image + _draw_noise(jax.random.fold_in(key, 1), (ny, nx), noise)).astype(jnp.float32), params

    # Image by image: memory for one, and the same instructions for each whatever the block.
    program = jax.jit(lambda indices: jax.lax.map(one, indices))
    block = max(1, min(BLOCK, stop - start))
    images, params = [], []
    for low in range(start, stop, block):
        block_images, block_params = program(np.arange(low, low + block))
        images.append(np.asarray(block_images)[: stop - low])
        params.append(np.asarray(block_params)[: stop - low])
    if not images:
        return np.empty((0, ny, nx), np.float32), np.empty((0, len(_DRAWN)))
    return np.concatenate(images), np.concatenate(params)


def cauchy_scale(noise) -> float:
    """The half-width that the Cauchy likelihood gives noise of this kind, in image units.

    The root of E[(g^2 - r^2) / (g^2 + r^2)] = 0; 0.6120 s for Gaussian noise of rms s.
    """
    kind, scale = noise["kind"], noise["scale"]
    if kind == "cauchy":
        return scale
    if kind == "student":
        parts = [(1.0, stats.t(noise["dof"], scale=1.0))]
    elif kind == "gaussian":
        parts = [(1.0, stats.norm())]
    else:
        share = noise["fraction"]
        parts = [(1.0 - share, stats.norm()), (share, stats.norm(scale=noise["factor"]))]

    def balance(log_g):
        g = np.exp(log_g)

        def weighed(r):
            density = sum(weight * part.pdf(r) for weight, part in parts)
            return (g * g - r * r) / (g * g + r * r) * density

        # Where density and likelihood change: without these breaks quadrature misses narrow parts.
        edges = [0.0, *sorted({g, 1.0, noise["factor"]}), np.inf]
        return sum(integrate.quad(weighed, low, high)[0] for low, high in itertools.pairwise(edges))

    return scale * float(np.exp(optimize.brentq(balance, np.log(1e-4), np.log(1e4 * max(1.0, noise["factor"])))))


def truth(params: np.ndarray, noise) -> dict[str, np.ndarray]:
    """Columns of `columns.TRUTH` without identity, for ``params`` (n, 7) as `draw` gives them."""
    values = dict(zip(_DRAWN, params.T, strict=True))
    values["scale"] = np.full(len(params), cauchy_scale(noise))
    values |= dict(zip(columns.DERIVED, model.derived(params[:, :6]).T, strict=True))
    names = [c.name for c in columns.TRUTH if c.group != "identity"]
    return {name: values.get(name, np.zeros(len(params))) for name in names}


def write_stack(path, truth_path, start: int, stop: int, *, check=lambda: None, **simulated) -> None:
    """Write images ``start`` to ``stop - 1`` as one float32 FITS stack (n, ny, nx), and their truth as a FITS table.

    Other arguments are those of `draw`. Column ``plane`` of the truth counts the planes of the stack from 0. Both have
    the digest of what they are made of in their headers. check : called before anything is written, to raise what it
    likes.
    """
    seed, noise = simulated["seed"], simulated["noise"]
    images, params = draw(start, stop, **simulated)
    table = Table({"plane": np.arange(len(images)), **truth(params, noise)})
    primary = fits.PrimaryHDU(images)
    primary.header["EXTNAME"] = ("SIMULATED", "simulated stamps, one a plane")
    primary.header["FIRST"] = (start, "number of the first image")
    primary.header["SEED"] = (seed, "of the simulation")
    check()
    digest = stack_digest(simulated, start, stop)
    for name, hdus in ((path, [primary]), (truth_path, [fits.PrimaryHDU(), fits.BinTableHDU(table)])):
        if digest_in_header(name) == digest:  # by another job; others may have read it since
            continue
        hdus[0].header[KEYWORD] = (digest, "of what it was made of")
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(name) as temporary:
            fits.HDUList(hdus).writeto(temporary, overwrite=True)
