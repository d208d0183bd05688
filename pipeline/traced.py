"""Programs that are traced once for all processes.

JAX keeps what it has compiled, but each process traces a program anew to find it, which takes several times as long as
to load it. With a store the traced programs are kept too.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Protocol

import jax
import jaxlib
import numpy as np
from jax import export

#: Settings of JAX that change what a program is traced to.
_SETTINGS = (
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_default_matmul_precision",
)


class Store(Protocol):
    """Keeps traced programs by name and key, of any length; its keys also tell the code of this package apart."""

    def read(self, name: str, key: str) -> bytes | None:
        """What was written, whole; None where there is nothing."""

    def write(self, name: str, key: str, program: bytes) -> None:
        """Keep a program, if that can be done."""


_store: Store | None = None


def keep_in(store: Store | None) -> None:
    """Where this process keeps programs from now on; None: nowhere."""
    global _store
    _store = store


def register(classes: Iterable[type]) -> None:
    """Let named tuples be arguments and results of programs that are kept."""
    for one in classes:
        export.register_namedtuple_serialization(one, serialized_name=f"pipeline.{one.__name__}")


def kept(function: Callable) -> Callable:
    """`jax.jit` of a function whose positional arguments are pytrees of arrays, and keyword arguments settings.

    With a store, their classes must be known to `register`, and the `repr` of settings must tell them apart.
    """
    kinds = inspect.signature(function).parameters.values()
    jitted = jax.jit(function, static_argnames=[one.name for one in kinds if one.kind is one.KEYWORD_ONLY])
    programs: dict[str, Callable] = {}

    @functools.wraps(function)
    def call(*arrays, **settings):
        if _store is None:
            return jitted(*arrays, **settings)
        key = _key(arrays, settings)
        if key not in programs:
            programs[key] = _program(_store, functools.partial(function, **settings), function.__name__, key, arrays)
        return programs[key](*arrays)

    return call


def _key(arrays: tuple, settings: dict) -> str:
    """All that decides what a function is traced to, beside its code."""
    leaves, tree = jax.tree.flatten(arrays)
    kinds = [(leaf.shape, str(leaf.dtype), getattr(leaf, "weak_type", False)) for leaf in leaves]
    # NumPy, because programs have constants that it has computed.
    versions = jax.__version__, jaxlib.__version__, np.__version__
    traced_with = [getattr(jax.config, name) for name in _SETTINGS]
    return repr((sorted(settings.items()), tree, kinds, versions, jax.default_backend(), traced_with))


def _program(store: Store, function: Callable, name: str, key: str, arrays: tuple) -> Callable:
    program = store.read(name, key)
    if program is None:
        try:
            program = bytes(export.export(jax.jit(function))(*arrays).serialize())
        except Exception as error:  # whatever it is: it costs time, and if the function is at fault it says so below
            warnings.warn(f"each process traces {name} again: {error}", stacklevel=3)
            return jax.jit(function)
        store.write(name, key, program)
    # In the process that has traced it too, so that all compile the same.
    return jax.jit(export.deserialize(bytearray(program)).call)
