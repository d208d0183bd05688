"""Headers of every make: a WCS, none, or a sentence that says what is wrong."""

import contextlib
import itertools
import warnings

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from pipeline import sky
from pipeline.headers import read_header
from tests.skies import SCALE, header, one, turned

SIP = {"A_ORDER": 2, "A_2_0": 1e-3, "B_ORDER": 2, "B_0_2": -2e-3, "B_1_1": 5e-4}
GOOD = {
    "CD": turned(20.0),
    "CD with CDELT": turned(20.0) | {"CDELT1": 1.0, "CDELT2": 1.0},
    "CROTA": {"CROTA2": 20.0},
    "PC": {"PC1_1": 0.8, "PC1_2": -0.6, "PC2_1": 0.6, "PC2_2": 0.8},
    "SIP": SIP | {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP"},
    "TPV": {"CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV", "PV1_1": 1.0, "PV1_4": 0.5, "PV2_1": 1.0, "PV2_5": 0.3},
    "scamp": {"PV1_1": 1.0, "PV1_4": 0.5, "PV2_1": 1.0, "PV2_5": 0.3},
    "ZPN": {"CTYPE1": "RA---ZPN", "CTYPE2": "DEC--ZPN", "PV2_1": 1.0, "PV2_3": 42.0},
    "NCP": {"CTYPE1": "RA---NCP", "CTYPE2": "DEC--NCP"},
    "arcsec": {"CUNIT1": "arcsec", "CUNIT2": "arcsec", "CRVAL1": 1000.0, "CDELT1": -0.5, "CDELT2": 0.5},
    "degrees": {"CUNIT1": "degrees", "CUNIT2": "DEG"},
    "pole": {"LONPOLE": 150.0},
    "old date": {"DATE__OBS": "31/12/99"},
    "other axes": {"WCSAXES": 4, "CTYPE3": "FREQ", "CTYPE4": "STOKES", "CRVAL3": 1e9, "CDELT3": 1e6, "CDELT4": 0.0},
    "other axes turned": {"CTYPE3": "STOKES", "CTYPE4": "VELO-LSR", "CRVAL4": 0.0, "CDELT4": 10.0, "CRVAL3": "I"},
}


@pytest.mark.parametrize("kind", GOOD)
def test_headers_mean_what_astropy_makes_of_them(kind, capfd):
    plain = GOOD[kind] if "axes" not in kind else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = WCS(header(**plain)).all_pix2world([3.0, 15.0], [7.0, 2.0], 0)
    wcs = sky.celestial(header(NAXIS=4, **GOOD[kind]))
    assert wcs.naxis == 2
    np.testing.assert_allclose(wcs.all_pix2world([3.0, 15.0], [7.0, 2.0], 0), truth, rtol=1e-12)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("cards", "same"),
    [
        ({"PC001001": 0.8, "PC001002": -0.6, "PC002001": 0.6, "PC002002": 0.8}, GOOD["PC"]),
        ({"PC01_01": 0.8, "PC01_02": -0.6, "PC02_01": 0.6, "PC02_02": 0.8}, GOOD["PC"]),
        (SIP, {}),  # stale coefficients in a header whose CTYPE knows nothing of them
        (GOOD["SIP"] | {"PV1_5": 0.1, "PV2_5": 0.1}, GOOD["SIP"]),  # the same distortion twice, as in PTF images
        ({"CD1_2": 1e-4, "CD2_1": 1e-4}, {"CD1_1": 0.0, "CD1_2": 1e-4, "CD2_1": 1e-4, "CD2_2": 0.0}),
        ({"CRVAL3": "text", "CTYPE3": "FREQ", "CD3_3": "text", "CUNIT3": "furlong"}, {}),
    ],
)
def test_headers_that_mean_the_same(cards, same):
    a, b = (sky.celestial(header(**c)).all_pix2world([3.0, 15.0], [7.0, 2.0], 0) for c in (cards, same))
    np.testing.assert_allclose(a, b, rtol=1e-13)


def test_fortran_exponents():
    cards = [fits.Card.fromstring("CRVAL1  = 0.4D+02"), *header(CRVAL1=None).cards]
    assert sky.celestial(fits.Header(cards)).wcs.crval.tolist() == [40.0, 30.0]


def iraf(projection, terms, polynomial):
    """Header of an IRAF projection; its text runs on from card to card, blanks at the end of one count."""
    cards = header(CTYPE1=f"RA---{projection}", CTYPE2=f"DEC--{projection}", WAT0_001="system=image", **turned(0.0))
    for axis, (kind, lon) in enumerate((("ra", "lng"), ("dec", "lat")), start=1):
        text = f'wtype={projection.lower()} axtype={kind} {terms}{lon}cor = "{polynomial} "'
        for number, start in enumerate(range(0, len(text), 68), start=1):
            cards.append(fits.Card.fromstring(f"WAT{axis}_{number:03d}= '{text[start : start + 68]:68}'"))
    return cards


