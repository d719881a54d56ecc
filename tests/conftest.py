"""Compiling takes most of the time of the tests: here with little effort, and once a run. And the x64 switch."""

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("thorough", max_examples=250)  # by default 100; see test_fuzz.py

# LLVM does not optimise, and fusions are written in one piece by the emitters that compile fast: a quarter of the time
# to compile, programs that run slower and round in other places. The tolerances of all tests hold with and without;
# XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true" runs them as users compile.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
STOCK = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


def known(flags: str) -> bool:
    """Whether this jaxlib knows the flags: it ends the process otherwise."""
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    probe = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(probe, env=environment, capture_output=True, check=False).returncode == 0


# jax reads these when it is imported, hence no jax up here. Workers of pytest-xdist and subprocesses inherit them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    if known(QUICK):  # what is set already comes later and wins
        os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # of this run: workers, subprocesses and resumed runs share it
        _cache = tempfile.TemporaryDirectory(prefix="syncgap-tests-", ignore_cleanup_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


LONGEST_FIRST = ("tests", "experiments", "dit_jax", "ou_theory")  # a long file must not begin last, alone on one worker


def pytest_collection_modifyitems(items):
    folders = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: folders.get(item.path.parent.name, len(folders)))


@pytest.fixture(scope="session")
def stock_compiler():
    """Options of jax.jit for programs as users compile them: for tests that hang on the last place, and for programs
    that run for longer than they are compiled."""
    return STOCK if QUICK in os.environ.get("XLA_FLAGS", "") else None


@pytest.fixture
def x64():
    """Double precision for one test."""
    import jax

    with jax.enable_x64(True):
        yield


MUCH = 3e9  # bytes of memory above which a worker lets go of what it has compiled, of which it would gather more


def memory() -> float:
    """Bytes that this process holds; infinite where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return math.inf


@pytest.fixture(scope="module", autouse=True)
def _programs_of_many_files():
    """Files share what is compiled as long as there is room for it."""
    yield
    if "jax" in sys.modules and memory() > MUCH:
        import jax

        jax.clear_caches()
