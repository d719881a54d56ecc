"""phi from several runs of `syncgap speciation` together: ``python benchmarks/pooled_speciation.py RUN RUN ...``

Runs of one seed share the noise of their trajectories: a pair is resampled with its namesakes in all runs of its seed.
Branches that only some runs have are averaged over these.
"""

import sys
from collections import defaultdict

import numpy as np

from experiments import open_run
from experiments.frame.draws import pair_draws
from experiments.studies.speciation.analysis import censored, crossing
from experiments.studies.speciation.settings import SURE


def pooled(runs: list, group: str, least: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-SNRs (S,) of the branches, and how many trajectories of each unit (U, S) end in the class of their clone, and
    how many there are. A unit is a pair's number under a seed.

    Args:
      least: probability that the classifier must give to the end of a trajectory to count it.
    """
    counts: dict = defaultdict(lambda: defaultdict(lambda: np.zeros(2)))
    for run in runs:
        data, seed = run[group], run.attrs["settings"]["seed"]
        kept = data.sure.values > least
        same = (data.end.values[:, None, :] == data.clone.values) & kept[:, None, :]
        for b, level in enumerate(data.branch_ell.values):
            for p, pair in enumerate(data.pair.values):
                counts[round(float(level), 6)][seed, int(pair)] += same[p, b].sum(), kept[p].sum()
    levels = np.array(sorted(counts))
    units = sorted({unit for each in counts.values() for unit in each})
    both = np.array([[counts[level][unit] for level in levels] for unit in units])
    return levels, both[..., 0], both[..., 1]


def main() -> None:
    runs = [open_run(path) for path in sys.argv[1:]]
    for group, least in (("network", 0.0), ("network", SURE), ("labelled", 0.0), ("untrained", 0.0)):
        levels, same, count = pooled(runs, group, least)
        weights = np.concatenate([np.ones((1, len(same))), pair_draws(0, len(same)) * len(same)])
        with np.errstate(invalid="ignore", divide="ignore"):
            phi = (weights @ same) / (weights @ count)
        print(f"{group}, classifier surer than {least:g}")
        for i, level in enumerate(levels):
            low, high = np.nanquantile(phi[1:, i], [0.025, 0.975])
            total = int(count[:, i].sum())
            print(f"  log-SNR {level:5.2f}  phi {phi[0, i]:.3f} [{low:.2f}, {high:.2f}]  {total} trajectories")
        at = crossing(phi, levels)
        point, low, high = censored(at)  # NaN where some draw has no trajectory at some level
        later, sooner = (100 * np.mean(at[1:] == side) for side in (np.inf, -np.inf))
        print(
            f"  phi passes 0.775 at {point:.2f} [{low:.2f}, {high:.2f}]; after the last level in {later:.1f} %, before "
            f"the first in {sooner:.1f} % of the draws"
        )
    right = [(run["labelled"].end.values == run["labelled"].label.values[:, None]).mean() for run in runs]
    print("labelled trajectories that end in their label's class:", np.round(right, 3))


if __name__ == "__main__":
    main()
