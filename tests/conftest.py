"""Settings that every test runs under, and the folder of real images."""

import os
from pathlib import Path

# Before JAX and numpy are imported; the jobs that tests start inherit them. One core a worker: JAX reads NPROC, the
# linear algebra under numpy the others. The processor, so that numbers agree on machines with and without a GPU. The
# compile cache, with no lower limit on what it keeps, saves most of the time of a second run.
ROOT = Path(__file__).resolve().parents[1]
os.environ.update(dict.fromkeys(("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["MPLBACKEND"] = "agg"

import jax
import pytest
from hypothesis import settings

# Not through the environment: jobs must choose their precision themselves.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same cases each time, however slow the machine.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the checkout; a test that needs it is skipped, by name, where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images: the folder {folder} does not exist")
    return folder
