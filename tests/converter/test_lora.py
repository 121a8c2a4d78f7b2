"""LoRA adapters: PEFT's own merge as the judge, the same bits whatever the box, and what is refused by name."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from converter import ops
from converter.checkpoint import Checkpoint, Source
from converter.errors import SourceError, SourceMissingError
from converter.families.t5 import FAMILY
from converter.formats import lora, lora_config, safetensors
from converter.storage import open_storage
from converter.tensor import Box, LazyTensor, TensorSpec, dtype_named, in_memory, leaf

Arrays = dict[str, np.ndarray]
CLOSE = 2e-6  # of the largest weight: float32 rounds r products and sums, each implementation in its own order


def lazy(arrays: Mapping[str, np.ndarray]) -> dict[str, LazyTensor]:
    return {name: in_memory(array, name) for name, array in arrays.items()}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((*shape, seed)).standard_normal(shape, np.float32)


# ------------------------------------------------------------------------------------------------------------ add_lora


def by_definition(weight: np.ndarray, left: np.ndarray, right: np.ndarray, scaling: float) -> np.ndarray:
    """What has to come out, bit for bit: k in order, every product added as it is and every sum rounded."""
    delta = np.zeros(weight.shape, np.float32)
    for k in range(left.shape[1]):
        product = left[:, k, None].astype(np.longdouble) * right[k].astype(np.longdouble)
        delta = (delta + product).astype(np.float32)
    return weight.astype(np.float32) + delta * np.float32(scaling)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tile", [16, 48, ops.LORA_TILE])
@settings(deadline=None)
@given(data=st.data())
def test_any_box_has_the_bits_of_the_whole(tile: int, dtype: str, transposed: bool, data: st.DataObject) -> None:
    weight, left, right = (normal(*shape).astype(dtype_named(dtype)) for shape in ((13, 22), (13, 5), (5, 22)))
    source = ops.transpose(in_memory(weight.T.copy(), "w")) if transposed else in_memory(weight, "w")
    tensor = ops.add_lora(source, in_memory(left, "left"), in_memory(right, "right"), 0.37)
    assert tensor.spec == TensorSpec((13, 22), np.dtype(np.float32))
    start = tuple(data.draw(st.integers(0, size)) for size in weight.shape)
    stop = tuple(data.draw(st.integers(low, size)) for low, size in zip(start, weight.shape, strict=True))
    box = Box(start, stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "LORA_TILE", tile)
        found = tensor.read(box)
    assert found.shape == box.shape
    assert found.dtype == np.float32
    assert found.tobytes() == by_definition(weight, left, right, 0.37)[box.slices].tobytes()


def test_many_tiles_have_the_bits_of_the_definition() -> None:
    weight, left, right = normal(70, 5000), normal(70, 16), normal(16, 5000)
    tensor = ops.add_lora(in_memory(weight, "w"), in_memory(left, "l"), in_memory(right, "r"), 2.0)
    before = np.getbufsize()
    assert before != 16
    assert tensor.read().tobytes() == by_definition(weight, left, right, 2.0).tobytes()
    assert np.getbufsize() == before


def test_only_rows_of_b_and_columns_of_a_are_read() -> None:
    reads: dict[str, list[Box]] = {}

    def noted(name: str, array: np.ndarray) -> LazyTensor:
        def read(box: Box) -> np.ndarray:
            reads.setdefault(name, []).append(box)
            return array[box.slices]

        return leaf(TensorSpec(array.shape, array.dtype), name, (1, 1), read)

    weight, left, right = noted("w", normal(6, 8)), noted("l", normal(6, 3)), noted("r", normal(3, 8))
    tensor = ops.add_lora(weight, left, right, 1.0)
    box = Box((1, 2), (4, 7))
    tensor.read(box)
    assert reads == {"w": [box], "l": [Box((1, 0), (4, 3))], "r": [Box((0, 2), (3, 7))]}
    assert list(tensor.leaf_boxes(box)) == [(weight, box), (left, reads["l"][0]), (right, reads["r"][0])]
    assert tensor.origin == "add_lora(w, l, r, 1.0)"


@pytest.mark.parametrize("bad", [np.inf, np.nan, 3e38])
def test_a_finite_weight_stays_finite(bad: float) -> None:
    weight, left, right = normal(4, 6), normal(4, 2), normal(2, 6)
    right[1, 4], left[:, 1] = bad, 3
    tensor = ops.add_lora(in_memory(weight, "some.weight"), in_memory(left, "B"), in_memory(right, "A"), 1.0)
    with pytest.raises(SourceError, match=r"some\.weight[\s\S]*at \[2, 4\][\s\S]*B, A"):
        tensor.read(Box((2, 1), (4, 6)))
    assert np.isfinite(tensor.read(Box((0, 0), (4, 4)))).all()
    weight[:, 4] = np.inf  # what the base already has is its own affair
    assert not np.isfinite(tensor.read()[:, 4]).any()


def test_factors_must_fit() -> None:
    with pytest.raises(ValueError, match="add_lora needs"):
        ops.add_lora(*(in_memory(normal(*shape), "x") for shape in ((4, 6), (4, 2), (3, 6))), 1.0)


# -------------------------------------------------------------------------------------------------------------- golden


def stored(folder: Path) -> dict[str, LazyTensor]:
    storage = open_storage(str(folder))
    return safetensors.tensors(storage, "model.safetensors", storage.files()["model.safetensors"])[0]


@pytest.mark.parametrize(("case", "adapted"), [("t5_lora_fp32", 21), ("llama_lora_layers_pattern_bf16", 6)])
def test_pefts_own_merge(golden: Callable[[str], Path], case: str, adapted: int) -> None:
    """Bit for bit in every type, so also rounded once to the types in between."""
    base, expected = stored(golden(case) / "base"), stored(golden(case) / "merged_fp32")
    found = lora.merged(base, open_storage(str(golden(case) / "adapter")), tied=False)
    assert found.keys() == expected.keys()
    assert sum(found[name] is not base[name] for name in base) == adapted
    for name, tensor in found.items():
        ours, theirs = tensor.read().astype(np.float32), expected[name].read()
        for short in ("fp32", "fp16", "bf16"):
            dtype = dtype_named(short)
            assert ours.astype(dtype).tobytes() == theirs.astype(dtype).tobytes(), (name, short)


# -------------------------------------------------------------------------------------------------------- PEFT, judging


@dataclass(frozen=True)
class Case:
    """A model and the settings of an adapter for it."""

    model: str
    config: Mapping[str, Any]
    adapted: int  # tensors that have to be other ones than the base's
    binary: bool = False


ALL_BIASES = 2 * (4 + 2) + 1  # GPT-2: c_attn, c_proj, c_fc, c_proj, two norms in each layer; one norm
CASES = {
    "t5": Case("t5", {"target_modules": ["q", "v", "wo"]}, 3 * 2 + 2),
    "t5 pattern": Case("t5", {"target_modules": r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$"}, 4),
    "t5 embedding": Case("t5", {"target_modules": ["shared", "k"]}, 1 + 3),
    "t5 layers": Case("t5", {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "block"}, 3),
    "t5 all-linear": Case("t5", {"target_modules": "all-linear"}, 3 * 4 + 2 * 2),
    "rslora": Case("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}, 4),
    "patterns": Case(
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 2, "^model.layers.1.mlp.*": 5},
            "alpha_pattern": {r"layers\.0\.self_attn\..*": 3, "q_proj": 7, "model.layers.1.self_attn.v_proj": 11},
        },
        6,
    ),
    "excluded": Case(
        "llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}, 3
    ),
    "a layer": Case("llama", {"target_modules": ["o_proj"], "layers_to_transform": 1}, 1),
    "whole modules": Case(
        "llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "mlp"]}, 2 + 1 + 5 + 6
    ),
    "embedding": Case("llama", {"target_modules": ["embed_tokens", "gate_proj", "lm_head"]}, 4),
    "binary": Case("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 3, binary=True),
    "square and not": Case("gpt2", {"target_modules": ["c_attn", "c_proj"]}, 2 * 3),
    "square alone": Case("gpt2", {"target_modules": ["attn.c_proj"]}, 2),
    "biases of adapted": Case("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}, 2 + 2),
    "all biases": Case("gpt2", {"target_modules": ["c_fc"], "bias": "all"}, 2 + ALL_BIASES),
    "positions": Case("gpt2", {"target_modules": ["wpe", "c_fc"]}, 1 + 2),
}  # fmt: skip


def build(name: str) -> Any:
    import torch
    import transformers
    from transformers import GPT2Config, LlamaConfig, T5Config

    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    if name == "t5":
        sizes = {"d_model": 12, "d_kv": 4, "d_ff": 20, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
        return transformers.T5ForConditionalGeneration(T5Config(**sizes, vocab_size=30))
    if name == "gpt2":
        sizes = {"n_embd": 12, "n_head": 2, "n_layer": 2, "n_positions": 9}
        return transformers.GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=30, **ids))
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=30, tie_word_embeddings=False, **ids)
    return transformers.LlamaForCausalLM(config)


def judged(case: Case, folder: Path) -> tuple[Arrays, Arrays]:
    """An adapter with random values, saved to `folder`: the base's tensors, and as PEFT merges them."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = build(case.model)
    aliases = ("encoder.embed_tokens.", "decoder.embed_tokens.", *(() if case.model == "llama" else ("lm_head.",)))

    def arrays(of: Any) -> Arrays:
        found = of.state_dict().items()
        return {name: tensor.numpy().copy() for name, tensor in found if not name.startswith(aliases)}

    base = arrays(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **case.config}))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        wrapped.save_pretrained(str(folder), safe_serialization=not case.binary)
        return base, arrays(wrapped.merge_and_unload())


