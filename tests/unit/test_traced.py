"""Programs that are traced once for all processes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pipeline import fit, program, traced


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array | None


traced.register([Pair])
PAIR = Pair(np.arange(3.0), None)


class Store(dict):
    """A store in memory."""

    def read(self, name, key):
        return self.get((name, key))

    def write(self, name, key, program):
        self[name, key] = program


@pytest.fixture
def store():
    store = Store()
    traced.keep_in(store)
    yield store
    traced.keep_in(None)


class Process:
    """What a process has of the program ``power``: a wrapper of its own, and the number of its tracings."""

    def __init__(self):
        self.tracings = 0

        def power(pair, *, exponent):
            self.tracings += 1
            return Pair(pair.first**exponent, pair.second)

        self.power = traced.kept(power)


def test_the_next_process_does_not_trace_again(store):
    first, second = Process(), Process()
    wanted = first.power(PAIR, exponent=2.0)
    assert (first.tracings, len(store)) == (1, 1)
    for _ in range(2):
        found = second.power(PAIR, exponent=2.0)
    assert (second.tracings, len(store)) == (0, 1)
    assert isinstance(found, Pair)
    assert found.second is None
    np.testing.assert_array_equal(found.first, wanted.first)
    np.testing.assert_array_equal(found.first, [0.0, 1.0, 4.0])


@pytest.mark.parametrize(
    ("pair", "exponent"),
    [
        (PAIR, 3.0),
        (PAIR._replace(first=np.arange(4.0)), 2.0),
        (PAIR._replace(first=np.arange(3, dtype=np.float32)), 2.0),
        (PAIR._replace(second=np.arange(3.0)), 2.0),
    ],
    ids=["setting", "shape", "type", "structure"],
)
def test_what_makes_another_program_is_traced(store, pair, exponent):
    Process().power(PAIR, exponent=2.0)
    other = Process()
    found = other.power(pair, exponent=exponent)
    assert (other.tracings, len(store)) == (1, 2)
    np.testing.assert_array_equal(found.first, np.asarray(pair.first) ** exponent)
    assert found.first.dtype == pair.first.dtype


@pytest.mark.parametrize(
    "other",
    [
        lambda: jax.enable_x64(False),
        lambda: jax.numpy_dtype_promotion("standard"),
        lambda: jax.numpy_rank_promotion("allow"),
        lambda: jax.default_matmul_precision("highest"),
    ],
    ids=["x64", "types", "ranks", "precision"],
)
def test_settings_of_jax_make_another_program(store, other):
    Process().power(PAIR, exponent=2.0)
    process = Process()
    with other():
        process.power(PAIR, exponent=2.0)
    assert (process.tracings, len(store)) == (1, 2)


@pytest.mark.parametrize(("of", "what"), [(jax, "__version__"), (np, "__version__"), (jax, "default_backend")])
def test_versions_and_devices_make_another_program(store, monkeypatch, of, what):
    Process().power(PAIR, exponent=2.0)
    (key,) = store
    monkeypatch.setattr(of, what, "0" if what == "__version__" else lambda: "gpu")
    assert traced._key((PAIR,), {"exponent": 2.0}) != key[1]
    monkeypatch.undo()
    assert traced._key((PAIR,), {"exponent": 2.0}) == key[1]


def test_what_cannot_be_kept_is_run(store):
    def says(x, *, word):
        jax.debug.print(word)
        return x + 1.0

    with pytest.warns(UserWarning, match="each process traces says again"):
        assert traced.kept(says)(jnp.zeros(()), word="one") == 1.0
    assert not store


def test_errors_of_the_function_are_its_own(store):
    def wrong(x, *, size):
        return x + jnp.zeros(size)

    with pytest.warns(UserWarning, match="traces wrong"), pytest.raises(TypeError, match="add got incompatible shapes"):
        traced.kept(wrong)(jnp.zeros(3), size=4)


def test_without_a_store_nothing_is_kept():
    process = Process()
    for exponent in (2.0, 2.0, 3.0):
        np.testing.assert_array_equal(process.power(PAIR, exponent=exponent).first, PAIR.first**exponent)
    assert process.tracings == 2


@pytest.mark.parametrize("settings", [{}, {"precision": "float32", "correlation": "estimate", "background": "plane"}])
def test_programs_of_the_fit_can_be_kept_for_a_gpu(store, monkeypatch, settings):
    names = []

    def only_exported(_store, function, name, _key, arrays):
        names.append(name)
        exported = export.export(jax.jit(function), platforms=["cuda"])(*arrays)
        export.deserialize(exported.serialize())
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *arrays))
        return lambda *given: nothing

    monkeypatch.setattr(traced, "_program", only_exported)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for name, size in (("BATCH", 4), ("BYTES", 1 << 13), ("QUEUE", 1 << 10)):
        monkeypatch.setattr(fit, f"ACCELERATOR_{name}", size)
    wanted = ["prepare_all", "minimise", "solve_all", "describe_all"]
    for name in wanted:  # what other tests have is not asked
        monkeypatch.setattr(program, name, traced.kept(getattr(program, name).__wrapped__))
    fit.fit_stack(np.zeros((2, 8, 8)), noise_map=np.ones((2, 8, 8)) if settings else None, **settings)
    assert names == wanted
