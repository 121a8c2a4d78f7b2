"""What NVIDIA's own converters wrote for the same weights, and what T5X's own network computes with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, done, t5x_difference
from safetensors import safe_open

EXPECTED: dict[str, Any] = json.loads((ROOT / "tests" / "golden" / "tensorrt_llm.json").read_text())
CASES = (
    *("gpt2_even_vocab", "gptneox_small", "t5_v1_0_relu_tied", "ul2_gated_silu_untied"),
    *("llama_mha_odd_vocab", "mistral_gqa", "gemma2_gqa", "qwen2_tied"),
)
# The loader's own defaults, and how many values are quantised together: without weight-only layers nothing reads them.
IGNORED = ("runtime_defaults", "moe", "moe_intermediate_size", "moe_shared_expert_intermediate_size")
MAPPING = ("world_size", "tp_size", "pp_size")
QUANTIZATION = ("quant_algo", "kv_cache_quant_algo")


def tensors(file: Path) -> dict[str, list[Any]]:
    """Name -> [dtype, shape, start of the bytes' sha256], as the expected values are kept."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    return {
        name: [one["dtype"], one["shape"], hashlib.sha256(body[slice(*one["data_offsets"])]).hexdigest()[:16]]
        for name, one in header.items()
        if name != "__metadata__"
    }


def stated(config: dict[str, Any]) -> dict[str, Any]:
    """The values that the loader goes by."""
    values = {key: value for key, value in config.items() if key not in IGNORED}
    values["mapping"] = {key: config["mapping"][key] for key in MAPPING}
    values["quantization"] = {key: config["quantization"].get(key) for key in QUANTIZATION}
    return values


@pytest.mark.parametrize(("case", "variant"), [(case, variant) for case in CASES for variant in EXPECTED[case]])
def test_every_tensor_of_every_rank_equals_nvidias(
    golden: Callable[[str], Path], tmp_path: Path, case: str, variant: str
) -> None:
    expected = EXPECTED[case][variant]
    source = golden(f"trtllm_{case}")
    done("hf-to-trtllm", source, tmp_path / "out", *expected["options"], "--trtllm-version", "0.17")
    files = {path.relative_to(tmp_path / "out").as_posix(): path for path in tmp_path.rglob("rank*.safetensors")}
    assert {name: tensors(path) for name, path in files.items()} == expected["ranks"]
    for name, values in expected["config"].items():
        written = json.loads((tmp_path / "out" / name).read_text())
        wanted = stated(values)
        assert {key: value for key, value in stated(written).items() if key in wanted} == wanted
        # nothing else but what every reader passes over
        assert written.keys() - values.keys() <= {"logits_dtype"}
    done("verify", tmp_path / "out", "--source", source)


@pytest.mark.parametrize("case", CASES)
def test_read_back_the_model_is_the_one_it_was(golden: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    """From every variant in the source's own type, by config.json alone."""
    source = golden(f"trtllm_{case}")
    with safe_open(source / "model.safetensors", "pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # no mapping
    dtype = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[str(expected.popitem()[1].dtype).split(".")[1]]
    for variant, values in EXPECTED[case].items():
        if dtype not in values["options"]:
            continue
        out = tmp_path / variant
        done("hf-to-trtllm", source, out, *values["options"], "--trtllm-version", "0.17")
        (out / "manifest.json").unlink()
        done("trtllm-to-hf", out, tmp_path / f"{variant}-hf")
        with safe_open(tmp_path / f"{variant}-hf" / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name not in expected:
                    continue
                found, was = file.get_tensor(name).float(), expected[name].float()
                if case == "gemma2_gqa" and "norm" in name:  # stored with 1 added, rounded to 8 binary digits
                    assert ((found - was).abs() <= 2**-8 * (1 + was).abs()).all(), name
                else:
                    assert found.equal(was), name
            assert len(file.keys()) >= len(expected) * 0.9


@pytest.mark.parametrize(
    ("written", "case"),
    [("trtllm_written_t5_tp2", "t5_v1_0_relu_tied"), ("trtllm_written_llama_pp2", "llama_mha_odd_vocab")],
)
def test_what_nvidias_converter_wrote_is_read(
    golden: Callable[[str], Path], tmp_path: Path, written: str, case: str
) -> None:
    """With the tables of rotary positions that its saver leaves there."""
    done("trtllm-to-hf", golden(written), tmp_path / "hf")
    with safe_open(golden(f"trtllm_{case}") / "model.safetensors", "np") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with safe_open(tmp_path / "hf" / "model.safetensors", "np") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name for name in found if found[name].tobytes() != expected[name].tobytes()} == set()
    assert set(expected) - set(found) <= {"lm_head.weight"}


@pytest.mark.parametrize(
    ("case", "model"),
    [
        ("ul2_tied_legacy_f32", "ul2"),
        ("ul2_tied_orbax_f32", "ul2"),
        ("t5_1_1_untied_legacy_bf16", "t5-v1.1"),
        ("umt5_scan_legacy_f32", "umt5"),
    ],
)
@pytest.mark.parametrize("options", [("-t", 1, "--trtllm-version", "0.17"), ("-t", 2)], ids=["0.17", "1.0, tp 2"])
def test_read_back_it_gives_t5xs_logits(
    golden: Callable[[str], Path], tmp_path: Path, case: str, model: str, options: tuple[object, ...]
) -> None:
    from converter.formats import open_any
    from model_repository.backends import reference

    source = golden(case)
    done("jax-to-trtllm", source, tmp_path / "out", "--model", model, *options)
    (tmp_path / "out" / "manifest.json").unlink()
    network = reference.load(open_any(str(tmp_path / "out"), model))
    assert t5x_difference(network, source) < 1e-4
