"""A study: good FITS files damaged at random, scanned and read as the jobs do.

    nice .venv/bin/python -m tests.workflow.fuzz --minutes 15

The files are those of `tests.damage` and the small real images beside the checkout, some in gzip or bzip2.
Each damaged one is looked at by a process of its own. What must hold: it ends, by itself, soon, in little memory; every
image announced is a row or is rejected with a reason that a person understands; nothing is written but below the folder
of results, no temporary file is left, nothing is asked of the network, no program is started. What breaks the law is
kept in --keep, and told of at the end; with a file and its settings as arguments, one is looked at again.
"""

import argparse
import bz2
import collections
import gzip
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np

from pipeline import batches, hdus, sky
from pipeline.config import check_config
from pipeline.cutouts import scan_stamps
from pipeline.images import scan_file
from pipeline.shards import assign, read_manifest, write_manifests
from tests.damage import damaged, good_files

SECONDS = 20  # until a process is taken for one that hangs
#: Address space beyond that of the process as it begins: more than an honest small file needs by far.
SPACE = 3 << 30
#: Memory in use beyond that of the process as it begins [bytes].
GROWTH = 256 << 20
JARGON = re.compile(r"Traceback|[A-Za-z]*(Error|Exception|Warning)\b|\b0x[0-9a-f]+|[\0-\x1f]")

#: Settings of `images` under which files are read.
SETTINGS: dict[str, dict] = {
    "auto": {},
    "all": {"hdu": "all", "saturation": 240.0, "carry": ["SATURATE", "BMAJ", "OBJECT"]},
    "named": {"hdu": [0, 1, "SCI", 9], "saturation": "SATURATE"},
    "maps": {"hdu": "SCI", "mask": {"hdu": "DQ", "bits": [0, 33]}, "uncertainty": "ERR", "background": 1},
    "table": {"column": "FLUX", "carry": ["TIME", "QUALITY"]},
    "table with maps": {
        "column": "FLUX",
        "uncertainty": {"column": "FLUX_ERR"},
        "mask": {"column": "QUALITY", "bits": [2, 63]},
    },
    "detected": {"cutouts": {"detect": {"threshold": 3.0}, "size": 9}},
    "in pixels": {"hdu": "all", "cutouts": {"positions": "pixels.csv", "size": 12}},
    "on the sky": {"hdu": "all", "cutouts": {"positions": "sky.csv", "size": 12}},
    "in a table": {"column": "FLUX", "mask": {"column": "QUALITY"}, "cutouts": {"positions": "pixels.csv", "size": 12}},
}


def examine(file: str, section: dict, folder: Path) -> dict[str, int]:
    """Scan and read a file, and hold the laws; how many rows it gave, and how many reasons."""
    reading = check_config({"source": "images", "images": {"files": [file], **section}})["images"]
    del reading["files"]
    kept = {"folder": folder / "detections"}
    look = scan_file if reading["cutouts"] is None else scan_stamps
    blocks, rejected = look(file, **reading, **({} if reading["cutouts"] is None else kept))
    assert blocks or rejected, "neither images nor a reason"
    images = sum(block.stop - block.start for block in blocks)
    names = write_manifests(folder / "manifests", assign(blocks, 50000, rejected))
    manifests = [read_manifest(folder / "manifests" / f"{name}.csv") for name in names]
    refused = [row for _, rows in manifests for row in rows]
    assert len(refused) == len(rejected), "manifests lose reasons"
    before, rows = len(refused), 0
    for block in (block for blocks, _ in manifests for block in blocks):
        for pieces in batches.of_blocks([block], reading | kept, refused):
            data, mask, noise = batches.joined(pieces)
            rows += len(data)
            assert data.dtype in (np.float32, np.float64), f"pixels are {data.dtype}"
            assert np.isfinite(data[~mask]).all(), "a pixel is used that has no number"
            assert noise is None or ((noise > 0) & np.isfinite(noise)).all(), "an uncertainty is none"
            for piece in pieces:
                sky._points(
                    piece.sky.wcs, np.array([3.3, -1e3, np.nan]), np.array([4.1, 1e4, 0.0])
                )  # it compiles nothing
            for name in reading["carry"]:
                assert sum(len(piece.carried[name]) for piece in pieces) == len(data), f"{name} is not one a row"
    planes = sum(
        max(1, np.unique(b.stamps[:, 0]).size if b.stamps is not None else 0) for bs, _ in manifests for b in bs
    )
    assert rows <= images, "more rows than images"
    assert rows + len(refused) - before >= min(images, planes), "images are lost"
    for reason in {row.reason for row in refused}:
        told = reason.replace(file, "FILE")
        assert not JARGON.search(told), f"a reason for programmers: {told}"
        assert len(told.split()) > 3, f"a reason in too few words: {told}"
        assert not re.search("not enough memory|Cannot allocate", told), f"memory by claim: {told}"
    return {"rows": rows, "reasons": len(refused)}


