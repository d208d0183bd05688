"""What a report counts: rows by flag, histograms, pulls.

Rows are read a slab at a time, in two passes: one over a sample, to see where the numbers lie, and one over all,
to count.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.catalogue import Summary, read_rows
from pipeline.columns import BEAM, BIT, COLUMNS, DERIVED, HARMLESS, PARAMETERS, SKY, UNSOLVED
from pipeline.model import direction_pull

SLAB = 50_000
SAMPLE = 100_000
PICTURES = 12
# Widths are shown as full widths at half maximum: sigma_major and sigma_minor are the same but for a factor.
SHAPES = tuple(name for name in DERIVED if name not in ("sigma_major", "sigma_minor"))
VALUES = (*PARAMETERS, *SHAPES, *SKY, *BEAM)
QUALITY = ("snr", "misfit", "outlier_fraction", "n_steps", "condition")
# Pulls are counted in bins fine enough to read medians and quantiles off them.
PULL_EDGES = np.linspace(-8.0, 8.0, 1601)


class Axis(NamedTuple):
    """Where a histogram counts: ``edges`` are of the value, or of its decimal logarithm where ``log``."""

    log: bool
    edges: np.ndarray


class Tally(NamedTuple):
    """What a pass over all rows counts.

    ``fitted``: rows with parameters; ``good``: rows without a flag; ``harmless``: rows with no flag but harmless ones;
    ``solved``: rows that are a solution; ``flags``: rows by bit; ``counts``: counts of the histograms by column;
    ``finite``: finite values by column, of parameters and errors those of solutions;
    ``worst``: rows with the largest |misfit|; ``unconverged``: the first rows that did not converge;
    ``pulls``: by parameter, counts in PULL_EDGES; ``moments``: by parameter, what `_pulls` sums besides.
    """

    fitted: int
    good: int
    harmless: int
    solved: int
    flags: np.ndarray
    counts: dict[str, np.ndarray]
    finite: dict[str, int]
    worst: list[int]
    unconverged: list[int]
    pulls: dict[str, np.ndarray]
    moments: dict[str, np.ndarray]


SHOWN = frozenset({*VALUES, *(f"{name}_err" for name in VALUES), *QUALITY})
_READ = [c.name for c in COLUMNS if c.name in SHOWN or c.name == "flags"]


def slabs(path: str | Path, count: int, columns: Sequence[str], table: str = "catalogue") -> Iterator[tuple[int, dict]]:
    """First row and columns of each slab of a table."""
    for start in range(0, count, SLAB):
        yield start, read_rows(path, columns, start, start + SLAB, table=table)


def sample(path: str | Path, summary: Summary) -> dict[str, np.ndarray]:
    """Every k-th row, with its number as the column ``row``."""
    stride = max(1, math.ceil(summary.rows / SAMPLE))
    parts = []
    for start, rows in slabs(path, summary.rows, _READ):
        rows["row"] = np.arange(start, start + len(rows["flags"]))
        # Copies, because a view would keep its whole slab in memory.
        parts.append({name: values[-start % stride :: stride].copy() for name, values in rows.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in (*_READ, "row")} if parts else {}


def usable(rows: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The finite values of a column; of parameters and errors, those of solutions."""
    use = np.isfinite(rows[name])
    return rows[name][use if name in QUALITY else use & (rows["flags"] & UNSOLVED == 0)]


def axis_of(values: np.ndarray) -> Axis | None:
    """Bins that hold all but the wildest of some finite values; None where there is none."""
    if len(values) == 0:
        return None
    low, tenth, nine_tenths, high = np.quantile(values, [0.001, 0.1, 0.9, 0.999])
    log = low > 0 and nine_tenths > 6 * tenth
    if log:
        low, tenth, nine_tenths, high = (math.log10(value) for value in (low, tenth, nine_tenths, high))
    reach = 2.0 * (nine_tenths - tenth)
    if reach > 0:
        low, high = max(low, tenth - reach), min(high, nine_tenths + reach)
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        pad = 0.5 * abs(low) or 0.5
        low, high = low - pad, high + pad
    bins = int(np.clip(math.sqrt(len(values)), 12, 40))
    distinct = np.unique(values)
    if not log and 1 < len(distinct) < len(values) / 4:
        # Whole numbers, and shares of as many pixels, lie on a grid: bins of whole steps of it do not beat with it.
        step = float(np.diff(distinct).min())
        width = step * max(1, round((high - low) / bins / step))
        first = float(distinct[np.searchsorted(distinct, low)]) - 0.5 * step
        return Axis(False, np.arange(first, high + width, width))
    pad = 0.02 * (high - low)
    return Axis(log, np.linspace(low - pad, high + pad, 1 + bins))


