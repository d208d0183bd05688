"""Sizes without the beam: limits hold, point sources are unresolved, errors of resolved sources hold.

Limits of the tests are the Monte Carlo error at four sigma, where nothing else is said.
"""

import numpy as np
import pytest
from astropy.io import fits

from pipeline import fit, model, sky
from pipeline.columns import LIMITS
from tests import stamps

COUNT = 1500
SIDE = 32
BEAM = (5.0, 4.0, 30.0)  # FWHM [arcsec], angle [deg]; a pixel is an arcsec
#: FWHM [arcsec] and angle [deg] without the beam.
SIZES = {"point": (0, 0, 0), "small": (2, 2, 0), "thin": (6, 0, 100), "round": (5, 5, 0), "oblong": (7, 4, 100)}


def covariance(major, minor, angle):
    """Covariance (2, 2) in pixels, where north is up and east is left, of an ellipse on the sky."""
    sin, cos = np.sin(np.radians(angle)), np.cos(np.radians(angle))
    axes = np.array([[-sin, cos], [cos, sin]])
    return axes @ np.diag([major**2, minor**2]) @ axes.T / model.FWHM_PER_SIGMA**2


def within(share, nominal, more=0.0):
    return abs(share - nominal) < 4 * np.sqrt(nominal * (1 - nominal) / COUNT) + more


def at_least(share, nominal):
    return share > nominal - 4 * np.sqrt(nominal * (1 - nominal) / COUNT)


@pytest.fixture(scope="module", params=["independent", "smoothed"])
def found(request):
    """Sky columns of COUNT sources of each size, S/N about 15 to 80; noise independent, or as the beam leaves it."""
    r = np.random.default_rng(51)
    header = {
        "CTYPE1": "RA---TAN",
        "CTYPE2": "DEC--TAN",
        "CRVAL1": 40.0,
        "CRVAL2": 30.0,
        "CRPIX1": 16.0,
        "CRPIX2": 16.0,
    }
    wcs = sky.celestial(fits.Header(header | {"CDELT1": -1 / 3600, "CDELT2": 1 / 3600}))
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    if request.param == "independent":
        noise, level, settings = r.standard_normal, 1.0, {}
    else:
        kernel = sky.beam_kernels([(wcs, BEAM, np.full((1, 2), 15.5))])
        settings = {"correlation": np.tile(kernel, (COUNT, 1))}
        noise, level = (lambda size: stamps.beam_noise(r, size, covariance(*BEAM))), 3.0
    columns = {}
    for name, size in SIZES.items():
        (xx, xy), (_, yy) = np.linalg.inv(covariance(*BEAM) + covariance(*size))
        sigma2 = 2 / (xx + yy)
        places = r.uniform(15, 16, (COUNT, 2)).T
        amp = level * np.exp(r.uniform(*np.log([5, 25]), COUNT))
        rest = [np.full(COUNT, one) for one in (np.sqrt(sigma2), 2 * xy * sigma2, (xx - yy) / 2 * sigma2)]
        sources = np.column_stack([*places, amp, *rest])
        images = model.gaussian(sources[:, None, None, :], x, y) + noise((COUNT, SIDE, SIDE))
        result = fit.fit_stack(images, **settings)
        columns[name] = sky.sky_columns([(wcs, BEAM, COUNT)], result.params[:, :6], result.covariances[0][:, :6, :6])
    return columns


def test_limits_hold(found):
    for name, (*widths, _) in SIZES.items():
        for limit, width in zip(LIMITS, widths, strict=True):
            assert np.isfinite(found[name][limit]).all()
            assert at_least(np.mean(found[name][limit] >= width), 0.95), (name, limit)
    # Where the direction is known nothing is given away.
    assert within(np.mean(found["thin"]["deconvolved_major_limit"] >= 6), 0.95)


def test_point_sources_are_unresolved_and_others_are_not(found):
    shares = {name: np.mean(sky.unresolved(columns)) for name, columns in found.items()}
    assert at_least(shares["point"], 0.95), shares
    assert shares["point"] < 0.995, shares  # else the threshold could be lower
    assert shares["point"] > shares["small"] > 0.2, shares
    assert max(shares[name] for name in ("thin", "round", "oblong")) < 0.05, shares


@pytest.mark.parametrize(
    ("size", "column", "width"), [("thin", "major", 6), ("oblong", "major", 7), ("oblong", "minor", 4)]
)
def test_errors_of_resolved_sources_hold(found, size, column, width):
    """Within three points and the Monte Carlo error."""
    values, errors = (found[size][f"deconvolved_{column}{end}"] for end in ("", "_err"))
    assert np.mean(np.isnan(values)) < 0.05
    pulls = (values - width) / errors
    assert within(np.mean(np.abs(pulls) < 1), 0.683, 0.03), np.mean(np.abs(pulls) < 1)
