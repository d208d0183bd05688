"""The images of shards as stacks of one size, a batch at a time, each with what its header says.

``reading`` is everywhere what `detection.read_images` wants to be told: the section ``images`` of the config but its
``files``, and ``folder``, where detection keeps what it finds.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from pipeline import runtime
from pipeline.carry import Value
from pipeline.cells import read_carried, spoilt
from pipeline.columns import BIT, NEAR, PARAMETERS
from pipeline.detection import read_images
from pipeline.headers import read_header
from pipeline.images import Block, Rejected, Stack, corners_of, identities, image_shape
from pipeline.shards import image_ids, read_manifest

#: Pixels fitted at a time, 64 MiB in float64: what a job needs in memory does not grow with its shard.
BATCH_PIXELS = 1 << 23


class Sky(NamedTuple):
    """What a header says: ``wcs`` and ``beam``, or None; ``usable``: the WCS is, or there is none; ``unit`` or ""."""

    wcs: WCS | None
    beam: tuple[float, float, float] | None
    usable: bool
    unit: str


#: Of a header that has not been looked at.
NO_SKY = Sky(None, None, True, "")


class Piece(NamedTuple):
    """Images of one block as read: the first is image ``start`` of its HDU and image ``position`` of the shard.

    ``carried``: what goes along with them, by name, a value an image.
    """

    block: Block
    start: int
    position: int
    stack: Stack
    carried: dict[str, list[Value]]
    sky: Sky


def of_blocks(blocks: Sequence[Block], reading: Mapping[str, Any], rejected: list[Rejected]) -> Iterator[list[Piece]]:
    """Read the images of all blocks; those of one size and type together, not many more than BATCH_PIXELS at a time.

    What cannot be read goes to ``rejected``, a row an image, and stops nothing.
    """
    waiting: dict[tuple[tuple[int, int], np.dtype], list[Piece]] = {}
    pixels = position = 0
    for block in blocks:
        shape = image_shape(block, reading["cutouts"])
        step = max(1, BATCH_PIXELS // (shape[0] * shape[1]))
        for first in range(block.start, block.stop, step):
            runs = _unspoilt(block, first, min(first + step, block.stop), reading, rejected)
            for start, stack, carried in (part for run in runs for part in _read(block, *run, reading, rejected)):
                # Now, while the reader still knows where the header lies.
                sky = _sky(block.file, block.hdu, block.version, reading["column"])
                place = position + start - block.start
                # By type too: a fit of pixels that their neighbours make wider begins elsewhere.
                waiting.setdefault((shape, stack.data.dtype), []).append(
                    Piece(block, start, place, stack, carried, sky)
                )
                pixels += stack.data.size
            if pixels >= BATCH_PIXELS:
                yield from waiting.values()
                waiting, pixels = {}, 0
        position += block.stop - block.start
    yield from waiting.values()


def _unspoilt(
    block: Block, start: int, stop: int, reading: Mapping[str, Any], rejected: list[Rejected]
) -> list[tuple[int, int]]:
    """Runs of images (first, one after the last) that the mask leaves; those that it spoils go to ``rejected``."""
    try:
        bad = spoilt(block, start, stop, **reading)
    except ValueError:
        return [(start, stop)]  # to read them says why
    for number, why in bad.items():
        rejected += _rejected(block, number, number + 1, why)
    ends = itertools.pairwise([start - 1, *bad, stop])
    return [(before + 1, after) for before, after in ends if before + 1 < after]


def _rejected(block: Block, start: int, stop: int, reason: str) -> list[Rejected]:
    planes, sources = (numbers.tolist() for numbers in identities(block, start, stop))
    if block.stamps is None:
        sources = [-1] * len(planes)
    return [Rejected(block.file, block.hdu, *which, reason) for which in zip(planes, sources, strict=True)]


def _read(
    block: Block, start: int, stop: int, reading: Mapping[str, Any], rejected: list[Rejected]
) -> Iterator[tuple[int, Stack, dict[str, list[Value]]]]:
    """Images ``start`` to ``stop - 1``, as stacks, the number of the first image in each, and what goes along.

    Where they cannot be read together their halves are tried, down to the planes that are to blame: only what is in
    these goes to ``rejected``.
    """
    try:
        yield start, read_images(block, start, stop, **reading), read_carried(block, start, stop, **reading)
    except (ValueError, OSError) as error:
        planes, _ = identities(block, start, stop)
        if planes[0] == planes[-1]:
            rejected += _rejected(block, start, stop, str(error))
            return
        middle = (start + stop) // 2
        yield from _read(block, start, middle, reading, rejected)
        yield from _read(block, middle, stop, reading, rejected)


def joined(pieces: Sequence[Piece]) -> Stack:
    """The images of all pieces as one stack."""
    if len(pieces) == 1:
        return pieces[0].stack
    data, mask, noise = zip(*(piece.stack for piece in pieces), strict=True)
    return Stack(np.concatenate(data), np.concatenate(mask), None if noise[0] is None else np.concatenate(noise))


def beam_kernels(pieces: Sequence[Piece]) -> np.ndarray:
    """Kernels (n, 3) of noise smoothed with the beam of the header, each in the middle of its image.

    NaN, to be found from the residuals, where the header has no beam or no WCS; the log says so.
    """
    from pipeline import sky

    headers = []
    for piece in pieces:
        count, ny, nx = piece.stack.data.shape
        middles = corners_of(piece.block, piece.start, piece.start + count) + 0.5 * np.array([nx - 1, ny - 1])
        headers.append((piece.sky.wcs, piece.sky.beam, middles))
    kernels = sky.beam_kernels(headers)
    if unknown := np.count_nonzero(np.isnan(kernels[:, 0])):
        runtime.LOG.warning("%d of %d images: no beam in pixels; noise_fwhm is estimated", unknown, len(kernels))
    return kernels


def complete(rows: dict[str, np.ndarray], cov: np.ndarray, pieces: Sequence[Piece]) -> None:
    """Fill in the columns that come from the file and its header: identity, sky and beam; and their flags.

    rows: columns (n,), changed in place; cov: (n, p, p), the covariance behind the errors.
    """
    from pipeline.sky import sky_columns, unresolved

    counts = [len(piece.stack.data) for piece in pieces]
    for (block, start, _, stack, _, sky), stop, count in zip(pieces, np.cumsum(counts), counts, strict=True):
        here = slice(stop - count, stop)
        planes, sources = identities(block, start, start + count)
        rows["file"][here], rows["hdu"][here] = block.file, block.hdu
        rows["plane"][here], rows["source"][here] = planes, sources
        rows["image_id"][here] = image_ids(block.file, block.hdu, planes, sources)
        if block.stamps is not None:
            _flag_off_position(rows, here, stack.data.shape[1:])
            _move_to_parent(rows, here, block, start)
        rows["flags"][here] |= 0 if sky.usable else BIT["NO_SKY"]
    headers = [
        (piece.sky.wcs, piece.sky.beam, count)
        for piece, count in zip(pieces, counts, strict=True)
        if piece.sky.wcs is not None
    ]
    if headers:
        known = np.repeat([piece.sky.wcs is not None for piece in pieces], counts)
        params = np.stack([rows[name][known] for name in PARAMETERS[:6]], axis=1)
        for name, values in sky_columns(headers, params, cov[known, :6, :6]).items():
            rows[name][known] = values
    rows["flags"] |= np.where(unresolved(rows), BIT["UNRESOLVED"], 0)


def _flag_off_position(rows: dict[str, np.ndarray], here: slice, shape: tuple[int, int]) -> None:
    """Flag what is far from the middle of its stamp, of ``shape`` ny, nx, from whose first pixel positions count."""
    dy, dx = (np.abs(rows[name][here] - 0.5 * (length - 1)) for name, length in zip(("y0", "x0"), shape, strict=True))
    far = (np.maximum(dx, dy) > NEAR) & (np.hypot(dx, dy) > rows["sigma_major"][here])
    rows["flags"][here] |= np.where(far, BIT["OFF_POSITION"], 0)


def _move_to_parent(rows: dict[str, np.ndarray], here: slice, block: Block, start: int) -> None:
    """Count positions in stamps, the first of them image ``start``, from the first pixel of their planes.

    The edge of a plane is an edge as that of a stamp is.
    """
    corners = corners_of(block, start, start + here.stop - here.start).T
    edge = np.full(corners.shape[1], np.inf)
    for axis, corner, length in zip("xy", corners, (block.nx, block.ny), strict=True):
        for name in (f"{axis}0", f"{axis}0_start"):
            rows[name][here] += corner
        centre = rows[f"{axis}0"][here]
        edge = np.minimum(edge, np.minimum(centre + 0.5, length - 0.5 - centre))
    rows["flags"][here] |= np.where(edge < rows["sigma_major"][here], BIT["NEAR_EDGE"], 0)


def of_rows(
    rows: Mapping[str, np.ndarray],
    manifests: Sequence[str],
    size: int,
    reading: Mapping[str, Any],
    *,
    beams: bool = False,
) -> Iterator[tuple[Stack, dict[str, np.ndarray]]]:
    """The images of some rows, in groups of ``size``, one or several groups of one shape at a time, and their rows.

    What does not make up a group, or has become unreadable, is left out. ``part`` of ``rows`` is the place of a row's
    manifest; their positions are given back in pixels of the image, which may be a stamp. With ``beams`` rows have the
    column ``kernel``, (., 3) by `beam_kernels`.
    """
    found: dict[tuple[int, int], list[tuple[Block, int, int]]] = {}
    for part in np.unique(rows["part"]).tolist():
        here = np.flatnonzero(rows["part"] == part).tolist()
        wanted = dict(zip(rows["image_id"][here].tolist(), here, strict=True))
        for block in read_manifest(manifests[part])[0]:
            ids = image_ids(block.file, block.hdu, *identities(block, block.start, block.stop))
            images = [(block, number, wanted[i]) for number, i in enumerate(ids.tolist(), block.start) if i in wanted]
            found.setdefault(image_shape(block, reading["cutouts"]), []).extend(images)
    for (ny, nx), listed in sorted(found.items()):
        # By file, so that one that has to be unpacked is so once.
        listed.sort(key=lambda image: (image[0].file, image[0].hdu, image[1]))
        groups = [listed[low : low + size] for low in range(0, len(listed) - size + 1, size)]
        step = max(1, BATCH_PIXELS // (size * ny * nx))
        for low in range(0, len(groups), step):
            pieces: list[Piece] = []
            for group in groups[low : low + step]:
                try:
                    pieces += [_piece(block, number, place, reading, beams) for block, number, place in group]
                except (ValueError, OSError) as error:
                    runtime.LOG.warning("not used for the certificate: %s", error)
            if pieces:
                its_rows = {name: values[[piece.position for piece in pieces]] for name, values in rows.items()}
                corners = np.concatenate([corners_of(piece.block, piece.start, piece.start + 1) for piece in pieces])
                for axis, corner in zip("xy", corners.T, strict=True):
                    for name in (f"{axis}0", f"{axis}0_start"):
                        its_rows[name] = its_rows[name] - corner
                yield joined(pieces), its_rows | ({"kernel": beam_kernels(pieces)} if beams else {})


def _piece(block: Block, number: int, position: int, reading: Mapping[str, Any], header: bool) -> Piece:
    """One image as a piece, with what its header says or without."""
    stack = read_images(block, number, number + 1, **reading)
    sky = _sky(block.file, block.hdu, block.version, reading["column"]) if header else NO_SKY
    return Piece(block, number, position, stack, {}, sky)


@functools.lru_cache(maxsize=1)
def _sky(file: str, hdu: int, version: int, column: str | None) -> Sky:
    """What the header of an HDU says of sky, beam and unit; the last one is kept, for blocks read in several pieces."""
    from pipeline.sky import beam, read_celestial

    unit = ""
    try:
        header = read_header(file, hdu)
        unit = _unit(header, column)
        wcs = read_celestial(file, header, column)
    except (ValueError, OSError) as error:
        runtime.LOG.warning("%s: HDU %d: %s", file, hdu, error)
        return Sky(None, None, False, unit)
    return Sky(wcs, beam(header), True, unit)


def _unit(header: fits.Header, column: str | None) -> str:
    """BUNIT, of a table column TUNIT; "" if there is none."""
    if column is None:
        return str(header.get("BUNIT", "")).strip()
    names = {str(value).strip().upper(): key[5:] for key, value in header["TTYPE*"].items()}
    return str(header.get(f"TUNIT{names.get(column.upper())}", "")).strip()
