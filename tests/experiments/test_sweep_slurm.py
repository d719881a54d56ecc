"""Sweeps on Slurm: what is submitted, what Slurm's answers mean, and that arrays give the bits of one process."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_jax.lock import held, last_owner
from experiments import cli
from experiments.sweeps import slurm
from experiments.sweeps.cost import costs, parts
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.plan import Plan, PlanError
from experiments.sweeps.slurm import Task, executor_for, minutes
from experiments.sweeps.worker import work

submitit = pytest.importorskip("submitit")
DelayedSubmission = submitit.helpers.DelayedSubmission
SETTINGS = {"pairs": 2, "steps": 4, "block": 1, "couplings": [0, 1], "gain_pairs": 2, "untrained_pairs": 2}
LIMIT_S = 900  # for a job; a machine may be busy


def plan(weights, cells=2) -> Plan:
    return Plan("compare", settings={"weights": weights, **SETTINGS}, axes={"seed": list(range(cells))})


def line(weights, out, *more, cells=2) -> list[str]:
    values = {name: " ".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in SETTINGS.items()}
    given = [f"{name}={value}" for name, value in {"weights": weights, **values}.items()]
    seeds = "seed=" + ",".join(map(str, range(cells)))
    return ["sweep", "--study", "compare", "--set", *given, seeds, "--out", str(out), *more]


class FakeSlurm:
    """Slurm's commands, which note how they are called and say what they are told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("srun", "sbatch", "squeue", "sacct", "scancel"):
            self.says(name, "")
        self.says("sbatch", "Submitted batch job 42")

    def says(self, name, text, code=0, error="") -> None:
        script = f"#!/bin/sh\necho $0 $* >> {self.folder}/calls\ncat << 'END'\n{text}\nEND\n"
        script += f"echo '{error}' >&2\n" if error else ""
        (self.folder / name).write_text(script + f"exit {code}\n")
        (self.folder / name).chmod(0o755)

    def calls(self, name) -> list[str]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [line.split(maxsplit=1)[-1] for line in lines if line.split()[0].endswith(f"/{name}")]


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeSlurm:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return FakeSlurm(tmp_path / "bin")


def test_a_sweep_is_submitted_as_one_array(fake, weights, tmp_path, capsys):
    out = tmp_path / "sweep"
    options = ["partition=gpu", "time=2:30:00", "gpus-per-node=a100:2", "cpus_per_task=8", "setup=module load cuda"]
    assert cli.main(line(weights, out, "--slurm", *options, "sbatch.reservation=night", cells=5)) == 0
    script = (out / "logs" / "42_submission.sh").read_text().splitlines()
    asked = [
        "array=0-2%3",
        "partition=gpu",
        "time=150",
        "gpus-per-node=a100:2",
        "reservation=night",
        "job-name=syncgap-compare",
    ]
    assert {f"#SBATCH --{option}" for option in asked} <= set(script)
    assert {"#SBATCH --requeue", "module load cuda"} <= set(script)
    assert "--cpus-per-task=8" in script[-1]
    assert "wckey" not in "".join(script)
    said = capsys.readouterr().out
    assert "Slurm job 42: 3 tasks with 2 workers each" in said
    for word in ("status", "cancel"):
        assert f"syncgap sweep {word} {out}" in said
    (entry,) = json.loads((out / "slurm.json").read_text())["jobs"]
    assert (entry["job"], entry["tasks"], entry["workers"], entry["requeues"]) == ("42", 3, 2, slurm.REQUEUES)
    for i in range(3):
        found = pickle.loads((out / "logs" / f"42_{i}_submitted.pkl").read_bytes()).function
        assert found == Task(str(out.resolve()), i, 3, workers=2)


def test_tasks_are_as_many_as_cells_unless_fewer_are_asked_for(fake, weights, tmp_path):
    for tasks, array in ((None, "0-4%5"), ("2", "0-1%2"), ("9", "0-4%5")):
        out = tmp_path / f"sweep-{tasks}"
        more = [] if tasks is None else ["--tasks", tasks]
        assert cli.main(line(weights, out, "--slurm", "time=9", *more, cells=5)) == 0
        assert f"#SBATCH --array={array}" in (out / "logs" / "42_submission.sh").read_text()


