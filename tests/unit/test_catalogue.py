"""The catalogue on disk: every reader gets what was written, with its unit; whole or not at all; always the same."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pandas
import pytest
import tables
from astropy import units
from astropy.table import QTable, Table

from pipeline import catalogue
from pipeline.columns import (
    BIT,
    CERTIFICATE,
    COLUMNS,
    COVARIANCES,
    DERIVED,
    FLAGS,
    REJECTED,
    TRUTH,
    empty_rows,
    parameter_names,
)  # fmt: skip
from pipeline.files import replacing

# PyTables, and pandas by it, dislike the dot in the name that astropy gives its metadata.
pytestmark = pytest.mark.filterwarnings("ignore::tables.NaturalNameWarning")

PARAMETERS = parameter_names("constant", "fit")
P = len(PARAMETERS)


def rows_of(count, start=0, file="images/a.fits"):
    """Rows with another number in every place, and some NaN."""
    rng = np.random.default_rng(start)
    rows = empty_rows(count)
    for column in COLUMNS:
        if column.dtype == "f8":
            rows[column.name] = np.where(rng.random(count) < 0.1, np.nan, rng.normal(size=count))
        elif column.dtype == "i8":
            rows[column.name] = rng.integers(0, 1000, count)
    rows["image_id"] = np.arange(start, start + count) * 1_000_003 + 7
    rows["file"] = np.array([file] * count, dtype=object)
    return rows


def covariance_of(count, start=0):
    rng = np.random.default_rng(start + 1)
    return {name: rng.normal(size=(count, P, P)) for name in COVARIANCES}


def part(path, count, start=0, *, file="images/a.fits", rejected=(), unit="Jy/beam", parameters=PARAMETERS, **carried):
    rows, covariance = rows_of(count, start, file), covariance_of(count, start)
    catalogue.write_part(path, rows, covariance, parameters, rejected, unit, carried.get("carried"))
    return path


def datasets(path):
    """Every dataset of a file as bytes, with its type and shape."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: (item.dtype, item.shape, item[()].tobytes())})
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
    return found


@pytest.fixture
def merged(tmp_path):
    rejected = [("images/bad.fits", -1, -1, -1, "truncated")]
    parts = [part(tmp_path / "0.h5", 5), part(tmp_path / "1.h5", 4, 5, rejected=rejected)]
    ids = np.concatenate([rows_of(5)["image_id"], rows_of(4, 5)["image_id"]])
    truth = {"image_id": ids[::-1], "x0": np.arange(9.0)[::-1], "flux": np.arange(9.0)[::-1] + 100}
    path = tmp_path / "catalogue.h5"
    catalogue.merge(parts, path, truth=truth, provenance={"config": "fit:\n  scale: fit\n", "empty": ""})
    return path


def test_every_reader_gets_what_was_written(merged):
    first, second = rows_of(5), rows_of(4, 5)
    quantities = QTable.read(merged, path="catalogue")
    frame = pandas.read_hdf(merged, key="catalogue")
    with tables.open_file(merged) as file:
        nodes = file.root.catalogue[:]
    with h5py.File(merged) as file:
        plain = file["catalogue"][()]
    ours = catalogue.read_rows(merged)
    assert quantities.colnames == list(frame.columns) == list(plain.dtype.names) == [c.name for c in COLUMNS]
    for column in COLUMNS:
        wanted = np.concatenate([first[column.name], second[column.name]])
        np.testing.assert_array_equal(ours[column.name], wanted)
        encoded = wanted.astype("S") if column.dtype == "S" else wanted
        np.testing.assert_array_equal(plain[column.name], encoded)
        np.testing.assert_array_equal(nodes[column.name], encoded)
        np.testing.assert_array_equal(np.asarray(quantities[column.name]), encoded)
        np.testing.assert_array_equal(frame[column.name].to_numpy(), wanted)


def test_every_column_has_its_unit_and_description(merged):
    table = QTable.read(merged, path="catalogue")
    beam = units.Jy / units.beam
    known = {"image": beam, "image / pix": beam / units.pix, "image pix2": beam * units.pix**2, "": None}
    for column in COLUMNS:
        wanted = known.get(column.unit, column.unit)
        assert table[column.name].unit == (None if wanted is None else units.Unit(wanted)), column.name
        assert table[column.name].info.description == column.description
    for name, columns in (("truth", TRUTH), ("rejected", REJECTED)):
        assert Table.read(merged, path=name).colnames == [c.name for c in columns]


