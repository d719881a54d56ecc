"""``python -m experiments`` is `syncgap`."""

import sys

from experiments.cli import main

sys.exit(main())
