import sys
from pathlib import Path

# `tests.tiers.neighbour` is both a module of these tests and the program of the processes they start.
sys.path.insert(0, str(Path(__file__).parents[2]))
