"""TensorRT-LLM checkpoints behind the real Triton, one repository and one server for all of them, on a CPU.

What is right is what transformers' own greedy `generate` gives for the source model and one prompt alone, without the
end token: the real backend never sends it.
"""

from __future__ import annotations

import json
import queue
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import asking
import numpy as np
import pytest
import tiny
import torch
import tritonclient.grpc as triton
from asking import padded, tensors
from conftest import ftconvert
from evaluated import evaluate, evaluated
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from converter.errors import IncompleteError, SourceError
from model_repository.backends.generation import Row, generate
from model_repository.backends.sampling import TENSORRT_LLM, Sampling
from model_repository.server import TritonServer


def t5(folder: Path) -> Path:
    """A tied T5 as a Hugging Face folder."""
    source = tiny.t5x_checkpoint(folder / "t5x", seed=4)
    result = ftconvert("jax-to-hf", "--model", "ul2", source, folder / "t5")
    assert result.exit_code == 0, result.stderr
    return folder / "t5"


def umt5(folder: Path) -> Path:
    """An umT5 with another table of positions in every layer."""
    sizes = tiny.T5(tied=False)
    gin = tiny.t5_gin(sizes).replace("silu", "gelu")
    tiny.write_t5x(folder / "scanned", tiny.umt5_arrays(sizes, seed=8), gin=gin)
    result = ftconvert("jax-to-hf", "--model", "umt5", folder / "scanned", folder / "umt5")
    assert result.exit_code == 0, result.stderr
    return folder / "umt5"


# Another family is one line here: how to save it as a Hugging Face model.
FAMILIES = {
    "t5": t5,
    "umt5": umt5,
    "gpt2": lambda folder: tiny.gpt2(seed=3).save(folder / "gpt2"),
    "gptneox": lambda folder: tiny.gptneox(seed=3, intermediate_size=128, vocab_size=30).save(folder / "gptneox"),
    "llama": lambda folder: tiny.llama(seed=3).save(folder / "llama"),
    "mistral": lambda folder: tiny.mistral(seed=3, sliding_window=6).save(folder / "mistral"),
    "qwen2": lambda folder: tiny.qwen2(seed=3).save(folder / "qwen2"),
    "gemma": lambda folder: tiny.gemma(seed=3, vocab_size=30).save(folder / "gemma"),
    "gemma2": lambda folder: tiny.gemma2(seed=3, vocab_size=30).save(folder / "gemma2"),
}
WITH_ENCODER = ("t5", "umt5")
# Each is served decoupled, which also answers in one piece; some not, too, and all of them in `make test-slow`: a model
# is a process that imports torch.
UNARY = ("t5", "gpt2")
PROMPTS = [[4, 9, 3, 12], [17], [21, 11, 8, 23, 26, 6, 14, 10]]
STEPS = 9
LONG = 10_000  # steps that nobody waits for

