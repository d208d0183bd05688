"""Whether a file, with its mask and maps, is what the scan has found."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from pipeline import hdus

#: How reasons end of what was there for the scan, and may be again.
RETRY = ": run again"

#: Errors of the system that are nothing about a file: a disk or a network that does not answer, too many open files.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)


def version(files: Sequence[str], changed: str) -> tuple[int, int]:
    """Size [byte] and version of an image file and those of its mask and maps together, so that any change shows.

    changed : "time" or "content". The version is the sum of the times of change [ns], or a digest of what is in them.

    Raises
    ------
    ValueError, OSError
        If the first one is no file with bytes in it; if one is not there, or a disk does not answer.
    """
    return _version(files, _looks(files), changed)


@contextlib.contextmanager
def as_found(label: str, found: tuple[int, int], files: Callable[[], Sequence[str]], changed: str) -> Iterator[None]:
    """Read files in here that are what the scan has found, and stay so.

    label : how sentences begin. found : what `version` said. files : names them, as they are by then.

    Raises
    ------
    ValueError
        That ends with RETRY: if they are gone or others, before or after; or what was raised in here, if it is the
        system that failed. Else as it was raised in here.
    """
    try:
        names = files()
        looks = _looks(names)
        now = _version(names, looks, changed)
    except hdus.TROUBLE as error:
        msg = f"{label}: {hdus.sentence(error)}{RETRY}"
        raise ValueError(msg) from error
    problem = None
    if now == found:
        try:
            yield
        except ValueError as error:
            problem = error
    if now != found or not _look_like(looks, files):
        msg = f"{label}: it or its mask or one of its maps changed after the scan{RETRY}"
        raise ValueError(msg) from problem
    if problem is not None:
        if _may_pass(problem):
            msg = f"{problem}{RETRY}"
            raise ValueError(msg) from problem
        raise problem


def _looks(files: Sequence[str]) -> list[tuple[int, int]]:
    """Size and time of change of each."""
    status = [hdus.status(files[0]), *map(os.stat, files[1:])]
    # That of the status too: a copy may bring its old modification time along.
    return [(found.st_size, max(found.st_mtime_ns, found.st_ctime_ns)) for found in status]


def _look_like(looks: list[tuple[int, int]], files: Callable[[], Sequence[str]]) -> bool:
    try:
        return _looks(files()) == looks
    except hdus.TROUBLE:
        return False


def _version(files: Sequence[str], looks: list[tuple[int, int]], changed: str) -> tuple[int, int]:
    size, times = sum(size for size, _ in looks), [time for _, time in looks]
    if changed == "time":
        return size, sum(times)
    digests = b"".join(map(_content, files, times))
    return size, int.from_bytes(hashlib.blake2b(digests, digest_size=7).digest())


@lru_cache(maxsize=4096)  # a file is read a part at a time, and a map may be that of many
def _content(file: str, time: int) -> bytes:
    try:
        hdus.status(file)  # to open a pipe is to hang
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "blake2b").digest()
    except (ValueError, PermissionError):
        return str(time).encode()  # to read it says what is wrong with it


def _may_pass(error: BaseException | None) -> bool:
    """Whether the system is behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _PASSING:
            return True
        error = error.__cause__ or error.__context__
    return False
