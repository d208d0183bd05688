"""The page of benchmarks and its picture, from what the studies have stored."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import engines, hessian, scaling
from benchmarks.peers import BATCH, OURS, PEERS, SCIPY

COLOURS = dict(zip((*OURS, SCIPY), ("#1668b0", "#5aa9e6", "#d1560b"), strict=True))


def number(value) -> str:
    """Three significant digits, thousands apart."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"


def spread(values) -> str:
    """Median [least..most] of repeats."""
    if len(values) == 1:
        return number(values[0])
    return f"{number(np.median(values))} [{number(np.min(values))}..{number(np.max(values))}]"


def ratios(values, others):
    """Quotients turn by turn."""
    return np.array(values) / np.array(others)


def table(head, rows) -> str:
    """A Markdown table from cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def marginal(seconds) -> np.ndarray:
    """Images a second by which the time of the large count exceeds that of the small one, turn by turn."""
    (few, fast), (many, slow) = ((int(count), np.array(times)) for count, times in seconds.items())
    return (many - few) / (slow - fast)


def engines_section(results) -> str:
    """One table for each number of parameters."""
    parts = []
    for p, rows in results.items():
        held = "background and scale held at their true values" if p == "6" else "background and scale free"
        cells = [
            (
                name,
                row["parameters"],
                row["errors"],
                spread(row["rates"]),
                spread(ratios(row["rates"], rows[SCIPY]["rates"])),
                f"{100 * row['right'] / row['tested']:.1f}",
                row["images"],
                number(row["first"]),
            )
            for name, row in rows.items()
        ]
        head = ["fit", "free", "errors", "fits/s", "ratio to scipy", "right [%]", "images a turn", "first call [s]"]
        parts.append(f"### {p} parameters: {held}\n\n{table(head, cells)}")
    tested = results["6"][SCIPY]["tested"]
    low, high = engines.AMP
    return f"""## Fits a second

Stamps of 32 x 32 with Cauchy noise, widths 1.5 to 3.2 px, amplitude/scale log-uniform, {low} to {high}, no mask,
no noise map. A process a core, pinned to it, one thread each; all fits in turns on the same cores. Compiling is not
counted: the first call, of {tested} images, is given beside.

- *Start*: this package finds its own start in the pixels. All others start from the truth with a small offset
  (0.3 px, 20 % in amplitude and scale, 15 % in width), the same for all.
- *Right*: the nll, computed in float64, is no more than {engines.EXCESS} above the minimum that Newton's method reaches
  from the truth with the same free parameters. One rule for all rows, on the same first {tested} images; faster rows
  fit more images a turn, from the same drawing. Harder than the rule of calibration.md: near amplitude/scale 5 an image
  in a few hundred has two minima, and who starts at the truth finds the deeper one more often.
- *Free*: scipy, lmfit and astropy minimise sums of squares and cannot free the scale: there they have 7 parameters.
- *float32* is what this package and the vmapped minimisers compute in, and the type of the pixels that they get;
  NumPy's peers are always in float64.
- astropy has no robust loss: it gets roots of the pixels' nll for residuals, which has the same minimum. The vmapped
  minimisers run {BATCH} images at a time, the fastest of several.

{chr(10).join(part + chr(10) for part in parts)}"""


def hessian_section(results) -> str:
    """Time and memory for one large image."""
    whole = results[hessian.AUTODIFF]["side"]
    cells = []
    for name, row in results.items():
        scaled = (whole / row["side"]) ** 2
        note = "" if scaled == 1 else f" (measured {row['side']} x {row['side']}, times {number(scaled)})"
        cells.append(
            (
                name + note,
                spread(scaled * np.array(row["seconds"])),
                spread(row["memory"]) if scaled == 1 else "",
                "reference" if name == hessian.AUTODIFF else f"{row['error']:.1e}",
                number(scaled * np.median(row["seconds"]) / np.median(results[hessian.MOMENTS]["seconds"])),
            )
        )
    head = ["way", "seconds", "peak memory [MB]", "largest error", "time / moments"]
    return f"""## Value, gradient and Hessian of one {whole} x {whole} image

float64, 8 parameters; each in a process of its own that may use all cores. Memory is the peak during the call that is
timed, above that of the process with JAX started and the image in it. The error is that of the Hessian's entries
against automatic differentiation, in units of sqrt(H_ii H_jj). numdifftools ran once; on NumPy on a smaller image,
its time scaled by the number of pixels.

