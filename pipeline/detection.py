"""Sources found in larger images by sep, the library of SExtractor: background, noise, detection, segments.

What was found in a plane is kept in a file of its own, under a name made of everything it depends on: it is found once,
however many jobs cut stamps from it, and found again when the file is gone.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sep
from astropy.io import fits

from pipeline import __version__
from pipeline.files import replacing
from pipeline.images import Block, Stack, identities, read_planes, scan_file
from pipeline.maps import MAPS

# What sep reserves for pixels that are not yet part of a source, and for the parts of a blend: at the limits of its own
# (300000, 1024) it gives up on large images and crowded fields.
PIXEL_STACK, SUB_OBJECTS = 1_000_000, 1 << 16


def detect(data: np.ndarray, mask: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the sources in one image.

    Parameters
    ----------
    data : (ny, nx) float32 or float64 ndarray
        Pixels, native byte order; changed in place: its background is taken off.
    mask : (ny, nx) bool ndarray
        True = not used.
    threshold : float
        What belongs to a source is this many times the noise above the background, after a filter of 3 x 3 pixels.
        Both are sep's, in meshes of 64 x 64 pixels.

    Returns
    -------
    x, y : (n,) float64 ndarray
        Barycentres [pixel], ordered by y, then x.
    segments : (ny, nx) int32 ndarray
        Of each pixel, one more than the number of the source that it belongs to; 0 = none.

    Raises
    ------
    ValueError
        A sentence: there is no source, or the detection failed.
    """
    sep.set_extract_pixstack(max(PIXEL_STACK, data.size // 10))
    sep.set_sub_object_limit(SUB_OBJECTS)
    data[mask] = 0
    try:
        background = sep.Background(data, mask=mask)
        background.subfrom(data)
        # `conv` compares the filtered pixels with the noise of one pixel, as SExtractor does.
        found, segments = sep.extract(
            data, threshold, err=background.rms(), mask=mask, filter_type="conv", segmentation_map=True
        )
    except Exception as error:  # sep raises nothing more special
        msg = f"the detection of sources failed ({error}); a higher threshold may help"
        raise ValueError(msg) from error
    if len(found) == 0:
        msg = f"no source in it is {threshold:g} times the noise above the background"
        raise ValueError(msg)
    order = np.lexsort((found["x"], found["y"]))
    labels = np.zeros(len(found) + 1, segments.dtype)
    labels[order + 1] = np.arange(1, len(found) + 1)
    return found["x"][order], found["y"][order], np.take(labels, segments, out=segments)


def find_sources(block: Block, plane: int, folder: str | Path, **images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Positions ``x, y`` [pixel], (n,) each, of the sources in a plane, from the file they are kept in or found anew.

    Parameters
    ----------
    block : Block
        The HDU, with or without stamps.
    plane : int
        Number of the plane in it.
    folder : path
        Of the files, made if it is not there.
    **images
        The config section.

    Raises
    ------
    ValueError
        As `detect`, or because the plane cannot be read.
    """
    with fits.open(_kept(block, plane, folder, images)) as hdus:
        return hdus["SOURCES"].data["x"].astype(np.float64), hdus["SOURCES"].data["y"].astype(np.float64)


def read_images(block: Block, start: int, stop: int, *, folder: str | Path, **images: Any) -> Stack:
    """`images.read_planes`, with what detection tells to belong to a neighbour of the source of a stamp not used."""
    stack = read_planes(block, start, stop, **images)
    if block.stamps is not None and "detect" in images["cutouts"]:
        stack.mask[_of_others(block, start, stop, folder, images)] = True
    return stack


def _of_others(block: Block, start: int, stop: int, folder: str | Path, images: Mapping[str, Any]) -> np.ndarray:
    """Pixels of stamps ``start`` to ``stop - 1`` in the segments of other sources than their own, bool (n, ny, nx)."""
    planes, sources = identities(block, start, stop)
    assert block.stamps is not None
    stamps = block.stamps[start - block.start : stop - block.start]
    parts = []
    for plane in np.unique(planes).tolist():
        (kept,), _ = scan_file(str(_kept(block, plane, folder, images)), hdu="SEGMENTS")
        here = stamps[planes == plane] * [0, 1, 1, 1]
        labels = read_planes(kept._replace(stop=len(here), stamps=here), 0, len(here), cutouts=images["cutouts"]).data
        own = sources[planes == plane][:, None, None] + 1
        # Beyond the edge is NaN.
        parts.append((labels > 0) & (labels != own))
    return np.concatenate(parts)


def forget_others(folder: str | Path, blocks: Iterable[Block], **images: Any) -> None:
    """Remove what was found in planes that are not among these blocks, or are not what they were."""
    folder = Path(folder)
    needed = {
        _path(block, plane, folder, images)
        for block in (blocks if "detect" in (images["cutouts"] or {}) else ())
        for plane in np.unique(identities(block, block.start, block.stop)[0]).tolist()
    }
    for path in set(folder.glob("*.fits")) - needed:
        path.unlink()


def _path(block: Block, plane: int, folder: str | Path, images: Mapping[str, Any]) -> Path:
    settings = {key: images.get(key) for key in ("column", "saturation", *MAPS)} | images["cutouts"]["detect"]
    of = [block.file, block.hdu, plane, block.size, block.version, settings, sep.__version__, __version__]
    return Path(folder, f"{hashlib.blake2b(json.dumps(of).encode(), digest_size=16).hexdigest()}.fits")


def _kept(block: Block, plane: int, folder: str | Path, images: Mapping[str, Any]) -> Path:
    """The file of what was found in a plane; it is made if it is not there."""
    path = _path(block, plane, folder, images)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        stack = read_planes(block._replace(stamps=None), plane, plane + 1, **images)
        x, y, segments = detect(stack.data[0], stack.mask[0], images["cutouts"]["detect"]["threshold"])
        columns = [fits.Column(name, "D", "pixel", array=values) for name, values in (("x", x), ("y", y))]
        hdus = fits.HDUList([
            fits.PrimaryHDU(),
            fits.CompImageHDU(segments, name="SEGMENTS", compression_type="RICE_1"),
            fits.BinTableHDU.from_columns(columns, name="SOURCES"),
        ])  # fmt: skip
        with replacing(path) as temporary:
            hdus.writeto(temporary, overwrite=True)
    return path
