"""The CPU backend behind the real Triton, serving a converted repository unmodified."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tritonclient.grpc as triton
from asking import padded, tensors
from click.testing import CliRunner

from converter.cli import main
from converter.errors import SourceError
from converter.formats import open_any
from model_repository.backends import reference
from model_repository.backends.generation import Row, generate
from model_repository.backends.sampling import FASTERTRANSFORMER, Sampling
from model_repository.server import TritonServer

SIZES = tiny.T5(tied=False, vocab_size=90)  # untied: transformers would tie it behind our back
PROMPTS = [[5, 9, 3, 1], [17, 1], [60, 61, 62, 63, 64, 65, 66, 1]]
STEPS = 12


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models as `ftconvert` leaves them."""
    base = tmp_path_factory.mktemp("repository")
    source = tiny.t5x_checkpoint(base / "source", SIZES)
    for name, options in {"one": ["--dtype", "bf16"], "four": ["-t", "4"]}.items():
        command = ["jax-to-ft", "--model", "ul2", "--name", name, *options, str(source), str(base / "models")]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    return base / "models"


def infer(client: Any, model: str, prompts: list[list[int]], **scalars: Any) -> tuple[np.ndarray, np.ndarray]:
    """Send one request with all prompts, padded; returns output_ids [batch, beam, length] and the lengths."""
    response = answer(client, model, prompts, **scalars)
    return response.as_numpy("output_ids"), response.as_numpy("sequence_length")


def answer(client: Any, model: str, prompts: list[list[int]], **scalars: Any) -> Any:
    """The response itself. A value is one number for all rows, or an array with a row for each."""
    ids = padded(prompts, np.uint32, 77)  # the padding is no token the model may see
    values = {"input_ids": ids, "sequence_length": np.array([[len(prompt)] for prompt in prompts], np.uint32)}
    for name, value in {"max_output_len": np.uint32(STEPS), **scalars}.items():
        values[name] = value if isinstance(value, np.ndarray) else np.full((len(prompts), 1), value)
    return client.infer(model, tensors(values))


def alone(model: Any, prompt: list[int], start: int = 0, end: int = 1, steps: int = STEPS) -> list[int]:
    """Greedy decoding of one prompt, one step at a time, with nothing but the model's forward pass."""
    import torch

    decoded = [start]
    with torch.inference_mode():
        while len(decoded) <= steps and (len(decoded) == 1 or decoded[-1] != end):
            ids = [torch.tensor([prompt]), torch.tensor([decoded])]
            decoded.append(int(model(input_ids=ids[0], decoder_input_ids=ids[1]).logits[0, -1].argmax()))
    return decoded[1:]


@pytest.mark.parametrize("name", ["one", "four"])
def test_a_batch_of_unequal_lengths_gives_each_row_its_own_answer(client: Any, repository: Path, name: str) -> None:
    output_ids, lengths = infer(client, name, PROMPTS)
    assert output_ids.dtype == np.int32
    assert output_ids.shape == (3, 1, STEPS)
    model = reference.load(open_any(str(repository / name)))
    expected = [alone(model, prompt) for prompt in PROMPTS]
    assert [ids[0, :length].tolist() for ids, length in zip(output_ids, lengths[:, 0], strict=True)] == expected
    assert len({tuple(ids) for ids in expected}) == 3  # a model that answers everything alike would prove nothing


def test_start_id_end_id_and_length_are_honoured_per_row(client: Any, repository: Path) -> None:
    model = reference.load(open_any(str(repository / "four")))
    starts, steps = [0, 8, 30], [3, 12, 7]
    ends = [alone(model, prompt, start, -1)[4] for prompt, start in zip(PROMPTS, starts, strict=True)]
    column = {"start_id": starts, "end_id": ends, "max_output_len": steps}
    given = {name: np.array(values, np.uint32).reshape(3, 1) for name, values in column.items()}
    output_ids, lengths = infer(client, "four", PROMPTS, **given)
    for i, prompt in enumerate(PROMPTS):
        expected = alone(model, prompt, starts[i], ends[i], steps[i])
        assert output_ids[i, 0, : lengths[i, 0]].tolist() == expected, i


