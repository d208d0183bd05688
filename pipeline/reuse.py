"""The rows of images that have not changed since older parts were made."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pipeline.catalogue import DAMAGED, Part, read_part
from pipeline.columns import COVARIANCES, empty_rows


def unchanged(
    olds: Iterable[str | Path],
    digests: Sequence[str],
    counts: np.ndarray,
    parameters: Sequence[str],
    carry: Sequence[str],
) -> tuple[Part, np.ndarray]:
    """What older parts know of the blocks with these digests, and which of them (n,) have all their rows there.

    Parts that are not there, or damaged, know nothing. Rows lie as in the new part; ``blocks`` has an entry for each
    block, also for those that are not there.
    """
    again = np.zeros(len(digests), bool)
    blank = np.full(len(digests), "", dtype=object)
    blocks = {"digest": blank, "rows": counts, "pixels": blank.copy(), "unit": blank.copy()}
    # A shard may hold nothing but files that give no image.
    square = (0, len(parameters), len(parameters))
    found: list[tuple[dict, dict, dict]] = [
        (empty_rows(0), {k: np.empty(square) for k in COVARIANCES}, {name: [] for name in carry})
    ]
    block_of = [np.zeros(0, int)]
    for old in olds:
        if again.all():
            break
        try:
            part = read_part(old)
        except DAMAGED:
            continue
        known = {digest: number for number, digest in enumerate(part.blocks["digest"])}
        of = np.array([known.get(digest, -1) for digest in digests], int)
        has = np.append(part.blocks["rows"], -1)  # -1: of no block
        # Not those of which an image could not be read: it may be by now.
        new = ~again & (has[of] == counts)
        if not new.any():
            continue
        first = np.cumsum(has) - has
        take = np.concatenate([np.arange(first[k], first[k] + has[k]) for k in of[new]])
        for name in ("pixels", "unit"):
            blocks[name][new] = part.blocks[name][of[new]]
        found.append(
            (
                {name: values[take] for name, values in part.rows.items()},
                {kind: matrices[take] for kind, matrices in part.covariance.items()},
                {name: [values[i] for i in take.tolist()] for name, values in part.carried.items()},
            )
        )
        block_of.append(np.repeat(np.flatnonzero(new), counts[new]))
        again |= new
    order = np.argsort(np.concatenate(block_of), kind="stable")
    tables, covariances, texts = zip(*found, strict=True)
    carried = {name: list(itertools.chain.from_iterable(each[name] for each in texts)) for name in carry}
    return Part(
        {name: np.concatenate([table[name] for table in tables])[order] for name in tables[0]},
        {kind: np.concatenate([each[kind] for each in covariances])[order] for kind in COVARIANCES},
        {name: [values[i] for i in order.tolist()] for name, values in carried.items()},
        blocks,
    ), again
