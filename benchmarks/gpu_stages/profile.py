"""Where the time of one XL/2 pair step goes: a profiler trace reduced to kinds of kernels, and the longest kernels."""

import re
import tempfile
from collections import defaultdict
from pathlib import Path

import jax

from gpu_stages.box import Box, markdown, random_model
from gpu_stages.fast import Case, ours

CALLS = 5
# first match wins; names as cuBLAS, cuDNN and XLA give them
KINDS = (
    ("attention", r"fmha|flash|cudnn.*(attn|sdpa)|sdpa"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|dot|matmul|xmma|sm90"),
    ("copies", r"memcpy|memset|copy|transpose|concatenate|pad|slice|broadcast|gather"),
    ("norms and reductions", r"reduce|softmax|rsqrt|norm"),
    ("elementwise", r"."),
)


def run(box: Box) -> None:
    for batch in (16,) if box.rehearse else (16, 64):
        if box.left() < 10:
            return
        model = random_model(box.config("DiT-XL/2"))
        step, _ = ours(model, Case("DiT-XL/2", batch))
        step()
        step()
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(CALLS):
                    step()
            (path,) = Path(folder).rglob("*.xplane.pb")
            kernels = kernel_times(path)
        total = sum(seconds for seconds, _ in kernels.values())
        for name, (seconds, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:25]:
            box.row(
                batch=batch,
                kernel=name[:120],
                kind=kind_of(name),
                ms=1e3 * seconds / CALLS,
                calls=count / CALLS,
                share=seconds / total,
            )
        kinds: dict[str, float] = defaultdict(float)
        for name, (seconds, _) in kernels.items():
            kinds[kind_of(name)] += seconds
        for kind, _ in KINDS:
            box.row(batch=batch, total_of=kind, ms=1e3 * kinds[kind] / CALLS, share=kinds[kind] / total)


def kernel_times(path: Path) -> dict[str, tuple[float, int]]:
    """Seconds and runs of every kernel in a trace: of the GPU's streams, or of the CPU where there is none."""
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    gpus = [plane for plane in planes if "GPU" in plane.name]
    for plane in gpus or [plane for plane in planes if "CPU" in plane.name]:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                seconds, count = found[event.name]
                found[event.name] = (seconds + event.duration_ns / 1e9, count + 1)
    return dict(found)


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE))


def table(rows: list[dict]) -> str:
    parts = []
    for batch in sorted({row["batch"] for row in rows}):
        here = [row for row in rows if row["batch"] == batch]
        kinds = [[row["total_of"], f"{row['ms']:.2f}", f"{row['share']:.0%}"] for row in here if "total_of" in row]
        parts.append(f"{batch} pairs\n\n" + markdown(["kind", "ms a step", "share"], kinds))
        longest = [
            [f"`{row['kernel'][:60]}`", row["kind"], f"{row['calls']:.0f}", f"{row['ms']:.2f}", f"{row['share']:.0%}"]
            for row in here
            if "kernel" in row
        ]
        parts.append(markdown(["kernel", "kind", "runs a step", "ms a step", "share"], longest[:12]))
    return "\n\n".join(parts)
