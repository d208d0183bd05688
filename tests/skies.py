"""Headers with a sky, ellipses on it, and the columns that sources have there, for tests."""

import numpy as np
from astropy import units as u
from astropy.io import fits

from pipeline import sky

SHAPES = ("fwhm_major_sky", "fwhm_minor_sky", "pa_sky")
RESOLVED = ("deconvolved_major", "deconvolved_minor", "deconvolved_pa")
SCALE = 0.5  # arcsec a pixel in most headers here


def columns_of(wcs, beam, params, cov):
    """Sky and beam columns of the sources of one image."""
    return sky.sky_columns([(wcs, beam, len(params))], params, cov)


def header(**cards):
    """A plain TAN header with ``cards`` put in; None takes one out, ``DATE__OBS`` is DATE-OBS."""
    plain = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 40.0, "CRVAL2": 30.0, "CRPIX1": 11.0, "CRPIX2": 11.0}
    cards = plain | {"CDELT1": -SCALE / 3600, "CDELT2": SCALE / 3600} | cards
    return fits.Header([(key.replace("__", "-"), value) for key, value in cards.items() if value is not None])


def turned(angle, scale=SCALE, flip=1):
    """Cards of a CD matrix whose sky is turned by ``angle`` [deg] from north through east."""
    sin, cos = np.sin(np.radians(angle)), np.cos(np.radians(angle))
    matrix = np.array([[cos, sin], [-sin, cos]]) @ np.diag([-flip * scale, scale]) / 3600
    elements = {f"CD{i + 1}_{j + 1}": matrix[i, j] for i in (0, 1) for j in (0, 1)}
    return elements | {"CDELT1": None, "CDELT2": None}


def ellipse(major, minor, angle):
    """Covariance (east, north) of an ellipse given by FWHM and position angle [deg]."""
    sin, cos = np.sin(np.radians(angle)), np.cos(np.radians(angle))
    axes = np.array([[sin, cos], [cos, -sin]])
    return axes @ np.diag([major**2, minor**2]) @ axes.T / (8 * np.log(2))


def to_params(x, y, shape):
    """Parameters of design section 2 of a Gaussian at ``(x, y)`` with covariance ``shape`` [pixel^2]."""
    inverse = np.linalg.inv(shape)
    sigma = np.sqrt(2 / np.trace(inverse))
    return np.array([x, y, 1.0, sigma, 2 * inverse[0, 1] * sigma**2, (inverse[0, 0] - inverse[1, 1]) / 2 * sigma**2])


def pixel_slopes(wcs, place):
    """Derivatives of the pixel position by the offset (east, north) [arcsec], by walking on the great circles."""
    step = 0.1 * u.arcsec
    walks = [place.directional_offset_by(angle * u.deg, step) for angle in (90, 270, 0, 180)]
    right, left, up, down = (np.array(sky.pixel_position(wcs, p.ra.deg, p.dec.deg)) for p in walks)
    return np.stack([right - left, up - down], axis=-1) / (2 * step.value)


def angle_between(a, b):
    """Difference of two position angles, in [-90, 90)."""
    return (np.asarray(a) - b + 90) % 180 - 90


def one(wcs, params, cov=None, beam=None):
    """The columns of a single source as floats."""
    cov = np.diag([1e-2, 2e-2, 1e-3, 3e-3, 4e-3, 5e-3]) if cov is None else cov
    return {k: v.item() for k, v in columns_of(wcs, beam, np.array([params]), np.array([cov])).items()}


def drawn():
    """Parameters (20, 6) and full covariances (20, 6, 6) of sources around pixel (10, 10)."""
    rng = np.random.default_rng(5)
    params = np.column_stack([rng.uniform(5, 15, (20, 2)), rng.uniform(1, 9, 20), rng.uniform(1, 4, 20)])
    params = np.column_stack([params, rng.uniform(-0.5, 0.5, (20, 2))])
    mix = rng.normal(size=(20, 6, 6)) * 1e-2
    return params, mix @ mix.transpose(0, 2, 1)
