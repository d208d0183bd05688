"""The same run through SLURM: a cluster of one node, started here, and what may happen to jobs on it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.workflow.runs import assert_identical, command, configure, times

CONFIG = {"simulated": {"count": 9, "shape": [16, 16]}, "shard_size": 3}
# A small fit's time limits, which grow with the attempt, and the least that SLURM knows.
FIRST, SECOND, LEAST = "00:10:00", "00:20:00", "00:01:00"
PATIENCE = 600  # seconds
DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = f"{os.environ['PATH']}:/usr/sbin"

# Without cgroups, accounting and mail, which are no part of the question. More cores than there are, so that jobs run
# side by side. A GPU needs a device file; /dev/null will do, and is none that JAX finds.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MpiDefault=none
MailProg=/bin/true
KillWait=2
MinJobAge=3600
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=localhost CPUs=8 RealMemory=64000 Gres=gpu:1
PartitionName=cpu Nodes=ALL Default=YES
PartitionName=gpu Nodes=ALL
"""

Job = dict[str, str]


def free_ports() -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(2)]
        return [one.getsockname()[1] for one in sockets]


def wait(event, what: str, run: subprocess.Popen, seconds: float = PATIENCE):
    """What ``event()`` gives, once it is true; ``run`` must last until then."""
    end = time.monotonic() + seconds
    while not (result := event()):
        assert run.poll() is None, f"{run.args} ended before: {what}"
        assert time.monotonic() < end, f"after {seconds} s still not: {what}"
        time.sleep(0.2)
    return result


def end(process: subprocess.Popen, how: signal.Signals) -> None:
    process.send_signal(how)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[None]:
    """SLURM's daemons, and the environment in which its commands find them."""
    absent = [daemon for daemon in DAEMONS if shutil.which(daemon, path=PATH) is None]
    if absent:
        pytest.skip(f"no SLURM: {', '.join(absent)} not installed (Debian: apt install slurm-wlm munge)")
    folder = tmp_path_factory.mktemp("cluster")
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    user = subprocess.check_output(["id", "-un"], text=True).strip()
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, user=user, ports=free_ports()))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    # The plugin hides SLURM's variables from its srun.
    srun = folder / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", "localhost"],
    ]
    idle = ["sinfo", "--noheader", "--format=%t"]
    with pytest.MonkeyPatch.context() as patch, (folder / "daemons.log").open("w") as log:
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        patch.setenv("PATH", f"{folder}/bin:{PATH}")
        running = [subprocess.Popen(daemon, stdout=log, stderr=log) for daemon in commands]
        try:
            wait(
                lambda: "idle" in subprocess.run(idle, capture_output=True, text=True, check=False).stdout,
                f"the node idle, see {log.name}",
                running[-1],
                60,
            )
            yield
        finally:
            subprocess.run(["scancel", f"--user={user}"], check=False)
            for process in reversed(running):
                end(process, signal.SIGTERM)


def jobs() -> list[Job]:
    """What SLURM says of every job, also of those that have ended, by number."""
    listed = subprocess.run(["scontrol", "--oneliner", "show", "jobs"], capture_output=True, text=True, check=True)
    lines = (line.split() for line in listed.stdout.splitlines() if line.startswith("JobId="))
    found = [dict(word.split("=", 1) for word in words if "=" in word) for words in lines]
    return sorted(found, key=lambda job: int(job["JobId"]))


def fits(state: str, limit: str, shard: str = "") -> list[Job]:
    """Jobs that fit a shard, or this one, in this state, with this time limit."""
    wanted = {"JobState": state, "TimeLimit": limit}
    return [job for job in jobs() if job["Comment"].startswith(shard or "rule_fit_") and wanted.items() <= job.items()]


def environment(process: int) -> list[str]:
    """What a process was started with; nothing if it has ended."""
    try:
        return Path(f"/proc/{process}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []


def hold(job: Job, run: subprocess.Popen) -> None:
    """Stop all processes of a job, so that it lasts until its time is up, and let that be soon."""

    def processes() -> list[int]:
        """None for a moment after SLURM calls the job running. In that moment it may list all of process group 0, among
        which may be this test and whoever started it: only what has the job's number in its environment is the job's.
        """
        listed = subprocess.run(["scontrol", "listpids", job["JobId"]], capture_output=True, text=True, check=False)
        numbers = [int(line.split()[0]) for line in listed.stdout.splitlines()[1:]]
        return [number for number in numbers if f"SLURM_JOB_ID={job['JobId']}" in environment(number)]

    for number in wait(processes, "the processes of a job", run):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGSTOP)
    subprocess.run(["scontrol", "update", f"JobId={job['JobId']}", "TimeLimit=1"], check=True)


