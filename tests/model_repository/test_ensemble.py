"""Text models behind the real Triton, one repository and one server for all backends that a CPU has.

What is right is worked out by hand: the tokenizer's own library, transformers' own greedy `generate` of the source
model for one text alone, and the tokenizer again.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from asking import http, tensors
from conftest import ftconvert, refused, tree
from evaluated import evaluated
from manifests import dashboard
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from converter.storage import LocalStorage
from model_repository import config
from model_repository.models import text
from model_repository.server import TritonServer
from model_repository.validate import validate

STEPS = 9
START, END = 5, 7  # of the tiny GPT-2
T5_TEXTS = ["summarize: a graphical user interface for fonts", "hello", "a library that reads and writes JSON files"]
GPT2_TEXTS = ["deaf", "cab feed", "fig"]


def bytes_tokenizer(file: Path) -> Path:
    """29 tokens: 25 characters and the two bytes of an é, so that a single token may be half a character; and a 1.

    The tiny GPT-2 has no embedding for the 1.
    """
    pieces = [*"abcdefg", "Ã", *"ijklmnopqrstu", "©", "w", "Ġ", *"hvx1"]
    vocabulary = {"<s>": START, "</s>": END}
    vocabulary |= dict(zip(pieces, (id for id in range(30) if id not in (START, END)), strict=True))
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    ends = [("<s>", START), ("</s>", END)]
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, example: Path) -> dict[str, Path]:
    """The example's UL2 with its SentencePiece model, and a tiny GPT-2 with a tokenizer.json."""
    folder = tmp_path_factory.mktemp("sources")
    result = ftconvert("jax-to-hf", "--model", "ul2", "--tokenizer", example / "spiece.model", example, folder / "t5")
    assert result.exit_code == 0, result.stderr
    gpt2 = tiny.gpt2(seed=8, n_positions=64, bos_token_id=START, eos_token_id=END).save(folder / "gpt2")
    bytes_tokenizer(gpt2 / "tokenizer.json")
    return {"t5": folder / "t5", "gpt2": gpt2}


BUILD = ("repository", "build", "--backend")


