"""Ways to keep many stamps: how fast each is read and fitted, at 10^6 too, and what a change of one file costs."""

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from astropy.io import fits

from benchmarks import workers
from benchmarks.workflow import expect, snakemake
from pipeline import batches
from pipeline.catalogue import read_origin
from pipeline.config import check_config
from pipeline.images import scan_file
from pipeline.listing import list_files
from pipeline.shards import read_manifest
from tests import stamps

SIDE = 32
#: Images drawn at a time; stacks have as many planes at most as a file of a survey.
CHUNK = 1000


def draw(number: int) -> np.ndarray:
    """Stamps number ``number * CHUNK`` and following, float32 (CHUNK, SIDE, SIDE)."""
    return stamps.draw(CHUNK, (5.0, 1e3), seed=7000 + number)[0].astype(np.float32)


def _cube(folder: Path, count: int) -> None:
    """Not by way of an array in memory, which for 10^6 stamps has 4 GB."""
    primary = fits.PrimaryHDU()
    primary.header["BITPIX"], primary.header["NAXIS"] = -32, 3
    for axis, length in enumerate((SIDE, SIDE, count), 1):
        primary.header.insert(f"NAXIS{axis - 1}" if axis > 1 else "NAXIS", (f"NAXIS{axis}", length), after=True)
    with (folder / "cube.fits").open("wb") as file:
        file.write(primary.header.tostring().encode())
        for number in range(count // CHUNK):
            file.write(draw(number).astype(">f4").tobytes())
        file.write(bytes(-file.tell() % 2880))


def _stacks(folder: Path, count: int) -> None:
    for number in range(count // CHUNK):
        fits.PrimaryHDU(draw(number)).writeto(folder / f"{number:05d}.fits")


def _single(folder: Path, count: int) -> None:
    header = fits.PrimaryHDU(np.zeros((SIDE, SIDE), np.float32)).header.tostring().encode()
    end = bytes(-(SIDE * SIDE * 4) % 2880)
    for number in range(count // CHUNK):
        # Ten thousand names in a folder, as archives keep them.
        place = folder / f"{number // 10:03d}"
        place.mkdir(exist_ok=True)
        for i, image in enumerate(draw(number).astype(">f4")):
            (place / f"{number % 10}{i:03d}.fits").write_bytes(header + image.tobytes() + end)


def _table(folder: Path, count: int) -> None:
    images = np.concatenate([draw(number) for number in range(count // CHUNK)]).reshape(count, -1)
    column = fits.Column("IMAGE", f"{SIDE * SIDE}E", dim=f"({SIDE},{SIDE})", array=images.reshape(-1, SIDE, SIDE))
    fits.BinTableHDU.from_columns([column]).writeto(folder / "table.fits")


def _compressed(folder: Path, count: int) -> None:
    for number in range(count // CHUNK):
        one = fits.CompImageHDU(draw(number), compression_type="RICE_1", tile_shape=(1, SIDE, SIDE))
        one.writeto(folder / f"{number:05d}.fits.fz")


def _zipped(folder: Path, count: int) -> None:
    for number in range(count // CHUNK):
        fits.PrimaryHDU(draw(number)).writeto(folder / f"{number:05d}.fits.gz")


STORES: dict[str, Callable[[Path, int], None]] = {
    "one cube": _cube,
    "files of 1,000": _stacks,
    "column of a table": _table,
    "Rice tiles (`.fz`)": _compressed,
    "files of 1,000, `.gz`": _zipped,
    "single files": _single,
}


def settings(store: str, files: str = "../images") -> dict:
    """The config of a run that fits all files in a folder.

    By default the one beside it, by a relative name: what it is divides single files among the shards.
    """
    column = {"column": "IMAGE"} if store == "column of a table" else {}
    return {"source": "images", "images": {"files": [files], **column}}


def divided(count: int) -> dict:
    """The part of a config by which this many images are four jobs a core, or more."""
    return {"shard_size": -(-count // (4 * len(workers.cores())))}


def warm(scratch: Path) -> None:
    """A run that fills the cache of compiled programs."""
    (scratch / "images").mkdir()
    _cube(scratch / "images", CHUNK)
    snakemake(scratch / "run", settings("one cube"))
    shutil.rmtree(scratch / "images")
    shutil.rmtree(scratch / "run")


def ingest(store: str, folder: Path, count: int) -> tuple[float, float]:
    """Seconds that one core takes to scan, and to read, all images in a folder as jobs do."""
    config = check_config(settings(store, str(folder)))["images"]
    reading = {key: value for key, value in config.items() if key != "files"} | {"folder": folder / "detections"}
    began = workers.clock()
    found, _ = list_files(config["files"])
    scanned = [scan_file(file, **{key: value for key, value in reading.items() if key != "folder"}) for file in found]
    blocks = [block for its, _ in scanned for block in its]
    between = workers.clock()
    rejected: list = []
    read = sum(len(batches.joined(pieces).data) for pieces in batches.of_blocks(blocks, reading, rejected))
    ended = workers.clock()
    if read != count:
        msg = f"{folder}: read {read} images, wanted {count}: {rejected[:3]}"
        raise RuntimeError(msg)
    return between - began, ended - between


def used(results: Path) -> dict[str, tuple[int, float]]:
    """Jobs and their seconds together, by rule, from what Snakemake has measured."""
    found: dict[str, list[float]] = {}
    for path in (results / "benchmarks").rglob("*.tsv"):
        head, line, *_ = (row.split("\t") for row in path.read_text().splitlines())
        rule = path.relative_to(results / "benchmarks").parts[0].removesuffix(".tsv")
        found.setdefault(rule, []).append(float(dict(zip(head, line, strict=True))["s"]))
    return {rule: (len(seconds), sum(seconds)) for rule, seconds in found.items()}


def fit_seconds(results: Path) -> float:
    """What all fits took together, reading included, without the start of their processes."""
    return sum(read_origin(part)["seconds"] for part in (results / "parts").glob("*.h5"))


def work(said: str, results: Path) -> tuple[dict[str, int], int]:
    """Jobs by rule of the run that said this, and the number of images that its fits have fitted."""
    jobs = Counter(re.findall(r"Finished jobid: \d+ \(Rule: (\w+)\)", said))
    fitted = 0
    for shard in re.findall(r"(?m)^Job \d+: Fitting the images of shard (\S+)", said):
        blocks, _ = read_manifest(results / "shards" / f"{shard}.csv")
        log = (results / "logs" / "fit" / f"{shard}.log").read_text()
        fitted += sum(block.stop - block.start for block in blocks)
        fitted -= int(re.findall(r"(\d+) rows taken over", log)[0])
    return dict(jobs), fitted


def stores(arguments) -> dict:
    """By store: bytes, seconds to scan and to read on one core, of the fits, and of a whole run, for each repeat."""
    count = arguments.stored
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        warm(scratch)
        images, run = scratch / "images", scratch / "run"
        for name, write in STORES.items():
            images.mkdir()
            write(images, count)
            size = sum(path.stat().st_size for path in images.rglob("*") if path.is_file())
            row: dict = {"bytes": size, "scan": [], "read": [], "fit": [], "run": []}
            for _ in range(arguments.repeats):
                scan, read = workers.alone(workers.cores()[:1], ingest, name, images, count)
                whole = snakemake(run, settings(name) | divided(count))
                expect(run, count)
                taken = (("scan", scan), ("read", read), ("fit", fit_seconds(run / "results")), ("run", whole.seconds))
                for key, value in taken:
                    row[key].append(value)
                shutil.rmtree(run)
                print(name, *(f"{key} {value:.1f} s" for key, value in taken), sep=", ", flush=True)
            rows[name] = row
            shutil.rmtree(images)
    return {"count": count, "stores": rows}


def scale(arguments) -> dict:
    """By store: number of images, seconds and peak memory of the run [MB], and what each rule used; default shards."""
    most = arguments.most
    rows = {}
    for name, count in (("one cube", most), ("files of 1,000", most), ("single files", most // 10)):
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            warm(scratch)
            (scratch / "images").mkdir()
            STORES[name](scratch / "images", count)
            run = snakemake(scratch / "run", settings(name))
            expect(scratch / "run", count)
            rows[name] = {"count": count, "seconds": run.seconds, "memory": run.memory}
            rows[name]["rules"] = used(scratch / "run" / "results")
            print(f"{count} images, {name}: {run.seconds:.0f} s, {run.memory:.0f} MB", flush=True)
    return rows


def changes(arguments) -> dict:
    """What each change of one of many single files costs: seconds, jobs by rule, images fitted."""
    count = arguments.most // 10
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        warm(scratch)
        images, run = scratch / "images", scratch / "run"
        images.mkdir()
        _single(images, count)
        first, second, third, fourth = sorted(images.rglob("*.fits"))[100:104]

        def replace() -> None:
            data = fits.getdata(second)
            fits.PrimaryHDU(data + np.float32(1)).writeto(second, overwrite=True)

        steps: dict[str, tuple[Callable[[], object], int]] = {
            "first run": (lambda: None, count),
            "nothing": (lambda: None, count),
            "one touched": (lambda: os.utime(first), count),
            "one changed": (replace, count),
            "one added": (lambda: shutil.copy(third, images / "new.fits"), count + 1),
            "one removed": (fourth.unlink, count),
        }
        for name, (change, wanted) in steps.items():
            change()
            took = snakemake(run, settings("single files") | divided(count))
            expect(run, wanted)
            jobs, fitted = work(took.said, run / "results")
            rows[name] = {"seconds": took.seconds, "jobs": jobs, "fitted": fitted}
            print(f"{name}: {took.seconds:.1f} s, {jobs}, {fitted} images fitted", flush=True)
    return {"count": count, "changes": rows}
