"""Beams: their keywords, sources without them, the noise that they smooth, limits of what they hide."""

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits

from pipeline import sky
from pipeline.columns import LIMITS
from tests.skies import (
    RESOLVED,
    SCALE,
    SHAPES,
    angle_between,
    columns_of,
    drawn,
    ellipse,
    header,
    one,
    pixel_slopes,
    to_params,
    turned,
)


@pytest.fixture(scope="module")
def sources():
    return drawn()


def test_beam_keywords():
    assert sky.beam(header(BMAJ=0.002, BMIN=0.001, BPA=-30.0)) == pytest.approx((7.2, 3.6, -30.0))
    assert sky.beam(header(BMAJ=0.002, BMIN=0.002)) == pytest.approx((7.2, 7.2, 0.0))
    assert sky.beam(header(BMAJ=1, BMIN=1, BPA=0)) == (3600.0, 3600.0, 0.0)


@pytest.mark.parametrize(
    "cards",
    [
        {},
        {"BMAJ": 0.002, "BPA": 0.0},
        {"BMAJ": 0.002, "BMIN": 0.001},
        {"BMAJ": 0.002, "BMIN": 0.001, "BPA": "north"},
        *({"BMAJ": bad, "BMIN": 0.001, "BPA": 0.0} for bad in (0.0, -1.0, "nan", "0.002", True)),
        {"BMAJ": -1.0, "BMIN": -1.0, "BPA": 0.0},
        {"BMAJ": 0.002, "BMIN": 0, "BPA": 0.0},
    ],
)
def test_beams_that_are_none(cards):
    assert sky.beam(header(**cards)) is None


@pytest.mark.parametrize("text", ["", "12.3.4", "NaN"])
def test_beam_cards_that_cannot_be_read(text):
    cards = [fits.Card.fromstring(f"BMAJ    = {text}"), ("BMIN", 0.001), ("BPA", 0.0)]
    assert sky.beam(fits.Header(cards)) is None


@pytest.mark.parametrize("angle", [0.0, 20.0, 75.0, 140.0])
def test_deconvolution_undoes_convolution(angle):
    beam, source = (5.0, 3.0, 50.0), (4.0, 2.5, angle)
    wcs = sky.celestial(header(**turned(33.0)))
    slopes = pixel_slopes(wcs, SkyCoord(40.0, 30.0, unit="deg"))
    columns = one(
        wcs, to_params(10.0, 10.0, slopes @ (ellipse(*source) + ellipse(*beam)) @ slopes.T), np.eye(6) * 1e-4, beam
    )
    assert columns["deconvolved_major"] == pytest.approx(4.0, rel=1e-6)
    assert columns["deconvolved_minor"] == pytest.approx(2.5, rel=1e-6)
    assert angle_between(columns["deconvolved_pa"], angle) == pytest.approx(0, abs=1e-4)
    assert np.isfinite([columns[f"{name}_err"] for name in RESOLVED]).all()
    assert columns["deconvolved_minor_err"] > columns["fwhm_minor_sky_err"]


def test_the_beam_lies_in_the_system_of_the_image():
    beam, source = (5.0, 2.0, 20.0), (4.0, 3.0, 80.0)
    cards = {"CTYPE1": "GLON-TAN", "CTYPE2": "GLAT-TAN", "CRVAL1": 40.0, "CRVAL2": 30.0}
    wcs = sky.celestial(header(**cards))
    shape = np.diag([-1, 1]) @ (ellipse(*source) + ellipse(*beam)) @ np.diag([-1, 1]) / SCALE**2
    columns = one(wcs, to_params(10.0, 10.0, shape), beam=beam)
    place = SkyCoord(40.0, 30.0, unit="deg", frame="galactic")
    turn = place.icrs.position_angle(place.directional_offset_by(0 * u.deg, 1 * u.arcsec).icrs).deg
    assert abs(angle_between(turn, 0)) > 20
    assert columns["deconvolved_major"] == pytest.approx(4.0, rel=1e-6)
    assert columns["deconvolved_minor"] == pytest.approx(3.0, rel=1e-6)
    assert angle_between(columns["deconvolved_pa"], 80.0 + turn) == pytest.approx(0, abs=1e-3)


def test_noise_is_smoothed_with_the_beam_in_pixels():
    """The inverse of a kernel is the covariance of the beam in pixels, wherever on whatever sky."""
    beam, places = (5.0, 3.0, 50.0), np.array([[10.0, 10.0], [300.0, -80.0], [0.0, 40.0]])
    wide = header(CTYPE1="RA---SIN", CTYPE2="DEC--SIN", CDELT1=-0.1, CDELT2=0.1)
    headers = [header(**turned(33.0, flip=-1)), header(CDELT1=2e-4, CRVAL2=60.0), wide]
    wcs = [sky.celestial(one) for one in headers]
    kernels = sky.beam_kernels([(one, beam, places[: i + 1]) for i, one in enumerate(wcs)])
    assert kernels.shape == (6, 3)
    wanted = []
    for i, own in enumerate(wcs):
        for x, y in places[: i + 1]:
            slopes = pixel_slopes(own, SkyCoord(*own.all_pix2world(x, y, 0), unit="deg"))
            wanted.append(np.linalg.inv(slopes @ ellipse(*beam) @ slopes.T)[[0, 0, 1], [0, 1, 1]])
    np.testing.assert_allclose(kernels, wanted, rtol=1e-5)
    assert np.max(np.ptp(kernels[3:], axis=0)) > 0.1 * kernels[3, 0]  # the projection shows


