"""The certificate: errors that are wrong are found out by how much, right ones are left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline import certificate
from pipeline.certificate import DONORS, calibrate, certify, choose, inject, snr_bins
from pipeline.columns import BIT, CERTIFICATE, COLUMNS, DERIVED, PARAMETERS, SNR_BINS, empty_rows, parameter_names
from pipeline.images import Stack
from pipeline.model import derived, gaussian, of_rows

SETTINGS = {"background": "constant", "scale": "fit", "uncertainty": "pooled"}
NAMES = parameter_names("constant", "fit")
CERTIFIED = certificate.certified(SETTINGS)
ERRORS = dict(zip(NAMES, (0.02, 0.03, 0.4, 0.05, 0.01, 0.01, 0.02, 0.02), strict=True))


def found_in(count, *, side=16, seed=1, snr=(5, 200), sigma=(1.0, 1.5)):
    """What a run has found: rows of ``count`` images."""
    rng = np.random.default_rng(seed)
    rows = empty_rows(count)
    middle = 0.5 * (side - 1)
    low = [middle - 1, middle - 1, 20.0, sigma[0], -0.3, -0.2, 3.0, 0.5]
    high = [middle + 1, middle + 1, 90.0, sigma[1], 0.3, 0.2, 4.0, 0.6]
    for name, values in zip(NAMES, rng.uniform(low, high, (count, len(NAMES))).T, strict=True):
        rows[name], rows[f"{name}_err"] = values, np.full(count, ERRORS[name])
    rows["snr"] = np.exp(rng.uniform(*np.log(snr), count))
    rows["image_id"] = rng.permutation(count) * 7919
    rows["x0_start"], rows["y0_start"] = rows["x0"], rows["y0"]
    return rows


def sources_of(rows):
    """Parameters (n, 6) of the Gaussians."""
    return np.stack([rows[name] for name in PARAMETERS[:6]], axis=1)


def stack_of(rows, *, side=16, seed=2):
    """Images of these rows; the first column of pixels is masked."""
    y, x = np.mgrid[:side, :side].astype(float)
    noise = np.random.default_rng(seed).normal(size=(len(rows["x0"]), side, side))
    data = of_rows(rows, x, y) + rows["scale"][:, None, None] * noise
    mask = np.zeros(data.shape, bool)
    mask[:, :, 0] = True
    return Stack(data, mask, None)


def derive(found, covariance):
    """Fill in what is derived from the parameters, with errors."""
    values = derived(sources_of(found))
    variances = certificate._variances(covariance, certificate._derived_slopes(sources_of(found)))[:, -len(DERIVED) :]
    for name, value, variance in zip(DERIVED, values.T, variances.T, strict=True):
        found[name], found[f"{name}_err"] = value, np.sqrt(variance)


def fit_that_errs(rows, factor, *, seed=3, flags=None):
    """A fit that misses by as much as ``rows`` says, times ``factor`` by column."""

    def fit(data, mask, noise, **settings):
        rng = np.random.default_rng(seed)
        count = len(data)
        found = {name: rows[name].copy() for name in ("x0_start", "y0_start")}
        for name in NAMES:
            found[name] = rows[name] + factor.get(name, 1.0) * rows[f"{name}_err"] * rng.normal(size=count)
            found[f"{name}_err"] = rows[f"{name}_err"].copy()
        found["flags"] = np.zeros(count, int) if flags is None else flags
        fisher = np.tile(np.diag([ERRORS[name] ** 2 for name in NAMES]), (count, 1, 1))
        derive(found, fisher)
        for name in factor.keys() & set(DERIVED):
            found[f"{name}_err"] /= factor[name]
        return found, {"fisher": fisher}

    return fit


def line(table, name, number):
    """The line of the certificate for a parameter and bin of S/N."""
    place = np.flatnonzero(table["parameter"] == name)[number]
    return {key: values[place] for key, values in table.items()}


def structured(rows):
    """Rows as the catalogue has them."""
    count = len(rows["x0"])
    array = np.zeros(count, [(c.name, "S9" if c.dtype == "S" else c.dtype) for c in COLUMNS])
    for name, values in rows.items():
        array[name] = values
    return array


def test_errors_that_are_wrong_are_found_out_by_how_much():
    rows = found_in(8000)
    wrong = {"sigma": 1.3, "amp": 0.8}
    table = certify([inject(stack_of(rows), rows, fit_that_errs(rows, wrong), SETTINGS)], CERTIFIED)
    assert len(table["parameter"]) == len(CERTIFIED) * (len(SNR_BINS) - 1)
    for name in NAMES:
        factor = wrong.get(name, 1.0)
        for number in range(3):
            found = line(table, name, number)
            # What the residuals have lost is put on top: these offsets had lost nothing.
            factor_now = factor / np.sqrt(found["kept"])
            assert found["sources"] > 1000
            assert abs(found["factor"] - factor_now) < 4 * found["factor_err"], (name, found)
            assert abs(found["spread"] - factor_now) < 4 * found["spread_err"], (name, found)
            assert abs(found["over_bound"] - factor_now**2) < 4 * found["over_bound_err"], (name, found)
            assert abs(found["bias"]) < 4 * found["bias_err"]
            assert abs(found["coverage_68"] - certificate.NOMINAL[0]) < 4 * found["coverage_68_err"] or factor_now != 1
    marked = {name for name, factors in certificate.corrections(table).items() if np.any(factors != 1)}
    assert {"sigma", "amp"} <= marked
    assert not marked & {"x0", "y0", "rho", "diff"}


def test_errors_of_what_is_derived_are_certified_too():
    """Flux and minor axis with errors 1.4 times too short; the rest right but for what is put on top."""
    rows = found_in(8000, snr=(11, 29))
    rows["rho"] += 0.6  # no source is round
    wrong = {"flux": 1.4, "fwhm_minor": 1.4}
    table = certify([inject(stack_of(rows), rows, fit_that_errs(rows, wrong), SETTINGS)], CERTIFIED)
    for name in DERIVED:
        found = line(table, name, 1)
        factor = wrong.get(name, 1.0) / np.sqrt(found["kept"])
        assert 0.7 < found["kept"] < 1
        assert abs(found["factor"] - factor) < 4 * found["factor_err"] + 0.01, (name, found)
        assert abs(found["over_bound"] * found["kept"] - 1) < 4 * found["over_bound_err"] + 0.02, (name, found)
    array = structured(rows)
    for name in DERIVED:
        array[f"{name}_err"] = 1.0
    calibrate(array, table)
    assert np.all(array["flux_err_cal"] > 1.3)


def test_slopes_of_what_is_derived_are_those_of_the_model():
    sources = sources_of(found_in(5))
    np.testing.assert_allclose(
        certificate._derived_slopes(sources), jax.vmap(jax.jacfwd(derived))(jnp.asarray(sources)), atol=1e-6
    )


def test_only_errors_that_are_off_are_corrected():
    table = empty_rows(4, CERTIFICATE)
    table["parameter"][:] = "sigma"
    table["factor"], table["factor_err"] = np.array([1.3, 1.05, np.nan, 0.8]), np.full(4, 0.02)
    rows = found_in(6)
    rows["snr"] = np.array([3.0, 5.0, 10.0, 50.0, 1e3, np.nan])
    rows["sigma_err"][5] = np.nan
    array = structured(rows)
    calibrate(array, table)
    np.testing.assert_allclose(array["sigma_err_cal"], 0.05 * np.array([1, 1.3, 1, 1, 0.8, np.nan]))
    np.testing.assert_array_equal(array["x0_err_cal"], array["x0_err"])
    assert np.isnan(array["background_x_err_cal"]).all()


def test_without_a_trial_there_is_a_certificate_that_says_so():
    table = certify([], NAMES)
    assert set(table) == {c.name for c in CERTIFICATE}
    assert not table["sources"].any()
    assert not table["failed"].any()
    assert np.isnan(table["coverage_68"]).all()
    array = structured(found_in(3))
    calibrate(array, table)
    np.testing.assert_array_equal(array["sigma_err_cal"], array["sigma_err"])


@pytest.mark.parametrize("count", [DONORS, 2 * DONORS])
def test_few_trials_correct_nothing(count):
    rows = found_in(count)
    table = certify([inject(stack_of(rows), rows, fit_that_errs(rows, {"sigma": 9.0}), SETTINGS)], NAMES)
    assert table["sources"].sum() == count * len(NAMES)
    # Of two or three equal pulls the spread, and its error, would be rounding.
    few = table["sources"] < certificate.FEWEST
    assert np.isnan(table["spread"][few]).all()
    assert all(np.all(factors == 1) for factors in certificate.corrections(table).values())


def test_failed_fits_are_counted_and_left_out():
    rows = found_in(400, snr=(10, 29))
    flags = np.zeros(400, int)
    flags[:30] = BIT["NOT_CONVERGED"]
    flags[30:60] = BIT["LOW_SNR"] | BIT["ROUND"]
    right = fit_that_errs(rows, {}, flags=flags)

    def fit(*arguments, **settings):
        found, covariances = right(*arguments, **settings)
        for name in NAMES:
            found[name][:10], found[f"{name}_err"][10:20] = np.nan, 0.0
        covariances["fisher"][:20] = np.nan
        return found, covariances

    table = certify([inject(stack_of(rows), rows, fit, SETTINGS)], NAMES)
    x0 = line(table, "x0", 1)
    assert (x0["sources"], x0["failed"]) == (370, 30)
    assert all(np.isfinite(x0[c.name]) for c in CERTIFICATE if c.dtype == "f8")


def test_the_same_images_in_several_stacks_say_the_same():
    rows = found_in(64)
    stack = stack_of(rows)
    whole = inject(stack, rows, fit_that_errs(rows, {}), SETTINGS)
    halves = []
    for here in (slice(0, 32), slice(32, 64)):
        part = {name: values[here] for name, values in rows.items()}
        halves.append(inject(Stack(stack.data[here], stack.mask[here], None), part, fit_that_errs(part, {}), SETTINGS))
    np.testing.assert_array_equal(np.concatenate([half.kept for half in halves]), whole.kept)
    np.testing.assert_array_equal(np.concatenate([half.snr for half in halves]), whole.snr)


# ---- which rows -----------------------------------------------------------------------------------------------------


def test_bins_hold_their_lower_edge():
    np.testing.assert_array_equal(
        snr_bins(np.array([np.nan, 4.9, 5, 9.9, 10, 99, 100, 1e9, np.inf])), [-1, -1, 0, 0, 1, 2, 3, 3, -1]
    )


def test_good_rows_fill_the_bins_evenly_and_pieces_hold_what_the_whole_does():
    rows = found_in(1000)
    rows["snr"][100:] = 7.0
    rows["flags"][:10] = BIT["MISFIT"]
    rows["flags"][10:20] = BIT["ROUND"]
    whole = rows["image_id"][choose(rows, 90)]
    assert len(set(whole)) == 90
    picked = np.isin(rows["image_id"], whole)
    assert not picked[:10].any()
    numbers = np.bincount(snr_bins(rows["snr"][picked]), minlength=4)
    there = np.bincount(snr_bins(rows["snr"][10:]), minlength=4)
    assert np.all((numbers == there) | (numbers >= 90 // 4))
    np.testing.assert_array_equal(rows["image_id"][choose(rows, 40)], whole[:40])
    pieces = [{name: values[low : low + 300] for name, values in rows.items()} for low in (600, 0, 900, 300)]
    left = [{name: values[choose(piece, 90)] for name, values in piece.items()} for piece in pieces]
    joined = {name: np.concatenate([piece[name] for piece in left]) for name in rows}
    np.testing.assert_array_equal(joined["image_id"][choose(joined, 90)], whole)


# ---- fields ---------------------------------------------------------------------------------------------------------


def fields(stack, rows, n_background=1):
    noise = np.ones_like(stack.data) if stack.noise_map is None else stack.noise_map
    rows = {name: rows[name] for name in certificate.NEEDED}
    return certificate._fields(stack.data, stack.mask, noise, rows, n_background, True)


def test_the_block_around_a_source_is_its_own_image_moved_as_a_whole():
    rows = found_in(DONORS)
    rows["scale"][:] = 0.5
    stack = stack_of(rows)
    data, mask, _, _ = fields(stack, rows)
    y, x = np.mgrid[:16, :16].astype(float)
    model = of_rows(rows, x, y)
    residual, field = stack.data - model, data - model
    for i in range(DONORS):
        around = np.ix_(range(5, 11), range(5, 11))
        np.testing.assert_allclose(field[i][around], np.roll(residual[i], (-4, -4), (0, 1))[around], atol=1e-12)
        # One column of each image is masked, and has gone from 0 to 12.
        np.testing.assert_array_equal(mask[i], np.broadcast_to(x == 12, mask[i].shape))
    used = ~mask
    everything = np.sort(residual[~stack.mask])
    # All noise is used, but little of it twice.
    assert np.isin(np.round(everything, 9), np.round(field[used], 9)).mean() > 0.8


def test_what_is_masked_does_not_count():
    rows = found_in(DONORS)
    stack = stack_of(rows)
    spoilt = stack.data.copy()
    spoilt[stack.mask] = np.nan
    for one, other in zip(fields(stack, rows), fields(Stack(spoilt, stack.mask, None), rows), strict=True):
        np.testing.assert_array_equal(one, other)


def test_noise_keeps_its_map_whatever_the_unit_of_the_map():
    rows = found_in(DONORS)
    stack = stack_of(rows)
    rng = np.random.default_rng(5)
    # Of an image in another unit the map is in that unit, too.
    maps = rng.uniform(1, 2, stack.data.shape) * np.array([1.0, 10.0, 0.1, 1.0])[:, None, None]
    data, _, noise, _ = fields(stack._replace(noise_map=maps), rows)
    levels = np.array([np.median(m[~hidden]) for m, hidden in zip(maps, stack.mask, strict=True)])
    assert np.all((noise / levels[:, None, None] > 0.5) & (noise / levels[:, None, None] < 2))
    around = np.ix_(range(5, 11), range(5, 11))
    for i in range(DONORS):
        np.testing.assert_allclose(noise[i][around], np.roll(maps[i], (-4, -4), (0, 1))[around])
    assert np.isfinite(data).all()


def test_slopes_are_those_of_the_model():
    y, x = np.mgrid[:9, :8].astype(float)
    source = np.array([3.3, 4.1, 20.0, 1.4, 0.3, -0.2])
    slopes = certificate._slopes(source, x, y, 3)
    assert slopes.shape == (9, 9, 8)
    for i in range(6):
        step = 1e-6 * np.eye(6)[i]
        wanted = (gaussian(source + step, x, y) - gaussian(source - step, x, y)) / 2e-6
        np.testing.assert_allclose(slopes[i], wanted, atol=1e-6)


def test_nothing_is_kept_where_the_source_was_and_all_but_little_far_away():
    side = 32
    rows = found_in(DONORS, side=side)
    y, x = np.mgrid[:side, :side].astype(float)
    slopes = np.stack([certificate._slopes(s, x, y, 1) for s in sources_of(rows)])
    weight = np.ones((DONORS, side, side))
    theirs = certificate._derived_slopes(sources_of(rows))
    own = np.broadcast_to(np.arange(DONORS)[:, None, None], weight.shape)
    np.testing.assert_allclose(certificate._kept(slopes, theirs, weight, weight, own, lambda a: a), 0, atol=1e-9)
    rows["amp"] *= 1e-30
    faint = np.stack([certificate._slopes(s, x, y, 1) for s in sources_of(rows)])
    np.testing.assert_allclose(certificate._kept(faint, theirs, weight, weight, own, lambda a: a), 0, atol=1e-9)
    far = certificate._kept(slopes, theirs, weight, weight, own, lambda a: np.roll(a, (8, 8), (-2, -1)))
    assert np.all(far[:, [0, 1, 2, 4, 5]] > 0.9)
    # The background and the scale are those of the one image.
    assert np.all(far[:, 6] < 0.1)
    assert np.all(certificate._scale_kept(weight, weight, own) < 0.1)


def least_squares(truth, side):
    """A fit by least squares for bright sources: one step from ``truth``, which is near. Errors for noise of 1."""
    y, x = np.mgrid[:side, :side].astype(float)
    slopes = np.stack([certificate._slopes(s, x, y, 1) for s in sources_of(truth)])

    def fit(data, mask, noise, **settings):
        used = np.where(mask, 0.0, 1.0)
        inverse = np.linalg.inv(np.einsum("iapq,ibpq,ipq->iab", slopes, slopes, used))
        rest = used * (np.where(mask, 0.0, data) - of_rows(truth, x, y))
        moved = np.einsum("iab,ibpq,ipq->ia", inverse, slopes, rest)
        found = {name: truth[name].copy() for name in certificate.NEEDED} | {"flags": np.zeros(len(data), int)}
        for j, name in enumerate(NAMES[:7]):
            found[name] = truth[name] + moved[:, j]
            found[f"{name}_err"] = np.sqrt(inverse[:, j, j])
        derive(found, inverse)
        return found, {"fisher": inverse}

    return fit


@pytest.mark.parametrize(("side", "sigma"), [(32, (1.5, 3.2)), (16, (1.2, 2.0))])
def test_what_the_residuals_have_lost_is_put_right(side, sigma):
    """Sources in the residuals of their own fits scatter as in fresh noise, and not without the correction."""
    count, settings = 2000, SETTINGS | {"scale": 1.0}
    truth = found_in(count, side=side, snr=(31, 99), sigma=sigma)
    truth["amp"], truth["scale"] = 1e6 * truth["amp"], np.ones(count)
    stack = stack_of(truth, side=side)
    found, _ = least_squares(truth, side)(stack.data, stack.mask, None)
    rows = truth | {name: found[name] for name in NAMES[:7]}
    trials = inject(stack, rows, least_squares(rows, side), settings)
    table = certify([trials], certificate.certified(settings))
    for name in (*NAMES[:7], *DERIVED[:-1]):
        certified = line(table, name, 2)
        assert abs(certified["spread"] - 1) < 4 * certified["spread_err"] + 0.01, (name, certified)
        assert abs(certified["over_bound"] - 1) < 4 * certified["over_bound_err"] + 0.02, (name, certified)
        assert abs(certified["coverage_68"] - certificate.NOMINAL[0]) < 4 * certified["coverage_68_err"], name
    assert np.std(trials.pull[:, 6]) < 0.93


def test_a_plane_is_about_the_start_of_its_own_fit():
    rows = found_in(DONORS)
    rows["background_x"], rows["background_y"] = np.full(DONORS, 0.5), np.full(DONORS, -0.25)
    names = parameter_names("plane", "fit")
    other = {"x0_start": rows["x0_start"] + 2.0, "y0_start": rows["y0_start"] - 1.0}

    def fit(data, mask, noise, **settings):
        found = {name: rows[name].copy() for name in names} | other | {"flags": np.zeros(DONORS, int)}
        found["background"] = rows["background"] + 0.5 * 2.0 + 0.25
        errors = {f"{name}_err": np.ones(DONORS) for name in names}
        fisher = np.tile(np.eye(len(names)), (DONORS, 1, 1))
        derive(found, fisher)
        return found | errors, {"fisher": fisher}

    trials = inject(stack_of(rows), rows, fit, SETTINGS | {"background": "plane"})
    np.testing.assert_allclose(trials.pull, 0, atol=1e-12)
    assert trials.kept.shape == (DONORS, len(names) + len(DERIVED))
    assert set(names) <= set(PARAMETERS)
