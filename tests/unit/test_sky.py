"""Laws of the sky columns: turns, flips, projections, poles, frames, beams, errors; and headers of every make."""

import contextlib
import itertools
import warnings

import jax
import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS

from pipeline import sky
from pipeline.columns import BEAM, LIMITS, SKY
from pipeline.headers import read_header
from pipeline.uncertainty import direction_error, rounder

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


@pytest.fixture(scope="module")
def sources():
    """Parameters (20, 6) and full covariances (20, 6, 6) of sources around pixel (10, 10)."""
    rng = np.random.default_rng(5)
    params = np.column_stack([rng.uniform(5, 15, (20, 2)), rng.uniform(1, 9, 20), rng.uniform(1, 4, 20)])
    params = np.column_stack([params, rng.uniform(-0.5, 0.5, (20, 2))])
    mix = rng.normal(size=(20, 6, 6)) * 1e-2
    return params, mix @ mix.transpose(0, 2, 1)


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_columns_are_those_of_the_catalogue(sources):
    columns = columns_of(sky.celestial(header()), None, *sources)
    assert sorted(columns) == sorted([*SKY, *BEAM, *LIMITS, *(f"{name}_err" for name in (*SKY, *BEAM))])
    assert all(values.shape == (20,) and values.dtype == np.float64 for values in columns.values())


def test_square_pixels_north_up_east_left(sources):
    params, cov = sources
    columns = columns_of(sky.celestial(header()), None, params, cov)
    sigma, rho, diff = params[:, 3:].T
    e, phi = np.hypot(diff, rho / 2), np.degrees(np.arctan2(rho / 2, diff)) / 2
    fwhm = np.sqrt(8 * np.log(2)) * sigma * SCALE
    np.testing.assert_allclose(columns["fwhm_major_sky"], fwhm / np.sqrt(1 - e), rtol=1e-8)
    np.testing.assert_allclose(columns["fwhm_minor_sky"], fwhm / np.sqrt(1 + e), rtol=1e-8)
    # The major axis lies along theta = phi + 90 from +x; north is +y and east is -x.
    np.testing.assert_allclose(angle_between(columns["pa_sky"], phi), 0, atol=1e-3)  # meridians converge


@pytest.mark.parametrize("angle", [0.0, 17.0, 90.0, 133.0, 180.0, 271.0])
@pytest.mark.parametrize("flip", [1, -1])
def test_turning_the_sky_turns_the_position_angle_only(sources, angle, flip):
    still = columns_of(sky.celestial(header()), None, *sources)
    moved = columns_of(sky.celestial(header(**turned(angle, flip=flip))), None, *sources)
    np.testing.assert_allclose(angle_between(moved["pa_sky"], flip * still["pa_sky"] + angle), 0, atol=1e-3)
    assert np.all((moved["pa_sky"] >= 0) & (moved["pa_sky"] < 180))
    for name in ("fwhm_major_sky", "fwhm_minor_sky", "fwhm_major_sky_err", "fwhm_minor_sky_err", "pa_sky_err"):
        np.testing.assert_allclose(moved[name], still[name], rtol=1e-6)


@pytest.mark.parametrize(("stretch", "angle"), [((-2, 1), 90), ((1, 3), 0)])
def test_oblong_pixels_make_a_round_source_oblong(stretch, angle):
    wcs = sky.celestial(header(CDELT1=stretch[0] * SCALE / 3600, CDELT2=stretch[1] * SCALE / 3600))
    columns = one(wcs, [10.0, 10.0, 1.0, 2.0, 0.0, 0.0])
    fwhm = np.sqrt(8 * np.log(2)) * 2.0 * SCALE
    assert columns["fwhm_major_sky"] == pytest.approx(fwhm * np.max(np.abs(stretch)), rel=1e-8)
    assert columns["fwhm_minor_sky"] == pytest.approx(fwhm * np.min(np.abs(stretch)), rel=1e-8)
    assert angle_between(columns["pa_sky"], angle) == pytest.approx(0, abs=1e-5)


def test_a_round_source_has_widths_with_errors_and_no_angle():
    cov = np.zeros((6, 6))
    cov[3, 3] = 0.01
    # Made by hand: derivatives of a real WCS are round to ten digits only.
    point = np.array([[1.0, 0.0, 0.0], [0.0, -SCALE / sky.ARCSEC, 0.0], [0.0, 0.0, SCALE / sky.ARCSEC]])[None]
    params = np.array([[10.0, 10.0, 1.0, 2.0, 0.0, 0.0]])
    values, errors, _ = sky._in_chunks(
        sky._sky_rows, sky._beam_shape((1.0, 1.0, 0.0))[None], params, cov[None], point, point
    )
    fwhm = np.sqrt(8 * np.log(2)) * SCALE
    np.testing.assert_allclose(values[0, 2:4], 2 * fwhm)
    np.testing.assert_allclose(errors[0, 2:4], 0.1 * fwhm)
    np.testing.assert_allclose(values[0, 5:7], np.sqrt(4 * fwhm**2 - 1))
    np.testing.assert_allclose(errors[0, 5:7], 2 * fwhm / np.sqrt(4 * fwhm**2 - 1) * 0.1 * fwhm)
    assert np.all(np.isnan([values[0, 4], errors[0, 4], values[0, 7], errors[0, 7]]))