def on_slurm(folder: Path, *arguments: str) -> list[str]:
    """The command of a run on SLURM that looks at its jobs more often than is polite."""
    often = ("--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "5")
    return command(folder, "--workflow-profile", "slurm", *often, *arguments)


@contextlib.contextmanager
def started(words: list[str], folder: Path) -> Iterator[subprocess.Popen]:
    """A run in the background; what it says is in ``said.txt``."""
    with (folder / "said.txt").open("a") as said:
        run = subprocess.Popen(words, cwd=folder.parent, stdout=said, stderr=subprocess.STDOUT)
    try:
        yield run
        assert run.wait(PATIENCE) in (0, -signal.SIGKILL), (folder / "said.txt").read_text()
    finally:
        end(run, signal.SIGINT)


class Runs(NamedTuple):
    """A run here and one on SLURM.

    local, slurm : their folders. jobs : all that SLURM had; late, cancelled : two of them, when they ran; killed : how
    many there were when the driver was killed. gpu : what a driver said whose fit asked for a GPU.
    """

    local: Path
    slurm: Path
    jobs: list[Job]
    late: Job
    cancelled: Job
    killed: int
    gpu: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory) -> Runs:
    """Of three fits one is cancelled and one runs out of its time; when this one runs again the driver is killed."""
    local, slurm, gpu = (configure(tmp_path_factory.mktemp(name) / "run", CONFIG) for name in ("local", "slurm", "gpu"))
    words = on_slurm(slurm)
    with started(words, slurm) as run:
        late, cancelled, _ = wait(
            lambda: len(found := fits("RUNNING", FIRST)) == 3 and found, f"three fits running, see {slurm}", run
        )
        hold(late, run)
        subprocess.run(["scancel", cancelled["JobId"]], check=True)
        with started(command(local), local):
            wait(lambda: fits("TIMEOUT", LEAST, late["Comment"]), "a job out of time", run)
            wait(lambda: fits("RUNNING", SECOND, late["Comment"]), "the job running again", run)
            run.kill()
            killed = len(jobs())
    with started(words, slurm):
        refused = fit_on_gpu(Path(shutil.copytree(local, gpu, dirs_exist_ok=True)))
    return Runs(local, slurm, jobs(), late, cancelled, killed, refused)


def fit_on_gpu(folder: Path) -> subprocess.CompletedProcess[str]:
    part = next((folder / "results" / "parts").glob("*.h5")).relative_to(folder)
    gpu = ("--force", "--retries", "0", "--set-resources", "fit:gpu=1", "fit:slurm_partition=gpu")
    fit = on_slurm(folder, str(part), *gpu)
    return subprocess.run(fit, cwd=folder.parent, capture_output=True, text=True, check=False)


def test_a_run_on_slurm_gives_the_same_bits_whatever_happens_to_it(runs):
    assert_identical(runs.slurm, runs.local)
    assert not times(runs.slurm, "**/*.tmp")


@pytest.mark.parametrize(("which", "end"), [("late", ("TIMEOUT", LEAST)), ("cancelled", ("CANCELLED", FIRST))])
def test_what_is_lost_is_submitted_again_with_more_time_and_memory(runs, which, end):
    shard = getattr(runs, which)["Comment"]
    first, second, *_ = (job for job in runs.jobs if job["Comment"] == shard)
    assert (first["JobState"], first["TimeLimit"]) == end
    assert (second["JobState"], second["TimeLimit"]) == ("COMPLETED", SECOND)
    assert (first["MinMemoryNode"], second["MinMemoryNode"]) == ("2000M", "4000M")


def test_finished_shards_are_not_fitted_again(runs):
    again = {job["Comment"] for job in runs.jobs[runs.killed :] if "TresPerJob" not in job}
    # The late one was running when the driver was killed, and may have ended before the next driver looked.
    assert again - {runs.late["Comment"]} == {"rule_certificate", "rule_catalogue", "rule_report"}


def test_a_fit_has_the_gpu_it_asks_for_and_says_so_if_it_finds_none(runs):
    assert runs.gpu.returncode != 0
    assert "the job was given 1 GPU (resource gpu), but JAX" in runs.gpu.stderr
    asked = [job for job in runs.jobs if "TresPerJob" in job]
    # SLURM writes gres:gpu:1 or, later, gres/gpu:1.
    assert [(job["TresPerJob"].replace("/", ":"), job["Partition"], job["JobState"]) for job in asked] == [
        ("gres:gpu:1", "gpu", "FAILED")
    ]
