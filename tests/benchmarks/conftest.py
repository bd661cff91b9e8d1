import sys
from pathlib import Path

# A benchmark is a script beside its modules, and not a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "quality"))