def test_the_beam_in_pixels_does_not_depend_on_the_system():
    """It lies in the system of the image, so that nothing turns it on its way to the pixels."""
    cards = {"CTYPE1": "GLON-TAN", "CTYPE2": "GLAT-TAN", "CRVAL1": 40.0, "CRVAL2": 30.0}
    place, beam = np.array([[10.0, 10.0]]), (4.0, 2.0, 90.0)
    (kernel,) = sky.beam_kernels([(sky.celestial(header(**cards)), beam, place)])
    np.testing.assert_allclose(kernel, 8 * np.log(2) * SCALE**2 * np.array([1 / 16, 0, 1 / 4]), rtol=1e-6, atol=1e-6)


def test_without_beam_or_sky_there_is_no_kernel():
    place = np.zeros((2, 2))
    wcs = sky.celestial(header(CTYPE1="RA---SIN", CTYPE2="DEC--SIN", CDELT1=-1.0, CDELT2=1.0))
    headers = [(wcs, None, place), (None, (4.0, 2.0, 90.0), place), (wcs, (4.0, 2.0, 90.0), place + 1e4)]
    assert np.isnan(sky.beam_kernels(headers)).all()


def test_unresolved_axes_are_nan():
    beam = (4.0, 2.0, 90.0)
    wcs = sky.celestial(header())
    axes = {"major": (6.0, 1.9), "none": (3.9, 1.9), "beam": (4.0, 2.0)}
    found = {
        name: one(wcs, to_params(10.0, 10.0, ellipse(*axis, 90.0) / SCALE**2), beam=beam) for name, axis in axes.items()
    }
    assert found["major"]["deconvolved_major"] == pytest.approx(np.sqrt(36 - 16), rel=1e-6)
    assert angle_between(found["major"]["deconvolved_pa"], 90) == pytest.approx(0, abs=1e-4)
    assert np.isfinite([found["major"][k] for k in ("deconvolved_major_err", "deconvolved_pa_err")]).all()
    assert np.isnan([found["major"][k] for k in ("deconvolved_minor", "deconvolved_minor_err")]).all()
    assert np.isnan([found["none"][f"{name}{end}"] for name in RESOLVED for end in ("", "_err")]).all()
    # The beam itself comes out as a point, to the precision of the derivatives of the WCS.
    assert np.nan_to_num(found["beam"]["deconvolved_major"]) < 1e-3
    assert np.isfinite([found["none"][name] for name in SHAPES]).all()


def test_limits_lie_some_errors_of_squares_above_the_widths():
    wcs, beam = sky.celestial(header()), (4.0, 2.0, 90.0)
    # None across the ellipticity, whose bias would make the errors of widths those of a rounder source.
    cov = np.diag([0, 0, 0, 1e-4, 0, 1e-4])
    sizes = {"long": (6.0, 2.5), "thin": (6.0, 1.5), "point": (3.9, 1.9)}
    found = {
        name: one(wcs, to_params(10.0, 10.0, ellipse(*size, 90.0) / SCALE**2), cov, beam)
        for name, size in sizes.items()
    }
    for name, errors in (("major", 1.645), ("minor", 2.45)):
        width, error = (found["long"][f"deconvolved_{name}{end}"] for end in ("", "_err"))
        limit = found["long"][f"deconvolved_{name}_limit"]
        assert limit**2 - width**2 == pytest.approx(errors * 2 * width * error, rel=1e-9)
    # The error of a square does not depend on the beam, that of its root would be infinite at the beam.
    square = 2 * found["thin"]["fwhm_minor_sky"] * found["thin"]["fwhm_minor_sky_err"]
    assert found["thin"]["deconvolved_minor_limit"] ** 2 == pytest.approx(2.45 * square, rel=1e-6)
    assert 0 < found["point"]["deconvolved_minor_limit"] <= found["point"]["deconvolved_major_limit"] < 4
    flags = [sky.unresolved({k: np.array([v]) for k, v in columns.items()}).item() for columns in found.values()]
    assert flags == [False, False, True]


def test_what_has_no_errors_has_no_limits_and_is_not_called_unresolved(sources):
    params, cov = sources
    wcs, beam = sky.celestial(header()), (9.0, 9.0, 0.0)
    assert sky.unresolved(columns_of(wcs, beam, params, cov)).any()
    for columns in (columns_of(wcs, beam, params, np.full_like(cov, np.nan)), columns_of(wcs, None, params, cov)):
        assert np.isnan([columns[name] for name in LIMITS]).all()
        assert not sky.unresolved(columns).any()


def test_without_beam_nothing_is_deconvolved(sources):
    columns = columns_of(sky.celestial(header()), None, *sources)
    assert all(np.isnan(columns[f"{name}{end}"]).all() for name in RESOLVED for end in ("", "_err"))