def column(dtype: Any, *values: Any) -> np.ndarray:
    return np.array(values, dtype).reshape(len(values), -1)


def test_each_row_is_sampled_in_its_own_way(client: Any, repository: Path) -> None:
    """Three rows with nothing in common; the same seed gives the same ids in another batch."""
    model = reference.load(open_any(str(repository / "four")))
    given = {
        "runtime_top_k": column(np.uint32, 1, 0, 8),
        "runtime_top_p": column(np.float32, 0, 0.9, 0.5),
        "temperature": column(np.float32, 1, 2, 3),
        "repetition_penalty": column(np.float32, 2, 1, 1.5),
        "random_seed": column(np.uint64, 0, 7, 2**63),
        "bad_words_list": np.array(
            [[[5, 7, 8], [1, 3, -1]], [[0, 0, 0], [-1] * 3], [[9, 0, 0], [1, -1, -1]]], np.int32
        ),
        "stop_words_list": np.array([[[0], [-1]], [[0], [-1]], [[11], [1]]], np.int32),
    }
    words = [{"bad_words": ((5,), (7, 8))}, {}, {"bad_words": ((9,),), "stop_words": ((11,),)}]
    rows = [
        Row(prompt, STEPS, 0, 1, Sampling(top_k=k, top_p=p, temperature=t, repetition_penalty=r, seed=seed, **more))
        for prompt, k, p, t, r, seed, more in zip(
            PROMPTS,
            *([1, 0, 8], [0.0, float(np.float32(0.9)), 0.5], [1.0, 2.0, 3.0], [2.0, 1.0, 1.5], [0, 7, 2**63], words),
            strict=True,
        )
    ]
    expected = [one.ids for (one,) in generate(model, rows, FASTERTRANSFORMER)]
    output_ids, lengths = infer(client, "four", PROMPTS, **given)
    assert [ids[0, :length].tolist() for ids, length in zip(output_ids, lengths[:, 0], strict=True)] == expected
    greedy, _ = infer(client, "four", PROMPTS)
    assert (greedy != output_ids).any((1, 2)).all()
    for i, prompt in enumerate(PROMPTS):
        alone_ids, length = infer(client, "four", [prompt], **{name: array[i : i + 1] for name, array in given.items()})
        assert alone_ids[0, 0, : length[0, 0]].tolist() == expected[i]


