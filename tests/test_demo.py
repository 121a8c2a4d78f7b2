"""The project's main claim: the converted example answers as the trained model does, through the real commands."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT


def test_the_demo_ends_with_t5xs_own_figures() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py"],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        env=None,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for figure in ("37.774", "20.305", "35.309", "100.0% of 500", "0 of 500"):  # examples/ul2-tiny/README.md
        assert figure in result.stdout, result.stdout
    assert "FAILED" not in result.stdout
