"""vLLM's CPU stand-in behind the real Triton: text, streams, sampling parameters, adapters.

What is right is what transformers' `generate` gives for the ids of the text, made text by the tokenizer.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import tritonclient.grpc as triton
from asking import http, streamed, tensors
from broken.good import BUILD, run
from evaluated import evaluated
from networks import tiny_gpt2
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from converter.errors import FtconvertError
from model_repository.backends.generation import Row, generate
from model_repository.backends.sampling import VLLM, Sampling
from model_repository.backends.vllm.request import Asked, Text, asked
from model_repository.server import TritonServer

CHARACTERS = [chr(code) for code in range(33, 127)]
PROMPT, STEPS = "Once upon a time", 12
CONFIG = 'backend: "vllm"\ninstance_group [{ count: 1 kind: KIND_MODEL }]\n'


def tokenizer(letters: list[str]) -> PreTrainedTokenizerFast:
    """A token per byte; a blank is Ġ, as GPT-2 writes it."""
    vocab = {letter: id for id, letter in enumerate(["</s>", "Ġ", *letters])}
    made = Tokenizer(BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with a tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("source") / "llama"
    saved = tiny.llama(seed=5, vocab_size=len(CHARACTERS) + 2, eos_token_id=0).save(folder)
    tokenizer(CHARACTERS).save_pretrained(saved)
    return Path(saved)


@pytest.fixture(scope="module")
def adapters(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(source), config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("first", "second")}


def add(repository: Path, name: str, settings: dict[str, Any], adapters: dict[str, str] | None = None) -> None:
    version = repository / name / "1"
    version.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(CONFIG)
    (version / "model.json").write_text(json.dumps(settings))
    if adapters:
        (version / "multi_lora.json").write_text(json.dumps(adapters))


@pytest.fixture(scope="module")
def server(source: Path, adapters: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Serves what `repository build` made, with adapters, and with what only a GPU looks at."""
    folder = tmp_path_factory.mktemp("repository")
    values = {
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 2,
        "enforce_eager": True,
        "dtype": "bfloat16",
        "max_model_len": 64,
        "multi_lora": adapters,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 4},
    }
    options = [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    run(*BUILD, "vllm", "--name", "llm", *options, source, folder)
    with TritonServer(folder, log_path=folder.parent / "triton.log") as server:
        yield server
    logged = (folder.parent / "triton.log").read_text()
    ignored = "dtype, enforce_eager, gpu_memory_utilization, max_loras, speculative_config, tensor_parallel_size"
    assert f"not looked at on a CPU: {ignored}" in logged


def ask(server: TritonServer, text: str = PROMPT, sampling: Any = None, **flags: bool) -> list[Any]:
    """All responses to one request over a stream."""
    arrays = {"text_input": np.array([text.encode()], object)}
    if sampling is not None:
        arrays["sampling_parameters"] = np.array([json.dumps(sampling).encode()], object)
    arrays |= {name: np.array([value]) for name, value in flags.items()}
    return streamed(f"127.0.0.1:{server.grpc_port}", "llm", tensors(arrays))


def texts(responses: list[Any]) -> list[str]:
    return [response.as_numpy("text_output")[0].decode() for response in responses]


def generated(source: Path, adapter: str = "", text: str = PROMPT, **options: Any) -> tuple[list[int], str]:
    """What transformers generates: ids, and their text."""
    network, spoken = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        AutoTokenizer.from_pretrained(source),
    )
    network = PeftModel.from_pretrained(network, adapter).merge_and_unload() if adapter else network
    ids = torch.tensor([spoken.encode(text)])
    options = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": 0, "pad_token_id": 0, **options}
    found = network.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
    return found, spoken.decode(found, skip_special_tokens=True)


GREEDY = {"temperature": 0, "max_tokens": STEPS}


def test_a_stream_joined_is_the_answer_in_one_piece(server: TritonServer, source: Path) -> None:
    ids, expected = generated(source)
    assert len(set(ids)) > 3
    (whole,) = ask(server, sampling=GREEDY, exclude_input_in_output=True)
    assert texts([whole]) == [expected]
    assert texts(ask(server, sampling=GREEDY)) == [PROMPT + expected]  # by default the prompt stands in front
    pieces = texts(ask(server, sampling=GREEDY, stream=True))
    assert "".join(pieces) == expected
    assert len(pieces) == len(ids)
    with pytest.raises(triton.InferenceServerException, match="a stream never repeats its input"):
        ask(server, sampling=GREEDY, stream=True, exclude_input_in_output=False)


def test_triton_itself_refuses_unary_grpc(server: TritonServer) -> None:
    text = triton.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"a"], object))
    with (
        triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client,
        pytest.raises(triton.InferenceServerException, match="decoupled"),
    ):
        client.infer("llm", [text])


def test_generate_over_http_takes_parameters_beside_the_text(server: TritonServer, source: Path) -> None:
    def post(**body: Any) -> Any:
        return json.loads(http(server, "models/llm/generate", {"text_input": PROMPT, **body}))["text_output"]

    assert post(exclude_input_in_output=True, parameters=GREEDY) == generated(source)[1]
    assert post(exclude_input_in_output=True, sampling_parameters=json.dumps(GREEDY)) == generated(source)[1]
    with pytest.raises(urllib.error.HTTPError):
        post(parameters={"temperature": 9})


