"""Whole runs with real Snakemake: what is refused, what a run gives, what the next run repeats, what a kill leaves."""

import ast
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from astropy.io import fits
from astropy.table import QTable

import pipeline
from pipeline import columns
from pipeline.catalogue import read_origin
from pipeline.origin import read_list
from tests.workflow.runs import (
    NO_CERTIFICATE,
    ROOT,
    SNAKEFILE,
    assert_identical,
    command,
    configure,
    copied,
    jobs_of,
    read,
    snakemake,
    times,
)

SIMULATED = {"simulated": {"count": 12, "shape": [16, 16]}, "shard_size": 6} | NO_CERTIFICATE
ODD_NAMES = ("plain.fits", "two words.fits", "b [1] {shard}.fits", "quote'\"$(x);&.fits", "été.fit", "-dash.fts")


@pytest.fixture(scope="module")
def simulated_run(tmp_path_factory) -> Path:
    folder = configure(tmp_path_factory.mktemp("simulated") / "run", SIMULATED)
    snakemake(folder)
    return folder


@pytest.fixture(scope="module")
def images_run(simulated_run, tmp_path_factory) -> Path:
    """Single images under odd names, three broken files, and a name that is not there."""
    folder = tmp_path_factory.mktemp("images") / "run"
    images = {"source": "images", "images": {"files": ["stamps", "nothing/*.fits"]}, "shard_size": 3}
    configure(folder, images | NO_CERTIFICATE)
    stamps = folder / "stamps"
    stamps.mkdir()
    pixels = fits.getdata(simulated_run / "results" / "simulated" / "00000.fits")
    for name, plane in zip(ODD_NAMES, pixels, strict=True):
        fits.PrimaryHDU(plane).writeto(stamps / name)
    (stamps / "empty.fits").touch()
    (stamps / "text.fits").write_text("not an image")
    whole = (stamps / "plain.fits").read_bytes()
    (stamps / "truncated.fits").write_bytes(whole[:3000])
    snakemake(folder)
    return folder


@pytest.fixture(scope="module")
def certified_run(tmp_path_factory) -> Path:
    """A run with enough bright sources to say how often their errors hold."""
    simulated = {"count": 1000, "shape": [16, 16], "parameters": {"amp": [8, 80], "sigma": [1.2, 1.8]}}
    folder = configure(tmp_path_factory.mktemp("certified") / "run", {"simulated": simulated, "shard_size": 600})
    snakemake(folder)
    return folder


# ---- before anything runs -------------------------------------------------------------------------------------------


def test_dry_run_lists_the_jobs_and_makes_nothing(tmp_path):
    folder = configure(tmp_path / "run", SIMULATED)
    said = snakemake(folder, "--dry-run")
    assert "Simulating images 6 to 12" in said
    assert "profiles/default for setting default command line arguments" in said
    assert not (folder / "results").exists()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"fit": {"bakground": "plane"}}, "fit.bakground: unknown key; did you mean 'background'?"),
        ({"fit": {"tolerance": 2}}, "fit.tolerance: got 2, wanted a number > 0 and <= 0.01"),
    ],
)
def test_a_bad_config_stops_before_any_job(tmp_path, config: dict, sentence: str):
    folder = configure(tmp_path / "run", SIMULATED | config)
    said = snakemake(folder, fails=True)
    assert sentence in said
    assert "Traceback" not in said
    assert "Error" not in said
    assert not (folder / "results").exists()


def test_without_hooks_there_is_no_run(tmp_path):
    assert "--no-hooks" in snakemake(configure(tmp_path / "run", SIMULATED), "--no-hooks", fails=True)


def test_sections_on_the_command_line_are_typed(tmp_path):
    folder = configure(tmp_path / "run", SIMULATED)
    assert "Simulating images 12 to 15" in snakemake(folder, "--dry-run", "--config", "simulated={count: 15}")
    assert "fit.scale: got -1" in snakemake(folder, "--dry-run", "--config", "fit={scale: -1}", fails=True)


def test_without_a_config_the_defaults_hold(tmp_path):
    (tmp_path / "run").mkdir()
    assert "Simulating images 0 to 2000" in snakemake(tmp_path / "run", "--dry-run")


