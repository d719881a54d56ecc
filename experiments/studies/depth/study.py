"""The depth study as one object."""

from experiments.frame.study import Study
from experiments.studies.depth.analysis import DEFINITIONS, analyse
from experiments.studies.depth.family import together
from experiments.studies.depth.measure import measure
from experiments.studies.depth.page import page
from experiments.studies.depth.settings import DepthConfig

STUDY = Study("depth", DepthConfig, measure, page, analyse, DEFINITIONS, together=together)
