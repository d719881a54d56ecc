"""A sweep without a network: runs that hold parts of the synthetic analysis, a failed cell and a missing one."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import xarray as xr

from experiments.frame.store import RunFolder
from experiments.frame.verdict import Claim, finite
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.plan import Plan

KEPT = ["gap", "gap_interval", "relative_energy", "weak"]
PLAN = Plan(
    "compare",
    {"couplings": [0, 1]},
    {"steps": ["4", "6"], "seed": [0, 1]},
    [{"gate_kind": "joint"}, {"gate_kind": "blend", "guidance": 1.5}],
    title="What the <gate> does",
)
MISSING, FAILED = "gate_kind=joint,steps=6,seed=1", "gate_kind=blend,guidance=1.5,steps=4,seed=0"
ERROR = "ValueError: no <b> room"


def claims(value: float) -> list[Claim]:
    def claim(number, title, verdict, *values):
        return Claim(number, title, verdict, "nats", *values, "stated", [], 0.975)

    return [
        claim(1, "There is a gap", "holds", value, [value - 1, value + 1]),
        claim(0, "It is large, too", "undecided", None, None),
        claim(3, "It lies deep", "not tested", None, None),
    ]


def fill(path: Path, settings: dict[str, Any], analysis: xr.Dataset, value: float, **extra: Any) -> None:
    """A finished run whose first claim has this value."""
    run = RunFolder.create(path, settings, extra={"kind": "compare", **extra})
    run.put("analysis", analysis)
    run.write_json("claims.json", {"claims": [finite(asdict(claim)) for claim in claims(value)]})
    (path / "report.html").write_text("a page")
    run.note(measuring_s=2.5, analysis_s=1)
    run.finish()


def of_cell(analysis: xr.Dataset, index: int, steps: int) -> xr.Dataset:
    """The analysis of a cell, which differs from those of others."""
    own = analysis[KEPT].isel(step=slice(0, steps))
    return own.assign(gap=own.gap + index).assign_coords(ell=own.ell / steps)


def synthetic_sweep(path: Path, analysis: xr.Dataset) -> SweepFolder:
    """Eight cells of `PLAN`; claims of the i-th have the value i."""
    sweep = SweepFolder.create(path, PLAN, command="syncgap sweep 'a & b'")
    for index, cell in enumerate(sweep.cells):
        if cell.name == FAILED:
            sweep.note_failure(cell, ERROR)
        elif cell.name != MISSING:
            own = of_cell(analysis, index, int(cell.place["steps"]))
            fill(sweep.run(cell), {"steps": cell.settings.steps}, own, float(index))
    return sweep
