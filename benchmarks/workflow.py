"""The whole workflow, from a FITS stack to the merged catalogue: what one image more costs, and what a run costs."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml

from benchmarks import engines, workers
from benchmarks.peers import SCIPY
from pipeline import simulate
from pipeline.catalogue import read_rows
from pipeline.config import check_config

ROOT = Path(__file__).resolve().parents[1]

#: Runs a command, and says what most its processes held. Between us, because a process starts with the peak of the one
#: that starts it, and we have drawn the images.
MOST = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


class Run(NamedTuple):
    """What a run took: seconds, the most memory that one of its processes held [MB], and what it said."""

    seconds: float
    memory: float
    said: str


def snakemake(folder: Path, config: dict) -> Run:
    """A run by a config in a folder, as far as the catalogue, one job a core."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    where = ("--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder), "--cores", str(len(workers.cores())))
    words = [sys.executable, "-m", "snakemake", *where, "results/catalogue.h5"]
    with tempfile.TemporaryFile("w+") as said:
        began = workers.clock()
        done = subprocess.run([sys.executable, "-c", MOST, *words], stdout=subprocess.PIPE, stderr=said, check=False)
        seconds = workers.clock() - began
        said.seek(0)
        text = said.read()
    if done.returncode:
        raise RuntimeError(text)
    return Run(seconds, int(done.stdout) / (1e6 if sys.platform == "darwin" else 1e3), text)


def expect(folder: Path, count: int) -> None:
    """Raise unless the catalogue in a folder has ``count`` rows."""
    rows = len(read_rows(folder / "results" / "catalogue.h5", ["flags"])["flags"])
    if rows != count:
        msg = f"{folder}: got a catalogue of {rows} rows, wanted {count}"
        raise RuntimeError(msg)


def catalogue(stack: Path, count: int, precision: str) -> float:
    """Seconds that Snakemake takes for the catalogue of a stack, one job a core, in a new folder."""
    folder = Path(tempfile.mkdtemp(dir=stack.parent))
    config = {
        "source": "images",
        "images": {"files": [str(stack)]},
        "fit": {"precision": precision},
        "shard_size": -(-count // len(workers.cores())),
    }
    run = snakemake(folder, config)
    expect(folder, count)
    shutil.rmtree(folder)
    return run.seconds


def study(arguments) -> dict:
    """Seconds of every repeat for two counts and both precisions, and scipy's rates [1/s] in the turns between."""
    large = arguments.stamps
    counts = (large // 4, large)
    rows: dict = {precision: {str(count): [] for count in counts} for precision in ("float64", "float32")}
    rates = []
    simulated = check_config({})["simulated"] | {"noise": {"kind": "cauchy", "scale": 1.0}}
    del simulated["count"]
    with tempfile.TemporaryDirectory() as folder, workers.one_a_core() as processes:
        stacks = {count: Path(folder, f"{count}.fits") for count in counts}
        for count, stack in stacks.items():
            write = processes[0].submit(simulate.write_stack, stack, stack.with_suffix(".truth"), 0, count, **simulated)
            write.result()
        each = max(1, arguments.count // 4)
        workers.race(processes, engines.run, SCIPY, 8, 10, 0, each)
        for precision in rows:  # fills the cache of compiled programs
            catalogue(stacks[counts[0]], counts[0], precision)
        for _ in range(arguments.repeats):
            for precision, row in rows.items():
                for count, seconds in row.items():
                    seconds.append(catalogue(stacks[int(count)], int(count), precision))
                    print(f"workflow, {precision}, {count} images: {seconds[-1]:.1f} s", flush=True)
            seconds, _ = workers.race(processes, engines.run, SCIPY, 8, each, 0, each)
            rates.append(len(processes) * each / seconds)
            print(f"scipy: {rates[-1]:.0f}/s", flush=True)
    return {"seconds": rows, "scipy": rates}
