"""The rows of images that have not changed since an older part of their shard was made."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.catalogue import DAMAGED, Part, read_part
from pipeline.columns import COVARIANCES, empty_rows


def unchanged(
    old: str | Path, digests: Sequence[str], counts: np.ndarray, parameters: Sequence[str], carry: Sequence[str]
) -> tuple[Part, np.ndarray]:
    """What an older part knows of the blocks with these digests, and which of them (n,) have all their rows there.

    Rows lie as in the new part; ``blocks`` has an entry for each block, also for those that are not there.
    """
    again = np.zeros(len(digests), bool)
    blank = np.full(len(digests), "", dtype=object)
    blocks = {"digest": blank, "rows": counts, "pixels": blank.copy(), "unit": blank.copy()}
    # A shard may hold nothing but files that give no image.
    square = (0, len(parameters), len(parameters))
    none = Part(empty_rows(0), {k: np.empty(square) for k in COVARIANCES}, {name: [] for name in carry}, blocks)
    try:
        part = read_part(old)
    except DAMAGED:
        return none, again
    has = part.blocks["rows"]
    known = {digest: number for number, digest in enumerate(part.blocks["digest"])}
    of = np.array([known.get(digest, -1) for digest in digests], int)
    # Not those of which an image could not be read: it may be by now.
    again[of >= 0] = has[of[of >= 0]] == counts[of >= 0]
    if not again.any():
        return none, again
    first = np.cumsum(has) - has
    take = np.concatenate([np.arange(first[k], first[k] + has[k]) for k in of[again]])
    for name in ("pixels", "unit"):
        blocks[name][again] = part.blocks[name][of[again]]
    return Part(
        {name: values[take] for name, values in part.rows.items()},
        {kind: matrices[take] for kind, matrices in part.covariance.items()},
        {name: [values[i] for i in take.tolist()] for name, values in part.carried.items()},
        blocks,
    ), again
