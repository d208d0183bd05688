"""What the list of shards, and each part of the catalogue, was made of.

A job may outlive the run that started it, and write its output after images or config have changed: by its time that
looks new, and nobody keeps a record of it. So it says what it was made of. Imports neither jax nor astropy.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.files import replacing


def part_digest(manifest: str | Path, reading: Mapping[str, Any], fit: Mapping[str, Any]) -> str:
    """Digest of all that decides on the part of a shard: its manifest, how images are read and fitted, the version."""
    return _digest(Path(manifest).read_bytes(), reading, fit)


def rows_digest(reading: Mapping[str, Any], fit: Mapping[str, Any], *made_on: Any) -> str:
    """Digest of all that decides on a row beside its image: how images are read and fitted, the version, on what."""
    return _digest(b"", reading, fit, *made_on)


def list_digest(files: Sequence[str], reading: Mapping[str, Any], shard_size: int, listing: str) -> str:
    """Digest of all that decides on the list of shards; ``listing`` is that of `shards.listing_digest`."""
    return _digest(listing.encode(), list(files), reading, shard_size)


def _digest(content: bytes, *settings: Any) -> str:
    text = json.dumps([__version__, *settings], sort_keys=True)
    return hashlib.blake2b(content + text.encode(), digest_size=16).hexdigest()


def write_list(path: str | Path, digest: str, names: Sequence[str]) -> None:
    """Write the list of shards, one a line after a comment with its digest; as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in (f"# {digest}", *names)))


def read_list(path: str | Path) -> tuple[str, list[str]]:
    """Digest and names of a list of shards; no names, and a digest of nothing, where there is no list."""
    try:
        lines = Path(path).read_text().splitlines()
    except FileNotFoundError:
        return "", []
    names = [line for line in lines if not line.startswith("#")]
    return lines[0].removeprefix("# ") if len(lines) > len(names) else "", names
