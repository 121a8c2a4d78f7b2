"""Random damage to a checkpoint: refused with one message, or harmless. Never a traceback, a hang or another result."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
import tiny
from conftest import ftconvert, refused, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
damages = st.lists(
    st.tuples(
        st.integers(0, 10**6),  # which file
        st.sampled_from(["flip", "flip", "truncate", "empty", "delete", "garbage", "double"]),
        st.integers(0, 10**6),  # where in it
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=2,
)


def damage(files: list[Path], damages: list[tuple[int, str, int, int]]) -> None:
    for which, how, where, value in damages:
        path = files[which % len(files)]
        if not path.exists():
            continue
        data = bytearray(path.read_bytes())
        at = where % max(1, len(data))
        if how == "flip" and data:
            data[at] ^= value
        elif how == "truncate":
            data = data[:at]
        elif how == "empty":
            data = bytearray()
        elif how == "garbage":
            data[at : at + 16] = random.Random(where).randbytes(16)
        elif how == "double":
            data = data * 2
        path.write_bytes(data)
        if how == "delete":
            path.unlink()


@pytest.fixture(scope="module", params=["gzip", "raw"])
def pristine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tiny checkpoint and what it gives. Chunks in gzip carry a checksum; raw ones can only be of the right size."""
    base = tmp_path_factory.mktemp("fuzz")
    sizes = tiny.T5(num_layers=1, num_decoder_layers=1)
    in_index = ["encoder.encoder_norm.scale"] if request.param == "raw" else []
    tiny.t5x_checkpoint(base / "t5x", sizes, gzip=request.param == "gzip", in_index=in_index, chunk=13)
    assert ftconvert("jax-to-ft", base / "t5x", base / "out", "--model", "ul2").exit_code == 0
    return request.param, base


@quick
@given(damages=damages, index_first=st.booleans())
def test_damage_is_refused_or_harmless(
    pristine: tuple[str, Path], damages: list[tuple[int, str, int, int]], index_first: bool
) -> None:
    kind, base = pristine
    copy, out = base / "copy", base / "copied"
    for folder in (copy, out):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base / "t5x", copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    if index_first:  # one file among a hundred, and the one with most structure
        files = [path for path in files if path.name in ("checkpoint", "config.gin", ".zarray")]
    damage(files, damages)
    started = time.monotonic()
    result = ftconvert("jax-to-ft", copy, out, "--model", "ul2")
    assert time.monotonic() - started < 5
    if result.exit_code == 0:
        written, expected = tree(out / "ul2" / "1"), tree(base / "out" / "ul2" / "1")
        assert written.keys() == expected.keys()
        if kind == "gzip":
            del written["manifest.json"], expected["manifest.json"]
            assert written == expected
    else:
        shutil.rmtree(out, ignore_errors=True)
        refused(65, "jax-to-ft", copy, out, "--model", "ul2")
