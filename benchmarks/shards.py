"""What a fit job costs before and while it fits, and from which shard size on its start no longer matters.

    .venv/bin/python -m benchmarks.shards

Each line of the table is the median of jobs in processes of their own, on one core, as a run has them. The curve is the
share of a job's time that goes to its start.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from astropy.io import fits

from benchmarks import workers
from pipeline import images
from pipeline.config import check_config

#: What of a job's time its start is allowed to take.
SHARE = 0.05
PAGE = Path(__file__).resolve().parents[1] / "docs" / "shards.md"
PICTURE = PAGE.parent / "pictures" / "shards.png"
READING = dict.fromkeys(("column", "mask", "uncertainty", "cutouts"))


def job(stack: str, single: str, cache: str, gpu: str) -> dict[str, float]:
    """Seconds that the stages of a fit job take in this process; peak memory [MB]."""
    told = {}

    def timed(stage: str, do: Callable):
        began = time.monotonic()
        result = do()
        told[stage] = time.monotonic() - began
        return result

    def load() -> Callable:
        from pipeline import jobs, runtime  # noqa: F401  (all that a job imports)

        runtime.start_jax(threads=1, gpu=int(gpu), cache=cache)
        from pipeline.fit import fit_rows

        return fit_rows

    def read(files: list[str]) -> np.ndarray:
        blocks = [block for file in files for block in images.scan_file(file, hdu="auto", **READING)[0]]
        return np.concatenate(
            [images.read_planes(block, block.start, block.stop, hdu="auto", **READING).data for block in blocks]
        )

    fit_rows = timed("import", load)
    data = timed("read", lambda: read([stack]))
    timed("read files", lambda: read(sorted(map(str, Path(single).iterdir()))))
    timed("compile", lambda: fit_rows(data[:1]))
    timed("fit", lambda: fit_rows(data))
    return told | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure(folder: Path, side: int, count: int, repeats: int, gpu: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Stages of a first job, which compiles, and of later ones; what scales with the images is per image."""
    from pipeline.simulate import write_stack  # here, because a job begins without JAX

    settings = check_config({"simulated": {"count": count, "shape": [side, side]}})["simulated"]
    stack, single, cache = folder / "stack.fits", folder / "single", folder / "cache"
    write_stack(
        stack,
        folder / "truth.fits",
        0,
        count,
        **{key: settings[key] for key in ("shape", "seed", "noise", "parameters")},
    )
    single.mkdir()
    for number, plane in enumerate(fits.getdata(stack)):
        fits.PrimaryHDU(plane).writeto(single / f"{number:06d}.fits")
    words = [sys.executable, "-m", "benchmarks.shards", "--job", str(stack), str(single), str(cache), str(int(gpu))]
    runs = []
    for _ in range(1 + repeats):
        began = time.monotonic()
        done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
        run = json.loads(done.stdout)
        run["process"] = time.monotonic() - began - sum(run[stage] for stage in run if stage != "memory")
        runs.append(run | {stage: run[stage] / count for stage in ("read", "read files", "fit")})
    return runs[0], {stage: statistics.median(run[stage] for run in runs[1:]) for stage in runs[0]}


def draw(curves: dict[str, tuple[float, float]]) -> None:
    """The share that the start takes, over the images in a shard; curves: seconds of start and seconds an image."""
    import matplotlib.pyplot as plt

    sizes = np.geomspace(100, 1e6, 200)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, (start, each) in curves.items():
        axes.plot(sizes, start / (start + sizes * each), label=name)
    axes.axhline(SHARE, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="images in a shard", ylabel="share of the start", ylim=(1e-3, 1))
    axes.legend()
    figure.savefig(PICTURE, dpi=150)


def main() -> None:
    """Measure, print the table, draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32, 64], help="images are side x side pixels")
    parser.add_argument("--count", type=int, default=2000, help="images fitted to measure")
    parser.add_argument("--repeats", type=int, default=3, help="jobs after the first")
    parser.add_argument("--submission", type=float, default=8, help="seconds that a cluster adds to each start")
    parser.add_argument("--gpu", action="store_true", help="fit on the GPU")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(job(*arguments.job)))
        return
    os.environ |= {"JAX_ENABLE_X64": "1", "MPLBACKEND": "agg"}
    lines = [
        "| side [px] | process [s] | import [s] | first compile [s] | later [s] | read, stack [ms] | read, files [ms] "
        f"| fit [ms] | peak [MB] | images for {SHARE:.0%} | on a cluster |",
        "|" + " --- |" * 11,
    ]
    curves = {}
    for side in arguments.sides:
        print(f"{side} x {side}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            first, later = measure(Path(folder), side, arguments.count, arguments.repeats, arguments.gpu)
        each = later["read"] + later["fit"]
        start = later["process"] + later["import"] + later["compile"]
        enough = []
        for where, added in (("here", 0), ("on a cluster", arguments.submission)):
            curves[f"{side} x {side}, {where}"] = start + added, each
            enough.append(round((1 / SHARE - 1) * (start + added) / each, -2))
        shown = (later["process"], later["import"], first["compile"], later["compile"])
        per_image = (1000 * later[stage] for stage in ("read", "read files", "fit"))
        lines.append(
            f"| {side} | {' | '.join(f'{value:.1f}' for value in shown)} | {' | '.join(f'{v:.3f}' for v in per_image)} "
            f"| {later['memory']:.0f} | {' | '.join(f'{number:.0f}' for number in enough)} |"
        )
    draw(curves)
    facts = workers.machine()
    PAGE.write_text(
        f"""# What the start of a fit costs

Written by `python -m benchmarks.shards`: {facts["processor"]}, a job on one core of {facts["cores"]}, load before
{facts["load before"]}, jax {facts["jax"]}, version {facts["this package"]}.

The stages of a job that fits {arguments.count} images, background and scale free: the median of {arguments.repeats}
jobs, but for the first compile, which is kept for the later ones. *Later*: reading what was traced and compiled.
Reading and fitting are per image. The last columns tell from how many images a shard on the start takes less than
{SHARE:.0%} of a job; a cluster adds {arguments.submission:g} s to each start, in which Snakemake starts twice.

{chr(10).join(lines)}

![the share of the start](pictures/{PICTURE.name})
"""
    )
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
