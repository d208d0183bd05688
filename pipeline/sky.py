"""Pixel to sky: the celestial WCS and the beam of a header, positions and shapes on the sky with their errors.

Conventions. Pixels are 0-based, integer = pixel centre. A shape is a 2 x 2 covariance matrix, in pixel^2 or, on the
sky, in arcsec^2 with the axes (east, north); east is the direction in which ICRS right ascension grows. Position
angles run from north through east. The sky is flat over a source: its pixel shape goes to the sky with the 2 x 2
matrix of first derivatives of the WCS at its centre, never with CDELT.
"""

import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from astropy.coordinates import FK4, FK5, ICRS, FK4NoETerms, Galactic, SkyCoord, UnitSphericalRepresentation
from astropy.io import fits
from astropy.time import Time
from astropy.wcs import WCS, NoConvergence

from pipeline.columns import BEAM, LIMITS, RESOLVED_ERRORS, SKY
from pipeline.model import FWHM_PER_SIGMA
from pipeline.uncertainty import direction_error, rounder

#: Rows in one call of the compiled function: one shape, so one compilation, and no row depends on how many there are.
CHUNK = 64

#: Half the step of the central differences, in pixels: +-0.5 keeps to the pixel of the source.
HALF_STEP = 0.5

#: Differences of squared widths below this share of the mean squared width are rounding.
ROUNDING = 1e-13

#: Standard errors of the squared width of an axis that its 95 % upper limit lies above it. Of the major axis as of any
#: Gaussian quantity: noise makes it longer. The minor axis noise makes shorter, most so where the source is round and
#: its axes lie where the noise has them: by the length of a vector of two random components, which is 95 % below this.
LIMIT_MAJOR, LIMIT_MINOR = 1.645, RESOLVED_ERRORS / 2

ARCSEC = 3600 * np.degrees(1.0)
ANGLES = [(*SKY, *BEAM).index(name) for name in ("pa_sky", "deconvolved_pa")]
WIDTHS = [
    (*SKY, *BEAM).index(name) for name in ("fwhm_major_sky", "fwhm_minor_sky", "deconvolved_major", "deconvolved_minor")
]

_CELESTIAL = re.compile(r"(RA|DEC|.LON|.LAT|..LN|..LT)(-|$)", re.IGNORECASE)
_MATRIX = re.compile(r"(CD|PC)0*([12])_?0*([12])")
_NUMBER = re.compile(r"(CRVAL|CRPIX|CDELT|CROTA)[12]|(CD|PC)[12]_[12]|PV[12]_\d+|PROJP\d|(LON|LAT)POLE|EQUINOX|EPOCH")
_SIP = re.compile(r"[AB]_(ORDER|\d+_\d+)")
_OTHER = re.compile(r"C(TYPE|UNIT)[12]|RADE(C?SYS)|WAT\d_\d+|C[PQ](DIS|ERR)[12]|D[PQ][12](\..+)?|AXISCORR|D2IM.+")
_COLUMN = {"CTYP": "CTYPE", "CUNI": "CUNIT", "CRPX": "CRPIX", "CRVL": "CRVAL", "CDLT": "CDELT", "CROT": "CROTA"}


