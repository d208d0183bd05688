"""Where histograms count. What is counted, the tests of the report see."""

import numpy as np

from pipeline import tallies


def test_bins_hold_as_many_steps_of_a_grid_each():
    rng = np.random.default_rng(1)
    for values in (rng.poisson(8.0, 2000), rng.binomial(1024, 0.06, 2000) / 1024, rng.integers(0, 3, 50)):
        axis = tallies.axis_of(values)
        step = np.diff(np.unique(values)).min()
        per_bin = np.histogram(np.arange(axis.edges[0] + 0.5 * step, axis.edges[-1], step), axis.edges)[0]
        assert set(per_bin[:-1].tolist()) == {per_bin[0]}
        assert not np.isclose(values[:, None], axis.edges).any()
