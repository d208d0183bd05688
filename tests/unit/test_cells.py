"""What keywords and cells say of an image: whether it is to be used, and what goes along. The fit is a stand-in."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import MaskedColumn, Table

from pipeline import batches
from pipeline.catalogue import merge, read_part, read_rows
from pipeline.shards import read_manifest
from tests.stand_in import READING, fitted, merged, scanned, table_of, use_stand_in, write

#: Rows of a pixel file with bits 0, 2 and 31 in their QUALITY, in none, and one without a number.
QUALITY = np.array([0, 1, 0, 4, -(2**31), -(2**31), 99, 0], "i4")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    use_stand_in(monkeypatch)


def pixel_file(folder: Path, per_row: int = 1) -> np.ndarray:
    """As Kepler's and TESS's are: a stamp or more, their errors and a number of quality a row. The stamps."""
    flux = np.arange(len(QUALITY) * per_row * 30, dtype="f4").reshape(len(QUALITY), per_row, 5, 6)
    dim = "(6,5)" if per_row == 1 else f"(6,5,{per_row})"
    columns = [
        fits.Column(name, f"{30 * per_row}E", dim=dim, array=values)
        for name, values in (("FLUX", flux), ("FLUX_ERR", np.where(flux % 7 == 0, np.nan, 2 + flux)))
    ]
    columns += [fits.Column("QUALITY", "J", null=99, array=QUALITY), fits.Column("SPARE", "2J", array=np.ones((8, 2)))]
    fits.BinTableHDU.from_columns(columns, name="PIXELS").writeto(folder / "tpf.fits")
    return flux.reshape(-1, 5, 6)


@pytest.mark.parametrize("per_row", [1, 2])
@pytest.mark.parametrize(
    ("mask", "good"),
    [
        ({"column": "QUALITY"}, [0, 2, 7]),
        ({"column": "quality", "bits": [0, 31]}, [0, 2, 3, 7]),
        ({"column": "QUALITY", "bits": [5], "hdu": "PIXELS"}, [0, 1, 2, 3, 4, 5, 7]),
        ({"column": "QUALITY", "bits": [2, 60], "hdu": 1}, [0, 1, 2, 7]),  # the sign is that of all higher bits
    ],
)
def test_rows_of_bad_quality_are_rejected(tmp_path, mask, good, per_row):
    flux = pixel_file(tmp_path, per_row)
    wanted = [row * per_row + i for row in good for i in range(per_row)]
    (manifest,) = scanned(tmp_path, [str(tmp_path)], column="FLUX", mask=mask)
    rows = fitted(tmp_path, manifest, column="FLUX", mask=mask)
    assert rows["plane"].tolist() == wanted
    assert rows["amp"].tolist() == flux[wanted].mean(axis=(1, 2), dtype=float).tolist()
    refused = read_rows(tmp_path / "part.h5", table="rejected")
    assert sorted(refused["plane"].tolist() + wanted) == list(range(len(flux)))
    for plane, source, reason in zip(*(refused[name] for name in ("plane", "source", "reason")), strict=True):
        value = QUALITY[plane // per_row]
        assert source == -1
        assert reason.endswith(f"{mask['column']} of its row is {'missing' if value == 99 else value} (images.mask)")


def test_rows_of_bad_quality_give_no_stamps(tmp_path):
    pixel_file(tmp_path)
    Table({"x": [2, 4], "y": [2, 2]}).write(tmp_path / "positions.csv")
    section = {"column": "FLUX", "mask": {"column": "QUALITY", "bits": [2]}}
    section |= {"cutouts": {"positions": str(tmp_path / "positions.csv"), "size": 8}}
    (manifest,) = scanned(tmp_path, [str(tmp_path / "*.fits")], **section)
    rows = fitted(tmp_path, manifest, **section)
    assert rows["plane"].tolist() == [0, 0, 1, 1, 2, 2, 4, 4, 5, 5, 7, 7]
    refused = read_rows(tmp_path / "part.h5", table="rejected")
    assert list(zip(refused["plane"].tolist(), refused["source"].tolist(), strict=True)) == [
        (3, 0), (3, 1), (6, 0), (6, 1),
    ]  # fmt: skip


def test_columns_of_the_same_table_are_uncertainty_and_mask(tmp_path):
    flux = pixel_file(tmp_path)
    section = {"uncertainty": {"column": "FLUX_ERR"}, "mask": {"column": "QUALITY"}}
    (manifest,) = scanned(tmp_path, [str(tmp_path)], column="FLUX", **section)
    (block,), _ = read_manifest(manifest)
    ((piece, *_),) = batches.of_blocks([block], READING | {"column": "FLUX", "folder": ""} | section, [])
    np.testing.assert_array_equal(piece.stack.mask[0], flux[0] % 7 == 0)
    np.testing.assert_array_equal(piece.stack.noise_map[0], np.where(flux[0] % 7 == 0, 1, 2 + flux[0]))


def test_a_column_of_something_else_is_no_quality(tmp_path):
    pixel_file(tmp_path)
    section = {"column": "FLUX", "mask": {"column": "SPARE"}}
    (manifest,) = scanned(tmp_path, [str(tmp_path)], **section)
    assert len(fitted(tmp_path, manifest, **section)["plane"]) == 0
    reasons = set(read_rows(tmp_path / "part.h5", table="rejected")["reason"])
    assert ["has no images in column SPARE" in reason for reason in reasons] == [True]


def carried(folder: Path, files: list[str], names: list[str], **reading) -> dict[str, list]:
    """What the catalogue of some files carries along, and their first rejection under the name ``reason``."""
    (manifest,) = scanned(folder, files, carry=names, **reading)
    fitted(folder, manifest, carry=names, **reading)
    merged(folder, manifest, carry=names, **reading)
    reasons = read_rows(folder / "catalogue.h5", table="rejected")["reason"].tolist()
    rows = read_rows(folder / "catalogue.h5", names) if names else {}
    return {name: values.tolist() for name, values in rows.items()} | ({"reason": reasons[0]} if reasons else {})


def test_keywords_go_along_from_the_header_of_the_image_or_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_PIXELS", 64)
    first, image = fits.PrimaryHDU(), fits.ImageHDU(np.ones((2, 8, 8), "f4"))
    first.header.update({"MJD-OBS": 59000.5, "OBJECT": "first", "DATE": "2020-05-31", "HIERARCH ESO TEL ALT": 65})
    image.header.update({"OBJECT": "<b>image</b> " + "long " * 20, "SEEING": True})
    fits.HDUList([first, image]).writeto(tmp_path / "a.fits")
    write(tmp_path / "b.fits", (9, 8), 1, **{"MJD-OBS": 59001, "OBJECT": "", "DATE": 20200601})
    write(tmp_path / "c.fits", (8, 8), 1)
    found = carried(tmp_path, [str(tmp_path)], ["OBJECT", "MJD-OBS", "date", "ESO TEL ALT", "SEEING", "GONE"])
    image_object = ("<b>image</b> " + "long " * 20).rstrip()
    np.testing.assert_equal(found, {
        "OBJECT": [image_object, image_object, "", ""],
        "MJD-OBS": [59000.5, 59000.5, 59001, np.nan],
        "date": ["2020-05-31", "2020-05-31", "20200601", ""],
        "ESO TEL ALT": [65, 65, np.nan, np.nan],
        "SEEING": [1, 1, np.nan, np.nan],
        "GONE": [np.nan] * 4,
    })  # fmt: skip


def test_cells_go_along_from_the_table_of_the_images(tmp_path):
    columns = [
        fits.Column("id", "K", array=np.array([2**60 + 1, 2, 3])),
        fits.Column("Flux", "128E", dim="(8,8,2)", array=np.ones((3, 2, 8, 8), np.float32)),
        fits.Column("TIME", "D", array=[0.5, np.nan, 1.5]),
        fits.Column("NAME", "5A", array=["a", "", "caf"]),
        fits.Column("GOOD", "L", array=[True, False, True]),
        fits.Column("COUNT", "I", bzero=32768, array=np.array([1, 40000, 3], "u2")),
        fits.Column("NULL", "J", null=-1, array=[5, -1, 7]),
        fits.Column("SCALED", "I", array=[1, 2, 4]),
        fits.Column("VECTOR", "3E", array=np.ones((3, 3))),
    ]
    hdu = fits.BinTableHDU.from_columns(columns, fits.Header({"EXPOSURE": 30}))
    hdu.header.update({"TSCAL8": 0.5, "TZERO8": 10.0})
    hdu.writeto(tmp_path / "t.fits")
    names = ["ID", "time", "NAME", "GOOD", "COUNT", "NULL", "SCALED", "EXPOSURE"]
    found = carried(tmp_path, [str(tmp_path)], names, column="FLUX")
    wanted = {
        "ID": [2**60 + 1, 2, 3], "time": [0.5, np.nan, 1.5], "NAME": ["a", "", "caf"], "GOOD": [1, 0, 1],
        "COUNT": [1, 40000, 3], "NULL": [5, np.nan, 7], "SCALED": [10.5, 11, 12], "EXPOSURE": [30] * 3,
    }  # fmt: skip
    np.testing.assert_equal(found, {name: np.repeat(values, 2).tolist() for name, values in wanted.items()})
    reason = carried(tmp_path, [str(tmp_path)], ["VECTOR"], column="FLUX")["reason"]
    assert reason.endswith("HDU 1: column VECTOR has neither one number nor text a row (TFORM9 = 3E)")


def test_columns_of_the_table_of_positions_go_along(tmp_path):
    write(tmp_path / "a.fits", (2, 30, 40), 10, OBJECT="field", Z=9)
    table = Table({"x": [20, 50, 0], "y": [15, 5, 0], "candid": [2**60 + 1, 2, 3], "Z": [0.5, 1, np.nan]})
    table["note"] = MaskedColumn(["a", "b", "c"], mask=[0, 0, 1])
    table.write(tmp_path / "p.ecsv")
    cutouts = {"positions": str(tmp_path / "p.ecsv"), "size": 8}
    found = carried(tmp_path, [str(tmp_path / "a.fits")], ["candid", "note", "z", "object"], cutouts=cutouts)
    assert found.pop("reason") == "this position lies in none of the images"
    np.testing.assert_equal(found, {
        "candid": [2**60 + 1, 3] * 2, "note": ["a", ""] * 2, "z": [0.5, np.nan] * 2, "object": ["field"] * 4,
    })  # fmt: skip


@pytest.mark.parametrize("shard_size", [1, 3, 4])
def test_what_goes_along_does_not_depend_on_the_shards(tmp_path, shard_size):
    """Whole and broken numbers, text and nothing in turn, and shards that see only some of them."""
    kinds = [1, 2.5, "3", None, 2**60 + 1, True]
    for i in range(8):
        write(
            tmp_path / f"{i}.fits",
            (8, 8),
            i,
            **{"MIXED": kinds[i % 6], "NUMBER": kinds[i % 2], "WHOLE": kinds[i % 6 // 4 * 4]},
        )
    found = []
    for size in (100, shard_size):
        parts = []
        for manifest in scanned(tmp_path, [str(tmp_path)], size, carry=["MIXED", "NUMBER", "WHOLE"]):
            fitted(tmp_path, manifest, carry=["MIXED", "NUMBER", "WHOLE"])
            parts.append((tmp_path / "part.h5").rename(manifest.with_suffix(".h5")))
        merge(parts, tmp_path / "c.h5", provenance={})
        with h5py.File(tmp_path / "c.h5") as file:
            rows = file["catalogue"][:]
        found.append(rows[np.argsort(rows["amp"])])
    assert len(parts) > 1
    assert found[0].dtype == found[1].dtype
    assert found[0].tobytes() == found[1].tobytes()
    assert [found[0].dtype[name].kind for name in ("MIXED", "NUMBER", "WHOLE")] == ["S", "f", "i"]


def test_what_goes_along_changes_the_manifest_of_its_shard_only(tmp_path):
    write(tmp_path / "a.fits", (30, 40), 10)
    x = np.arange(5.0, 35)
    manifests = []
    for changed in (0, 1):
        names = np.arange(30)
        names[14] += 100 * changed
        cutouts = {"positions": table_of(tmp_path / "p.csv", x=x, y=x / 2, name=names), "size": 8}
        files = scanned(tmp_path, [str(tmp_path / "a.fits")], shard_size=10, cutouts=cutouts, carry=["name"])
        manifests.append({path.name: path.read_bytes() for path in files})
        rows = fitted(tmp_path, files[1], cutouts=cutouts, carry=["name"])
        assert read_part(tmp_path / "part.h5").carried["name"] == names[rows["source"]].tolist()
    changed = [name for name, text in manifests[1].items() if text != manifests[0][name]]
    assert [name[-6:] for name in changed] == ["-1.csv"]
