"""Numbers as people read them."""

import numpy as np
import pytest

from pipeline import numerals


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3456, 0.0123, "12.346 ± 0.012"),
        (-1234.5, 67.0, "−1234 ± 67"),
        (0.0, 0.5, "0.00 ± 0.50"),
        (1.5e-7, 2.0e-9, "(1.500 ± 0.020) × 10⁻⁷"),
        (3.0e9, 4.0e7, "(3.000 ± 0.040) × 10⁹"),
        (2.5, np.nan, "2.5"),
        (np.nan, 1.0, "undefined"),
        (1.0, 2.0e12, "(0.0 ± 2.0) × 10¹²"),
    ],
)
def test_errors_have_two_digits_and_values_as_many(value, error, text):
    assert numerals.with_error(value, error) == text


def test_units_are_shown_short():
    assert numerals.unit("pix2 Jy / beam") == "pix² Jy/beam"
    assert numerals.unit("1e-17 erg / (Angstrom s cm2)") == "1e-17 erg/(Angstrom s cm²)"


@pytest.mark.parametrize(
    ("value", "text"),
    [("5", "5"), ("-0.5", "−0.5"), ("1e+06", "10⁶"), ("3e-05", "3 × 10⁻⁵"), ("-1.5e+08", "−1.5 × 10⁸")],
)
def test_powers_of_ten_are_raised(value, text):
    assert numerals.power(value) == text
