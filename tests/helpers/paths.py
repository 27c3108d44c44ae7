"""Where the repository and the recorded files lie."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