each_family = pytest.mark.parametrize("name", FAMILIES)
each_unary = pytest.mark.parametrize(
    "name", [name if name in UNARY else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: save(folder) for name, save in FAMILIES.items()}


@pytest.fixture(scope="module")
def networks(sources: dict[str, Path]) -> dict[str, Any]:
    """The source models, opened by transformers itself."""
    found = {}
    for name, source in sources.items():
        auto = AutoModelForSeq2SeqLM if name in WITH_ENCODER else AutoModelForCausalLM
        found[name] = auto.from_pretrained(source, dtype=torch.float32).eval()
    return found


@pytest.fixture(scope="module")
def checkpoints(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same models as TensorRT-LLM checkpoints of two ranks."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, source in sources.items():
        result = ftconvert("hf-to-trtllm", "-t", 2, source, folder / name)
        assert result.exit_code == 0, result.stderr
    return {name: folder / name for name in sources}


@pytest.fixture(scope="module")
def repository(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """Each family decoupled, under `<name>_stream`; some, or with `-m slow` all, also not, under their own names."""
    unary = FAMILIES if request.config.option.markexpr == "slow" else UNARY
    folder = tmp_path_factory.mktemp("repository")
    build = ("repository", "build", "--backend", "tensorrtllm")
    for name, checkpoint in checkpoints.items():
        commands = [("--name", f"{name}_stream", "--decoupled")]
        commands += [("--name", name)] if name in unary else []
        for options in commands:
            result = ftconvert(*build, *options, checkpoint, folder)
            assert result.exit_code == 0, result.stderr
    for name in ("t5", "gpt2"):
        result = ftconvert(*build, "--name", f"{name}_beams", checkpoints[name], folder)
        assert result.exit_code == 0, result.stderr
        config = folder / f"{name}_beams" / "config.pbtxt"
        one = 'key: "max_beam_width"\n  value {\n    string_value: "1"'
        assert one in config.read_text()
        config.write_text(config.read_text().replace(one, one.replace('"1"', '"3"')))
    return folder


DTYPES = {
    "exclude_input_in_output": np.bool_,
    "streaming": np.bool_,
    "return_log_probs": np.bool_,
    "return_num_input_tokens": np.bool_,
    "return_num_output_tokens": np.bool_,
    "stop": np.bool_,
    "temperature": np.float32,
    "runtime_top_p": np.float32,
    "len_penalty": np.float32,
    "seed": np.uint64,
    "lora_task_id": np.uint64,
}


def inputs(name: str, prompts: list[list[int]], **values: Any) -> list[Any]:
    """The tensors of one request with these prompts, padded; a value is one number for all of them, or an array."""
    ids = padded(prompts, np.int32, 28)  # the padding is no token to be seen
    arrays = {"input_ids": ids, "input_lengths": np.array([[len(prompt)] for prompt in prompts], np.int32)}
    started = {"pad_id": 0} if name.removesuffix("_stream") in WITH_ENCODER else {}
    for key, value in {"request_output_len": STEPS, **started, **values}.items():
        dtype = DTYPES.get(key, np.int32)
        arrays[key] = value if isinstance(value, np.ndarray) else np.full((len(prompts), 1), value, dtype)
    return tensors({key: array for key, array in arrays.items() if array is not None})


def ids_of(response: Any) -> list[int]:
    """output_ids [1, 1, n], exactly as long as sequence_length [1, 1] says."""
    ids, lengths = response.as_numpy("output_ids"), response.as_numpy("sequence_length")
    assert ids.dtype == lengths.dtype == np.int32
    assert (ids.shape, lengths.shape) == ((1, 1, lengths[0, 0]), (1, 1))
    return list(ids[0, 0].tolist())


def infer(client: Any, name: str, prompt: list[int], **values: Any) -> list[int]:
    """One response for one prompt."""
    return ids_of(client.infer(name, inputs(name, [prompt], **values)))


def streamed(address: str, name: str, prompts: list[list[int]], **values: Any) -> list[Any]:
    """All responses to one request."""
    return asking.streamed(address, name, inputs(name, prompts, **values))


def alone(network: Any, prompt: list[int], steps: int = STEPS, end: int | None = None, start: int = 0) -> list[int]:
    """What transformers generates for one prompt without padding; neither the prompt nor the end token."""
    ids = torch.tensor([prompt])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": steps, "eos_token_id": end, "pad_token_id": 0}
    first = 1
    if network.config.is_encoder_decoder:
        options |= {"decoder_start_token_id": start, "use_cache": False}
    else:
        first = len(prompt)
    network.generation_config.eos_token_id = None
    output = network.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, first:].tolist()
    return list(output[:-1] if output[-1] == end else output)


def third(network: Any, prompt: list[int]) -> int:
    """The third id that the model generates: as an end token it ends the answer early."""
    return alone(network, prompt)[2]


@each_family
def test_streamed_tokens_joined_are_what_transformers_generates(address: str, networks: Any, name: str) -> None:
    model = f"{name}_stream"
    expected = [alone(networks[name], prompt) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in expected}) == 3  # a model that answers all alike would prove nothing
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        assert len(ids) == STEPS  # without an end_id nothing ends it
        responses = streamed(address, model, [prompt], streaming=True)
        assert [ids_of(response) for response in responses] == [[id] for id in ids]
        (whole,) = streamed(address, model, [prompt])
        assert ids_of(whole) == ids
        # a stream never begins with the prompt, whatever is asked for
        repeated = streamed(address, model, [prompt], streaming=True, exclude_input_in_output=False)
        assert [ids_of(response) for response in repeated] == [[id] for id in ids]


@each_family
def test_a_stream_that_its_end_token_ends_closes_without_ids(address: str, networks: Any, name: str) -> None:
    end = third(networks[name], PROMPTS[1])
    expected = alone(networks[name], PROMPTS[1], end=end)
    assert len(expected) < 3
    responses = streamed(address, f"{name}_stream", [PROMPTS[1]], streaming=True, end_id=end)
    assert [ids_of(response) for response in responses] == [*([id] for id in expected), []]
    (whole,) = streamed(address, f"{name}_stream", [PROMPTS[1]], end_id=end)
    assert ids_of(whole) == expected


@each_unary
def test_one_response_is_what_transformers_generates(client: Any, networks: Any, name: str) -> None:
    for prompt in PROMPTS:
        assert infer(client, name, prompt) == alone(networks[name], prompt)
        end = third(networks[name], prompt)
        assert infer(client, name, prompt, end_id=end) == alone(networks[name], prompt, end=end)
        assert infer(client, name, prompt, end_id=-1, request_output_len=4) == alone(networks[name], prompt, 4)


@each_unary
def test_clients_of_their_own_get_answers_of_their_own(client: Any, networks: Any, name: str) -> None:
    asked = [(PROMPTS[i % 3][: 1 + i], 1 + i % 5) for i in range(8)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda row: infer(client, name, row[0], request_output_len=row[1]), asked))
    assert answers == [alone(networks[name], *row) for row in asked]