def tally(path: str | Path, summary: Summary, axes: Mapping[str, Axis]) -> Tally:
    """What the rows of a catalogue come to; ``axes`` of the columns that have a histogram."""
    fitted = good = harmless = solved = 0
    flags = np.zeros(64, dtype=np.int64)
    counts = {name: np.zeros(len(axis.edges) - 1, dtype=np.int64) for name, axis in axes.items()}
    finite = dict.fromkeys(axes, 0)
    worst, misfits = np.zeros(0, dtype=np.int64), np.zeros(0)
    unconverged: list[int] = []
    measured = (*summary.parameters, *SHAPES) if summary.has_truth else ()
    pulls = {name: np.zeros(len(PULL_EDGES) + 1, dtype=np.int64) for name in measured}
    moments = {name: np.zeros(5) for name in measured}
    for start, rows in slabs(path, summary.rows, _READ):
        bits = rows["flags"]
        fitted += int(np.isfinite(rows["x0"]).sum())
        good += int((bits == 0).sum())
        harmless += int(((bits != 0) & (bits & ~HARMLESS == 0)).sum())
        solved += int((bits & UNSOLVED == 0).sum())
        flags += np.array([(bits >> bit & 1).sum() for bit in range(64)])
        for name, axis in axes.items():
            values = usable(rows, name)
            finite[name] += len(values)
            counts[name] += np.histogram(np.log10(values[values > 0]) if axis.log else values, axis.edges)[0]
        unconverged += [start + int(i) for i in np.flatnonzero(bits & BIT["NOT_CONVERGED"])[:PICTURES]]
        misfit = np.abs(rows["misfit"])
        known = np.flatnonzero(np.isfinite(misfit))
        worst, misfits = np.concatenate([worst, start + known]), np.concatenate([misfits, misfit[known]])
        order = np.argsort(-misfits, kind="stable")[:PICTURES]
        worst, misfits = worst[order], misfits[order]
        if measured:
            truth = read_rows(path, measured, start, start + SLAB, table="truth")
            for name in measured:
                binned, sums = _pulls(name, rows, truth[name])
                pulls[name] += binned
                moments[name] += sums
    return Tally(
        fitted=fitted,
        good=good,
        harmless=harmless,
        solved=solved,
        flags=flags,
        counts=counts,
        finite=finite,
        worst=worst.tolist(),
        unconverged=unconverged[:PICTURES],
        pulls={name: binned for name, binned in pulls.items() if binned.sum()},
        moments=moments,
    )


def _pulls(name: str, rows: Mapping[str, np.ndarray], truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts of (fit - truth) / err, of theta `direction_pull`, between, below and above PULL_EDGES; sums over rows.

    The sums: rows within 1 and within 2 errors; number, sum and sum of squares of fit - truth within 5 errors.
    """
    offset, error = rows[name] - truth, rows[f"{name}_err"]
    bad = rows["flags"] & UNSOLVED
    if name == "theta":
        # An axis, not an arrow: it comes back after half a turn. A round source has none.
        offset = (offset + 0.5 * np.pi) % np.pi - 0.5 * np.pi
        bad = rows["flags"] & (UNSOLVED | BIT["ROUND"])
    use = (bad == 0) & np.isfinite(offset) & (error > 0)
    offset, error = offset[use], error[use]
    pull = direction_pull(offset, error) if name == "theta" else offset / error
    binned = np.bincount(np.searchsorted(PULL_EDGES, pull), minlength=len(PULL_EDGES) + 1)
    size = np.abs(pull)
    near = offset[size <= 5]
    return binned, np.array([(size <= 1).sum(), (size <= 2).sum(), len(near), near.sum(), (near**2).sum()])
