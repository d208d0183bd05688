"""Which job fits which images: shards, their manifests on disk, and the identity of an image.

A shard is a name and its rows. Names are stable: ``b-<k>-<i>`` is bucket ``i`` of the ``2^k`` that files are hashed
into, ``f-<hash>-<hdu>-<i>`` is block ``i`` of an HDU with at least ``shard_size`` images, of the file with this hash.
``k`` grows only when the number of images in buckets doubles, so one image more or less changes the rows of one shard.
Stamps cut out of planes are images like any other, in the order of plane and source; the manifest lists them one by
one, so that what moves a stamp fits its shard again, and what moves none does not; with what they carry along from the
table of positions and the pixels that belong to others, for the same reason.

The order of shards, and with it of the catalogue, is: buckets by number, then blocks by (file, hdu, first image);
within a shard (file, hdu, first image).
"""

import csv
import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.files import replacing
from pipeline.images import Block, Rejected
from pipeline.origin import content_digest

#: What a shard can be called, as a regular expression.
NAME = r"b-\d{2}-\d{8}|f-[0-9a-f]{16}-\d+-\d+"

#: A row is a block (image), a stamp of the block above it, or what was rejected; what does not apply to it is empty.
_HEADER = (
    *("kind", "file", "hdu", "start", "stop", "ny", "nx", "size", "version"),
    *("plane", "source", "x", "y", "carried", "taken", "reason"),
)


def _digest(data: str) -> bytes:
    """First 8 bytes of blake2b. File names may hold bytes that are no UTF-8: Python's surrogates stand for them."""
    return hashlib.blake2b(data.encode("utf-8", "surrogateescape")).digest()[:8]