def test_tasks_run_every_cell_once(weights, tmp_path, monkeypatch):
    """Over all tasks; with several workers in each, every worker sees one GPU."""
    folder = SweepFolder.create(tmp_path / "sweep", plan(weights, 7))
    asked = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")  # as Slurm sets it in a task
    monkeypatch.setattr(slurm, "gpus", lambda: 2)
    monkeypatch.setattr(slurm, "run_processes", lambda sweep, shares, **options: asked.append((shares, options)))
    for i in range(3):
        Task(str(folder.path), i, 3, workers=2)()
    assert all(options["devices"] == ["4", "7"] for _, options in asked)
    shares = {shard: cells for each, _ in asked for shard, cells in each.items()}
    assert sorted(shares) == [(i, 6) for i in range(6)]
    whole = parts(folder.cells, costs(folder.plan, folder.cells), 6)
    assert all(shares[shard] == whole[shard.index] for shard in shares)
    assert sorted(cell.name for cells in shares.values() for cell in cells) == [f"seed={i}" for i in range(7)]


def test_a_task_of_which_cells_failed_ends_with_an_exit_code(weights, tmp_path, monkeypatch):
    """While another task still has cells to run, too."""
    folder = SweepFolder.create(tmp_path / "sweep", plan(weights))
    folder.note_failure(folder.cells[0], "no memory")
    monkeypatch.setattr(slurm, "run_processes", lambda *args, **options: None)
    tasks = [DelayedSubmission(Task(str(folder.path), i, 2)) for i in range(2)]
    with pytest.raises(SystemExit) as end:
        tasks[0].result()
    assert end.value.code == 1
    assert tasks[1].result() is None


def test_a_task_goes_back_into_the_queue_as_often_as_it_may():
    task = Task("/sweep", 1, 2, requeues=1)
    again = task.checkpoint()
    assert again.function == Task("/sweep", 1, 2, requeues=0)
    with pytest.raises(SystemExit, match="as often as it may"):
        again.function.checkpoint()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["partition"], "'partition' is not of the form KEY=VALUE"),
        (["time=1", "time=2"], "time twice"),
        (["time=1", "partitoin=gpu"], "no option partitoin; it has account, "),
        (["time=1", "nodes=2"], "no option nodes"),
        (["partition=gpu"], "time=MINUTES"),
        (["time=soon"], "time must be minutes"),
        (["time=1", "requeues=-1"], "requeues must be a whole number"),
        (["time=1", "gpus_per_node=all"], "gpus_per_node must be a number"),
    ],
)
def test_options_that_mean_nothing_are_refused(fake, weights, tmp_path, capsys, options, said):
    assert cli.main(line(weights, tmp_path / "sweep", "--slurm", *options)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
    assert not (fake.folder / "calls").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("2:00:00", 120), ("0:0:1", 1), ("1-0", 1440), ("1-2:30", 1590), ("1-2:30:01", 1591)],
)
def test_time_limits_are_read_as_slurm_writes_them(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["0", "1:2:3:4", "-1", "1h", "1-", "0:0"])
def test_other_time_limits_are_refused(text):
    with pytest.raises(PlanError, match="time must be"):
        minutes(text)


def test_without_submitit_or_slurm_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlanError, match="has no Slurm"):
        executor_for("x", tmp_path, ["time=1"])
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(PlanError, match=r"pip install 'syncgap\[slurm\]'"):
        executor_for("x", tmp_path, ["time=1"])


def test_what_slurm_refuses_is_said(fake, weights, tmp_path, capsys):
    fake.says("sbatch", "", 1, "sbatch: error: invalid partition specified: gpu")
    out = tmp_path / "sweep"
    assert cli.main(line(weights, out, "--slurm", "time=1", "partition=gpu")) == 2
    assert "Slurm does not take the job (sbatch: error: invalid partition specified: gpu)" in capsys.readouterr().err
    assert not (out / "slurm.json").exists()
    fake.says("sbatch", "Submitted batch job 43")
    assert cli.main(line(weights, out, "--slurm", "time=1", "--resume")) == 0


