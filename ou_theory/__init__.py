"""The analytic model: when the modes of a diffusion commit, and what coupling does to that. No networks here."""
