"""The project's main claim: the converted example answers as the trained model does, through the real commands."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT

SECONDS = 280  # the demo takes about 30


def test_the_demo_ends_with_t5xs_own_figures() -> None:
    """The demo's own verdict: within 0.1 points, 99 % of the predictions equal, no failed request."""
    demo = subprocess.Popen([sys.executable, ROOT / "examples" / "demo.py"], stdout=subprocess.PIPE, text=True)
    try:
        output, _ = demo.communicate(timeout=SECONDS)
    finally:
        demo.terminate()  # it stops its server; a killed one could not
        demo.wait()
    assert demo.returncode == 0, output
    for figure in ("37.774", "20.305", "35.309"):  # T5X's, examples/ul2-tiny/README.md; worked out anew by the demo
        assert figure in output
    assert "0 of 500" in output
    assert "FAILED" not in output
