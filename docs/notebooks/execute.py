"""Executes the notebooks of this folder and stores their outputs: ``python docs/notebooks/execute.py [NAME ...]``.

Without names, all of them; with names such as ``1_one_mode``, these. Each runs from a clean kernel of the interpreter
that runs this script, whatever kernels are installed elsewhere, on the CPU and without the user's IPython profile. What
is stored is the same on every run: no times, no counters, no kernel's version; pictures as PNGs of few colours without
metadata. Needs the `test` extra. tests/test_notebooks.py runs the same code and compares.
"""

import base64
import io
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).resolve().parent
PATHS = sorted(FOLDER.glob("[0-9]_*.ipynb"))
COLOURS = 128  # of a stored picture; lines, shades and their smooth edges need no more
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


class _ThisInterpreter(AsyncKernelManager):
    """Starts a kernel of this very interpreter, not the one that a kernel's installed description points to."""

    profile: str = ""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher"]
        command += ["-f", "{connection_file}", "--log-level=ERROR"]
        environment = {
            "IPYTHONDIR": self.profile,
            "JAX_PLATFORMS": "cpu",
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "PYTHONHASHSEED": "0",
        }
        return KernelSpec(argv=command, env=environment, display_name="Python 3", language="python")


def run(notebook: NotebookNode) -> NotebookNode:
    """A copy of the notebook with the outputs of a clean kernel, as they are stored.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = nbformat.from_dict(notebook)
    with tempfile.TemporaryDirectory() as folder:
        manager = _ThisInterpreter()
        manager.profile = folder
        client = NotebookClient(notebook, km=manager, timeout=300, record_timing=False, coalesce_streams=True)
        client.execute()
    return strip(notebook)


def strip(notebook: NotebookNode) -> NotebookNode:
    """Takes out, in place, what changes from run to run and from machine to machine."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
            if "image/png" in output.get("data", {}):
                output.data = nbformat.from_dict({"image/png": _few_colours(output.data["image/png"])})
                output.metadata = nbformat.from_dict({})
    return notebook


def _few_colours(encoded: str) -> str:
    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    picture = picture.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode() + "\n"


def main(names: list[str]) -> None:
    unknown = set(names) - {path.stem for path in PATHS}
    if unknown:
        raise SystemExit(f"no notebook {', '.join(sorted(unknown))}; there are {', '.join(p.stem for p in PATHS)}")
    for path in PATHS:
        if not names or path.stem in names:
            nbformat.write(run(nbformat.read(path, 4)), path)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
