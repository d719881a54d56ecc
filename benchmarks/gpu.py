"""Everything that a GPU is wanted for, in one command: ``python benchmarks/gpu.py OUT --minutes 9``.

Stages run in order of worth, each in a process of its own with a time budget, and each writes its rows to the folder
OUT as it goes, so that nothing measured is lost if a later stage fails or time runs out. ``--rehearse`` runs the same
code at tiny sizes, on a CPU too. Where packages cannot be installed, ``--fill`` collects beforehand, on a machine that
can, what the other one lacks.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import gpu_carry

HERE = Path(__file__).parent
# name -> share of the time, in the order in which they run; the last takes what is left
STAGES = {"here": 0.05, "right": 0.2, "fast": 0.24, "profile": 0.07, "ensembles": 0.06, "sweep": 0.2, "networks": 0.18}
START = 10.0  # seconds to start a stage: interpreter, imports, the GPU's context
FIRST, LAST = next(iter(STAGES)), list(STAGES)[-1]


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all stages together (default 9)")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="stages to run, in place of all")
    parser.add_argument("--networks", nargs="+", default=[], help="networks to train, by name, in place of all")
    parser.add_argument("--images", type=Path, default=gpu_carry.FOLDER / "images.zip", help="training images")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on any device; shows that everything runs")
    parser.add_argument("--fill", type=Path, metavar="IMAGES", help="collect wheels and these images (zip), then end")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # the driver calls itself for each stage
    parser.add_argument("--tables", action="store_true", help=argparse.SUPPRESS)  # ... and for the report
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args(args)
    if asked.minutes <= 0:
        parser.error("--minutes must be positive")
    return asked


def environment(out: Path) -> dict[str, str]:
    """Of the stages: this checkout and what was carried on the path, one cache of compiled programs, memory taken as
    it is needed, since two frameworks share the card."""
    path = [str(HERE.parent), *gpu_carry.site_folder(out), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str((out / "compiled").resolve())),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**os.environ, **own}


def run_stages(asked: argparse.Namespace) -> int:
    """Runs the stages that are asked for and gives the number that failed."""
    out: Path = asked.out
    out.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in STAGES if name in (asked.only or STAGES)]
    started, env, record = time.monotonic(), environment(out), {}
    for i, name in enumerate(wanted):
        left = 60 * asked.minutes - (time.monotonic() - started)
        budget = left * STAGES[name] / sum(STAGES[later] for later in wanted[i:])
        if budget < START and not asked.rehearse:
            record[name] = {"outcome": "no time left"}
            continue
        command = [sys.executable, __file__, str(out), "--stage", name, "--seconds", f"{budget - START:.1f}"]
        command += ["--images", str(asked.images), *(["--networks", *asked.networks] if asked.networks else [])]
        command += ["--rehearse"] if asked.rehearse else []
        print(f"== {name}: {budget:.0f} s", flush=True)
        began = time.monotonic()
        log = out / f"{name}.log"
        with log.open("w") as file:
            stage = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
            try:  # budgets are for the stages to keep; this limit is for one that hangs
                code = stage.wait(max(left if name == wanted[-1] else min(left, 1.6 * budget + 20), 20))
                outcome = "done" if code == 0 else f"failed with exit status {code}"
            except subprocess.TimeoutExpired:
                stage.kill()
                stage.wait()
                outcome = "stopped at its limit"
        record[name] = {"outcome": outcome, "seconds": round(time.monotonic() - began, 1)}
        (out / "stages.json").write_text(json.dumps(record, indent=1))
        print(log.read_text()[-6000:], end="", flush=True)
        print(f"== {name}: {outcome} after {record[name]['seconds']} s", flush=True)
    subprocess.run([sys.executable, __file__, str(out), "--tables"], env=env, check=True)
    return sum(entry["outcome"] != "done" for entry in record.values())


def report(out: Path) -> str:
    """The tables of all stages, as Markdown; from what the stages have written, so it can be made at any time."""
    record = json.loads((out / "stages.json").read_text())
    parts = ["# On a GPU\n"]
    for name in STAGES:
        rows = read_rows(out, name)
        if rows:
            parts.append(f"## {name}\n\n{import_module(f'gpu_stages.{name}').table(rows)}\n")
    said = "\n".join(f"- {name}: {entry['outcome']}, {entry.get('seconds', 0)} s" for name, entry in record.items())
    return "\n".join([*parts, f"## Stages\n\n{said}\n"])


def read_rows(out: Path, stage: str) -> list[dict]:
    """What a stage has written so far; a line cut short by a kill is left out."""
    path = out / f"{stage}.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def main(args: list[str] | None = None) -> int:
    asked = parse(args)
    if asked.fill:
        gpu_carry.fill(asked.fill)
        return 0
    if asked.tables:
        (asked.out / "report.md").write_text(report(asked.out))
        return 0
    if asked.stage is None:
        return run_stages(asked)
    from gpu_stages.box import Box  # imports JAX, which the driver does without

    box = Box(asked.out, asked.stage, asked.seconds, asked.rehearse, asked.images, tuple(asked.networks))
    import_module(f"gpu_stages.{asked.stage}").run(box)
    return 0


if __name__ == "__main__":
    sys.exit(main())
