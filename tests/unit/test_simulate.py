"""Simulation: the same image whatever the count, noise of the stated kind, truth beside it."""

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from numpy.testing import assert_allclose, assert_array_equal

from pipeline import columns, model, simulate
from pipeline.origin import digest_in_header, stack_digest

NOISE = {"kind": "cauchy", "scale": 0.5, "fraction": 0.05, "factor": 10.0, "dof": 3.0}
PARAMETERS = {
    "x0": None,
    "y0": None,
    "amp": [5.0, 50.0],
    "sigma": [1.5, 3.2],
    "rho": [-0.3, 0.3],
    "diff": [-0.3, 0.3],
    "background": [2.0, 3.0],
}
SECTION = {"shape": [12, 14], "seed": 1, "noise": NOISE, "parameters": PARAMETERS}


def test_an_image_is_the_same_whatever_the_count_and_the_stack():
    images, params = simulate.draw(0, 600, **SECTION)
    few, few_params = simulate.draw(250, 300, **SECTION)
    assert_array_equal(images[250:300], few)
    assert_array_equal(params[250:300], few_params)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2),
        ("noise", NOISE | {"kind": "student"}),
        ("noise", NOISE | {"scale": 0.6}),
        ("parameters", PARAMETERS | {"amp": [6.0, 50.0]}),
        ("parameters", PARAMETERS | {"x0": [3.0, 4.0]}),
    ],
)
def test_every_key_changes_the_images(key, value):
    before, _ = simulate.draw(0, 3, **SECTION)
    after, _ = simulate.draw(0, 3, **SECTION | {key: value})
    assert not np.array_equal(before, after)


@pytest.mark.parametrize(
    ("kind", "key"), [("contaminated", "fraction"), ("contaminated", "factor"), ("student", "dof")]
)
def test_every_noise_key_changes_its_noise(kind, key):
    noise = NOISE | {"kind": kind}
    before, _ = simulate.draw(0, 3, **SECTION | {"noise": noise})
    after, _ = simulate.draw(0, 3, **SECTION | {"noise": noise | {key: NOISE[key] * 2}})
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("kind", ["cauchy", "gaussian", "contaminated", "student"])
def test_noise_has_the_stated_scale(kind):
    """Half the pixels of noise are within the median absolute deviation; the likelihood's width balances."""
    noise = NOISE | {"kind": kind}
    images, params = simulate.draw(0, 200, **SECTION | {"noise": noise})
    y, x = np.mgrid[:12, :14].astype(float)
    residual = images - model.gaussian(params[:, None, None, :6], x, y) - params[:, 6, None, None]
    g = simulate.cauchy_scale(noise)
    balance = (g * g - residual**2) / (g * g + residual**2)
    assert abs(balance.mean()) < 4 * balance.std() / np.sqrt(balance.size)


def test_cauchy_scale_of_gaussian_noise():
    assert_allclose(simulate.cauchy_scale(NOISE | {"kind": "gaussian", "scale": 2.0}), 2 * 0.6120, rtol=1e-4)


def test_parameters_are_in_their_ranges():
    _, params = simulate.draw(0, 256, **SECTION)
    assert np.all(np.abs(params[:, 0] - 6.5) <= 1.5)
    assert np.all(np.abs(params[:, 1] - 5.5) <= 1.5)
    for i, name in enumerate(["amp", "sigma", "rho", "diff", "background"], start=2):
        low, high = PARAMETERS[name]
        assert np.all((params[:, i] >= low) & (params[:, i] <= high))
    assert abs(np.median(np.log(params[:, 2])) - np.log(np.sqrt(5 * 50))) < 0.2


def test_stack_and_truth_on_disk(tmp_path):
    simulate.write_stack(tmp_path / "a" / "1.fits", tmp_path / "a" / "1.truth.fits", 3, 8, **SECTION)
    images, params = simulate.draw(3, 8, **SECTION)
    assert_array_equal(fits.getdata(tmp_path / "a" / "1.fits"), images)
    truth = Table.read(tmp_path / "a" / "1.truth.fits")
    assert_array_equal(truth["plane"], np.arange(5))
    assert_allclose(truth["x0"], params[:, 0])
    assert set(truth.colnames) == {"plane"} | {c.name for c in columns.TRUTH if c.group != "identity"}
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["1.fits", "1.truth.fits"]
    for path in (tmp_path / "a").iterdir():
        assert digest_in_header(path) == stack_digest(SECTION, 3, 8)
