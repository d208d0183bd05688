"""Whether a file is what the scan has found: by its times, or by what is in it."""

import os
import time

import numpy as np
import pytest

from pipeline import planes
from pipeline.images import read_planes, scan_file
from tests.fits_files import put, ramp


def test_content_tells_what_is_in_a_file_and_not_its_time(tmp_path):
    file, mask = tmp_path / "a.fits", tmp_path / "a_mask.fits"
    put(file, ramp(5, 6))
    put(mask, np.zeros((5, 6), np.uint8))
    reading = {"mask": {"files": f"{tmp_path}/{{stem}}_mask.fits"}, "changed": "content"}
    (block,), _ = scan_file(str(file), **reading)
    for one in (file, mask):
        os.utime(one, ns=(5, 5))
    assert scan_file(str(file), **reading) == ([block], [])
    np.testing.assert_array_equal(read_planes(block, 0, 1, **reading).data[0], ramp(5, 6))
    with pytest.raises(ValueError, match="changed after the scan"):
        read_planes(block, 0, 1, mask=reading["mask"])
    for one, values in ((file, ramp(5, 6) + 1), (mask, np.ones((5, 6), np.uint8))):
        before = one.read_bytes()
        time.sleep(0.02)  # clocks of file systems tick by milliseconds
        put(one, values)
        os.utime(one, ns=(5, 5))
        (other,), _ = scan_file(str(file), **reading)
        assert other.size == block.size
        assert other.version != block.version
        with pytest.raises(ValueError, match="changed after the scan"):
            read_planes(block, 0, 1, **reading)
        time.sleep(0.02)
        one.write_bytes(before)
        assert scan_file(str(file), **reading) == ([block], [])


@pytest.mark.parametrize("changed", ["time", "content"])
def test_what_is_copied_over_while_it_is_read_is_not_taken(tmp_path, monkeypatch, changed):
    """Not even by a file that is the same in the end."""
    file = tmp_path / "a.fits"
    put(file, ramp(5, 6))
    whole, stored = file.read_bytes(), planes.stored
    (block,), _ = scan_file(str(file), changed=changed)

    def while_it_is_copied(*arguments):
        time.sleep(0.02)
        put(file, ramp(5, 6) + 1)
        try:
            return stored(*arguments)
        finally:
            file.write_bytes(whole)

    with monkeypatch.context() as patch:
        patch.setattr(planes, "stored", while_it_is_copied)
        with pytest.raises(ValueError, match=r"changed after the scan: run again$"):
            read_planes(block, 0, 1, changed=changed)
    (block,), _ = scan_file(str(file), changed=changed)
    np.testing.assert_array_equal(read_planes(block, 0, 1, changed=changed).data[0], ramp(5, 6))


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_cannot_be_a_mask_is_told_and_not_hung_on(tmp_path, kind):
    file, mask = put(tmp_path / "a.fits", ramp(5, 6)), tmp_path / "mask.fits"
    os.mkfifo(mask) if kind == "pipe" else mask.mkdir()
    reading = {"mask": {"files": str(mask)}, "changed": "content"}
    (block,), rejected = scan_file(file, **reading)
    assert not rejected
    with pytest.raises(ValueError, match=rf"mask\.fits: .*{kind}"):
        read_planes(block, 0, 1, **reading)