{table(head, cells)}
"""


def sizes_section(results) -> str:
    """Rates and cost a pixel against the side."""
    double, single, scipy = (results[name] for name in (*OURS, SCIPY))
    cells = [
        (
            f"{side} x {side}",
            spread(double[side]),
            spread(single[side]),
            spread(scipy[side]),
            spread(ratios(double[side], scipy[side])),
            spread(ratios(single[side], scipy[side])),
        )
        for side in double
    ]
    head = ["image", "float64 [1/s]", "float32 [1/s]", "scipy, 7 parameters [1/s]", "ratio, float64", "ratio, float32"]
    return f"""## Cost against the size of the image

Eight parameters, the same sources in larger and larger images; otherwise as above.

{table(head, cells)}
"""


def counts_section(results) -> str:
    """Time and memory against the count."""
    cells = [
        (
            f"{int(count):,}",
            spread(row["seconds"]),
            number(int(count) / np.median(row["seconds"])),
            spread(row["memory"]),
        )
        for count, row in results["counts"].items()
    ]
    slope = "" if results["slope"] is None else f" From 1,000 up, log time rises by {results['slope']:.3f} a log count."
    return f"""## Cost against the number of images

Eight parameters, float64, one process on one core, chunk by chunk ({scaling.CHUNK} images, as many as a job reads at a
time); drawing the images is not counted. Peak memory is that of the whole process.{slope}

{table(["images", "seconds", "images/s", "peak memory [MB]"], cells)}
"""


def pipeline_section(results) -> str:
    """Marginal rate and fixed cost of the whole workflow."""
    cells = []
    for precision, seconds in results["seconds"].items():
        rate = marginal(seconds)
        (few, fast), (many, slow) = seconds.items()
        fixed = np.array(slow) - int(many) / rate
        cells.append(
            (precision, spread(fast), spread(slow), spread(rate), spread(fixed), spread(ratios(rate, results["scipy"])))
        )
    few, many = (f"{int(count):,}" for count in next(iter(results["seconds"].values())))
    head = ["precision", f"{few} images [s]", f"{many} images [s]", "images/s, marginal", "fixed [s]", "ratio to scipy"]
    return f"""## The whole workflow

From one FITS stack (float32, 32 x 32) to the merged catalogue, by Snakemake with a job a core; compiled programs were
there. The marginal rate is the difference of the counts over that of the times; the rest is fixed: Snakemake, imports,
loading of programs. Scipy ran in turns with it, at {spread(results["scipy"])} fits/s (7 parameters, no files).

{table(head, cells)}
"""


def stores_section(results) -> str:
    """What reading costs, by store."""
    count = results["count"]
    cells = []
    for name, row in results["stores"].items():
        read, fit = np.array(row["read"]), np.array(row["fit"])
        cells.append(
            (
                name,
                number(row["bytes"] / count),
                spread(row["scan"]),
                spread(count / read),
                number(row["bytes"] / 1e6 / np.median(read)),
                spread(100 * (np.array(row["scan"]) + read) / fit),
                spread(row["run"]),
                spread(count / np.array(row["run"])),
            )
        )
    head = (
        "bytes an image",
        "scan [s]",
        "read, images/s",
        "MB/s",
        "scan and read [% of fits]",
        "run [s]",
        "run, images/s",
    )
    return f"""## Ways to keep many stamps

{count:,} stamps of 32 x 32 pixels (float32): read by one core as a fit reads them, and run whole by Snakemake, a job a
core and four shards a core. Files were in the cache of the system, compiled programs there. *Scan and read*: their time
over that of the fits (reading included, the start of processes not), both on one core.

{table(["store", *head], cells)}
"""


def scale_section(results) -> str:
    """What large runs took."""
    cells = []
    for name, row in results.items():
        rules = sorted(row["rules"].items(), key=lambda item: -item[1][1])
        text = ", ".join(f"{jobs} {rule} {number(seconds)} s" for rule, (jobs, seconds) in rules)
        cells.append((name, f"{row['count']:,}", number(row["seconds"]), number(row["memory"]), text))
    return f"""## A million stamps

Runs by Snakemake with a job a core and default settings; compiled programs were there. Peak memory is the most that one
process held.

{table(["store", "images", "run [s]", "peak memory [MB]", "jobs, and their seconds together"], cells)}
"""


def changes_section(results) -> str:
    """What a change of one file cost."""
    cells = [
        (
            name,
            f"{row['seconds']:.0f}",
            ", ".join(f"{n} {rule}" for rule, n in row["jobs"].items()) or "none",
            row["fitted"],
        )
        for name, row in results["changes"].items()
    ]
    return f"""## One file of many

