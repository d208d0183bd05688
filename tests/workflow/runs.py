"""Runs of the workflow as a user starts them, and what they leave on disk."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[2]
SNAKEFILE = ROOT / "Snakefile"
#: For runs that ask nothing about it: a certificate is one more job to start in each.
NO_CERTIFICATE = {"certificate": {"sources": 0}}


def command(folder: Path, *arguments: str) -> list[str]:
    where = ("--snakefile", str(SNAKEFILE), "--directory", str(folder))
    return [sys.executable, "-m", "snakemake", *where, "--cores", "2", *arguments]


def snakemake(folder: Path, *arguments: str, fails: bool = False) -> str:
    """Run Snakemake in ``folder``, started from elsewhere; what it said."""
    done = subprocess.run(
        command(folder, *arguments),
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def configure(folder: Path, config: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    """Every dataset that must be the same whenever the input is."""
    with h5py.File(folder / "results" / "catalogue.h5") as file:
        tables = (name for name in ("catalogue", "rejected", "certificate") if name in file)
        names = (*tables, *(f"covariance/{kind}" for kind in file["covariance"]))
        return {name: file[name][:] for name in names}


def assert_identical(one: Path, other: Path) -> None:
    first, second = read(one), read(other)
    assert first.keys() == second.keys()
    for name, rows in first.items():
        assert rows.dtype == second[name].dtype, name
        assert rows.tobytes() == second[name].tobytes(), name


def copied(run: Path, folder: Path) -> Path:
    """A finished run to change, times of files included."""
    return Path(shutil.copytree(run, folder / "run"))


def times(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "results").glob(pattern)}


def jobs_of(run: int) -> dict[int, str]:
    """Processes of a run that do what a rule says, and their rules. They share the process group of their Snakemake."""
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,pgid=,args="], capture_output=True, text=True, check=True)
    lines = re.findall(rf"^ *(\d+) +{run} .*/scripts/\w+\.(\w+)\.py$", listed.stdout, re.MULTILINE)
    return {int(pid): rule for pid, rule in lines}