def test_counts_reasons_and_log_probs(server: TritonServer, source: Path) -> None:
    flags = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
    every = {f"return_{name}": True for name in flags}
    (whole,) = ask(server, sampling={**GREEDY, "logprobs": 2}, exclude_input_in_output=True, **every)
    ids, _ = generated(source)
    assert whole.as_numpy("finish_reason").tolist() == [b"length"]
    assert whole.as_numpy("num_input_tokens").tolist() == [len(PROMPT)]
    assert whole.as_numpy("num_output_tokens").tolist() == [len(ids)]
    told = json.loads(whole.as_numpy("logprobs")[0])
    network = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    whole_ids = torch.tensor([AutoTokenizer.from_pretrained(source).encode(PROMPT) + ids])
    expected = torch.log_softmax(network(whole_ids).logits[0, -len(ids) - 1 : -1], 1)
    own = expected.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    assert [step[str(id)]["logprob"] for step, id in zip(told, ids, strict=True)] == pytest.approx(own, abs=1e-4)
    assert [sorted(place["rank"] for place in step.values()) for step in told] == [[1, 2]] * len(ids)
    assert whole.as_numpy("cumulative_logprob")[0] == pytest.approx(sum(own), abs=1e-3)
    pieces = ask(server, sampling={**GREEDY, "logprobs": 2}, stream=True, **every)
    assert [piece.as_numpy("num_output_tokens").tolist() for piece in pieces] == [[1]] * len(ids)
    assert [json.loads(piece.as_numpy("logprobs")[0])[0] for piece in pieces] == told
    assert [piece.as_numpy("finish_reason")[0] for piece in pieces] == [b"None"] * (len(ids) - 1) + [b"length"]
    (plain,) = ask(server, sampling=GREEDY, **every)
    assert plain.as_numpy("logprobs").tolist() == [b"null"]
    assert np.isnan(plain.as_numpy("cumulative_logprob")).all()


def test_texts_and_ids_that_stop(server: TritonServer, source: Path) -> None:
    ids, expected = generated(source)
    stop = expected[4:6]
    before = expected[: expected.index(stop)]

    def found(stream: bool, **sampling: Any) -> tuple[str, bytes]:
        responses = ask(
            server,
            sampling={**GREEDY, **sampling},
            stream=stream,
            exclude_input_in_output=True,
            return_finish_reason=True,
        )
        return "".join(texts(responses)), responses[-1].as_numpy("finish_reason")[0]

    for stream in (False, True):
        assert found(stream, stop=[stop, "never there"]) == (before, b"stop")
        assert found(stream, stop=stop, include_stop_str_in_output=True) == (before + stop, b"stop")
        assert found(stream, stop_token_ids=[ids[3]]) == (expected[: ids.index(ids[3])], b"stop")
        assert found(stream, max_tokens=3) == (expected[:3], b"length")
        assert found(stream, max_tokens=500)[1] in (b"length", b"stop")  # as far as max_model_len
    assert found(False, bad_words=[expected[0]])[0][0] != expected[0]
    penalised = generated(source, repetition_penalty=3.0)[1]
    assert found(False, repetition_penalty=3.0)[0] == penalised != expected


def test_drawing_follows_the_seed(server: TritonServer) -> None:
    def drawn(**sampling: Any) -> str:
        return texts(ask(server, sampling={"max_tokens": STEPS, "temperature": 2.0, **sampling}))[0]

    assert drawn(seed=3) == drawn(seed=3) != drawn(seed=4)
    assert drawn() != drawn()
    assert drawn(top_k=1) == texts(ask(server, sampling=GREEDY))[0]


def test_each_adapter_is_a_model_of_its_own(server: TritonServer, source: Path, adapters: dict[str, str]) -> None:
    found = {
        name: texts(ask(server, sampling={**GREEDY, "lora_name": name}, exclude_input_in_output=True))[0]
        for name in (None, *adapters)
    }
    assert found == {name: generated(source, adapters.get(name or "", ""))[1] for name in (None, *adapters)}
    assert len(set(found.values())) == 3
    with pytest.raises(triton.InferenceServerException, match=r"LoRA third is not supported, .* \['first', 'second'\]"):
        ask(server, sampling={"lora_name": "third"})


