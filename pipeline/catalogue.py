"""The catalogue on disk: parts, one a shard, and the file they are merged into. The only user of h5py.

Layout of a catalogue, format version 1; a part has the first three and no metadata beside them, of what goes along
with images the texts in ``/carried``, whose attribute ``kinds`` tells what they are, see `pipeline.carry`, and what its
rows come from, block by block, in ``/blocks``::

    /                       attributes format, format_version, unit, unit_note, origin (what it was made of, JSON)
    /catalogue              table of columns.COLUMNS and then of what goes along, one row an image
    /covariance/<name>      (n, p, p) float64, rows as in /catalogue, attribute parameters = order of the p axes
    /rejected               table of columns.REJECTED, one row an image that could not be read
    /truth                  table of columns.TRUTH, rows as in /catalogue; simulated images only
    /certificate            table of columns.CERTIFICATE, one row a column and bin of S/N; where asked for
    /flag_bits              table of name, bit, meaning
    /provenance/<name>      one text each

A table is a compound dataset beside ``<name>.__table_column_meta__``, which is astropy's own layout:
``QTable.read(path, path="catalogue")`` knows units and descriptions, and ``.write("catalogue.fits")`` on what it gives
is for TOPCAT; h5py, PyTables and ``pandas.read_hdf(path, key="catalogue")`` read the same dataset. Text is fixed-length
UTF-8 in bytes; bytes of a file name that are not UTF-8 are kept as they are (pandas alone refuses these). Nothing is
compressed: gzip would save an eighth, and take three times as long as all else that merging does. The same parts give
the same file, byte by byte: no times are kept.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from astropy import units
from astropy.table import Table, meta

from pipeline.carry import Value, as_text, column_of, from_text, kinds, of_text
from pipeline.certificate import calibrate
from pipeline.columns import CERTIFICATE, COLUMNS, COVARIANCES, ENDINGS, FLAGS, REJECTED, TRUTH, Column
from pipeline.files import replacing

#: What h5py and json meet in files that are damaged, or none.
DAMAGED = (OSError, KeyError, ValueError, RuntimeError, AttributeError)
FORMAT = "cauchyfit catalogue"
FORMAT_VERSION = 1

FLAG_BITS = (
    Column("name", "S", "", "name of the flag", "flag_bits"),
    Column("bit", "i8", "", "number of the bit in the column flags, from 0", "flag_bits"),
    Column("meaning", "S", "", "when the bit is set", "flag_bits"),
)

#: What a part keeps of each block of its manifest.
BLOCKS = (
    Column("digest", "S", "", "of all that its rows follow from", "blocks"),
    Column("rows", "i8", "", "how many of its images have one", "blocks"),
    Column("pixels", "S", "", "digest of its pixels, masks and uncertainty maps", "blocks"),
    Column("unit", "S", "", "BUNIT of its images", "blocks"),
)

# What is held in memory of one dataset.
SLAB_BYTES = 1 << 23

_META = ".__table_column_meta__"
_IMAGE = units.def_unit("image")


class Summary(NamedTuple):
    """What a catalogue holds beside its rows.

    ``rows``, ``rejected``: numbers of rows; ``has_truth``; ``parameters``: order of the covariance matrices;
    ``units``: unit of each column of the catalogue as text; ``unit_note``: why columns in image units have none,
    else ""; ``provenance``: text by name; ``has_certificate``.
    """

    rows: int
    rejected: int
    has_truth: bool
    parameters: tuple[str, ...]
    units: dict[str, str]
    unit_note: str
    provenance: dict[str, str]
    has_certificate: bool


class Part(NamedTuple):
    """What `write_part` takes; the rows of the ``blocks`` lie one after another."""

    rows: dict[str, np.ndarray]
    covariance: dict[str, np.ndarray]
    carried: dict[str, list[Value]]
    blocks: dict[str, np.ndarray]


def write_part(
    path: str | Path,
    rows: Mapping[str, np.ndarray],
    covariance: Mapping[str, np.ndarray],
    parameters: Sequence[str],
    rejected: Iterable[tuple],
    unit: str,
    carried: Mapping[str, Sequence[Value]] | None = None,
    origin: Mapping[str, Any] | None = None,
    blocks: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write the part of the catalogue that one shard gives.

    Parameters
    ----------
    path : path
        Replaced as a whole or not at all.
    rows : dict of (n,) arrays
        Every column of `columns.COLUMNS`; text as str or bytes.
    covariance : dict of (n, p, p) arrays
        Every name of `columns.COVARIANCES`.
    parameters : sequence of p str
        Order of the last two axes of ``covariance``.
    rejected : iterable of (file, hdu, plane, source, reason)
    unit : str
        BUNIT of the images, "" where they have none; where they differ, one a line.
    carried : dict of sequences of n values, optional
        What goes along with the images.
    origin : dict, optional
        What the rows come from; its ``digest`` is that of `origin.part_digest`. JSON.
    blocks : dict of arrays, optional
        Columns of `BLOCKS`, a row for each block of the manifest, in its order.

    Raises
    ------
    ValueError
        If a column or covariance is missing, unknown, or of the wrong shape or kind.
    """
    tables = {
        "catalogue": _pack(path, COLUMNS, rows),
        "rejected": _pack(path, REJECTED, _columns(REJECTED, rejected)),
    }
    if blocks is not None:
        tables["blocks"] = _pack(path, BLOCKS, blocks)
    if carried:
        texts = {name: np.array(as_text(values), dtype=object) for name, values in carried.items()}
        tables["carried"] = _pack(path, [Column(name, "S", "", "", "carried") for name in texts], texts)
    shape = (len(tables["catalogue"]), len(parameters), len(parameters))
    _check_names(path, "covariances", covariance, COVARIANCES)
    with replacing(path) as temporary, h5py.File(temporary, "w", locking="best-effort") as file:
        file.attrs.update(format=FORMAT, format_version=FORMAT_VERSION, unit=unit, origin=json.dumps(origin or {}))
        for name, array in tables.items():
            file.create_dataset(name, data=array, track_times=False)
        if carried:
            file["carried"].attrs["kinds"] = [kinds(values) for values in carried.values()]
        for name in COVARIANCES:
            if covariance[name].shape != shape:
                msg = f"{path}: covariance {name} has shape {covariance[name].shape}, wanted {shape}"
                raise ValueError(msg)
            _create_covariance(file, name, shape[0], parameters)[...] = covariance[name]


