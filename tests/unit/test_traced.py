"""Programs that are traced once for all processes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pipeline import fit, traced


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array | None


traced.register([Pair])


@pytest.fixture
def cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


class Process:
    """What a process has of the program ``power``: a wrapper of its own, and the number of its tracings."""

    def __init__(self):
        self.tracings = 0

        def power(pair, *, exponent):
            self.tracings += 1
            return Pair(pair.first**exponent, pair.second)

        self.power = traced.kept(power)


PAIR = Pair(np.arange(3.0), None)


def entries(cache):
    return sorted(cache.glob("power-*-traced-cache"))


def test_the_next_process_does_not_trace_again(cache):
    first, second = Process(), Process()
    wanted = first.power(PAIR, exponent=2)
    assert (first.tracings, len(entries(cache))) == (1, 1)
    found = second.power(PAIR, exponent=2)
    assert (second.tracings, len(entries(cache))) == (0, 1)
    assert isinstance(found, Pair)
    assert found.second is None
    np.testing.assert_array_equal(found.first, wanted.first)
    np.testing.assert_array_equal(found.first, [0.0, 1.0, 4.0])


@pytest.mark.parametrize(
    ("pair", "exponent"),
    [
        (PAIR, 3),
        (PAIR._replace(first=np.arange(4.0)), 2),
        (PAIR._replace(first=np.arange(3)), 2),
        (PAIR._replace(second=np.arange(3.0)), 2),
    ],
    ids=["setting", "shape", "type", "structure"],
)
def test_what_makes_another_program_is_traced(cache, pair, exponent):
    Process().power(PAIR, exponent=2)
    other = Process()
    found = other.power(pair, exponent=exponent)
    assert (other.tracings, len(entries(cache))) == (1, 2)
    np.testing.assert_array_equal(found.first, np.asarray(pair.first) ** exponent)


def test_other_code_is_traced(cache, monkeypatch):
    Process().power(PAIR, exponent=2)
    monkeypatch.setattr(traced, "_made_by", lambda: "another version")
    other = Process()
    other.power(PAIR, exponent=2)
    assert (other.tracings, len(entries(cache))) == (1, 2)


@pytest.mark.parametrize("kept", [slice(0, 0), slice(0, 100), slice(1, None)], ids=["nothing", "beginning", "end"])
def test_a_damaged_program_is_traced_anew_and_mended(cache, kept):
    Process().power(PAIR, exponent=2)
    (entry,) = entries(cache)
    entry.write_bytes(entry.read_bytes()[kept])
    second, third = Process(), Process()
    for process, tracings in ((second, 1), (third, 0)):
        np.testing.assert_array_equal(process.power(PAIR, exponent=2).first, [0.0, 1.0, 4.0])
        assert process.tracings == tracings


def test_without_a_place_to_keep_it_a_program_runs(cache, caplog):
    cache.rmdir()
    np.testing.assert_array_equal(Process().power(PAIR, exponent=2).first, [0.0, 1.0, 4.0])
    jax.config.update("jax_compilation_cache_dir", None)
    np.testing.assert_array_equal(Process().power(PAIR, exponent=2).first, [0.0, 1.0, 4.0])
    assert not cache.exists()


def test_programs_of_the_fit_can_be_kept_for_a_gpu(monkeypatch):
    names = []

    def only_exported(function, name, arrays, key):
        names.append(name)
        exported = export.export(jax.jit(function), platforms=["cuda"])(*arrays)
        export.deserialize(exported.serialize())
        return lambda *given: jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *given)
        )

    monkeypatch.setattr(traced, "_program", only_exported)
    monkeypatch.setattr(fit, "MAX_BATCH", 3)  # programs that no other test of this process has made
    fit.fit_stack(np.zeros((2, 8, 8)), noise_map=np.ones((2, 8, 8)), correlation="estimate")
    assert names == ["prepare_all", "minimise", "solve_all", "describe_all"]
