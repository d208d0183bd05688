"""The certificate: sources put into the run's own residuals and fitted again, and how often the errors held.

A field of noise is a mosaic of the residuals of four images. Each is moved by a quarter of its sides, and the block of
half the sides that then surrounds the place of the source comes whole from the image that the source was found in; the
rest of the field is from three others. The source that was found is put back at its own place, with its own
amplitude, and the field goes through the same fit.

Why so: residuals have lost what their own fit could follow, sum grad m psi = 0. Put back where it was, a source would
be found again exactly as it was put in, whatever the noise; and the background and the scale of a field made of one
image alone are those of that image. Here the old source, and with it most of what is missing, lies a quarter of
both sides away from the new one, and no image brings more than its block. What is still missing is known to first
order, see `_kept`, and pulls are stretched by it. Masks, uncertainty maps, neighbours, artefacts and the correlation of
the noise move along with the pixels; within a block they are as they were.

Nothing is drawn at random: the images are those with the lowest ``image_id``, which is a hash.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.columns import CERTIFICATE, DERIVED, HARMLESS, PARAMETERS, SNR_BINS, UNSOLVED, empty_rows, parameter_names
from pipeline.images import Stack
from pipeline.model import derived, direction_pull, direction_stretched, gaussian, of_rows

#: Images whose residuals make one field.
DONORS = 4
#: Share of the variance that must be left in the residuals for a pull to count.
LEAST_KEPT = 0.3
#: Sources below which no error is corrected, and Monte Carlo errors beyond which one is: of some 45 parameters and bins
#: one would be off by 3 in every eighth run for no reason, by 4 in one of 300.
LEAST_SOURCES, CORRECTED_BEYOND = 50, 4.0
#: Pulls below which their spread has no Monte Carlo error to speak of.
FEWEST = 10
#: Pulls beyond this are no errors of a fit but other sources; they count for coverage, not for means.
FAR = 5.0
#: Shares of a Gaussian within one and two standard deviations.
NOMINAL = tuple(math.erf(errors / math.sqrt(2.0)) for errors in (1, 2))

#: Columns of the catalogue that `inject` needs of a row, beside its pixels.
NEEDED = (*PARAMETERS, "x0_start", "y0_start", "snr")


class Trials(NamedTuple):
    """Sources put in and found again, n of them, and the k numbers of each that `certified` names.

    pull, bound, kept : (n, k) fit - truth over its error, of theta `direction_pull`; over its error by the covariance
    ``fisher``; and the share of its variance that the residuals have left, see `_kept`. snr : (n,) of the row that the
    source is from. solved : (n,) bool, whether the fit is a solution.
    """

    pull: np.ndarray
    bound: np.ndarray
    kept: np.ndarray
    snr: np.ndarray
    solved: np.ndarray


def certified(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of what is fitted and derived with the settings ``fit``: the columns whose errors pixels alone decide."""
    return (*parameter_names(settings["background"], settings["scale"]), *DERIVED)


# ---- which rows -----------------------------------------------------------------------------------------------------


def snr_bins(snr: np.ndarray) -> np.ndarray:
    """Numbers of the bins of `columns.SNR_BINS` that hold ``snr`` (n,); -1 where none does, or NaN."""
    inside = (snr >= SNR_BINS[0]) & np.isfinite(snr)
    return np.where(inside, np.searchsorted(SNR_BINS, snr, side="right") - 1, -1)


def choose(rows: Mapping[str, np.ndarray], sources: int) -> np.ndarray:
    """Places of at most ``sources`` good rows, as many from each bin of S/N as there are, lowest ``image_id`` first.

    Good is what has no flag but harmless ones. Of rows that come in pieces, those chosen from the pieces hold those
    chosen from the whole.

    rows : dict of (n,) arrays ``image_id``, ``flags`` and ``snr``. Returns int (m,).
    """
    bins = snr_bins(rows["snr"])
    good = np.flatnonzero((rows["flags"] & ~HARMLESS == 0) & (bins >= 0))
    good = good[np.argsort(rows["image_id"][good])]
    rank = np.zeros(len(good), int)
    for number in range(len(SNR_BINS) - 1):
        here = bins[good] == number
        rank[here] = np.arange(np.count_nonzero(here))
    return good[np.lexsort((bins[good], rank))][:sources]


# ---- sources in residuals -------------------------------------------------------------------------------------------


