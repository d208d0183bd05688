"""Numbers that users have seen: they change only together with the version."""

import numpy as np
from astropy.table import Table

from pipeline import __version__
from tests.science import make_golden


def test_golden_table():
    """Values agree to a ten-thousandth of their errors, errors to a thousandth."""
    golden = Table(Table.read(make_golden.PATH), masked=True)
    assert golden.meta["version"] == __version__, "the version changed: run python -m tests.science.make_golden"
    rows = make_golden.rows()
    assert set(golden.colnames) == set(rows)
    for name in golden.colnames:
        values, wanted = (
            rows[name],
            np.asarray(golden[name].filled(np.nan) if golden[name].dtype.kind == "f" else golden[name]),
        )
        errors = rows.get(f"{name}_err")
        if name in ("n_steps", "condition"):
            continue  # rounding may cost or save a step
        if values.dtype.kind != "f":
            np.testing.assert_array_equal(values, wanted, err_msg=name)
        elif errors is None or np.isnan(errors).all():
            np.testing.assert_allclose(values, wanted, rtol=1e-3, err_msg=name)
        else:
            np.testing.assert_allclose(values / errors, wanted / errors, atol=1e-4, rtol=0, err_msg=name)