def test_parsing_imports_nothing_slow(tmp_path):
    """Every cluster job parses the Snakefile again."""
    folder = configure(tmp_path / "run", {"source": "images", "images": {"files": ["*.fits"]}})
    program = (
        "import contextlib, sys\n"
        "from snakemake.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({command(folder, '--list-rules')[3:]!r})\n"
        "print(sorted({'jax', 'astropy', 'fitsio', 'h5py', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "catalogue" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_lint_has_nothing_to_say(tmp_path):
    assert "good condition" in snakemake(configure(tmp_path / "run", SIMULATED), "--lint")


def test_rules_are_formatted():
    subprocess.run([sys.executable, "-m", "snakefmt", "--check", SNAKEFILE, ROOT / "workflow"], check=True)


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_simulated_images_are_recovered(simulated_run):
    rows = QTable.read(simulated_run / "results" / "catalogue.h5", path="catalogue")
    truth = QTable.read(simulated_run / "results" / "catalogue.h5", path="truth")
    assert len(rows) == 12
    assert len(set(rows["image_id"])) == 12
    assert (rows["image_id"] == truth["image_id"]).all()
    for name in ("x0", "y0", "amp", "sigma"):
        pulls = (rows[name] - truth[name]) / rows[f"{name}_err"]
        assert np.median(np.abs(pulls)) < 2, name
    assert (simulated_run / "results" / "report.html").stat().st_size > 10_000
    assert len(list((simulated_run / "results" / "shards").iterdir())) == 2


def test_provenance_tells_config_versions_device_and_inputs(simulated_run):
    with h5py.File(simulated_run / "results" / "catalogue.h5") as file:
        told = {name: value[()].decode() for name, value in file["provenance"].items()}
    assert yaml.safe_load(told["config"])["simulated"]["count"] == 12
    assert yaml.safe_load(told["versions"])["numpy"] == np.__version__
    assert told["device"] == "cpu"
    _, shards = read_list(simulated_run / "results" / "shards.txt")
    assert list(yaml.safe_load(told["inputs"])) == list(shards)


def test_every_job_leaves_a_log_and_a_benchmark(certified_run):
    logs = {
        path.relative_to(certified_run / "results" / "logs").with_suffix("")
        for path in (certified_run / "results" / "logs").rglob("*.log")
    }
    benchmarks = {
        path.relative_to(certified_run / "results" / "benchmarks").with_suffix("")
        for path in (certified_run / "results" / "benchmarks").rglob("*.tsv")
    }
    assert logs == benchmarks
    assert {path.parts[0] for path in logs} == {"simulate", "scan", "fit", "certificate", "catalogue", "report"}


def test_the_same_again_does_nothing(simulated_run):
    assert "Nothing to be done" in snakemake(simulated_run)


def asked(run: Path, folder: Path, change: dict, *arguments: str) -> str:
    """What Snakemake says to a run with another config, which stays its own."""
    other = folder / "other.yaml"
    other.write_text(yaml.safe_dump(change, sort_keys=False))
    return snakemake(run, *arguments, "--configfile", str(other))


def test_more_images_leave_the_others_as_they_are(simulated_run, tmp_path):
    said = asked(simulated_run, tmp_path, {"simulated": {"count": 13}}, "--dry-run")
    assert "Simulating images 12 to 13" in said
    assert "Simulating images 6 to 12" not in said


def test_order_of_keys_repeats_nothing(simulated_run, tmp_path):
    turned = {"fit": {"precision": "float64"}, "simulated": dict(reversed(SIMULATED["simulated"].items()))}
    assert "Nothing to be done" in asked(simulated_run, tmp_path, turned)


def test_another_setting_repeats_the_fits_only(simulated_run, tmp_path):
    said = asked(simulated_run, tmp_path, {"fit": {"uncertainty": "fisher"}}, "--dry-run")
    assert said.count("Fitting the images of shard") == 2
    assert "Simulating" not in said


@pytest.mark.parametrize("question", ["--dry-run", "--summary", "--dag", "--until=scan"])
def test_what_fits_nothing_changes_nothing(simulated_run, tmp_path, question):
    before = times(simulated_run, "**/*")
    asked(simulated_run, tmp_path, {"fit": {"uncertainty": "fisher"}}, question)
    assert times(simulated_run, "**/*") == before


# ---- jobs that outlive their run, and what they leave ---------------------------------------------------------------


@pytest.fixture(scope="module")
def second_run(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A run with one config and then with another: its folder, and copies as it was after each."""
    runs = tmp_path_factory.mktemp("second")
    one, other = SIMULATED | {"certificate": {"sources": 8}}, SIMULATED | {"certificate": {"sources": 12}}
    folder = configure(runs / "run", one)
    snakemake(folder)
    shutil.copytree(folder, runs / "first")
    other |= {"fit": {"uncertainty": "fisher"}, "simulated": SIMULATED["simulated"] | {"seed": 2}}
    snakemake(configure(folder, other))
    shutil.copytree(folder, runs / "as it must be")
    return folder, runs / "first", runs / "as it must be"


@pytest.mark.parametrize(
    ("left", "forgotten"),
    [
        (["simulated/00001.fits", "simulated/00000.truth.fits"], False),
        (["shards.txt"], False),
        (["shards"], False),
        (["parts"], False),
        (["parts"], True),
        (["certificate.h5"], False),
        (["catalogue.h5"], False),
        (["catalogue.h5"], True),
        (["report.html"], False),
    ],
    ids=lambda what: what[0].split("/")[0] if isinstance(what, list) else ("noted", "forgotten")[what],
)
def test_what_a_job_of_an_earlier_run_leaves_is_made_again(second_run, left, forgotten):
    """It writes its output over that of the run; what Snakemake has noted is of this one, or lost."""
    folder, first, wanted = second_run
    pairs = [
        (path, folder / path.relative_to(first))
        for name in left
        for path in sorted([first / "results" / name, *(first / "results" / name).glob("*")])
        if path.is_file()
    ]
    for source, target in pairs:
        assert source.read_bytes() != target.read_bytes()
        target.write_bytes(source.read_bytes())
    if forgotten:
        shutil.rmtree(folder / ".snakemake" / "metadata")
    snakemake(folder)
    assert_identical(folder, wanted)
    for source, target in pairs:
        assert source.read_bytes() != target.read_bytes()
    assert "Nothing to be done" in snakemake(folder)


def test_a_part_of_this_run_that_nobody_knows_of_is_not_made_again(second_run):
    """Its job had outlived its driver: what Snakemake has noted is of the part before, or that it is not whole."""
    folder, _, wanted = second_run
    parts = sorted((folder / "results" / "parts").iterdir())
    contents = [part.read_bytes() for part in parts]
    for part in parts:
        part.unlink()
    (folder / "results" / "catalogue.h5").unlink()
    for part, content in zip(parts, contents, strict=True):
        part.write_bytes(content)
    said = snakemake(folder)
    assert "Merging" in said
    assert "Fitting" not in said
    assert_identical(folder, wanted)


def test_a_job_whose_config_was_changed_stops(simulated_run, tmp_path):
    """A cluster's jobs read the config again, and Snakemake would note that of the driver."""
    before = times(simulated_run, "**/*")
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"simulated": {"seed": 2}}))
    job = ("--mode", "remote", "--target-jobs", "simulate:index=00000", "--allowed-rules", "simulate", "--force")
    said = snakemake(simulated_run, *job, "--configfile", str(tmp_path / "other.yaml"), fails=True)
    assert "its config was changed" in said
    assert times(simulated_run, "**/*") == before