def inject(
    stack: Stack, rows: Mapping[str, np.ndarray], fit: Callable[..., Any], settings: Mapping[str, Any]
) -> Trials:
    """Put the sources of n images into fields made of their residuals, and fit them again.

    Parameters
    ----------
    stack : Stack
        n images of one size, n a multiple of DONORS; each DONORS in a row share their residuals.
    rows : dict of (n,) arrays
        What the run found in them: the columns NEEDED of good rows.
    fit : callable
        `pipeline.fit.fit_rows`.
    settings : dict
        Of ``fit``: the config section, and ``near``.
    """
    names = parameter_names(settings["background"], settings["scale"])
    fit_scale = "scale" in names
    groups = [slice(low, low + DONORS) for low in range(0, len(stack.data), DONORS)]
    noise_map = np.ones_like(stack.data) if stack.noise_map is None else stack.noise_map
    made = [
        _fields(
            stack.data[group],
            stack.mask[group],
            noise_map[group],
            {name: rows[name][group] for name in NEEDED},
            len(names) - 6 - fit_scale,
            fit_scale,
        )
        for group in groups
    ]
    data, mask, noise, kept = (np.concatenate(parts) for parts in zip(*made, strict=True))
    found, covariances = fit(data, mask, None if stack.noise_map is None else noise, **settings)
    truth = {name: rows[name] for name in names}
    if "background_x" in names:
        # A plane is about the place where its fit began, which is not that of the first one.
        moved_x, moved_y = (found[name] - rows[name] for name in ("x0_start", "y0_start"))
        truth["background"] = rows["background"] + rows["background_x"] * moved_x + rows["background_y"] * moved_y
    sources = np.stack([rows[name] for name in PARAMETERS[:6]], axis=1)
    truth |= dict(zip(DERIVED, derived(sources).T, strict=True))
    offset = np.stack([found[name] - true for name, true in truth.items()], axis=1)
    offset[:, -1] = _turned(offset[:, -1])
    error = np.stack([found[f"{name}_err"] for name in truth], axis=1)
    # Where a fit failed these are NaN; `certify` leaves them out.
    with np.errstate(invalid="ignore", divide="ignore"):
        bound = np.sqrt(_variances(covariances["fisher"], _derived_slopes(sources)))
        pull = offset / error
        # `certify` stretches pulls by what the residuals have lost: an interval of all directions remains one.
        pull[:, -1] = direction_pull(offset[:, -1], error[:, -1], kept[:, -1]) * np.sqrt(kept[:, -1])
        return Trials(pull, offset / bound, kept, rows["snr"], found["flags"] & UNSOLVED == 0)


