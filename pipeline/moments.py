"""Exact derivatives of the likelihood for the built-in Gaussian, by moments.

With X = (x - x0) / sigma, Y = (y - y0) / sigma and E = exp(-q/2), every first derivative of the model is E times a
polynomial of degree 2 in X, Y and every second derivative E times one of degree 4. So the pixels enter the gradient
and the Hessian only through moments sum w X^i Y^j of a few weight maps w, which are products of small matrices; what is
left are 6 x 6 matrices. Equal to `likelihood.terms` to rounding, at a hundredth of its cost (design: section 4).

Coordinates move with the source and are measured in its width, which keeps float32 accurate anywhere in any image.
"""

import jax.numpy as jnp
import numpy as np

from pipeline import likelihood

# The monomials 1, X, Y, X^2, XY, Y^2, and where the product of two of them stands in the 5 x 5 table of moments.
_X_POWER = np.array([0, 1, 0, 2, 1, 0])
_Y_POWER = np.array([0, 0, 1, 0, 1, 2])
_COLUMN = _X_POWER[:, None] + _X_POWER[None, :]
_ROW = _Y_POWER[:, None] + _Y_POWER[None, :]


def _log_slopes(sigma, rho, diff):
    """First and second derivatives of log E in x0, y0, log sigma, rho, diff: (5, 6) and (5, 5, 6) polynomials."""
    zero = jnp.zeros_like(sigma)
    a, b = (1.0 + diff) / sigma, (1.0 - diff) / sigma
    c = 0.5 * rho / sigma

    def polynomial(**terms):
        order = ("one", "x", "y", "xx", "xy", "yy")
        return jnp.stack([jnp.asarray(terms.get(name, zero), sigma.dtype) for name in order])

    half = jnp.full_like(sigma, 0.5)
    x0, y0 = polynomial(x=a, y=c), polynomial(x=c, y=b)
    width = polynomial(xx=1.0 + diff, xy=rho, yy=1.0 - diff)
    slopes = jnp.stack([x0, y0, width, polynomial(xy=-half), polynomial(xx=-half, yy=half)])
    none = jnp.zeros_like(x0)
    x0_rho, x0_diff = polynomial(y=half / sigma), polynomial(x=1.0 / sigma)
    y0_rho, y0_diff = polynomial(x=half / sigma), polynomial(y=-1.0 / sigma)
    width_rho, width_diff = polynomial(xy=2.0 * half), polynomial(xx=2.0 * half, yy=-2.0 * half)
    x0_y0 = polynomial(one=-c / sigma)
    curvatures = jnp.stack(
        [
            jnp.stack([polynomial(one=-a / sigma), x0_y0, -2.0 * x0, x0_rho, x0_diff]),
            jnp.stack([x0_y0, polynomial(one=-b / sigma), -2.0 * y0, y0_rho, y0_diff]),
            jnp.stack([-2.0 * x0, -2.0 * y0, -2.0 * width, width_rho, width_diff]),
            jnp.stack([x0_rho, y0_rho, width_rho, none, none]),
            jnp.stack([x0_diff, y0_diff, width_diff, none, none]),
        ]
    )
    return slopes, curvatures


def terms(free, image: likelihood.Image) -> likelihood.Terms:
    """Value and derivatives in the free vector (p,); see `likelihood.terms`, whose equal this is."""
    ny, nx = image.data.shape
    dtype = free.dtype
    x0, y0, amp, log_sigma, rho, diff = (free[i] for i in range(6))
    level, sigma, scale = free[6:-1], jnp.exp(log_sigma), jnp.exp(free[-1])
    x = (jnp.arange(nx, dtype=dtype) - x0) / sigma
    y = (jnp.arange(ny, dtype=dtype) - y0) / sigma
    quadratic = ((1.0 - diff) * y * y)[:, None] + x[None, :] * ((1.0 + diff) * x[None, :] + (rho * y)[:, None])
    shape = jnp.exp(-0.5 * quadratic)

    # The background's derivatives as polynomials in X, Y, one row a parameter.
    rows = jnp.zeros((3, 6), dtype).at[0, 0].set(1.0)
    rows = rows.at[1, 0].set(x0 - image.origin[0]).at[1, 1].set(sigma)
    rows = rows.at[2, 0].set(y0 - image.origin[1]).at[2, 2].set(sigma)
    ground = rows[: level.size]
    predicted = amp * shape
    if level.size:
        plane = level @ ground
        predicted = predicted + plane[0] + plane[1] * x[None, :] + plane[2] * y[:, None]

    g = scale * image.noise
    t = (image.data - predicted) / g
    inv = image.used / (1.0 + t * t)  # 0 where unused: every weight below has it as a factor
    psi = 2.0 * t * inv / g
    chi = 2.0 * inv - image.used
    weight = 2.0 * inv / (g * g)
    curvature = weight * chi
    cross = psi * 2.0 * inv
    nll = jnp.sum(image.used * likelihood.pixel_nll(image.data - predicted, g))

    x_powers = jnp.stack([x**i for i in range(5)], axis=-1)
    y_powers = jnp.stack([y**i for i in range(5)], axis=-1)

    def moments(*maps):
        """Moments of weight maps (ny, nx): one (6, 6) matrix of monomials times monomials each."""
        return [(y_powers.T @ (w @ x_powers))[_ROW, _COLUMN] for w in maps]

    first, *fours = moments(psi * shape, *(w * shape * shape for w in (curvature, weight, psi * psi)))
    slopes, curvatures = _log_slopes(sigma, rho, diff)
    up, down = slopes[:2] * amp, slopes[2:] * amp
    source = jnp.concatenate([up, jnp.eye(1, 6, dtype=dtype), down])  # d m = E * source . monomials
    shapes = np.array([0, 1, 3, 4, 5])  # the free vector without amp
    bend = amp * (slopes @ first @ slopes.T + curvatures @ first[0])
    second = jnp.zeros((6, 6), dtype).at[shapes[:, None], shapes[None, :]].set(bend)
    second = second.at[2, shapes].set(slopes @ first[0]).at[shapes, 2].set(slopes @ first[0])

    blocks = [source @ four @ source.T for four in fours]
    blocks[0] = blocks[0] - second
    gradient = [-source @ first[0]]
    scale_rows = [*moments(cross * shape, -psi * chi * shape)]
    scale_rows = [[source @ row[0]] for row in scale_rows]
    if level.size:
        sides = moments(*(w * shape for w in (curvature, weight, psi * psi)))
        corners = moments(curvature, weight, psi * psi, psi, cross, -psi * chi)
        blocks = [
            jnp.block([[block, source @ side @ ground.T], [ground @ side @ source.T, ground @ corner @ ground.T]])
            for block, side, corner in zip(blocks, sides, corners[:3], strict=True)
        ]
        gradient.append(-ground @ corners[3][0])
        for row, corner in zip(scale_rows, corners[4:], strict=True):
            row.append(ground @ corner[0])

    def bordered(block, row, last):
        row = jnp.concatenate(row)
        return jnp.block([[block, row[:, None]], [row[None, :], last[None, None]]])

    nothing = [jnp.zeros(6 + level.size, dtype)]
    return likelihood.Terms(
        nll=nll,
        gradient=jnp.concatenate([*gradient, jnp.sum(chi)[None]]),
        hessian=bordered(blocks[0], scale_rows[0], 4.0 * jnp.sum(t * t * inv * inv)),
        gauss_newton=bordered(blocks[1], nothing, 2.0 * jnp.sum(inv)),
        scores=bordered(blocks[2], scale_rows[1], jnp.sum(chi * chi)),
    )
