"""The decoder-only families behind the real Triton, one repository and one server for all of them, on a CPU.

What is right is what transformers' own greedy `generate` gives for the source model and one prompt alone.
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import tritonclient.grpc as triton
from asking import evaluating, padded, tensors
from conftest import ftconvert
from evaluated import evaluated
from transformers import AutoModelForCausalLM

from converter.errors import SourceError
from model_repository.server import TritonServer

FAMILIES = {"gpt2": tiny.gpt2, "opt": tiny.opt, "bloom": tiny.bloom, "gptneox": tiny.gptneox, "gptj": tiny.gptj}
TABLES = ("gpt2", "opt", "gptj")  # positions end where a table does
POSITIONS = 19  # of every tiny model that has a table
PROMPTS = [[4, 9, 3, 12], [17], [21, 11, 8, 23, 26, 6, 14, 10]]
STEPS = 9
NEVER = 999  # an end id outside the vocabulary

each_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models as Hugging Face folders; the end token of each is what its second prompt meets at the third step."""
    folder = tmp_path_factory.mktemp("sources")
    found = {}
    for name, build in FAMILIES.items():
        endless = network(build(seed=3).save(folder / "endless" / name))
        end = alone(endless, PROMPTS[1], end=NEVER)[3]
        found[name] = build(seed=3, eos_token_id=end).save(folder / name)
    return found


def network(source: Path) -> Any:
    """The source model, opened by transformers itself."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def networks(sources: dict[str, Path]) -> dict[str, Any]:
    return {name: network(folder) for name, folder in sources.items()}


@pytest.fixture(scope="module")
def repository(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All families as `ftconvert` leaves them."""
    folder = tmp_path_factory.mktemp("repository")
    for name, source in sources.items():
        result = ftconvert("hf-to-ft", "--name", name, "-t", 2, source, folder)
        assert result.exit_code == 0, result.stderr
    return folder


def infer(client: Any, model: str, prompts: list[list[int]], width: int = 0, **columns: Any) -> Any:
    """Send one request with all prompts, padded; a column is one number for all of them, a list, or an array."""
    values = {"input_ids": padded(prompts, np.uint32, 28, width)}  # the padding is no token to be seen
    for name, value in {"input_lengths": [*map(len, prompts)], "request_output_len": STEPS, **columns}.items():
        column = value if isinstance(value, list) else [value] * len(prompts)
        values[name] = value if isinstance(value, np.ndarray) else np.array(column, np.uint32).reshape(-1, 1)
    return client.infer(model, tensors(values))


def rows(response: Any) -> list[list[int]]:
    """Each row up to its length: prompt and generated ids."""
    ids, lengths = response.as_numpy("output_ids"), response.as_numpy("sequence_length")
    return [row[0, :length].tolist() for row, length in zip(ids, lengths[:, 0], strict=True)]


def alone(network: Any, prompt: list[int], steps: int = STEPS, end: int | None = None) -> list[int]:
    """Prompt and what transformers generates after it, without padding."""
    ids = torch.tensor([prompt])
    end = network.config.eos_token_id if end is None else end
    output = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=steps,
        eos_token_id=end,
        pad_token_id=0,
    )
    return list(output[0].tolist())


@each_family
def test_a_batch_of_unequal_prompts_gives_each_row_its_own_answer(client: Any, networks: Any, name: str) -> None:
    expected = [alone(networks[name], prompt, end=NEVER) for prompt in PROMPTS]
    assert [len(ids) for ids in expected] == [len(prompt) + STEPS for prompt in PROMPTS]
    assert len({tuple(ids[-STEPS:]) for ids in expected}) == 3  # a model that answers all alike would prove nothing
    response = infer(client, name, PROMPTS, end_id=NEVER)
    assert rows(response) == expected
    ids = response.as_numpy("output_ids")
    assert (ids.dtype, ids.shape) == (np.uint32, (3, 1, 8 + STEPS))
    assert [row[0, len(whole) :].tolist() for row, whole in zip(ids, expected, strict=True)] == [
        [NEVER] * (8 - len(prompt)) for prompt in PROMPTS
    ]
    if name in ("gpt2", "opt", "bloom"):
        assert response.as_numpy("response_input_lengths").tolist() == [[4], [1], [8]]
        assert response.as_numpy("response_input_lengths").dtype == np.int32


