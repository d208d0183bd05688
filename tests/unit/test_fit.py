"""Laws of the fit: what moves when the image is moved, turned, scaled, masked; and what must not."""

import jax
import numpy as np
import pytest
from astropy.io import fits
from numpy.testing import assert_allclose, assert_array_equal

from pipeline import columns, correlation, fit, likelihood, model
from pipeline.images import read_planes, scan_file
from tests import stamps

IMAGES, PARAMS = stamps.draw(12, (20, 200), seed=1, shape=(24, 24))
NAMES = columns.parameter_names("constant", "fit")
DEFAULTS = {
    "background": "constant",
    "scale": "fit",
    "uncertainty": "pooled",
    "precision": "float64",
    "tolerance": 1e-6,
    "max_steps": 100,
}


def fit_closely(*args, **settings):
    """Fit to far below an error: laws then hold to far below an error too."""
    return fit.fit_stack(*args, **{"tolerance": 1e-12} | settings)


@pytest.fixture(scope="module")
def plain():
    return fit_closely(IMAGES)


def column(result, name, names=NAMES):
    return result.params[:, names.index(name)]


def close_in_errors(a, b, errors, limit):
    assert np.max(np.abs(a - b) / errors) < limit


def test_sources_are_found(plain):
    assert not np.any(plain.flags & columns.BIT["NOT_CONVERGED"])
    assert np.max(np.abs(plain.params[:, :6] - PARAMS) / plain.errors[:, :6]) < 6


def test_solution_is_a_stationary_point(plain):
    for i in range(3):
        image = likelihood.Image(IMAGES[i], np.ones((24, 24)), plain.origin[i])
        gradient = jax.grad(likelihood.nll)(jax.numpy.asarray(plain.params[i]), image)
        assert_allclose(likelihood.nll(jax.numpy.asarray(plain.params[i]), image), plain.nll[i], rtol=1e-10)
        assert np.max(np.abs(gradient) * plain.errors[i]) < 1e-2


def test_shifted_image_moves_only_the_centre():
    frames = np.full((2, *IMAGES.shape[:1], 27, 27), np.nan)
    frames[0, :, :24, :24] = IMAGES
    frames[1, :, 2:26, 1:25] = IMAGES
    still, moved = map(fit_closely, frames)
    assert_allclose(column(moved, "x0"), column(still, "x0") + 1, atol=1e-5)
    assert_allclose(column(moved, "y0"), column(still, "y0") + 2, atol=1e-5)
    close_in_errors(moved.params[:, 2:], still.params[:, 2:], still.errors[:, 2:], 1e-3)


def test_turned_image_turns_theta(plain):
    """A turn by 90 degrees: (x, y) -> (ny - 1 - y, x)."""
    turned = fit_closely(np.rot90(IMAGES, axes=(1, 2)).copy())
    assert_allclose(column(turned, "x0"), column(plain, "y0"), atol=1e-4)
    assert_allclose(column(turned, "y0"), 23 - column(plain, "x0"), atol=1e-4)
    close_in_errors(turned.derived[:, :5], plain.derived[:, :5], plain.derived_err[:, :5], 1e-2)
    assert_allclose(np.abs(np.sin(turned.derived[:, 5] - plain.derived[:, 5])), 1, atol=1e-6)


@pytest.mark.parametrize("factor", [4.0, -1.0, 1e-12, 3e8])
def test_scaled_data_scale_amp_background_and_scale(plain, factor):
    scaled = fit_closely(IMAGES * factor)
    expected = plain.params.copy()
    expected[:, [2, 6]] *= factor
    expected[:, 7] *= abs(factor)
    close_in_errors(scaled.params / expected, 1.0, plain.errors / np.abs(expected), 1e-2)
    assert_allclose(scaled.errors[:, 2], plain.errors[:, 2] * abs(factor), rtol=1e-4)