def test_status_cancel_and_a_second_submission(fake, weights, tmp_path, capsys):
    out = tmp_path / "sweep"
    assert cli.main(line(weights, out, "--slurm", "time=1", cells=3)) == 0
    fake.says("sacct", "42_0|COMPLETED\n42_1|CANCELLED by 0\n42_1.batch|CANCELLED")
    fake.says("squeue", "42_1|RUNNING")  # requeued since
    capsys.readouterr()
    assert cli.main(["sweep", "status", str(out)]) == 0
    said = capsys.readouterr().out
    assert "3 open" in said
    assert "Slurm job 42: 1 COMPLETED, 1 RUNNING, 1 ended" in said
    assert cli.main(line(weights, out, "--slurm", "time=1", "--resume", cells=3)) == 2
    assert "already being run by job 42" in capsys.readouterr().err
    assert cli.main(["sweep", "cancel", str(out)]) == 0
    assert "cancelled Slurm job 42" in capsys.readouterr().out
    assert fake.calls("scancel") == ["42"]
    fake.says("squeue", "42_1|CANCELLED")
    assert cli.main(["sweep", "cancel", str(out)]) == 2
    assert "no job of Slurm" in capsys.readouterr().err
    fake.says("sbatch", "Submitted batch job 43")
    assert cli.main(line(weights, out, "--slurm", "time=1", "--resume", cells=3)) == 0
    assert [entry["job"] for entry in json.loads((out / "slurm.json").read_text())["jobs"]] == ["42", "43"]