@each_family
def test_generation_ends_at_the_models_own_end_token(client: Any, networks: Any, name: str) -> None:
    response = infer(client, name, [PROMPTS[1]])
    (expected,) = rows(response)
    end = networks[name].config.eos_token_id
    assert expected == alone(networks[name], PROMPTS[1])
    assert expected[-1] == end
    assert len(expected) <= 4
    assert set(response.as_numpy("output_ids")[0, 0, len(expected) :].tolist()) == {end}  # as far as the tensor goes


@each_family
def test_end_id_and_output_length_are_honoured_per_row(client: Any, networks: Any, name: str) -> None:
    steps = [3, 9, 0]
    ends = [NEVER, alone(networks[name], PROMPTS[1], end=NEVER)[3], 5]
    response = infer(client, name, PROMPTS, request_output_len=steps, end_id=ends, start_id=[0, 28, 4000])
    expected = [
        alone(networks[name], prompt, count, end) if count else prompt
        for prompt, count, end in zip(PROMPTS, steps, ends, strict=True)
    ]
    assert rows(response) == expected
    assert len(expected[0]) == 4 + 3
    assert len(expected[1]) < 1 + 9
    assert response.as_numpy("output_ids").shape == (3, 1, 8 + 9)


def settled(client: Any, name: str) -> Any:
    """What Triton has counted of a model; it counts a request a moment after it has answered it."""
    found, still = None, 0
    while still < 5:
        time.sleep(0.1)
        last, found = found, client.get_inference_statistics(name).model_stats[0]
        still = still + 1 if last == found else 0
    return found


@each_family
def test_clients_of_their_own_get_answers_of_their_own(client: Any, networks: Any, name: str) -> None:
    """Triton hands requests of unequal lengths over together, each as a request of its own."""
    random = np.random.default_rng(4)
    asked = [(random.integers(0, 28, length).tolist(), 1 + length % 5) for length in range(1, 10)]
    before = settled(client, name)
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda row: infer(client, name, [row[0]], request_output_len=row[1]), asked))
    after = settled(client, name)
    assert [rows(answer)[0] for answer in answers] == [alone(networks[name], *row) for row in asked]
    assert [answer.as_numpy("output_ids").shape[2] for answer in answers] == [len(row[0]) + row[1] for row in asked]
    assert after.inference_count - before.inference_count == len(asked)
    assert after.execution_count - before.execution_count < len(asked)  # no two lengths are equal


@each_family
def test_beams_penalties_and_log_probs(client: Any, networks: Any, name: str) -> None:
    """Against transformers' own; the ids begin with the prompt, the log-probs do not."""
    numbers = {"repetition_penalty": 1.5, "temperature": 0.5}
    flags = {"is_return_log_probs": np.ones((3, 1), bool), "end_id": NEVER}
    flags |= {key: np.full((3, 1), value, np.float32) for key, value in numbers.items()}
    response = infer(client, name, PROMPTS, **flags)
    cum, each = response.as_numpy("cum_log_probs"), response.as_numpy("output_log_probs")
    assert (cum.shape, each.shape) == ((3, 1), (3, 1, STEPS))
    options = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": NEVER, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    for i in (0, 2):  # a prompt of one token is not penalised in the first step
        prompt = torch.tensor([PROMPTS[i]])
        found = networks[name].generate(
            prompt, attention_mask=torch.ones_like(prompt), repetition_penalty=1.5, **options
        )
        assert rows(response)[i] == found.sequences[0].tolist()
        scores = torch.log_softmax(torch.stack(found.scores)[:, 0] / 0.5, 1)
        assert cum[i, 0] == pytest.approx(float(scores.max(1).values.sum()), abs=1e-3)
    response = infer(client, name, PROMPTS, beam_width=2, end_id=NEVER)
    assert response.as_numpy("output_ids").shape == (3, 2, 8 + STEPS)
    for prompt, beams in zip(PROMPTS, response.as_numpy("output_ids"), strict=True):
        ids = torch.tensor([prompt])
        found = networks[name].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=2,
            num_return_sequences=2,
            length_penalty=0.0,
            **options,
        )
        assert beams[:, : len(prompt) + STEPS].tolist() == found.sequences.tolist()