def test_added_constant_moves_only_the_background(plain):
    raised = fit_closely(IMAGES + 1000.0)
    assert_allclose(column(raised, "background"), column(plain, "background") + 1000, atol=1e-3)
    close_in_errors(raised.params[:, :6], plain.params[:, :6], plain.errors[:, :6], 1e-2)


def test_of_two_sources_the_one_near_the_middle_is_fitted():
    """With a neighbour ten times as bright, 6 widths away or more."""
    images, params = stamps.draw(12, (20, 200), seed=12, shape=(24, 24), sigma=(1.2, 1.9))
    y, x = np.mgrid[:24, :24].astype(float)
    brighter = params * [1, 1, 10, 1, 1, 1] + [9, -7, 0, 0, 0, 0]
    images += model.gaussian(brighter[:, None, None, :], x, y)
    found, other = fit.fit_stack(images, near=2.0), fit.fit_stack(images)
    close_in_errors(found.params[:, :6], params, found.errors[:, :6], 6)
    assert np.max(np.abs(other.params[:, :2] - brighter[:, :2])) < 1


def test_sources_of_a_blend_are_told_apart_by_their_positions():
    """Two as bright as each other, 3 widths apart: without the pixels that are nearer to the other, as of stamps."""
    images, params = stamps.draw(12, (20, 200), seed=13, shape=(24, 24), sigma=(1.6, 1.7))
    y, x = np.mgrid[:24, :24].astype(float)
    other = params + np.array([4, -3, 0, 0, 0, 0])
    images += model.gaussian(other[:, None, None, :], x, y)
    own, its = (np.hypot(x - at[:, 0, None, None], y - at[:, 1, None, None]) for at in (params, other))
    apart, together = (fit.fit_stack(images, mask, near=2.0) for mask in (its < own, None))
    off = [np.hypot(*(found.params[:, :2] - params[:, :2]).T) for found in (apart, together)]
    assert np.max(off[0]) < 1
    assert np.median(off[1]) > 1


def test_masked_pixels_may_hold_anything(plain):
    mask = np.zeros(IMAGES.shape, bool)
    mask[:, 3:6, 2:9] = True
    results = []
    for junk in (0.0, np.nan, 1e30):
        images = IMAGES.copy()
        images[mask] = junk
        results.append(fit.fit_stack(images, mask))
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            assert_array_equal(a, b)
    assert_array_equal(results[0].n_pixels, 24 * 24 - 21)


def test_non_finite_pixels_are_not_used(plain):
    images = IMAGES.copy()
    images[:, 0, 0], images[:, 1, 1] = np.nan, np.inf
    assert_array_equal(fit.fit_stack(images).n_pixels, 24 * 24 - 2)


@pytest.mark.parametrize("settings", [{}, {"precision": "float32"}, {"correlation": "estimate"}], ids=str)
@pytest.mark.parametrize("shape", [(24, 24), (21, 17)])
def test_rows_do_not_depend_on_order_neighbours_or_count(settings, shape):
    images, _ = stamps.draw(70, (5, 1000), seed=2, shape=shape)
    whole = fit.fit_stack(images, **settings)
    order = np.random.default_rng(0).permutation(70)
    shuffled = fit.fit_stack(images[order], **settings)
    alone = fit.fit_stack(images[7:8], **settings)
    for a, b, c in zip(*map(jax.tree.leaves, (whole, shuffled, alone)), strict=True):
        assert_array_equal(a[order], b)
        assert_array_equal(a[7:8], c)


def test_kernels_are_those_of_their_rows():
    """Whatever reaches how far beside them; NaN is estimated."""
    images, _ = stamps.draw(40, (5, 1000), seed=2, shape=(24, 24))
    kernels = correlation.round_kernel(np.tile([1.5, 3.0, 8.0, 1.0], 10))
    kernels[3::4] = np.nan
    whole = fit.fit_stack(images, correlation=kernels)
    for i in range(4):
        alone = fit.fit_stack(images[i::4], correlation=kernels[i::4])
        for a, b in zip(*map(jax.tree.leaves, (whole, alone)), strict=True):
            assert_array_equal(a[i::4], b)
    assert_allclose(whole.noise_fwhm[:3], [1.5, 3.0, 8.0])
    assert np.all(np.diff(whole.errors[:3, 6] / whole.params[:3, -1]) > 0)
    estimated = fit.fit_stack(images[3::4], correlation="estimate")
    for a, b in zip(*map(jax.tree.leaves, (estimated, alone)), strict=True):
        assert_array_equal(a, b)


