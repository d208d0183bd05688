"""The report: one HTML page, with everything in it, that says what a run found and how far to trust it.

Rows are read a slab at a time, in two passes: one over a sample, to see where the numbers lie, and one over all,
to count. Only the few rows that are pictured are read again, with their pixels.
"""

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import median_filter

from pipeline.catalogue import Summary, read_rows, read_summary
from pipeline.certificate import FAR, NOMINAL, corrections
from pipeline.columns import BEAM, BIT, COLUMNS, DERIVED, FLAGS, HARMLESS, PARAMETERS, SKY, UNSOLVED, decode_flags
from pipeline.cutouts import scan_stamps
from pipeline.detection import read_images
from pipeline.files import replacing
from pipeline.images import corners_of, identities, scan_file
from pipeline.model import direction_pull, of_rows

SLAB = 50_000
SAMPLE = 100_000
PICTURES = 12
REASONS = 20

# Widths are shown as full widths at half maximum: sigma_major and sigma_minor are the same but for a factor.
_DERIVED = tuple(name for name in DERIVED if name not in ("sigma_major", "sigma_minor"))
VALUES = (*PARAMETERS, *_DERIVED, *SKY, *BEAM)
QUALITY = ("snr", "misfit", "outlier_fraction", "n_steps", "condition")

# Pulls are counted in bins fine enough to read medians and quantiles off them.
PULL_EDGES = np.linspace(-8.0, 8.0, 1601)

# The frame of a histogram, in units of its drawing.
WIDTH, HEIGHT = 240.0, 72.0

MASKED_COLOUR = (0.91, 0.70, 0.25, 1.0)
# In half-widths, like the bound of outlier_fraction.
RESIDUAL_LIMIT = 10.0
# Sources in images larger than this are shown with their surroundings only.
LARGEST_PICTURE = 96


class Axis(NamedTuple):
    """Where a histogram counts: ``edges`` are of the value, or of its decimal logarithm where ``log``."""

    log: bool
    edges: np.ndarray


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


