"""What NVIDIA's converters and T5X's own network gave for the same weights."""

from __future__ import annotations

import configparser
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, t5x_difference

from converter.convert import Request, convert, prepare
from converter.families.base import boolean
from converter.formats import fastertransformer

EXPECTED = json.loads((ROOT / "tests" / "golden" / "fastertransformer.json").read_text())
CASES = [(case, tp) for case, expected in EXPECTED.items() for tp in expected["sha256"]]
PRESETS = {
    "t5x_ul2_gzip": "ul2",
    "t5x_untied_asym_raw": "flan-t5",
    "t5x_t5_1_1_networkgin": "t5-v1.1",
    "hf_t5_v10_relu": "t5",
    "hf_flan_t5_gelu_untied": "flan-t5",
    "hf_gpt2": "gpt2",
    "hf_bloom": "bloom",
    "hf_opt_pre": "opt",
    "hf_gptneox_dolly": "gptneox",
    "hf_gptj": "gptj",
}


def value(text: str) -> str | float:
    """What the C++ takes a text of config.ini for: `true` is 1, 1e-5 is 1e-05."""
    try:
        return float(boolean(text))
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


@pytest.mark.parametrize(("case", "tp"), CASES)
def test_every_file_equals_nvidias(golden: Callable[[str], Path], tmp_path: Path, case: str, tp: str) -> None:
    dtype, ranks = ("fp16" if tp.startswith("fp16_") else "fp32"), int(tp.split("tp")[-1])
    pair = ("hf" if case.startswith("hf_") else "jax", "ft")
    request = Request(str(golden(case)), str(tmp_path), PRESETS[case], pair, tensor_parallel=ranks, dtype=dtype)
    convert(prepare(replace(request, layout="weights")))
    weights = tmp_path / f"{ranks}-gpu"
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights.glob("*.bin")}
    assert found == EXPECTED[case]["sha256"][tp]

    ini = configparser.ConfigParser()
    ini.read(weights / "config.ini")
    for section, values in EXPECTED[case]["config"].items():
        values = {key: value(text) for key, text in values.items() if key != "weight_data_type"}
        assert {key: value(ini[section][key]) for key in values} == values, section
        if section != "structure":
            assert ini[section]["weight_data_type"] == dtype


@pytest.mark.parametrize("case", [case for case in PRESETS if case.startswith("hf_")])
def test_bfloat16_is_nvidias_float32_rounded_once(golden: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    for dtype in ("fp32", "bf16"):
        request = Request(str(golden(case)), str(tmp_path / dtype), PRESETS[case], ("hf", "ft"), dtype=dtype)
        convert(prepare(replace(request, layout="weights")))
    files = sorted((tmp_path / "fp32" / "1-gpu").glob("*.bin"))
    assert {path.name for path in files} == set(EXPECTED[case]["sha256"]["tp1"])
    # sums are made of what was rounded, see gptneox.py: here of float32, there of bfloat16
    for path in (path for path in files if not path.name.endswith(".bias.sum.bin")):
        bits = np.fromfile(path, np.uint32)
        # round half to even on the 16 bits that are dropped, in integers
        expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        assert (np.fromfile(tmp_path / "bf16" / "1-gpu" / path.name, np.uint16) == expected).all(), path.name


@pytest.mark.parametrize(("case", "model"), [("ul2_tied_legacy_f32", "ul2"), ("t5_1_1_untied_legacy_bf16", "t5-v1.1")])
@pytest.mark.parametrize("tp", [1, 2])
def test_weights_read_back_give_t5xs_logits(
    golden: Callable[[str], Path], tmp_path: Path, case: str, model: str, tp: int
) -> None:
    from model_repository.backends import reference

    source = golden(case)
    convert(prepare(Request(str(source), str(tmp_path), model, tensor_parallel=tp, layout="weights")))
    network = reference.load(fastertransformer.open(str(tmp_path / f"{tp}-gpu")))
    assert t5x_difference(network, source) < 1e-4
