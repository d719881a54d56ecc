"""A study of numbers that follow from pair and step, for tests of what is stored, and a run of it made good."""

import json

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section
from experiments.frame.settings import StudyConfig
from experiments.frame.store import RunFolder
from experiments.frame.study import Study, run_study


class Counting:
    """A study whose measurements are numbers that follow from pair and step, and are counted."""

    def __init__(self):
        self.measured: list[list[int]] = []
        self.of_all: list[float] = []
        meaning = {
            "mean": ("mean over pairs", "nat"),
            "name": ("a name", "1"),
            "value": ("a value", "1"),
            "k": ("which", "1"),
        }
        self.study = Study("counting", StudyConfig, self.measure, self.page, self.analyse, meaning)

    def measure(self, bench):
        def block(pairs, labels):
            self.measured.append(list(pairs))
            return {"level": np.add.outer(pairs, np.arange(5.0)), "blank": np.full((len(pairs), 5), np.nan)}

        variables = {"level": (("step",), "a number", "nat"), "blank": (("step",), "nothing")}
        found = bench.measure("network", variables, {}, bench.config.pairs, block)
        mean = float(found.level.isel(step=0).mean())

        def beside(pairs, labels):
            self.of_all.extend(map(float, pairs))
            return {"level": np.full((len(pairs), 5), mean)}

        bench.measure("beside", {"level": variables["level"]}, {}, bench.config.pairs, beside, of_all=True)
        bench.whole("more", lambda: xr.Dataset({"name": ("k", ["one", "two"]), "value": ("k", [1.5, 2.5])}))

    @staticmethod
    def analyse(measured):
        assert measured.load("more").value.sum() == 4
        return xr.Dataset({"mean": measured.load("network").level.mean("pair")})

    @staticmethod
    def page(measured: Measured, analysis: xr.Dataset) -> Page:
        return Page(Section("Counting", "How many?", f"{float(analysis['mean'][0]):.2f}", captions={"one": "One."}),
                    {"one": lambda: Figure((1, 1))})  # fmt: skip


def settings(weights):
    return StudyConfig(weights=weights, pairs=5, block=2, steps="5")


def mended(weights, out, whole) -> list[list[int]]:
    """Resumes a run, checks that it is as good as new, and says which pairs were measured for that."""
    counting = Counting()
    run_study(counting.study, settings(weights), out, resume=True, progress=False)
    for group in ("network", "beside", "more", "analysis"):
        xr.testing.assert_identical(RunFolder.open(out).load(group), RunFolder.open(whole).load(group))
    assert RunFolder.open(out).manifest["status"] == "complete"
    return counting.measured


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