def _fields(
    data: np.ndarray,
    mask: np.ndarray,
    noise: np.ndarray,
    rows: Mapping[str, np.ndarray],
    n_background: int,
    fit_scale: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The fields of DONORS images, one around the source of each: data, mask, noise maps, and what is kept (., k)."""
    images, ny, nx = data.shape
    y, x = np.mgrid[:ny, :nx].astype(float)
    used = ~mask & np.isfinite(data)
    # Over what is typical of its image, so that a quiet image may lend its residuals to a noisy one.
    level = np.array([np.median(noise[i][used[i]]) for i in range(images)], float)
    noise = np.where(used, noise / level[:, None, None], 1.0)
    width = (rows["scale"] * level)[:, None, None]
    model = of_rows(rows, x, y)
    residual = np.where(used, (data - model) / (width * noise), 0.0)
    weight = used / noise
    sources = np.stack([rows[name] for name in PARAMETERS[:6]], axis=1)
    slopes = np.stack([_slopes(source, x, y, n_background) for source in sources])

    # The field is as if its opposite sides met, and so are the images.
    down, right = (np.arange(ny) + ny // 4) % ny, (np.arange(nx) + nx // 4) % nx

    def moved(stacked: np.ndarray) -> np.ndarray:
        return stacked[..., down[:, None], right]

    # Which image each pixel is from: blocks of half the sides, one of them around the source.
    i, y0, x0 = (column[:, None, None] for column in (np.arange(images), rows["y0"], rows["x0"]))
    below, beside = (y - y0 + ny / 4) % ny >= ny / 2, (x - x0 + nx / 4) % nx >= nx / 2
    donor = (i + 2 * below + beside) % images

    def mosaic(stacked: np.ndarray) -> np.ndarray:
        return np.take_along_axis(moved(stacked), donor, axis=0)

    field_noise, field_weight = mosaic(noise), mosaic(weight)
    field = model + width * field_noise * mosaic(residual)
    kept = _kept(slopes, _derived_slopes(sources), weight, field_weight, donor, moved)
    if fit_scale:
        kept = np.insert(kept, 6 + n_background, _scale_kept(weight, field_weight, donor), axis=1)
    return field, field_weight == 0, field_noise * level[:, None, None], kept


def _slopes(source: np.ndarray, x: np.ndarray, y: np.ndarray, n_background: int) -> np.ndarray:
    """Derivatives (ny, nx, 6 + n_background) of the model in its parameters, by complex steps: exact to rounding."""
    step = 1e-30
    turned = source + 1j * step * np.eye(6)
    gaussians = [gaussian(one, x, y).imag / step for one in turned]
    return np.stack([*gaussians, np.ones_like(x), x - source[0], y - source[1]][: 6 + n_background])


def _derived_slopes(sources: np.ndarray) -> np.ndarray:
    """Derivatives (n, 6, 6) of `model.derived` in the parameters of sources (n, 6), by central differences."""
    steps = 1e-6 * np.ones_like(sources)
    steps[:, 2:4] *= np.abs(sources[:, 2:4])
    moves = steps[:, :, None] * np.eye(6)
    change = derived(sources[:, None] + moves) - derived(sources[:, None] - moves)
    change[..., -1] = _turned(change[..., -1])
    return (change / (2.0 * steps[:, :, None])).transpose(0, 2, 1)


def _turned(angle: np.ndarray) -> np.ndarray:
    """Differences of directions [rad], in [-pi/2, pi/2)."""
    return (angle + 0.5 * np.pi) % np.pi - 0.5 * np.pi


def _variances(covariance: np.ndarray, derived_slopes: np.ndarray) -> np.ndarray:
    """Variances (n, p + 6) of p parameters with this covariance (n, p, p), and of what is derived from them."""
    own = np.diagonal(covariance, axis1=1, axis2=2)
    theirs = np.einsum("nka,nab,nkb->nk", derived_slopes, covariance[:, :6, :6], derived_slopes)
    return np.concatenate([own, theirs], axis=1)


def _kept(
    slopes: np.ndarray,
    derived_slopes: np.ndarray,
    weight: np.ndarray,
    field_weight: np.ndarray,
    donor: np.ndarray,
    moved: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """The share of the variance that fields of residuals have, of q parameters and what is derived, (n, q + 6).

    An error of a fit is, to first order, a sum over pixels of a psi. The residuals of an image have lost the
    components of psi along its own slopes M, that is P psi with P = M (M^T M)^-1 M^T. So a field has
    1 - sum |P a|^2 / sum |a|^2, the sums over its images, with a where a pixel is from the image and 0 elsewhere.

    slopes : (n, q, ny, nx) of the source of each image, and of its field; derived_slopes : (n, 6, 6), of what is
    derived from a source in its parameters. weight : (n, ny, nx) of each image,
    field_weight : of each field. donor : (n, ny, nx) int, the image a pixel is from. moved : from places in an image
    to those in a field.
    """
    # What is kept does not depend on the unit of a parameter, but rounding does.
    size = np.maximum(np.max(np.abs(slopes), axis=(2, 3)), np.finfo(float).tiny)
    slopes = slopes / size[:, :, None, None]
    # Of a rank that pixels allow; a source without a pixel is no solution of its fit, and does not count.
    whole, there = (
        np.linalg.pinv(np.stack(list(map(_products, slopes, slopes, squares))), hermitian=True)
        for squares in (weight**2, field_weight**2)
    )
    lost = np.zeros_like(there)
    for image, inverse in enumerate(whole):
        other = moved(slopes[image])
        for field, own in enumerate(slopes):
            here = donor[field] == image
            cross = _products(own[:, here], other[:, here], field_weight[field, here] ** 2)
            lost[field] += cross @ inverse @ cross.T
    gone = there @ lost @ there
    derived_slopes = derived_slopes / size[:, None, :6]
    with np.errstate(invalid="ignore"):
        return 1.0 - _variances(gone, derived_slopes) / _variances(there, derived_slopes)


def _scale_kept(weight: np.ndarray, field_weight: np.ndarray, donor: np.ndarray) -> np.ndarray:
    """The same of the scale, (n,): 1 - sum n^2 / N / sum n, n of N pixels from each image; arguments as of `_kept`.

    What is lost is the mean of chi.
    """
    images = np.arange(len(weight))[:, None, None, None]
    taken = np.count_nonzero((donor == images) & (field_weight > 0), axis=(2, 3))
    lost = np.sum(taken**2 / np.count_nonzero(weight, axis=(1, 2))[:, None], axis=0)
    return 1.0 - lost / np.maximum(np.sum(taken, axis=0), 1)


def _products(left: np.ndarray, right: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """sum of weight left right^T over pixels; left (q, ...), right (r, ...), weight (...)."""
    # Not by BLAS, whose sums depend on the number of threads.
    flat = (weight * left).reshape(len(left), -1)
    return np.einsum("ap,bp->ab", flat, right.reshape(len(right), -1))


# ---- what they say --------------------------------------------------------------------------------------------------


def certify(parts: Sequence[Trials], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The certificate, columns of `columns.CERTIFICATE`, one row a name of ``names`` and bin of S/N.

    What counts are solutions whose residuals have not lost too much; a row without any has ``sources`` 0 and NaN.
    """
    joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)] if parts else []
    table = empty_rows(0, CERTIFICATE)
    lines = []
    for j, name in enumerate(names):
        for number, (low, high) in enumerate(itertools.pairwise(SNR_BINS)):
            line = {key: values[0] for key, values in empty_rows(1, CERTIFICATE).items()}
            line |= {"parameter": name, "snr_low": low, "snr_high": high}
            if joined:
                pull, bound, kept, snr, solved = joined
                here = snr_bins(snr) == number
                counts = here & solved & (kept[:, j] >= LEAST_KEPT) & np.isfinite(pull[:, j])
                line["failed"] = np.count_nonzero(here & ~solved)
                line["sources"] = np.count_nonzero(counts)
                if line["sources"]:
                    line |= _statistics(pull[counts, j], bound[counts, j], kept[counts, j])
            lines.append(line)
    return {key: np.array([line[key] for line in lines], values.dtype) for key, values in table.items()}


