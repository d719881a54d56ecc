"""The study of the data's spectrum as one object."""

from experiments.frame.study import Study
from experiments.studies.spectrum.analysis import DEFINITIONS, analyse
from experiments.studies.spectrum.family import together
from experiments.studies.spectrum.measure import check, measure
from experiments.studies.spectrum.page import page
from experiments.studies.spectrum.settings import SpectrumConfig

STUDY = Study("spectrum", SpectrumConfig, measure, page, analyse, DEFINITIONS, check, together, any_network=True)
