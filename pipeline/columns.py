"""What a catalogue row is: columns, units, flags. The only definition; docs, HDF5 and report are made from it.

Units are astropy unit strings; the word ``image`` in one stands for the unit of the pixel values (BUNIT).
Undefined floating-point entries are NaN.
"""

from typing import NamedTuple

import numpy as np


class Column(NamedTuple):
    """One column of the catalogue: name, numpy dtype, unit (see the module), description, group."""

    name: str
    dtype: str
    unit: str
    description: str
    group: str


class Flag(NamedTuple):
    """One bit of the ``flags`` column: name, bit number from 0, meaning with its threshold."""

    name: str
    bit: int
    meaning: str


#: Every parameter a fit can have, in the order of parameter vectors and covariance matrices.
PARAMETERS = ("x0", "y0", "amp", "sigma", "rho", "diff", "background", "background_x", "background_y", "scale")

#: The four covariances of the fitted parameters, the default first.
COVARIANCES = ("pooled", "sandwich", "hessian", "fisher")

# Thresholds of the flags, stated once: the code that sets a flag and the text that explains it both read them here.
ROUND_ERRORS = 2.0
MISFIT_SIGMAS = 5.0
LOW_SNR = 5.0
RESOLVED_ERRORS = 4.9
MIN_SIGMA = 0.3
MAX_ELLIPTICITY = 0.98
MIN_SCALE = 1e-6
#: What a position may be off by, along x and y [pixel], for a fit to begin at the peak of its source.
NEAR = 2.0

FLAGS = (
    Flag("NOT_CONVERGED", 0, "the fit stopped before its tolerance was met; parameters are where it stopped"),
    Flag(
        "HESSIAN_NOT_POSITIVE", 1, "the Hessian at the solution is not positive definite; hessian and sandwich are NaN"
    ),
    Flag(
        "NEAR_EDGE",
        2,
        "the centre is outside the image, or the stamp cut out of it, or within sigma_major of their edges",
    ),
    Flag("ROUND", 3, f"ellipticity is below {ROUND_ERRORS:g} of its standard errors: theta is hardly known"),
    Flag("TOO_FEW_PIXELS", 4, "fewer used pixels than twice the number of fitted parameters: not fitted"),
    Flag("NON_FINITE", 5, "a fitted parameter or its error is not finite"),
    Flag(
        "MISFIT",
        6,
        f"|misfit| or |misfit_profile| > {MISFIT_SIGMAS:g}, or undefined: residuals under the source differ from those "
        "around it, or what is left is more peaked or flatter than a Gaussian",
    ),
    Flag("MASKED_PEAK", 7, "the pixel nearest to the centre is masked"),
    Flag(
        "AT_LIMIT",
        8,
        f"sigma < {MIN_SIGMA:g} px or larger than the image, ellipticity e > {MAX_ELLIPTICITY:g}, or scale < "
        f"{MIN_SCALE:g} of the amplitude, or more than half of the pixels are equal: "
        "errors mean nothing",
    ),
    Flag("LOW_SNR", 9, f"snr < {LOW_SNR:g}"),
    Flag("NO_SKY", 10, "the header has celestial axes but no usable WCS: sky columns are NaN"),
    Flag(
        "UNRESOLVED",
        11,
        f"deconvolved_major is NaN or below {RESOLVED_ERRORS:g} of its errors, as of 95 % of point sources or more: "
        "of the deconvolved columns only the limits mean something",
    ),
    Flag(
        "OFF_POSITION",
        12,
        f"the centre is more than {NEAR:g} px along x or y, and more than sigma_major, from the middle of the stamp, "
        "where its source was listed or detected: the fit has left for something else",
    ),
)

#: Bit value by flag name.
BIT = {flag.name: 1 << flag.bit for flag in FLAGS}

#: Rows with one of these flags are not a solution, so that their errors promise nothing.
UNSOLVED = sum(
    BIT[name] for name in ("NOT_CONVERGED", "HESSIAN_NOT_POSITIVE", "TOO_FEW_PIXELS", "NON_FINITE", "AT_LIMIT")
)

#: Flags that say what a source is like, and spoil a few columns; its fit and its errors are none the worse.
HARMLESS = BIT["ROUND"] | BIT["UNRESOLVED"]

#: Edges of the bins of ``snr`` in which the certificate looks at the errors.
SNR_BINS = (LOW_SNR, 10.0, 30.0, 100.0, np.inf)

_FITTED = {
    "x0": ("pix", "centre along x (NAXIS1); 0-based, integer = pixel centre, from the first pixel of the array read"),
    "y0": ("pix", "centre along y (NAXIS2); 0-based, integer = pixel centre, from the first pixel of the array read"),
    "amp": ("image", "peak of the Gaussian above the background; may be negative"),
    "sigma": ("pix", "azimuth-free rms width"),
    "rho": ("", "ellipticity along the diagonals: rho = -2 e sin(2 theta)"),
    "diff": ("", "ellipticity along the axes: diff = -e cos(2 theta)"),
    "background": ("image", "background at the start position (plane) or everywhere (constant, fixed)"),
    "background_x": ("image / pix", "slope of the background along x"),
    "background_y": ("image / pix", "slope of the background along y"),
    "scale": ("image", "half-width of the Cauchy noise (no unit where an uncertainty map is given)"),
}

