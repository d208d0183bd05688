"""Whatever is wrong with a file, it ends as rows or as reasons; `tests.workflow.fuzz` is a longer study of this law."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.damage import damaged, good_files
from tests.workflow.fuzz import SETTINGS, examine, prepare

GOOD = good_files()

pytestmark = pytest.mark.filterwarnings("ignore")  # astropy tells of everything that is wrong


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def look(raw: bytes, setting: str, folder: Path) -> dict[str, int]:
    prepare(folder)
    (folder / "a.fits").write_bytes(raw)
    with contextlib.chdir(folder):
        return examine(str(folder / "a.fits"), SETTINGS[setting], folder / "results")


@pytest.mark.parametrize("setting", SETTINGS)
def test_good_files_end_as_rows(setting, folder):
    assert sum(look(raw, setting, folder)["rows"] for raw in GOOD.values()) > 0


@settings(max_examples=400)
@given(st.sampled_from(sorted(GOOD)), st.sampled_from(sorted(SETTINGS)), st.randoms(use_true_random=False))
def test_damaged_files_end_as_rows_or_reasons(folder, name, setting, random):
    assert sum(look(damaged(GOOD[name], random), setting, folder).values()) > 0
