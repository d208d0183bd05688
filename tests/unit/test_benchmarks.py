"""The peers of the benchmarks are used as they should be: each finds the minimum, from the exact derivatives."""

import jax
import numpy as np
import pytest

from benchmarks import engines, peers

COUNT = 3


@pytest.mark.parametrize("p", engines.CASES)
@pytest.mark.parametrize("name", [name for name in peers.PEERS if name not in peers.OURS])
def test_every_peer_is_right(name, p):
    # The peers' own programs mix types.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        *_, right = engines.run(0, name, p, COUNT, COUNT, COUNT)
    assert right == COUNT


def test_what_is_held_stays():
    images, _, near = engines.draw(0, COUNT, 32)
    found = peers.scipy_least_squares(images, near, 6)
    np.testing.assert_array_equal(found[:, 6:], near[:, 6:])
    assert not np.any(found[:, :6] == near[:, :6])


def test_jacobian_agrees_with_differences():
    images, truth, _ = engines.draw(0, COUNT, 32)
    numerical = np.stack(
        [
            (peers.residuals(truth[0] + step, images[0]) - peers.residuals(truth[0] - step, images[0])) / 2e-6
            for step in 1e-6 * np.eye(8)[:7]
        ],
        axis=-1,
    )
    np.testing.assert_allclose(peers.jacobian(truth[0], images[0]), numerical, atol=1e-7)