_DERIVED = {
    "flux": ("image pix2", "2 pi amp sigma^2 / sqrt(1 - e^2)"),
    "sigma_major": ("pix", "rms width along the major axis"),
    "sigma_minor": ("pix", "rms width along the minor axis"),
    "fwhm_major": ("pix", "full width at half maximum along the major axis"),
    "fwhm_minor": ("pix", "full width at half maximum along the minor axis"),
    "theta": ("rad", "position angle of the major axis, counter-clockwise from +x, in (-pi/2, pi/2]"),
}

_SKY = {
    "ra": ("deg", "arcsec", "right ascension (ICRS); error along a great circle"),
    "dec": ("deg", "arcsec", "declination (ICRS)"),
    "fwhm_major_sky": ("arcsec", "arcsec", "full width at half maximum on the sky, major axis"),
    "fwhm_minor_sky": ("arcsec", "arcsec", "full width at half maximum on the sky, minor axis"),
    "pa_sky": ("deg", "deg", "position angle of the major axis, east of north, in [0, 180)"),
}

_BEAM = {
    "deconvolved_major": ("arcsec", "full width at half maximum after deconvolution from the beam, major axis"),
    "deconvolved_minor": ("arcsec", "full width at half maximum after deconvolution from the beam, minor axis"),
    "deconvolved_pa": ("deg", "position angle after deconvolution from the beam, east of north, in [0, 180)"),
}

_LIMITS = {
    "deconvolved_major_limit": "95 % upper limit of what deconvolved_major would be without noise, also if UNRESOLVED",
    "deconvolved_minor_limit": "95 % upper limit of what deconvolved_minor would be without noise, also if UNRESOLVED",
}

#: Names of the columns that come from the fitted parameters, from the WCS, and from the beam, with errors; and limits.
DERIVED = tuple(_DERIVED)
SKY = tuple(_SKY)
BEAM = tuple(_BEAM)
LIMITS = tuple(_LIMITS)


#: What the columns that belong to another one end in.
ENDINGS = ("_err", "_err_cal", "_bias")


def _pair(name: str, unit: str, error_unit: str, description: str, group: str) -> tuple[Column, Column]:
    return (
        Column(name, "f8", unit, description, group),
        Column(f"{name}_err", "f8", error_unit, f"standard error of {name}", group),
    )


def _calibrated(name: str, unit: str) -> Column:
    return Column(
        f"{name}_err_cal", "f8", unit, f"{name}_err, corrected where the certificate finds it wrong", "calibrated"
    )


def _biased(name: str, unit: str, group: str) -> Column:
    return Column(f"{name}_bias", "f8", unit, f"what to expect of {name} beyond the truth", group)


#: The catalogue, column by column, in order. ``S`` grows to the longest entry of a file.
COLUMNS: tuple[Column, ...] = (
    Column("image_id", "i8", "", "stable identity: first 63 bits of blake2b of file, hdu, plane, source", "identity"),
    Column("file", "S", "", "path as expanded from the config", "identity"),
    Column("hdu", "i8", "", "number of the HDU in the file, from 0", "identity"),
    Column("plane", "i8", "", "number of the plane in the HDU (row of a table column), from 0, C order", "identity"),
    Column(
        "source",
        "i8",
        "",
        "number of the source in the plane, from 0 (row of the table of positions); 0 where there is only one",
        "identity",
    ),
    *(c for n, (u, d) in _FITTED.items() for c in _pair(n, u, u, d, "fitted")),
    *(_calibrated(n, u) for n, (u, _) in _FITTED.items()),
    *(_biased(n, u, "fitted") for n, (u, _) in _FITTED.items()),
    *(c for n, (u, d) in _DERIVED.items() for c in _pair(n, u, u, d, "derived")),
    *(_calibrated(n, u) for n, (u, _) in _DERIVED.items()),
    *(_biased(n, u, "derived") for n, (u, _) in _DERIVED.items() if n != "theta"),
    *(c for n, (u, e, d) in _SKY.items() for c in _pair(n, u, e, d, "sky")),
    *(c for n, (u, d) in _BEAM.items() for c in _pair(n, u, u, d, "beam")),
    *(Column(n, "f8", "arcsec", d, "beam") for n, d in _LIMITS.items()),
    Column("x0_start", "f8", "pix", "x0 where the fit began; a background plane is about it", "quality"),
    Column("y0_start", "f8", "pix", "y0 where the fit began; a background plane is about it", "quality"),
    Column("nll", "f8", "", "negative log-likelihood at the solution, summed over used pixels", "quality"),
    Column("n_steps", "i8", "", "steps of the minimiser, the first evaluation and refused steps included", "quality"),
    Column("n_pixels", "i8", "", "pixels used", "quality"),
    Column("snr", "f8", "", "|amp| / amp_err", "quality"),
    Column("outlier_fraction", "f8", "", "share of used pixels with |residual| > 10 half-widths", "quality"),
    Column(
        "misfit",
        "f8",
        "",
        "residuals under the source against those around it, in standard deviations; if noise is correlated these are "
        "taken too long",
        "quality",
    ),
    Column(
        "misfit_profile",
        "f8",
        "",
        "more peak and wings than a Gaussian (> 0), or less, in standard deviations",
        "quality",
    ),
    Column("condition", "f8", "", "condition number (1-norm) of the Hessian scaled to unit diagonal", "quality"),
    Column(
        "noise_fwhm",
        "f8",
        "pix",
        "FWHM of the Gaussian that smooths the noise; NaN = noise not correlated",
        "quality",
    ),
    Column("flags", "i8", "", "bits, see flag_bits; 0 = good", "quality"),
)