# ---- certificates ---------------------------------------------------------------------------------------------------


def test_the_certificate_says_what_the_truth_says(certified_run):
    path = certified_run / "results" / "catalogue.h5"
    rows, truth, certificate = (QTable.read(path, path=name) for name in ("catalogue", "truth", "certificate"))
    solved = (np.asarray(rows["snr"]) >= 5) & (rows["flags"] & columns.UNSOLVED == 0)
    assert solved.sum() > 900
    for name in dict.fromkeys(certificate["parameter"]):
        own = certificate[(certificate["parameter"] == name) & (certificate["sources"] > 0)]
        pulls = np.asarray(((rows[name] - truth[name]) / rows[f"{name}_err"]).value)[solved]
        for label, errors, nominal in (("68", 1, 0.683), ("95", 2, 0.954)):
            # Over all bins, because in one of them rows are chosen by what was found, and sources by what was put in.
            share = np.average(own[f"coverage_{label}"], weights=own["sources"])
            error = np.sqrt(nominal * (1 - nominal) / own["sources"].sum())
            assert abs(share - np.mean(np.abs(pulls) < errors)) < 4 * np.sqrt(2) * error, (name, label)
            assert abs(share - nominal) < 4 * error + 0.03, (name, label)


def test_calibrated_errors_follow_the_certificate(certified_run):
    path = certified_run / "results" / "catalogue.h5"
    rows, certificate = (QTable.read(path, path=name) for name in ("catalogue", "certificate"))
    snr = np.asarray(rows["snr"])
    for line in certificate:
        here = (snr >= line["snr_low"]) & (snr < line["snr_high"])
        off = abs(line["factor"] - 1) > 4 * line["factor_err"]
        error, calibrated = (np.asarray(rows[line["parameter"] + end].value)[here] for end in ("_err", "_err_cal"))
        np.testing.assert_allclose(calibrated, (line["factor"] if off else 1) * error, rtol=1e-12)


