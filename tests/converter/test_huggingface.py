"""To Hugging Face and from it: transformers loads what is written, gives T5X's own logits, and back it is the same."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import ftconvert, refused, t5x_difference, tree

from converter.formats import huggingface, open_any
from converter.tensor import dtype_named

# case -> (preset, transformers' class)
ORACLES = {
    "ul2_tied_legacy_f32": ("ul2", "T5ForConditionalGeneration"),
    "ul2_tied_orbax_f32": ("ul2", "T5ForConditionalGeneration"),
    "t5_1_1_untied_legacy_bf16": ("t5-v1.1", "T5ForConditionalGeneration"),
    "umt5_scan_legacy_f32": ("umt5", "UMT5ForConditionalGeneration"),
}


def load(folder: Path, name: str, tied: bool) -> Any:
    """transformers' model in float32, after checking that it knows every tensor and misses none."""
    import torch
    import transformers

    model, info = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    # transformers 5 says "tied" of every T5; the umT5 of this library then scales the logits of an untied one, too
    model.config.tie_word_embeddings = tied
    return model.eval()


@pytest.mark.parametrize("case", ORACLES)
def test_t5xs_logits_come_out_of_transformers(golden: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    preset, name = ORACLES[case]
    assert ftconvert("jax-to-hf", golden(case), tmp_path / "hf", "--model", preset).exit_code == 0
    model = load(tmp_path / "hf", name, tied="untied" not in case and "umt5" not in case)
    assert t5x_difference(model, golden(case)) < 1e-4


def assert_same_model(one: Path, other: Path) -> None:
    """Two checkpoints of any format hold the same tensors, bit for bit."""
    left, right = open_any(str(one)), open_any(str(other))
    assert left.family is right.family
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        assert tensor.spec == right.tensors[name].spec, name
        assert tensor.read().tobytes() == right.tensors[name].read().tobytes(), name


@pytest.fixture(scope="module", params=[("float32", True), ("bfloat16", False), ("float16", True)], ids=str)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dtype, tied = request.param
    return tiny.t5x_checkpoint(tmp_path_factory.mktemp("source") / "t5x", tiny.T5(tied=tied), dtype)


def test_there_and_back_it_is_the_same(source: Path, tmp_path: Path) -> None:
    """jax -> hf -> jax, hf -> ft -> hf, ft -> ft: every tensor, bit for bit."""
    hf, jax, ft, again = (tmp_path / name for name in ("hf", "jax", "ft", "again"))
    assert ftconvert("jax-to-hf", source, hf, "--model", "ul2").exit_code == 0
    assert_same_model(source, hf)
    assert ftconvert("hf-to-jax", hf, jax, "--step", 7).exit_code == 0
    assert_same_model(source, jax)
    assert open_any(str(jax)).source.step == 7
    assert ftconvert("hf-to-ft", hf, ft, "-t", 2, "--layout", "weights").exit_code == 0
    assert_same_model(source, ft)
    assert ftconvert("ft-to-hf", ft, again).exit_code == 0
    assert (hf / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    for folder, origin in ((hf, source), (jax, hf), (ft, hf), (again, ft)):
        result = ftconvert("verify", folder, "--source", origin)
        assert result.exit_code == 0, result.stderr


def test_another_tensor_parallel_size_is_the_same_as_converting_again(source: Path, tmp_path: Path) -> None:
    assert ftconvert("jax-to-ft", source, tmp_path / "one", "--model", "ul2", "-t", 4).exit_code == 0
    assert ftconvert("jax-to-ft", source, tmp_path / "direct", "--model", "ul2", "-t", 2, "--name", "x").exit_code == 0
    assert ftconvert("ft-to-ft", tmp_path / "one", tmp_path / "two", "-t", 2, "--name", "x").exit_code == 0
    weights = {name: data for name, data in tree(tmp_path / "two").items() if name.startswith("x/1/2-gpu")}
    assert weights == {name: data for name, data in tree(tmp_path / "direct").items() if name.startswith("x/1/2-gpu")}


def test_both_containers_of_t5x_give_the_same_bytes(golden: Callable[[str], Path], tmp_path: Path) -> None:
    for target in ("ft", "hf"):
        for container in ("legacy", "orbax"):
            out = tmp_path / f"{target}-{container}"
            result = ftconvert(f"jax-to-{target}", golden(f"ul2_tied_{container}_f32"), out, "--model", "ul2")
            assert result.exit_code == 0, result.stderr
        one, other = (tree(tmp_path / f"{target}-{container}") for container in ("legacy", "orbax"))
        marks = [name for name in one if name.split("/")[-1] in ("manifest.json", "config.pbtxt")]
        assert one.keys() == other.keys()
        assert marks
        assert all(one[name] == other[name] for name in one if name not in marks)


def test_umt5_is_refused_by_fastertransformer_and_t5x(golden: Callable[[str], Path], tmp_path: Path) -> None:
    source = golden("umt5_scan_legacy_f32")
    message = refused(65, "jax-to-ft", source, tmp_path / "ft", "--model", "umt5")
    assert "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in message
    assert "FasterTransformer loads one per side" in message
    assert not (tmp_path / "ft").exists()
    assert ftconvert("jax-to-hf", source, tmp_path / "hf", "--model", "umt5").exit_code == 0
    assert "FasterTransformer loads one per side" in refused(65, "hf-to-ft", tmp_path / "hf", tmp_path / "ft")
    assert "umt5" in refused(65, "hf-to-jax", tmp_path / "hf", tmp_path / "jax")


def test_umt5_whose_tables_are_equal_is_a_t5(tmp_path: Path) -> None:
    arrays = tiny.umt5_arrays(tiny.T5())
    for side in ("encoder", "decoder"):
        table = arrays[f"{side}.{side}.relpos_bias.rel_embedding"]
        table[:] = table[:, :1]
    tiny.write_t5x(tmp_path / "scanned", arrays)
    result = ftconvert("jax-to-ft", tmp_path / "scanned", tmp_path / "ft", "--model", "umt5", "-t", 2)
    assert result.exit_code == 0, result.stderr
    assert ftconvert("verify", tmp_path / "ft", "--source", tmp_path / "scanned").exit_code == 0
    written = open_any(str(tmp_path / "ft"))
    assert written.family.name == "t5"
    bias = written.tensors["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].read()
    assert (bias == arrays["decoder.decoder.relpos_bias.rel_embedding"][:, 0].T).all()
    query = written.tensors["encoder.block.1.layer.0.SelfAttention.q.weight"].read()
    stacked = arrays["encoder.encoder.attention.query.kernel"]
    assert (query == stacked[:, 1].reshape(stacked.shape[0], -1).T).all()


def test_stacked_layers_are_read_once(tmp_path: Path) -> None:
    tiny.write_t5x(tmp_path / "scanned", tiny.umt5_arrays(tiny.T5()))
    result = ftconvert("jax-to-hf", tmp_path / "scanned", tmp_path / "hf", "--model", "umt5", "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert plan["bytes_read"] == open_any(str(tmp_path / "scanned"), "umt5").nbytes


def test_a_shard_is_written_for_every_two_gigabytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 4000)
    assert ftconvert("jax-to-hf", source, tmp_path / "hf", "--model", "ul2").exit_code == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 5
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == open_any(str(source), "ul2").nbytes
    assert_same_model(source, tmp_path / "hf")
    load(tmp_path / "hf", "T5ForConditionalGeneration", tied=True)


# ---------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_an_adapter_is_merged_as_peft_merges_it(golden: Callable[[str], Path], tmp_path: Path, dtype: str) -> None:
    """Bit for bit PEFT's own merge in float32, rounded once."""
    from safetensors.numpy import load_file

    case, out = golden("t5_lora_fp32"), tmp_path / "out"
    result = ftconvert("hf-to-hf", case / "base", out, "--lora", case / "adapter", "--dtype", dtype)
    assert result.exit_code == 0, result.stderr
    expected, written = load_file(case / "merged_fp32" / "model.safetensors"), open_any(str(out)).tensors
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.read().tobytes() == expected[name].astype(dtype_named(dtype)).tobytes(), name
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["options"]["lora"] == str(case / "adapter")
    assert ftconvert("verify", out, "--source", case / "base").exit_code == 0
    # the same adapter on the way to FasterTransformer, in the thinnest of bands
    options = ("--lora", case / "adapter", "--dtype", dtype, "--layout", "weights")
    result = ftconvert("hf-to-ft", case / "base", tmp_path / "ft", *options, "-t", 2, "--memory-budget", "1")
    assert result.exit_code == 0, result.stderr
    assert_same_model(out, tmp_path / "ft")


def test_another_adapter_is_another_source(golden: Callable[[str], Path], tmp_path: Path) -> None:
    case, other = golden("t5_lora_fp32"), tmp_path / "adapter"
    shutil.copytree(case / "adapter", other)
    out = tmp_path / "out"
    assert ftconvert("hf-to-hf", case / "base", out, "--lora", other).exit_code == 0
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    result = ftconvert("verify", out, "--source", case / "base")
    assert result.exit_code == 1
    assert "model.safetensors" in result.stderr
    other.rename(tmp_path / "moved")
    refused(66, "verify", out, "--source", case / "base")
    assert ftconvert("verify", out, "--source", case / "base", "--lora", case / "adapter").exit_code == 0


def test_a_model_and_an_adapter_in_one_folder(golden: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers loads both; the weights alone would be another model."""
    case, both = golden("t5_lora_fp32"), tmp_path / "both"
    shutil.copytree(case / "base", both)
    for path in (case / "adapter").glob("adapter_*"):
        shutil.copy(path, both)
    assert f"--lora {both}" in refused(65, "hf-to-hf", both, tmp_path / "out")
    assert json.loads(ftconvert("inspect", both, "--json").stdout)["adapters"] == [str(both)]
    assert ftconvert("hf-to-hf", both, tmp_path / "out", "--lora", both).exit_code == 0
    assert ftconvert("hf-to-hf", case / "base", tmp_path / "apart", "--lora", case / "adapter").exit_code == 0
    assert_same_model(tmp_path / "out", tmp_path / "apart")


def test_an_unfinished_conversion_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "out" / ".parts").mkdir(parents=True)
    (tmp_path / "out" / ".parts" / "0-of-1.jsonl").write_text("{}\n")
    assert "unfinished conversion" in refused(65, "inspect", tmp_path / "out")


def test_a_run_that_writes_into_its_source_goes_on(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it wrote is not the source written anew."""
    source = changed(hf, tmp_path / "source")
    with monkeypatch.context() as patched:
        patched.setattr("converter.manifest.encode", lambda manifest: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert ftconvert("hf-to-ft", source, source / "out").exit_code == 130
    result = ftconvert("hf-to-ft", source, source / "out", "--json")
    assert json.loads(result.stdout)["files_resumed"] == json.loads(result.stdout)["files"]


def test_an_adapter_alone_says_what_it_is(golden: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = golden("t5_lora_fp32") / "adapter"
    found = json.loads(ftconvert("inspect", adapter, "--json").stdout)
    assert (found["format"], found["dtypes"], found["tensors"]) == ("lora", ["fp32"], 21)
    assert found["config"]["r"] == 4
    assert "PEFT LoRA adapter" in ftconvert("inspect", adapter).stdout
    assert "--lora" in refused(65, "hf-to-ft", adapter, tmp_path / "out")
    assert "expected a PEFT adapter" in refused(
        65, "hf-to-ft", golden("t5_lora_fp32") / "base", tmp_path / "out", "--lora", golden("t5_lora_fp32") / "base"
    )


# -------------------------------------------------------------------------------------------------- config, companions


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face model as this project writes it."""
    base = tmp_path_factory.mktemp("hf")
    tiny.t5x_checkpoint(base / "t5x", tiny.T5())
    assert ftconvert("jax-to-hf", base / "t5x", base / "hf", "--model", "ul2").exit_code == 0
    return base / "hf"


def changed(hf: Path, folder: Path, **config: Any) -> Path:
    """A copy with other values in config.json; None takes a key away."""
    shutil.copytree(hf, folder)
    stated = {**json.loads((hf / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "bert"}, "model_type"),
        ({"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"dense_act_fn": "relu"}, "dense_act_fn"),
        ({"is_gated_act": False}, "is_gated_act"),
        ({"num_layers": 3}, "encoder.block.2"),
        ({"num_layers": "3"}, "num_layers"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": 50}, "eos_token_id"),
        ({"decoder_start_token_id": 10**30}, "decoder_start_token_id"),
        ({"pad_token_id": True}, "pad_token_id"),
        ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"num_layers": 10**9}, "num_layers"),
        ({"d_model": None}, "d_model"),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": None}, "lm_head.weight"),
        ({"feed_forward_proj": 7}, "feed_forward_proj"),
        ({"feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False}, "DenseReluDense.wi.weight"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(hf: Path, tmp_path: Path, config: dict[str, Any], told: str) -> None:
    assert told in refused(65, "hf-to-ft", changed(hf, tmp_path / "bad", **config), tmp_path / "out")


def test_the_preset_is_a_check(hf: Path, tmp_path: Path) -> None:
    message = refused(65, "hf-to-ft", hf, tmp_path / "out", "--model", "flan-t5")
    assert "gated-gelu (--model flan-t5)" in message
    assert "gated-silu (config.json)" in message
    assert "umt5" in refused(65, "hf-to-ft", hf, tmp_path / "out", "--model", "umt5")
    assert ftconvert("hf-to-ft", hf, tmp_path / "out", "--model", "flan-ul2").exit_code == 0


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"model_type": []}'], ids=repr)
def test_a_config_that_is_none(hf: Path, tmp_path: Path, text: bytes) -> None:
    bad = changed(hf, tmp_path / "bad")
    (bad / "config.json").write_bytes(text)
    assert "config.json" in refused(65, "hf-to-ft", bad, tmp_path / "out")


def test_a_class_of_an_older_name(hf: Path, tmp_path: Path) -> None:
    assert_same_model(hf, changed(hf, tmp_path / "old", architectures=["T5WithLMHeadModel"]))


def test_several_end_tokens_are_one_too_many_for_fastertransformer_only(hf: Path, tmp_path: Path) -> None:
    two = changed(hf, tmp_path / "two", eos_token_id=[1, 2])
    assert ftconvert("hf-to-hf", two, tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [1, 2]


def test_a_tokenizer_that_is_none(hf: Path, tmp_path: Path) -> None:
    """It is held in memory, so its size is looked at first."""
    bad = changed(hf, tmp_path / "bad")
    with open(bad / "tokenizer.json", "wb") as file:
        file.truncate(3 << 30)
    assert "tokenizer.json" in refused(65, "hf-to-hf", bad, tmp_path / "out")


def test_the_wrong_pair_is_named(hf: Path, source: Path, tmp_path: Path) -> None:
    assert "hf-to-" in refused(65, "jax-to-ft", hf, tmp_path / "out", "--model", "ul2")
    assert "jax-to-" in refused(65, "hf-to-ft", source, tmp_path / "out")


def test_values_of_the_config_that_no_table_uses_are_kept(hf: Path, tmp_path: Path) -> None:
    special = changed(hf, tmp_path / "special", dropout_rate=0.25, task_specific_params={"a": [1]}, eos_token_id=2)
    assert ftconvert("hf-to-hf", special, tmp_path / "out", "--dtype", "bf16").exit_code == 0
    stated, written = (json.loads((one / "config.json").read_text()) for one in (special, tmp_path / "out"))
    assert written == {**stated, "torch_dtype": "bfloat16"}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == json.loads((special / "generation_config.json").read_text())


def test_the_tokenizer_goes_along(hf: Path, example: Path, tmp_path: Path) -> None:
    import transformers

    tokenizer = example / "spiece.model"
    assert ftconvert("hf-to-hf", hf, tmp_path / "one", "--tokenizer", tokenizer).exit_code == 0
    text = "The report was published on Friday."
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "one")
    import sentencepiece

    expected = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).encode(text)
    assert loaded(text)["input_ids"] == [*expected, 1]
    assert ftconvert("hf-to-hf", tmp_path / "one", tmp_path / "two").exit_code == 0
    assert (tmp_path / "two" / "spiece.model").read_bytes() == tokenizer.read_bytes()
    assert ftconvert("verify", tmp_path / "two", "--source", tmp_path / "one").exit_code == 0
    refused(66, "hf-to-hf", hf, tmp_path / "three", "--tokenizer", tmp_path / "nothing.model")
    refused(65, "hf-to-hf", hf, tmp_path / "three", "--tokenizer", hf)


# -------------------------------------------------------------------------------- stored twice, and what may be ignored


def stored_again(hf: Path, folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy whose tensors were changed and saved by the safetensors library."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(hf, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_tied_weights_may_be_stored_twice(hf: Path, tmp_path: Path) -> None:
    def twice(tensors: dict[str, np.ndarray]) -> None:
        for alias in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            tensors[alias] = tensors["shared.weight"].copy()

    assert ftconvert("hf-to-ft", stored_again(hf, tmp_path / "twice", twice), tmp_path / "a" / "x").exit_code == 0
    assert ftconvert("hf-to-ft", hf, tmp_path / "b" / "x", "--name", "twice").exit_code == 0
    one, other = (tree(tmp_path / name / "x" / "twice" / "1" / "1-gpu") for name in "ab")
    assert one == other


def test_tied_weights_that_differ_are_refused(hf: Path, tmp_path: Path) -> None:
    def other(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["shared.weight"] + 1

    bad = stored_again(hf, tmp_path / "bad", other)
    message = refused(65, "hf-to-ft", bad, tmp_path / "out")
    assert "lm_head.weight" in message
    assert "tie_word_embeddings" in message
    assert not (tmp_path / "out").exists()


def test_only_the_alias_is_stored(hf: Path, tmp_path: Path) -> None:
    def renamed(tensors: dict[str, np.ndarray]) -> None:
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")

    assert_same_model(hf, stored_again(hf, tmp_path / "renamed", renamed))


def test_missing_and_unexpected_tensors_are_all_named(hf: Path, tmp_path: Path) -> None:
    def broken(tensors: dict[str, np.ndarray]) -> None:
        del tensors["decoder.final_layer_norm.weight"], tensors["encoder.block.1.layer.1.layer_norm.weight"]
        tensors["encoder.block.7.layer.1.layer_norm.weight"] = np.ones(12, np.float32)
        tensors["decoder.block.0.layer.0.layer_norm.weight"] = np.ones(13, np.float32)

    message = refused(65, "hf-to-ft", stored_again(hf, tmp_path / "bad", broken), tmp_path / "out")
    for name in ("decoder.final_layer_norm", "encoder.block.1.layer.1", "encoder.block.7", "decoder.block.0.layer.0"):
        assert name in message


def test_a_table_that_nothing_reads_is_left_aside(hf: Path, tmp_path: Path) -> None:
    def more(tensors: dict[str, np.ndarray]) -> None:
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones((8, 4), np.float32)

    assert_same_model(hf, stored_again(hf, tmp_path / "old", more))


def test_elements_that_are_no_weights_are_refused(hf: Path, tmp_path: Path) -> None:
    def integers(tensors: dict[str, np.ndarray]) -> None:
        tensors["decoder.final_layer_norm.weight"] = np.ones(12, np.int8)

    message = refused(65, "hf-to-ft", stored_again(hf, tmp_path / "bad", integers), tmp_path / "out")
    assert "decoder.final_layer_norm.weight" in message
    assert "int8" in message


# a T5 that is scaled but has a head of its own is refused, see test_tied_weights_that_differ_are_refused
SAVED = [
    (kind, stated, own_head)
    for kind, stated, own_head in itertools.product(["T5", "MT5", "UMT5"], [False, True], [False, True])
    if not (kind == "T5" and stated and own_head)
]


@pytest.mark.parametrize(("kind", "stated", "own_head"), SAVED)
def test_what_transformers_saves_is_understood(tmp_path: Path, kind: str, stated: bool, own_head: bool) -> None:
    """In both of its formats. transformers 5 marks an untied T5 by `scale_decoder_outputs`, the others not at all."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, d_model=12, d_kv=6, d_ff=20, num_layers=2, num_decoder_layers=3, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=stated,
    )  # fmt: skip
    kind_of_model = getattr(transformers, f"{kind}ForConditionalGeneration")
    model = kind_of_model(config).eval()
    if own_head:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2 + 1)
    model.save_pretrained(tmp_path / "saved", max_shard_size="5KB")
    result = ftconvert("hf-to-hf", tmp_path / "saved", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    if kind == "UMT5":
        assert ("tie_word_embeddings = False" in result.stderr) == own_head
    ids = torch.arange(2, 12)[None]
    with torch.inference_mode():
        expected, got = (one(input_ids=ids, decoder_input_ids=ids).logits for one in (model, again))
    assert torch.equal(expected, got)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind == "UMT5" and not own_head:
        del state["lm_head.weight"]  # its presence is all that tells the two kinds apart
    if kind != "UMT5":  # and T5X's and FasterTransformer's way of scaling is the same one
        ft = ftconvert("hf-to-ft", tmp_path / "saved", tmp_path / "ft", "--layout", "weights")
        assert ft.exit_code == 0, ft.stderr
        assert ftconvert("ft-to-hf", tmp_path / "ft", tmp_path / "back").exit_code == 0
        back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "back").eval()
        with torch.inference_mode():
            assert torch.equal(expected, back(input_ids=ids, decoder_input_ids=ids).logits)
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "saved", old, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(state, old / "pytorch_model.bin")
    assert ftconvert("hf-to-hf", old, tmp_path / "out2").exit_code == 0
    assert_same_model(tmp_path / "out", tmp_path / "out2")