@each_unary
def test_the_prompt_stands_in_front_where_a_request_asks_for_it(client: Any, networks: Any, name: str) -> None:
    """Of an encoder-decoder model that is what its decoder starts with."""
    prompt, answer = PROMPTS[0], alone(networks[name], PROMPTS[0])
    front = [0] if name in WITH_ENCODER else prompt
    assert infer(client, name, prompt, exclude_input_in_output=False) == [*front, *answer]
    counts = {"return_num_input_tokens": True, "return_num_output_tokens": True}
    for excluded in (True, False):
        asked = inputs(name, [prompt], exclude_input_in_output=excluded, **counts)
        response = client.infer(name, asked)
        assert response.as_numpy("num_input_tokens").tolist() == [[len(front)]]
        assert response.as_numpy("num_output_tokens").tolist() == [[STEPS + (0 if excluded else len(front))]]


def test_the_decoder_starts_with_its_own_ids_or_with_the_padding(client: Any, networks: Any) -> None:
    expected = {start: alone(networks["t5"], PROMPTS[2], start=start) for start in (0, 7)}
    assert expected[0] != expected[7]
    for values in ({"pad_id": 7}, {"decoder_input_ids": 7}, {"decoder_input_ids": 7, "decoder_input_lengths": 1}):
        assert infer(client, "t5", PROMPTS[2], **values) == expected[7]
    assert infer(client, "t5", PROMPTS[2], pad_id=7, exclude_input_in_output=False) == [7, *expected[7]]


