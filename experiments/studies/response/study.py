"""The response study as one object."""

from experiments.frame.study import Study
from experiments.studies.response.analysis import DEFINITIONS, analyse
from experiments.studies.response.measure import check, measure
from experiments.studies.response.page import page
from experiments.studies.response.settings import ResponseConfig

STUDY = Study("response", ResponseConfig, measure, page, analyse, DEFINITIONS, check)
