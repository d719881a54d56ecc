"""The analytic model: when the modes of a diffusion commit, and what coupling does to that. Knows nothing of networks."""
