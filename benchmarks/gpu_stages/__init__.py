"""The stages of ``benchmarks/gpu.py``: each has ``run(box)``, which writes rows, and ``table(rows)``, to show them."""
