"""The config: what is refused and in which words, what is filled in, and what is made from the schema."""

import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline import config
from pipeline.config import check_config

ROOT = Path(__file__).resolve().parents[2]


def problems(text: str) -> str:
    """What a config given as YAML is refused for."""
    with pytest.raises(ValueError, match="cannot be used") as refusal:
        check_config(yaml.safe_load(text))
    return str(refusal.value)


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(config.schema())


def test_every_key_has_a_default_and_a_meaning():
    for key, part in config._described(config.schema()):
        assert "default" in part, key
        assert part["description"], key


def test_every_section_refuses_unknown_keys():
    def sections(part):
        if isinstance(part, dict):
            yield from [part] if "properties" in part else []
            for value in part.values():
                yield from sections(value)
        elif isinstance(part, list):
            for value in part:
                yield from sections(value)

    assert all(section["additionalProperties"] is False for section in sections(config.schema()))


def test_config_yaml_states_the_defaults():
    stated = yaml.safe_load((ROOT / "config.yaml").read_text())
    assert stated == check_config({})
    assert list(stated) == list(check_config({}))


def test_an_empty_config_is_complete():
    checked = check_config({})
    assert checked["fit"]["tolerance"] == 1e-6
    assert checked["simulated"]["noise"] == {
        "kind": "cauchy",
        "scale": 0.5,
        "fraction": 0.05,
        "factor": 10.0,
        "dof": 3.0,
    }
    assert checked["images"]["mask"] is None


def test_checking_again_changes_nothing():
    checked = check_config({"fit": {"scale": 2}, "images": {"hdu": ["SCI", 3], "mask": {"hdu": 2, "bits": [0]}}})
    assert check_config(checked) == checked


def test_what_means_the_same_is_the_same():
    one = check_config({"fit": {"scale": 1, "precision": "float32"}, "simulated": {"parameters": {"amp": [5, 50]}}})
    other = check_config(
        {"simulated": {"parameters": {"amp": [5.0, 50.0]}}, "fit": {"precision": "float32", "scale": 1.0}}
    )
    # repr, because that is what Snakemake compares.
    assert repr(one) == repr(other)
    assert isinstance(one["fit"]["max_steps"], int)