def _statistics(pull: np.ndarray, bound: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """Columns of one row of the certificate, from n >= 1 trials."""
    n = len(pull)
    # What the residuals have lost is spread, not bias.
    middle = np.median(pull)
    pull = middle + (pull - middle) / np.sqrt(kept)
    size = np.abs(pull)
    near = size <= FAR
    line: dict[str, float] = {"kept": float(np.median(kept)), "median_pull": float(np.median(pull))}
    for label, nominal, errors in zip(("68", "95"), NOMINAL, (1.0, 2.0), strict=True):
        line[f"coverage_{label}"] = float(np.mean(size <= errors))
        line[f"coverage_{label}_err"] = math.sqrt(nominal * (1.0 - nominal) / n)
    if np.count_nonzero(near) >= FEWEST:
        centred = pull[near] - pull[near].mean()
        spread = float(centred.std())
        line |= {"bias": float(pull[near].mean()), "bias_err": spread / math.sqrt(len(centred)), "spread": spread}
        line["spread_err"] = _error_of_variance(centred) / (2.0 * spread) if spread > 0 else 0.0
        over = (bound[near] - bound[near].mean()) / np.sqrt(kept[near])
        line["over_bound"], line["over_bound_err"] = float(np.mean(over**2)), _error_of_variance(over)
    if n >= LEAST_SOURCES:
        # Between quantiles, whatever the distribution: the interval is that of the shares that chance may give.
        chance = CORRECTED_BEYOND * math.sqrt(NOMINAL[0] * (1.0 - NOMINAL[0]) / n)
        low, factor, high = np.quantile(size, [NOMINAL[0] - chance, NOMINAL[0], NOMINAL[0] + chance])
        line["factor"], line["factor_err"] = factor, (high - low) / (2.0 * CORRECTED_BEYOND)
    return line


def _error_of_variance(centred: np.ndarray) -> float:
    """The standard error of the mean square of some values of mean 0."""
    return float(np.std(centred**2) / math.sqrt(len(centred)))


def corrections(certificate: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By parameter, the factor of its error in each bin of S/N; 1 where the certificate finds nothing wrong."""
    off = np.abs(certificate["factor"] - 1.0) > CORRECTED_BEYOND * certificate["factor_err"]
    factor = np.where(off, certificate["factor"], 1.0)
    return {name: factor[certificate["parameter"] == name] for name in dict.fromkeys(certificate["parameter"])}


def calibrate(rows: np.ndarray, certificate: Mapping[str, np.ndarray]) -> None:
    """Fill in the columns ``<name>_err_cal`` of ``rows``, a structured array with the columns of the catalogue."""
    bins = snr_bins(rows["snr"])
    factors = corrections(certificate)
    for name in (*PARAMETERS, *DERIVED):
        factor = np.append(factors.get(name, np.ones(len(SNR_BINS) - 1)), 1.0)[bins]  # -1, no bin, is the last
        stretched = direction_stretched if name == "theta" else np.multiply
        rows[f"{name}_err_cal"] = stretched(rows[f"{name}_err"], factor)
