"""The process of a job: what stands in its log, and what it says when it gets no GPU."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(program: str, *arguments: str, code: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, because what it sets holds for the whole process."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=code, capture_output=True, text=True, check=False
    )


def test_the_log_has_warnings_and_the_traceback_the_terminal_the_sentence(tmp_path):
    log = tmp_path / "b-01.log"
    program = (
        "import sys, warnings\n"
        "from pipeline import runtime\n"
        "runtime.start_log(sys.argv[1])\n"
        "runtime.LOG.info('half way, \\udcff')\n"
        "warnings.warn('odd header')\n"
        "raise ValueError('stack.fits: got 3 axes')\n"
    )
    done = python(program, str(log))
    assert done.returncode == 1
    assert "b-01: half way" in done.stderr
    assert "b-01: ValueError: stack.fits: got 3 axes" in done.stderr
    assert "Traceback" not in done.stderr
    text = log.read_text()
    for wanted in ("half way", "odd header", "Traceback", "ValueError: stack.fits: got 3 axes"):
        assert wanted in text


def test_a_job_has_float64_one_thread_and_no_gpu(tmp_path):
    program = (
        "import os, sys\n"
        "from pipeline import runtime\n"
        "os.environ.pop('JAX_PLATFORMS')\n"
        "print(runtime.start_jax(threads=1, gpu=0, cache=sys.argv[1]))\n"
        "import jax\n"
        "print(jax.config.jax_enable_x64, jax.config.jax_platforms, os.environ['NPROC'])\n"
    )
    done = python(program, str(tmp_path))
    assert done.stdout.split() == ["cpu", "True", "cpu", "1"], done.stderr


def test_a_gpu_that_is_not_there_is_missed_in_a_sentence(tmp_path):
    program = "import sys; from pipeline import runtime; runtime.start_jax(threads=1, gpu=1, cache=sys.argv[1])"
    done = python(program, str(tmp_path))
    assert done.returncode == 1
    assert "the job was given 1 GPU (resource gpu), but JAX" in done.stderr


def test_a_job_told_to_end_leaves_nothing_behind(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from pipeline import runtime\n"
        "from pipeline.files import replacing\n"
        "runtime.start_log(sys.argv[1] + '/log')\n"
        "with replacing(sys.argv[1] + '/part') as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert python(program, str(tmp_path)).returncode == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize("end", ["sys.exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_compiled_programs_are_kept_whole_or_not_at_all(end, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    program = (
        "import os, signal, sys\n"
        "from pipeline import runtime\n"
        "runtime.start_jax(threads=1, gpu=0, cache=sys.argv[1])\n"
        "import jax\n"
        "jax.jit(lambda x: x + 1)(1.0)\n"
        f"{end}\n"
    )
    python(program, str(tmp_path))
    entries = times(tmp_path)
    assert bool(entries) == (end == "sys.exit(1)")
    # The next job takes them, and removes what a killed one has left.
    python(program.replace(end, "sys.exit()"), str(tmp_path))
    assert entries.items() <= times(tmp_path).items()
    assert len(times(tmp_path)) == len(list(tmp_path.iterdir())) > 0


def test_a_cache_that_cannot_be_used_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "cache").write_text("a file where the folder should be")
    program = (
        "import sys\n"
        "from pipeline import runtime\n"
        "runtime.start_log(sys.argv[2])\n"
        "runtime.start_jax(threads=1, gpu=0, cache=sys.argv[1])\n"
        "import jax\n"
        "print(jax.jit(lambda x: x + 1)(1.0))\n"
    )
    done = python(program, str(tmp_path / "cache"), str(tmp_path / "log"))
    assert (done.returncode, done.stdout) == (0, "2.0\n")
    assert "compiled programs are not kept" in (tmp_path / "log").read_text()


TRACING = """
import sys
from pipeline import runtime, traced
runtime.start_log(sys.argv[1])
runtime.start_jax(threads=1, gpu=0, cache=sys.argv[2])

def double(x, *, by):
    print("traced")
    return x * by

import numpy as np
print(traced.kept(double)(np.ones(1), by=2.0)[0])
"""


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A copy of the package, which processes import."""
    copy = tmp_path / "code" / "pipeline"
    shutil.copytree(ROOT / "pipeline", copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    return copy


def traces(package: Path, program: str = TRACING) -> bool:
    """Whether a new process traces the program; its result is right."""
    code = package.parent
    done = python(program, str(code.parent / "log"), str(code.parent / "cache"), code=code)
    *said, result = done.stdout.splitlines()
    assert (done.returncode, result) == (0, "2.0"), done.stderr
    return bool(said)


def test_traced_programs_are_those_of_their_code(package, tmp_path):
    assert traces(package)
    assert not traces(package)
    (entry,) = (tmp_path / "cache").glob("double-*-traced-cache")
    # A disk that was full, or worse: what is left is replaced.
    entry.write_bytes(entry.read_bytes()[:50])
    assert traces(package)
    assert not traces(package)
    with (package / "model.py").open("a") as file:
        file.write("# another program, for all we know\n")
    # Of code that was edited when it had been imported already nobody knows what it was.
    edit = f"open({str(package / 'model.py')!r}, 'a').write('#')\nimport numpy as np"
    assert traces(package, TRACING.replace("import numpy as np", edit))
    assert traces(package)
    assert not traces(package)


def test_without_a_compile_cache_nothing_is_kept(package, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
    assert traces(package)
    assert not list((tmp_path / "cache").glob("*-traced-cache"))


def times(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("*-cache")}