def test_nearly_round_widths_keep_finite_errors():
    columns = one(sky.celestial(header()), [10.0, 10.0, 1.0, 2.0, 1e-9, 0.0])
    assert np.isfinite([columns["fwhm_major_sky_err"], columns["fwhm_minor_sky_err"]]).all()
    assert columns["fwhm_major_sky_err"] < 1


@pytest.mark.parametrize("params", [(10, 10, 1, 2, 0, 1.0), (10, 10, 1, 2, 2.0, 0.5), (10, 10, 1, 2, 3, 3)])
def test_shapes_that_are_no_ellipse_are_nan(params):
    columns = one(sky.celestial(header()), params, beam=(0.5, 0.5, 0.0))
    assert np.isfinite([columns["ra"], columns["dec"], columns["ra_err"], columns["dec_err"]]).all()
    assert np.isnan([columns[f"{name}{end}"] for name in (*SHAPES, *RESOLVED) for end in ("", "_err")]).all()


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lon", [0.0, 1e-9, 123.0, 359.99999999, -1e-9])
@pytest.mark.parametrize("lat", [-90.0, -89.9999, 0.0, 60.0, 90.0])
def test_sizes_and_errors_are_the_same_all_over_the_sky(sources, lon, lat):
    params, cov = sources
    wcs = sky.celestial(header(CRVAL1=lon, CRVAL2=lat, CTYPE1="RA---SIN", CTYPE2="DEC--SIN"))
    columns = columns_of(wcs, None, params, cov)
    assert np.all((columns["ra"] >= 0) & (columns["ra"] < 360))
    place = SkyCoord(columns["ra"], columns["dec"], unit="deg")
    centre = SkyCoord(lon, lat, unit="deg")
    np.testing.assert_allclose(place.separation(centre).arcsec, SCALE * np.hypot(*(params[:, :2] - 10).T), rtol=1e-6)
    still = columns_of(sky.celestial(header()), None, params, cov)
    for name in SHAPES[:2]:
        np.testing.assert_allclose(columns[name], still[name], rtol=1e-6)
        np.testing.assert_allclose(columns[f"{name}_err"], still[f"{name}_err"], rtol=1e-6)
    # East and north turn with the place; the size of the error ellipse does not.
    np.testing.assert_allclose(
        np.hypot(columns["ra_err"], columns["dec_err"]), SCALE * np.sqrt(cov[:, 0, 0] + cov[:, 1, 1]), rtol=1e-6
    )


def test_longitudes_stay_below_360():
    lon, lat = sky._angles(np.array([[1.0, 1.0, -1.0], [-1e-20, 0.0, -0.0], [0.0, 0.0, 1e-20]]))
    assert lon.tolist() == [0.0, 0.0, 180.0]
    np.testing.assert_allclose(lat, 0, atol=1e-15)


PROJECTIONS = {
    "TAN": {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 358.0, "CRVAL2": 70.0},
    "SIN": {"CTYPE1": "RA---SIN", "CTYPE2": "DEC--SIN", "CRVAL1": 20.0, "CRVAL2": 60.0, "CROTA2": 40.0},
    "AIT": {"CTYPE1": "RA---AIT", "CTYPE2": "DEC--AIT", "CRVAL1": 0.0, "CRVAL2": 0.0},
    "CAR": {"CTYPE1": "GLON-CAR", "CTYPE2": "GLAT-CAR", "CRVAL1": 120.0, "CRVAL2": 0.0},
    "FK4": {"CTYPE1": "DEC--ARC", "CTYPE2": "RA---ARC", "CRVAL1": 65.0, "CRVAL2": 2.0, "EQUINOX": 1950.0},
}


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_one_source_seen_in_many_projections(projection):
    place, shape = SkyCoord(0.01, 67.0, unit="deg"), ellipse(7.0, 4.0, 153.0)
    wcs = sky.celestial(header(CDELT1=-1e-3, CDELT2=1.5e-3, **PROJECTIONS[projection]))
    x, y = sky.pixel_position(wcs, place.ra.deg, place.dec.deg)
    slopes = pixel_slopes(wcs, place)
    columns = one(wcs, to_params(x, y, slopes @ shape @ slopes.T))
    seen = SkyCoord(columns["ra"], columns["dec"], unit="deg")
    assert seen.separation(place).arcsec < 1e-5
    assert columns["fwhm_major_sky"] == pytest.approx(7.0, rel=1e-5)
    assert columns["fwhm_minor_sky"] == pytest.approx(4.0, rel=1e-5)
    assert columns["pa_sky"] == pytest.approx(153.0, abs=1e-3)


