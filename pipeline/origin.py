"""What every output was made of, and what the run that goes on wants.

A job may outlive the run that started it, and write its output after images or config have changed: by its time that
looks new, and what Snakemake has noted may be of the file before. So each output says what it was made of, by a digest,
and is made again if that is not what the run wants. Imports neither jax nor astropy.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.files import replacing

#: The keyword of simulated images and their truth.
KEYWORD = "DIGEST"
#: Bytes at the beginning of these, and of a report, that hold it.
HEAD_BYTES = 2880


# ---- digests --------------------------------------------------------------------------------------------------------


def config_digest(config: Mapping[str, Any]) -> str:
    """Digest of the checked config."""
    return _digest(config)


def stack_digest(simulated: Mapping[str, Any], start: int, stop: int) -> str:
    """Digest of all that decides on simulated images ``start`` to ``stop - 1``: the section but how many there are."""
    return _digest(simulated, start, stop)


def list_digest(files: Sequence[str], reading: Mapping[str, Any], shard_size: int, listing: str) -> str:
    """Digest of all that decides on the list of shards; ``listing`` is that of `listing.run_digest`."""
    return _digest(list(files), reading, shard_size, listing)


def content_digest(content: bytes) -> str:
    """Digest of what a file holds."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def part_digest(manifest: str, reading: Mapping[str, Any], fit: Mapping[str, Any]) -> str:
    """Digest of all that decides on the part of a shard: that of its manifest, how images are read and fitted."""
    return _digest(manifest, reading, fit)


def rows_digest(reading: Mapping[str, Any], fit: Mapping[str, Any], *made_on: Any) -> str:
    """Digest of all that decides on a row beside its image: how images are read and fitted, and on what."""
    return _digest(reading, fit, *made_on)


def certificate_digest(parts: Sequence[str], sources: int) -> str:
    """Digest of all that decides on a certificate: those of the parts, and how many sources are put in."""
    return _digest(list(parts), sources)


def catalogue_digest(parts: Sequence[str], config: Mapping[str, Any]) -> str:
    """Digest of all that decides on a catalogue: those of the parts, and the whole config, which it holds."""
    return _digest(list(parts), config)


def _digest(*of: Any) -> str:
    """Every output is another in another version of the pipeline."""
    text = json.dumps([__version__, *of], sort_keys=True)
    return content_digest(text.encode("utf-8", "surrogatepass"))


# ---- in files -------------------------------------------------------------------------------------------------------


def write_run(path: str | Path, config: Mapping[str, Any], listing: str) -> None:
    """Write what the run that begins wants: its config and the images as they were; as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"config": config_digest(config), "listing": listing}) + "\n")


def read_run(path: str | Path) -> dict[str, str]:
    """What `write_run` wrote; empty texts where it did not."""
    try:
        found = json.loads(Path(path).read_text())
        return {"config": found["config"], "listing": found["listing"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {"config": "", "listing": ""}


def check_run(path: str | Path, begun: Mapping[str, str]) -> None:
    """Before a job writes: a ``ValueError`` if a run has begun meanwhile that wants something else than this says."""
    now = read_run(path)
    if any(now[key] != value for key, value in begun.items()):
        msg = f"{path}: another run has begun on these results meanwhile, of other images or settings; nothing written"
        raise ValueError(msg)


def write_list(path: str | Path, digest: str, manifests: Mapping[str, str]) -> None:
    """Write the list of shards: its own digest, then a line for each shard with that of its manifest; whole or not."""
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in (f"# {digest}", *map(" ".join, manifests.items()))))


def read_list(path: str | Path) -> tuple[str, dict[str, str]]:
    """Digest of a list of shards, and digests of their manifests by name; "" and none where there is no such list."""
    try:
        head, *lines = Path(path).read_text().splitlines()
        return head.removeprefix("# "), dict(line.split(" ") for line in lines)
    except (FileNotFoundError, ValueError):
        return "", {}


def digest_in_header(path: str | Path) -> str:
    """Digest of simulated images, or of their truth, from the header; "" where it has none or there is no file."""
    return _find(path, rf"{KEYWORD:8}= '(\w+)")


def digest_in_page(path: str | Path) -> str:
    """Digest of the catalogue that a report shows; "" where it has none or there is no file."""
    return _find(path, r'<meta name="digest" content="(\w+)">')


def _find(path: str | Path, pattern: str) -> str:
    try:
        with open(path, "rb") as file:
            found = re.search(pattern.encode(), file.read(HEAD_BYTES))
    except OSError:
        return ""
    return found[1].decode() if found else ""
