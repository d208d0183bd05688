"""What a part of the catalogue was made of.

A job may outlive the run that started it, and write its part after images or config have changed: by its time such a
part looks new, and nobody keeps a record of it. So each says what it was made of. Imports neither jax nor astropy.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import __version__


def digest(manifest: str | Path, reading: Mapping[str, Any], fit: Mapping[str, Any]) -> str:
    """Digest of all that decides on the part of a shard: its manifest, how images are read and fitted, the version."""
    settings = json.dumps([__version__, reading, fit], sort_keys=True)
    return hashlib.blake2b(Path(manifest).read_bytes() + settings.encode(), digest_size=16).hexdigest()


def is_of(origin: str | Path, wanted: str) -> bool:
    """Whether the part whose origin this is was made of what has the digest ``wanted``."""
    try:
        return json.loads(Path(origin).read_text()).get("digest") == wanted
    except (OSError, ValueError, AttributeError):
        return False