def write_certificate(path: str | Path, certificate: Mapping[str, np.ndarray], origin: Mapping[str, Any]) -> None:
    """Write a certificate, columns of `columns.CERTIFICATE`, as a file of its own; `read_rows` reads it."""
    rows = _pack(path, CERTIFICATE, certificate)
    with replacing(path) as temporary, h5py.File(temporary, "w", locking="best-effort") as file:
        file.attrs["origin"] = json.dumps(origin)
        file.create_dataset("certificate", data=rows, track_times=False)


def read_origin(path: str | Path) -> dict[str, Any]:
    """What a part, certificate or catalogue was made of, and how."""
    with _open(path) as file:
        return json.loads(file.attrs["origin"])


def read_part(path: str | Path) -> Part:
    """What a part holds; ``OSError`` where there is none, ``KeyError`` where it tells of no blocks."""
    with _open(path) as file:  # once: another job may replace it meanwhile
        texts = _read(file["carried"]) if "carried" in file else {}
        return Part(
            _read(file["catalogue"]),
            {name: file[f"covariance/{name}"][:] for name in COVARIANCES},
            {name: from_text(column) for name, column in texts.items()},
            _read(file["blocks"]),
        )


def digest_of(path: str | Path) -> str:
    """Digest of what a part, certificate or catalogue was made of.

    "" where it is none or not whole, or a part without images that were there, and may be again.
    """
    try:
        origin = read_origin(path)
    except DAMAGED:
        return ""
    return "" if origin.get("retry") else origin.get("digest", "")