def test_evaluate_reads_a_stream_of_text_without_the_prompt(
    tmp_path: Path, server: TritonServer, source: Path, adapters: dict[str, str]
) -> None:
    row = {"id": "a", "document": PROMPT, "summary": "s"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    asked = {"endpoint": f"127.0.0.1:{server.grpc_port}", "model": "llm", "dataset": tmp_path / "rows.jsonl"}
    asked |= {"prompt": "{document}", "max_output_tokens": STEPS, "tokenizer": source / "tokenizer.json"}
    for name, options in (("plain", {}), ("stream", {"stream": True}), ("adapter", {"parameter": "lora_name=first"})):
        results, [sample] = evaluated(tmp_path / name, **asked, **options)
        _, expected = generated(source, adapters["first"] if name == "adapter" else "")
        assert sample.prediction == expected
        assert len(sample.arrivals_s) > 1 or name != "stream"
        assert results["model"]["manifest_sha256"] is None  # vLLM opens the checkpoint itself: nothing was converted


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        ({"temperature": -1, "top_p": 0}, "'temperature' is -1: .*\n.*'top_p' is 0: expected more than 0, at most 1"),
        ({"best_of": 2}, "'best_of' is 2: no sampling parameter of vLLM"),
        ({"n": 2}, "'n' is 2: not supported yet; leave it out, or give 1"),
        ({"structured_outputs": "{}"}, "'structured_outputs'"),
        ({"logprobs": 30}, "expected at most max_logprobs, 20"),
        ({"min_tokens": 20}, "'min_tokens' is 20: expected at most max_tokens"),
        ({"stop_token_ids": [96]}, "'stop_token_ids' has 96; expected 0 to 95"),
    ],
)
def test_what_makes_no_sense_or_is_not_supported_is_refused(server: TritonServer, sampling: Any, told: str) -> None:
    with pytest.raises(triton.InferenceServerException, match=told):
        ask(server, sampling=sampling)


def test_a_prompt_has_to_leave_room(server: TritonServer) -> None:
    assert texts(ask(server, "a" * 63, GREEDY, exclude_input_in_output=True))
    with pytest.raises(triton.InferenceServerException, match="has 64 tokens; expected fewer than max_model_len, 64"):
        ask(server, "a" * 64, GREEDY)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"disable_log_requests": True, "mode1": 1}, "disable_log_requests.*mode1"),
    "quantized": ({"quantization": "awq"}, "quantization.*not supported on a CPU"),
    "nowhere": ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
    "unnamed": ({"model": None}, "the path of a Hugging Face folder"),
    "no_adapters": ({"enable_lora": "true"}, "multi_lora.json: no such file"),
    "low_rank": ({"enable_lora": True, "max_lora_rank": 2}, "first has rank 4; expected at most max_lora_rank, 2"),
}


def test_what_cannot_be_served_is_not(tmp_path: Path, source: Path, adapters: dict[str, str]) -> None:
    """One server that tries to load all of them, and says of each what is wrong."""
    for name, (settings, _) in BROKEN.items():
        add(tmp_path / "models", name, {"model": str(source), **settings}, adapters if name == "low_rank" else None)
    log = tmp_path / "triton.log"
    with pytest.raises(FtconvertError), TritonServer(tmp_path / "models", log_path=log):
        pass
    said = log.read_text()
    for _, told in BROKEN.values():
        assert re.search(told, said.replace("\\n", " ")), told


# ------------------------------------------------------------------------------------------------------ in process


def test_sampling_parameters_are_numbers_or_their_text() -> None:
    assert asked("") == asked('{"top_k": -1, "seed": -1, "stop": null}') == Asked(Sampling(top_p=1.0))
    given = {"temperature": "0.5", "top_k": "7", "min_p": 0.1, "seed": "3", "presence_penalty": -1, "min_tokens": 2}
    expected = Sampling(temperature=0.5, top_k=7, top_p=1.0, min_p=0.1, seed=3, presence_penalty=-1.0, min_length=2)
    assert asked(json.dumps(given)) == Asked(expected, seeded=True)
    assert asked('{"temperature": 0, "top_p": 0.5, "top_k": 9}').sampling == Sampling(top_k=1, top_p=1.0)
    assert asked('{"temperature": 0.001}').sampling.temperature == 0.01


@pytest.mark.parametrize("stop", [(), ("né",), ("à",), ("é ", "x")])
def test_pieces_of_a_text_are_never_taken_back(stop: tuple[str, ...]) -> None:
    spoken = tokenizer(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"Ġ"}))
    ids = spoken.encode("Hélène né à 😀 l'été", add_special_tokens=False)
    row = Row(spoken.encode("a"), len(ids), None, 0)
    text, sent = Text(Asked(Sampling(), stop=stop), row, spoken), ""
    for count in range(1, len(ids) + 1):
        goes_on = text.add(ids[:count])
        assert text.sure().startswith(sent)
        sent = text.sure()
        if not goes_on:
            break
    whole = "Hélène né à 😀 l'été"
    assert sent == whole[: min([whole.index(one) for one in stop if one in whole], default=len(whole))]
    assert text.finish_reason == ("stop" if stop else "length")


def test_min_tokens_forbid_all_that_stops() -> None:
    model = tiny_gpt2()
    ((plain,),) = generate(model, [Row([5, 6], 6, None, 96)], VLLM)
    sampling = Sampling(min_length=3, stop_words=((plain.ids[0],), (plain.ids[1],)))
    ((answer,),) = generate(model, [Row([5, 6], 6, None, 96, sampling)], VLLM)
    assert not {plain.ids[0], plain.ids[1]} & set(answer.ids[:3])
