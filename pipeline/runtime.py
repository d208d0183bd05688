"""The process of a job: its log, and where and how JAX runs in it. Not imported by anything that computes."""

import atexit
import contextlib
import glob
import logging
import os
import platform
import shutil
import signal
import sys
import tempfile
import zlib
from pathlib import Path
from types import TracebackType

from pipeline.files import replacing, runs
from pipeline.origin import content_digest

LOG = logging.getLogger("pipeline")


def _sources() -> str:
    """Digest of the code of this package."""
    return content_digest(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))


#: As it was imported: what a process traces is of this code, even if the files have been edited since.
_SOURCES = _sources()


def start_log(path: str | Path) -> None:
    """Send what the job has to say to its log file and to the terminal, warnings and uncaught exceptions too.

    A job that a cluster tells to end (SIGTERM) does so as after an exception from here on: nothing is left behind.

    Parameters
    ----------
    path : path
        The rule's log file, written anew.
    """
    file = logging.FileHandler(path, mode="w", encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    terminal = logging.StreamHandler()
    terminal.setFormatter(logging.Formatter(f"{Path(path).stem}: %(message)s"))
    terminal.setLevel(logging.INFO)
    logging.basicConfig(level=logging.WARNING, handlers=[file, terminal], force=True)
    LOG.setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    sys.excepthook = _log_exception
    signal.signal(signal.SIGTERM, _end)


def start_jax(*, threads: int, gpu: int, cache: str | Path) -> str:
    """Set up JAX before its first computation.

    Always with float64: what a fit does in float32 it casts itself, while positions on the sky need more.

    Parameters
    ----------
    threads : int
        Processor cores to use.
    gpu : int
        GPUs that the job was given. With 0 it never touches one, so that it takes no memory there.
    cache : path
        Folder of compiled programs, of use to all jobs; JAX_COMPILATION_CACHE_DIR goes first.

    Returns
    -------
    str
        Kind of the device, such as ``cpu`` or ``NVIDIA H100 80GB HBM3``.

    Raises
    ------
    RuntimeError
        If the job was given a GPU and JAX finds none.
    """
    os.environ["NPROC"] = str(threads)  # JAX reads no other limit on its threads
    # Processors with vectors of 512 bits are not made to use them otherwise; float32 gains a fifth.
    os.environ["XLA_FLAGS"] = f"--xla_cpu_prefer_vector_width=512 {os.environ.get('XLA_FLAGS', '')}".strip()

    import jax  # here, because jobs that do not compute should not spend a second on it

    jax.config.update("jax_enable_x64", True)
    own = _own_cache(Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", cache)))
    jax.config.update("jax_compilation_cache_dir", own)
    # The default limits leave out the many small programs, together as slow to compile as the large ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # A folder in that one, whose name would tell programs apart that are the same.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if gpu == 0:
        jax.config.update("jax_platforms", "cpu")
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX_PLATFORMS names a device that is not there
        msg = f"JAX {jax.__version__} finds no device (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}): {error}"
        raise RuntimeError(msg) from error
    if gpu > 0 and device.platform == "cpu":
        msg = (
            f"the job was given {gpu} GPU (resource gpu), but JAX {jax.__version__} sees only the processor: "
            "is a JAX for GPUs installed (make run JAX=cuda12), and does nvidia-smi list the device?"
        )
        raise RuntimeError(msg)
    LOG.debug("JAX %s on %s, %d thread(s)", jax.__version__, device.device_kind, threads)
    if jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]  # which JAX makes when it is imported
        from pipeline import traced

        traced.keep_in(TracedPrograms(Path(own)))
    return str(device.device_kind)


def share_cache() -> None:
    """Add what this process has compiled so far to the cache of all jobs. Nothing before `start_jax`."""
    for own, shared in _CACHES.items():
        _share(own, shared)


#: How the names of traced programs end.
TRACED = "-traced-cache"


class TracedPrograms:
    """A `traced.Store` among what JAX has compiled: it ends like JAX's own entries, and is shared as they are."""

    def __init__(self, folder: Path):
        self._folder = folder

    def read(self, name: str, key: str) -> bytes | None:
        """The program, or None where there is none or it is damaged."""
        try:
            return zlib.decompress(self._path(name, key).read_bytes())
        except (OSError, zlib.error):
            return None

    def write(self, name: str, key: str, program: bytes) -> None:
        """Keep a program; not if the code that it is of is no longer that of the files."""
        try:
            if _sources() == _SOURCES:
                with replacing(self._path(name, key)) as temporary:
                    temporary.write_bytes(zlib.compress(program))
        except OSError as error:
            LOG.warning("the traced program %s is not kept: %s", name, error)

    def _path(self, name: str, key: str) -> Path:
        return self._folder / f"{name}-{content_digest((_SOURCES + key).encode())}{TRACED}"


#: The copies of compile caches that are this process's own, and of which they are.
_CACHES: dict[Path, Path] = {}


def _own_cache(shared: Path) -> str:
    """A copy of the compile cache for this process, of which `share_cache` adds what is new to the shared one, whole.

    JAX itself writes entries in place and never again: one cut short by a kill would be of no use to any later job.
    A cache that cannot be used costs time, and no more.
    """
    try:
        own = _copy_of(shared)
    except OSError as error:
        LOG.warning("compiled programs are not kept in %s: %s", shared, error)
        own = Path(tempfile.mkdtemp(prefix="cauchyfit-"))
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        return str(own)
    _CACHES[own] = shared
    return str(own)


def _copy_of(shared: Path) -> Path:
    node = f"{platform.node()}-"
    for left in shared.glob(f"{glob.escape(node)}*"):
        process = left.name.removeprefix(node)
        if process.isdecimal() and not runs(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    own = shared / f"{node}{os.getpid()}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    # Later functions go first.
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    atexit.register(share_cache)
    for entry in shared.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another job cleans up
            shutil.copyfile(entry, own / entry.name)
    return own


def _share(own: Path, shared: Path) -> None:
    try:
        for entry in own.glob("*-cache"):
            known = shared / entry.name
            # A traced program that is cut short there was of no use to this process, and was made anew.
            cut = entry.name.endswith(TRACED) and known.exists() and known.stat().st_size < entry.stat().st_size
            if cut or not known.exists():
                with replacing(known) as temporary:
                    shutil.copyfile(entry, temporary)
    except OSError as error:
        LOG.warning("compiled programs are not kept in %s: %s", shared, error)


def _end(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The sentence for people on the terminal, the traceback in the log file only."""
    LOG.debug("uncaught exception", exc_info=(kind, error, trace))
    LOG.critical("%s: %s", kind.__name__, error)