@pytest.mark.parametrize(
    ("texts", "note"),
    [
        (("", ""), "name no unit"),
        (("Jy/beam", "mJy/beam"), "differ in their unit (BUNIT): 'Jy/beam', 'mJy/beam'"),
        (("Jy/beam\nmJy/beam", "Jy/beam"), "differ in their unit (BUNIT): 'Jy/beam', 'mJy/beam'"),
        (("\nJy/beam",), "differ in their unit (BUNIT): '', 'Jy/beam'"),
        (("Jy/beam", ""), "differ"),
        (("JY/BEEM", "JY/BEEM"), "not one that astropy reads: 'JY/BEEM'"),
        (("mag(AB)", "mag(AB)"), "not one that astropy reads"),
    ],
)
def test_without_a_common_unit_columns_have_none_and_the_file_says_why(tmp_path, texts, note):
    parts = [part(tmp_path / f"{i}.h5", 2, 2 * i, unit=text) for i, text in enumerate(texts)]
    catalogue.merge(parts, tmp_path / "c.h5", provenance={})
    table = QTable.read(tmp_path / "c.h5", path="catalogue")
    assert table["amp"].unit == units.dimensionless_unscaled
    assert table["flux_err"].unit == units.pix**2
    assert table["background_x"].unit == units.pix**-1
    assert note in catalogue.read_summary(tmp_path / "c.h5").unit_note


def test_the_unit_that_radio_software_writes_is_read(tmp_path):
    catalogue.merge([part(tmp_path / "0.h5", 2, 0, unit="JY/BEAM")], tmp_path / "c.h5", provenance={})
    assert QTable.read(tmp_path / "c.h5", path="catalogue")["amp"].unit == units.Jy / units.beam


def test_a_part_without_rows_has_no_say_in_the_unit(tmp_path):
    parts = [part(tmp_path / "0.h5", 0, unit=""), part(tmp_path / "1.h5", 2, unit="adu")]
    catalogue.merge(parts, tmp_path / "c.h5", provenance={}, image_units={"scale": ""})
    summary = catalogue.read_summary(tmp_path / "c.h5")
    assert [summary.units[name] for name in ("amp", "amp_err", "scale", "scale_err")] == ["adu", "adu", "", ""]
    assert summary.unit_note == ""


def test_no_rows_at_all_still_open_everywhere(tmp_path):
    catalogue.merge(
        [part(tmp_path / "0.h5", 0)], tmp_path / "c.h5", truth={"image_id": np.zeros(0, int)}, provenance={}
    )
    for name, columns in (("catalogue", COLUMNS), ("rejected", REJECTED), ("truth", TRUTH)):
        table = QTable.read(tmp_path / "c.h5", path=name)
        assert (len(table), table.colnames) == (0, [c.name for c in columns])
        assert pandas.read_hdf(tmp_path / "c.h5", key=name).shape == (0, len(columns))
        with tables.open_file(tmp_path / "c.h5") as file:
            assert len(file.get_node(f"/{name}")) == 0
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["covariance/pooled"].shape == (0, P, P)


def test_covariances_keep_rows_and_order_of_parameters(merged):
    with h5py.File(merged) as file:
        assert set(file["covariance"]) == set(COVARIANCES)
        for name in COVARIANCES:
            wanted = np.concatenate([covariance_of(5)[name], covariance_of(4, 5)[name]])
            np.testing.assert_array_equal(file["covariance"][name], wanted)
            assert tuple(file["covariance"][name].attrs["parameters"]) == PARAMETERS


#: What goes along with seven rows: times, identities, names of several kinds.
CARRIED = {
    "MJD-OBS": [59000.5, 59001.25, None, 1e300, -0.1, 3, 0.1],
    "candid": [2**60 + 1, 5, -7, 0, 1, 2, 3],
    "ESO TEL.ID": ["a", None, "<b>é", 4, 0.5, "longer than the others", "z"],
    "gone": [None] * 7,
}


def carrying(folder, sizes):
    """The catalogue of seven rows in parts of these sizes."""
    parts, start = [], 0
    for size in sizes:
        here = {name: values[start : start + size] for name, values in CARRIED.items()}
        parts.append(part(folder / f"{start}-{size}.h5", size, start, carried=here))
        start += size
    catalogue.merge(parts, folder / f"{sizes}.h5", provenance={})
    return folder / f"{sizes}.h5"