@pytest.mark.parametrize("wrong", ["beam", np.ones(3), np.ones((11, 3)), np.ones((12, 2))])
def test_correlations_that_a_stack_does_not_know(wrong):
    with pytest.raises(ValueError, match=r"correlation: got .*wanted"):
        fit.fit_stack(IMAGES, correlation=wrong)


def test_numbers_of_32_bits_only_are_refused():
    with jax.enable_x64(False), pytest.raises(RuntimeError, match="got jax_enable_x64 off, wanted it on"):
        fit.fit_stack(IMAGES, precision="float32")


def test_float32_is_close_in_errors(plain):
    single = fit.fit_stack(IMAGES, precision="float32")
    close_in_errors(single.params, plain.params, plain.errors, 0.02)
    assert_allclose(single.errors, plain.errors, rtol=0.02)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_float32_pixels_are_the_numbers_that_they_are(precision, offset):
    images = (IMAGES + offset).astype(np.float32)
    images[3, 4:7, 5] = np.nan
    maps = np.random.default_rng(0).uniform(0.5, 2, images.shape).astype(np.float32)
    maps[5, 1, 2:9] = np.inf
    for noise in (None, maps):
        single = fit.fit_stack(images, None, noise, precision=precision)
        double = fit.fit_stack(images.astype(float), None, noise, precision=precision)
        assert_array_equal(single.n_pixels, double.n_pixels)
        assert_array_equal(single.flags, double.flags)
        close_in_errors(single.params, double.params, double.errors, 1e-3)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f2", "f8", "i2"])
def test_the_type_in_which_pixels_are_handed_over(dtype, monkeypatch):
    """Float32 as they are in most files, in either order of bytes; what is not exact in it, float64."""
    seen = []
    prepare = fit.program.prepare_all

    def spy(data, *args, **kwargs):
        seen.append(data.dtype)
        return prepare(data, *args, **kwargs)

    monkeypatch.setattr(fit.program, "prepare_all", spy)
    fit.fit_stack(IMAGES.astype(dtype))
    assert seen == [np.float64 if dtype in ("f8", "i2") else np.float32]


@pytest.mark.parametrize("unit", [2.0**-127, 2.0**-133, 2.0**100])
def test_float32_pixels_of_any_unit(unit):
    """Also where most are subnormal: as they are in float64."""
    images = (IMAGES * unit).astype(np.float32)
    single, double = fit.fit_stack(images), fit.fit_stack(images.astype(float))
    assert_array_equal(single.flags, double.flags)
    close_in_errors(single.params, double.params, double.errors, 1e-3)


def test_noise_map_takes_the_unit_of_the_scale():
    """Noise given in the map: the scale is near the half-width over it, whatever the unit of the image."""
    r = np.random.default_rng(3)
    noise = np.exp(r.normal(0, 0.5, IMAGES.shape))
    clean, params = stamps.draw(12, (30, 100), seed=4, shape=(24, 24), noise="cauchy")
    y, x = np.mgrid[:24, :24].astype(float)
    sources = model.gaussian(params[:, None, None, :], x, y)
    images = sources + noise * (clean - sources)
    result = fit.fit_stack(images, noise_map=noise)
    tenfold = fit.fit_stack(images * 10, noise_map=noise * 10)
    assert_allclose(column(result, "scale"), 1.0, atol=0.25)
    assert_allclose(column(tenfold, "scale"), column(result, "scale"), rtol=1e-4)
    assert np.max(np.abs(result.params[:, :6] - params) / result.errors[:, :6]) < 6
    plain = fit.fit_stack(images)
    assert np.median(result.errors[:, 0] / plain.errors[:, 0]) < 1.0


