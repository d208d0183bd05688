"""Slots, on iterations whose lengths are known: the numbers of Collatz."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pipeline import slots

STARTS = np.random.default_rng(0).integers(1, 1000, 57)


def steps_to_one(n):
    count = 0
    while n > 1:
        n = 3 * n + 1 if n % 2 else n // 2
        count += 1
    return count


def run(starts, count, *, slots_, burst):
    @jax.jit
    def program(starts, count):
        return slots.run(
            {"start": starts},
            count,
            begin=lambda problem: {"n": problem["start"], "steps": jnp.zeros_like(problem["start"])},
            step=lambda problem, state: {
                "n": jnp.where(state["n"] % 2 == 1, 3 * state["n"] + 1, state["n"] // 2),
                "steps": state["steps"] + 1,
            },
            going=lambda problem, state: state["n"] > 1,
            result=lambda state: jnp.stack([state["steps"], state["n"]]).astype(float),
            slots=slots_,
            burst=burst,
        )

    return np.asarray(program(jnp.asarray(starts), jnp.asarray(count)))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(("slots_", "burst"), [(1, 1), (8, 1), (8, 3), (57, 2)])
def test_every_problem_is_iterated_to_its_own_end(backend, slots_, burst, monkeypatch):
    """Both ways of filling slots anew, the accelerator's here on the processor."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    expected = [(steps_to_one(n), 1) for n in STARTS.tolist()]
    assert_array_equal(run(STARTS, len(STARTS), slots_=slots_, burst=burst), expected)


@pytest.mark.parametrize("count", [0, 3, 8, 20])
def test_only_as_many_as_told_are_solved(count):
    found = run(STARTS, count, slots_=8, burst=2)
    assert_array_equal(found[:count, 0], [steps_to_one(n) for n in STARTS[:count].tolist()])
    assert not found[count:].any()