def test_what_goes_along_is_in_the_catalogue_for_every_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "SLAB_BYTES", 1)
    path = carrying(tmp_path, (7,))
    wanted = {
        "MJD-OBS": [np.nan if value is None else value for value in CARRIED["MJD-OBS"]],
        "candid": CARRIED["candid"],
        "ESO TEL.ID": ["a", "", "<b>é", "4", "0.5", "longer than the others", "z"],
        "gone": [np.nan] * 7,
    }
    rows, frame = QTable.read(path, path="catalogue"), pandas.read_hdf(path, key="catalogue")
    with tables.open_file(path) as file:
        nodes = file.root.catalogue[:]
    ours = catalogue.read_rows(path)
    assert rows.colnames == list(frame.columns) == list(ours) == [c.name for c in COLUMNS] + list(CARRIED)
    assert rows["candid"].dtype == np.int64
    assert rows["candid"].info.description == "candid of the header or table"
    for name, values in wanted.items():
        text = name == "ESO TEL.ID"
        encoded = [value.encode() for value in values] if text else values
        np.testing.assert_array_equal(np.asarray(rows[name]), encoded)
        np.testing.assert_array_equal(nodes[name], encoded)
        np.testing.assert_array_equal(frame[name].to_numpy(), values)
        np.testing.assert_array_equal(ours[name], values)
    for column in COLUMNS:
        np.testing.assert_array_equal(ours[column.name], rows_of(7)[column.name])
    rows.write(tmp_path / "c.fits")
    np.testing.assert_array_equal(Table.read(tmp_path / "c.fits")["candid"], CARRIED["candid"])


@pytest.mark.parametrize("sizes", [(3, 4), (2, 0, 5), (1,) * 7])
def test_what_goes_along_does_not_depend_on_the_parts(tmp_path, sizes):
    whole, parts = (datasets(carrying(tmp_path, each))["catalogue"] for each in ((7,), sizes))
    assert parts[:2] == whole[:2]
    with h5py.File(tmp_path / f"{sizes}.h5") as one, h5py.File(tmp_path / "(7,).h5") as other:
        for name in CARRIED:
            assert one["catalogue"][name].tobytes() == other["catalogue"][name].tobytes()
        name = "catalogue.__table_column_meta__"
        assert one[name][()].tobytes() == other[name][()].tobytes()


def test_parts_that_carry_something_else_are_refused(tmp_path):
    parts = [part(tmp_path / "0.h5", 2, carried={"A": [1, 2]}), part(tmp_path / "1.h5", 2, 2, carried={"B": [1, 2]})]
    with pytest.raises(ValueError, match=r"1\.h5: carries \['B'\], but .*0\.h5 carries \['A'\]"):
        catalogue.merge(parts, tmp_path / "c.h5", provenance={})


def test_truth_lies_beside_its_row_whatever_its_order(merged):
    truth, rows = catalogue.read_rows(merged, table="truth"), catalogue.read_rows(merged)
    for name in ("image_id", "file", "hdu", "plane", "source"):
        np.testing.assert_array_equal(truth[name], rows[name])
    np.testing.assert_array_equal(truth["x0"], np.arange(9.0))
    np.testing.assert_array_equal(truth["flux"], np.arange(9.0) + 100)
    assert np.isnan(truth["background"]).all()
    assert set(DERIVED) < set(truth)


def test_a_certificate_is_a_table_and_corrects_the_errors(tmp_path, merged):
    certificate = empty_rows(len(PARAMETERS) * 4, CERTIFICATE)
    certificate["parameter"] = np.repeat(np.array(PARAMETERS, dtype=object), 4)
    certificate["snr_low"] = np.tile([5.0, 10.0, 30.0, 100.0], len(PARAMETERS))
    certificate["factor"], certificate["factor_err"] = np.full((2, len(PARAMETERS) * 4), [[2.0], [0.1]])
    rows = rows_of(5)
    rows["snr"] = np.array([3.0, 7.0, 20.0, np.nan, 1e3])
    catalogue.write_part(tmp_path / "p.h5", rows, covariance_of(5), PARAMETERS, [], "Jy/beam")
    catalogue.write_certificate(tmp_path / "certificate.h5", certificate, {})
    kept = catalogue.read_rows(tmp_path / "certificate.h5", table="certificate")
    np.testing.assert_equal(kept, certificate)
    catalogue.merge([tmp_path / "p.h5"], tmp_path / "c.h5", certificate=kept, provenance={})
    table = QTable.read(tmp_path / "c.h5", path="certificate")
    assert table.colnames == [c.name for c in CERTIFICATE]
    assert table["parameter"].info.description == CERTIFICATE[0].description
    ours = catalogue.read_rows(tmp_path / "c.h5")
    np.testing.assert_array_equal(ours["x0_err_cal"], ours["x0_err"] * [1, 2, 2, 1, 2])
    np.testing.assert_array_equal(ours["background_x_err_cal"], ours["background_x_err"])
    assert catalogue.read_summary(tmp_path / "c.h5").has_certificate
    assert not catalogue.read_summary(merged).has_certificate