def test_pixels_of_zero_or_nan_noise_are_not_used():
    noise = np.ones(IMAGES.shape)
    noise[:, 0, :3] = [0.0, np.nan, -1.0]
    assert_array_equal(fit.fit_stack(IMAGES, noise_map=noise).n_pixels, 24 * 24 - 3)


def test_a_step_to_no_scale_at_all_is_refused(shared_data):
    """A bright star of a plate, at its edge: on the way its Hessian is as good as singular."""
    with fits.open(shared_data / "m13" / "m13.fits") as hdus:
        plate = next(hdu.data for hdu in hdus if hdu.data is not None).astype(float)
    stamp = np.full((1, 16, 16), np.nan)
    stamp[0, 4:] = plate[:12, 70:86]
    result = fit.fit_stack(stamp)
    assert_allclose(result.params[0, :4], [7.12, 7.42, 635.0, 1.37], rtol=0.01)
    assert not result.flags[0] & columns.BIT["NOT_CONVERGED"]


def test_plane_is_recovered_about_the_start():
    y, x = np.mgrid[:24, :24].astype(float)
    images = IMAGES + 5 + 0.2 * x - 0.1 * y
    names = columns.parameter_names("plane", "fit")
    result = fit.fit_stack(images, background="plane")
    height = 5 + 0.2 * result.origin[:, 0] - 0.1 * result.origin[:, 1]
    truth = np.stack([height, np.full(12, 0.2), np.full(12, -0.1)], axis=-1)
    first = names.index("background")
    assert np.max(np.abs(result.params[:, first : first + 3] - truth) / result.errors[:, first : first + 3]) < 5


def test_held_values_keep_their_value_without_error():
    rows, covariance = fit.fit_rows(IMAGES, **DEFAULTS | {"background": 0.5, "scale": 2.0})
    assert_array_equal(rows["background"], 0.5)
    assert_array_equal(rows["scale"], 2.0)
    assert np.isnan(rows["background_err"]).all()
    assert np.isnan(rows["scale_err"]).all()
    assert covariance["pooled"].shape == (12, 6, 6)


def test_rows_are_the_columns_of_the_catalogue():
    rows, covariance = fit.fit_rows(IMAGES, **DEFAULTS)
    wanted = {c.name: c.dtype for c in columns.COLUMNS if c.group in ("fitted", "derived", "quality")}
    assert {name: values.dtype for name, values in rows.items()} == wanted
    assert set(covariance) == set(columns.COVARIANCES)
    assert_allclose(rows["x0_err"] ** 2, covariance["pooled"][:, 0, 0])


CHANGES = {
    "background": "plane",
    "scale": 0.7,
    "uncertainty": "hessian",
    "correlation": 1.5,
    "precision": "float32",
    "tolerance": 1e-2,
    "max_steps": 3,
}


@pytest.mark.parametrize("key", CHANGES)
def test_every_setting_changes_the_rows(key):
    before, _ = fit.fit_rows(IMAGES, **DEFAULTS)
    after, _ = fit.fit_rows(IMAGES, **DEFAULTS | {key: CHANGES[key]})
    assert any(not np.array_equal(before[name], after[name], equal_nan=True) for name in ("x0", "x0_err"))


def test_empty_stack_gives_no_rows():
    rows, covariance = fit.fit_rows(np.empty((0, 24, 24)), **DEFAULTS)
    assert {len(v) for v in rows.values()} == {0}
    assert covariance["pooled"].shape == (0, 8, 8)


