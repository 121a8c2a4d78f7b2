"""What a conversion really takes: peak resident memory of its process."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import T5, t5x_checkpoint

MIB = 1 << 20
PEAK = """
import sys
from converter.cli import main
try:
    main(sys.argv[1:], standalone_mode=False)
finally:
    lines = open("/proc/self/status").read().splitlines()
    print("peak", *(line.split()[1] for line in lines if line.startswith("VmHWM")), file=sys.stderr)
"""
# the embedding has 32 MiB, [16384, 512] float32, and everything else as much again
LARGE = T5(16384, 512, 64, 2048, 8, num_layers=1, num_decoder_layers=1)


def peak(pair: str, source: Path, destination: Path, *options: str) -> int:
    """Bytes."""
    arguments = [pair, source, destination, "--model", "ul2", "--quiet", "-j", "2", *options]
    run = subprocess.run([sys.executable, "-c", PEAK, *map(str, arguments)], capture_output=True, text=True, check=True)
    return int(run.stderr.split("peak ")[1].split()[0]) << 10


@pytest.fixture(scope="module", params=[True, False], ids=["gzip", "raw"])
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small and a large one, packed or not."""
    base, packed = tmp_path_factory.mktemp("sources"), request.param
    small = t5x_checkpoint(base / "small", gzip=packed)
    return small, t5x_checkpoint(base / "large", LARGE, gzip=packed, chunk=2048)


@pytest.mark.parametrize("pair", ["jax-to-ft", "jax-to-trtllm"])
def test_peak_memory_stays_within_the_budget(pair: str, sources: tuple[Path, Path], tmp_path: Path) -> None:
    """64 MiB of weights, half of them one matrix, within 1.25 times 16 MiB. Chunks have 4 MiB."""
    small, large = sources
    own = peak(pair, small, tmp_path / "a")
    for ranks in ("1", "8"):
        taken = peak(pair, large, tmp_path / ranks, "-t", ranks, "--memory-budget", "16MiB") - own
        assert taken <= 1.25 * 16 * MIB, f"{taken / MIB:.1f} MiB"