@pytest.mark.parametrize(("projection", "terms"), [("TNX", ""), ("ZPX", "projp0=0. projp1=1. ")])
def test_iraf_distortions(projection, terms):
    # Both standard coordinates [deg] grow by 2e-4 + 1e-2 xi.
    wcs = sky.celestial(iraf(projection, terms, "3. 2. 2. 0. -1. 1. -1. 1. 2e-4 1e-2 0."))
    x, y = np.array([10.0, 60.0]), np.array([10.0, 40.0])
    shift = 2e-4 * 3600 / SCALE - 1e-2 * (x - 10)
    expected = sky.celestial(header(**turned(0.0))).all_pix2world(x - shift, y + shift, 0)
    np.testing.assert_allclose(wcs.all_pix2world(x, y, 0), expected, atol=1e-8)


@pytest.mark.parametrize(
    "cards",
    [
        {"CTYPE1": None, "CTYPE2": None},
        {"CTYPE1": "", "CTYPE2": ""},
        {"CTYPE1": "LINEAR", "CTYPE2": "LINEAR"},
        {"CTYPE1": "LAMBDA", "CTYPE2": "ANGLE"},
        {"CTYPE1": 1, "CTYPE2": 2},
    ],
)
def test_images_without_celestial_axes_have_no_wcs(cards):
    assert sky.celestial(header(**cards)) is None