HOPELESS = {
    "all masked": np.full((16, 16), np.nan),
    "too few pixels": np.where(np.arange(256).reshape(16, 16) < 10, 1.0, np.nan),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_too_few_pixels_give_nan_and_a_flag(name):
    rows, _ = fit.fit_rows(HOPELESS[name][None], **DEFAULTS)
    assert rows["flags"][0] & columns.BIT["TOO_FEW_PIXELS"]
    assert np.isnan(rows["x0"][0])
    assert np.isnan(rows["nll"][0])


def hot_pixel():
    image = np.zeros((16, 16))
    image[4, 5] = 1e4
    return image


ODD = {
    "constant": np.full((16, 16), 7.0),
    "one hot pixel": hot_pixel(),
    "two values": (np.arange(256).reshape(16, 16) % 2).astype(float),
    "a row": np.arange(40.0)[None, :] ** 2,
    "a column": np.arange(40.0)[:, None] ** 2,
    "huge values": np.random.default_rng(0).standard_cauchy((16, 16)) * 1e200,
    "tiny values": np.random.default_rng(0).standard_cauchy((16, 16)) * 1e-200,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_images_end_as_a_flagged_row(name):
    rows, _ = fit.fit_rows(ODD[name][None], **DEFAULTS)
    assert rows["flags"][0] != 0
    assert rows["n_pixels"][0] == ODD[name].size


@pytest.mark.parametrize("correlation", ["none", "estimate"])
def test_an_undefined_misfit_is_one(correlation):
    """Of an image whose pixels are all the same there are no residuals to judge."""
    rows, _ = fit.fit_rows(np.full((1, 24, 24), 3.0), correlation=correlation, **DEFAULTS)
    assert np.isnan(rows["misfit"][0])
    assert rows["flags"][0] & columns.BIT["MISFIT"]


def test_negative_source_and_edge_and_low_snr():
    y, x = np.mgrid[:24, :24].astype(float)
    noise = np.random.default_rng(5).standard_normal((3, 24, 24))
    truth = np.array([[12.0, 11.0, -60.0, 2.0, 0, 0], [0.5, 11.0, 60.0, 2.0, 0, 0], [12.0, 11.0, 1e-3, 2.0, 0, 0]])
    rows, _ = fit.fit_rows(model.gaussian(truth[:, None, None, :], x, y) + noise, **DEFAULTS)
    assert rows["amp"][0] < -50
    assert rows["snr"][0] > 10
    assert rows["flags"][1] & columns.BIT["NEAR_EDGE"]
    assert rows["flags"][2] & columns.BIT["LOW_SNR"]
    assert not rows["flags"][0] & (columns.BIT["NEAR_EDGE"] | columns.BIT["LOW_SNR"])


def test_masked_peak_and_round_and_misfit_flags():
    y, x = np.mgrid[:32, :32].astype(float)
    noise = np.random.default_rng(6).standard_normal((3, 32, 32))
    truth = np.array([[16.0, 15.0, 80.0, 2.5, 0, 0]] * 3)
    images = model.gaussian(truth[:, None, None, :], x, y) + noise
    # A core as exponentials have it: no Gaussian, at any width.
    images[2] = 400 * np.exp(-np.hypot(x - 16, y - 15) / 1.5) + noise[2]
    mask = np.zeros(images.shape, bool)
    mask[0, 15, 16] = True
    rows, _ = fit.fit_rows(images, mask, **DEFAULTS)
    assert rows["flags"][0] & columns.BIT["MASKED_PEAK"]
    assert rows["flags"][1] & columns.BIT["ROUND"]
    assert not rows["flags"][1] & columns.BIT["MISFIT"]
    assert rows["flags"][2] & columns.BIT["MISFIT"]


def test_a_saturated_peak_is_a_masked_peak_and_moves_little(plain, tmp_path):
    """Cut off at half the height of the source, on a background that is known and subtracted."""
    images = IMAGES + 1000.0
    level = float(1000 + 0.5 * np.min(column(plain, "amp")))
    header = fits.Header({"SATURATE": level})
    maps = fits.ImageHDU(np.full((24, 24), 1000.0), name="BKG")
    fits.HDUList([fits.PrimaryHDU(np.minimum(images, level), header), maps]).writeto(tmp_path / "a.fits")
    reading = {"saturation": "SATURATE", "background": "BKG"}
    ((block,), _) = scan_file(str(tmp_path / "a.fits"), **reading)
    rows, _ = fit.fit_rows(*read_planes(block, 0, 12, **reading))
    bright = np.argmax(column(plain, "amp"))
    assert_array_equal(rows["n_pixels"], np.sum(images < level, axis=(1, 2)))
    assert rows["flags"][bright] & columns.BIT["MASKED_PEAK"]
    assert abs(rows["x0"] - PARAMS[:, 0])[bright] < 5 * rows["x0_err"][bright]
    assert rows["amp"][bright] > 2 * (level - 1000)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("wild", [1e20, -3.4e38, 1e30])
def test_wild_pixels_move_nothing(plain, precision, wild):
    """Fill values and overflows that nobody masked: a few pixels less."""
    images = IMAGES.copy()
    images[:, 1, 2:4] = wild
    result = fit.fit_stack(images, precision=precision)
    close_in_errors(result.params[:, :7], plain.params[:, :7], plain.errors[:, :7], 0.3)
    assert_allclose(result.errors[:, :7], plain.errors[:, :7], rtol=0.1)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_float32_survives_any_unit(factor):
    result = fit.fit_stack(IMAGES * factor, precision="float32")
    expected = fit.fit_stack(IMAGES, precision="float32")
    assert_allclose(result.errors[:, 2] / factor, expected.errors[:, 2], rtol=1e-2)
    assert_allclose(result.snr, expected.snr, rtol=1e-2)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_relative_noise_map_only_moves_the_scale(factor):
    noise = np.exp(np.random.default_rng(3).normal(0, 0.3, IMAGES.shape))
    one = fit_closely(IMAGES, noise_map=noise)
    other = fit_closely(IMAGES, noise_map=noise * factor)
    close_in_errors(other.params[:, :7], one.params[:, :7], one.errors[:, :7], 1e-3)
    assert_allclose(other.params[:, 7] * factor, one.params[:, 7], rtol=1e-4)
    assert_allclose(other.errors[:, :7], one.errors[:, :7], rtol=1e-4)


def test_a_wide_held_scale_converges_to_a_fraction_of_the_error():
    """Least squares, in effect, and so on noise that has a variance."""
    images, _ = stamps.draw(12, (20, 200), seed=1, shape=(24, 24), noise="gaussian")
    loose, close = fit.fit_stack(images, scale=3000.0), fit_closely(images, scale=3000.0, tolerance=1e-13)
    close_in_errors(loose.params, close.params, close.errors, 5e-3)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_wide_held_scale_is_least_squares_in_either_precision(precision):
    """Errors of residuals that are nothing beside the half-width: no difference of large numbers is left of them."""
    images, _ = stamps.draw(12, (20, 200), seed=1, shape=(24, 24), noise="gaussian")
    near, far = (fit.fit_stack(images, scale=scale, precision=precision) for scale in (30.0, 3000.0))
    assert not np.any(far.flags & columns.BIT["NOT_CONVERGED"])
    assert_allclose(far.errors, near.errors, rtol=0.02)


def test_bright_sources_are_at_no_limit():
    """Their wings are most of what the pixels scatter by, and no measure of the noise."""
    images, params = stamps.draw(12, (3e3, 3e4), seed=9, shape=(24, 24), sigma=(2.5, 3.2))
    result = fit.fit_stack(images)
    assert not np.any(result.flags & (columns.BIT["AT_LIMIT"] | columns.BIT["NOT_CONVERGED"]))
    close_in_errors(result.params[:, :6], params, result.errors[:, :6], 6)


def test_what_float32_cannot_tell_has_not_converged():
    """Ten million times the noise: the data themselves are rounded to more than an error."""
    images, params = stamps.draw(12, (1e7, 1e8), seed=10, shape=(24, 24), noise="gaussian")
    found = fit.fit_stack(images, scale=0.612, precision="float32")
    converged = found.flags & columns.BIT["NOT_CONVERGED"] == 0
    off = np.abs(found.params[:, :6] - params) / found.errors[:, :6]
    assert not np.any(converged & np.any(off > 6, axis=1))


def test_faint_fits_converge_in_float32_where_they_do_in_float64():
    """1 / scale rounded for all pixels alike once moved the value by more than a last step does: 8 went in circles."""
    images, _ = stamps.draw(1024, (1, 2), seed=0, shape=(24, 24), background=1.0)
    exact, single = (
        fit.fit_stack(images, precision=precision).flags & columns.BIT["NOT_CONVERGED"] != 0
        for precision in ("float64", "float32")
    )
    assert np.sum(single & ~exact) <= 2


def test_bright_sources_in_large_images_converge_in_float32():
    """Amplitude and widths are rounded for all pixels alike too: of sources this wide one in seven was left behind.

    Rounding is nothing to a scale far above the noise, from which these come: to allow for it there lost a third.
    """
    images, params = stamps.draw(48, (300, 1e5), seed=3, shape=(128, 128), noise="gaussian", sigma=(4, 20))
    found = fit.fit_stack(images, precision="float32")
    assert not np.any(found.flags & columns.BIT["NOT_CONVERGED"])
    close_in_errors(found.params[:, :6], params, found.errors[:, :6], 6)


def test_a_noise_map_of_two_levels():
    """Half of each image is noise that the map knows of: as good as masked. A first guess may still fall for it."""
    images, _ = stamps.draw(12, (20, 200), seed=11, shape=(24, 24))
    noise = np.ones(images.shape)
    noise[:, :, 16:] = 1e3
    images[:, :, 16:] += 1e3 * np.random.default_rng(1).standard_cauchy((12, 24, 8))
    masked = fit_closely(images, noise > 1)
    mapped = fit_closely(images, noise_map=noise)
    good = mapped.flags & columns.BIT["NOT_CONVERGED"] == 0
    assert np.sum(good) >= 11
    close_in_errors(mapped.params[good, :6], masked.params[good, :6], masked.errors[good, :6], 0.3)


@pytest.mark.parametrize("level", [1e8, 1e19, 1e200])
def test_pixels_whose_noise_says_that_they_know_nothing_are_not_used(level):
    noise = np.ones(IMAGES.shape)
    noise[:, :, 20:] = level
    mapped, masked = fit.fit_stack(IMAGES, noise_map=noise), fit.fit_stack(IMAGES, noise > 1, np.ones(IMAGES.shape))
    for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(masked), strict=True):
        assert_array_equal(a, b)


def test_equal_pixels_are_flagged():
    """Rounded to whole numbers, more than half of the pixels equal the background: no scale, no errors."""
    y, x = np.mgrid[:24, :24].astype(float)
    noise = 0.3 * np.random.default_rng(8).standard_normal(IMAGES.shape)
    images = np.round(model.gaussian(PARAMS[:, None, None, :], x, y) + noise)
    rows, _ = fit.fit_rows(images, **DEFAULTS)
    half_equal = np.mean(images == 0, axis=(1, 2)) > 0.5
    assert half_equal.sum() > 6
    assert np.all(rows["flags"][half_equal] & columns.BIT["AT_LIMIT"])


def test_wrong_shapes_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match=r"images: got an array of shape \(24, 24\), wanted a stack"):
        fit.fit_stack(IMAGES[0])
    with pytest.raises(ValueError, match=r"mask: got shape \(1, 24, 24\), wanted that of the images"):
        fit.fit_stack(IMAGES, np.zeros((1, 24, 24), bool))


@pytest.mark.parametrize(("size", "side"), [(1, 8), (8, 8), (9, 16), (63, 64), (192, 192), (513, 640), (3000, 3072)])
def test_padded_side(size, side):
    assert fit.padded_side(size) == side
