"""The result of a sweep as one table: a row for every cell and claim."""

from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import xarray as xr

from experiments.frame.files import replacing_file
from experiments.sweeps.plan import POINT
from experiments.sweeps.result import BOUNDS

OF_CELL = ("cell", "status", "error", "run", "measuring_seconds", "analysis_seconds")


def claims_table(result: xr.Dataset) -> pd.DataFrame:
    """The claims of a sweep, in the order of its cells: name of the cell, a column for every axis and every setting of
    the listed points, status, error, run, seconds; then number and title of the claim, what is measured, its estimate
    with the ends of its interval (low, high) and their level, and the verdict. Cells without results have their rows
    without numbers.

    Args:
      result: as `experiments.open_sweep` gives it.
    """
    dims = result.cell.dims
    settings = [*map(str, dims), *(str(name) for name, v in result.coords.items() if v.dims == (POINT,) != (name,))]
    columns = {name: result[name].variable for name in (*OF_CELL, *settings)}
    if result.sizes["claim"]:
        own = {"claim_id": "claim_id", "claim": "claim", "measure": "claim_measure", "level": "claim_level"}
        columns |= {name: result[variable].variable for name, variable in own.items()}
        columns |= {bound: result.claim_value.sel(bound=bound).variable for bound in BOUNDS}
        columns["verdict"] = result.verdict.variable
        dims = (*dims, "claim")
    order = ["cell", *settings, *OF_CELL[1:], "claim_id", "claim", "measure", *BOUNDS, "level", "verdict"]
    shape = [result.sizes[dim] for dim in dims]
    flat = {
        name: variable.set_dims(dict(zip(dims, shape, strict=True))).transpose(*dims).values.ravel()
        for name, variable in columns.items()
    }
    return pd.DataFrame({name: flat[name] for name in order if name in flat})


def write_csv(result: xr.Dataset, path: Path) -> Path:
    """Writes `claims_table` as comma-separated values with a line of names, in UTF-8, and returns the path. What is not
    there is empty."""
    with replacing_file(path) as partial:
        claims_table(result).to_csv(partial, index=False)
    return path


def write_parquet(result: xr.Dataset, path: Path) -> Path:
    """Writes `claims_table` as a Parquet file and returns its path.

    Raises:
      ValueError: pyarrow is not installed.
    """
    require_parquet()
    with replacing_file(path) as partial:
        claims_table(result).to_parquet(partial, index=False, engine="pyarrow")
    return path


def require_parquet() -> None:
    """Raises ValueError, which names the extra to install, where Parquet files cannot be written."""
    if find_spec("pyarrow") is None:
        raise ValueError('Parquet files need pyarrow; pip install "syncgap[parquet]", or export with --csv')