def test_without_a_certificate_no_job_makes_one(simulated_run, certified_run, tmp_path):
    with h5py.File(simulated_run / "results" / "catalogue.h5") as file:
        assert "certificate" not in file
        assert np.isnan(file["catalogue"]["x0_err_cal"]).all()
        assert np.isfinite(file["catalogue"]["x0_err"]).any()
    said = asked(certified_run, tmp_path, NO_CERTIFICATE, "--dry-run")
    assert "Merging" in said
    assert not {"Putting", "Fitting"} & set(said.split())
    said = asked(simulated_run, tmp_path, {"certificate": {"sources": 500}}, "--dry-run")
    assert {"Putting", "Merging"} <= set(said.split())
    assert "Fitting" not in said


def test_broken_files_are_rejected_and_stop_nothing(images_run):
    rows, rejected = (
        QTable.read(images_run / "results" / "catalogue.h5", path=name) for name in ("catalogue", "rejected")
    )
    assert sorted(rows["file"]) == sorted(f"stamps/{name}" for name in ODD_NAMES)
    assert sorted(rejected["file"]) == [
        "nothing/*.fits",
        "stamps/empty.fits",
        "stamps/text.fits",
        "stamps/truncated.fits",
    ]
    assert all(rejected["reason"])


# ---- the next run ---------------------------------------------------------------------------------------------------


@pytest.fixture
def own_run(images_run, tmp_path) -> Path:
    """A finished run on images of its own, to change: to it copies are new images, however old their times."""
    folder = copied(images_run, tmp_path)
    snakemake(folder)
    return folder


def newly_fitted(folder: Path, parts: set[str]) -> int:
    return sum(read_origin(folder / "results" / "parts" / part)["fitted"] for part in parts)