@pytest.mark.parametrize(
    ("cards", "frame"),
    [
        ({}, "icrs"),
        ({"EQUINOX": 2000.0}, "fk5"),
        ({"RADESYS": "fk5"}, "fk5"),
        ({"EQUINOX": 1950.0}, "fk4"),
        ({"EPOCH": 1950.0}, "fk4"),
        ({"EPOCH": "unused", "EQUINOX": 2000.0}, "fk5"),
        ({"RADECSYS": "FK4-NO-E"}, "fk4noeterms"),
        ({"CTYPE1": "GLON-TAN", "CTYPE2": "GLAT-TAN"}, "galactic"),
        ({"CTYPE1": "GLON-TAN", "CTYPE2": "GLAT-TAN", "RADESYS": "FK5", "EQUINOX": 2000.0}, "galactic"),
    ],
)
def test_positions_are_icrs(cards, frame):
    wcs = sky.celestial(header(**cards))
    columns = one(wcs, [10.0, 10.0, 1.0, 2.0, 0.1, 0.1])
    truth = SkyCoord(40.0, 30.0, unit="deg", frame=frame).icrs
    assert truth.separation(SkyCoord(columns["ra"], columns["dec"], unit="deg")).arcsec < 1e-6
    np.testing.assert_allclose(sky.pixel_position(wcs, columns["ra"], columns["dec"]), [10, 10], atol=1e-6)


def test_axes_in_the_order_dec_ra():
    swap = {"CTYPE1": "DEC--TAN", "CTYPE2": "RA---TAN", "CRVAL1": 30.0, "CRVAL2": 40.0}
    wcs = sky.celestial(header(**swap, CDELT1=SCALE / 3600, CDELT2=-SCALE / 3600))
    swapped = one(wcs, [12.0, 9.0, 1.0, 2.0, 0.3, -0.2], np.diag([1.0, 2, 3, 4, 5, 6]) * 1e-3)
    plain = one(sky.celestial(header()), [9.0, 12.0, 1.0, 2.0, 0.3, 0.2], np.diag([2.0, 1, 3, 4, 5, 6]) * 1e-3)
    assert swapped == pytest.approx(plain, rel=1e-6, nan_ok=True)


def test_sky_to_pixel_and_back():
    distorted = {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2, "A_2_0": 1e-3}
    x, y = np.array([0.0, 12.5, 30.0]), np.array([9.0, -3.0, 14.5])
    for cards in ({}, distorted, *PROJECTIONS.values()):
        wcs = sky.celestial(header(**cards))
        columns = columns_of(wcs, None, np.column_stack([x, y, *np.ones((4, 3))]), np.zeros((3, 6, 6)))
        np.testing.assert_allclose(sky.pixel_position(wcs, columns["ra"], columns["dec"]), [x, y], atol=1e-4)


def test_sky_positions_without_a_pixel_are_nan():
    distorted = {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2, "A_2_0": 1e-3}
    for cards in ({}, PROJECTIONS["SIN"], distorted):
        wcs = sky.celestial(header(**cards))
        x, y = sky.pixel_position(
            wcs, [wcs.wcs.crval[0], np.nan, wcs.wcs.crval[0] + 180.0, 90.0], [wcs.wcs.crval[1], 0.0, -50.0, 0.0]
        )
        np.testing.assert_allclose([x[0], y[0]], 10, atol=1e-4)
        assert np.isnan([x[1:3], y[1:3]]).all()
    assert np.isnan([x[3], y[3]]).all()  # the polynomial cannot be inverted so far out


# --- errors -----------------------------------------------------------------------------------------------------------


def test_position_errors_are_the_scatter_of_positions():
    cov = np.zeros((6, 6))
    cov[:2, :2] = [[4e-2, 1.5e-2], [1.5e-2, 1e-2]]
    wcs = sky.celestial(header(CRVAL1=0.0, CRVAL2=85.0, **turned(25.0)))
    columns = one(wcs, [10.0, 10.0, 1.0, 2.0, 0.1, 0.1], cov)
    x, y = np.random.default_rng(2).multivariate_normal([10, 10], cov[:2, :2], 20000).T
    places = SkyCoord(*wcs.all_pix2world(x, y, 0), unit="deg")
    east, north = SkyCoord(columns["ra"], columns["dec"], unit="deg").spherical_offsets_to(places)
    assert columns["ra_err"] == pytest.approx(np.std(east.arcsec), rel=0.02)
    assert columns["dec_err"] == pytest.approx(np.std(north.arcsec), rel=0.02)