BAD = {
    "axes 3 and 4": ({"CTYPE1": "STOKES", "CTYPE2": "FREQ", "CTYPE3": "RA---SIN", "CTYPE4": "DEC--SIN"}, r"\[3, 4\]"),
    "no partner": ({"CTYPE2": "LINEAR"}, r"axes \[1\] of the file, wanted \[1, 2\]"),
    "two projections": ({"CTYPE2": "DEC--SIN"}, "Inconsistent projection types"),
    "unknown projection": ({"CTYPE1": "RA---XYZ", "CTYPE2": "DEC--XYZ"}, "projection code"),
    "small letters": ({"CTYPE1": "ra---tan", "CTYPE2": "dec--tan"}, "projection code"),
    "CRVAL text": ({"CRVAL1": "02:40:00"}, "CRVAL1 = '02:40:00', wanted a number"),
    "CRPIX true": ({"CRPIX2": True}, "CRPIX2 = True, wanted a number"),
    "no CRVAL": ({"CRVAL2": None}, "no CRVAL2"),
    "no scale": ({"CDELT1": None, "CDELT2": None}, "no CDELT1, CDELT2"),
    "CDELT 0": ({"CDELT1": 0.0}, "singular"),
    "CD singular": ({"CD1_1": 1.0, "CD1_2": 1.0, "CD2_1": 1.0, "CD2_2": 1.0}, "CD matrix .* is singular"),
    "CD half": ({"CD1_1": 1e-4}, "CD matrix .* is singular"),
    "PC singular": ({"PC1_1": 1.0, "PC1_2": 1.0, "PC2_1": 1.0, "PC2_2": 1.0}, "PC matrix .* is singular"),
    "CRVAL beyond the pole": ({"CRVAL2": 95.0}, "No valid solution"),
    "unit": ({"CUNIT1": "pixel", "CUNIT2": "pixel"}, "CUNIT1"),
    "SIP by half": ({"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "A_2_0": 1e-4}, "B_ORDER"),
    "SIP text": ({"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": "x"}, "A_ORDER = 'x'"),
    "lookup": ({"CPDIS1": "LOOKUP"}, "HDUList is required"),
    "ecliptic": ({"CTYPE1": "ELON-TAN", "CTYPE2": "ELAT-TAN"}, "no conversion to ICRS from 'ELON'"),
    "apparent place": ({"RADESYS": "GAPPT"}, "no conversion to ICRS from 'GAPPT'"),
    "equinox text": ({"EQUINOX": "B1950"}, "EQUINOX = 'B1950', wanted a number"),
    "equinox 0": ({"EQUINOX": 0.0}, "EQUINOX = 0, wanted a year"),
}


@pytest.mark.parametrize("kind", BAD)
def test_celestial_axes_that_cannot_be_used_say_why(kind):
    cards, reason = BAD[kind]
    with pytest.raises(ValueError, match=reason) as error:
        sky.celestial(header(**cards))
    assert "\n" not in str(error.value)
    assert "wcslib" not in str(error.value)


@pytest.mark.parametrize("text", ["", "12.3.4", "NaN"])
def test_cards_that_cannot_be_read_say_so(text):
    cards = [fits.Card.fromstring(f"CRVAL1  = {text}"), *header(CRVAL1=None).cards]
    with pytest.raises(ValueError, match=r"CRVAL1 = .*wanted a number"):
        sky.celestial(fits.Header(cards))


def test_lookup_tables_announced_by_half():
    cards = header(CPDIS1="LOOKUP")
    cards["DP1"] = "EXTVER: 1"
    cards["DP1"] = "AXIS.1: 1"
    with pytest.raises(ValueError, match="NAXES was not set"):
        sky.celestial(cards)


def test_lookup_tables_in_an_hdu_that_is_broken(tmp_path):
    plain = header(CPDIS1="LOOKUP", CPDIS2="LOOKUP")
    for axis, value in itertools.product((1, 2), ("EXTVER: 1", "NAXES: 2", "AXIS.1: 1", "AXIS.2: 2")):
        plain[f"DP{axis}"] = value
    table = fits.ImageHDU(np.zeros((4, 4), "f4"), name="WCSDVARR")
    fits.HDUList([fits.PrimaryHDU(np.zeros((9, 9), "f4"), plain), table]).writeto(tmp_path / "a.fits")
    whole, broken = str(tmp_path / "a.fits"), str(tmp_path / "b.fits")
    assert sky.read_celestial(whole, read_header(whole, 0)) is not None
    raw = (tmp_path / "a.fits").read_bytes()
    for good, bad in (
        (b"XTENSION= 'IMAGE   '", b"XTENSION= 'FOREIGN '"),
        (b"EXTNAME = 'WCSDVARR'", b"EXTNAME = 'ELSEWHERE"),
    ):
        (tmp_path / "b.fits").write_bytes(raw.replace(good, bad))
        with pytest.raises(ValueError, match="unusable WCS"):
            sky.read_celestial(broken, read_header(broken, 0))


def test_what_else_is_in_the_header_does_no_harm():
    text = "".join(card.image for card in header().cards) + "OBJECT  = 'caf\xe9'".ljust(80) + "FREE TEXT = ?".ljust(80)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken = fits.Header.fromstring(text)
    assert sky.celestial(broken) is not None


def test_wcs_of_an_image_column():
    cards = {"TTYPE1": "TIME", "TTYPE12": "FLUX", "RADESYS": "ICRS"}
    names = {"CTYPE": "CTYP", "CRVAL": "CRVL", "CRPIX": "CRPX", "CDELT": "CDLT"}
    plain = header(PC1_1=0.8, PC1_2=-0.6, PC2_1=0.6, PC2_2=0.8)
    for key, value in plain.items():
        cards[f"{key[2]}{key[4]}PC12" if key.startswith("PC") else f"{key[5]}{names[key[:5]]}12"] = value
    table = fits.Header(list(cards.items()))
    truth = sky.celestial(plain).all_pix2world([3.0], [7.0], 0)
    np.testing.assert_allclose(sky.celestial(table, column="flux").all_pix2world([3.0], [7.0], 0), truth, rtol=1e-14)
    assert sky.celestial(table) is None
    assert sky.celestial(table, column="TIME") is None
    assert sky.celestial(table, column="ABSENT") is None


def test_lookup_tables_are_read_from_the_open_file(shared_data):
    with fits.open(shared_data / "nasty" / "dist_lookup.fits.gz") as hdus:
        with pytest.raises(ValueError, match="HDUList is required"):
            sky.celestial(hdus[1].header)
        with pytest.raises(ValueError, match="D2IMARR"):
            sky.celestial(hdus[1].header, hdus=fits.HDUList([hdus[1]]))
        wcs = sky.celestial(hdus[1].header, hdus=hdus)
        assert wcs.cpdis1 is not None
        columns = one(wcs, [50.0, 50.0, 1.0, 2.0, 0.1, 0.1])
    assert np.isfinite([columns["ra"], columns["fwhm_major_sky_err"]]).all()


def test_every_header_at_hand_gives_a_wcs_none_or_a_sentence(shared_data, capfd):
    seen = 0
    for path in sorted(shared_data.glob("*/*.fits*")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with fits.open(path, lazy_load_hdus=False) as hdus:
                    headers = [hdu.header for hdu in hdus]
            except OSError:
                continue
        for image in headers:
            seen += 1
            sky.beam(image)
            with contextlib.suppress(ValueError):
                wcs = sky.celestial(image)
                assert wcs is None or wcs.naxis == 2
    assert seen > 50
    assert capfd.readouterr() == ("", "")
