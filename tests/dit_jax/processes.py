"""Python processes that run at the same time, as tests of several devices and several processes need them."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack

import pytest

TIMEOUT = 120


def run_together(commands: list[list[str]], devices: int) -> list[str]:
    """Standard output of processes that run at the same time; all are ended as soon as one fails or time is up."""
    # the forced count comes last: it wins over one that is set already
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    processes, outs, errors = [], [], []
    with ExitStack() as stack:
        for command in commands:
            # files, not pipes: nobody reads while they run
            out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            process = subprocess.Popen([sys.executable, *command], env=environment, stdout=out, stderr=err)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
            outs.append(out)
            errors.append(err)
        deadline = time.monotonic() + TIMEOUT
        codes = [process.poll() for process in processes]
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
        if any(code != 0 for code in codes):
            reports = [f"process {i}: {code}\n{_read(errors[i])}" for i, code in enumerate(codes)]
            pytest.fail(f"a process failed, or they took over {TIMEOUT} s (None: still running)\n" + "\n".join(reports))
        return [_read(out) for out in outs]


def _read(file) -> str:
    file.seek(0)
    return file.read()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