def test_shape_errors_are_the_scatter_of_shapes():
    rng = np.random.default_rng(3)
    mix = rng.normal(size=(6, 6)) * 5e-3
    cov, beam = mix @ mix.T, (2.0, 1.5, 30.0)
    mean = np.array([10.0, 10.0, 1.0, 2.0, 0.5, 0.3])
    wcs = sky.celestial(header(**turned(70.0)))
    columns = one(wcs, mean, cov, beam)
    draws = columns_of(wcs, beam, rng.multivariate_normal(mean, cov, 5000), np.full((5000, 6, 6), np.nan))
    for name in (*SHAPES, *RESOLVED):
        assert columns[f"{name}_err"] == pytest.approx(np.std(draws[name]), rel=0.05), name


def test_errors_agree_with_finite_differences(sources):
    """Of widths with those at the source without the bias of its ellipticity, of all else with those at the source."""
    params, cov = sources
    unbiased = np.asarray(jax.vmap(rounder)(params, cov)[0])
    wcs, beam = sky.celestial(header(CRVAL1=359.999, CRVAL2=60.0, **turned(40.0))), (1.0, 0.7, 10.0)
    columns = columns_of(wcs, beam, params, cov)

    def differences(place):
        slopes = []
        for step in 1e-5 * np.eye(6):
            up, down = (columns_of(wcs, beam, place + sign * step, cov) for sign in (1, -1))
            difference = {name: (up[name] - down[name]) / 2e-5 for name in (*SKY, *BEAM)}
            difference["ra"] = 3600 * angle_between(up["ra"], down["ra"]) / 2e-5 * np.cos(np.radians(columns["dec"]))
            difference["dec"] = 3600 * difference["dec"]
            for name in ("pa_sky", "deconvolved_pa"):
                difference[name] = angle_between(up[name], down[name]) / 2e-5
            slopes.append(difference)
        return slopes

    found, without = differences(params), differences(unbiased)
    for name in (*SKY, *BEAM):
        slopes = without if name.startswith("fwhm") else found
        gradient = np.stack([difference[name] for difference in slopes], axis=1)
        errors = np.sqrt(np.einsum("ni,nij,nj->n", gradient, cov, gradient))
        if name in ("pa_sky", "deconvolved_pa"):
            errors = np.degrees(direction_error(np.radians(errors)))
        np.testing.assert_allclose(columns[f"{name}_err"], errors, rtol=2e-4, err_msg=name)


def test_the_angle_of_a_nearly_round_source_is_anything():
    nearly = one(
        sky.celestial(header()), np.array([10.0, 10.0, 1.0, 2.0, 0.02, 0.0]), 1e-3 * np.eye(6), (0.5, 0.5, 0.0)
    )
    assert np.isfinite([nearly["pa_sky"], nearly["deconvolved_pa"]]).all()
    assert [nearly["pa_sky_err"], nearly["deconvolved_pa_err"]] == [90, 90]


def test_without_a_covariance_values_stay_and_errors_are_nan(sources):
    params, cov = sources
    wcs, beam = sky.celestial(header()), (1.0, 0.7, 10.0)
    known, unknown = (columns_of(wcs, beam, params, c) for c in (cov, np.full_like(cov, np.nan)))
    for name in (*SKY, *BEAM):
        np.testing.assert_array_equal(unknown[name], known[name])
        assert np.all(np.isnan(unknown[f"{name}_err"]))


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_their_number_or_place(sources):
    params, cov = (np.tile(a, (8, *[1] * (a.ndim - 1))) for a in sources)
    wcs, beam = sky.celestial(header(EQUINOX=2000.0)), (1.0, 0.7, 10.0)
    many = columns_of(wcs, beam, params, cov)
    for start, stop in ((0, 1), (3, 4), (sky.CHUNK - 1, sky.CHUNK + 2), (0, len(params))):
        few = columns_of(wcs, beam, params[start:stop], cov[start:stop])
        for name, values in few.items():
            np.testing.assert_array_equal(values, many[name][start:stop])


def test_many_headers_at_once_give_what_each_gives_alone(sources):
    params, cov = sources
    headers = [
        (sky.celestial(header()), None, 3),
        (sky.celestial(header(CTYPE1="GLON-CAR", CTYPE2="GLAT-CAR")), (3.0, 2.0, 30.0), 1),
        (None, None, 2),
        (sky.celestial(header(CRVAL1=10.0, RADESYS="FK4")), (2.0, 2.0, 0.0), len(params) - 6),
    ]
    together = sky.sky_columns(headers, params, cov)
    first = 0
    for wcs, beam, count in headers:
        here = slice(first, first + count)
        first += count
        for name, values in columns_of(wcs, beam, params[here], cov[here]).items():
            assert values.tobytes() == together[name][here].tobytes(), name


def test_no_rows():
    columns = columns_of(sky.celestial(header()), None, np.empty((0, 6)), np.empty((0, 6, 6)))
    assert all(values.shape == (0,) for values in columns.values())


