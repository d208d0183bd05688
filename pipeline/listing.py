"""Which files there are, and whether they are what they were. Nothing of what is in them."""

import functools
import glob
import hashlib
import os
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

from pipeline.images import Rejected, whole
from pipeline.maps import SUFFIXES, companions


def list_files(files: list[str], own: Sequence[str] = ()) -> tuple[list[str], list[Rejected]]:
    """Expand paths, globs (``**`` recursive) and folders (searched recursively for FITS suffixes).

    own : folders that the pipeline writes images to; only what names them, or something in them, finds what is there.

    Returns
    -------
    files : list of str
        Sorted, each once. What the user named is there whatever its suffix; whether it can be read is for `scan_file`.
    rejected : list of Rejected
        Entries that match nothing, folders without FITS files or that cannot be entered.
    """
    found: set[str] = set()
    rejected = []
    closed = {os.path.realpath(folder) for folder in own}
    for entry in files:
        named = os.path.expanduser(entry)
        # A file called `a[1].fits` is that file, not a pattern.
        matches = [named] if os.path.lexists(named) else _by_pattern(named, closed)
        if not matches:
            rejected.append(whole(named, "no file matches this" if glob.has_magic(named) else "no such file or folder"))
        for match in matches:
            inside, refused = _search(match, closed) if os.path.isdir(match) else ([match], [])
            found.update(inside)
            rejected += refused
            if match == named and not inside and not refused:
                rejected.append(
                    whole(named, "no file in this folder is called .fits .fit .fts (or .gz .bz2 .fz of it)")
                )
    return sorted(found), sorted(set(rejected))


def _by_pattern(pattern: str, closed: Set[str]) -> list[str]:
    """What a pattern matches, but nothing in a closed folder unless it begins there."""
    begins = os.path.join(os.path.realpath(os.path.dirname(re.split(r"[*?[]", pattern, maxsplit=1)[0])), "")
    hidden = [folder for folder in (os.path.join(one, "") for one in closed) if not begins.startswith(folder)]
    real = functools.cache(os.path.realpath)  # of folders, of which there are few
    found = [(path, os.path.split(path)) for path in glob.glob(pattern, recursive=True)]
    placed = ((path, os.path.join(real(folder), name, "")) for path, (folder, name) in found)
    return [path for path, place in placed if not place.startswith(tuple(hidden))]


def _search(folder: str, closed: Set[str]) -> tuple[list[str], list[Rejected]]:
    found: list[str] = []
    rejected: list[Rejected] = []
    seen = set()

    def refuse(error: OSError) -> None:
        rejected.append(whole(str(error.filename), f"this folder cannot be entered: {error.strerror}"))

    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(path, name)) not in closed]
        found += [os.path.join(path, name) for name in names if SUFFIXES.search(name)]
    return found, rejected


def run_digest(
    found: Sequence[str], rejected: Sequence[Rejected], reading: Mapping[str, Any], positions: Sequence[str]
) -> str:
    """`listing_digest` of all that a run reads: what `list_files` gave, masks, maps, and the tables of positions."""
    others = [other for file in found for other in companions(file, **reading)]
    tables = [os.path.expanduser(path) for path in positions]
    return listing_digest([*found, *others, *tables, *(f"{row.file}: {row.reason}" for row in rejected)])


def listing_digest(files: Sequence[str]) -> str:
    """Digest of names, sizes and times of change of files: it changes when any of them may have changed, or is gone."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(set(files)):
        try:
            status = os.stat(file)
            # Of a chmod, which can make a file readable, only the last tells.
            seen = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        except (OSError, ValueError):
            seen = "none"
        digest.update(f"{file}\0{seen}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