@each_family
def test_each_row_of_a_request_is_answered_for_itself(address: str, networks: Any, name: str) -> None:
    expected = [alone(networks[name], prompt) for prompt in PROMPTS]
    responses = streamed(address, f"{name}_stream", PROMPTS)
    assert [response.as_numpy("batch_index").tolist() for response in responses] == [[[0]], [[1]], [[2]]]
    assert [ids_of(response) for response in responses] == expected
    rows: list[list[int]] = [[], [], []]
    ends = np.array([[third(networks[name], prompt)] for prompt in PROMPTS], np.int32)
    for response in streamed(address, f"{name}_stream", PROMPTS, streaming=True, end_id=ends):
        rows[response.as_numpy("batch_index")[0, 0]] += ids_of(response)
    assert rows == [alone(networks[name], prompt, end=ends[i, 0]) for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_each_row_is_sampled_in_its_own_way_and_streamed_alike(address: str, networks: Any, name: str) -> None:
    start = {"start_id": 0} if name in WITH_ENCODER else {"start_id": None}
    values = [
        Sampling(top_k=5, temperature=2.0, seed=3),
        Sampling(presence_penalty=2.0, frequency_penalty=0.5),
        Sampling(top_p=0.5, repetition_penalty=2.0, seed=2**63, min_length=4),
    ]
    columns = {
        "runtime_top_k": np.array([[5], [0], [0]], np.int32),
        "runtime_top_p": np.array([[0], [0], [0.5]], np.float32),
        "temperature": np.array([[2], [1], [1]], np.float32),
        "presence_penalty": np.array([[0], [2], [0]], np.float32),
        "frequency_penalty": np.array([[0], [0.5], [0]], np.float32),
        "repetition_penalty": np.array([[1], [1], [2]], np.float32),
        "min_tokens": np.array([[0], [0], [4]], np.int32),
        "seed": np.array([[3], [0], [2**63]], np.uint64),
    }
    asked = [Row(ids, STEPS, end_id=999, sampling=one, **start) for ids, one in zip(PROMPTS, values, strict=True)]
    expected = [one for (one,) in generate(networks[name], asked, TENSORRT_LLM)]
    whole = streamed(address, f"{name}_stream", PROMPTS, return_log_probs=True, **columns)
    assert [ids_of(response) for response in whole] == [answer.ids for answer in expected]
    for response, answer in zip(whole, expected, strict=True):
        assert response.as_numpy("cum_log_probs")[0] == pytest.approx([answer.cum_log_prob], abs=1e-3)
        assert response.as_numpy("output_log_probs")[0, 0] == pytest.approx(answer.log_probs, abs=1e-3)
    for i, prompt in enumerate(PROMPTS):
        own = {key: array[i : i + 1] for key, array in columns.items()}
        pieces = streamed(address, f"{name}_stream", [prompt], streaming=True, return_log_probs=True, **own)
        assert [ids_of(piece) for piece in pieces] == [[id] for id in expected[i].ids]
        # every piece has the log-probs of all so far
        assert [piece.as_numpy("output_log_probs").shape for piece in pieces] == [(1, 1, n + 1) for n in range(STEPS)]
        assert pieces[-1].as_numpy("cum_log_probs")[0] == pytest.approx([expected[i].cum_log_prob], abs=1e-3)


def test_a_stop_word_closes_a_stream_with_its_last_token(address: str, networks: Any) -> None:
    ids = alone(networks["gpt2"], PROMPTS[0])
    word = np.array([[ids[1:3], [2, -1]]], np.int32)
    pieces = streamed(address, "gpt2_stream", [PROMPTS[0]], streaming=True, stop_words_list=word)
    assert [ids_of(piece) for piece in pieces] == [[id] for id in ids[:3]]


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_beams_are_padded_and_without_end_tokens(client: Any, networks: Any, name: str) -> None:
    """`<name>_beams` has max_beam_width 3; an id that is in one of the beams alone ends it."""
    row = Row(PROMPTS[2], STEPS, 0 if name in WITH_ENCODER else None, 999, Sampling(beam_width=3, len_penalty=1.0))
    ((first, *_),) = generate(networks[name], [row], TENSORRT_LLM)
    end = first.ids[3]
    (expected,) = generate(networks[name], [replace(row, end_id=end)], TENSORRT_LLM)
    kept = [beam.ids[:-1] if beam.ids[-1] == end else beam.ids for beam in expected]
    asked = inputs(name, [PROMPTS[2]], beam_width=3, end_id=end, len_penalty=1.0, return_log_probs=True)
    response = client.infer(f"{name}_beams", asked)
    longest = max(map(len, kept))
    assert response.as_numpy("output_ids").tolist() == [[ids + [-1] * (longest - len(ids)) for ids in kept]]
    assert response.as_numpy("sequence_length").tolist() == [[*map(len, kept)]]
    assert response.as_numpy("cum_log_probs")[0] == pytest.approx([one.cum_log_prob for one in expected], abs=1e-3)
    assert response.as_numpy("output_log_probs").shape == (1, 3, longest)


def test_neutral_values_change_nothing(client: Any) -> None:
    no_words = np.array([[[0], [-1]]], np.int32)
    neutral = {"runtime_top_k": 1, "temperature": 1.0, "beam_width": 1, "seed": 7, "stop": False, "pad_id": 3}
    neutral |= {"return_log_probs": False, "bad_words_list": no_words, "stop_words_list": np.zeros((1, 2, 0), np.int32)}
    neutral |= {"embedding_bias": np.zeros((1, 0), np.float32), "streaming": False}
    assert infer(client, "gpt2", PROMPTS[0], **neutral) == infer(client, "gpt2", PROMPTS[0])


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("gpt2", {"streaming": True}, "streaming needs a decoupled model; build it with --decoupled"),
        ("gpt2", {"runtime_top_k": -1}, "'runtime_top_k'"),
        ("gpt2", {"runtime_top_p": 1.5}, "'runtime_top_p'"),
        ("gpt2", {"temperature": -0.5}, "'temperature'"),
        ("gpt2", {"beam_width": 4}, "'beam_width' is 4; this model has max_beam_width 1"),
        ("gpt2", {"num_return_sequences": 2}, "'num_return_sequences'"),
        ("gpt2", {"min_tokens": -1}, "'min_tokens'"),
        ("gpt2", {"stop": True}, "'stop'"),
        ("gpt2", {"lora_task_id": 1}, "'lora_task_id' is not supported"),
        ("gpt2", {"stop_words_list": np.array([[[7], [2]]], np.int32)}, "'stop_words_list'"),
        ("gpt2", {"bad_words_list": np.array([[[29], [1]]], np.int32)}, "a bad word has the id 29; expected 0 to 28"),
        ("gpt2", {"guided_decoding_guide": np.array([[b"{}"]], object)}, "'guided_decoding_guide' is not supported"),
        ("gpt2", {"decoder_input_ids": 7}, "'decoder_input_ids' is not supported"),
        ("gpt2", {"input_lengths": 0}, r"input_lengths is \[0\]; expected 1 to 4"),
        ("gpt2", {"input_lengths": 5}, r"input_lengths is \[5\]; expected 1 to 4"),
        ("gpt2", {"input_lengths": 3}, r"input_lengths is \[3\]; expected 4, the width of input_ids"),
        ("gpt2", {"request_output_len": 0}, r"request_output_len is \[0\]; expected at least 1"),
        ("gpt2", {"request_output_len": 16}, r"4 tokens and 16 more take 20 positions; this model has 19"),
        ("gpt2", {"end_id": 29}, r"end_id is \[29\]; expected -1, for none, to 28"),
        ("gpt2", {"input_ids": np.array([[1, 2, 29, 3]], np.int32)}, "29 is outside the vocabulary"),
        ("gpt2", {"input_ids": None}, "input_ids is missing"),
        ("t5", {"pad_id": None}, "decoder_input_ids and pad_id are both missing"),
        ("t5", {"pad_id": 50}, "50 is outside the vocabulary"),
        (
            "t5",
            {"decoder_input_ids": np.array([[0, 5]], np.int32)},
            r"decoder_input_ids is \[1, 2\]; expected \[1, 1\]",
        ),
        ("t5", {"decoder_input_ids": 0, "decoder_input_lengths": 2}, "decoder_input_lengths"),
    ],
)
def test_what_makes_no_sense_or_is_not_supported_is_refused(
    client: Any, name: str, values: dict[str, Any], told: str
) -> None:
    given = {key: value for key, value in values.items() if value is not None}
    asked = [tensor for tensor in inputs(name, [PROMPTS[0]], **given) if values.get(tensor.name(), 0) is not None]
    with pytest.raises(triton.InferenceServerException, match=told):
        client.infer(name, asked)