def test_without_wcs_everything_is_nan(sources):
    columns = columns_of(None, (1.0, 1.0, 0.0), *sources)
    assert all(np.isnan(values).all() for values in columns.values())


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_positions_off_the_sky_are_nan(projection):
    wcs = sky.celestial(header(CDELT1=-1e-3, CDELT2=1e-3, **PROJECTIONS[projection]))
    far = np.array([np.nan, np.inf, -np.inf, 1e300, 1e6, 10.0])
    params = np.column_stack([far, np.full(6, 10.0), *np.tile([1.0, 2.0, 0.1, 0.1], (6, 1)).T])
    columns = columns_of(wcs, None, params, np.tile(np.eye(6), (6, 1, 1)))
    assert np.isnan(columns["ra"][:3]).all()
    assert np.isnan(columns["fwhm_major_sky"][:3]).all()
    assert np.isnan(columns["ra"][4]) == (projection != "TAN")  # the gnomonic plane has no edge
    assert np.isfinite([columns["ra"][5], columns["fwhm_major_sky_err"][5]]).all()


def test_linear_axes_end_at_the_poles():
    wcs = sky.celestial(header(CTYPE1="RA", CTYPE2="DEC", CDELT1=-0.1, CDELT2=0.1))
    columns = columns_of(wcs, None, np.array([[10.0, 10, 1, 2, 0.1, 0], [10, 700, 1, 2, 0.1, 0]]), np.zeros((2, 6, 6)))
    np.testing.assert_allclose([columns["ra"][0], columns["dec"][0]], [40, 30])
    assert np.isnan([columns["ra"][1], columns["dec"][1]]).all()


# --- beam -------------------------------------------------------------------------------------------------------------


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
    for i, one in enumerate(wcs):
        for x, y in places[: i + 1]:
            slopes = pixel_slopes(one, SkyCoord(*one.all_pix2world(x, y, 0), unit="deg"))
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
    cov = np.diag([0, 0, 0, 1e-4, 1e-4, 1e-4])
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
    # The error of a width is that of a source 7e-5 rounder.
    square = 2 * found["thin"]["fwhm_minor_sky"] * found["thin"]["fwhm_minor_sky_err"]
    assert found["thin"]["deconvolved_minor_limit"] ** 2 == pytest.approx(2.45 * square, rel=1e-5)
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


# --- headers ----------------------------------------------------------------------------------------------------------


SIP = {"A_ORDER": 2, "A_2_0": 1e-3, "B_ORDER": 2, "B_0_2": -2e-3, "B_1_1": 5e-4}
GOOD = {
    "CD": turned(20.0),
    "CD with CDELT": turned(20.0) | {"CDELT1": 1.0, "CDELT2": 1.0},
    "CROTA": {"CROTA2": 20.0},
    "PC": {"PC1_1": 0.8, "PC1_2": -0.6, "PC2_1": 0.6, "PC2_2": 0.8},
    "SIP": SIP | {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP"},
    "TPV": {"CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV", "PV1_1": 1.0, "PV1_4": 0.5, "PV2_1": 1.0, "PV2_5": 0.3},
    "scamp": {"PV1_1": 1.0, "PV1_4": 0.5, "PV2_1": 1.0, "PV2_5": 0.3},
    "ZPN": {"CTYPE1": "RA---ZPN", "CTYPE2": "DEC--ZPN", "PV2_1": 1.0, "PV2_3": 42.0},
    "NCP": {"CTYPE1": "RA---NCP", "CTYPE2": "DEC--NCP"},
    "arcsec": {"CUNIT1": "arcsec", "CUNIT2": "arcsec", "CRVAL1": 1000.0, "CDELT1": -0.5, "CDELT2": 0.5},
    "degrees": {"CUNIT1": "degrees", "CUNIT2": "DEG"},
    "pole": {"LONPOLE": 150.0},
    "old date": {"DATE__OBS": "31/12/99"},
    "other axes": {"WCSAXES": 4, "CTYPE3": "FREQ", "CTYPE4": "STOKES", "CRVAL3": 1e9, "CDELT3": 1e6, "CDELT4": 0.0},
    "other axes turned": {"CTYPE3": "STOKES", "CTYPE4": "VELO-LSR", "CRVAL4": 0.0, "CDELT4": 10.0, "CRVAL3": "I"},
}


@pytest.mark.parametrize("kind", GOOD)
def test_headers_mean_what_astropy_makes_of_them(kind, capfd):
    plain = GOOD[kind] if "axes" not in kind else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = WCS(header(**plain)).all_pix2world([3.0, 15.0], [7.0, 2.0], 0)
    wcs = sky.celestial(header(NAXIS=4, **GOOD[kind]))
    assert wcs.naxis == 2
    np.testing.assert_allclose(wcs.all_pix2world([3.0, 15.0], [7.0, 2.0], 0), truth, rtol=1e-12)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("cards", "same"),
    [
        ({"PC001001": 0.8, "PC001002": -0.6, "PC002001": 0.6, "PC002002": 0.8}, GOOD["PC"]),
        ({"PC01_01": 0.8, "PC01_02": -0.6, "PC02_01": 0.6, "PC02_02": 0.8}, GOOD["PC"]),
        (SIP, {}),  # stale coefficients in a header whose CTYPE knows nothing of them
        (GOOD["SIP"] | {"PV1_5": 0.1, "PV2_5": 0.1}, GOOD["SIP"]),  # the same distortion twice, as in PTF images
        ({"CD1_2": 1e-4, "CD2_1": 1e-4}, {"CD1_1": 0.0, "CD1_2": 1e-4, "CD2_1": 1e-4, "CD2_2": 0.0}),
        ({"CRVAL3": "text", "CTYPE3": "FREQ", "CD3_3": "text", "CUNIT3": "furlong"}, {}),
    ],
)
def test_headers_that_mean_the_same(cards, same):
    a, b = (sky.celestial(header(**c)).all_pix2world([3.0, 15.0], [7.0, 2.0], 0) for c in (cards, same))
    np.testing.assert_allclose(a, b, rtol=1e-13)