def test_a_new_a_changed_and_a_removed_image_cost_what_they_are(own_run, images_run):
    folder = own_run
    manifests = {path.name: path.read_bytes() for path in (folder / "results" / "shards").iterdir()}
    parts = times(folder, "parts/*.h5")
    assert len(parts) > 1
    # All in the shard of the first image, so that the others must stay.
    shard = next(name for name, text in manifests.items() if b"stamps/plain.fits" in text)
    os.utime(folder / "stamps" / "plain.fits")
    snakemake(folder)
    repeated = {name for name, time in times(folder, "parts/*.h5").items() if time != parts[name]}
    assert repeated == {Path(shard).with_suffix(".h5").name}
    assert newly_fitted(folder, repeated) == 1
    assert_identical(folder, images_run)

    shutil.copy(folder / "stamps" / "plain.fits", folder / "stamps" / "new.fits")
    (folder / "stamps" / "été.fit").unlink()
    before = {path.name: path.read_bytes() for path in (folder / "results" / "shards").iterdir()}
    parts = times(folder, "parts/*.h5")
    snakemake(folder)
    after = {path.name: path.read_bytes() for path in (folder / "results" / "shards").iterdir()}
    concerned = {Path(name).stem for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    repeated = {name for name, time in times(folder, "parts/*.h5").items() if parts.get(name) != time}
    assert {Path(name).stem for name in repeated} == concerned & {Path(name).stem for name in after}
    assert newly_fitted(folder, repeated) == 1
    assert not times(folder, "parts/*.old")
    files = read(folder)["catalogue"]["file"].tolist()
    assert b"stamps/new.fits" in files
    assert "stamps/été.fit".encode() not in files


def test_by_content_a_copy_of_an_image_is_that_image(images_run, tmp_path):
    folder = copied(images_run, tmp_path)
    section = yaml.safe_load((folder / "config.yaml").read_text())
    section["images"]["changed"] = "content"
    configure(folder, section)
    snakemake(folder)
    parts = times(folder, "parts/*.h5")
    for file in (folder / "stamps").rglob("*.fits"):
        os.utime(file)
    assert "Rule: scan" in snakemake(folder)
    assert times(folder, "parts/*.h5") == parts
    assert_identical(folder, images_run)


def test_lost_manifests_are_written_again(own_run):
    shutil.rmtree(own_run / "results" / "shards")
    parts = times(own_run, "parts/*")
    snakemake(own_run)
    assert times(own_run, "shards/*.csv")
    assert times(own_run, "parts/*") == parts


def began_to_fit(folder: Path) -> bool:
    return any("JAX" in log.read_text() for log in (folder / "results" / "logs" / "fit").glob("*.log"))


def has_a_part(folder: Path) -> bool:
    return bool(times(folder, "parts/*.h5"))


@pytest.mark.parametrize(
    ("moment", "victims"),
    [(began_to_fit, "all"), (has_a_part, "all"), (began_to_fit, "driver"), (began_to_fit, "job")],
    ids=["all in the first fit", "all after the first fit", "the driver alone", "the job alone"],
)
def test_a_killed_run_goes_on_and_ends_the_same(simulated_run, tmp_path, moment, victims):
    folder = configure(tmp_path / "run", SIMULATED)
    shutil.copytree(simulated_run / "results" / "simulated", folder / "results" / "simulated")
    run = subprocess.Popen(
        [*command(folder), "--cores", "1"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not moment(folder):
            assert run.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
        jobs = jobs_of(run.pid)
        if victims == "all":
            os.killpg(run.pid, signal.SIGKILL)
        elif victims == "driver":
            assert jobs, "no job left that could outlive its driver"
            run.kill()
        else:
            os.kill(min(jobs), signal.SIGKILL)
            assert run.wait(timeout=120) != 0
            assert len(times(folder, "parts/*.h5")) == 1, "the other shard is fitted all the same"
        run.wait()
        assert not (folder / "results" / "catalogue.h5").exists()
        # With a driver that is gone its job is still there, and this run fits the same shard beside it.
        snakemake(folder)
        assert_identical(folder, simulated_run)
        assert not times(folder, "**/*.tmp")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


# ---- the house ------------------------------------------------------------------------------------------------------


def imports(file: Path) -> set[str]:
    """Every module that a file imports anywhere, as dotted names; ``from a import b`` gives ``a`` and ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def reached(module: str) -> set[str]:
    """Top-level packages that importing a module of the pipeline may bring in, through others of the pipeline too."""
    packages, todo, seen = set(), [module], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        for found in imports(ROOT / "pipeline" / f"{name}.py"):
            own = found.removeprefix("pipeline.")
            if found.startswith("pipeline.") and (ROOT / "pipeline" / f"{own}.py").exists():
                todo += [own] if own not in seen else []
            else:
                packages.add(found.split(".")[0])
    return packages


MODULES = sorted(path.stem for path in (ROOT / "pipeline").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("script", sorted((ROOT / "workflow" / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_only_unpack(script: Path):
    kinds = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.FunctionDef, ast.Lambda, ast.comprehension, ast.BoolOp)
    assert not [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, kinds)]
    assert imports(script) <= {"pathlib", "pathlib.Path", "pipeline", "pipeline.jobs"}


@pytest.mark.parametrize(
    "module",
    [
        *("columns", "config", "files", "origin", "carry", "keywords", "hdus", "places", "headers", "versions"),
        *("tiles", "planes", "maps", "images", "cells", "listing", "detection", "shards", "resources", "catalogue"),
        *("numerals", "tallies"),
    ],
)
def test_files_and_tables_know_no_jax(module: str):
    assert "jax" not in reached(module)


def test_the_numerics_know_no_files():
    for module in ("model", "likelihood", "moments", "newton", "start", "uncertainty", "quality", "fit"):
        assert not reached(module) & {"astropy", "fitsio", "h5py", "os", "pathlib", "logging", "time", "random"}, module


def test_imports_point_up_the_map():
    lines = (line.split() for line in pipeline.__doc__.splitlines())
    order = [words[0] for words in lines if words and words[0] in MODULES]
    assert sorted(order) == MODULES
    for place, module in enumerate(order):
        own = {name.removeprefix("pipeline.") for name in imports(ROOT / "pipeline" / f"{module}.py")}
        assert not own & set(order[place + 1 :]), module


def test_one_module_knows_hdf5_and_none_snakemake():
    assert [module for module in MODULES if "h5py" in imports(ROOT / "pipeline" / f"{module}.py")] == ["catalogue"]
    assert not [module for module in MODULES if "snakemake" in imports(ROOT / "pipeline" / f"{module}.py")]
