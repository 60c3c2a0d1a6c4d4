"""Numbers kept from before: what the code computes stays what it was, on any processor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_whole_walks_give_the_committed_numbers() -> None:
    """In float64 to 1e-12. `benchmarks/golden.py` compares all else with another revision."""
    script = ROOT / "benchmarks" / "golden.py"
    said = subprocess.run(
        [sys.executable, script, "check", "--committed"], capture_output=True, text=True
    )
    assert said.returncode == 0, said.stdout + said.stderr