@pytest.mark.parametrize("name", CASES)
def test_peft_merges_alike(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    arrays, expected = judged(case, tmp_path)
    assert (tmp_path / "adapter_model.bin").exists() == case.binary
    base = lazy(arrays)
    # untied: that T5 uses `shared` twice is what the test of tied models is about
    found = lora.merged(base, open_storage(str(tmp_path)), tied=False)
    assert found.keys() == expected.keys()
    changed = [one for one in base if found[one] is not base[one]]
    assert len(changed) == case.adapted, changed
    for one, tensor in found.items():
        assert np.abs(tensor.read() - expected[one]).max() <= CLOSE * np.abs(expected[one]).max(), one
        assert (one in changed) == (arrays[one] != expected[one]).any(), one


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_narrow_adapters_are_widened_exactly(dtype: str, tmp_path: Path) -> None:
    arrays, _ = judged(CASES["rslora"], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    narrow = {name: array.astype(dtype_named(dtype)) for name, array in load_file(file).items()}
    wide = {name: array.astype(np.float32) for name, array in narrow.items()}
    half = lazy({name: array.astype(dtype_named(dtype)) for name, array in arrays.items()})
    results = []
    for stored_ones in (narrow, wide):
        save_file(stored_ones, file)
        tensors = lora.merged(half, open_storage(str(tmp_path)), tied=False)
        results.append({name: (tensor.spec, tensor.read().tobytes()) for name, tensor in tensors.items()})
    assert results[0] == results[1]
    assert {spec.dtype.name for name, (spec, _) in results[0].items() if "q_proj" in name} == {"float32"}


# ---------------------------------------------------------------------------------------------------- a model by hand

BASE = {
    "model.embed_tokens.weight": normal(10, 4),
    **{f"model.layers.{i}.q.weight": normal(6, 4, seed=i) for i in range(2)},
    **{f"model.layers.{i}.q.bias": normal(6, seed=i) for i in range(2)},
    **{f"model.layers.{i}.o.weight": normal(4, 6, seed=i) for i in range(2)},
    **{f"model.layers.{i}.s.weight": normal(4, 4, seed=i) for i in range(2)},
    "model.norm.weight": normal(4),
    "lm_head.weight": normal(10, 4, seed=1),
}
PREFIX = "base_model.model."


def factors(module: str, rank: int = 2) -> Arrays:
    """Random A and B for a module of BASE."""
    out, into = BASE[f"{module}.weight"].shape
    return {
        f"{PREFIX}{module}.lora_A.weight": normal(rank, into),
        f"{PREFIX}{module}.lora_B.weight": normal(out, rank),
    }


Q0, Q1 = factors("model.layers.0.q"), factors("model.layers.1.q")
BOTH = {**Q0, **Q1}
Q0_A, Q0_B = Q0


def adapter(folder: Path, tensors: Arrays | None = None, config: Any = None, **settings: Any) -> Path:
    """An adapter of both `q`; `settings` replace those of its config, `config` the whole file."""
    folder.mkdir(exist_ok=True, parents=True)
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], **settings}
    (folder / lora.CONFIG).write_text(json.dumps(values) if config is None else config)
    save_file(BOTH if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def merged(folder: Path, tied: bool = False, base: Mapping[str, np.ndarray] = BASE) -> Arrays:
    tensors = lora.merged(lazy(base), open_storage(str(folder)), tied)
    return {name: tensor.read() for name, tensor in tensors.items()}


def refused(folder: Path, *words: str, tied: bool = False, base: Mapping[str, np.ndarray] = BASE) -> str:
    with pytest.raises(SourceError) as caught:
        lora.merged(lazy(base), open_storage(str(folder)), tied)
    assert caught.value.exit_code == 65
    for word in words:
        assert word in str(caught.value), caught.value
    return str(caught.value)


def test_the_model_by_hand_is_merged(tmp_path: Path) -> None:
    found = merged(adapter(tmp_path))
    for i in range(2):
        name = f"model.layers.{i}.q"
        a, b = (BOTH[f"{PREFIX}{name}.lora_{x}.weight"] for x in "AB")
        expected = by_definition(BASE[f"{name}.weight"], b, a, 2.0)
        assert found[f"{name}.weight"].tobytes() == expected.tobytes()
    assert found["model.norm.weight"] is not None


def renamed(tensors: Arrays, old: str, new: str) -> Arrays:
    return {name.replace(old, new): array for name, array in tensors.items()}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".lora_A.", ".lora_A.default."),  # PEFT before 0.4
        (PREFIX, f"{PREFIX}model."),  # trained on the model inside another one
        (f"{PREFIX}model.", PREFIX),  # trained on the bare model
        (f"{PREFIX}model.", f"{PREFIX}transformer.model."),
    ],
)
def test_other_names_of_the_same_modules(tmp_path: Path, old: str, new: str) -> None:
    expected = merged(adapter(tmp_path / "a"))
    found = merged(adapter(tmp_path / "b", renamed(BOTH, old, new)))
    assert all((found[name] == expected[name]).all() for name in BASE)


