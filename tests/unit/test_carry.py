"""What goes along comes back as it was, and the type of a column depends on its values, however they are divided."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.carry import as_text, column_of, kinds, of_text, plain

VALUES = st.lists(
    st.one_of(
        st.none(),
        st.integers(-(2**64), 2**64),
        st.integers(-9, 9),
        st.floats(allow_nan=False),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=5),
    ),
    max_size=8,
)


def through(values, parts=1):
    """The column that values become which lie in so many parts."""
    shards = [values[i::parts] for i in range(parts)]
    made = column_of("X", [kinds(shard) for shard in shards])
    texts = np.array([text.encode() for text in as_text(values)] or [], "S")
    return made, of_text(texts, texts.dtype if made.dtype == "S" else np.dtype(made.dtype))


@pytest.mark.parametrize(
    ("values", "dtype", "wanted"),
    [
        ([1, 2, -3], "i8", [1, 2, -3]),
        ([2**60 + 1, 5], "i8", [2**60 + 1, 5]),
        ([1, 2.5], "f8", [1, 2.5]),
        ([1, None], "f8", [1, np.nan]),
        ([None, None], "f8", [np.nan, np.nan]),
        ([0.1, float("-inf")], "f8", [0.1, -np.inf]),
        (["a", None, "0012"], "S", [b"a", b"", b"0012"]),
        (["a", 1, 2.5], "S", [b"a", b"1", b"2.5"]),
        ([2**60 + 1, None], "S", [b"1152921504606846977", b""]),
        ([2**60 + 1, 0.5], "S", [b"1152921504606846977", b"0.5"]),
        ([2**64, 1], "S", [b"18446744073709551616", b"1"]),
        ([], "f8", []),
    ],
)
def test_the_type_is_the_narrowest_that_holds_them(values, dtype, wanted):
    made, found = through(values)
    assert (made.name, made.dtype) == ("X", dtype)
    np.testing.assert_array_equal(found, wanted)


@given(VALUES, st.integers(1, 4))
def test_it_does_not_depend_on_the_parts(values, parts):
    made, found = through(values, parts)
    whole, wanted = through(values)
    assert made == whole
    assert found.tobytes() == wanted.tobytes()


@given(VALUES)
def test_no_digit_is_lost(values):
    made, found = through(values)
    for value, one in zip(values, found.tolist(), strict=True):
        if made.dtype == "S":
            assert one == ("" if value is None else str(value)).encode().rstrip(b"\0")
        else:
            assert one == value or (value is None and one != one)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (True, 1), (np.bool_(False), 0), (np.int16(7), 7), (np.uint64(2**64 - 1), 2**64 - 1), (np.float32(0.5), 0.5),
        (np.nan, None), ("text  ", "text"), ("", None), (b"ab\0cd ", "ab"), (np.ma.masked, None), (1 + 2j, None),
        (np.str_("x"), "x"), (None, None),
    ],
)  # fmt: skip
def test_values_are_plain(value, wanted):
    assert plain(value) == wanted
    assert type(plain(value)) is type(wanted)