def watched(file: Path, section: dict, folder: Path) -> str:
    """The law that `examine` breaks in a process of its own; "" if none."""
    outcome = folder / "outcome"
    outcome.write_text("")
    child = os.fork()
    if not child:
        _examine_and_exit(file, section, folder, outcome)
    _, status, used = os.wait4(child, 0)
    told = outcome.read_text()
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"no end within {SECONDS} s" if name == "SIGALRM" else f"crash: {name}"
    grown = (used.ru_maxrss - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
    if grown > GROWTH + 40 * file.stat().st_size:
        return f"memory: {grown >> 20} MiB for a file of {file.stat().st_size} bytes; {told}"
    return told


def _examine_and_exit(file: Path, section: dict, folder: Path, outcome: Path) -> None:
    signal.alarm(SECONDS)  # its default action ends code of any language
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    told = ""
    try:
        _forbid(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            examine(str(file), section, folder / "results")
        hdus._read_layout.cache_clear()
        left = os.listdir(folder / "tmp")
        told = f"left behind: {left}" if left else ""
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-3:]
        told = f"{type(error).__name__}: {error} ({' < '.join(f'{p.name}:{p.lineno}' for p in reversed(place))})"
    outcome.write_text(told)
    os._exit(0)


def _forbid(folder: Path) -> None:
    """From now on nothing is written but below a folder, and nothing asked of network or system."""
    allowed = os.path.realpath(folder) + os.sep

    def audit(event: str, given: tuple) -> None:
        if event == "open":
            name, mode, flags = given
            by_flags = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            paths = [name] if by_flags or (isinstance(mode, str) and set(mode) & set("wax+")) else []
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"):
            paths = given[:2] if event == "os.rename" else given[:1]
        elif event in ("os.symlink", "os.link"):
            paths = given[1:2]
        elif event in (
            "socket.connect",
            "socket.getaddrinfo",
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "urllib.Request",
        ):
            msg = f"{event} {given}"
            raise PermissionError(msg)
        else:
            return
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike) and not os.path.realpath(os.fsdecode(path)).startswith(
                allowed
            ):
                raise KeyboardInterrupt(f"{event} {path}")  # noqa: EM102  (nobody catches it on the way)

    sys.addaudithook(audit)


def begin_with() -> dict[str, bytes]:
    """Good files by name, those of `tests.damage` and the small real ones beside the checkout."""
    found = good_files()
    real = Path(__file__).resolve().parents[3] / "shared" / "data"
    for path in sorted(real.rglob("*.fits*")):
        raw = path.read_bytes()
        for magic, unpack in ((b"\x1f\x8b", gzip.decompress), (b"BZh", bz2.decompress)):
            if raw.startswith(magic):
                raw = unpack(raw)
        if 2880 <= len(raw) <= 200_000:
            found[path.name] = raw
    return found


def _packed(raw: bytes, draw: random.Random) -> bytes:
    """The file itself, most of the time; or in gzip or bzip2, which may be damaged too."""
    kind = draw.randrange(12)
    if kind > 1:
        return raw
    packed = bytearray(gzip.compress(raw, 1, mtime=0) if kind else bz2.compress(raw, 1))
    if draw.random() < 0.5:
        packed[draw.randrange(len(packed))] ^= 1 << draw.randrange(8)
    return bytes(packed)


def prepare(folder: Path) -> None:
    """What `examine` needs in the folder where it runs, and nothing else."""
    for name in ("results", "tmp"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    (folder / "pixels.csv").write_text("x,y\n9.3,12.4\n3.2,4.1\n0,0\n60.5,60.5\n")
    (folder / "sky.csv").write_text("ra,dec\n150,2\n150.003,2.002\n287.9,-66.3\n250.42,36.46\n")


def main() -> None:
    """Print what was looked at, and what broke the law."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--count", type=float, default=math.inf, help="files, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--keep", type=Path, default=Path("results/fuzz"), help="folder of the files that broke the law"
    )
    parser.add_argument("--again", nargs=2, metavar=("FILE", "SETTINGS"), help=f"one of: {', '.join(SETTINGS)}")
    given = parser.parse_args()
    if given.again:
        given.again[0] = os.path.abspath(given.again[0])
    given.keep = given.keep.absolute()
    good = {} if given.again else begin_with()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        prepare(folder)
        tempfile.tempdir = str(folder / "tmp")
        if given.again:
            print(examine(given.again[0], SETTINGS[given.again[1]], folder / "results"))
            hdus._read_layout.cache_clear()
            return
        _study(given, good, folder)


def _study(given: argparse.Namespace, good: dict[str, bytes], folder: Path) -> None:
    file = folder / "a.fits"
    for section in SETTINGS.values():  # what is imported late is so before it may break a law
        for raw in good_files().values():
            file.write_bytes(raw)
            prepare(folder)
            examine(str(file), section, folder / "results")
    began, latest, number = time.monotonic(), 0.0, 0
    broken: dict[str, list[str]] = collections.defaultdict(list)
    while number < given.count and time.monotonic() - began < 60 * given.minutes:
        draw = random.Random(f"{given.seed} {number}")
        number += 1
        origin, key = draw.choice(sorted(good)), draw.choice(sorted(SETTINGS))
        raw = _packed(damaged(good[origin], draw), draw)
        if not raw:
            continue
        file.write_bytes(raw)
        prepare(folder)
        law = watched(file, SETTINGS[key], folder)
        if law:
            kept = given.keep / f"{given.seed}-{number}.fits"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(raw)
            broken[re.sub(r"\d+", "N", law)].append(f"{kept} {json.dumps(key)} from {origin}: {law}")
        if time.monotonic() - latest > 60:
            latest = time.monotonic()
            print(f"{number} files, {sum(map(len, broken.values()))} broke the law", file=sys.stderr, flush=True)
    print(f"{number} files in {(time.monotonic() - began) / 60:.1f} minutes, {len(good)} good ones to begin with")
    for cases in broken.values():
        print(f"{len(cases)} times, the first: {cases[0]}")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
