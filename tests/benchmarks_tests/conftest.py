"""Makes the programs in `benchmarks/` importable; last in the path, lest their short names hide anything."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