def test_beams_and_log_probs_have_the_real_shapes(client: Any, repository: Path) -> None:
    import torch

    model = reference.load(open_any(str(repository / "four")))
    flags = {"is_return_log_probs": np.bool_(True)}
    response = answer(client, "four", PROMPTS, beam_width=np.uint32(3), len_penalty=np.float32(1), **flags)
    ids, lengths, cum, each = map(
        response.as_numpy, ("output_ids", "sequence_length", "cum_log_probs", "output_log_probs")
    )
    assert (ids.shape, lengths.shape, cum.shape, each.shape) == ((3, 3, STEPS), (3, 3), (3, 3), (3, 3, STEPS))
    assert cum.dtype == each.dtype == np.float32
    assert cum == pytest.approx(each.sum(2), abs=1e-4)
    for prompt, beams, counts, sums in zip(PROMPTS, ids, lengths, cum, strict=True):
        options = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 1.0, "early_stopping": True}
        model.generation_config.eos_token_id = 1
        options |= {"use_cache": False, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
        found = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=STEPS,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        for beam, count, expected in zip(beams, counts, found.sequences[:, 1:].tolist(), strict=True):
            assert beam[:count].tolist() == (expected[: expected.index(1) + 1] if 1 in expected else expected)
        assert sums / counts == pytest.approx(found.sequences_scores.numpy(), abs=1e-4)
    # nobody asked: they are not there, as in the real one
    names = {output.name for output in answer(client, "four", PROMPTS).get_response().outputs}
    assert names == {"output_ids", "sequence_length"}
    greedy = answer(client, "four", PROMPTS, **flags)
    assert greedy.as_numpy("cum_log_probs").shape == (3, 1)
    assert (greedy.as_numpy("cum_log_probs") < 0).all()
    assert not greedy.as_numpy("output_log_probs").any()  # of each token among the most probable one


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("runtime_top_k", np.uint32(4000)),
        ("runtime_top_p", np.float32(1.5)),
        ("temperature", np.float32(-0.5)),
        ("beam_width", np.array([[2], [1], [2]], np.uint32)),
        ("repetition_penalty", np.float32(0)),
        ("stop_words_list", np.array([[[7], [2]]] * 3, np.int32)),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(client: Any, name: str, value: Any) -> None:
    with pytest.raises(triton.InferenceServerException, match=f"'{name}'"):
        infer(client, "four", PROMPTS, **{name: value})


def test_neutral_values_change_nothing(client: Any) -> None:
    neutral = {
        "runtime_top_k": np.uint32(1),
        "temperature": np.float32(1.0),
        "beam_width": np.uint32(1),
        "random_seed": np.uint64(7),
        "is_return_log_probs": np.bool_(False),
        "bad_words_list": np.array([[[0], [-1]]] * 3, np.int32),
    }
    for given, plain in zip(infer(client, "four", PROMPTS, **neutral), infer(client, "four", PROMPTS), strict=True):
        assert (given == plain).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sequence_length": np.array([[4], [2], [9]], np.uint32)}, "sequence_length"),
        ({"sequence_length": np.array([[4], [0], [8]], np.uint32)}, "sequence_length"),
        ({"input_ids": np.full((3, 8), 90, np.uint32)}, "vocabulary"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(client: Any, change: dict[str, np.ndarray], told: str) -> None:
    with pytest.raises(triton.InferenceServerException, match=told):
        infer(client, "four", PROMPTS, **change)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda weights: (weights / "decoder.block.1.layer.1.EncDecAttention.k.weight.2.bin").unlink(), "no such file"),
        (lambda weights: (weights / "lm_head.weight.bin").write_bytes(b"\0"), "1 bytes"),
        (lambda weights: (weights / "shared.weight.bin").write_bytes(bytes(90 * 12 * 4)), "shared.weight"),
    ],
    ids=["missing", "short", "contradicting"],
)
def test_damaged_weights_are_never_served(tmp_path: Path, repository: Path, damage: Any, told: str) -> None:
    """The real backend would serve all three without an error."""
    shutil.copytree(repository / "four", tmp_path / "four")
    damage(tmp_path / "four" / "1" / "4-gpu")
    with pytest.raises(SourceError, match=told), TritonServer(tmp_path):
        pass


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('string_value: "4"', 'string_value: "2"', "tensor_para_size"),
        ('string_value: "bf16"', 'string_value: "int8"', "data_type"),
        ('key: "manifest_sha256"\n  value {\n    string_value: "', "\\g<0>0", "manifest_sha256"),
    ],
    ids=["tensor_para_size", "data_type", "manifest_sha256"],
)
def test_a_config_that_does_not_fit_the_weights_is_never_served(
    tmp_path: Path, repository: Path, old: str, new: str, told: str
) -> None:
    """The real backend would look for other files, or fall back to another type, without an error."""
    shutil.copytree(repository / "four", tmp_path / "four")
    config = tmp_path / "four" / "config.pbtxt"
    text = config.read_text()
    changed = re.sub(re.escape(old), new, text)
    assert changed != text
    config.write_text(changed)
    with pytest.raises(SourceError, match=told), TritonServer(tmp_path):
        pass
