"""Stamps with known truth for tests, drawn with NumPy: independent of `pipeline.simulate`."""

import numpy as np
from scipy.ndimage import gaussian_filter

from pipeline import model

SMOOTHED = 3.0  # FWHM [pixel] of what correlated noise is smoothed with


def smooth_noise(r, shape, fwhm):
    """Gaussian noise of variance 1, (count, ny, nx), smoothed beyond the edges by a Gaussian of this FWHM [pixel]."""
    count, ny, nx = shape
    wide, width = 3 * int(np.ceil(fwhm)), fwhm / model.FWHM_PER_SIGMA
    point = np.zeros((1, 2 * wide + 1, 2 * wide + 1))
    point[0, wide, wide] = 1
    left, smooth = (
        gaussian_filter(one, (0, width, width), truncate=6)
        for one in (point, r.standard_normal((count, ny + 2 * wide, nx + 2 * wide)))
    )
    return smooth[:, wide : wide + ny, wide : wide + nx] / np.sqrt(np.sum(left**2))


def beam_noise(r, shape, beam):
    """Gaussian noise of variance 1, (count, ny, nx), smoothed by a Gaussian of covariance ``beam`` (2, 2) in x, y."""
    count, *sides = shape
    # Twice the size, so that opposite edges, which meet, are far apart in what is kept.
    ny, nx = (2 * side for side in sides)
    y, x = (np.fft.fftfreq(n, 1 / n) for n in (ny, nx))
    xx, xy, yy = np.linalg.inv(beam)[[0, 0, 1], [0, 1, 1]]
    point = np.exp(-0.5 * (xx * x * x + 2 * xy * x * y[:, None] + yy * y[:, None] ** 2))
    smooth = np.fft.irfft2(np.fft.rfft2(r.standard_normal((count, ny, nx))) * np.fft.rfft2(point), (ny, nx))
    return smooth[:, : sides[0], : sides[1]] / np.sqrt(np.sum(point**2))


def draw(count, amp, *, seed, shape=(32, 32), noise="cauchy", sigma=(1.5, 3.2), ellipticity=0.3, background=0.0):
    """``count`` stamps of unit noise scale, amp log-uniform in the range ``amp``.

    Returns images (count, ny, nx) and params (count, 6).
    """
    r = np.random.default_rng(seed)
    ny, nx = shape
    params = np.stack(
        [
            (nx - 1) / 2 + r.uniform(-1.5, 1.5, count),
            (ny - 1) / 2 + r.uniform(-1.5, 1.5, count),
            np.exp(r.uniform(*np.log(amp), count)),
            r.uniform(*sigma, count),
            r.uniform(-ellipticity, ellipticity, count),
            r.uniform(-ellipticity, ellipticity, count),
        ],
        axis=-1,
    )
    y, x = np.mgrid[:ny, :nx].astype(float)
    size = (count, ny, nx)
    drawn = {
        "none": lambda: np.zeros(size),
        "cauchy": lambda: r.standard_cauchy(size),
        "gaussian": lambda: r.standard_normal(size),
        "correlated": lambda: smooth_noise(r, size, SMOOTHED),
        "student": lambda: r.standard_t(3, size),
        "contaminated": lambda: r.standard_normal(size) * np.where(r.random(size) < 0.05, 10.0, 1.0),
    }[noise]()
    return model.gaussian(params[:, None, None, :], x, y) + background + drawn, params


def nll_at_truth(images, params):
    """nll (n,) of the true sources with scale and background at their best, by iterated reweighting."""
    n, ny, nx = images.shape
    y, x = np.mgrid[:ny, :nx].astype(float)
    residual = (images - model.gaussian(params[:, None, None, :], x, y)).reshape(n, -1)
    level = np.median(residual, axis=1, keepdims=True)
    g = np.median(np.abs(residual - level), axis=1, keepdims=True)
    for _ in range(100):
        weight = 1 / (1 + ((residual - level) / g) ** 2)
        level = np.sum(weight * residual, axis=1, keepdims=True) / np.sum(weight, axis=1, keepdims=True)
        weight = 1 / (1 + ((residual - level) / g) ** 2)
        g = g * np.sqrt(2 * (1 - weight.mean(axis=1, keepdims=True)))
    return np.sum(np.log(np.pi * g) + np.log1p(((residual - level) / g) ** 2), axis=1)