@each_family
def test_positions_end_where_their_table_does(client: Any, networks: Any, name: str) -> None:
    prompt, most = PROMPTS[2], POSITIONS - 8
    assert rows(infer(client, name, [prompt], request_output_len=most, end_id=NEVER)) == [
        alone(networks[name], prompt, most, NEVER)
    ]
    if name in TABLES:
        with pytest.raises(triton.InferenceServerException, match=r"8 tokens and 12 more take 20 positions; .* has 19"):
            infer(client, name, [prompt], request_output_len=most + 1)
    else:
        assert rows(infer(client, name, [prompt], request_output_len=40, end_id=NEVER)) == [
            alone(networks[name], prompt, 40, NEVER)
        ]


@each_family
def test_padding_may_be_wider_than_any_prompt(client: Any, networks: Any, name: str) -> None:
    response = infer(client, name, PROMPTS, width=12)
    assert rows(response) == [alone(networks[name], prompt) for prompt in PROMPTS]
    assert response.as_numpy("output_ids").shape == (3, 1, 12 + STEPS)


@pytest.mark.parametrize(
    ("name", "columns", "told"),
    [
        ("gpt2", {"input_lengths": [4, 0, 8]}, "input_lengths is \\[4, 0, 8\\]; expected 1 to 8"),
        ("gpt2", {"input_lengths": [4, 9, 8]}, "input_lengths"),
        ("gptj", {"request_output_len": np.ones((3, 2), np.uint32)}, "request_output_len has 6 values"),
        ("bloom", {"request_output_len": 1 << 20}, "1048576 output tokens"),
        ("bloom", {"input_ids": np.full((3, 8), 29, np.uint32)}, "29 is outside the vocabulary"),
        ("gptneox", {"runtime_top_k": 2000}, "'runtime_top_k'"),
        ("gptj", {"prompt_learning_task_name_ids": 0}, "'prompt_learning_task_name_ids'"),
        ("opt", {"is_return_context_embeddings": np.ones((3, 1), bool)}, "'is_return_context_embeddings'"),
        ("opt", {"request_prompt_lengths": 2}, "'request_prompt_lengths'"),
    ],
)
def test_what_makes_no_sense_or_is_not_supported_is_refused(
    client: Any, name: str, columns: dict[str, Any], told: str
) -> None:
    with pytest.raises(triton.InferenceServerException, match=told):
        infer(client, name, PROMPTS, **columns)


def test_a_compute_type_that_the_family_has_not_is_never_served(tmp_path: Path, repository: Path) -> None:
    """The real GPT-NeoX would compute in fp32, without an error."""
    shutil.copytree(repository / "gptneox", tmp_path / "gptneox")
    config = tmp_path / "gptneox" / "config.pbtxt"
    config.write_text(config.read_text().replace('string_value: "fp16"', 'string_value: "bf16"'))
    with pytest.raises(SourceError, match="data_type"), TritonServer(tmp_path):
        pass


@each_family
def test_evaluate_scores_what_follows_the_prompt(
    tmp_path: Path, address: str, networks: Any, repository: Path, name: str
) -> None:
    """No end token behind the prompt, and no prompt in the prediction; the tensors are those that the server states."""
    end = networks[name].config.eos_token_id
    tokens = ["</s>" if id == end else f"w{id}" for id in range(29)]
    documents = [[id for id in prompt if id != end] for prompt in PROMPTS]
    lengths = {"max_input_tokens": 6, "max_output_tokens": STEPS}
    _, samples = evaluated(**evaluating(tmp_path, address, name, tokens, documents, **lengths))
    prompts = [ids[:6] for ids in documents]
    expected = [alone(networks[name], prompt)[len(prompt) :] for prompt in prompts]
    assert [sample.output_ids for sample in samples] == [ids[:-1] if ids[-1] == end else ids for ids in expected]
    assert [sample.input_tokens for sample in samples] == [len(prompt) for prompt in prompts]
    assert [sample.truncated for sample in samples] == [len(ids) > 6 for ids in documents]
    # what was evaluated is what may be published, and nothing else
    for model, code in ((name, 0), ("gpt2" if name == "opt" else "opt", 78)):
        gate = ("--gate", tmp_path / "out")
        assert ftconvert("repository", "publish", repository / model, tmp_path / "live", *gate).exit_code == code