def merge(
    parts: Sequence[str | Path],
    path: str | Path,
    *,
    digests: Sequence[str] | None = None,
    truth: Mapping[str, np.ndarray] | None = None,
    certificate: Mapping[str, np.ndarray] | None = None,
    provenance: Mapping[str, str],
    image_units: Mapping[str, str] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write the catalogue from its parts, in the order given, holding a few megabytes of them at a time.

    Parameters
    ----------
    parts : sequence of paths
        Files of `write_part`, at least one; a part may have no rows.
    digests : sequence of str, optional
        What the parts must be made of. Each is looked at where its rows are read: another job may replace it meanwhile.
    path : path
        Replaced as a whole or not at all.
    truth : dict of (m,) arrays, optional
        ``image_id`` of every row of the catalogue, in any order, and columns of `columns.TRUTH`; what is absent is NaN.
    certificate : dict of (m,) arrays, optional
        Columns of `columns.CERTIFICATE`; corrects the errors ``<name>_err_cal``, which are NaN without it.
    provenance : dict of str
        Texts of the group ``provenance``.
    image_units : dict of str, optional
        Units of columns, and of their errors, that are not in the unit of the images as `columns` has it:
        ``{"scale": ""}`` where the images come with uncertainty maps.
    origin : dict, optional
        Its ``digest`` is that of `origin.catalogue_digest`. JSON.

    Raises
    ------
    ValueError
        If there is no part, if one is not what it must be, if parts disagree in format, columns or parameters, or if
        the truth of a row is missing.

    Notes
    -----
    The word ``image`` in the unit of a column becomes the unit of the images. Where images have none, differ, or
    have one that astropy does not read, it becomes 1, and the attribute ``unit_note`` says why.
    """
    if not parts:
        msg = f"{path}: no parts to merge, wanted one a shard"
        raise ValueError(msg)
    wanted: Sequence[str | None] = digests or [None] * len(parts)
    heads = [_inspect(part, digest) for part, digest in zip(parts, wanted, strict=True)]
    for part, head in zip(parts, heads, strict=True):
        if head.parameters != heads[0].parameters:
            msg = f"{part}: parameters {head.parameters}, but {parts[0]} has {heads[0].parameters}"
            raise ValueError(msg)
        if head.carried.keys() != heads[0].carried.keys():
            msg = f"{part}: carries {list(head.carried)}, but {parts[0]} carries {list(heads[0].carried)}"
            raise ValueError(msg)
    columns = (*COLUMNS, *(column_of(name, [head.carried[name] for head in heads]) for name in heads[0].carried))
    count = sum(head.rows for head in heads)
    widths = {table: {k: max(h.widths[table][k] for h in heads) for k in w} for table, w in heads[0].widths.items()}
    image, note = _common_unit({text for head in heads if head.rows for text in head.unit.split("\n")})
    texts = {c.name: (image_units or {}).get(re.sub(f"({'|'.join(ENDINGS)})$", "", c.name), c.unit) for c in COLUMNS}
    bits = _pack(path, FLAG_BITS, _columns(FLAG_BITS, ((f.name, f.bit, f.meaning) for f in FLAGS)))

    with replacing(path) as temporary, h5py.File(temporary, "w", locking="best-effort") as file:
        file.attrs.update(format=FORMAT, format_version=FORMAT_VERSION, unit=image.to_string(), unit_note=note)
        file.attrs["origin"] = json.dumps(origin or {})

        def table(name: str, columns: tuple[Column, ...], dtype: np.dtype, rows: int) -> h5py.Dataset:
            lines = _table_meta(columns, dtype, {c.name: _column_unit(texts.get(c.name, ""), image) for c in columns})
            file.create_dataset(name + _META, data=lines)
            return file.create_dataset(name, (rows,), dtype, track_times=False)

        table("flag_bits", FLAG_BITS, bits.dtype, len(bits))[...] = bits
        if certificate is not None:
            lines = _pack(path, CERTIFICATE, certificate)
            table("certificate", CERTIFICATE, lines.dtype, len(lines))[...] = lines
        outputs = {
            "catalogue": table("catalogue", columns, _dtype(columns, widths["catalogue"] | widths["carried"]), count),
            "rejected": table(
                "rejected", REJECTED, _dtype(REJECTED, widths["rejected"]), sum(h.rejected for h in heads)
            ),
            **{f"covariance/{k}": _create_covariance(file, k, count, heads[0].parameters) for k in COVARIANCES},
        }
        if truth is not None:
            order = np.argsort(truth["image_id"])
            truth = {name: np.asarray(values)[order] for name, values in truth.items()}
            truth_rows = table("truth", TRUTH, _dtype(TRUTH, widths["catalogue"]), count)
        done = dict.fromkeys(outputs, 0)
        for part, digest in zip(parts, wanted, strict=True):
            with _open(part, digest) as source:
                for name, output in outputs.items():
                    first = done[name]
                    for slab in _slabs(source[name]):
                        start, stop = done[name], done[name] + len(slab)
                        if name == "catalogue" and certificate is not None:
                            calibrate(slab, certificate)
                        if name == "catalogue" and "carried" in source:
                            slab = _carrying(slab, source["carried"][start - first : stop - first], output.dtype)
                        output[start:stop] = slab
                        if name == "catalogue" and truth is not None:
                            truth_rows[start:stop] = _truth_of(slab, truth, truth_rows.dtype)
                        done[name] = stop
        if {name: len(output) for name, output in outputs.items()} != done:
            msg = f"{path}: a part was replaced while it was merged; give the command again"
            raise ValueError(msg)
        for name, text in provenance.items():
            if "/" in name:
                msg = f"{path}: provenance name {name!r} holds a '/'"
                raise ValueError(msg)
            file[f"provenance/{name}"] = np.bytes_(_encode(text) or b"\0")


def read_summary(path: str | Path) -> Summary:
    """Sizes, units, parameters and provenance of a catalogue; no rows are read."""
    with _open(path) as file:
        lines = [line.decode() for line in file["catalogue" + _META]]
        return Summary(
            rows=len(file["catalogue"]),
            rejected=len(file["rejected"]),
            has_truth="truth" in file,
            parameters=tuple(file["covariance"][COVARIANCES[0]].attrs["parameters"]),
            units={c["name"]: str(c.get("unit", "")) for c in meta.get_header_from_yaml(lines)["datatype"]},
            unit_note=file.attrs["unit_note"],
            provenance={k: _decode(v[()]) for k, v in file.get("provenance", {}).items()},
            has_certificate="certificate" in file,
        )


def read_rows(
    path: str | Path,
    columns: Sequence[str] | None = None,
    start: int = 0,
    stop: int | None = None,
    *,
    table: str = "catalogue",
    digest: str | None = None,
) -> dict[str, np.ndarray]:
    """Rows ``start..stop-1`` of a table as a dict of columns (all by default); text as an object array of str.

    digest : what the part must be made of, else a ValueError.
    """
    with _open(path, digest) as file:
        return _read(file[table], columns, start, stop)


def _read(
    dataset: h5py.Dataset, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
) -> dict[str, np.ndarray]:
    names = list(dataset.dtype.names if columns is None else columns)
    rows = dataset.fields(names)[start:stop]
    text = {name for name in names if rows.dtype[name].kind == "S"}
    return {k: np.array([_decode(v) for v in rows[k]], dtype=object) if k in text else rows[k] for k in names}


class _Head(NamedTuple):
    """What merging needs to know of a part before its rows."""

    rows: int
    rejected: int
    widths: dict[str, dict[str, int]]
    parameters: tuple[str, ...]
    unit: str
    carried: dict[str, str]


def _inspect(part: str | Path, digest: str | None) -> _Head:
    with _open(part, digest) as file:
        got = file.attrs.get("format"), file.attrs.get("format_version")
        if got != (FORMAT, FORMAT_VERSION):
            msg = f"{part}: format {got}, wanted {(FORMAT, FORMAT_VERSION)}"
            raise ValueError(msg)
        widths: dict[str, dict[str, int]] = {"carried": {}}
        for name, columns in (("catalogue", COLUMNS), ("rejected", REJECTED)):
            dtype = file[name].dtype
            _check_names(part, f"columns of {name}", dtype.names, [c.name for c in columns])
            widths[name] = {c.name: dtype[c.name].itemsize for c in columns if c.dtype == "S"}
        carried = {}
        if "carried" in file:
            dtype = file["carried"].dtype
            carried = dict(zip(dtype.names, file["carried"].attrs["kinds"], strict=True))
            # One letter less: that of the kind.
            widths["carried"] = {name: max(1, dtype[name].itemsize - 1) for name in carried}
        covariance = file["covariance"][COVARIANCES[0]]
        parameters = tuple(covariance.attrs["parameters"])
        return _Head(len(file["catalogue"]), len(file["rejected"]), widths, parameters, file.attrs["unit"], carried)


def _carrying(rows: np.ndarray, texts: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rows with what goes along with them, of which there are texts."""
    result = np.empty(len(rows), dtype)
    for name in rows.dtype.names or ():
        result[name] = rows[name]
    for name in texts.dtype.names or ():
        result[name] = of_text(texts[name], dtype[name])
    return result


def _truth_of(rows: np.ndarray, truth: Mapping[str, np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Rows of the table of truth beside these rows of the catalogue; ``truth`` in order of image_id."""
    known, wanted = truth["image_id"], rows["image_id"]
    place = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    if len(known) == 0 or not np.array_equal(known[place], wanted):
        msg = f"the truth of some of the images is missing; it is there for {len(known)}"
        raise ValueError(msg)
    result = np.empty(len(rows), dtype)
    for column in TRUTH:
        name = column.name
        result[name] = rows[name] if column.group == "identity" else truth[name][place] if name in truth else np.nan
    return result


def _common_unit(texts: set[str]) -> tuple[units.UnitBase, str]:
    """The unit that all images share, or a dimensionless one and why."""
    one = units.dimensionless_unscaled
    named = sorted(texts)
    if len(named) > 1:
        return one, f"the images differ in their unit (BUNIT): {', '.join(map(repr, named))}"
    if not named or not named[0].strip():
        return one, "the images name no unit (BUNIT)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", units.UnitsWarning)
        try:
            # As AIPS and Miriad write it, and the FITS standard does not.
            unit = units.Unit("Jy/beam" if named[0].strip().upper() == "JY/BEAM" else named[0])
        except ValueError:
            unit = None
    # Logarithmic units such as mag(AB) cannot be multiplied by an area.
    if not isinstance(unit, units.UnitBase):
        return one, f"the unit of the images (BUNIT) is not one that astropy reads: {named[0]!r}"
    return unit, ""


def _column_unit(text: str, image: units.UnitBase) -> units.UnitBase | None:
    """Unit of a column from its text in `columns`, in which ``image`` stands for the unit of the images."""
    if not text:
        return None
    with units.add_enabled_units(_IMAGE):
        unit = units.Unit(text)
    result = units.dimensionless_unscaled
    for base, power in zip(unit.bases, unit.powers, strict=True):
        result = result * (image if base == _IMAGE else base) ** power
    return result


def _table_meta(columns: Sequence[Column], dtype: np.dtype, unit: Mapping[str, units.UnitBase | None]) -> np.ndarray:
    """The lines that astropy keeps beside a table."""
    table = Table(np.empty(0, dtype))
    for column in columns:
        table[column.name].unit = unit[column.name]
        table[column.name].description = column.description
    return np.array([line.encode() for line in meta.get_yaml_from_table(table)], dtype="S")


def _dtype(columns: Sequence[Column], widths: Mapping[str, int]) -> np.dtype:
    return np.dtype([(c.name, f"S{widths[c.name]}" if c.dtype == "S" else c.dtype) for c in columns])


def _columns(columns: Sequence[Column], rows: Iterable[tuple]) -> dict[str, np.ndarray]:
    """Rows as a dict of columns."""
    listed = list(rows)
    kinds = [object if c.dtype == "S" else c.dtype for c in columns]
    return {c.name: np.array([r[i] for r in listed], dtype=kinds[i]) for i, c in enumerate(columns)}


def _pack(path: str | Path, columns: Sequence[Column], values: Mapping[str, np.ndarray]) -> np.ndarray:
    """A dict of columns as one structured array, text as wide as its longest entry."""
    _check_names(path, "columns", values, [c.name for c in columns])
    text = {c.name: np.array([_encode(v) for v in values[c.name]], dtype="S") for c in columns if c.dtype == "S"}
    widths = {name: entries.itemsize for name, entries in text.items()}
    result = np.empty(len(values[columns[0].name]), _dtype(columns, widths))
    for column in columns:
        value = text[column.name] if column.dtype == "S" else np.asarray(values[column.name])
        if value.shape != result.shape or not np.can_cast(value.dtype, result.dtype[column.name], "same_kind"):
            wanted = f"{column.dtype} of shape {result.shape}"
            msg = f"{path}: column {column.name} is {value.dtype} of shape {value.shape}, wanted {wanted}"
            raise ValueError(msg)
        result[column.name] = value
    return result


def _check_names(path: str | Path, what: str, got: Iterable[str], wanted: Sequence[str]) -> None:
    got = list(got)
    if set(got) != set(wanted):
        missing = [name for name in wanted if name not in got]
        msg = f"{path}: {what} missing: {missing}; not known: {[name for name in got if name not in wanted]}"
        raise ValueError(msg)


def _create_covariance(file: h5py.File, name: str, count: int, parameters: Sequence[str]) -> h5py.Dataset:
    """An empty dataset of matrices."""
    shape = (count, len(parameters), len(parameters))
    dataset = file.create_dataset(f"covariance/{name}", shape, "f8", track_times=False)
    dataset.attrs["parameters"] = list(parameters)
    return dataset


def _slabs(dataset: h5py.Dataset) -> Iterator[np.ndarray]:
    """The rows of a dataset, a few megabytes at a time."""
    rows = max(1, SLAB_BYTES // max(1, int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize))
    for start in range(0, len(dataset), rows):
        yield dataset[start : start + rows]


def _open(path: str | Path, digest: str | None = None) -> h5py.File:
    """A file to read; a part only if it is made of what has this digest, where there is one."""
    try:
        file = h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        # h5py says what is wrong, but not with which file.
        msg = f"{path}: cannot be read as HDF5: {error}"
        raise OSError(msg) from error
    if digest is not None and json.loads(file.attrs.get("origin", "{}")).get("digest") != digest:
        file.close()
        msg = f"{path}: a job of an earlier run has written it, of other images or settings; give the command again"
        raise ValueError(msg)
    return file


def _encode(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")