def test_one_task_is_no_array(fake, weights, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    assert cli.main(line(weights, out, "--slurm", "time=1", "--tasks", "1")) == 0
    assert "--array" not in (out / "logs" / "42_submission.sh").read_text()
    fake.says("squeue", "42|PENDING")
    assert slurm.status(out) == ["Slurm job 42: 1 PENDING"]
    assert slurm.active(out) == ["42"]
    monkeypatch.setenv("PATH", str(tmp_path))  # where Slurm is not
    assert slurm.status(out) == ["Slurm job 42: 1 unknown; Slurm does not answer here (squeue)"]


def test_a_job_of_which_slurm_says_nothing_may_be_running(fake, weights, tmp_path, capsys):
    out, again = tmp_path / "sweep", ("--slurm", "time=1", "--resume")
    assert cli.main(line(weights, out, "--slurm", "time=1")) == 0
    fake.says("sacct", "42_0|COMPLETED")  # all that is known
    fake.says("squeue", "", 1, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    assert slurm.status(out) == ["Slurm job 42: 1 COMPLETED, 1 unknown; Slurm does not answer here (squeue)"]
    for words in (line(weights, out, *again), ["sweep", "cancel", str(out)]):
        assert cli.main(words) == 2
        assert f"job 42 may be running {out}: Slurm does not answer" in capsys.readouterr().err
    assert len(fake.calls("sbatch")) == 1
    fake.says("squeue", "", 1, "slurm_load_jobs error: Invalid job id specified")  # it has ended and is forgotten
    assert slurm.status(out) == ["Slurm job 42: 1 COMPLETED, 1 ended"]
    assert cli.main(line(weights, out, *again)) == 0
    fake.says("squeue", "", 1, "timed out")
    (out / "slurm.json").unlink()
    assert cli.main(line(weights, out, *again)) == 0  # as asked
    assert len(fake.calls("sbatch")) == 3


def test_of_two_submissions_at_a_time_one_is_refused(fake, weights, tmp_path, capsys):
    out = tmp_path / "sweep"
    with held(out):  # as the other does
        assert cli.main(line(weights, out, "--slurm", "time=1")) == 2
    assert "is being written by process" in capsys.readouterr().err
    assert not out.exists()
    assert not (fake.folder / "calls").exists()


@pytest.fixture(scope="module")
def alone(weights, tmp_path_factory) -> SweepFolder:
    """The same sweep by one process."""
    folder = SweepFolder.create(tmp_path_factory.mktemp("alone") / "sweep", plan(weights))
    assert len(work(folder, folder.cells).done) == 2
    return folder


def digests(folder: SweepFolder) -> dict:
    """Of all arrays of all cells."""
    return {cell.name: json.loads((folder.run(cell) / "manifest.json").read_text())["digests"] for cell in folder.cells}


def until(condition, what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def begun(folder: SweepFolder) -> int | None:
    """The process that is at a cell with a finished block, if there is one."""
    for cell in folder.cells:
        manifest = folder.run(cell) / "manifest.json"
        if (
            manifest.exists()
            and any(json.loads(manifest.read_text())["blocks"].values())
            and not folder.is_complete(cell)
        ):
            return last_owner(folder.run(cell))
    return None


def assert_whole(folder: SweepFolder, alone: SweepFolder) -> None:
    assert folder.states() == {"complete": 2}
    assert digests(folder) == digests(alone)
    done = [row.split()[2] for row in (folder.path / "sweep.log").read_text().splitlines() if row.split()[1] == "done"]
    assert sorted(done) == ["seed=0", "seed=1"]
    assert (folder.path / "result.zarr").is_dir()
    assert (folder.path / "report.html").is_file()


@pytest.mark.long
def test_a_task_that_is_killed_goes_on_when_it_is_submitted_again(weights, alone, tmp_path):
    """With submitit's executor of this machine. First the worker is killed, which its task starts again, then all."""
    folder = SweepFolder.create(tmp_path / "sweep", plan(weights))
    executor = submitit.LocalExecutor(folder.path / "logs")
    executor.update_parameters(timeout_min=60)
    slurm.submit(folder, executor, 1)
    until(lambda: begun(folder), "no cell was begun")
    first = begun(folder)
    os.kill(first, signal.SIGKILL)
    until(lambda: begun(folder) not in (None, first), "the worker was not started again")
    second = begun(folder)
    task = int(Path(f"/proc/{second}/stat").read_text().rpartition(")")[2].split()[1])
    for process in (task, second):
        os.kill(process, signal.SIGKILL)
    until(lambda: not folder.states()["running"], "the worker is still there")
    assert folder.states()["complete"] < 2
    slurm.submit(folder, executor, 1)
    until(lambda: (folder.path / "report.html").exists(), "the sweep was not finished")
    assert_whole(folder, alone)
    starts = (folder.path / "logs" / "worker-0.log").read_text().splitlines()
    starts = [json.loads(row) for row in starts if row.startswith('{"started"')]
    assert len(starts) == 3
    assert all({"host", "device", "versions", "variables"} <= set(start) for start in starts)


def missing(reason) -> None:
    """Skips, or fails where Slurm is required."""
    if os.environ.get("SYNCGAP_REQUIRE_SLURM") == "1":
        pytest.fail(f"SYNCGAP_REQUIRE_SLURM is set, but {reason}", pytrace=False)
    pytest.skip(f"sweeps are tested on Slurm, and {reason}")


@pytest.fixture(scope="module")
def cluster() -> None:
    if shutil.which("sbatch") is None:
        missing("sbatch is not installed")
    try:
        tried = subprocess.run(["srun", "--quiet", "true"], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        missing("no job runs within a minute")
    else:
        if tried.returncode:
            missing(f"no job runs: {tried.stderr.strip()}")


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_on_slurm_tasks_are_requeued_cancelled_and_go_on(weights, alone, tmp_path, capsys):
    out = tmp_path / "sweep"
    options = ("--slurm", "time=30", "--tasks", "2")
    assert cli.main(line(weights, out, *options)) == 0
    folder = SweepFolder.open(out)
    (job,) = slurm.active(out)
    until(lambda: folder.states()["running"] == 2, "both tasks were to run")
    until(lambda: begun(folder), "no cell was begun")
    subprocess.run(["scancel", "--signal=USR2", f"{job}_0"], check=True)  # as at its time limit
    subprocess.run(["scancel", f"{job}_1"], check=True)
    capsys.readouterr()
    assert cli.main(line(weights, out, *options, "--resume")) == 2  # the first task is still there
    assert f"already being run by job {job}" in capsys.readouterr().err
    until(lambda: not slurm.active(out), "the job did not end")
    states = slurm._states({"job": job, "tasks": 2})
    assert states.pop("COMPLETED") == 1
    assert set(states) <= {"CANCELLED", "ended"}  # Slurm forgets after minutes what became of a job
    assert folder.states()["complete"] == 1
    log = (out / "logs" / "worker-0.log").read_text()
    assert '"SLURM_RESTART_COUNT": "1"' in log
    assert cli.main(line(weights, out, *options, "--resume")) == 0
    until(lambda: not slurm.active(out), "the second job did not end")
    assert_whole(folder, alone)