def test_fortran_exponents():
    cards = [fits.Card.fromstring("CRVAL1  = 0.4D+02"), *header(CRVAL1=None).cards]
    assert sky.celestial(fits.Header(cards)).wcs.crval.tolist() == [40.0, 30.0]


def iraf(projection, terms, polynomial):
    """Header of an IRAF projection; its text runs on from card to card, blanks at the end of one count."""
    cards = header(CTYPE1=f"RA---{projection}", CTYPE2=f"DEC--{projection}", WAT0_001="system=image", **turned(0.0))
    for axis, (kind, lon) in enumerate((("ra", "lng"), ("dec", "lat")), start=1):
        text = f'wtype={projection.lower()} axtype={kind} {terms}{lon}cor = "{polynomial} "'
        for number, start in enumerate(range(0, len(text), 68), start=1):
            cards.append(fits.Card.fromstring(f"WAT{axis}_{number:03d}= '{text[start : start + 68]:68}'"))
    return cards


@pytest.mark.parametrize(("projection", "terms"), [("TNX", ""), ("ZPX", "projp0=0. projp1=1. ")])
def test_iraf_distortions(projection, terms):
    # Both standard coordinates [deg] grow by 2e-4 + 1e-2 xi.
    wcs = sky.celestial(iraf(projection, terms, "3. 2. 2. 0. -1. 1. -1. 1. 2e-4 1e-2 0."))
    x, y = np.array([10.0, 60.0]), np.array([10.0, 40.0])
    shift = 2e-4 * 3600 / SCALE - 1e-2 * (x - 10)
    expected = sky.celestial(header(**turned(0.0))).all_pix2world(x - shift, y + shift, 0)
    np.testing.assert_allclose(wcs.all_pix2world(x, y, 0), expected, atol=1e-8)


@pytest.mark.parametrize(
    "cards",
    [
        {"CTYPE1": None, "CTYPE2": None},
        {"CTYPE1": "", "CTYPE2": ""},
        {"CTYPE1": "LINEAR", "CTYPE2": "LINEAR"},
        {"CTYPE1": "LAMBDA", "CTYPE2": "ANGLE"},
        {"CTYPE1": 1, "CTYPE2": 2},
    ],
)
def test_images_without_celestial_axes_have_no_wcs(cards):
    assert sky.celestial(header(**cards)) is None


