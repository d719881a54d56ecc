"""Sweeps: one study over many settings, each cell of the grid an ordinary run."""