def test_several_rows_need_a_decoupled_model(client: Any) -> None:
    with pytest.raises(triton.InferenceServerException, match=r"has 3 rows, .* needs a decoupled model"):
        client.infer("gpt2", inputs("gpt2", PROMPTS))


def test_the_outputs_that_the_real_backend_insists_on_have_to_be_asked_for(client: Any) -> None:
    with pytest.raises(triton.InferenceServerException, match="sequence_length is not asked for"):
        client.infer("gpt2", inputs("gpt2", [PROMPTS[0]]), outputs=[triton.InferRequestedOutput("output_ids")])


def test_a_refusal_ends_a_stream(address: str) -> None:
    with pytest.raises(triton.InferenceServerException, match="'beam_width'"):
        streamed(address, "gpt2_stream", [PROMPTS[0]], streaming=True, beam_width=0)
    assert ids_of(streamed(address, "gpt2_stream", [PROMPTS[0]], streaming=True)[0])


def test_a_request_that_its_client_gave_up_ends(address: str) -> None:
    """A model answers one request after the other: the next one is answered when the one before has ended."""
    name, heard = "gptneox_stream", queue.Queue[Any]()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: heard.put(error or result))
        client.async_stream_infer(name, inputs(name, [PROMPTS[0]], streaming=True, request_output_len=LONG))
        for _ in range(3):
            assert len(ids_of(heard.get(timeout=60))) == 1
        client.stop_stream(cancel_requests=True)
    started = time.monotonic()
    assert ids_of(streamed(address, name, [PROMPTS[1]])[0])
    assert time.monotonic() - started < 10
    with triton.InferenceServerClient(address) as client:
        call = client.async_infer("t5", inputs("t5", [PROMPTS[0]], request_output_len=LONG), lambda result, error: None)
        time.sleep(0.5)
        call.cancel()
        started = time.monotonic()
        assert infer(client, "t5", PROMPTS[1])
        assert time.monotonic() - started < 10