def test_a_prefix_that_leads_to_two_modules_is_not_guessed(tmp_path: Path) -> None:
    both = {**BASE, **{name.replace("model.", "transformer.", 1): array for name, array in BASE.items()}}
    refused(
        adapter(tmp_path, renamed(BOTH, f"{PREFIX}model.", PREFIX)),
        "layers.0.q",
        "none of this name",
        base=both,
    )


def test_a_target_that_is_saved_whole_needs_no_product(tmp_path: Path) -> None:
    whole = {f"{PREFIX}model.layers.1.q.weight": normal(6, 4, seed=8), f"{PREFIX}model.layers.1.q.bias": normal(6)}
    found = merged(adapter(tmp_path, {**Q0, **whole}, modules_to_save=["layers.1.q"]))
    assert all((found[name.removeprefix(PREFIX)] == array).all() for name, array in whole.items())


def test_two_names_of_one_module_are_not_added_up(tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): array for name, array in BASE.items()}
    tensors = {**BOTH, **renamed(Q0, f"{PREFIX}model.", PREFIX)}
    refused(adapter(tmp_path, tensors), "model.layers.0.q", "one name for every module", base=bare)


@pytest.mark.parametrize("wrapper", ["", "modules_to_save.", "modules_to_save.default."])
def test_whole_tensors_replace_the_bases(tmp_path: Path, wrapper: str) -> None:
    whole = normal(10, 4, seed=9)
    tensors = {**BOTH, f"{PREFIX}lm_head.{wrapper}weight": whole}
    assert (merged(adapter(tmp_path, tensors, modules_to_save=["lm_head"]))["lm_head.weight"] == whole).all()


