"""FITS files for tests, of a line."""

import io

import numpy as np
from astropy.io import fits


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
