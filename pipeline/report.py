"""The report: one HTML page, with everything in it, that says what a run found and how far to trust it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from pipeline import diagrams, numerals, pictures, tallies
from pipeline.catalogue import Summary, read_rows, read_summary
from pipeline.certificate import CORRECTED_BEYOND, FAR, NOMINAL, corrections
from pipeline.columns import FLAGS
from pipeline.files import replacing

REASONS = 20


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
    sample = tallies.sample(catalogue_path, summary)
    axes = {
        name: axis
        for name in sample
        if name in tallies.SHOWN and (axis := tallies.axis_of(tallies.usable(sample, name))) is not None
    }
    tally = tallies.tally(catalogue_path, summary, axes)
    shown = {name: diagrams.of_column(name, axes[name], tally, summary) for name in axes}
    page = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters.update(count=numerals.count, number=numerals.number, unit=numerals.unit)
    certificate = read_rows(catalogue_path, table="certificate") if summary.has_certificate else {}
    text = page.get_template("report.html.j2").render(
        digest=digest,
        summary=summary,
        tally=tally,
        settings=dict(config.get("fit", {})),
        flags=[(flag, int(tally.flags[flag.bit])) for flag in FLAGS],
        reasons=_reasons(catalogue_path, summary),
        pulls=[_pull_row(name, tally, summary) for name in tally.pulls],
        pull_histograms=[diagrams.of_pulls(name, tally.pulls[name]) for name in tally.pulls],
        pictures=[
            pictures.picture(catalogue_path, row, why, summary, images)
            for row, why in pictures.choose(sample, tally, summary)
        ],
        groups=[
            ("Parameters", [shown[name] for name in tallies.VALUES if name in shown]),
            ("Standard errors", [shown[f"{name}_err"] for name in tallies.VALUES if f"{name}_err" in shown]),
            ("Quality of the fits", [shown[name] for name in tallies.QUALITY if name in shown]),
        ],
        certified=_certified(certificate),
        coverages=diagrams.of_coverage(certificate),
        far=FAR,
        corrected_beyond=CORRECTED_BEYOND,
        certificate_seconds=certificate_seconds,
        timing=_timing(benchmarks),
        width=diagrams.WIDTH,
        height=diagrams.HEIGHT,
        masked_colour=f"rgb({', '.join(str(round(255 * c)) for c in pictures.MASKED_COLOUR[:3])})",
    )
    with replacing(report_path) as temporary:
        # What is not UTF-8 in a file name is shown as an escape.
        shown_text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        temporary.write_text(shown_text, encoding="utf-8")


def _pull_row(name: str, tally: tallies.Tally, summary: Summary) -> dict[str, Any]:
    """One line of the comparison with the truth, each number with its Monte Carlo error."""
    binned = tally.pulls[name]
    within_1, within_2, near, total, squares = tally.moments[name]
    number = int(binned.sum())
    low, median, high = np.interp(
        [0.158655, 0.5, 0.841345], np.cumsum(binned[:-1]) / number, tallies.PULL_EDGES, left=-np.inf, right=np.inf
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
        "median": (numerals.with_error(median, errors[0]), abs(median) > 3 * errors[0]),
        "spread": (numerals.with_error(spread, errors[1]), abs(spread - 1) > 3 * errors[1]),
        "coverage": coverage,
        "far": number - int(near),
        "bias": (numerals.with_error(bias, bias_err), abs(bias) > 3 * bias_err),
    }


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
                (
                    numerals.share(line["coverage_68"], line["coverage_68_err"]),
                    diagrams.is_off(line, "coverage_68", NOMINAL[0]),
                ),
                (
                    numerals.share(line["coverage_95"], line["coverage_95_err"]),
                    diagrams.is_off(line, "coverage_95", NOMINAL[1]),
                ),
                (numerals.with_error(line["bias"], line["bias_err"]), diagrams.is_off(line, "bias", 0.0)),
                (numerals.with_error(line["spread"], line["spread_err"]), diagrams.is_off(line, "spread", 1.0)),
                (numerals.with_error(line["over_bound"], line["over_bound_err"]), False),
            ]
            corrected = numerals.with_error(factor, line["factor_err"]) if factor != 1.0 else ""
            lines.append(line | {"name": name, "snr": numerals.snr_range(line), "cells": cells, "corrected": corrected})
    return lines


def _reasons(path: str | Path, summary: Summary) -> list[tuple[str, int, str]]:
    """Why images were rejected: reason, how many, and one file; the commonest first."""
    number: Counter[str] = Counter()
    example: dict[str, str] = {}
    for _, rows in tallies.slabs(path, summary.rejected, ["file", "reason"], "rejected"):
        for file, reason in zip(rows["file"], rows["reason"], strict=True):
            # Reasons name their file; without it, equal reasons are equal.
            short = reason.replace(file, "…").removeprefix("…: ") if file else reason
            number[short] += 1
            example.setdefault(short, file)
    shown = sorted(number, key=lambda reason: (-number[reason], reason))
    table = [(reason, number[reason], example[reason]) for reason in shown[:REASONS]]
    rest = shown[REASONS:]
    if rest:
        table.append((f"{numerals.count(len(rest))} other reasons", sum(number[r] for r in rest), example[rest[0]]))
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
