"""The page of a sweep: its cells and their verdicts, every claim over the axes, repeats, and what failed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import xarray as xr

from dit_jax.disk import writing
from dit_jax.lock import held
from experiments.frame.drawing import draw_figures
from experiments.frame.files import write_text
from experiments.frame.page import NOTHING, embedded, formatted, templates
from experiments.sweeps.export import require_parquet, write_csv, write_parquet
from experiments.sweeps.figures import sweep_figures
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.layout import Layout, level_of, measure_of, named, spelled, tested
from experiments.sweeps.repeats import repeats_of, repeats_table
from experiments.sweeps.result import NAME, open_sweep, write_result

PAGE, CSV = "report.html", "claims.csv"


def report_sweep(folder: Path, *, csv: Path | None = None, parquet: Path | None = None) -> Path:
    """Makes the result and the page of a sweep again, from its cells, and returns the path of ``report.html``.

    Args:
      csv, parquet: files to export the table of claims to.

    Raises:
      StoreError: there is no sweep.
      CheckpointError: the disk refuses, or another process is writing the result.
      ValueError: a Parquet file is asked for without pyarrow.
    """
    if parquet is not None:
        require_parquet()
    sweep = SweepFolder.open(folder)
    with held(folder / NAME):
        write_result(sweep)
        result = open_sweep(folder)
        page = write_sweep_page(sweep, result)
    for path, write in ((csv, write_csv), (parquet, write_parquet)):
        if path is not None:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write(result, path)
    return page


def write_sweep_page(sweep: SweepFolder, result: xr.Dataset | None = None) -> Path:
    """Writes ``report.html`` of a sweep, its figures and ``claims.csv``, and returns the path of the page. The page
    loads nothing from elsewhere; it links to the pages of the cells.

    Args:
      result: of the sweep; that of `open_sweep` by default.
    """
    result = open_sweep(sweep.path) if result is None else result
    repeats = repeats_of(sweep, result)
    layout = Layout.of(result, repeats.axis if repeats is not None and len(repeats.groups) == 1 else None)
    figures = sweep_figures(result, layout)
    draw_figures(sweep.path / "figures", {name: draw for name, (_, draw) in figures.items()})
    write_csv(result, sweep.path / CSV)
    shown, table = tested(result), None if repeats is None else repeats_table(result, layout, repeats)
    page = templates(Path(__file__).parent / "templates").get_template("sweep.html")
    text = page.render(
        title=sweep.plan.title or f"A sweep of {sweep.plan.study}",
        question=sweep.plan.question,
        study=sweep.plan.study,
        completeness=result.attrs["completeness"],
        failed=result.attrs["failed"],
        missing=result.attrs["missing"],
        csv=CSV,
        claims=list(_claims(result)),
        figures=[
            {"name": name, "caption": caption, "source": embedded(sweep.path / "figures" / f"{name}.svg")}
            for name, (caption, _) in figures.items()
        ],
        tables=[table] if table is not None and table.rows else [],
        axes=[named(dim) for dim in layout.dims],
        shown=[str(result.claim.values[claim]) for claim in shown],
        cells=list(_cells(sweep, result, shown)),
        errors=list(_errors(result)),
        left_out=json.loads(result.attrs["left_out"]),
        command=sweep.entries.get("command", ""),
        facts=_facts(sweep, result),
    )
    return write_text(sweep.path / PAGE, text)


def _claims(result: xr.Dataset) -> Iterator[dict[str, Any]]:
    """The claims and what they measure."""
    there = tested(result)
    for index in range(result.sizes["claim"]):
        number = int(np.nanmax(result.claim_id.isel(claim=index).values))
        yield {
            "id": number or "",
            "title": str(result.claim.values[index]),
            "measure": measure_of(result, index),
            "level": f"{100 * level_of(result, index):.3g} %",
            "tested": index in there,
        }


def _cells(sweep: SweepFolder, result: xr.Dataset, shown: list[int]) -> Iterator[dict[str, Any]]:
    """Every cell as the page shows it, in the order of the plan."""
    dims = result.status.dims
    status, run = result.status.values, result.run.values
    values, verdicts = result.claim_value.transpose(*dims, "claim", "bound").values, result.verdict.values
    words = {dim: [spelled(result, str(dim), index, whole=True) for index in range(result.sizes[dim])] for dim in dims}
    for place, cell in zip(np.ndindex(*status.shape), sweep.cells, strict=True):
        done = (sweep.path / str(run[place]) / PAGE).is_file()
        claims = []
        for claim in shown:
            verdict = str(verdicts[place][claim])
            value = formatted(values[place][claim]) if verdict not in ("", "not tested") else NOTHING
            claims.append((value, verdict, verdict.replace(" ", "-")))
        yield {
            "name": cell.name,
            "href": quote(f"{run[place]}/{PAGE}") if done else "",
            "place": [words[dim][index] for dim, index in zip(dims, place, strict=True)],
            "status": str(status[place]),
            "claims": claims,
        }


def _errors(result: xr.Dataset) -> Iterator[tuple[str, str]]:
    """The cells that failed, and why."""
    failed = result.status.values == "failed"
    yield from zip(result.cell.values[failed].tolist(), result.error.values[failed].tolist(), strict=True)


def _facts(sweep: SweepFolder, result: xr.Dataset) -> list[tuple[str, str]]:
    """Settings that all cells share, and what the sweep was run with."""
    settings = json.loads(result.attrs["settings"])
    lines = [(named(name), ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for name, v in settings.items()]
    versions = ", ".join(f"{name} {v}" for name, v in sweep.entries.get("versions", {}).items() if v)
    lines += [("packages", versions)] if versions else []
    about = {"git_revision": "git revision", "python": "Python", "device": "device", "started": "started"}
    lines += [(words, str(sweep.entries[name])) for name, words in about.items() if sweep.entries.get(name)]
    seconds = sum(float(np.nansum(result[f"{part}_seconds"].values)) for part in ("measuring", "analysis"))
    return [*lines, ("time of all cells", f"{seconds / 60:.1f} min")]
