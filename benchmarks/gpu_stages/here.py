"""What is there: the card, the driver, the libraries, and the two ceilings that everything else is measured against."""

import importlib.metadata
import platform
import shutil
import subprocess

import jax
import jax.numpy as jnp

from gpu_stages.box import Box, markdown, median, seconds_of
from ou_theory.keys import random_key


def run(box: Box) -> None:
    card = "no nvidia-smi"
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        card = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    box.row(what="card", value=card)
    box.row(what="device", value=jax.devices()[0].device_kind)
    box.row(what="python", value=platform.python_version())
    for package in (
        "jax",
        "jaxlib",
        "flax",
        "torch",
        "triton",
        "nvidia-cudnn-cu13",
        "nvidia-cublas",
        "optax",
        "orbax-checkpoint",
        "zarr",
    ):
        try:
            box.row(what=package, value=importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            box.row(what=package, value="not installed")
    n = 256 if box.rehearse else 8192
    a, b = jax.random.normal(random_key(0), (2, n, n), jnp.bfloat16)  # random: zeros run faster than data do
    product = jax.jit(lambda a, b: a @ b)
    matmul(box, "jax", n, lambda: jax.block_until_ready(product(a, b)))
    x = jax.random.normal(random_key(1), (2**20 if box.rehearse else 2**30,), jnp.bfloat16)
    negate = jax.jit(lambda x: -x)
    times = seconds_of({"jax": lambda: jax.block_until_ready(negate(x))}, 2.0)["jax"]
    box.row(what="copy", by="jax", bytes_per_s=2 * x.nbytes / median(times), runs=len(times))
    try:
        import torch
    except ImportError:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ta, tb = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))

    def in_torch():
        _ = ta @ tb
        if device == "cuda":
            torch.cuda.synchronize()

    matmul(box, "torch", n, in_torch)


def matmul(box: Box, by: str, n: int, run) -> None:
    times = seconds_of({by: run}, 2.0)[by]
    box.row(what="matmul", by=by, size=n, flops=2 * n**3 / median(times), runs=len(times))


def table(rows: list[dict]) -> str:
    shown = []
    for row in rows:
        if row["what"] == "matmul":
            shown.append([f"bf16 matrix product of {row['size']}, {row['by']}", f"{row['flops'] / 1e12:.0f} TFLOP/s"])
        elif row["what"] == "copy":
            shown.append(["copy, bytes read and written", f"{row['bytes_per_s'] / 1e12:.2f} TB/s"])
        else:
            shown.append([row["what"], row["value"]])
    return markdown(["what", "found"], shown)