class Tally(NamedTuple):
    """What a pass over all rows counts.

    ``fitted``: rows with parameters; ``good``: rows without a flag; ``harmless``: rows with no flag but harmless ones;
    ``solved``: rows that are a solution; ``flags``: rows by bit; ``counts``: counts of the histograms by column;
    ``finite``: finite values by column, of parameters and errors those of solutions;
    ``worst``: rows with the largest |misfit|; ``unconverged``: the first rows that did not converge;
    ``pulls``: by parameter, counts in PULL_EDGES; ``moments``: by parameter, what `_pull_row` needs besides.
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


def write_report(
    catalogue_path: str | Path,
    report_path: str | Path,
    *,
    images: Mapping[str, Any],
    benchmarks: Sequence[tuple[str, float, int]],
    config: Mapping[str, Any],
    certificate_seconds: float = 0.0,
    digest: str = "",
) -> None:
    """Write the report of a run.

    Parameters
    ----------
    catalogue_path : path
        A file of `catalogue.merge`.
    report_path : path
        Replaced as a whole or not at all; needs no other file and no network.
    images : dict
        Section ``images`` of the config: how the pixels of the rows pictured are read. What cannot be read any more
        is said in place of the picture.
    benchmarks : sequence of (shard, seconds, images)
        Wall time of each fit job, and how many images it had. May be empty.
    config : dict
        The whole config; its section ``fit`` is shown at the top.
    certificate_seconds : float
        Wall time of the certificate.
    digest : str
        Of what the catalogue was made of, see `pipeline.origin`.
    """
    summary = read_summary(catalogue_path)
    sample = _sample(catalogue_path, summary)
    axes = {name: axis for name in sample if name in _SHOWN and (axis := _axis(_values(sample, name))) is not None}
    tally = _tally(catalogue_path, summary, axes)
    shown = {name: _column_histogram(name, axes[name], tally, summary) for name in axes}
    page = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters.update(count=_count, number=_number, unit=_unit)
    certificate = read_rows(catalogue_path, table="certificate") if summary.has_certificate else {}
    text = page.get_template("report.html.j2").render(
        digest=digest,
        summary=summary,
        tally=tally,
        settings=dict(config.get("fit", {})),
        flags=[(flag, int(tally.flags[flag.bit])) for flag in FLAGS],
        reasons=_reasons(catalogue_path, summary),
        pulls=[_pull_row(name, tally, summary) for name in tally.pulls],
        pull_histograms=[_pull_histogram(name, tally.pulls[name]) for name in tally.pulls],
        pictures=[_picture(catalogue_path, row, why, summary, images) for row, why in _choose(sample, tally, summary)],
        groups=[
            ("Parameters", [shown[name] for name in VALUES if name in shown]),
            ("Standard errors", [shown[f"{name}_err"] for name in VALUES if f"{name}_err" in shown]),
            ("Quality of the fits", [shown[name] for name in QUALITY if name in shown]),
        ],
        certified=_certified(certificate),
        coverages=_coverages(certificate),
        far=FAR,
        certificate_seconds=certificate_seconds,
        timing=_timing(benchmarks),
        width=WIDTH,
        height=HEIGHT,
        masked_colour=f"rgb({', '.join(str(round(255 * c)) for c in MASKED_COLOUR[:3])})",
    )
    with replacing(report_path) as temporary:
        # What is not UTF-8 in a file name is shown as an escape.
        shown_text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        temporary.write_text(shown_text, encoding="utf-8")


_SHOWN = frozenset({*VALUES, *(f"{name}_err" for name in VALUES), *QUALITY})
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_READ = [c.name for c in COLUMNS if c.name in _SHOWN or c.name == "flags"]


def _slabs(
    path: str | Path, count: int, columns: Sequence[str], table: str = "catalogue"
) -> Iterator[tuple[int, dict]]:
    """First row and columns of each slab of a table."""
    for start in range(0, count, SLAB):
        yield start, read_rows(path, columns, start, start + SLAB, table=table)


def _sample(path: str | Path, summary: Summary) -> dict[str, np.ndarray]:
    """Every k-th row, with its number as the column ``row``."""
    stride = max(1, math.ceil(summary.rows / SAMPLE))
    slabs = []
    for start, rows in _slabs(path, summary.rows, _READ):
        rows["row"] = np.arange(start, start + len(rows["flags"]))
        # Copies, because a view would keep its whole slab in memory.
        slabs.append({name: values[-start % stride :: stride].copy() for name, values in rows.items()})
    return {name: np.concatenate([slab[name] for slab in slabs]) for name in (*_READ, "row")} if slabs else {}


def _values(rows: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The finite values of a column; of parameters and errors, those of solutions."""
    use = np.isfinite(rows[name])
    return rows[name][use if name in QUALITY else use & (rows["flags"] & UNSOLVED == 0)]


def _axis(values: np.ndarray) -> Axis | None:
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


def _tally(path: str | Path, summary: Summary, axes: Mapping[str, Axis]) -> Tally:
    fitted = good = harmless = solved = 0
    flags = np.zeros(64, dtype=np.int64)
    counts = {name: np.zeros(len(axis.edges) - 1, dtype=np.int64) for name, axis in axes.items()}
    finite = dict.fromkeys(axes, 0)
    worst, misfits = np.zeros(0, dtype=np.int64), np.zeros(0)
    unconverged: list[int] = []
    measured = (*summary.parameters, *_DERIVED) if summary.has_truth else ()
    pulls = {name: np.zeros(len(PULL_EDGES) + 1, dtype=np.int64) for name in measured}
    moments = {name: np.zeros(5) for name in measured}
    for start, rows in _slabs(path, summary.rows, _READ):
        bits = rows["flags"]
        fitted += int(np.isfinite(rows["x0"]).sum())
        good += int((bits == 0).sum())
        harmless += int(((bits != 0) & (bits & ~HARMLESS == 0)).sum())
        solved += int((bits & UNSOLVED == 0).sum())
        flags += np.array([(bits >> bit & 1).sum() for bit in range(64)])
        for name, axis in axes.items():
            values = _values(rows, name)
            finite[name] += len(values)
            counts[name] += np.histogram(np.log10(values[values > 0]) if axis.log else values, axis.edges)[0]
        unconverged += [start + int(i) for i in np.flatnonzero(bits & BIT["NOT_CONVERGED"])[:PICTURES]]
        misfit = np.abs(rows["misfit"])
        usable = np.flatnonzero(np.isfinite(misfit))
        worst, misfits = np.concatenate([worst, start + usable]), np.concatenate([misfits, misfit[usable]])
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