{results["count"]:,} single files of 32 x 32 pixels, and the same command after each change.

{table(["change", "run [s]", "jobs", "images fitted"], cells)}
"""


SECTIONS = {
    "engines": engines_section,
    "pipeline": pipeline_section,
    "hessian": hessian_section,
    "sizes": sizes_section,
    "counts": counts_section,
    "stores": stores_section,
    "scale": scale_section,
    "changes": changes_section,
}


def summary(stored) -> str:
    """The few numbers that a reader came for."""
    lines = []
    if "engines" in stored:
        for p, rows in stored["engines"]["results"].items():
            for name in OURS:
                row = rows[name]
                best = {
                    other: r
                    for other, r in rows.items()
                    if other not in OURS
                    and r["right"] >= 0.9 * r["tested"]
                    and not ("float64" in name and "float32" in other)
                }
                fastest = max(best, key=lambda other: np.median(best[other]["rates"]))
                lines.append(
                    f"{p} parameters, {name}: {spread(row['rates'])} fits/s with four covariances each, "
                    f"{spread(ratios(row['rates'], rows[SCIPY]['rates']))} times scipy's rate, "
                    f"{number(np.median(ratios(row['rates'], best[fastest]['rates'])))} times that of the fastest peer "
                    f"({fastest}), which gives {best[fastest]['errors']} for errors."
                )
    if "pipeline" in stored:
        results = stored["pipeline"]["results"]
        for precision, seconds in results["seconds"].items():
            rate = marginal(seconds)
            lines.append(
                f"The whole workflow, {precision}: {spread(rate)} images/s more, "
                f"{spread(ratios(rate, results['scipy']))} times scipy's bare fits."
            )
    if "hessian" in stored:
        results = stored["hessian"]["results"]
        ours, other = results[hessian.MOMENTS], results[hessian.AUTODIFF]
        lines.append(
            f"Hessian of a {ours['side']} x {ours['side']} image: {spread(ours['seconds'])} s and "
            f"{number(np.median(ours['memory']))} MB, against {spread(other['seconds'])} s and "
            f"{number(np.median(other['memory']))} MB by automatic differentiation."
        )
    if "scale" in stored:
        for name, row in stored["scale"]["results"].items():
            lines.append(
                f"{row['count']:,} stamps ({name}) from the files to the catalogue: {number(row['seconds'])} s, "
                f"{number(row['count'] / row['seconds'])} images/s, no process above {number(row['memory'])} MB."
            )
    return "\n".join(f"- {line}" for line in lines)


def machines(stored) -> str:
    """Where and with what each study ran."""
    shown = ("date", "processor", "cores", "load before", "system", "this package", "Python")
    cells = []
    texts: dict = {"Packages": {}, "Settings": {}}
    for name, study in stored.items():
        machine = study["machine"]
        cells.append((name, *(machine[key] for key in shown), f"{study['seconds'] / 60:.1f}"))
        packages = {key: value for key, value in machine.items() if key not in shown}
        for what, facts in (("Packages", packages), ("Settings", study["settings"])):
            text = ", ".join(f"{key} {value}" for key, value in facts.items())
            texts[what].setdefault(text, []).append(name)
    lines = [f"{what} of {', '.join(names)}: {text}." for what, found in texts.items() for text, names in found.items()]
    return f"""## Machine

{table(["study", *shown, "minutes"], cells)}

{(chr(10) * 2).join(lines)}
"""


def write(stored, folder: Path) -> None:
    """Write ``benchmarks.md`` and ``pictures/benchmarks.png`` into ``folder``."""
    sections = [make(stored[name]["results"]) for name, make in SECTIONS.items() if name in stored]
    missing = [name for name in SECTIONS if name not in stored]
    drawn = [panel for name, panel in PANELS.items() if name in stored]
    picture = f"![{'; '.join(panel.text for panel in drawn)}](pictures/benchmarks.png)\n\n" if drawn else ""
    page = f"""# Benchmarks

Written by `make bench`: this package against what a user would take instead, on the same images and the same cores, in
one run, in turns. Numbers are medians of the turns with [least..most]; ratios are taken turn by turn, since the
machine's speed drifts. Trust ratios, not rates: those are this machine's, under the load it had.

