"""Programs that are traced once for all processes.

JAX keeps what it has compiled, but each process traces a program anew to find it: three of the four seconds that a job
waited for its first fit. Here the traced program is kept too, beside the compiled one.
"""

import functools
import logging
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax import export

from pipeline.files import replacing
from pipeline.origin import content_digest

LOG = logging.getLogger(__name__)


def kept(function: Callable) -> Callable:
    """The function, compiled for each shape of its arguments and each of its settings.

    Parameters
    ----------
    function : callable
        Positional arguments and result: pytrees of arrays, of the classes told to `register` or plain containers.
        Keyword arguments are settings, with a `repr` that tells them apart.

    Returns
    -------
    callable
        Likewise; without a compile cache it is `jax.jit`, with one it keeps there what it has traced.
    """
    programs: dict[str, Callable] = {}

    @functools.wraps(function)
    def call(*arrays, **settings):
        leaves, tree = jax.tree.flatten(arrays)
        shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
        wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]  # made while jax is imported
        key = repr((function.__name__, sorted(settings.items()), tree, shapes, wide))
        if key not in programs:
            programs[key] = _program(functools.partial(function, **settings), function.__name__, arrays, key)
        return programs[key](*arrays)

    return call


def register(classes: Iterable[type]) -> None:
    """Let named tuples be arguments and results of programs that are kept."""
    for one in classes:
        export.register_namedtuple_serialization(one, serialized_name=f"pipeline.{one.__name__}")


def _program(function: Callable, name: str, arrays: tuple, key: str) -> Callable:
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not cache:
        return jax.jit(function)
    # JAX's own entries end like this too, and go from the cache of a job to that of all.
    path = Path(cache) / f"{name}-{content_digest((_made_by() + key).encode())}-traced-cache"
    try:
        exported = export.deserialize(bytearray(zlib.decompress(path.read_bytes())))
    except (OSError, zlib.error):
        exported = export.export(jax.jit(function))(*arrays)
        _write(path, exported)
    # Not the traced function itself: what is compiled is to be the same in the process that traced it.
    return jax.jit(exported.call)


def _write(path: Path, exported: Any) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(zlib.compress(exported.serialize()))
    except OSError as error:
        LOG.debug("not kept: %s", error)


@functools.cache
def _made_by() -> str:
    """What may trace the same arguments to another program: the code of this package, JAX, the kind of device."""
    sources = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return repr((jax.__version__, jaxlib.__version__, jax.default_backend(), content_digest(b"".join(sources))))