@pytest.mark.parametrize("adapted", ["encoder.block.{}.layer.1.q", "encoder.block.1.layer.{}.q"])
def test_an_older_version_took_another_number_for_the_layer(tmp_path: Path, adapted: str) -> None:
    """PEFT takes the first number of `block.0.layer.1` for the layer now; it took the last one."""
    base = {f"encoder.block.{i}.layer.{j}.q.weight": normal(6, 4) for i in range(2) for j in range(2)}
    tensors = {}
    for i in range(2):
        name = PREFIX + adapted.format(i)
        tensors |= {f"{name}.lora_A.weight": normal(2, 4), f"{name}.lora_B.weight": normal(6, 2)}
    found = merged(adapter(tmp_path, tensors, layers_to_transform=[1]), base=base)
    assert [name for name in base if (found[name] != base[name]).any()] == [
        f"{adapted.format(i)}.weight" for i in range(2)
    ]
    both = {key: tensors[key] for key in tensors if "block.1.layer.1" not in key}
    refused(adapter(tmp_path, both, layers_to_transform=[1]), "encoder.block.1.layer.1.q", "no tensor", base=base)


def test_the_first_pattern_that_matches_counts(tmp_path: Path) -> None:
    folder = adapter(tmp_path, alpha_pattern={"layers.1.q": 8, ".*q": 2, "model.layers.0.q": 100})
    found = merged(folder)
    for i, alpha in ((0, 2), (1, 8)):
        a, b = (BOTH[f"{PREFIX}model.layers.{i}.q.lora_{x}.weight"] for x in "AB")
        expected = by_definition(BASE[f"model.layers.{i}.q.weight"], b, a, alpha / 2)
        assert (found[f"model.layers.{i}.q.weight"] == expected).all()