{summary(stored)}

What this does not say: the peers are general, and fit any model as it comes; all but the vmapped ones pay Python for
each image, and a program written for one model in C would not. They start near the truth, which nobody knows. This
package compiles first (column *first call*), and for a few hundred images that is most of its time; the workflow keeps
what it has compiled. Real images have masks and noise maps.

{picture}{chr(10).join([*sections, machines(stored)])}"""
    if missing:
        page += f"\nNot run: {', '.join(missing)}.\n"
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.md").write_text(page)
    # Without the version of matplotlib in it, the file depends on the picture alone.
    if drawn:
        draw(stored).savefig(folder / "pictures" / "benchmarks.png", dpi=150, metadata={"Software": None})


def plain(name) -> str:
    """A row's name without Markdown."""
    return name.replace("`", "").replace("*", "").replace("numerical", "num.").replace("analytic", "anal.")


def draw_engines(study, axes) -> None:
    """Rates by peer."""
    rows = study["results"]["8"]
    names = [name for name in PEERS if name in rows][::-1]
    for i, name in enumerate(names):
        rates = rows[name]["rates"]
        middle = np.median(rates)
        axes.barh(i, middle, color=COLOURS["**this package, float64**"] if name in OURS else "#b0b0b0")
        axes.plot([min(rates), max(rates)], [i, i], color="k", lw=1.2)
        axes.text(1.15 * max(rates), i, number(middle), va="center", fontsize=8.5)
    axes.set(xscale="log", xlabel="fits a second, all cores", title="8 parameters (scipy, lmfit, astropy: 7)")
    axes.set_yticks(range(len(names)), [plain(name) for name in names], fontsize=8.5)
    rates = [rate for row in rows.values() for rate in row["rates"]]
    axes.set_xlim(10 ** np.floor(np.log10(min(rates))), 6 * max(rates))


def draw_sizes(study, axes) -> None:
    """Time of a fit against the side of the image."""
    for name, row in study["results"].items():
        x = [int(side) for side in row]
        cost = [1e3 * study["cores"] / np.array(rates) for rates in row.values()]
        axes.plot(x, [np.median(times) for times in cost], "o-", ms=4, color=COLOURS[name], label=plain(name))
        axes.fill_between(x, *zip(*((t.min(), t.max()) for t in cost), strict=True), color=COLOURS[name], alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="side of the image [px]", title="time of a fit on a core [ms]")
    axes.set_xticks(x, [str(side) for side in x])
    axes.minorticks_off()
    axes.set_ylim(top=4 * axes.get_ylim()[1])
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def draw_counts(study, axes) -> None:
    """Time and memory against the count."""
    rows = study["results"]["counts"]
    x = [int(count) for count in rows]
    axes.plot(x, [np.median(row["seconds"]) for row in rows.values()], "o-", ms=4, color=COLOURS[scaling.DOUBLE])
    axes.set(xscale="log", yscale="log", xlabel="images", title="time on one core [s]; peak memory [MB]")
    memory = axes.twinx()
    memory.plot(x, [np.median(row["memory"]) for row in rows.values()], "s--", ms=4, color="#777777")
    memory.set_ylim(bottom=0)
    memory.spines["top"].set_visible(False)
    memory.set_ylabel("peak memory [MB]", color="#777777")
    axes.set_ylabel("seconds", color=COLOURS[scaling.DOUBLE])


class Panel(NamedTuple):
    """A part of the picture: ``draw(study, axes)``, what it shows, and its width beside others."""

    draw: Callable
    text: str
    width: float


#: By study.
PANELS = {
    "engines": Panel(draw_engines, "rates by peer", 1.6),
    "sizes": Panel(draw_sizes, "time of a fit against the side of the image", 1.0),
    "counts": Panel(draw_counts, "time and memory against the count", 1.0),
}


def draw(stored) -> plt.Figure:
    """The panels of those studies that were run."""
    panels = {name: panel for name, panel in PANELS.items() if name in stored}
    widths = [panel.width for panel in panels.values()]
    figure, row = plt.subplots(1, len(panels), figsize=(4 * sum(widths), 4.6), width_ratios=widths, squeeze=False)
    for (name, panel), axes in zip(panels.items(), row[0], strict=True):
        panel.draw(stored[name], axes)
        axes.title.set_fontsize(10)
        axes.spines["top"].set_visible(False)
        axes.spines["right"].set_visible(False)
    figure.tight_layout()
    return figure
