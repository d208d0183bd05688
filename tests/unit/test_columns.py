"""The one definition of columns and flags."""

import astropy.units as u
import pytest

from pipeline import columns


def test_names_are_unique_and_described():
    names = [c.name for c in columns.COLUMNS]
    assert len(set(names)) == len(names)
    assert all(c.description for c in columns.COLUMNS)


@pytest.mark.parametrize("unit", sorted({c.unit for c in (*columns.COLUMNS, *columns.REJECTED, *columns.CERTIFICATE)}))
def test_units_are_astropys(unit):
    assert u.Unit(unit.replace("image", "Jy")) is not None


def test_every_fitted_and_derived_column_has_an_error():
    names = {c.name for c in columns.COLUMNS}
    for name in (*columns.PARAMETERS, *columns.DERIVED, *columns.SKY, *columns.BEAM):
        assert {name, f"{name}_err"} <= names


def test_every_fitted_and_derived_column_has_a_calibrated_error_in_its_unit():
    named = {c.name: c for c in columns.COLUMNS}
    for name in (*columns.PARAMETERS, *columns.DERIVED):
        assert named[f"{name}_err_cal"].unit == named[f"{name}_err"].unit
        assert name == "theta" or named[f"{name}_bias"].unit == named[name].unit


def test_bits_are_distinct_and_decoded():
    assert len({f.bit for f in columns.FLAGS}) == len(columns.FLAGS)
    both = columns.BIT["ROUND"] | columns.BIT["LOW_SNR"]
    assert columns.decode_flags(both) == ["ROUND", "LOW_SNR"]
    assert columns.decode_flags(0) == []


@pytest.mark.parametrize(
    ("background", "scale", "count"),
    [("none", 1.0, 6), (3.5, "fit", 7), ("constant", "fit", 8), ("plane", "fit", 10), ("plane", 2, 9)],
)
def test_parameter_names(background, scale, count):
    names = columns.parameter_names(background, scale)
    assert len(names) == count
    assert names == tuple(n for n in columns.PARAMETERS if n in names)


def test_empty_rows_are_nan_zero_and_empty_text():
    rows = columns.empty_rows(2)
    assert list(rows) == [c.name for c in columns.COLUMNS]
    assert rows["file"][0] == b""
    assert rows["hdu"].dtype == "i8"
    assert rows["x0"][0] != rows["x0"][0]
