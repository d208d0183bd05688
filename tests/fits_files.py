"""FITS files for tests, of a line."""

import io

import numpy as np
from astropy.io import fits

from pipeline.images import read_planes, scan_file

END = b"END" + b" " * 77


def fits_bytes(*parts):
    """A FITS file as bytes, of HDUs or of arrays for the first of them."""
    stream = io.BytesIO()
    fits.HDUList(
        [part if isinstance(part, fits.hdu.base._BaseHDU) else fits.PrimaryHDU(part) for part in parts]
    ).writeto(stream)
    return stream.getvalue()


def put(path, *parts):
    """Write a FITS file and return its path as text."""
    path.write_bytes(parts[0] if isinstance(parts[0], bytes) else fits_bytes(*parts))
    return str(path)


def ramp(*shape, dtype="f4"):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def read(file, **section):
    """All planes of the only block of a file."""
    (block,), rejected = scan_file(file, **section)
    assert rejected == []
    return read_planes(block, block.start, block.stop, **section)


def reason(file, **section):
    """The reason for which nothing in a file could be used."""
    found, (rejected,) = scan_file(file, **section)
    assert found == []
    assert (rejected.file, rejected.plane, rejected.source) == (file, -1, -1)
    assert "Traceback" not in rejected.reason
    return rejected.reason


def table(array, **header):
    """A table of an index and the column FLUX with an image or more in each row."""
    dim = str(array.shape[:0:-1]).replace(" ", "")
    letter = {"f4": "E", "f8": "D", "i2": "I", "i4": "J", "i8": "K", "u1": "B"}[array.dtype.str[1:]]
    flux = fits.Column(name="FLUX", format=f"{array[0].size}{letter}", dim=dim, array=array)
    index = fits.Column(name="INDEX", format="J", array=np.arange(len(array)))
    hdu = fits.BinTableHDU.from_columns([index, flux], name="STAMPS")
    hdu.header.update(header)
    return hdu
