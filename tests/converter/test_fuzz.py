"""Random damage to a checkpoint: refused with one message, or harmless. Never a traceback, a hang or another result."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import ftconvert, refused, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

quick = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
damages = st.lists(
    st.tuples(
        st.integers(0, 10**6),  # which file
        st.sampled_from(["flip", "flip", "truncate", "empty", "delete", "garbage", "double", "rename", "swap"]),
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
        other = files[where % len(files)]
        if how == "rename":
            path.rename(path.with_name(f"{path.name}x"))
        elif how == "swap" and other.exists():
            path.write_bytes(other.read_bytes())
        if how == "delete":
            path.unlink()


@dataclass(frozen=True)
class Case:
    """A tiny source, the command that converts it, and what that gives.

    Attributes:
        damaged: the folder below `base` that is damaged; copied to `copy` for it.
        structure: names of the files with most structure, one in a hundred otherwise.
        sums: whether the stored numbers carry a checksum, so that harmless damage leaves the same result.
    """

    base: Path
    pair: str
    damaged: str
    options: tuple[str, ...]
    structure: str
    sums: bool

    def command(self, folder: Path, out: Path) -> tuple[object, ...]:
        if self.damaged == "adapter":
            return (self.pair, self.base / "source", out, *self.options, "--lora", folder)
        return (self.pair, folder, out, *self.options)


SIZES = tiny.T5(num_layers=1, num_decoder_layers=1)
KINDS = ("gzip", "raw", "stacked", "orbax", "safetensors", "shards", "torch", "torch-legacy", "adapter", "ft")


@pytest.fixture(scope="module", params=KINDS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, golden: Callable[[str], Path]
) -> Case:
    """Chunks in gzip carry a checksum; raw ones can only be of the right size, and what Orbax packs with zstd, too."""
    kind, base = request.param, tmp_path_factory.mktemp("fuzz")
    source, name = base / "source", ("--name", "tiny")
    jax = ("--model", "ul2", *name)
    t5x_files = r"checkpoint|config\.gin|\.zarray|_METADATA|manifest\.ocdbt"
    if kind in ("gzip", "raw"):
        in_index = ["encoder.encoder_norm.scale"] if kind == "raw" else []
        tiny.t5x_checkpoint(source, SIZES, gzip=kind == "gzip", in_index=in_index, chunk=13)
        return Case(base, "jax-to-ft", "source", jax, t5x_files, kind == "gzip")
    if kind == "stacked":
        tiny.write_t5x(source, tiny.umt5_arrays(SIZES))
        return Case(base, "jax-to-hf", "source", ("--model", "umt5", *name), t5x_files, True)
    if kind == "orbax":
        shutil.copytree(golden("ul2_tied_orbax_f32"), source, ignore=shutil.ignore_patterns("oracle.npz"))
        return Case(base, "jax-to-ft", "source", jax, t5x_files, False)
    tiny.t5x_checkpoint(base / "t5x", SIZES)
    if kind == "ft":
        assert ftconvert("jax-to-ft", base / "t5x", source, "--model", "ul2", "-t", 2).exit_code == 0
        return Case(base, "ft-to-ft", "source", name, r"config\.ini|manifest\.json|config\.pbtxt", False)
    assert ftconvert("jax-to-hf", base / "t5x", source, "--model", "ul2").exit_code == 0
    (source / "manifest.json").unlink()
    if kind.startswith("torch"):
        import torch
        from safetensors.torch import load_file

        weights = load_file(source / "model.safetensors")
        torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "torch")
        (source / "model.safetensors").unlink()
    if kind == "shards":
        import transformers

        model = transformers.T5ForConditionalGeneration.from_pretrained(source)
        model.save_pretrained(source, max_shard_size="3KB")
    if kind == "adapter":
        from safetensors.numpy import save_file

        random_numbers = np.random.default_rng(0)
        module = "base_model.model.encoder.block.0.layer.0.SelfAttention.q"
        inner = SIZES.num_heads * SIZES.d_kv
        (base / "adapter").mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none"}
        config |= {"alpha_pattern": {"encoder.*q": 8}, "layers_to_transform": None}
        config["target_modules"] = r".*encoder.*\.q"
        (base / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        pair = {"lora_A": (2, SIZES.d_model), "lora_B": (inner, 2)}
        arrays = {
            f"{module}.{key}.weight": random_numbers.standard_normal(shape).astype(np.float32)
            for key, shape in pair.items()
        }
        save_file(arrays, base / "adapter" / "adapter_model.safetensors")
        return Case(base, "hf-to-ft", "adapter", name, ".*", False)
    return Case(base, "hf-to-ft", "source", name, r"config\.json|.*\.index\.json|.*\.safetensors|.*\.bin", False)


@quick
@given(damages=damages, structure_first=st.booleans())
def test_damage_is_refused_or_harmless(
    case: Case, damages: list[tuple[int, str, int, int]], structure_first: bool
) -> None:
    expected = case.base / "expected"
    if not expected.exists():
        result = ftconvert(*case.command(case.base / case.damaged, expected))
        assert result.exit_code == 0, result.stderr
    copy, out = case.base / "copy", case.base / "copied"
    for folder in (copy, out):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(case.base / case.damaged, copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    if structure_first:
        files = [path for path in files if re.fullmatch(case.structure, path.name)]
    damage(files, damages)
    started = time.monotonic()
    result = ftconvert(*case.command(copy, out))
    assert time.monotonic() - started < 5
    if result.exit_code == 0:
        written, right = tree(out), tree(expected)
        assert written.keys() == right.keys()
        if case.sums and "swap" not in {how for _, how, _, _ in damages}:  # nothing in a chunk says whose it is
            differing = {name for name in right if written[name] != right[name]}
            assert {name.split("/")[-1] for name in differing} <= {"manifest.json", "config.pbtxt"}
    else:
        shutil.rmtree(out, ignore_errors=True)
        assert result.exit_code in (65, 66), result.stderr  # 66: what was deleted is not there
        refused(result.exit_code, *case.command(copy, out))