# ------------------------------------------------------------------------------------------------------------- refused

NOT_MERGEABLE = {
    "use_dora": True,
    "lora_bias": True,
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "layer_replication": [[0, 1], [0, 2]],
    "target_parameters": ["experts.down"],
    "trainable_token_indices": [1, 2],
    "megatron_config": {"a": 1},
    "alora_invocation_tokens": [3],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"num_groups": 64},
    "use_something_new": True,
    "something_new_config": {"a": 1},
    "peft_type": "LOHA",
}


@pytest.mark.parametrize("key", NOT_MERGEABLE)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, key: str) -> None:
    refused(adapter(tmp_path, **{key: NOT_MERGEABLE[key]}), key, lora.CONFIG)


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "loftq", "lora_ga", "new", 3])
def test_another_base_is_refused(tmp_path: Path, begun: Any) -> None:
    refused(adapter(tmp_path, init_lora_weights=begun), "init_lora_weights", str(begun))


@pytest.mark.parametrize("begun", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "Gaussian"])
def test_beginnings_that_leave_the_base_alone(tmp_path: Path, begun: Any) -> None:
    harmless = {"use_rslora": False, "eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}, "use_dora": False}
    merged(adapter(tmp_path, init_lora_weights=begun, **harmless))


def test_everything_refused_is_named_at_once(tmp_path: Path) -> None:
    refused(
        adapter(tmp_path, use_dora=True, r=0, lora_alpha="8", init_lora_weights="pissa"),
        "use_dora",
        "tensor   r\n",
        "lora_alpha",
        "pissa",
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0), ("r", -4), ("r", 2.0), ("r", True), ("r", "8"), ("r", None), ("r", [8]),
        ("lora_alpha", None), ("lora_alpha", "16"), ("lora_alpha", True), ("lora_alpha", 10**400),
        ("rank_pattern", ["q"]), ("rank_pattern", {"q": 0}), ("alpha_pattern", {"q": None}), ("alpha_pattern", 3),
        ("use_rslora", "yes"), ("fan_in_fan_out", 1), ("bias", "some"), ("bias", 3),
        ("target_modules", 3), ("target_modules", [1]), ("target_modules", {"q": 1}),
        ("modules_to_save", "lm_head"), ("exclude_modules", [None]), ("layers_to_transform", ["0"]),
        ("layers_to_transform", True), ("layers_pattern", 4), ("base_model_name_or_path", 4),
        ("modules_to_save", ["q"] * 10_001), ("target_modules", [["q"]]),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(tmp_path: Path, key: str, value: Any) -> None:
    refused(adapter(tmp_path, **{key: value}), f"tensor   {key}")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "3", "{", '{"lora_alpha": NaN}', '{"r": Infinity}', '{"a": ' + "[" * 100_000, "\xff",
        '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", '{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}',
        json.dumps({"peft_type": "LORA", "target_modules": ["\ud800"], "modules_to_save": ["\x1b[31m"]}),
    ],
    ids=range(11),
)  # fmt: skip
def test_a_hostile_config(tmp_path: Path, text: str) -> None:
    folder = adapter(tmp_path)
    (folder / lora.CONFIG).write_bytes(text.encode("latin-1"))
    message = refused(folder)
    message.encode()  # no lone surrogate
    assert "\x1b" not in message
    assert len(message) < 5000


HOSTILE = {
    "endless": r"(?:(?:\w|\.|.|..)+)+[A-Z]{3}",
    "broken": "q(",
    "long": "a" * 1001,
    "huge": "(?:(?:a{999}){999}){9}",
    "deep": "(?:" * 300 + "q" + ")*" * 300,
    "recursive": "(?R)",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "alpha_pattern", "layers_pattern"])
