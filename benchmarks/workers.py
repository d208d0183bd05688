"""The processes that measure, their clock and their memory, and the machine they run on."""

import contextlib
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

from pipeline import __version__, runtime

#: Packages that are timed, or that what is timed stands on.
PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "lmfit", "iminuit", "astropy", "optimistix", "numdifftools", "snakemake")


def _prepare(cores: list[int]) -> None:
    """Pin this process to ``cores``, where the system knows how, and give JAX as many threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    runtime.start_jax(threads=len(cores), gpu=0, cache="")  # the cache is the one of JAX_COMPILATION_CACHE_DIR


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def worker(cores: list[int]) -> ProcessPoolExecutor:
    """A new process on these cores, to be sent one function after the other; a context manager."""
    fresh = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=fresh, initializer=_prepare, initargs=(cores,))


@contextlib.contextmanager
def one_a_core() -> Iterator[list[ProcessPoolExecutor]]:
    """A worker for each core."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(worker([core])) for core in cores()]


def alone(cores: list[int], function: Callable, *arguments):
    """What ``function(*arguments)`` returns in a process of its own."""
    with worker(cores) as process:
        return process.submit(function, *arguments).result()


def race(workers: list[ProcessPoolExecutor], function: Callable, *arguments) -> tuple[float, list]:
    """Run ``function(part, *arguments)`` in all workers at once, parts counted from 0.

    The function returns when it began and ended, on `clock`, and its result. Returns the seconds from the first
    beginning to the last end, and the results.
    """
    futures = [process.submit(function, part, *arguments) for part, process in enumerate(workers)]
    began, ended, results = zip(*(future.result() for future in futures), strict=True)
    return max(ended) - min(began), list(results)


def clock() -> float:
    """Seconds, the same for all processes."""
    return time.monotonic()


def forget_peak() -> None:
    """Let `peak_memory` count from now on, where the system knows how."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """The most memory that this process has held since it began or forgot [MB]."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with what the process held that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def machine() -> dict[str, str]:
    """Processor, cores, load, system, versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": model,
        "cores": str(len(cores())),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.machine()}",
        "this package": __version__,
        "Python": platform.python_version(),
        **versions,
    }