def test_the_raw_config_is_left_alone():
    raw = {"fit": {"scale": 1}}
    check_config(raw)["images"]["files"].append("a.fits")
    assert raw == {"fit": {"scale": 1}}
    assert check_config({})["images"]["files"] == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fit: {bakground: plane}", "fit.bakground: unknown key; did you mean 'background'?"),
        (
            "colour: red",
            "colour: unknown key; known here: results, source, simulated, images, fit, certificate, shard_size",
        ),
        ("simulated: {noise: {kid: cauchy}}", "simulated.noise.kid: unknown key; did you mean 'kind'?"),
        ("fit: {tolerance: 2}", "fit.tolerance: got 2, wanted a number > 0 and <= 0.01"),
        ("fit: {tolerance: 1e-6}", "got the text '1e-6' (as a number YAML wants 1.0e-06), wanted a number"),
        ("fit: {scale: -1}", "fit.scale: got -1, wanted fit or a number > 0"),
        ("fit: {scale: .nan}", "fit.scale: got nan, wanted a finite number"),
        (
            "fit: {background: linear}",
            "fit.background: got the text 'linear', wanted none, constant, plane or a number",
        ),
        (
            "fit: {max_steps: '100'}",
            "fit.max_steps: got the text '100' (as a number YAML wants 100), wanted an integer >= 1",
        ),
        ("fit: {max_steps: true}", "fit.max_steps: got true, wanted an integer"),
        ("fit: {precision: float16}", "fit.precision: got the text 'float16', wanted float64 or float32"),
        ("fit:", "fit: got null, wanted a section of keys"),
        ("shard_size: 0", "shard_size: got 0, wanted an integer >= 1"),
        ("results: 'a{b}'", "results: got the text 'a{b}', wanted a path without { or }"),
        ("source: files", "source: got the text 'files', wanted simulated or images"),
        ("source: images", "images.files: got an empty list, wanted paths, globs or folders"),
        ("images: {files: a.fits}", "images.files: got the text 'a.fits', wanted a list of paths, globs or folders"),
        ("images: {hdu: -1}", "images.hdu: got -1, wanted auto, all, a number from 0, an EXTNAME, or a list"),
        ("images: {mask: {bit: 3}}", 'images.mask: got {"bit": 3}, wanted null, an HDU'),
        ("images: {uncertainty: {variance: ERR, weight: WHT}}", "images.uncertainty: got"),
        ("images: {carry: MJD}", "images.carry: got the text 'MJD', wanted a list of names, each once"),
        ("images: {carry: [A, A]}", 'images.carry: got ["A", "A"], wanted a list of names, each once'),
        ("images: {carry: [ra]}", "images.carry: got 'ra', which is a column of the catalogue already"),
        ("images: {saturation: 6e4}", "(as a number YAML wants 60000), wanted null, a number or a header keyword"),
        ("images: {background: {variance: BKG}}", "images.background: got"),
        ("images: {cutouts: {size: 32}}", 'images.cutouts: got {"size": 32}, wanted null'),
        (
            "images: {cutouts: {positions: a.csv, size: 7}}",
            "{positions: FILE, size: SIZE} or {detect: {threshold: a number > 0}, size: SIZE}, SIZE an integer",
        ),
        ("images: {cutouts: {positions: a.csv, size: 16.5}}", '"size": 16.5}, wanted null, {positions: FILE'),
        ("simulated: {shape: [32]}", "simulated.shape: got [32], wanted [ny, nx], two integers"),
        (
            "simulated: {parameters: {amp: [9, 2]}}",
            "simulated.parameters.amp: got [9.0, 2.0], wanted the lowest value first",
        ),
        ("simulated: {parameters: {sigma: [0, 2]}}", "simulated.parameters.sigma: got [0.0, 2.0], wanted widths > 0"),
        (
            "simulated: {parameters: {rho: [-1.6, 0], diff: [0, 0.7]}}",
            "simulated.parameters.rho, diff: got diff^2 + rho^2/4 up to 1.13, wanted it below 1",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(text: str, sentence: str):
    assert sentence in problems(text)


def test_all_problems_are_told_at_once():
    said = problems("fit: {scale: 0, tolerance: 1, prcision: float32}\nshard_size: -3")
    assert len(said.splitlines()) == 5


@pytest.mark.parametrize(
    "images",
    [
        {"hdu": "all"},
        {"hdu": 3},
        {"hdu": ["SCI", 4]},
        {"column": "FLUX", "uncertainty": {"column": "FLUX_ERR"}},
        {"mask": "DQ"},
        {"mask": {"files": "m/{stem}.fits"}},
        {"mask": {"hdu": "DQ", "bits": [0, 4]}},
        {"uncertainty": {"variance": 2}},
        {"background": {"files": "b/{stem}.fits", "hdu": "BKG"}, "saturation": 60000.0},
        {"background": 3, "saturation": "SATURATE"},
        {"carry": ["MJD-OBS", "ESO TEL ALT", "RA"]},
        {"cutouts": {"positions": "a.csv", "size": 16}},
        {"cutouts": {"detect": {"threshold": 3.0}, "size": 16}},
        {"uncertainty": {"weight": {"files": "w/{stem}.fits", "hdu": 1}}},
    ],
)
def test_what_the_contract_allows_passes_unchanged(images: dict):
    checked = check_config({"images": images})["images"]
    assert {key: checked[key] for key in images} == images


def test_a_choice_of_sections_is_completed():
    checked = check_config({"images": {"cutouts": {"positions": "a.csv"}, "mask": {"hdu": 2.0}}})["images"]
    assert checked["cutouts"] == {"positions": "a.csv", "size": 32}
    assert check_config({"images": {"cutouts": {"detect": {}}}})["images"]["cutouts"] == {
        "detect": {"threshold": 5.0},
        "size": 32,
    }
    assert repr(checked["mask"]) == "{'hdu': 2}"


def test_the_table_has_every_key():
    keys = [key for key, _ in config._described(config.schema())]
    table = config.table()
    assert [line.split("`")[1] for line in table.splitlines()[2:]] == keys
    assert "| `fit.tolerance` | a number > 0 and <= 0.01 | `1.0e-06` |" in table


def test_the_tables_of_the_readme_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"make tables would change:\n{done.stdout}{done.stderr}"