def test_a_hostile_pattern_ends(tmp_path: Path, name: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_config, "PATTERN_SECONDS", 0.05)
    pattern = HOSTILE[name]
    value = {"alpha_pattern": {pattern: 1}, "layers_pattern": [pattern]}.get(key, pattern)
    started = time.monotonic()
    refused(adapter(tmp_path, **{key: value, "layers_to_transform": [0]}), lora_config.short(pattern)[:60])
    assert time.monotonic() - started < 2


def test_many_slow_patterns_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_config, "PATTERN_SECONDS", 0.05)
    monkeypatch.setattr(lora_config, "PATTERNS_SECONDS", 0.2)
    patterns = {rf"(?:(?:\w|\.|.|..)+)+[A-Z]{{3}}{i}": 1 for i in range(1000)}
    started = time.monotonic()
    refused(adapter(tmp_path, alpha_pattern=patterns), "still at it", " more")
    assert time.monotonic() - started < 5


def without(tensors: Arrays, *ends: str) -> Arrays:
    return {name: array for name, array in tensors.items() if not name.endswith(ends)}


EMBEDDED = {
    f"{PREFIX}model.embed_tokens.lora_embedding_A": normal(2, 10),
    f"{PREFIX}model.embed_tokens.lora_embedding_B": normal(4, 2),
}
LARGER = {
    f"{PREFIX}model.embed_tokens.lora_embedding_A": normal(2, 12),
    f"{PREFIX}model.embed_tokens.lora_embedding_B": normal(4, 2),
}
Q, NORM = f"{PREFIX}model.layers.0.q", f"{PREFIX}model.norm.weight"
HEAD = {f"{PREFIX}lm_head.weight": normal(10, 4)}
SQUARE = {**factors("model.layers.0.s"), **factors("model.layers.1.s")}
MISFITS: dict[str, tuple[Arrays, dict[str, Any], tuple[str, ...]]] = {
    "A without B": (without(BOTH, "0.q.lora_B.weight"), {}, ("model.layers.0.q", "lora_A and lora_B")),
    "B without A": (without(BOTH, "1.q.lora_A.weight"), {}, ("model.layers.1.q", "lora_A and lora_B")),
    "a target without tensors": (Q0, {}, ("model.layers.1.q", "no tensor", "target_modules")),
    "a target of a pattern without tensors": (Q0, {"target_modules": ".*q"}, ("model.layers.1.q", "no tensor")),
    "tensors without a target": (BOTH, {"target_modules": ["o"]}, ("0.q", "1.q", "0.o", "1.o", "targets")),
    "tensors of an excluded module": (BOTH, {"exclude_modules": ["layers.1.q"]}, ("layers.1.q", "targets")),
    "tensors of another layer": (BOTH, {"layers_to_transform": [0]}, ("layers.1.q", "targets")),
    "a layer without tensors": (Q0, {"layers_to_transform": [0, 1]}, ("layers.1.q", "no tensor")),
    "another r": (BOTH, {"r": 3}, ("layers.0.q", "r = 3", "layers.1.q")),
    "another r by pattern": (BOTH, {"rank_pattern": {"1.q": 4}}, ("layers.1.q", "r = 4")),
    "A and B of two ranks": (
        {**BOTH, Q0_B: normal(6, 3)}, {}, ("layers.0.q", "B [out, r]"),
    ),
    "another width": (
        {**BOTH, Q0_A: normal(2, 5)}, {}, ("layers.0.q", "factors of [6, 4]"),
    ),
    "three axes": ({**BOTH, Q0_A: normal(2, 4, 1)}, {}, ("layers.0.q",)),
    "another type": (
        {**BOTH, Q0_A: normal(2, 4).astype(np.float64)}, {}, ("q.lora_A", "float64"),
    ),
    "a module that is not there": (
        {**BOTH, **renamed(Q0, ".0.", ".7.")}, {}, ("model.layers.7.q", "none of this name"),
    ),
    "an adapter of a norm": (
        {**BOTH, f"{PREFIX}model.norm.lora_A.weight": normal(2, 4), f"{PREFIX}model.norm.lora_B.weight": normal(4, 2)},
        {"target_modules": ["q", "norm"]}, ("model.norm", "factors of [4]"),
    ),
    "none at all": ({}, {"target_modules": ["nothing"]}, ("the whole adapter",)),
    "another wrapper": (renamed(BOTH, PREFIX, "base."), {}, ("base.model.layers.0.q.lora_A", PREFIX)),
    "no wrapper": (renamed(BOTH, PREFIX, ""), {}, ("base_model.model.<module>",)),
    "a trained magnitude": (
        {**BOTH, f"{Q}.lora_magnitude_vector": normal(6)}, {}, ("lora_magnitude_vector", "only"),
    ),
    "a bias of B": ({**BOTH, f"{Q}.lora_B.bias": normal(6)}, {}, ("lora_B.bias", "only")),
    "one factor twice": (
        {**BOTH, f"{Q}.lora_A.default.weight": normal(2, 4)}, {}, ("lora_A", "one such tensor"),
    ),
    "a whole tensor unasked": (
        {**BOTH, NORM: normal(4)}, {}, ("model.norm.weight", "modules_to_save"),
    ),
    "a bias unasked": ({**BOTH, f"{Q}.bias": normal(6)}, {}, ("layers.0.q.bias", "bias")),
    "a product beside a whole tensor": (
        {**BOTH, f"{Q}.bias": normal(6), f"{Q}.weight": normal(6, 4)}, {"modules_to_save": ["0.q"]},
        ("layers.0.q", "targets"),
    ),
    "a whole tensor that is missing": (BOTH, {"modules_to_save": ["norm"]}, ("model.norm.weight", "no tensor")),
    "a whole tensor that the model has not": (
        {**BOTH, f"{PREFIX}score.weight": normal(3, 4)}, {"modules_to_save": ["score"]},
        ("score.weight", "none of this name"),
    ),
    "a whole module that nobody has": (BOTH, {"modules_to_save": ["score"]}, ("score", "neither")),
    "a whole tensor of another shape": (
        {**BOTH, NORM: normal(5)}, {"modules_to_save": ["norm"]}, ("norm", "[4]", "[5]"),
    ),
    "a whole tensor of another type": (
        {**BOTH, NORM: np.zeros(4, np.int64)}, {"modules_to_save": ["norm"]}, ("norm", "int64"),
    ),
    "biases that are missing": (BOTH, {"bias": "all"}, ("0.q.bias", "1.q.bias", "bias: all")),
    "biases of the adapted that are missing": (BOTH, {"bias": "lora_only"}, ("0.q.bias", "1.q.bias", "`none`")),
    "a resized vocabulary, saved": (
        {**BOTH, f"{PREFIX}lm_head.weight": normal(12, 4)}, {}, ("lm_head", "[10, 4]", "[12, 4]", "resized to 12"),
    ),
    "a resized vocabulary, adapted": (
        {**BOTH, **LARGER}, {"target_modules": ["q", "embed_tokens"]}, ("embed_tokens", "resized to 12"),
    ),
    "an embedding that is none": (
        {**Q0, **renamed(renamed(Q1, "lora_", "lora_embedding_"), ".weight", "")}, {},
        ("layers.1.q", "factors of [6, 4]"),
    ),
    "a square weight among contradictions": (
        {**SQUARE, **Q0, **Q1}, {"target_modules": ["q", "s"], "fan_in_fan_out": True},
        ("layers.0.s", "lies the other way"),
    ),
    "a scaling beyond float32": (BOTH, {"lora_alpha": 1e39}, ("layers.0.q", "scaling")),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named(tmp_path: Path, name: str) -> None:
    tensors, settings, words = MISFITS[name]
    refused(adapter(tmp_path, tensors, **settings), *words)


def test_every_misfit_is_named_at_once(tmp_path: Path) -> None:
    tensors = {**without(Q0, "lora_B.weight"), f"{PREFIX}x.weight": normal(2), "odd": normal(2)}
    message = refused(adapter(tmp_path, tensors, modules_to_save=["norm"]))
    for word in ("model.layers.0.q", "model.layers.1.q", "tensor   x.weight", "tensor   odd", "model.norm.weight"):
        assert word in message, message


TIED = {name: array for name, array in BASE.items() if name != "lm_head.weight"}


@pytest.mark.parametrize(
    ("tensors", "settings"),
    [
        (EMBEDDED, {"target_modules": ["q", "embed_tokens"]}),
        (HEAD, {"modules_to_save": ["lm_head"]}),
        ({f"{PREFIX}model.embed_tokens.weight": normal(10, 4)}, {"modules_to_save": ["embed_tokens"]}),
        (factors("lm_head"), {"target_modules": ["q", "lm_head"]}),
    ],
    ids=["embedding", "saved output", "saved embedding", "output"],
)
def test_a_tied_model_stays_tied(tmp_path: Path, tensors: Arrays, settings: dict[str, Any]) -> None:
    folder = adapter(tmp_path, {**BOTH, **tensors}, **settings)
    refused(folder, "tie_word_embeddings", tied=True, base=TIED)
    merged(folder, tied=False)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError, match=r"adapter_config\.json and no adapter_model\.safetensors or"):
        lora.merged({}, open_storage(str(tmp_path)), tied=False)
    assert not lora.recognises(open_storage(str(tmp_path)))
    folder = adapter(tmp_path)
    assert lora.recognises(open_storage(str(folder)))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceMissingError, match=r"no adapter_model\.safetensors or adapter_model\.bin"):
        lora.merged({}, open_storage(str(folder)), tied=False)
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(SourceError, match="safetensors"):
        lora.merged({}, open_storage(str(folder)), tied=False)


