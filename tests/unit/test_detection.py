"""Laws of detection: every source once, in one order, whatever the noise level; neighbours are told apart."""

import numpy as np
import pytest
from astropy.io import fits

from pipeline.cutouts import scan_stamps
from pipeline.detection import detect, find_sources, forget_others, read_images

PLACES = np.array([[20.3, 15.6], [70.0, 18.2], [45.5, 40.1], [52.0, 41.0], [15.2, 66.8]])
DETECT = {"detect": {"threshold": 5.0}, "size": 16}


def field(*, seed=1, amp=100.0, shape=(80, 90), places=PLACES):
    """Round sources of sigma 1.5 on noise of rms 1 over a slope."""
    y, x = np.indices(shape)
    data = np.random.default_rng(seed).normal(size=shape) + 50 + 0.02 * x
    for x0, y0 in places:
        data += amp * np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * 1.5**2))
    return data


def found(data, threshold=5.0):
    x, y, segments = detect(data.copy(), ~np.isfinite(data), threshold)
    return np.stack([x, y], axis=1), segments


def stamps_of(folder, data, *others, **section):
    """The only block of a file of these pixels, and what it takes to read it."""
    fits.HDUList([fits.PrimaryHDU(data), *others]).writeto(folder / "a.fits", overwrite=True)
    reading = {"cutouts": DETECT, "folder": folder / "found"} | section
    blocks, rejected = scan_stamps(str(folder / "a.fits"), **reading)
    return blocks, rejected, reading


def test_every_source_is_found_in_order():
    places, segments = found(field())
    assert np.abs(places - PLACES).max() < 0.2
    x, y = places.round().astype(int).T
    assert segments[y, x].tolist() == [1, 2, 3, 4, 5]
    assert segments.dtype == np.int32
    assert set(np.unique(segments)) == set(range(6))


def test_it_is_the_same_each_time():
    for one, other in zip(found(field()), found(field()), strict=True):
        assert one.tobytes() == other.tobytes()


def test_turned_about_the_order_is_still_by_y():
    places, _ = found(np.ascontiguousarray(field()[::-1]))
    assert (np.diff(places[:, 1]) > 0).all()
    assert len(places) == len(PLACES)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_the_unit_does_not_matter(dtype):
    places, segments = found(field())
    scaled, its_segments = found((field() * 1e-3).astype(dtype))
    np.testing.assert_allclose(scaled, places, atol=1e-3)
    assert np.mean(segments != its_segments) < 1e-3


def test_the_threshold_counts():
    faint = field(amp=6)
    assert len(found(faint, 1.5)[0]) == len(PLACES)
    with pytest.raises(ValueError, match="no source in it is 50 times the noise"):
        found(faint, 50)


def test_masked_pixels_may_hold_anything():
    data = field()
    data[10:22, 62:78] = np.nan  # the second source
    places, segments = found(data)
    assert len(places) == len(PLACES) - 1
    assert (segments[10:22, 62:78] == 0).all()
    data[10:22, 62:78] = np.where(np.arange(16) % 2, 1e30, np.nan)
    mask = np.isnan(field() * 0)
    mask[10:22, 62:78] = True
    np.testing.assert_array_equal(detect(data, mask, 5.0)[2], segments)


@pytest.mark.parametrize("fill", [7.0, np.nan])
def test_an_image_of_nothing_has_no_source(fill):
    with pytest.raises(ValueError, match="no source"):
        found(np.full((40, 30), fill))


def test_stamps_leave_out_what_belongs_to_others(tmp_path):
    data = field()
    (block,), rejected, reading = stamps_of(tmp_path, data)
    assert rejected == []
    assert block.stamps[:, :2].tolist() == [[0, i] for i in range(5)]
    assert np.abs(block.stamps[:, 2:] + 7.5 - PLACES).max() < 0.6
    stack = read_images(block, 0, 5, **reading)
    _, segments = found(data)
    for i, (_, source, x, y) in enumerate(block.stamps.tolist()):
        labels = np.pad(segments, 16)[y + 16 : y + 32, x + 16 : x + 32]
        inside = np.pad(np.ones_like(segments), 16)[y + 16 : y + 32, x + 16 : x + 32]
        np.testing.assert_array_equal(stack.mask[i], (inside == 0) | ((labels > 0) & (labels != source + 1)))
    # The two that are close see each other masked, and nobody itself.
    assert stack.mask[2].sum() > 20
    assert not stack.mask[:, 7:9, 7:9].any()
    for i in range(5):
        np.testing.assert_array_equal(read_images(block, i, i + 1, **reading).mask[0], stack.mask[i])


def test_the_mask_of_the_image_counts_in_detection(tmp_path):
    mask = np.zeros(field().shape, "u1")
    mask[10:22, 62:78] = 1
    (block,), _, _ = stamps_of(tmp_path, field(), fits.ImageHDU(mask), mask=1)
    assert len(block.stamps) == 4


def test_planes_are_searched_one_by_one(tmp_path):
    data = np.stack([field(), np.zeros_like(field()), field(seed=2, places=PLACES[:2])])
    (block,), rejected, reading = stamps_of(tmp_path, data)
    assert block.stamps[:, :2].tolist() == [*([0, i] for i in range(5)), [2, 0], [2, 1]]
    assert [row[1:4] for row in rejected] == [(0, 1, -1)]
    assert "no source" in rejected[0].reason
    whole = read_images(block, 0, 7, **reading)
    np.testing.assert_array_equal(read_images(block, 4, 6, **reading).mask, whole.mask[4:6])


def test_what_was_found_is_kept_until_the_image_changes(tmp_path):
    (block,), _, reading = stamps_of(tmp_path, field())
    (kept,) = (tmp_path / "found").iterdir()
    first, when = kept.read_bytes(), kept.stat().st_mtime_ns
    scan_stamps(block.file, **reading)
    assert kept.stat().st_mtime_ns == when
    kept.unlink()
    places = find_sources(block, 0, reading["folder"], cutouts=DETECT)
    assert len(places[0]) == 5
    assert kept.read_bytes() == first
    lower = DETECT | {"detect": {"threshold": 4.0}}
    (other,), _ = scan_stamps(block.file, **reading | {"cutouts": lower})
    assert len(list((tmp_path / "found").iterdir())) == 2
    forget_others(tmp_path / "found", [other], cutouts=lower)
    assert kept not in (tmp_path / "found").iterdir()
    assert len(list((tmp_path / "found").iterdir())) == 1
    forget_others(tmp_path / "found", [], cutouts=None)
    assert not list((tmp_path / "found").iterdir())