def _pull_row(name: str, tally: Tally, summary: Summary) -> dict[str, Any]:
    """One line of the comparison with the truth, each number with its Monte Carlo error."""
    binned = tally.pulls[name]
    within_1, within_2, near, total, squares = tally.moments[name]
    number = int(binned.sum())
    low, median, high = np.interp(
        [0.158655, 0.5, 0.841345], np.cumsum(binned[:-1]) / number, PULL_EDGES, left=-np.inf, right=np.inf
    )
    spread = 0.5 * (high - low)
    bias = total / max(near, 1)
    bias_err = math.sqrt(max(squares / max(near, 1) - bias**2, 0.0) / max(near, 1))
    coverage = []
    for inside, nominal in zip((within_1, within_2), NOMINAL, strict=True):
        error = math.sqrt(nominal * (1 - nominal) / number)
        share = inside / number
        coverage.append((f"{100 * share:.1f} ± {100 * error:.1f}", abs(share - nominal) > 3 * error))
    # The standard errors of a median and of half the 16..84 % range, for normal pulls.
    errors = 1.253 * spread / math.sqrt(number), 0.962 * spread / math.sqrt(number)
    return {
        "name": name,
        "unit": summary.units[name],
        "number": number,
        "median": (_with_error(median, errors[0]), abs(median) > 3 * errors[0]),
        "spread": (_with_error(spread, errors[1]), abs(spread - 1) > 3 * errors[1]),
        "coverage": coverage,
        "far": number - int(near),
        "bias": (_with_error(bias, bias_err), abs(bias) > 3 * bias_err),
    }


def _pull_histogram(name: str, binned: np.ndarray) -> Histogram:
    inner = binned[1:-1].reshape(-1, 25).sum(axis=1)
    edges = PULL_EDGES[::25]
    show = slice(12, 52)
    number = int(binned.sum())
    x = np.linspace(-5.0, 5.0, 81)
    normal = number * 0.25 * np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    outside = number - int(inner[show].sum())
    ticks = [(float(t), _minus(f"{t:g}")) for t in (-4, -2, 0, 2, 4)]
    note = f"{_count(outside)} beyond ±5" if outside else ""
    return _draw(name, "", edges[12:53], inner[show], ticks, note, (x, normal))