LENGTHS = {"max_input_tokens": 9, "max_output_tokens": STEPS}


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_evaluate_scores_the_answer_alone(tmp_path: Path, address: str, networks: Any, name: str) -> None:
    """It sends the tokens that end and start; a decoder's prompt has no end token behind it, and is not given back."""
    end = third(networks[name], PROMPTS[1])
    size = networks[name].config.vocab_size
    tokens = ["</s>" if id == end else "<pad>" if id == 0 else f"w{id}" for id in range(size)]
    prompts = [[id for id in prompt if id != end] for prompt in PROMPTS]
    results, samples = evaluated(**asking.evaluating(tmp_path, address, name, tokens, prompts, **LENGTHS))
    assert results["model"]["manifest_sha256"]
    sent = [[*prompt, end] for prompt in prompts] if name in WITH_ENCODER else prompts
    assert [sample.input_tokens for sample in samples] == [len(ids) for ids in sent]
    assert [sample.output_ids for sample in samples] == [alone(networks[name], ids, end=end) for ids in sent]


def test_evaluate_needs_a_padding_token_where_the_decoder_starts_with_it(tmp_path: Path, address: str) -> None:
    tokens = ["</s>", *(f"w{id}" for id in range(1, 50))]
    done = evaluate(**asking.evaluating(tmp_path, address, "t5", tokens, PROMPTS, **LENGTHS))
    assert done.exit_code == 78
    assert "--tokenizer: expected a tokenizer with pad_id, which t5 has to be sent, found none" in done.stderr


@pytest.mark.parametrize("stream", [False, True])
def test_evaluate_reads_the_stream_of_a_decoupled_model(
    tmp_path: Path, address: str, networks: Any, stream: bool
) -> None:
    end = third(networks["t5"], PROMPTS[1])
    size = networks["t5"].config.vocab_size
    tokens = ["</s>" if id == end else "<pad>" if id == 0 else f"w{id}" for id in range(size)]
    prompts = [[id for id in prompt if id != end] for prompt in PROMPTS]
    asked = asking.evaluating(tmp_path, address, "t5_stream", tokens, prompts, **LENGTHS)
    _, samples = evaluated(**asked, stream=stream)
    assert [sample.output_ids for sample in samples] == [alone(networks["t5"], [*ids, end], end=end) for ids in prompts]
    pieces = [len(sample.output_ids) if stream else bool(sample.output_ids) for sample in samples]
    assert [len(sample.arrivals_s) for sample in samples] == pieces


DAMAGE = {
    "engine": "gpt_model_path .*/engine is an engine, .* build the model without --engine-dir",
    "no_checkpoint": "gpt_model_path .*/no_checkpoint: .* found a config.json that states no `architecture`",
    "nothing": "gpt_model_path .*/nothing: no config.json there; expected a TensorRT-LLM checkpoint",
    "cut": ".*/cut/rank0.safetensors",
    "manifest": "config.pbtxt does not fit .*/manifest",
    "cross": "cross_kv_cache_fraction belongs to encoder-decoder models, .* found gpt_model_path, cross_kv_cache",
    "swapped": "expected gpt_model_path and encoder_model_path to be decoder/ and encoder/ of one checkpoint",
}


def test_what_cannot_be_served_is_not(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """One server that tries to load all of them, and says of each what is wrong."""
    for name in DAMAGE:
        shutil.copytree(checkpoints["t5" if name == "swapped" else "gpt2"], tmp_path / name)
        build = ("repository", "build", "--backend", "tensorrtllm", "--name", name)
        result = ftconvert(*build, tmp_path / name, tmp_path / "models")
        assert result.exit_code == 0, result.stderr
    engine = {"pretrained_config": {"architecture": "GPT2LMHeadModel"}, "build_config": {}}
    (tmp_path / "engine" / "config.json").write_text(json.dumps(engine))
    (tmp_path / "no_checkpoint" / "config.json").write_text('{"model_type": "gpt2"}')
    shutil.rmtree(tmp_path / "nothing")
    weights = tmp_path / "cut" / "rank0.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    manifest = tmp_path / "manifest" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    cross, swapped = (tmp_path / "models" / name / "config.pbtxt" for name in ("cross", "swapped"))
    cross.write_text(cross.read_text().replace("kv_cache_free_gpu_mem_fraction", "cross_kv_cache_fraction"))
    paths = swapped.read_text().replace("/encoder", "/other").replace("/decoder", "/encoder")
    swapped.write_text(paths.replace("/other", "/decoder"))
    log = tmp_path / "triton.log"
    with pytest.raises((SourceError, IncompleteError)), TritonServer(tmp_path / "models", log_path=log):
        pass
    said = log.read_text()
    for told in DAMAGE.values():
        assert re.search(told, said), told