# ---------------------------------------------------------------------------------------------------------- checkpoint


def checkpoint(tied: bool = False, fingerprint: str = "f") -> Checkpoint:
    source = Source("somewhere", "huggingface", None, fingerprint)
    return Checkpoint(FAMILY, {"tie_word_embeddings": tied}, lazy(BASE), source, "a model", stamp="s")


def test_a_merged_checkpoint_is_another_source(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    storage = open_storage(str(folder))
    base, other = checkpoint(), checkpoint(fingerprint="g")
    first = lora.merge(base, storage)
    assert first.tensors.keys() == base.tensors.keys()
    assert first.tensors["model.norm.weight"] is base.tensors["model.norm.weight"]
    assert first.tensors["model.layers.0.q.weight"].spec.dtype == np.float32
    assert (first.family, first.config, first.source.uri) == (base.family, base.config, base.source.uri)
    copy = lora.merge(base, open_storage(str(adapter(tmp_path / "b"))))
    assert copy.source.fingerprint == first.source.fingerprint  # a copy has the same
    assert copy.tensors["model.layers.0.q.weight"].origin == first.tensors["model.layers.0.q.weight"].origin
    fingerprints, stamps = {base.source.fingerprint, first.source.fingerprint}, {base.stamp, first.stamp}
    fingerprints.add(lora.merge(other, storage).source.fingerprint)
    adapter(folder, alpha_pattern={}, lora_alpha=3)
    scaled = lora.merge(base, storage)
    assert scaled.tensors["model.layers.0.q.weight"].origin != first.tensors["model.layers.0.q.weight"].origin
    fingerprints.add(scaled.source.fingerprint)
    adapter(folder, {**BOTH, **HEAD})
    fingerprints.add(lora.merge(base, storage).source.fingerprint)
    stamps.add(lora.merge(base, storage).stamp)
    assert len(fingerprints) == 5
    assert len(stamps) == 3
    # a copy that was downloaded has the commit for its folder's name, and is the same one on every machine
    machines = [open_storage(str(adapter(tmp_path / machine / "commit"))) for machine in "xy"]
    assert len({lora.merge(base, machine, of_hub=True).stamp for machine in machines} - stamps) == 1
    assert len({lora.merge(base, machine).stamp for machine in machines} - stamps) == 2


def test_the_fingerprint_covers_the_header_of_the_weights(tmp_path: Path) -> None:
    sizes, fingerprints = set(), set()
    for dtype in ("fp16", "bf16"):
        folder = adapter(
            tmp_path / dtype,
            {name: array.astype(dtype_named(dtype)) for name, array in Q0.items()},
            layers_to_transform=0,
        )
        sizes.add((folder / "adapter_model.safetensors").stat().st_size)
        fingerprints.add(lora.merge(checkpoint(), open_storage(str(folder))).source.fingerprint)
    assert len(sizes) == 1
    assert len(fingerprints) == 2


def test_the_config_of_the_base_says_whether_it_is_tied(tmp_path: Path) -> None:
    storage = open_storage(str(adapter(tmp_path, {**BOTH, **HEAD})))
    lora.merge(checkpoint(tied=False), storage)
    with pytest.raises(SourceError, match="tie_word_embeddings"):
        lora.merge(checkpoint(tied=True), storage)


def test_described(tmp_path: Path) -> None:
    folder = adapter(tmp_path, target_modules=["v", "q"], base_model_name_or_path="some/model", use_dora=True)
    assert lora.describe(open_storage(str(folder))) == {
        "r": 2,
        "lora_alpha": 4.0,
        "target_modules": ["q", "v"],
        "adapted_tensors": 2,
        "dtypes": ["fp32"],
        "nbytes": 160,
        "parameters": 2 * (2 * 4 + 6 * 2),
        "base_model_name_or_path": "some/model",
    }