def _certified(certificate: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The lines of the certificate that have a source, each number with its Monte Carlo error."""
    lines = []
    factors = corrections(certificate) if certificate else {}
    taken = Counter[str]()
    for values in zip(*certificate.values(), strict=True):
        line = dict(zip(certificate, values, strict=True))
        name = str(line["parameter"])
        factor = float(factors[name][taken[name]])
        taken[name] += 1
        if line["sources"] or line["failed"]:
            cells = [
                (_share(line["coverage_68"], line["coverage_68_err"]), _off(line, "coverage_68", NOMINAL[0])),
                (_share(line["coverage_95"], line["coverage_95_err"]), _off(line, "coverage_95", NOMINAL[1])),
                (_with_error(line["bias"], line["bias_err"]), _off(line, "bias", 0.0)),
                (_with_error(line["spread"], line["spread_err"]), _off(line, "spread", 1.0)),
                (_with_error(line["over_bound"], line["over_bound_err"]), False),
            ]
            corrected = _with_error(factor, line["factor_err"]) if factor != 1.0 else ""
            lines.append(line | {"name": name, "snr": _range(line), "cells": cells, "corrected": corrected})
    return lines


def _off(line: Mapping[str, Any], name: str, nominal: float) -> bool:
    return bool(abs(line[name] - nominal) > 3 * line[f"{name}_err"])


def _share(share: float, error: float) -> str:
    return f"{100 * share:.1f} ± {100 * error:.1f}" if math.isfinite(share) else "undefined"


def _range(line: Mapping[str, Any]) -> str:
    """A bin of S/N in words."""
    low, high = line["snr_low"], line["snr_high"]
    return f"{low:g}–{high:g}" if math.isfinite(high) else f"above {low:g}"


def _coverages(certificate: Mapping[str, np.ndarray]) -> list[Coverage]:
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
            (x, up(share), up(share - error), up(share + error), _off(line, label, nominal))
            for x, line in zip(across, own, strict=True)
            for label, nominal in zip(("coverage_68", "coverage_95"), NOMINAL, strict=True)
            for share, error in [(float(line[label]), float(line[f"{label}_err"]))]
            if math.isfinite(share)
        ]
        ticks = [(x, _range(line)) for x, line in zip(across, own, strict=True)]
        nominal_lines = [(up(nominal), f"{100 * nominal:.1f} %") for nominal in NOMINAL]
        pictures.append(Coverage(str(name), points, nominal_lines, ticks))
    return pictures


def _column_histogram(name: str, axis: Axis, tally: Tally, summary: Summary) -> Histogram:
    low, high = float(axis.edges[0]), float(axis.edges[-1])
    if axis.log:
        step = max(1, math.ceil((high - low) / 5))
        digits = (1, 2, 5) if high - low < 1.2 else (1, 3) if high - low < 2.5 else (1,)
        marks = [m * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) if k % step == 0 for m in digits]
        ticks = [(math.log10(m), _power(f"{m:g}")) for m in marks if low <= math.log10(m) <= high]
    else:
        marks = np.asarray(MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)).tolist()
        decimals = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
        wide = max(map(abs, marks)) >= 1e6 or decimals > 6
        ticks = [(m, _power(f"{m:.4g}" if wide else f"{m:.{decimals}f}")) for m in marks if low <= m <= high]
    outside = tally.finite[name] - int(tally.counts[name].sum())
    undefined = (summary.rows if name in QUALITY else tally.solved) - tally.finite[name]
    notes = [f"{_count(k)} {what}" for k, what in ((outside, "outside"), (undefined, "undefined")) if k]
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


def _choose(sample: Mapping[str, np.ndarray], tally: Tally, summary: Summary) -> list[tuple[int, str]]:
    """Rows to picture, and why: the worst, some that did not converge, and typical ones from faint to bright."""
    if summary.rows == 0:
        return []
    bad = dict.fromkeys([*tally.worst[:4], *tally.unconverged[:3]])
    typical = np.flatnonzero((sample["flags"] == 0) & np.isfinite(sample["snr"]) & ~np.isin(sample["row"], list(bad)))
    typical = typical[np.argsort(sample["snr"][typical], kind="stable")]
    room = min(PICTURES - len(bad), len(typical))
    places = (len(typical) * (np.arange(room) + 0.5) / max(room, 1)).astype(int)
    groups = [
        ("largest misfit", tally.worst[:4]),
        ("not converged", tally.unconverged[:3]),
        ("typical", sample["row"][typical[places]].tolist()),
        ("large misfit", tally.worst[4:]),
        ("not converged", tally.unconverged[3:]),
        ("one of the first", list(range(min(PICTURES, summary.rows)))),
    ]
    chosen: dict[int, str] = {}
    for why, rows in groups:
        for row in rows:
            chosen.setdefault(row, why)
    return list(chosen.items())[:PICTURES]


def _picture(path: str | Path, index: int, why: str, summary: Summary, images: Mapping[str, Any]) -> dict[str, Any]:
    """Data, model and residual of one row, with its numbers."""
    row = {name: values[0] for name, values in read_rows(path, None, index, index + 1).items()}
    numbers = [
        (name, _with_error(row[name], row[f"{name}_err"]), summary.units[name])
        for name in (*PARAMETERS, *_DERIVED)
        if math.isfinite(row[name])
    ]
    if math.isfinite(row["ra"]) and math.isfinite(row["dec"]):
        numbers.append(("ra, dec", _minus(f"{row['ra']:.5f}, {row['dec']:+.5f}"), summary.units["ra"]))
    # What goes along, where it is neither empty nor NaN.
    along = {name: row[name] for name in images.get("carry", ())}
    numbers += [(name, str(value), "") for name, value in along.items() if value != "" and value == value]
    try:
        data, used, noise, corner = _pixels(row, images)
        shown = row | {name: row[name] - corner["xy".index(name[0])] for name in ("x0", "y0", "x0_start", "y0_start")}
        # Fits that went astray overflow, and pixels that were not used may hold anything.
        with np.errstate(all="ignore"):
            panels, problem = _panels(shown, data, used, noise, summary.units["amp"]), ""
    except (OSError, ValueError) as error:
        panels, problem = [], f"The pixels could not be read again: {error}"
    return {"row": row, "why": why, "flags": decode_flags(int(row["flags"])), "numbers": numbers} | {
        "panels": panels,
        "problem": problem,
    }


def _pixels(row: Mapping[str, Any], images: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Pixels (ny, nx) of a row, which were used, 1-sigma noise (1 where none is given), x and y of the first pixel."""
    reading = {key: value for key, value in images.items() if key != "files"}
    blocks, _ = scan_file(row["file"], **reading) if images["cutouts"] is None else scan_stamps(row["file"], **reading)
    for block in (block for block in blocks if block.hdu == row["hdu"]):
        planes, sources = identities(block, block.start, block.stop)
        for number in np.flatnonzero((planes == row["plane"]) & (sources == row["source"])).tolist():
            stack = read_images(block, number, number + 1, **reading)
            noise = np.ones(stack.data.shape[1:]) if stack.noise_map is None else stack.noise_map[0]
            (corner,) = corners_of(block, number, number + 1).tolist()
            return np.asarray(stack.data[0], dtype=np.float64), ~stack.mask[0], noise, corner
    source = "" if images["cutouts"] is None else f" source {row['source']} in"
    msg = f"{row['file']}: no{source} plane {row['plane']} in HDU {row['hdu']} any more"
    raise ValueError(msg)


def _window(row: Mapping[str, Any], ny: int, nx: int) -> tuple[slice, slice]:
    """Rows and columns of an image to show: all of a small one, of a large one the source and what surrounds it."""
    if max(ny, nx) <= LARGEST_PICTURE:
        return slice(0, ny), slice(0, nx)
    half = int(np.clip(3 * np.nan_to_num(row["fwhm_major"], nan=0.0), LARGEST_PICTURE // 4, 2 * LARGEST_PICTURE))

    def cut(centre: float, size: int) -> slice:
        start = int(np.clip((centre if math.isfinite(centre) else 0.5 * size) - half, 0, max(size - 2 * half, 0)))
        return slice(start, min(start + 2 * half, size))

    return cut(row["y0"], ny), cut(row["x0"], nx)


def _panels(
    row: Mapping[str, Any], data: np.ndarray, used: np.ndarray, noise: np.ndarray, unit: str
) -> list[dict[str, Any]]:
    """The three pictures of a row; without a model, its data alone."""
    window = _window(row, *data.shape)
    data, used, noise = data[window], used[window], noise[window]
    y, x = np.indices(data.shape, dtype=np.float64)
    y, x = y + window[0].start, x + window[1].start
    pixels = data[used] if used.any() else np.zeros(1)
    middle = float(np.median(pixels))
    spread = 1.4826 * float(np.median(np.abs(pixels - middle))) or 1.0

    def stretch(values: np.ndarray) -> np.ndarray:
        return np.arcsinh((values - middle) / (3.0 * spread))

    # What is left after a 3x3 median is the source and its surroundings; outliers would leave no shades for these. The
    # quantiles pass over stars in the way, and the model keeps a source that is smaller than they are.
    smooth = stretch(median_filter(np.where(used, data, middle), 3))
    low, high = np.quantile(smooth, [0.01, 0.99])
    model = of_rows(row, x, y) if np.isfinite([row[name] for name in PARAMETERS[:6]]).all() else None
    if model is not None and np.isfinite(model).all():
        peaks = np.clip(stretch(model), *stretch(np.array([pixels.min(), pixels.max()])))
        low, high = min(low, peaks.min()), max(high, peaks.max())
    low, high = low - 0.4, high + 0.1
    ends = [_number(middle + 3.0 * spread * math.sinh(end)) for end in (low, high)]
    grey = f"{ends[0]} to {ends[1]} {_unit(unit)}".strip()
    frame = {
        "width": data.shape[1],
        "height": data.shape[0],
        # In pixels from the corner, y upwards.
        "cx": row["x0"] - window[1].start + 0.5,
        "cy": data.shape[0] - (row["y0"] - window[0].start + 0.5),
        "rx": 0.5 * row["fwhm_major"],
        "ry": 0.5 * row["fwhm_minor"],
        "turn": -math.degrees(np.nan_to_num(row["theta"], nan=0.0)),
        "solved": all(math.isfinite(row[name]) for name in ("x0", "y0", "fwhm_major", "fwhm_minor")),
    }
    panels = [
        frame | {"name": "data", "range": grey, "src": _png((stretch(data) - low) / (high - low), used, "gray_r")}
    ]
    if model is not None:
        half_width = noise * (row["scale"] if math.isfinite(row["scale"]) and row["scale"] > 0 else spread)
        residual = 0.5 + (data - model) / half_width / (2 * RESIDUAL_LIMIT)
        clean = _png((stretch(model) - low) / (high - low), np.ones_like(used), "gray_r")
        panels += [
            frame | {"name": "model", "range": "", "src": clean},
            frame | {"name": "residual", "range": f"±{RESIDUAL_LIMIT:g} scale", "src": _png(residual, used, "RdBu_r")},
        ]
    return panels


def _png(values: np.ndarray, used: np.ndarray, colours: str) -> str:
    """Values 0..1 (ny, nx) as the address of a picture, y upwards; clipped; unused pixels in their own colour."""
    rgba = matplotlib.colormaps[colours](np.clip(np.nan_to_num(values, nan=0.5), 0.0, 1.0))
    rgba[~used] = MASKED_COLOUR
    buffer = io.BytesIO()
    imsave(buffer, rgba[::-1], format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _reasons(path: str | Path, summary: Summary) -> list[tuple[str, int, str]]:
    """Why images were rejected: reason, how many, and one file; the commonest first."""
    number: Counter[str] = Counter()
    example: dict[str, str] = {}
    for _, rows in _slabs(path, summary.rejected, ["file", "reason"], "rejected"):
        for file, reason in zip(rows["file"], rows["reason"], strict=True):
            # Reasons name their file; without it, equal reasons are equal.
            short = reason.replace(file, "…").removeprefix("…: ") if file else reason
            number[short] += 1
            example.setdefault(short, file)
    shown = sorted(number, key=lambda reason: (-number[reason], reason))
    table = [(reason, number[reason], example[reason]) for reason in shown[:REASONS]]
    rest = shown[REASONS:]
    if rest:
        table.append((f"{_count(len(rest))} other reasons", sum(number[r] for r in rest), example[rest[0]]))
    return table


def _timing(benchmarks: Sequence[tuple[str, float, int]]) -> dict[str, Any]:
    """Totals of the fit jobs, and the slowest of them."""
    seconds = sum(float(t) for _, t, _ in benchmarks)
    images = sum(int(n) for *_, n in benchmarks)
    slowest = sorted(benchmarks, key=lambda b: (-float(b[1]), b[0]))[:5]
    return {
        "jobs": len(benchmarks),
        "seconds": seconds,
        "images": images,
        "rate": images / seconds if seconds > 0 else math.nan,
        "median": float(np.median([t for _, t, _ in benchmarks])) if benchmarks else math.nan,
        "slowest": [(shard, float(t), int(n), n / t if t > 0 else math.nan) for shard, t, n in slowest],
    }


def _count(value: int) -> str:
    """A whole number in groups of three."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _number(value: float) -> str:
    """A number to three digits."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    text = f"{value:.3g}" if abs(value) < 1000 or abs(value) >= 1e6 else _count(round(value))
    return _minus(text)


def _minus(text: str) -> str:
    """A number with a minus sign for its hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")


def _power(text: str) -> str:
    """A number, with a raised power of ten where Python writes 3e+06."""
    digits, _, power = text.partition("e")
    if not power:
        return _minus(digits)
    times = "" if digits == "1" else f"{_minus(digits)} \N{MULTIPLICATION SIGN} "
    return f"{times}10{str(int(power)).translate(_RAISED)}"


def _unit(text: str) -> str:
    """A unit as astropy writes it, in fewer characters."""
    text = re.sub(r"\b([A-Za-z]+)2\b", "\\1\N{SUPERSCRIPT TWO}", text).replace(" / ", "/")
    return text.removeprefix("1") if text.startswith("1/") else text


def _with_error(value: float, error: float) -> str:
    """``value ± error``: the error to two digits, the value to the same place."""
    if not math.isfinite(value):
        return "undefined"
    if not (math.isfinite(error) and error > 0):
        return _power(f"{value:.6g}")
    power = math.floor(math.log10(max(abs(value), error)))
    shift = power if power >= 6 or power <= -5 else 0
    decimals = max(0, 1 - math.floor(math.log10(error)) + shift)
    text = _minus(f"{value / 10.0**shift:.{decimals}f} ± {error / 10.0**shift:.{decimals}f}")
    return f"({text}) \N{MULTIPLICATION SIGN} 10{str(shift).translate(_RAISED)}" if shift else text
