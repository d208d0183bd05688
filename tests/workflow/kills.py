"""A study: runs killed (SIGKILL) at random moments and taken up by the same command.

    .venv/bin/python -m tests.workflow.kills

Each kill hits a fresh run: all of it at once, its driver alone, or one of its jobs alone. What must hold: at the kill
every file under its final name is whole; the second run succeeds, its catalogue is that of an undisturbed run to the
bit, no shard that the first had finished is fitted again, and no temporary file is left.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import astropy.io.fits
import h5py

from pipeline.origin import digest_in_header
from pipeline.shards import read_manifest
from tests.workflow.runs import assert_identical, command, configure, jobs_of, snakemake, times

CONFIG = {"simulated": {"count": 12, "shape": [16, 16]}, "shard_size": 3}
VICTIMS = ("all", "driver", "job")


def fits(said: str) -> tuple[set[str], set[str]]:
    """Shards whose fit a run says it began, and those whose fit it says has ended well."""
    began = dict(re.findall(r"^Job (\d+): Fitting the images of shard (\S+)", said, re.MULTILINE))
    ended = re.findall(r"^Finished jobid: (\d+) \(Rule: fit\)", said, re.MULTILINE)
    return set(began.values()), {began[number] for number in ended}


def assert_whole(folder: Path) -> None:
    """Every file under its final name can be read."""
    read = {
        ".h5": lambda path: h5py.File(path).close(),
        ".fits": check_fits,
        ".csv": read_manifest,
        ".json": check_json,
    }
    for path in (folder / "results").rglob("*"):
        if path.suffix in read:
            read[path.suffix](path)


def check_fits(path: Path) -> None:
    with astropy.io.fits.open(path) as hdus:
        assert hdus[-1].data is not None
    assert digest_in_header(path), path


def check_json(path: Path) -> None:
    assert json.loads(path.read_text())["config"], path


def kill(run: subprocess.Popen, victim: str) -> str:
    """What the jobs did when they were hit; "" if the run had ended before."""
    jobs = jobs_of(run.pid)
    while victim == "job" and not jobs and run.poll() is None:
        time.sleep(0.01)
        jobs = jobs_of(run.pid)
    if run.poll() is not None:
        return ""
    with contextlib.suppress(ProcessLookupError):
        if victim == "all":
            os.killpg(run.pid, signal.SIGKILL)
        else:
            os.kill(run.pid if victim == "driver" else min(jobs), signal.SIGKILL)
    run.wait()
    return ", ".join(sorted(jobs.values())) or "no job"


def survivors(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def killed(folder: Path, reference: Path, victim: str, seconds: float) -> str:
    """One run, killed after ``seconds`` and taken up again; a row of the table, "" if it had ended before."""
    said = configure(folder, CONFIG) / "said.txt"
    with said.open("w") as stream:
        run = subprocess.Popen(command(folder), start_new_session=True, stdout=stream, stderr=stream)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(seconds)
    if not (doing := kill(run, victim)):
        return ""
    assert_whole(folder)
    _, finished = fits(said.read_text())
    again, _ = fits(snakemake(folder))
    assert not finished & again, f"{finished & again} fitted twice"
    assert_identical(folder, reference)
    while survivors(run.pid):  # jobs that outlive their driver
        time.sleep(0.1)
    assert_identical(folder, reference)
    assert not times(folder, "**/*.tmp")
    assert times(folder, "cache/*").keys() == times(folder, "cache/*-cache").keys()
    return f"| {victim} | {seconds:.1f} | {doing} | {len(finished)} | {len(again)} |"


def main() -> None:
    """Print a row a kill; stop at the first that breaks the law."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="kills")
    parser.add_argument("--seed", type=int, default=1, help="of their moments")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        reference = configure(Path(folder, "reference"), CONFIG)
        began = time.monotonic()
        snakemake(reference)
        whole = time.monotonic() - began
        print(f"undisturbed: {whole:.1f} s\n\n| killed | after [s] | at work | shards finished | fitted after |")
        print("| --- | --- | --- | --- | --- |", flush=True)
        rows = 0
        while rows < arguments.count:
            row = killed(Path(folder, "run"), reference, VICTIMS[rows % len(VICTIMS)], draw.uniform(0, whole))
            shutil.rmtree(Path(folder, "run"))
            if row:
                rows += 1
                print(row, flush=True)


if __name__ == "__main__":
    main()