def celestial(header: fits.Header, *, column: str | None = None, hdus: fits.HDUList | None = None) -> WCS | None:
    """Celestial WCS of an image whose pixel axes are NAXIS1 and NAXIS2; further axes are left out.

    Only the cards that describe these two axes are read, so nothing else in the header can do harm. SIP coefficients
    count where CTYPE ends in ``-SIP`` and nowhere else (drizzled images keep stale ones), and PV cards then do not.

    Parameters
    ----------
    header
        Header of the image or table HDU.
    column
        Name of the image column where the images are in a binary table; the keywords are then 1CTYPn and so on.
    hdus
        The open file: needed for distortions given as tables in other HDUs (CPDIS, D2IM).

    Returns
    -------
    WCS or None
        Two axes in the order of the file, degrees; None where no axis is celestial.

    Raises
    ------
    ValueError
        If celestial axes are announced but unusable: a keyword missing, not a number, a singular matrix, a projection
        or distortion that cannot be set up, a coordinate system without a conversion to ICRS, or axes other than
        NAXIS1 and NAXIS2.
    """
    cards = _column_cards(header, column) if column else {card.keyword: card for card in header.cards}
    types = {key: str(_value(cards[key])).strip() for key in cards if re.fullmatch(r"CTYPE\d+", key)}
    axes = sorted(int(key[5:]) for key, ctype in types.items() if _CELESTIAL.match(ctype))
    if not axes:
        return None
    if axes != [1, 2]:
        msg = f"celestial axes {', '.join(types[f'CTYPE{n}'] for n in axes)} are axes {axes} of the file, wanted [1, 2]"
        raise ValueError(msg)
    sip = all(types[f"CTYPE{n}"].upper().endswith("-SIP") for n in axes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # astropy tells of every repair and every deprecated form
            wcs = WCS(fits.Header(_wcs_cards(cards, sip=sip)), fobj=hdus)
            _frame(*_system(wcs))
    except Exception as error:  # astropy raises whatever it meets in broken headers and tables of distortions
        # MemoryError is what wcslib's header parser gives for some malformed distortions.
        told = isinstance(error, ValueError | KeyError | TypeError | IndexError | MemoryError | fits.VerifyError)
        reason = str(error) if told else "its distortions cannot be read"
        reason = re.sub(r"ERROR \d+ in \w+\(\) at line \d+ of file \S+", "", reason)
        msg = f"unusable WCS ({types['CTYPE1']}, {types['CTYPE2']}): {' '.join(reason.split()).rstrip(' :')}"
        raise ValueError(msg) from error
    return wcs


def read_celestial(file: str, header: fits.Header, column: str | None = None) -> WCS | None:
    """`celestial` of a header of a file, distortions given as tables in other HDUs included.

    Raises
    ------
    ValueError, OSError
        As `celestial`, or if the file cannot be read.
    """
    if not any(re.match("CPDIS|D2IM", key) for key in header):
        return celestial(header, column=column)
    with fits.open(file) as hdus:
        return celestial(header, column=column, hdus=hdus)


def beam(header: fits.Header) -> tuple[float, float, float] | None:
    """Restoring beam of a radio image.

    Parameters
    ----------
    header
        Header with BMAJ, BMIN (FWHM) and BPA (from north through east of the image's own system), all in degrees.

    Returns
    -------
    tuple or None
        FWHM along the major and minor axis [arcsec] and position angle [deg]; None where a keyword is missing, not a
        number, or a width is not positive. A round beam needs no BPA: it is then 0.
    """
    major, minor, angle = (_beam_number(header, key) for key in ("BMAJ", "BMIN", "BPA"))
    if np.isnan(angle) and major == minor:
        angle = 0.0
    if not (major > 0 and minor > 0 and np.isfinite(angle)):
        return None
    return 3600 * major, 3600 * minor, angle


def sky_columns(
    headers: Sequence[tuple[WCS | None, tuple[float, float, float] | None, int]], params: np.ndarray, cov: np.ndarray
) -> dict[str, np.ndarray]:
    """Columns of the groups sky and beam, each with its ``_err``, for the sources of many images at once.

    Errors come by the delta method from the full covariance of ``x0 .. diff``, those of widths at the source without
    the bias of its ellipticity (`uncertainty.rounder`), of angles by `uncertainty.direction_error` from them; the beam
    and the WCS are exact. An axis that the beam does not leave
    resolved (squared width not above the beam's) is NaN, and so is its error; with the major axis unresolved the
    deconvolved angle is NaN too. The angle of a source that is round to rounding is NaN.

    The upper limits are made from squared widths, which near the beam are Gaussian and their roots are not: from
    max(square, 0), LIMIT_MAJOR or LIMIT_MINOR errors up; that of the minor axis is at most that of the major one.

    Parameters
    ----------
    headers
        Of each image: its WCS, from `celestial`, None gives NaN throughout; its beam, from `beam`, None gives NaN in
        the deconvolved columns; and its number of sources.
    params
        Shape (n, 6): x0, y0, amp, sigma, rho, diff [pixel] of all sources, image after image.
    cov
        Shape (n, 6, 6): their covariance. NaN gives NaN errors and leaves the values.

    Returns
    -------
    dict of ndarray
        Float64, shape (n,), by column name, units as in `pipeline.columns`. NaN where ``params`` is NaN, where the
        position has no sky position in the projection, and in shapes and errors where a neighbouring pixel has none.
    """
    params, cov = np.asarray(params, np.float64), np.asarray(cov, np.float64)
    counts = [count for _, _, count in headers]
    ends = np.cumsum(counts)[:-1]
    sides = [_points(wcs, *xy.T) for (wcs, _, _), xy in zip(headers, np.split(params[:, :2], ends), strict=True)]
    native, sky = (np.concatenate(points) for points in zip(*sides, strict=True))
    beams = np.repeat([_beam_shape(beam) for _, beam, _ in headers], counts, axis=0)
    values, errors, limits = _in_chunks(_sky_rows, beams, params, cov, native, sky)
    values[:, :2] = np.column_stack(_angles(sky[:, 0].T))
    names = (*SKY, *BEAM)
    columns = dict(zip(names, values.T, strict=True)) | {f"{n}_err": e for n, e in zip(names, errors.T, strict=True)}
    return columns | dict(zip(LIMITS, limits.T, strict=True))


def unresolved(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which sources with a beam are not known to be longer than it, bool (n,), from columns (n,) of `sky_columns`.

    A width below 2 e of its errors is a squared width below e of its own. Of a point source that is the longer axis of
    a random ellipse, and 95 % are below LIMIT_MINOR.
    """
    known = np.isfinite(columns["deconvolved_major_limit"])
    return known & ~(columns["deconvolved_major"] >= RESOLVED_ERRORS * columns["deconvolved_major_err"])


def beam_kernels(headers: Sequence[tuple[WCS | None, tuple[float, float, float] | None, np.ndarray]]) -> np.ndarray:
    """Kernels, see `pipeline.correlation`, of noise that was smoothed with the beam, for many images at once.

    Parameters
    ----------
    headers
        Of each HDU: its WCS, from `celestial`; its beam, from `beam`; and where its images are, (k, 2) x, y [pixel].

    Returns
    -------
    ndarray
        Float64, shape (n, 3) [pixel^-2], image after image. NaN where there is no WCS, no beam or no sky.
    """
    native = np.concatenate([_points(wcs, *xy.T)[0] for wcs, _, xy in headers])
    beams = np.repeat([_beam_shape(beam) for _, beam, _ in headers], [len(xy) for _, _, xy in headers], axis=0)
    return _in_chunks(_kernel_rows, beams, native)[0]


def pixel_position(wcs: WCS, ra: np.ndarray, dec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel position of ICRS positions, the inverse of the columns ``ra`` and ``dec``.

    Parameters
    ----------
    wcs
        From `celestial`.
    ra, dec
        Shape (n,) [deg].

    Returns
    -------
    x, y : ndarray
        Shape (n,), 0-based; NaN where the projection has no such point or the distortion cannot be inverted.
    """
    native = SkyCoord(ra, dec, unit="deg").transform_to(_frame(*_system(wcs))).spherical
    world = [native.lon.deg, native.lat.deg]
    if wcs.wcs.lng == 1:
        world.reverse()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # astropy tells of rows that are all NaN
            x, y = wcs.all_world2pix(*world, 0)
    except NoConvergence as error:  # distortions are inverted by iteration
        x, y = error.best_solution.T
        for rows in (error.divergent, error.slow_conv):
            if rows is not None:
                x[rows] = y[rows] = np.nan
    return x, y


# --- header -----------------------------------------------------------------------------------------------------------


def _value(card: fits.Card) -> object:
    try:
        return "" if isinstance(card.value, fits.card.Undefined) else card.value
    except fits.VerifyError:
        return "unreadable text"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _beam_number(header: fits.Header, keyword: str) -> float:
    value = _value(header.cards[keyword]) if keyword in header else None
    return float(value) if _is_number(value) else np.nan


def _column_cards(header: fits.Header, column: str) -> dict[str, fits.Card]:
    """Cards of an image column (1CTYPn, 12PCn and so on) under the names that an image has."""
    names = {str(_value(card)).strip().upper(): card.keyword[5:] for card in header.cards["TTYPE*"]}
    number = names.get(column.upper(), "")
    form = re.compile(rf"(?P<axis>\d)(?P<name>{'|'.join(_COLUMN)}){number}|(?P<i>\d)(?P<j>\d)(?P<matrix>PC|CD){number}")
    cards = {key: header.cards[key] for key in ("RADESYS", "EQUINOX") if key in header}
    for card in header.cards if number else ():
        if match := form.fullmatch(card.keyword):
            axis, name, i, j, matrix = match.group("axis", "name", "i", "j", "matrix")
            keyword = f"{_COLUMN[name]}{axis}" if name else f"{matrix}{i}_{j}"
            cards[keyword] = fits.Card(keyword, _value(card))
    return cards


def _wcs_cards(cards: dict[str, fits.Card], *, sip: bool) -> list[fits.Card]:
    """The cards of axes 1 and 2 that a WCS is made of; ValueError names the one at fault.

    Stricter than wcslib, which takes a default for what is absent, for text where a number belongs and for a zero row
    of CD, which lets a singular PC pass and reads 1.0D+01 as 1: positions would be wrong without a word.
    """
    numbers, others = {}, []
    for key, card in cards.items():
        name = _MATRIX.sub(r"\1\2_\3", key) if _MATRIX.fullmatch(key) else key  # PC001001 and PC01_01 are PC1_1
        if (_NUMBER.fullmatch(name) and not (sip and name.startswith("PV"))) or (sip and _SIP.fullmatch(name)):
            numbers[name] = _value(card)
        elif _OTHER.fullmatch(name):
            others.append(card)
    if "EQUINOX" in numbers:
        numbers.pop("EPOCH", None)
    form = "CD" if any(key.startswith("CD") and "_" in key for key in numbers) else "PC"
    wanted = ["CRVAL1", "CRVAL2", "CRPIX1", "CRPIX2", *(["CDELT1", "CDELT2"] if form == "PC" else [])]
    if missing := [key for key in wanted if key not in numbers]:
        msg = f"no {', '.join(missing)}"
        raise ValueError(msg)
    for key, number in numbers.items():
        if not _is_number(number):
            msg = f"{key} = {number!r}, wanted a number"
            raise ValueError(msg)
    default = np.zeros((2, 2)) if form == "CD" else np.eye(2)
    matrix = np.array([[numbers.get(f"{form}{i}_{j}", default[i - 1, j - 1]) for j in (1, 2)] for i in (1, 2)])
    if not abs(np.linalg.det(matrix)) > ROUNDING * np.sum(matrix**2):
        msg = f"the {form} matrix {matrix.tolist()} is singular"
        raise ValueError(msg)
    if form == "CD":  # PC stays as it is: any of its elements would put CROTA out of force
        numbers |= {f"CD{i}_{j}": matrix[i - 1, j - 1].item() for i in (1, 2) for j in (1, 2)}
    return [*others, *(fits.Card(key, number) for key, number in numbers.items())]


# --- celestial systems ------------------------------------------------------------------------------------------------


def _system(wcs: WCS) -> tuple[str, float]:
    """Name of the celestial system and its equinox [yr], by the defaults of FITS paper II, section 3.1."""
    kind = wcs.wcs.ctype[wcs.wcs.lng][:4]
    if kind == "GLON":
        return "GALACTIC", 2000.0
    if kind not in ("RA", "RA--"):
        return kind, 2000.0
    year = wcs.wcs.equinox
    name = wcs.wcs.radesys.upper() or ("ICRS" if np.isnan(year) else "FK4" if year < 1984 else "FK5")
    return name, float((1950 if name.startswith("FK4") else 2000) if np.isnan(year) else year)


@functools.lru_cache
def _frame(system: str, equinox: float) -> ICRS | FK5 | FK4 | FK4NoETerms | Galactic:
    if not 1800 < equinox < 2200:
        msg = f"EQUINOX = {equinox:g}, wanted a year"
        raise ValueError(msg)
    if system == "ICRS":
        return ICRS()
    if system == "GALACTIC":
        return Galactic()
    if system == "FK5":
        return FK5(equinox=Time(equinox, format="jyear"))
    if system in ("FK4", "FK4-NO-E"):
        return (FK4 if system == "FK4" else FK4NoETerms)(equinox=Time(equinox, format="byear"))
    msg = f"no conversion to ICRS from {system!r}, wanted GLON/GLAT, or RA/DEC with RADESYS ICRS, FK5, FK4 or FK4-NO-E"
    raise ValueError(msg)


@functools.lru_cache
def _rotation(system: str, equinox: float) -> np.ndarray:
    """Matrix (3, 3) from directions in a celestial system to ICRS."""
    return _transformed(np.eye(3), system, equinox)


def _transformed(directions: np.ndarray, system: str, equinox: float) -> np.ndarray:
    """Unit vectors (3, ...) of a celestial system in ICRS."""
    icrs = SkyCoord(*_angles(directions), unit="deg", frame=_frame(system, equinox)).icrs
    return icrs.represent_as(UnitSphericalRepresentation).to_cartesian().xyz.value


def _points(wcs: WCS | None, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors at ``(x, y)`` and their derivatives by x and y, in the system of the image and in ICRS.

    Returns two arrays of shape (n, 3, 3): direction, derivative by x, derivative by y [1/pixel]; NaN where there is no
    sky. Nothing here may round differently for another n, so there are no matrix products and no sums over an axis.
    """
    if wcs is None:
        nowhere = np.full((len(x), 3, 3), np.nan)
        return nowhere, nowhere
    steps = HALF_STEP * np.array([[0, 1, -1, 0, 0], [0, 0, 0, 1, -1]])[:, :, None]
    x, y = x + steps[0], y + steps[1]
    world = wcs.all_pix2world(x.ravel(), y.ravel(), 0)
    lon, lat = (np.radians(world[axis]).reshape(x.shape) for axis in (wcs.wcs.lng, wcs.wcs.lat))
    # Linear axes named RA, DEC run on beyond the poles; an infinite pixel has a direction in some projections.
    on_sky = np.isfinite(x) & np.isfinite(y) & np.isfinite(lon) & (np.abs(lat) <= np.pi / 2)
    lon, lat = np.where(on_sky, lon, np.nan), np.where(on_sky, lat, np.nan)
    native = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
    system = _system(wcs)
    if system[0] == "ICRS":
        sky = native
    elif system[0] == "FK4":  # elliptic aberration: no rotation
        sky = _transformed(native, *system)
    else:
        a, b, c = _rotation(*system).T[:, :, None, None]
        sky = a * native[0] + b * native[1] + c * native[2]
    return _with_slopes(native), _with_slopes(sky)


def _with_slopes(directions: np.ndarray) -> np.ndarray:
    """From directions (3, 5, n) at a centre and at its right, left, upper, lower neighbours to `_points`."""
    centre, right, left, up, down = directions.transpose(1, 0, 2)
    return np.stack([centre, (right - left) / (2 * HALF_STEP), (up - down) / (2 * HALF_STEP)]).transpose(2, 0, 1)


def _angles(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longitude in [0, 360) and latitude [deg] of unit vectors (3, ...)."""
    x, y, z = directions
    # Twice: the remainder of a tiny negative number rounds to 360.
    return np.degrees(np.arctan2(y, x)) % 360 % 360, np.degrees(np.arctan2(z, np.hypot(x, y)))


# --- shapes -----------------------------------------------------------------------------------------------------------


def _beam_shape(beam: tuple[float, float, float] | None) -> np.ndarray:
    """The beam as a shape on the sky [arcsec^2]."""
    major, minor, angle = beam or (np.nan, np.nan, np.nan)
    sin, cos = np.sin(np.radians(angle)), np.cos(np.radians(angle))
    axes = np.array([[sin, cos], [cos, -sin]])
    return axes @ np.diag([major**2, minor**2]) @ axes.T / FWHM_PER_SIGMA**2


def _jacobian(point: jax.Array) -> jax.Array:
    """Derivatives (2, 2) of the offset (east, north) [arcsec] by (x, y) [pixel] at one of `_points`."""
    x, y, z = point[0]
    lon, lat = jnp.arctan2(y, x), jnp.arctan2(z, jnp.hypot(x, y))
    east = jnp.array([-jnp.sin(lon), jnp.cos(lon), 0.0])
    north = jnp.array([-jnp.sin(lat) * jnp.cos(lon), -jnp.sin(lat) * jnp.sin(lon), jnp.cos(lat)])
    return ARCSEC * jnp.stack([east, north]) @ point[1:].T


def _axes(shape: jax.Array, floor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared rms widths along the major and minor axis [arcsec^2] and position angle [deg] of a shape.

    The angle is NaN where the squares do not differ by more than ``floor``.
    """
    mean, half, cross = (shape[1, 1] + shape[0, 0]) / 2, (shape[1, 1] - shape[0, 0]) / 2, shape[0, 1]
    # mean +- radius are the eigenvalues; the root has no derivative at a round source, where its mean value, 0, serves.
    square = half**2 + cross**2
    is_round = square <= floor**2
    radius = jnp.where(is_round, 0.0, jnp.sqrt(jnp.where(is_round, 1.0, square)))
    angle = jnp.degrees(jnp.arctan2(cross, half)) / 2 % 180 % 180
    return jnp.stack([mean + radius, mean - radius]), jnp.where(is_round, jnp.nan, angle)


def _ellipse(shape: jax.Array, floor: jax.Array) -> jax.Array:
    """FWHM along the major and minor axis [arcsec] and position angle [deg] of a shape; NaN below ``floor``."""
    squares, angle = _axes(shape, floor)
    widths = FWHM_PER_SIGMA * jnp.sqrt(jnp.where(squares > floor, squares, jnp.nan))
    return jnp.append(widths, jnp.where(jnp.isnan(widths[0]), jnp.nan, angle))


def _inverse(matrix: jax.Array) -> jax.Array:
    (a, b), (c, d) = matrix
    return jnp.array([[d, -b], [-c, a]]) / (a * d - b * c)


def _on_sky(params: jax.Array, jacobian: jax.Array) -> jax.Array:
    """The parameters (6,) of a source [pixel] as those on the sky: offset (east, north) and width [arcsec]."""
    inward, (rho, diff) = _inverse(jacobian), params[4:]
    form = inward.T @ jnp.array([[1 + diff, rho / 2], [rho / 2, 1 - diff]]) @ inward
    trace = jnp.trace(form)
    shape = jnp.stack([params[3] * jnp.sqrt(2 / trace), 4 * form[0, 1] / trace, (form[0, 0] - form[1, 1]) / trace])
    return jnp.concatenate([jacobian @ params[:2], params[2:3], shape])


def _sky_row(params: jax.Array, jacobian: jax.Array, beam: jax.Array) -> jax.Array:
    """One source: offset (east, north) [arcsec], then the ellipse on the sky, then the same without the beam.

    Last the squared widths without the beam, which may be negative. Only the derivatives of the offset mean anything.
    """
    sigma, rho, diff = params[3:]
    square = jnp.where(diff**2 + rho**2 / 4 < 1, sigma**2, jnp.nan)
    shape = jacobian @ (square * _inverse(jnp.array([[1 + diff, rho / 2], [rho / 2, 1 - diff]]))) @ jacobian.T
    floor = ROUNDING * jnp.trace(shape)
    rest = shape - beam
    return jnp.concatenate(
        [jacobian @ params[:2], _ellipse(shape, floor), _ellipse(rest, floor), _axes(rest, floor)[0]]
    )


@jax.jit
@jax.vmap
def _sky_rows(beam, params, cov, native, sky):
    """Values and standard errors of the rows, (n, 8) each, and upper limits, (n, 2)."""
    jacobian = _jacobian(sky)
    turn = jacobian @ _inverse(_jacobian(native))  # the beam lies in the system of the image: its north, not ICRS north
    beam = turn @ beam @ turn.T
    values = _sky_row(params, jacobian, beam)
    # The ellipticity whose bias lengthens the errors of widths is that on the sky, whatever the shape of the pixels.
    source, along = _on_sky(params, jacobian), jax.jacfwd(_on_sky)(params, jacobian)
    cov = along @ cov @ along.T
    found, unbiased = (jax.jacfwd(_sky_row)(one, jnp.eye(2), beam) for one in (source, rounder(source, cov)[0]))
    # Errors of widths as in `uncertainty.derived`, but where the rounder source is all beam. Squares are nearer to
    # normal, and need none of it.
    widths = jnp.array(WIDTHS)
    theirs = jnp.where(jnp.isfinite(unbiased[widths]), unbiased[widths], found[widths])
    slopes = found.at[widths].set(theirs)
    errors = jnp.sqrt(jnp.einsum("ki,ij,kj->k", slopes, cov, slopes))
    angles = jnp.array(ANGLES)
    errors = errors.at[angles].set(jnp.degrees(direction_error(jnp.radians(errors[angles]))))
    values, squares = values[:8], values[8:]
    most = jnp.maximum(squares, 0.0) + jnp.array([LIMIT_MAJOR, LIMIT_MINOR]) * errors[8:]
    limits = FWHM_PER_SIGMA * jnp.sqrt(jnp.stack([most[0], jnp.minimum(most[0], most[1])]))
    return values, jnp.where(jnp.isnan(values), jnp.nan, errors[:8]), limits


@jax.jit
@jax.vmap
def _kernel_rows(beam, native):
    """One array: the kernels (n, 3) of noise smoothed with the beams."""
    jacobian = _jacobian(native)
    kernel = jacobian.T @ _inverse(beam) @ jacobian
    return (jnp.stack([kernel[0, 0], kernel[0, 1], kernel[1, 1]]),)


def _in_chunks(function: Callable[..., tuple[jax.Array, ...]], *arrays: np.ndarray) -> list[np.ndarray]:
    """``function`` over any number of rows, `CHUNK` at a time, the last chunk filled up with NaN."""
    count = len(arrays[0])
    size = max(1, -(-count // CHUNK)) * CHUNK
    filled = [np.concatenate([a, np.full((size - count, *a.shape[1:]), np.nan)]) for a in arrays]
    parts = [function(*(a[start : start + CHUNK] for a in filled)) for start in range(0, size, CHUNK)]
    return [np.concatenate(side)[:count].astype(np.float64) for side in zip(*parts, strict=True)]
