"""The analytic model's ensembles at size: 10^6 paths of 64 modes through 1000 reverse steps, beside diffrax."""

from importlib import import_module

from gpu_stages.box import Box, markdown


def run(box: Box) -> None:
    ensembles = import_module("ensembles")  # the benchmark of that name, one folder up
    sizes = (
        {"paths": 500, "modes": 8, "steps": 20} if box.rehearse else {"paths": 1_000_000, "modes": 64, "steps": 1000}
    )
    settings = ensembles.Settings(**sizes, repeats=2, skip=(ensembles.LOOP,))
    for entry in ensembles.measure(settings):
        box.row(**entry, **sizes)


def table(rows: list[dict]) -> str:
    shown = [
        [
            row["case"],
            f"{row['seconds']:.2f}",
            f"{row['ns_per_mode_step']:.4f}",
            f"{row['compile_s']:.1f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['variance']:.3f}",
        ]
        for row in rows
    ]
    size = "{paths} paths, {modes} modes, {steps} steps\n\n".format(**rows[0])
    return size + markdown(["case", "seconds", "ns a mode and step", "compile s", "MB", "variance over exact"], shown)