BAD = {
    "axes 3 and 4": ({"CTYPE1": "STOKES", "CTYPE2": "FREQ", "CTYPE3": "RA---SIN", "CTYPE4": "DEC--SIN"}, r"\[3, 4\]"),
    "no partner": ({"CTYPE2": "LINEAR"}, r"axes \[1\] of the file, wanted \[1, 2\]"),
    "two projections": ({"CTYPE2": "DEC--SIN"}, "Inconsistent projection types"),
    "unknown projection": ({"CTYPE1": "RA---XYZ", "CTYPE2": "DEC--XYZ"}, "projection code"),
    "small letters": ({"CTYPE1": "ra---tan", "CTYPE2": "dec--tan"}, "projection code"),
    "CRVAL text": ({"CRVAL1": "02:40:00"}, "CRVAL1 = '02:40:00', wanted a number"),
    "CRPIX true": ({"CRPIX2": True}, "CRPIX2 = True, wanted a number"),
    "no CRVAL": ({"CRVAL2": None}, "no CRVAL2"),
    "no scale": ({"CDELT1": None, "CDELT2": None}, "no CDELT1, CDELT2"),
    "CDELT 0": ({"CDELT1": 0.0}, "singular"),
    "CD singular": ({"CD1_1": 1.0, "CD1_2": 1.0, "CD2_1": 1.0, "CD2_2": 1.0}, "CD matrix .* is singular"),
    "CD half": ({"CD1_1": 1e-4}, "CD matrix .* is singular"),
    "PC singular": ({"PC1_1": 1.0, "PC1_2": 1.0, "PC2_1": 1.0, "PC2_2": 1.0}, "PC matrix .* is singular"),
    "CRVAL beyond the pole": ({"CRVAL2": 95.0}, "No valid solution"),
    "unit": ({"CUNIT1": "pixel", "CUNIT2": "pixel"}, "CUNIT1"),
    "SIP by half": ({"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "A_2_0": 1e-4}, "B_ORDER"),
    "SIP text": ({"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": "x"}, "A_ORDER = 'x'"),
    "lookup": ({"CPDIS1": "LOOKUP"}, "HDUList is required"),
    "ecliptic": ({"CTYPE1": "ELON-TAN", "CTYPE2": "ELAT-TAN"}, "no conversion to ICRS from 'ELON'"),
    "apparent place": ({"RADESYS": "GAPPT"}, "no conversion to ICRS from 'GAPPT'"),
    "equinox text": ({"EQUINOX": "B1950"}, "EQUINOX = 'B1950', wanted a number"),
    "equinox 0": ({"EQUINOX": 0.0}, "EQUINOX = 0, wanted a year"),
}


@pytest.mark.parametrize("kind", BAD)
def test_celestial_axes_that_cannot_be_used_say_why(kind):
    cards, reason = BAD[kind]
    with pytest.raises(ValueError, match=reason) as error:
        sky.celestial(header(**cards))
    assert "\n" not in str(error.value)
    assert "wcslib" not in str(error.value)


@pytest.mark.parametrize("text", ["", "12.3.4", "NaN"])
def test_cards_that_cannot_be_read_say_so(text):
    cards = [fits.Card.fromstring(f"CRVAL1  = {text}"), *header(CRVAL1=None).cards]
    with pytest.raises(ValueError, match=r"CRVAL1 = .*wanted a number"):
        sky.celestial(fits.Header(cards))


def test_lookup_tables_announced_by_half():
    cards = header(CPDIS1="LOOKUP")
    cards["DP1"] = "EXTVER: 1"
    cards["DP1"] = "AXIS.1: 1"
    with pytest.raises(ValueError, match="NAXES was not set"):
        sky.celestial(cards)


def test_lookup_tables_in_an_hdu_that_is_broken(tmp_path):
    plain = header(CPDIS1="LOOKUP", CPDIS2="LOOKUP")
    for axis, value in itertools.product((1, 2), ("EXTVER: 1", "NAXES: 2", "AXIS.1: 1", "AXIS.2: 2")):
        plain[f"DP{axis}"] = value
    table = fits.ImageHDU(np.zeros((4, 4), "f4"), name="WCSDVARR")
    fits.HDUList([fits.PrimaryHDU(np.zeros((9, 9), "f4"), plain), table]).writeto(tmp_path / "a.fits")
    whole, broken = str(tmp_path / "a.fits"), str(tmp_path / "b.fits")
    assert sky.read_celestial(whole, read_header(whole, 0)) is not None
    raw = (tmp_path / "a.fits").read_bytes()
    for good, bad in (
        (b"XTENSION= 'IMAGE   '", b"XTENSION= 'FOREIGN '"),
        (b"EXTNAME = 'WCSDVARR'", b"EXTNAME = 'ELSEWHERE"),
    ):
        (tmp_path / "b.fits").write_bytes(raw.replace(good, bad))
        with pytest.raises(ValueError, match="unusable WCS"):
            sky.read_celestial(broken, read_header(broken, 0))


def test_what_else_is_in_the_header_does_no_harm():
    text = "".join(card.image for card in header().cards) + "OBJECT  = 'caf\xe9'".ljust(80) + "FREE TEXT = ?".ljust(80)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken = fits.Header.fromstring(text)
    assert sky.celestial(broken) is not None


def test_wcs_of_an_image_column():
    cards = {"TTYPE1": "TIME", "TTYPE12": "FLUX", "RADESYS": "ICRS"}
    names = {"CTYPE": "CTYP", "CRVAL": "CRVL", "CRPIX": "CRPX", "CDELT": "CDLT"}
    plain = header(PC1_1=0.8, PC1_2=-0.6, PC2_1=0.6, PC2_2=0.8)
    for key, value in plain.items():
        cards[f"{key[2]}{key[4]}PC12" if key.startswith("PC") else f"{key[5]}{names[key[:5]]}12"] = value
    table = fits.Header(list(cards.items()))
    truth = sky.celestial(plain).all_pix2world([3.0], [7.0], 0)
    np.testing.assert_allclose(sky.celestial(table, column="flux").all_pix2world([3.0], [7.0], 0), truth, rtol=1e-14)
    assert sky.celestial(table) is None
    assert sky.celestial(table, column="TIME") is None
    assert sky.celestial(table, column="ABSENT") is None


# --- real images ------------------------------------------------------------------------------------------------------


def test_parkes_components_in_three_projections(shared_data):
    folder = shared_data / "parkes1904"
    reference = fits.getdata(folder / "1904_comp.fits")
    table = {name: np.asarray(reference[name][::4], np.float64) for name in ("ra", "dec", "a", "b", "pa")}
    pixels = []
    for projection in ("SIN", "AIT", "TAN"):
        image = fits.getheader(folder / f"1904-66_{projection}.fits")
        wcs, beam = sky.celestial(image), sky.beam(image)
        assert beam == pytest.approx((864, 864, 0), rel=1e-6)
        pixels.append(np.array(sky.pixel_position(wcs, table["ra"], table["dec"])))
        slopes = [pixel_slopes(wcs, SkyCoord(*p, unit="deg")) for p in zip(table["ra"], table["dec"], strict=True)]
        shapes = [ellipse(*s) for s in zip(table["a"], table["b"], table["pa"], strict=True)]
        params = [to_params(*p, m @ s @ m.T) for p, m, s in zip(pixels[-1].T, slopes, shapes, strict=True)]
        columns = columns_of(wcs, beam, np.array(params), np.tile(np.eye(6) * 1e-4, (len(params), 1, 1)))
        np.testing.assert_allclose(columns["ra"], table["ra"] % 360, atol=1e-9)
        np.testing.assert_allclose(columns["dec"], table["dec"], atol=1e-9)
        np.testing.assert_allclose(columns["fwhm_major_sky"], table["a"], rtol=1e-4)
        np.testing.assert_allclose(columns["fwhm_minor_sky"], table["b"], rtol=1e-4)
        elongated = table["a"] > 1.02 * table["b"]
        np.testing.assert_allclose(angle_between(columns["pa_sky"], table["pa"])[elongated], 0, atol=0.1)
    assert np.max(np.abs(pixels[0] - pixels[2])) > 5  # three different images


def test_parkes_peaks_lie_where_the_reference_has_them(shared_data):
    folder = shared_data / "parkes1904"
    table = fits.getdata(folder / "1904_comp.fits")
    places = SkyCoord(table["ra"], table["dec"], unit="deg")
    alone = places.match_to_catalog_sky(places, nthneighbor=2)[1].deg > 0.5
    bright = places[alone & (table["peak_flux"] > 14 * table["local_rms"])]
    assert len(bright) >= 5
    for projection in ("SIN", "AIT", "TAN"):
        with fits.open(folder / f"1904-66_{projection}.fits") as hdus:
            wcs, data = sky.celestial(hdus[0].header), hdus[0].data.astype(float)
        x, y = sky.pixel_position(wcs, bright.ra.deg, bright.dec.deg)
        inside = (x > 1) & (x < 190) & (y > 1) & (y < 190)
        x, y = x[inside], y[inside]
        i, j = np.rint(x).astype(int), np.rint(y).astype(int)
        # Vertex of the parabola through the logarithms of three pixels.
        left, right, below, above, centre = np.log(
            [data[j, i - 1], data[j, i + 1], data[j - 1, i], data[j + 1, i], data[j, i]]
        )
        dx = i + (left - right) / (left - 2 * centre + right) / 2 - x
        dy = j + (below - above) / (below - 2 * centre + above) / 2 - y
        assert np.abs(np.nanmedian([dx, dy], axis=1)).max() < 0.25  # NaN: at the edge of the field


def test_degenerate_axes_change_nothing(shared_data, sources):
    names = ("small", "small_3D", "small_4D", "small_5D")
    found = [
        columns_of(sky.celestial(h), sky.beam(h), *sources)
        for h in (fits.getheader(shared_data / "parkes1904" / f"{name}.fits") for name in names)
    ]
    for other in found[1:]:
        for name, values in other.items():
            np.testing.assert_array_equal(values, found[0][name])


def test_lookup_tables_are_read_from_the_open_file(shared_data):
    with fits.open(shared_data / "nasty" / "dist_lookup.fits.gz") as hdus:
        with pytest.raises(ValueError, match="HDUList is required"):
            sky.celestial(hdus[1].header)
        with pytest.raises(ValueError, match="D2IMARR"):
            sky.celestial(hdus[1].header, hdus=fits.HDUList([hdus[1]]))
        wcs = sky.celestial(hdus[1].header, hdus=hdus)
        assert wcs.cpdis1 is not None
        columns = one(wcs, [50.0, 50.0, 1.0, 2.0, 0.1, 0.1])
    assert np.isfinite([columns["ra"], columns["fwhm_major_sky_err"]]).all()


def test_every_header_at_hand_gives_a_wcs_none_or_a_sentence(shared_data, capfd):
    seen = 0
    for path in sorted(shared_data.glob("*/*.fits*")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with fits.open(path, lazy_load_hdus=False) as hdus:
                    headers = [hdu.header for hdu in hdus]
            except OSError:
                continue
        for image in headers:
            seen += 1
            sky.beam(image)
            with contextlib.suppress(ValueError):
                wcs = sky.celestial(image)
                assert wcs is None or wcs.naxis == 2
    assert seen > 50
    assert capfd.readouterr() == ("", "")
