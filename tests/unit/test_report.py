"""The report: it stands alone, says what the catalogue says, escapes what files say, and is there whatever happened."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from matplotlib.image import imread
from scipy.stats import norm

from pipeline import pictures, report, tallies
from pipeline.catalogue import merge, write_part
from pipeline.columns import (
    BIT,
    CERTIFICATE,
    COVARIANCES,
    DERIVED,
    PARAMETERS,
    SNR_BINS,
    empty_rows,
    parameter_names,
)  # fmt: skip
from pipeline.model import derived, gaussian

FITTED = parameter_names("constant", "fit")
NY, NX, COUNT = 24, 20, 60
IMAGES = {
    "files": ["ignored"],
    "hdu": "auto",
    "column": None,
    "mask": None,
    "uncertainty": None,
    "cutouts": None,
    "folder": "",
}
CONFIG = {"fit": {"background": "constant", "scale": "fit"}}
EVIL = "<script>alert('x')&<b>.fits"


class Page(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.pieces = [], []
        self.feed(text)
        self.text = "".join(self.pieces)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.pieces.append(data)

    def words(self):
        return " ".join(" ".join(self.pieces).split())


def simulated(folder, count=COUNT):
    """Rows of fits to ``count`` images on disk, their truth, and the errors that belong to them."""
    rng = np.random.default_rng(5)
    low = [8.0, 10.0, 20.0, 1.5, 0.2, 0.1, 3.0, 0.5]
    high = [11.0, 14.0, 90.0, 2.5, 0.5, 0.3, 3.0, 0.5]
    truth = rng.uniform(low, high, (count, len(FITTED)))
    y, x = np.indices((NY, NX), dtype=float)
    data = gaussian(truth[:, None, None, :6], x, y) + 3.0 + 0.5 * rng.standard_cauchy((count, NY, NX))
    data[:, 2, 3] = np.nan
    path = folder / EVIL
    fits.PrimaryHDU(data.astype(np.float32)).writeto(path)
    rows = empty_rows(count)
    rows["image_id"], rows["plane"] = np.arange(count) + 100, np.arange(count)
    rows["file"] = np.array([str(path)] * count, dtype=object)
    # The pulls of every parameter are the quantiles of a unit normal, in some order.
    pulls = norm.ppf((np.arange(count) + 0.5) / count)
    errors = dict(zip(FITTED, (0.02, 0.03, 0.4, 0.05, 0.01, 0.01, 0.02, 0.02), strict=True))
    fitted = truth.copy()
    for i, name in enumerate(FITTED):
        fitted[:, i] += errors[name] * rng.permutation(pulls)
        rows[name], rows[f"{name}_err"] = fitted[:, i], np.full(count, errors[name])
    exact = dict(zip(DERIVED, derived(truth[:, :6]).T, strict=True))
    for i, name in enumerate(DERIVED):
        rows[name], rows[f"{name}_err"] = derived(fitted[:, :6])[:, i], np.full(count, 0.05)
    rows["snr"] = np.abs(rows["amp"]) / rows["amp_err"]
    rows["misfit"] = rng.normal(size=count)
    rows["n_steps"] = rng.integers(6, 15, count)
    known = dict(zip(FITTED, truth.T, strict=True)) | exact | {"image_id": rows["image_id"]}
    return rows, known


def page_of(
    folder,
    rows,
    truth=None,
    rejected=(),
    *,
    benchmarks=(("b0", 2.0, COUNT),),
    images=IMAGES,
    certificate=None,
    carried=None,
):
    """The report on these rows, as text."""
    count, p = len(rows["flags"]), len(FITTED)
    covariance = {name: np.zeros((count, p, p)) for name in COVARIANCES}
    write_part(folder / "part.h5", rows, covariance, FITTED, rejected, "Jy/beam", carried)
    merge(
        [folder / "part.h5"],
        folder / "c.h5",
        truth=truth,
        certificate=certificate,
        provenance={"config": "a: 1\nb: <i>2</i>", "device": "cpu"},
    )
    report.write_report(
        folder / "c.h5", folder / "r.html", images=images, benchmarks=benchmarks, config=CONFIG, certificate_seconds=0.5
    )
    return (folder / "r.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rows, truth = simulated(folder)
    rows["misfit"][7] = -30.0
    rows["flags"][7] = BIT["MISFIT"]
    rows["flags"][20] = BIT["NOT_CONVERGED"] | BIT["LOW_SNR"]
    rejected = [(f"in/{k}.fits", -1, -1, -1, f"in/{k}.fits: <img src=x> truncated") for k in range(3)]
    rejected.append(("odd\udcff.fits", -1, -1, -1, "no image in any HDU"))
    return folder, rows, truth, rejected, page_of(folder, rows, truth, rejected)


def cards(text):
    """The pictured rows: title, plane, and pixels by name of the picture, y downwards as drawn."""
    found = []
    for card in text.split('<article class="card">')[1:]:
        pictures = re.findall(r'<figure class="(\w+)">.*?<image href="data:image/png;base64,([^"]+)"', card, re.S)
        pixels = {name: imread(io.BytesIO(base64.b64decode(code)))[..., :3] for name, code in pictures}
        found.append((re.search("<b>(.*?)</b>", card)[1], int(re.search(r"plane (\d+)", card)[1]), pixels))
    return found


def test_the_page_needs_nothing_else(run):
    page = Page(run[-1])
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "img"}
    addresses = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "xlink:href")]
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "url(" not in run[-1]
    assert "@import" not in run[-1]


def test_what_files_say_is_text(run):
    page = Page(run[-1])
    assert "<script" not in run[-1]
    assert "<img" not in run[-1]
    assert EVIL in page.text
    assert "<img src=x> truncated" in page.text
    assert "b: <i>2</i>" in page.text
    assert r"odd\xff.fits" in page.text


def test_headline_numbers_add_up(run):
    words = Page(run[-1]).words()
    assert "64 images found 60 fitted 93.8 % 58 good 90.6 % 2 flagged 3.1 % 4 rejected 6.2 %" in words
    # The reasons of the three files differ by their names only.
    assert "<img src=x> truncated 3 in/0.fits no image in any HDU 1" in words
    assert "MISFIT 6 1 1.67 %" in words
    assert "LOW_SNR 9 1 1.67 %" in words
    assert (
        "1 fit job took 2 s of wall time, start-up, compilation and reading included, for 60 images: 30 images" in words
    )


def test_a_dozen_pictures_and_the_worst_come_first(run):
    found = cards(run[-1])
    assert len(found) == 12
    assert found[0][:2] == ("largest misfit", 7)
    assert ("not converged", 20) in [card[:2] for card in found]
    typical = [plane for why, plane, _ in found if why == "typical"]
    assert len(typical) == 7
    assert np.all(np.diff(run[1]["snr"][typical]) > 0)
    assert len({plane for _, plane, _ in found}) == 12


def test_pictures_show_source_and_masked_pixels_where_they_are(run):
    for _, plane, pixels in cards(run[-1]):
        assert list(pixels) == ["data", "model", "residual"]
        assert all(p.shape == (NY, NX, 3) for p in pixels.values())
        # More light is darker, and y points upwards.
        row, column = np.unravel_index(pixels["model"].sum(axis=-1).argmin(), (NY, NX))
        assert abs(column - run[1]["x0"][plane]) < 1
        assert abs(NY - 1 - row - run[1]["y0"][plane]) < 1
        for name in ("data", "residual"):
            np.testing.assert_allclose(pixels[name][NY - 1 - 2, 3], pictures.MASKED_COLOUR[:3], atol=0.01)
        assert not np.allclose(pixels["model"][NY - 1 - 2, 3], pictures.MASKED_COLOUR[:3], atol=0.05)
    # The ellipse is drawn with the fitted centre, in pixels from the upper left corner of the picture.
    first = re.search(r'<g transform="translate\(([\d.]+) ([\d.]+)\)', run[-1])
    assert float(first[1]) == pytest.approx(run[1]["x0"][7] + 0.5, abs=1e-3)
    assert float(first[2]) == pytest.approx(NY - run[1]["y0"][7] - 0.5, abs=1e-3)


def pull_table(text):
    """Cells of the comparison with the truth, by parameter; and which parameters have a marked one."""
    table = text.split("if errors are right")[1].split("</table>")[0]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in table.split("<tr>")[1:]]
    marked = {row.split("<td>")[1].split()[0].split("<")[0] for row in table.split("<tr>")[1:] if "off" in row}
    return {Page(row[0]).text.split()[0]: [Page(cell).text for cell in row[1:]] for row in cells}, marked


def test_right_errors_cover_and_wrong_ones_are_marked(tmp_path):
    rows, truth = simulated(tmp_path, 400)
    # Errors of the scale are stated at half their size; x0 is off by one error; y0 has five rows that are no solution.
    rows["scale_err"] *= 0.5
    rows["x0"] += rows["x0_err"]
    rows["y0"][:5] += 1000.0
    rows["flags"][:5] = BIT["NOT_CONVERGED"]
    table, marked = pull_table(page_of(tmp_path, rows, truth))
    # Widths that differ by a factor only have the same pulls, and are shown once.
    assert list(table) == [*FITTED, "flux", "fwhm_major", "fwhm_minor", "theta"]
    number, within_1, within_2, median, spread, far, bias = table["amp"]
    assert number == "395"
    assert abs(float(within_1.split()[0]) - 68.3) < 1.0
    assert within_1.endswith("± 2.3")
    assert abs(float(within_2.split()[0]) - 95.4) < 0.6
    assert within_2.endswith("± 1.0")
    assert abs(float(median.split()[0].replace("\N{MINUS SIGN}", "-"))) < 0.03
    assert abs(float(spread.split()[0]) - 1) < 0.03
    assert far == "0"
    assert bias.endswith("± 0.020")
    assert not marked & {"y0", "amp", "sigma", "rho", "diff", "background"}
    assert {"x0", "scale"} <= marked
    assert abs(float(table["scale"][4].split()[0]) - 2) < 0.06
    assert float(table["x0"][6].split()[0]) == pytest.approx(0.02, rel=0.01)


def test_theta_comes_back_after_half_a_turn(tmp_path):
    rows, truth = simulated(tmp_path)
    rows["theta"] = np.where(np.arange(COUNT) % 2, truth["theta"] + np.pi, truth["theta"]) + 0.01
    table, _ = pull_table(page_of(tmp_path, rows, truth))
    assert table["theta"][0] == str(COUNT)
    assert table["theta"][3].startswith("0.2")


def test_the_size_of_slabs_changes_nothing(run, monkeypatch):
    folder, rows, truth, rejected, text = run
    monkeypatch.setattr(tallies, "SLAB", 7)
    assert page_of(folder, rows, truth, rejected) == text


def test_a_sample_serves_where_rows_are_many(run, monkeypatch):
    folder, rows, truth, rejected, text = run
    monkeypatch.setattr(tallies, "SLAB", 7)
    monkeypatch.setattr(tallies, "SAMPLE", 20)
    sampled = page_of(folder, rows, truth, rejected)
    # What is counted over all rows is the same; where the bins lie is not.
    assert pull_table(sampled) == pull_table(text)
    assert len(cards(sampled)) == 12


def test_without_rows_there_is_a_page(tmp_path):
    rejected = [("a.fits", -1, -1, -1, "empty file")]
    for truth in (None, {"image_id": np.zeros(0, dtype=int)}):
        words = Page(page_of(tmp_path, empty_rows(0), truth, rejected, benchmarks=())).words()
        assert "1 images found" in words
        assert "1 rejected 100.0 %" in words
        assert "The catalogue has no rows." in words
        assert "No timings were kept." in words
    assert "0 images found" in Page(page_of(tmp_path, empty_rows(0), benchmarks=())).words()


def test_without_a_single_fit_there_is_a_page(tmp_path):
    rows, truth = simulated(tmp_path, 13)
    for name in rows:
        if rows[name].dtype == float:
            rows[name][:] = np.nan
    rows["flags"][:] = BIT["NON_FINITE"]
    text = page_of(tmp_path, rows, truth)
    assert "No row has both a solution and a truth" in Page(text).words()
    assert "0 fitted 0.0 %" in Page(text).words()
    assert [list(pixels) for *_, pixels in cards(text)] == [["data"]] * 12
    assert 'class="ellipse"' not in text


def test_without_truth_nothing_is_said_of_it(tmp_path):
    rows, _ = simulated(tmp_path, 3)
    text = page_of(tmp_path, rows)
    assert "Against the truth" not in text
    assert len(cards(text)) == 3


def certificate_of(names):
    """A certificate of these parameters: the second bin is off, the last has too few sources."""
    table = empty_rows(4 * len(names), CERTIFICATE)
    table["parameter"] = np.repeat(np.array(names, dtype=object), 4)
    table["snr_low"], table["snr_high"] = (np.tile(edges, len(names)) for edges in (SNR_BINS[:-1], SNR_BINS[1:]))
    values = {
        "sources": [500, 400, 300, 0], "failed": [2, 0, 0, 0], "kept": [0.99] * 3 + [np.nan],
        "coverage_68": [0.69, 0.5, 0.67, np.nan], "coverage_95": [0.95, 0.8, 0.96, np.nan],
        "bias": [0.01, 0.02, 0.03, np.nan], "spread": [1.01, 1.49, 0.98, np.nan],
        "over_bound": [1.3, 2.8, 1.2, np.nan], "factor": [0.99, 1.5, 1.01, np.nan],
    }  # fmt: skip
    for name, entries in values.items():
        table[name] = np.tile(entries, len(names))
        if f"{name}_err" in table:
            table[f"{name}_err"] = np.tile([0.02, 0.02, 0.02, np.nan], len(names))
    return table


def test_the_certificate_is_shown_and_what_is_off_is_marked(tmp_path):
    rows, _ = simulated(tmp_path, 3)
    text = page_of(tmp_path, rows, certificate=certificate_of(["x0", "<b>sigma"]), benchmarks=[("b0", 9.5, 3)])
    section = text.split("Certificate of the errors")[1].split("<h2>")[0]
    assert "<b>sigma" not in section
    table = [Page(row) for row in section.split("<tr>")[2:]]
    assert len(table) == 6
    words = [page.words() for page in table]
    assert words[0].startswith("x0 5–10 500 2 0.99 69.0 ± 2.0 95.0 ± 2.0")
    assert words[1].startswith("x0 10–30 400 0 0.99 50.0 ± 2.0 80.0 ± 2.0")
    assert words[1].endswith("1.500 ± 0.020")
    assert words[3].startswith("<b>sigma 5–10")
    marked = [sum("off" in (attrs.get("class") or "") for _, attrs in page.tags) for page in table]
    assert marked == [0, 3, 0] * 2
    assert section.count('aria-label="Coverage of') == 2
    # Two shares in each of three bins of two parameters; lower shares are drawn lower.
    points = re.findall(r'<g class="point( off)?">.*?cy="([\d.]+)"', section)
    assert len(points) == 12
    assert [bool(off) for off, _ in points] == [False, False, True, True, False, False] * 2
    assert float(points[2][1]) > float(points[0][1]) > float(points[1][1])
    assert "It took 0.5 s, 5.0 % of the time of the last jobs that fitted" in Page(section).words()


def test_a_certificate_of_nothing_says_so(tmp_path):
    rows, _ = simulated(tmp_path, 3)
    empty = {name: values[:0] for name, values in empty_rows(0, CERTIFICATE).items()}
    assert "Nothing could be certified" in Page(page_of(tmp_path, rows, certificate=empty)).words()
    assert "Certificate of the errors" not in page_of(tmp_path, rows)


def test_pixels_that_are_gone_are_said_to_be(tmp_path):
    rows, _ = simulated(tmp_path, 3)
    rows["plane"][1] = 99
    rows["file"][2] = str(tmp_path / "gone.fits")
    text = page_of(tmp_path, rows)
    words = Page(text).words()
    assert words.count("The pixels could not be read again") == 2
    assert "no plane 99 in HDU 0 any more" in words
    assert sum(bool(pixels) for *_, pixels in cards(text)) == 1


def test_a_fit_gone_astray_and_an_image_without_a_used_pixel_are_shown(tmp_path):
    rows, _ = simulated(tmp_path, 3)
    rows["diff"][0], rows["scale"][0] = -50.0, 0.0
    rows["x0"][1], rows["amp_err"][1] = 1e300, np.inf
    data = fits.getdata(tmp_path / EVIL)
    data[2] = np.nan
    noise = np.ones_like(data)
    noise[1, :5] = 0
    fits.HDUList([fits.PrimaryHDU(data), fits.ImageHDU(noise)]).writeto(tmp_path / EVIL, overwrite=True)
    found = cards(page_of(tmp_path, rows, images=IMAGES | {"uncertainty": 1}))
    assert [list(pixels) for *_, pixels in found] == [["data", "model", "residual"]] * 3


def test_residuals_are_in_units_of_the_uncertainty_map(tmp_path):
    rows, _ = simulated(tmp_path, 1)
    ny, nx = NY, NX
    data = fits.getdata(tmp_path / EVIL)[0]
    fits.HDUList(
        [fits.PrimaryHDU(data), fits.ImageHDU(np.where(np.arange(nx) < 10, 1e6, 1e-6) * np.ones((ny, nx)))]
    ).writeto(tmp_path / EVIL, overwrite=True)
    ((*_, pixels),) = cards(page_of(tmp_path, rows, images=IMAGES | {"uncertainty": 1}))
    white = np.ptp(pixels["residual"], axis=-1) < 0.05
    assert white[:, :10].mean() > 0.95
    assert white[:, 10:].mean() < 0.05


def test_of_a_large_image_stamps_are_shown(tmp_path):
    rows, _ = simulated(tmp_path, 3)
    large = np.concatenate(list(fits.getdata(tmp_path / EVIL)), axis=1)
    fits.PrimaryHDU(large).writeto(tmp_path / EVIL, overwrite=True)
    rows["plane"], rows["source"] = np.zeros(3, int), np.arange(3)
    for name in ("x0", "x0_start"):
        rows[name] = rows[name] + NX * np.arange(3)
    Table([rows["x0"][:2], rows["y0"][:2]], names=["x", "y"]).write(tmp_path / "p.csv")
    text = page_of(tmp_path, rows, images=IMAGES | {"cutouts": {"positions": str(tmp_path / "p.csv"), "size": 10}})
    shown = [pixels for *_, pixels in cards(text) if pixels]
    assert len(shown) == 2
    for pixels in shown:
        assert all(p.shape == (10, 10, 3) for p in pixels.values())
        row, column = np.unravel_index(pixels["model"].sum(axis=-1).argmin(), (10, 10))
        assert {row, column} <= {4, 5}
    assert "no source 2 in plane 0 in HDU 0 any more" in Page(text).words()


def test_what_goes_along_is_shown_as_text(tmp_path):
    rows, _ = simulated(tmp_path, 2)
    carried = {"OBJECT": ["<script>x</script>", None], "MJD<b>": [59000.123456, None], "candid": [2**60 + 1, 7]}
    text = page_of(tmp_path, rows, carried=carried, images=IMAGES | {"carry": list(carried)})
    words = Page(text).words()
    assert "<script" not in text
    assert words.count("OBJECT <script>x</script>") == words.count("MJD<b> 59000.123456") == 1
    assert f"candid {2**60 + 1}" in words
    assert "candid 7" in words
    assert words.count("OBJECT") == words.count("MJD<b>") == 1


@pytest.mark.parametrize("name", PARAMETERS[6:9])
def test_a_tilted_background_is_part_of_the_model(tmp_path, name):
    rows, _ = simulated(tmp_path, 1)
    y, x = np.indices((NY, NX), dtype=float)
    slopes = dict.fromkeys(PARAMETERS[7:9], 0.0)
    tilt = {"background": 7.0 + 0 * x, "background_x": 2.0 * x, "background_y": 2.0 * y}[name]
    parameters = np.array([rows[n][0] for n in PARAMETERS[:6]])
    fits.PrimaryHDU(gaussian(parameters, x, y) + tilt).writeto(tmp_path / EVIL, overwrite=True)
    # The plane is about the start of the fit, which is not where it ended.
    rows["x0_start"][:], rows["y0_start"][:] = 4.0, 9.0
    rows["background"][:] = tilt[9, 4]
    for slope in slopes:
        rows[slope] = np.array([2.0 if slope == name else 0.0])
    ((*_, pixels),) = cards(page_of(tmp_path, rows))
    np.testing.assert_allclose(np.ptp(pixels["residual"], axis=-1), 0, atol=0.01)


def test_of_a_large_image_the_surroundings_of_the_source_are_shown(tmp_path):
    rows, _ = simulated(tmp_path, 1)
    rows["x0"][:], rows["y0"][:] = 290.0, 5.0
    y, x = np.indices((200, 300), dtype=float)
    parameters = np.array([rows[n][0] for n in PARAMETERS[:6]])
    fits.PrimaryHDU(gaussian(parameters, x, y) + 3.0).writeto(tmp_path / EVIL, overwrite=True)
    text = page_of(tmp_path, rows)
    ((*_, pixels),) = cards(text)
    ny, nx, _ = pixels["data"].shape
    assert max(ny, nx) <= 2 * pictures.LARGEST_PICTURE
    row, column = np.unravel_index(pixels["data"].sum(axis=-1).argmin(), (ny, nx))
    centre = re.search(r'<g transform="translate\(([\d.]+) ([\d.]+)\)', text)
    assert abs(column + 0.5 - float(centre[1])) <= 1
    assert abs(row + 0.5 - float(centre[2])) <= 1


def test_a_row_gone_astray_does_not_stretch_an_axis(tmp_path):
    def labels(text):
        return re.findall(r"<text [^>]*>(.*?)</text>", re.search("Histogram of flux.*?</svg>", text, re.S)[0])

    rows, _ = simulated(tmp_path)
    before = labels(page_of(tmp_path, rows))
    rows["flux"][3], rows["flags"][3] = 1e30, BIT["NOT_CONVERGED"]
    text = page_of(tmp_path, rows)
    assert "of the 59 rows that are a solution" in Page(text).words()
    assert labels(text) == before