@pytest.fixture(scope="module")
def repository(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each source in each backend, text models beside them."""
    base = tmp_path_factory.mktemp("repository")
    models, t5, gpt2 = base / "models", sources["t5"], sources["gpt2"]
    # tensorrtllm: a small batch, because each request in flight has a Python process of its own
    few, warm = ("--set", "max_batch_size=3", "--set", "bls_instance_count=1"), ("--set", "warmup=true")
    commands: list[tuple[object, ...]] = [
        ("hf-to-ft", "--name", "t5", "-t", 2, "--tokenizer", t5 / "spiece.model", t5, models),
        ("hf-to-ft", "--layout", "weights", gpt2, base / "gpt2-ft"),
        (*BUILD, "fastertransformer", *warm, "--name", "gpt2", "--tokenizer", gpt2, base / "gpt2-ft", models),
        ("hf-to-trtllm", t5, base / "t5-trt"),
        (*BUILD, "tensorrtllm", *few, *warm, "--name", "t5_trt", "--tokenizer", t5, base / "t5-trt", models),
        ("hf-to-trtllm", gpt2, base / "gpt2-trt"),
        (
            *(*BUILD, "tensorrtllm", *few, "--decoupled", "--name", "gpt2_trt"),
            *("--tokenizer", gpt2 / "tokenizer.json", base / "gpt2-trt", models),
        ),
        (*BUILD, "python", "--name", "t5_python_text", "--set", "dtype=float32", "--set", "kind=cpu", t5, models),
    ]
    for command in commands:
        result = ftconvert(*command)
        assert result.exit_code == 0, result.stderr
    return models


def post(server: TritonServer, model: str, verb: str = "generate", **body: Any) -> str:
    """What `curl .../v2/models/<model>/generate -d '{...}'` prints."""
    return http(server, f"models/{model}/{verb}", body)


def generate(server: TritonServer, model: str, **body: Any) -> str:
    return str(json.loads(post(server, model, **body))["text_output"])


@pytest.fixture(scope="module")
def by_hand(sources: dict[str, Path]) -> Callable[..., str]:
    """(family, text, steps) -> the answer."""
    t5 = AutoModelForSeq2SeqLM.from_pretrained(sources["t5"], dtype=torch.float32).eval()
    gpt2 = AutoModelForCausalLM.from_pretrained(sources["gpt2"], dtype=torch.float32).eval()
    pieces = SentencePieceProcessor(model_file=str(sources["t5"] / "spiece.model"))
    letters = Tokenizer.from_file(str(sources["gpt2"] / "tokenizer.json"))

    def answer(family: str, text: str, steps: int = STEPS) -> str:
        network, end = (t5, 1) if family == "t5" else (gpt2, END)
        plain = letters.encode(text, add_special_tokens=False).ids
        ids = [*pieces.encode(text), end] if family == "t5" else [START, *plain]
        given = torch.tensor([ids])
        output = network.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=steps,
            eos_token_id=end,
            pad_token_id=0,
        )[0].tolist()
        new = output[1:] if family == "t5" else output[len(ids) :]
        new = new[: new.index(end)] if end in new else new
        return str(pieces.decode(new) if family == "t5" else letters.decode(new))

    return answer


FAMILIES = {
    "t5_text": ("t5", T5_TEXTS),
    "gpt2_text": ("gpt2", GPT2_TEXTS),
    "t5_trt_text": ("t5", T5_TEXTS),
    "gpt2_trt_text": ("gpt2", GPT2_TEXTS),
    "gpt2_trt_bls": ("gpt2", GPT2_TEXTS),
    "t5_trt_bls": ("t5", T5_TEXTS),
    "t5_python_text": ("t5", T5_TEXTS),
}


@pytest.mark.parametrize("model", FAMILIES)
def test_text_is_tokenizer_plus_model_by_hand(server: TritonServer, by_hand: Any, model: str) -> None:
    family, texts = FAMILIES[model]
    expected = [by_hand(family, text) for text in texts]
    assert len(set(expected)) == len(texts)  # a model that answers all alike would prove nothing
    assert [generate(server, model, text_input=text, max_tokens=STEPS) for text in texts] == expected


def test_max_tokens_may_be_left_out(server: TritonServer, by_hand: Any) -> None:
    assert generate(server, "t5_text", text_input="hello") == by_hand("t5", "hello", 64)
    assert len(by_hand("t5", "hello", 64)) > len(by_hand("t5", "hello", 12))


def strings(name: str, rows: list[list[str]]) -> Any:
    (tensor,) = tensors({name: np.array([[text.encode() for text in row] for row in rows], object)})
    return tensor


def numbers(name: str, values: list[int]) -> Any:
    (tensor,) = tensors({name: np.array(values, np.int32).reshape(-1, 1)})
    return tensor


@pytest.mark.parametrize("model", ["t5_text", "gpt2_text", "t5_python_text"])
def test_unequal_texts_of_one_request(client: Any, by_hand: Any, model: str) -> None:
    family, texts = FAMILIES[model]
    response = client.infer(model, [strings("text_input", [[text] for text in texts]), numbers("max_tokens", [9] * 3)])
    found = response.as_numpy("text_output")
    assert found.shape == (3, 1)
    assert [text.decode() for text in found[:, 0]] == [by_hand(family, text) for text in texts]


def test_preprocessing_pads_to_one_width(client: Any, example: Path) -> None:
    """Padding id, lengths, the end token of an encoder's input, and words as FasterTransformer's kernels read them."""
    pieces = SentencePieceProcessor(model_file=str(example / "spiece.model"))
    words = ["fonts", "a library"]
    request = [strings("QUERY", [[text] for text in T5_TEXTS[:2]]), strings("BAD_WORDS_DICT", [words, ["", ""]])]
    response = client.infer("t5_preprocessing", request)
    first, second = ([*pieces.encode(text), 1] for text in T5_TEXTS[:2])
    assert len(second) < len(first)
    expected = [first, [*second, *[0] * (len(first) - len(second))]]
    assert response.as_numpy("INPUT_ID").tolist() == expected
    assert response.as_numpy("INPUT_ID").dtype == np.uint32
    assert response.as_numpy("REQUEST_INPUT_LEN").tolist() == [[len(first)], [len(second)]]
    assert response.as_numpy("REQUEST_OUTPUT_LEN").tolist() == [[64], [64]]
    one, two = (pieces.encode(word) for word in words)
    nothing = [-1] * (len(one) + len(two))
    bad = response.as_numpy("BAD_WORDS_IDS")
    assert bad[0].tolist() == [[*one, *two], [len(one), len(one) + len(two), *nothing[2:]]]
    assert bad[1, 1].tolist() == nothing
    assert response.as_numpy("STOP_WORDS_IDS").tolist() == [[[0], [-1]]] * 2


def test_preprocessing_starts_a_decoders_prompt_and_does_not_end_it(client: Any) -> None:
    response = client.infer("gpt2_trt_preprocessing", [strings("QUERY", [["ab"]])])
    assert response.as_numpy("INPUT_ID").tolist() == [[START, 0, 1]]
    assert response.as_numpy("OUT_END_ID").tolist() == [[END]]


def test_a_stream_is_the_whole_text_in_pieces(server: TritonServer, by_hand: Any) -> None:
    """A token that is half a character is held back until it is whole, or known never to be."""
    texts = ""
    for prompt in GPT2_TEXTS:
        lines = post(server, "gpt2_trt_bls", "generate_stream", text_input=prompt, max_tokens=30, stream=True)
        parts = [json.loads(line.removeprefix("data: "))["text_output"] for line in lines.splitlines() if line]
        whole = by_hand("gpt2", prompt, 30)
        assert "".join(parts) == whole
        assert 10 < len(parts) <= len(whole)
        texts += whole
    assert "é" in texts


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("model", ["t5_text", "gpt2_trt_bls"])
def test_evaluate_asks_in_text(
    tmp_path: Path, server: TritonServer, repository: Path, by_hand: Any, model: str, protocol: str
) -> None:
    """Whole or as a stream, and it knows whose weights answered: those of the model between the two others."""
    family, texts = FAMILIES[model]
    rows = [{"id": text, "document": text, "summary": by_hand(family, text)} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    port = server.grpc_port if protocol == "grpc" else server.http_port
    results, samples = evaluated(
        tmp_path / "out",
        endpoint=f"{'' if protocol == 'grpc' else 'http://'}127.0.0.1:{port}",
        protocol=protocol,
        model=model,
        dataset=tmp_path / "rows.jsonl",
        prompt="{document}",
        max_output_tokens=STEPS,
        stream=model.endswith("_bls"),
    )
    assert [sample.prediction for sample in samples] == [row["summary"] for row in rows]
    assert [bool(sample.arrivals_s) for sample in samples] == [model.endswith("_bls")] * len(texts)
    weights = parsed(repository, model.rpartition("_")[0]).parameters["manifest_sha256"]
    assert results["model"]["manifest_sha256"] == weights.string_value
    assert results["throughput"]["output_tokens_per_s"] is None  # nobody counted them: no tokenizer was given
    assert set(results["server"]) >= {model, model.rpartition("_")[0]}


@pytest.mark.parametrize(
    ("model", "body", "told"),
    [
        ("t5_text", {"text_input": "a", "temperature": -1.0}, "temperature"),
        ("gpt2_text", {"text_input": "a", "max_tokens": 3, "temperature": -1.0}, "temperature"),
        ("gpt2_trt_bls", {"text_input": "a", "beam_width": 2}, "beam_width"),
        ("t5_trt_text", {"text_input": "a", "max_tokens": 0}, "request_output_len"),
        ("gpt2_text", {"text_input": "a1"}, "gives id 29 for 'a1', the model knows 0 to 28: it is another model's"),
    ],
)
def test_what_is_refused_is_told_by_name(server: TritonServer, model: str, body: dict[str, Any], told: str) -> None:
    """Sampling inputs reach the model: what it does with them is its own affair."""
    with pytest.raises(urllib.error.HTTPError) as error:
        post(server, model, **body)
    assert told in error.value.read().decode()


def test_the_dashboard_asks_for_metrics_that_triton_tells(server: TritonServer) -> None:
    generate(server, "t5_text", text_input=T5_TEXTS[0], max_tokens=1)  # a counter is told from the first request on
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as answer:
        metrics = answer.read().decode()
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", metrics, re.MULTILINE))
    told = {
        name: (kind, set(re.findall(r'(\w+)="', " ".join(re.findall(rf"^{name}\{{(.*)\}}", metrics, re.MULTILINE)))))
        for name, kind in kinds.items()
    }
    asked = [dashboard.asked(part) for part in dashboard.parts(dashboard.board())]
    for name, kind, labels in asked:
        found_kind, found_labels = (told | dashboard.GPU | dashboard.ISTIO)[name]
        assert kind == found_kind, name
        assert labels <= found_labels | dashboard.OF_THE_POD, name
    assert len({name for name, _, _ in asked} & set(told)) > 8


# ---------------------------------------------------------------------------------------------------------- the trees


def parsed(repository: Path, name: str) -> ModelConfig:
    return config.parse((repository / name / "config.pbtxt").read_text(), name)


def test_only_models_of_one_width_are_handed_requests_together(tmp_path: Path, example: Path, repository: Path) -> None:
    """Unequal ones go to a model that takes them so; TensorRT-LLM takes the padding of a single row for prompt."""
    assert parsed(repository, "gpt2").HasField("dynamic_batching")
    for name in ("t5", "gpt2", "t5_trt", "gpt2_trt"):
        assert not parsed(repository, f"{name}_preprocessing").HasField("dynamic_batching")
    command = (*BUILD, "fastertransformer", "--set", "max_queue_delay_microseconds=100", "--set", "max_tokens=5")
    result = ftconvert(*command, "--tokenizer", example / "spiece.model", repository, tmp_path)
    assert result.exit_code == 65, result.stderr  # the repository holds several models with weights
    result = ftconvert(*command, "--tokenizer", example / "spiece.model", repository / "t5", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert parsed(tmp_path, "t5").dynamic_batching.max_queue_delay_microseconds == 100
    assert parsed(tmp_path, "t5_preprocessing").HasField("dynamic_batching")
    assert parsed(tmp_path, "t5_preprocessing").parameters["max_tokens"].string_value == "5"
    # the text models beside the one with weights are no reason to ask which is meant
    assert ftconvert("verify", tmp_path).exit_code == 0


def test_validate_has_nothing_to_say(repository: Path) -> None:
    """Warm-up samples are in two of them; some have been served."""
    assert validate(str(repository)) == []


def test_every_model_has_its_files(repository: Path, sources: dict[str, Path]) -> None:
    # Python leaves its bytecode beside what it has served
    found = {name: data for name, data in tree(repository).items() if "/__pycache__/" not in name}
    scripts = {name: {"model.py", "text.py"} for name in ("preprocessing", "postprocessing", "bls")}
    for model, tokenizer in (("t5", "spiece.model"), ("gpt2", "tokenizer.json"), ("gpt2_trt", "tokenizer.json")):
        for part in ("preprocessing", "postprocessing", *(["bls"] if "trt" in model else [])):
            folder = f"{model}_{part}/"
            names = {name.removeprefix(folder) for name in found if name.startswith(folder)}
            assert names == {"config.pbtxt", *(f"1/{name}" for name in scripts[part]), f"1/tokenizer/{tokenizer}"}
            source = sources[model.removesuffix("_trt")] / tokenizer
            assert found[f"{folder}1/tokenizer/{tokenizer}"] == source.read_bytes()
        assert {name for name in found if name.startswith(f"{model}_text/")} == {
            f"{model}_text/config.pbtxt",
            f"{model}_text/1/.keep",  # a bucket has no empty folders
        }


@pytest.mark.parametrize("model", ["t5", "gpt2", "t5_trt", "gpt2_trt"])
def test_the_chain_fits(repository: Path, model: str) -> None:
    """Types agree from step to step, nothing is declared twice, and every required input is given."""
    ensemble = parsed(repository, f"{model}_text")
    steps = ensemble.ensemble_scheduling.step
    names = [f"{model}_preprocessing", model, f"{model}_postprocessing"]
    assert [(step.model_name, step.model_version) for step in steps] == [(name, -1) for name in names]
    assert list(ensemble.version_policy.specific.versions) == [1]
    types = {tensor.name: tensor.data_type for tensor in ensemble.input}
    assert len(types) == len(ensemble.input)
    assert [tensor.name for tensor in ensemble.input if not tensor.optional] == ["text_input"]
    for step in steps:
        one = parsed(repository, step.model_name)
        assert one.max_batch_size == ensemble.max_batch_size
        for tensor in one.input:
            assert tensor.optional or tensor.name in step.input_map
            if tensor.name in step.input_map:
                assert types[step.input_map[tensor.name]] == tensor.data_type
        outputs = {tensor.name: tensor.data_type for tensor in one.output}
        types |= {public: outputs[inner] for inner, public in step.output_map.items()}
    assert [(tensor.name, DataType.Name(types[tensor.name])) for tensor in ensemble.output] == [
        ("text_output", "TYPE_STRING")
    ]


def test_the_models_own_ids_stand_in_the_config(repository: Path) -> None:
    def stated(name: str) -> dict[str, str]:
        return {key: value.string_value for key, value in parsed(repository, name).parameters.items()}

    ids = {"end_id": "1", "pad_id": "0", "start_id": "0"}
    assert ids.items() <= stated("t5_preprocessing").items()
    assert {"has_encoder": "false", "end_id": "7", "pad_id": "7"}.items() <= stated("gpt2_preprocessing").items()
    assert stated("gpt2_postprocessing") == {"end_id": "7"}
    assert stated("gpt2_trt_postprocessing") == {"end_id": "-1"}  # its answers hold none, and a request may choose


def test_warmup_is_a_real_sample(repository: Path, sources: dict[str, Path]) -> None:
    (sample,) = parsed(repository, "gpt2").model_warmup
    ids = np.frombuffer((repository / "gpt2" / "warmup" / "input_ids").read_bytes(), np.uint32)
    letters = Tokenizer.from_file(str(sources["gpt2"] / "tokenizer.json"))
    assert ids[0] == START
    assert letters.decode(ids[1:].tolist()) == "The quick brown fox jumps over the lazy dog.".translate(
        {ord(character): None for character in "Tzy."}
    )
    assert list(sample.inputs["input_ids"].dims) == [len(ids)]
    assert set(sample.inputs) == {"input_ids", "input_lengths", "request_output_len"}


# ------------------------------------------------------------------------------------------------- running it again


@pytest.fixture
def gpt2(sources: dict[str, Path]) -> tuple[object, ...]:
    return ("hf-to-ft", "--tokenizer", sources["gpt2"], "--name", "g", sources["gpt2"])


@pytest.mark.parametrize("killed", range(1, 5))
def test_a_killed_run_is_finished_by_the_same_command(
    tmp_path: Path, gpt2: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    """Killed while config.pbtxt files are written: the model's, those of its parts, the ensemble's."""
    assert ftconvert(*gpt2, tmp_path / "a").exit_code == 0
    written = []

    def write(storage: LocalStorage, name: str, data: bytes) -> None:
        if name == "config.pbtxt":
            written.append(storage.name)
            if len(written) == killed:
                raise KeyboardInterrupt
        original(storage, name, data)

    original = LocalStorage.write
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write", write)
        assert ftconvert(*gpt2, tmp_path / "b").exit_code == 130
    assert written == ["g", "g_preprocessing", "g_postprocessing", "g_text"][:killed]
    assert not (tmp_path / "b" / "g_text" / "config.pbtxt").exists()
    result = ftconvert(*gpt2, tmp_path / "b")
    assert result.exit_code == 0, result.stderr
    assert tree(tmp_path / "b") == tree(tmp_path / "a")


def test_overwrite_replaces_the_text_models_too(tmp_path: Path, gpt2: tuple[object, ...]) -> None:
    assert ftconvert(*gpt2, tmp_path).exit_code == 0
    before = tree(tmp_path)
    bytecode = tmp_path / "g_preprocessing" / "1" / "__pycache__" / "model.cpython-311.pyc"
    bytecode.parent.mkdir()  # it has been served
    bytecode.write_text("")
    assert "found a finished conversion" in refused(73, *gpt2, tmp_path)
    (tmp_path / "g_text" / "2").mkdir()
    (tmp_path / "g_text" / "2" / "old").write_text("")
    assert "g_text: expected nothing there, found 2/old" in refused(73, *gpt2, tmp_path)
    assert ftconvert(*gpt2, tmp_path, "--overwrite").exit_code == 0
    assert tree(tmp_path) == before
    assert not (tmp_path / "g_text" / "2").exists()  # Triton takes an empty folder for a version


def test_models_that_are_there_are_left_alone(tmp_path: Path, gpt2: tuple[object, ...]) -> None:
    (tmp_path / "g_text").mkdir()
    (tmp_path / "g_text" / "notes.txt").write_text("mine")
    assert "g_text: expected nothing there, found notes.txt" in refused(73, *gpt2, tmp_path)
    assert "this is none: notes.txt" in refused(73, *gpt2, tmp_path, "--overwrite")
    assert tree(tmp_path) == {"g_text/notes.txt": b"mine"}  # told before anything was converted


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path: Path, sources: dict[str, Path]) -> None:
    command = ("hf-to-ft", "--name", "g", sources["gpt2"], tmp_path / "models", "--tokenizer")
    assert "no such tokenizer" in refused(66, *command, tmp_path / "nowhere")
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "vocab.json").write_text("{}")
    assert "found vocab.json. transformers writes a tokenizer.json" in refused(65, *command, tmp_path / "slow")
    (tmp_path / "tokenizer.json").write_text('{"vocab": {}}')
    assert "found no `model` in it" in refused(65, *command, tmp_path / "tokenizer.json")
    made = ftconvert("hf-to-ft", "--layout", "weights", sources["gpt2"], tmp_path / "weights")
    assert made.exit_code == 0, made.stderr
    build = (*BUILD, "fastertransformer", tmp_path / "weights", tmp_path / "models", "--set", "warmup=true")
    assert "it is another model's tokenizer" in refused(65, *build, "--tokenizer", sources["t5"])
    (tmp_path / "spiece.model").write_text("no protobuf")
    assert "expected a tokenizer" in refused(65, *build, "--tokenizer", tmp_path / "spiece.model")
    bare = refused(78, *command, sources["gpt2"], "--layout", "weights")
    assert "repository build" in bare
    assert not (tmp_path / "models").exists()


def test_a_sentencepiece_model_starts_texts_as_it_says(tmp_path: Path) -> None:
    """LLaMA's tokenizer.model has a start token; T5's has none."""
    from sentencepiece import SentencePieceTrainer

    sentences = iter(["a cab feeds a bad face", "deaf dad fed a bee"] * 9)
    with (tmp_path / "tokenizer.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=file, vocab_size=20, hard_vocab_limit=False, minloglevel=2
        )
    tokenizer = text.load(tmp_path)
    assert tokenizer.start("a bee", 2) == [1, *tokenizer.pieces("a bee")]
    assert tokenizer.decode([1, *tokenizer.pieces("a bee"), 2]) == "a bee"
