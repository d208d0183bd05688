"""Laws of the sky columns: turns, flips, projections, poles, frames, errors."""

import jax
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits

from pipeline import model, sky, uncertainty
from pipeline.columns import BEAM, LIMITS, SKY
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


WIDTHS = ("fwhm_major_sky", "fwhm_minor_sky", "deconvolved_major", "deconvolved_minor")


@pytest.mark.parametrize("stretch", [1.0, 3.0])
def test_errors_of_widths_do_not_depend_on_the_shape_of_pixels(stretch):
    """The same source and errors on the sky, in square pixels and in others; they are not those of the delta method."""
    square = np.diag([1.0, stretch])

    def in_pixels(source):
        """Parameters on the sky, in square pixels, as those in pixels ``stretch`` times as high."""
        form = np.array([[1 + source[5], source[4] / 2], [source[4] / 2, 1 - source[5]]]) / source[3] ** 2
        form = square @ form @ square
        trace = np.trace(form)
        shape = np.sqrt(2 / trace), 4 * form[0, 1] / trace, (form[0, 0] - form[1, 1]) / trace
        return np.array([source[0], source[1] / stretch, source[2], *shape])

    source = np.array([10.0, 10.0, 1.0, 2.0, 0.12, 0.08])
    steps = 1e-6 * np.eye(6)
    slopes = np.stack([(in_pixels(source + step) - in_pixels(source - step)) / 2e-6 for step in steps], axis=1)
    cov = np.diag([0.01, 0.01, 1e-4, 0.01, 0.04, 0.01])
    wcs = sky.celestial(header(CDELT2=SCALE / 3600 * stretch))
    found = one(wcs, in_pixels(source), slopes @ cov @ slopes.T, (1.0, 0.7, 10.0))
    wanted = one(sky.celestial(header()), source, cov, (1.0, 0.7, 10.0))
    plain = float(model.FWHM_PER_SIGMA * SCALE * uncertainty.propagate(model.derived, source, cov)[1][1])
    assert found["fwhm_major_sky_err"] != pytest.approx(plain, rel=0.01)
    for name in (*WIDTHS, "deconvolved_major_limit", "deconvolved_minor_limit"):
        end = "" if name.endswith("limit") else "_err"
        assert found[f"{name}{end}"] == pytest.approx(wanted[f"{name}{end}"], rel=1e-6), name


def test_errors_agree_with_finite_differences(sources):
    """Of widths with those at the source without the bias of its ellipticity, of all else with those at the source."""
    params, cov = sources
    wcs, beam = sky.celestial(header(CRVAL1=359.999, CRVAL2=60.0, **turned(40.0))), (1.0, 0.7, 10.0)
    # Pixels are square here, so that what is rounder on the sky is rounder in the image.
    unbiased = np.asarray(jax.vmap(uncertainty.rounder)(params, cov)[0])
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
        slopes = without if name in WIDTHS else found
        gradient = np.stack([difference[name] for difference in slopes], axis=1)
        errors = np.sqrt(np.einsum("ni,nij,nj->n", gradient, cov, gradient))
        if name in ("pa_sky", "deconvolved_pa"):
            errors = np.degrees(uncertainty.direction_error(np.radians(errors)))
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
