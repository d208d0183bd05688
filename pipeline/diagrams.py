"""Histograms and coverage, as paths of SVG."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

from pipeline import numerals, tallies
from pipeline.catalogue import Summary
from pipeline.certificate import NOMINAL

# The frame of a histogram, in units of its drawing.
WIDTH, HEIGHT = 240.0, 72.0


class Histogram(NamedTuple):
    """A histogram ready to draw: SVG paths, ticks as (position, label), and how many values are not in it."""

    name: str
    unit: str
    bars: str
    curve: str
    ticks: list[tuple[float, str]]
    note: str


class Coverage(NamedTuple):
    """How often the errors of one parameter hold, ready to draw.

    ``points``: by bin of S/N and nominal share, as (x, y, lower end, upper end of its Monte Carlo error, whether it is
    off); ``lines``: the nominal shares; ``ticks`` as in `Histogram`.
    """

    name: str
    points: list[tuple[float, float, float, float, bool]]
    lines: list[tuple[float, str]]
    ticks: list[tuple[float, str]]


def of_pulls(name: str, binned: np.ndarray) -> Histogram:
    """Pulls of one parameter, counted in `tallies.PULL_EDGES`, beside a unit normal."""
    inner = binned[1:-1].reshape(-1, 25).sum(axis=1)
    edges = tallies.PULL_EDGES[::25]
    show = slice(12, 52)
    number = int(binned.sum())
    x = np.linspace(-5.0, 5.0, 81)
    normal = number * 0.25 * np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    outside = number - int(inner[show].sum())
    ticks = [(float(t), numerals.minus(f"{t:g}")) for t in (-4, -2, 0, 2, 4)]
    note = f"{numerals.count(outside)} beyond ±5" if outside else ""
    return _draw(name, "", edges[12:53], inner[show], ticks, note, (x, normal))


def is_off(line: Mapping[str, Any], name: str, nominal: float) -> bool:
    """Whether a number of the certificate is further from what it should be than chance may bring it."""
    return bool(abs(line[name] - nominal) > 3 * line[f"{name}_err"])


def of_coverage(certificate: Mapping[str, np.ndarray]) -> list[Coverage]:
    """Pictures of the certificate, one a parameter."""
    least = 0.5

    def up(share: float) -> float:
        return round(HEIGHT * (1.0 - (min(max(share, least), 1.0) - least) / (1.0 - least)), 1)

    lines = [dict(zip(certificate, values, strict=True)) for values in zip(*certificate.values(), strict=True)]
    pictures = []
    for name in dict.fromkeys(line["parameter"] for line in lines):
        own = [line for line in lines if line["parameter"] == name]
        across = [round(WIDTH * (k + 0.5) / len(own), 1) for k in range(len(own))]
        points = [
            (x, up(share), up(share - error), up(share + error), is_off(line, label, nominal))
            for x, line in zip(across, own, strict=True)
            for label, nominal in zip(("coverage_68", "coverage_95"), NOMINAL, strict=True)
            for share, error in [(float(line[label]), float(line[f"{label}_err"]))]
            if math.isfinite(share)
        ]
        ticks = [(x, numerals.snr_range(line)) for x, line in zip(across, own, strict=True)]
        nominal_lines = [(up(nominal), f"{100 * nominal:.1f} %") for nominal in NOMINAL]
        pictures.append(Coverage(str(name), points, nominal_lines, ticks))
    return pictures


def of_column(name: str, axis: tallies.Axis, tally: tallies.Tally, summary: Summary) -> Histogram:
    """The values of one column, all rows."""
    low, high = float(axis.edges[0]), float(axis.edges[-1])
    if axis.log:
        step = max(1, math.ceil((high - low) / 5))
        digits = (1, 2, 5) if high - low < 1.2 else (1, 3) if high - low < 2.5 else (1,)
        marks = [m * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) if k % step == 0 for m in digits]
        ticks = [(math.log10(m), numerals.power(f"{m:g}")) for m in marks if low <= math.log10(m) <= high]
    else:
        marks = np.asarray(MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)).tolist()
        decimals = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
        wide = max(map(abs, marks)) >= 1e6 or decimals > 6
        ticks = [(m, numerals.power(f"{m:.4g}" if wide else f"{m:.{decimals}f}")) for m in marks if low <= m <= high]
    outside = tally.finite[name] - int(tally.counts[name].sum())
    undefined = (summary.rows if name in tallies.QUALITY else tally.solved) - tally.finite[name]
    notes = [f"{numerals.count(k)} {what}" for k, what in ((outside, "outside"), (undefined, "undefined")) if k]
    return _draw(name, summary.units[name], axis.edges, tally.counts[name], ticks, ", ".join(notes))


def _draw(
    name: str,
    unit: str,
    edges: np.ndarray,
    counts: np.ndarray,
    ticks: Sequence[tuple[float, str]],
    note: str,
    curve: tuple[np.ndarray, np.ndarray] | None = None,
) -> Histogram:
    top = max(1.0, float(counts.max()), float(curve[1].max()) if curve else 0.0) * 1.05

    def across(x: Any) -> Any:
        return (x - edges[0]) / (edges[-1] - edges[0]) * WIDTH

    def up(y: Any) -> Any:
        return HEIGHT * (1.0 - y / top)

    steps = [f"V{up(n):.1f}H{x:.1f}" for n, x in zip(counts, across(edges[1:]), strict=True)]
    line = [f"{x:.1f},{y:.1f}" for x, y in zip(across(curve[0]), up(curve[1]), strict=True)] if curve else []
    return Histogram(
        name=name,
        unit=unit,
        bars=f"M0,{HEIGHT:g}{''.join(steps)}V{HEIGHT:g}Z",
        curve=f"M{'L'.join(line)}" if line else "",
        ticks=[(round(float(across(t)), 1), label) for t, label in ticks],
        note=note,
    )
