"""Writes tests/science/golden.ecsv: run it when numbers change on purpose, after raising the version.

python -m tests.science.make_golden
"""

from pathlib import Path

import jax
import numpy as np
from astropy.table import Table

from pipeline import __version__, fit
from tests import stamps

PATH = Path(__file__).with_name("golden.ecsv")


def rows() -> dict[str, np.ndarray]:
    """Columns of 16 fixed stamps: four each of bright and faint, clean and dirty."""
    images = [
        stamps.draw(4, amp, seed=41 + i, noise=noise, shape=(24, 24))[0]
        for i, (amp, noise) in enumerate(
            [((5, 20), "cauchy"), ((100, 1e4), "cauchy"), ((5, 20), "gaussian"), ((50, 500), "contaminated")]
        )
    ]
    found, _ = fit.fit_rows(np.concatenate(images))
    return found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    Table(rows(), meta={"version": __version__}).write(PATH, overwrite=True)
