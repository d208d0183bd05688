"""Files that appear whole or not at all: every output of the pipeline is written through `replacing`."""

import glob
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give the name of a temporary file that takes the place of ``path``, whole and on disk, when the block ends well.

    If the block raises, the temporary file is removed and ``path`` stays what it was. Every process has a temporary
    name of its own: of two that write at once the last one wins, whole. What killed ones left behind is removed.
    """
    path = Path(path)
    stem = f"{path.name}.{platform.node()}-"
    for left in path.parent.glob(f"{glob.escape(stem)}*.tmp"):
        process = left.name.removeprefix(stem).removesuffix(".tmp")
        if process.isdecimal() and not runs(int(process)):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f"{stem}{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def keep(path: str | Path, name: str | Path) -> None:
    """Give a file another name, in place of what has it, that stays when the first is removed; where links can be."""
    name = Path(name)
    name.parent.mkdir(parents=True, exist_ok=True)
    temporary = name.with_name(f"{name.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        os.link(path, temporary)
        temporary.replace(name)
    except OSError:  # no hard links here
        name.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)


def runs(process: int) -> bool:
    """Whether a process with this number runs on this machine."""
    try:
        os.kill(process, 0)  # signal 0 asks, and does nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