def assign(blocks: list[Block], shard_size: int, rejected: list[Rejected] | None = None) -> dict[str, list]:
    """Shards by name, in the order of the catalogue.

    Parameters
    ----------
    blocks : list of Block
        Blocks of ``shard_size`` images or more are cut into shards of their own; smaller ones go whole into the bucket
        of their file.
    shard_size : int
        Images a shard, about: buckets hold half as many to as many on average.
    rejected : list of Rejected, optional
        Go into the bucket of their file, also where it is otherwise empty.

    Returns
    -------
    shards : dict of str to list of Block and Rejected
        The rows of each; no shard is empty, and there is none only if nothing is given.
    """
    small = sum(block.stop - block.start for block in blocks if block.stop - block.start < shard_size)
    k = max(0, -(-small // shard_size) - 1).bit_length()
    buckets = defaultdict(list)
    pieces: list[tuple[Block, str]] = []
    rows: list[Block | Rejected] = [*blocks, *(rejected or [])]
    for row in rows:
        if isinstance(row, Block) and row.stop - row.start >= shard_size:
            name = f"f-{_digest(row.file).hex()}-{row.hdu}"
            starts = range(row.start, row.stop, shard_size)
            cuts = [_cut(row, start, min(start + shard_size, row.stop)) for start in starts]
            pieces += [(cut, f"{name}-{cut.start // shard_size}") for cut in cuts]
        else:
            # The leading bits: with one bit more each bucket becomes two.
            buckets[int.from_bytes(_digest(row.file), "big") >> (64 - k)].append(row)
    shards: dict[str, list] = {f"b-{k:02d}-{i:08d}": sorted(buckets[i], key=_order) for i in sorted(buckets)}
    for cut, name in sorted(pieces):
        shards.setdefault(name, []).append(cut)
    return shards


def relatives(shard: str) -> list[str]:
    """Shards that may have had the images of this one: itself, those that it was a part of, and its own two halves."""
    found = re.fullmatch(r"b-(\d+)-(\d+)", shard)
    if not found:
        return [shard]
    k, bucket = map(int, found.groups())
    above = [(less, bucket >> (k - less)) for less in range(k, -1, -1)]
    return [f"b-{k:02d}-{i:08d}" for k, i in [*above, (k + 1, 2 * bucket), (k + 1, 2 * bucket + 1)]]


def _cut(block: Block, start: int, stop: int) -> Block:
    here = slice(start - block.start, stop - block.start)
    stamps = None if block.stamps is None else block.stamps[here]
    carried = None if block.carried is None else block.carried[here]
    taken = None if block.taken is None else block.taken[here]
    return block._replace(start=start, stop=stop, stamps=stamps, carried=carried, taken=taken)


def _order(row: Block | Rejected) -> tuple[str, int, int, str]:
    return (row.file, row.hdu, row.start, "") if isinstance(row, Block) else (row.file, row.hdu, row.plane, row.reason)


def write_manifests(folder: str | Path, shards: dict[str, list]) -> dict[str, str]:
    """Write ``<folder>/<shard>.csv``, only where the bytes change, and remove manifests of shards that are no more.

    Returns
    -------
    digests : dict of str
        Of the manifests by `origin.content_digest`, by name of the shard, in the order of the catalogue.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    old = {path.stem: path for path in folder.iterdir() if path.suffix == ".csv" and re.fullmatch(NAME, path.stem)}
    digests = {}
    for name, rows in shards.items():
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # for \r in a file name
        table.writerow(_HEADER)
        table.writerows(line for row in rows for line in _lines(row))
        data = text.getvalue().encode("utf-8", "surrogateescape")
        digests[name] = content_digest(data)
        path = folder / f"{name}.csv"
        if name not in old or path.read_bytes() != data:
            with replacing(path) as temporary:
                temporary.write_bytes(data)
    for name in old.keys() - shards.keys():
        old[name].unlink()
    return digests


def _lines(row: Block | Rejected) -> Iterator[tuple]:
    if isinstance(row, Rejected):
        yield ("rejected", row.file, row.hdu, *[""] * 6, row.plane, row.source, *[""] * 4, row.reason)
        return
    *block, stamps, carried, taken = row
    yield ("image", *block, *[""] * 7)
    for number, stamp in enumerate([] if stamps is None else stamps.tolist()):
        along = json.dumps(carried[number]) if carried else ""
        yield ("stamp", *[""] * 8, *stamp, along, taken[number] if taken else "", "")


def block_digest(block: Block, settings: str) -> str:
    """Digest of what the rows of a block follow from: its images as the scan found them, and ``settings``."""
    lines = (str(entry) for line in _lines(block) for entry in (*line, "\n"))
    return content_digest("\0".join([settings, *lines]).encode("utf-8", "surrogateescape"))


def read_manifest(path: str | Path) -> tuple[list[Block], list[Rejected]]:
    """Rows of a manifest: images, and what was rejected when they were looked for."""
    return parse_manifest(Path(path).read_bytes())


def parse_manifest(manifest: bytes) -> tuple[list[Block], list[Rejected]]:
    """`read_manifest` of one that has been read."""
    blocks: list[Block] = []
    stamps: dict[int, list[tuple[str, ...]]] = {}
    carried: dict[int, list[dict]] = {}
    taken: dict[int, list[str]] = {}
    rejected = []
    stream = io.StringIO(manifest.decode("utf-8", "surrogateescape"), newline="")
    for row in csv.DictReader(stream):
        if row["kind"] == "image":
            hdu, start, stop, ny, nx, size, version = (int(row[name]) for name in Block._fields[1:8])
            blocks.append(Block(row["file"], hdu, start, stop, ny, nx, size, version))
        elif row["kind"] == "stamp":
            stamps.setdefault(len(blocks) - 1, []).append((row["plane"], row["source"], row["x"], row["y"]))
            taken.setdefault(len(blocks) - 1, []).append(row["taken"])
            if row["carried"]:
                carried.setdefault(len(blocks) - 1, []).append(json.loads(row["carried"]))
        else:
            hdu, plane, source = (int(row[name]) for name in ("hdu", "plane", "source"))
            rejected.append(Rejected(row["file"], hdu, plane, source, row["reason"]))
    for place, its_stamps in stamps.items():
        numbers = np.array(its_stamps).astype(np.int64)
        of_others = taken[place] if any(taken[place]) else None
        blocks[place] = blocks[place]._replace(stamps=numbers, carried=carried.get(place), taken=of_others)
    return blocks, rejected


def image_ids(file: str, hdu: int, planes: np.ndarray, sources: np.ndarray | int = 0) -> np.ndarray:
    """Stable identities: the first 63 bits of blake2b of ``file\\0hdu\\0plane\\0source``, numbers in decimal.

    Parameters
    ----------
    file, hdu : str, int
        Of all the images.
    planes, sources : (n,) int ndarray, or int
        Numbers from 0, broadcast against each other.

    Returns
    -------
    ids : (n,) int64 ndarray
        Not negative.
    """
    state = hashlib.blake2b(f"{file}\0{hdu}\0".encode("utf-8", "surrogateescape"))
    pairs = np.stack(np.broadcast_arrays(np.atleast_1d(planes), sources), axis=-1)
    digests = bytearray()
    for plane, source in pairs.tolist():
        image = state.copy()
        image.update(b"%d\0%d" % (plane, source))
        digests += image.digest()[:8]
    return (np.frombuffer(digests, ">u8") >> np.uint64(1)).astype(np.int64)
