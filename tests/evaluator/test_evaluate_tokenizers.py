"""Token ids against T5's own on the example, and both kinds of tokenizer file."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluator import tokenizers
from evaluator.errors import NotFoundError, OptionsError

WORDS = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}


def rows(example: Path, file: str) -> list[dict]:
    return [json.loads(line) for line in (example / file).read_text("utf-8").splitlines()]


def test_prompts_of_the_example_are_those_t5x_was_given(example: Path) -> None:
    tokenizer = tokenizers.load(str(example / "spiece.model"))
    prompts = [tokenizers.prompt(tokenizer, "summarize: " + row["document"], 64) for row in rows(example, "test.jsonl")]
    expected = [tuple(row["input_ids"]) for row in rows(example, "predictions.jsonl")]
    assert len(prompts) == 500
    assert [tuple(prompt.input_ids) for prompt in prompts] == expected
    # A prompt of 64 ids may have been cut, a shorter one cannot.
    assert {len(prompt.input_ids) for prompt in prompts if prompt.truncated} == {64}
    assert 0 < sum(prompt.truncated for prompt in prompts) <= sum(len(ids) == 64 for ids in expected)


def test_answers_of_the_example_decode_to_its_predictions(example: Path) -> None:
    tokenizer = tokenizers.load(str(example / "spiece.model"))
    for row in rows(example, "predictions.jsonl"):
        assert tokenizer.decode(row["output_ids"]) == row["prediction"]


def test_padding_is_dropped_and_ids_beyond_the_pieces_are_unknown(example: Path) -> None:
    tokenizer = tokenizers.load(str(example / "spiece.model"))
    ids = tokenizer.encode("kernel driver")
    assert tokenizer.decode([0, *ids, 1, 0]) == "kernel driver"
    assert tokenizer.decode([4095]) == tokenizer.decode([2])  # 4068 pieces in a vocabulary of 4096


class Letters:
    """One id per character, 1 ends."""

    name = "letters"
    sha256 = ""
    end_id = 1
    pad_id = None

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def ends(self, text: str) -> list[int]:
        return list(range(1, len(text) + 1))


@given(st.text(st.characters(min_codepoint=2, codec="utf-8"), max_size=12), st.integers(2, 10))
def test_a_prompt_fits_ends_in_the_end_token_and_says_whether_it_was_cut(text: str, limit: int) -> None:
    prompt = tokenizers.prompt(Letters(), text, limit)
    assert len(prompt.input_ids) == min(len(text) + 1, limit)
    assert prompt.input_ids[-1] == 1
    assert prompt.text == Letters().decode(prompt.input_ids[:-1])
    assert text.startswith(prompt.text)
    assert prompt.truncated == (len(text) + 1 > limit)


@pytest.mark.parametrize(("ids", "kept"), [([], []), ([5, 6], [5, 6]), ([5, 1, 6, 1], [5]), ([1], [])])
def test_output_is_cut_at_the_first_end_token(ids: list[int], kept: list[int]) -> None:
    assert tokenizers.until_end(ids, 1) == kept


def save_word_tokenizer(folder: Path, words: dict[str, int], special: list[str]) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    # What a saved tokenizer may hold and a prompt must not get twice, or cut: template, truncation, padding.
    backend.post_processor = processors.TemplateProcessing("$A b", special_tokens=[("b", 4)])
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_tokenizer_json_encodes_bare_ids_and_ends_in_its_special_token(tmp_path: Path) -> None:
    tokenizer = tokenizers.load(str(save_word_tokenizer(tmp_path, WORDS, ["<pad>", "</s>", "<unk>"])))
    prompt = tokenizers.prompt(tokenizer, "a b a zzz", 99)
    assert (prompt.text, list(prompt.input_ids), prompt.truncated) == ("a b a zzz", [3, 4, 3, 2, 1], False)
    assert tokenizer.decode([3, 4, 1, 0]) == "a b"


@pytest.mark.parametrize("stated", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_tokenizer_config_names_the_end_token(tmp_path: Path, stated: object) -> None:
    save_word_tokenizer(tmp_path, WORDS | {"<stop>": 9}, ["</s>", "<stop>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": stated}))
    assert tokenizers.load(str(tmp_path)).end_id == 9


def test_the_padding_is_what_the_tokenizer_says(tmp_path: Path, example: Path) -> None:
    assert tokenizers.load(str(example / "spiece.model")).pad_id == 0
    save_word_tokenizer(tmp_path, WORDS | {"<fill>": 9}, ["</s>", "<fill>"])
    assert tokenizers.load(str(tmp_path)).pad_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<fill>"}}))
    assert tokenizers.load(str(tmp_path)).pad_id == 9
    save_word_tokenizer(tmp_path, {"<unk>": 0, "</s>": 1, "b": 4}, ["</s>"])
    (tmp_path / "tokenizer_config.json").unlink()
    assert tokenizers.load(str(tmp_path)).pad_id is None


def test_tokenizer_json_without_an_end_token_is_refused_with_what_it_has(tmp_path: Path) -> None:
    path = save_word_tokenizer(tmp_path, {"<pad>": 0, "<unk>": 1, "a": 2, "b": 4}, ["<pad>"])
    with pytest.raises(OptionsError, match=r"no end token.*<pad>"):
        tokenizers.load(str(path))


def test_a_folder_prefers_tokenizer_json_and_takes_a_sentencepiece_model(tmp_path: Path, example: Path) -> None:
    shutil.copy(example / "spiece.model", tmp_path / "spiece.model")
    assert isinstance(tokenizers.load(str(tmp_path)), tokenizers.SentencePiece)
    save_word_tokenizer(tmp_path, WORDS, ["</s>"])
    assert isinstance(tokenizers.load(str(tmp_path)), tokenizers.HuggingFace)


def test_what_is_no_tokenizer_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        tokenizers.load(str(tmp_path / "nowhere.model"))
    with pytest.raises(NotFoundError, match=r"tokenizer\.json, spiece\.model"):
        tokenizers.load(str(tmp_path))
    for name in ("broken.model", "broken.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(OptionsError, match=name):
            tokenizers.load(str(tmp_path / name))


def test_a_sentencepiece_model_without_end_token_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 20),
        model_prefix=str(tmp_path / "no_end"),
        vocab_size=9,
        eos_id=-1,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=9,
    )
    with pytest.raises(OptionsError, match="no end token"):
        tokenizers.load(str(tmp_path / "no_end.model"))