#: The table of images that could not be read. -1 = the whole file (hdu, plane, source) or HDU (plane, source).
REJECTED: tuple[Column, ...] = (
    Column("file", "S", "", "path as expanded from the config", "identity"),
    Column("hdu", "i8", "", "number of the HDU in the file, from 0; -1 = the whole file", "identity"),
    Column("plane", "i8", "", "number of the plane in the HDU, from 0; -1 = the whole HDU or file", "identity"),
    Column("source", "i8", "", "number of the source in the plane, from 0; -1 = the whole plane", "identity"),
    Column("reason", "S", "", "why it could not be read", "quality"),
)

#: The certificate, one row a fitted or derived column and bin of S/N. Pulls are (fit - truth) / err.
CERTIFICATE: tuple[Column, ...] = (
    Column("parameter", "S", "", "name of the fitted or derived column", "identity"),
    Column("snr_low", "f8", "", "lower edge of the bin of snr", "identity"),
    Column("snr_high", "f8", "", "upper edge of the bin of snr", "identity"),
    Column("sources", "i8", "", "sources that were put in, found again and count", "certificate"),
    Column("failed", "i8", "", "sources whose fit is no solution; they do not count", "certificate"),
    Column("kept", "f8", "", "share of the variance that the residuals have; pulls allow for it", "certificate"),
    Column("coverage_68", "f8", "", "share of pulls within 1, nominally 0.683", "certificate"),
    Column("coverage_68_err", "f8", "", "Monte Carlo error of coverage_68, if it is nominal", "certificate"),
    Column("coverage_95", "f8", "", "share of pulls within 2, nominally 0.954", "certificate"),
    Column("coverage_95_err", "f8", "", "Monte Carlo error of coverage_95, if it is nominal", "certificate"),
    Column("median_pull", "f8", "", "median of the pulls", "certificate"),
    Column("bias", "f8", "", "mean of the pulls within 5: bias in standard errors", "certificate"),
    Column("bias_err", "f8", "", "Monte Carlo error of bias", "certificate"),
    Column("spread", "f8", "", "standard deviation of the pulls within 5, nominally 1", "certificate"),
    Column("spread_err", "f8", "", "Monte Carlo error of spread", "certificate"),
    Column("over_bound", "f8", "", "variance over the Cramer-Rao bound (covariance fisher)", "certificate"),
    Column("over_bound_err", "f8", "", "Monte Carlo error of over_bound", "certificate"),
    Column("factor", "f8", "", "by which errors would have to be longer to cover 0.683", "certificate"),
    Column("factor_err", "f8", "", "Monte Carlo error of factor", "certificate"),
)

#: The truth of simulated images: identity, then the parameters and what is derived from them.
TRUTH: tuple[Column, ...] = tuple(
    c
    for c in COLUMNS
    if c.group == "identity" or (c.name in (*PARAMETERS, *DERIVED) and c.group in ("fitted", "derived"))
)


def parameter_names(background: str | float, scale: str | float) -> tuple[str, ...]:
    """Names of the fitted parameters, in order, for the settings ``fit.background`` and ``fit.scale``."""
    levels = {"constant": ("background",), "plane": ("background", "background_x", "background_y")}
    plane = levels.get(background, ()) if isinstance(background, str) else ()
    return (*PARAMETERS[:6], *plane, *(("scale",) if scale == "fit" else ()))


def decode_flags(flags: int) -> list[str]:
    """Names of the bits set in ``flags``, lowest first."""
    return [flag.name for flag in FLAGS if flags & (1 << flag.bit)]


def empty_rows(count: int, columns: tuple[Column, ...] = COLUMNS) -> dict[str, np.ndarray]:
    """``count`` rows as a dict of columns: NaN in floating-point columns, 0 in integer ones, ``b""`` in text."""
    fill = {"f": np.nan, "i": 0, "S": b""}
    return {c.name: np.full(count, fill[c.dtype[0]], dtype=object if c.dtype == "S" else c.dtype) for c in columns}