def test_a_part_that_is_replaced_while_parts_are_merged_is_refused(tmp_path, monkeypatch):
    def write(digest):
        origin = {"digest": digest}
        catalogue.write_part(tmp_path / "p.h5", rows_of(3), covariance_of(3), PARAMETERS, [], "Jy", None, origin)
        return ""

    write("these")
    catalogue.merge([tmp_path / "p.h5"], tmp_path / "c.h5", digests=["these"], provenance={})
    assert catalogue.digest_of(tmp_path / "p.h5") == "these"
    common_unit = catalogue._common_unit
    monkeypatch.setattr(catalogue, "_common_unit", lambda units: write("others") or common_unit(units))
    with pytest.raises(ValueError, match=r"p\.h5: a job of an earlier run has written it"):
        catalogue.merge([tmp_path / "p.h5"], tmp_path / "d.h5", digests=["these"], provenance={})
    assert not (tmp_path / "d.h5").exists()


def test_what_says_of_nothing_that_it_was_made_of_has_no_digest(tmp_path, merged):
    assert catalogue.digest_of(tmp_path / "none.h5") == catalogue.digest_of(merged) == ""
    (tmp_path / "half.h5").write_bytes(merged.read_bytes()[:3000])
    assert catalogue.digest_of(tmp_path / "half.h5") == ""


def test_flag_bits_and_provenance(merged):
    bits = Table.read(merged, path="flag_bits", character_as_bytes=False)
    assert {row["name"]: 1 << row["bit"] for row in bits} == BIT
    assert list(bits["meaning"]) == [flag.meaning for flag in FLAGS]
    summary = catalogue.read_summary(merged)
    assert summary.provenance == {"config": "fit:\n  scale: fit\n", "empty": ""}
    assert summary[:4] == (9, 1, True, PARAMETERS)
    with h5py.File(merged) as file:
        assert file.attrs["format_version"] == catalogue.FORMAT_VERSION


def test_the_same_parts_give_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        parts = [part(folder / f"{i}.h5", 3, 3 * i, rejected=[("b", 0, 1, 2, "why")]) for i in range(3)]
        catalogue.merge(parts, folder / "c.h5", provenance={"config": "a: 1"})
    for name in ("0.h5", "c.h5"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_neither_the_cut_into_parts_nor_into_slabs_changes_a_dataset(tmp_path, monkeypatch):
    whole, covariance = rows_of(40), covariance_of(40)
    files = []
    for cuts, slab in (((0, 40), 1 << 23), ((0, 1, 17, 17, 40), 1 << 23), ((0, 1, 17, 17, 40), 3000)):
        monkeypatch.setattr(catalogue, "SLAB_BYTES", slab)
        parts = []
        for start, stop in pairwise(cuts):
            parts.append(tmp_path / f"{len(files)}_{len(parts)}.h5")
            rows, matrices = ({k: v[start:stop] for k, v in d.items()} for d in (whole, covariance))
            catalogue.write_part(parts[-1], rows, matrices, PARAMETERS, [], "Jy")
        files.append(tmp_path / f"c{len(files)}.h5")
        catalogue.merge(parts, files[-1], truth={"image_id": whole["image_id"]}, provenance={})
    assert datasets(files[0]) == datasets(files[1]) == datasets(files[2])


def test_text_of_any_bytes_and_length_is_kept(tmp_path):
    names = ["a.fits", "b\udcff\udcfe.fits", "c" * 300 + "é漢.fits"]
    parts = [
        part(tmp_path / f"{i}.h5", 1, i, file=name, rejected=[(name, -1, -1, -1, f"{name}: no")])
        for i, name in enumerate(names)
    ]
    catalogue.merge(parts, tmp_path / "c.h5", provenance={"files": "\n".join(names)})
    rejected = catalogue.read_rows(tmp_path / "c.h5", ["file", "reason"], table="rejected")
    assert catalogue.read_rows(tmp_path / "c.h5", ["file"])["file"].tolist() == names == rejected["file"].tolist()
    assert rejected["reason"].tolist() == [f"{name}: no" for name in names]
    assert catalogue.read_summary(tmp_path / "c.h5").provenance["files"] == "\n".join(names)
    longest = max(len(name.encode("utf-8", "surrogateescape")) for name in names)
    table = QTable.read(tmp_path / "c.h5", path="catalogue")
    assert table["file"].dtype == f"S{longest}"
    assert np.asarray(table["file"])[1] == b"b\xff\xfe.fits"


def test_rows_are_read_from_start_to_stop(merged):
    some = catalogue.read_rows(merged, ["y0", "flags"], 3, 7)
    whole = catalogue.read_rows(merged)
    assert list(some) == ["y0", "flags"]
    np.testing.assert_array_equal(some["y0"], whole["y0"][3:7])


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, merged):
    before, names = merged.read_bytes(), sorted(p.name for p in tmp_path.iterdir())
    parts = [tmp_path / "0.h5", tmp_path / "1.h5"]
    with pytest.raises(ValueError, match="'in/put' holds a '/'"):
        catalogue.merge(parts, merged, provenance={"in/put": "x"})
    with pytest.raises(ValueError, match="truth of some of the images is missing"):
        catalogue.merge(parts, merged, truth={"image_id": np.arange(3)}, provenance={})
    covariance = covariance_of(5) | {"fisher": np.zeros((5, 2, 2))}
    with pytest.raises(ValueError, match=r"covariance fisher has shape \(5, 2, 2\), wanted \(5, 8, 8\)"):
        catalogue.write_part(merged, rows_of(5), covariance, PARAMETERS, [], "")
    assert merged.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_kill_in_mid_write_leaves_the_old_file_and_the_next_write_succeeds(tmp_path):
    target = part(tmp_path / "0.h5", 3)
    before = target.read_bytes()
    code = (
        "import os, h5py\nfrom pipeline.files import replacing\n"
        f"with replacing({str(target)!r}) as path:\n"
        "    file = h5py.File(path, 'w'); file['x'] = list(range(1000)); file.flush(); os._exit(9)\n"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 9
    assert target.read_bytes() == before
    part(target, 3)
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["0.h5"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    target = tmp_path / "a"
    code = (
        "import sys\nfrom pipeline.files import replacing\n"
        f"with replacing({str(target)!r}) as path:\n"
        "    path.write_text('other'); print('open', flush=True); sys.stdin.readline()\n"
    )
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "open\n"
        with replacing(target) as temporary:
            temporary.write_text("mine")
        assert target.read_text() == "mine"
        other.communicate("\n")
    assert other.returncode == 0
    assert target.read_text() == "other"
    assert os.listdir(tmp_path) == ["a"]


def test_wrong_columns_are_named(tmp_path):
    def write(change, parameters=PARAMETERS):
        catalogue.write_part(tmp_path / "x.h5", rows_of(3) | change, covariance_of(3), parameters, [], "")

    with pytest.raises(ValueError, match=r"x\.h5: columns missing: \[\]; not known: \['x1'\]"):
        write({"x1": np.zeros(3)})
    with pytest.raises(ValueError, match=r"column x0 is float64 of shape \(2,\), wanted f8 of shape \(3,\)"):
        write({"x0": np.zeros(2)})
    with pytest.raises(ValueError, match="column flags is float64"):
        write({"flags": np.zeros(3)})
    rows = rows_of(3)
    del rows["snr"]
    with pytest.raises(ValueError, match=r"columns missing: \['snr'\]"):
        catalogue.write_part(tmp_path / "x.h5", rows, covariance_of(3), PARAMETERS, [], "")
    with pytest.raises(ValueError, match=r"covariances missing: \['fisher'\]"):
        catalogue.write_part(tmp_path / "x.h5", rows_of(0), dict.fromkeys(COVARIANCES[:3], 0), PARAMETERS, [], "")


def test_parts_that_do_not_fit_together_are_named(tmp_path):
    good = part(tmp_path / "good.h5", 1)
    other = part(tmp_path / "other.h5", 1, parameters=("a", *PARAMETERS[1:]))
    with pytest.raises(ValueError, match=r"other\.h5: parameters \('a', "):
        catalogue.merge([good, other], tmp_path / "c.h5", provenance={})
    with pytest.raises(ValueError, match="no parts"):
        catalogue.merge([], tmp_path / "c.h5", provenance={})
    (tmp_path / "half.h5").write_bytes(good.read_bytes()[:3000])
    with pytest.raises(OSError, match=r"half\.h5: cannot be read as HDF5"):
        catalogue.merge([good, tmp_path / "half.h5"], tmp_path / "c.h5", provenance={})
    with h5py.File(tmp_path / "alien.h5", "w"):
        pass
    with pytest.raises(ValueError, match=r"alien\.h5: format \(None, None\), wanted \('cauchyfit catalogue', 1\)"):
        catalogue.merge([tmp_path / "alien.h5"], tmp_path / "c.h5", provenance={})
    assert not (tmp_path / "c.h5").exists()
