"""Text in, text out: the models beside one that takes and gives token ids.

    <name>_text: text_input, max_tokens ─> <name>_preprocessing ─> <name> ─> <name>_postprocessing ─> text_output
                 top_k, temperature, ... ─────────────────────────────┘

Both Python models are the same files for every backend (model_repository/models/); what differs stands in their
config.pbtxt, and which tensors there are follows from the model's own. Tensors have NVIDIA's names: those of the
ensemble are those of TensorRT-LLM's (triton_backend/all_models/inflight_batcher_llm/ensemble/config.pbtxt).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converter.checkpoint import Companions
from converter.errors import OptionsError, SourceError
from converter.families.base import Config
from converter.formats import huggingface
from converter.formats.outside import load_json
from model_repository import models, settings
from model_repository.config import Tensor, add_inputs, add_outputs, add_parameters, new_model
from model_repository.messages import DataType, ModelConfig
from model_repository.models import text
from model_repository.repository import NO_FILES, Model

FOLDER = "tokenizer"  # in the version folder of both Python models
SCRIPTS = Path(str(models.__file__)).parent

# What the model is given by preprocessing: input -> output of preprocessing. Of these a model has some.
GIVEN = {
    "input_ids": "INPUT_ID",
    "sequence_length": "REQUEST_INPUT_LEN",  # FasterTransformer's T5
    "input_lengths": "REQUEST_INPUT_LEN",
    "max_output_len": "REQUEST_OUTPUT_LEN",  # FasterTransformer's T5
    "request_output_len": "REQUEST_OUTPUT_LEN",
    "bad_words_list": "BAD_WORDS_IDS",
    "stop_words_list": "STOP_WORDS_IDS",
}
# What TensorRT-LLM has to be told besides: FasterTransformer's models know their own.
SPECIAL = {"end_id": "OUT_END_ID", "pad_id": "OUT_PAD_ID"}
DECODER_START = {"decoder_input_ids": "DECODER_INPUT_ID", "decoder_input_lengths": "REQUEST_DECODER_INPUT_LEN"}
DIMS = {"INPUT_ID": (-1,), "BAD_WORDS_IDS": (2, -1), "STOP_WORDS_IDS": (2, -1)}  # the others are [1]

# Of the ensemble, then of preprocessing; all of them may be left out.
OPTIONAL = {
    "max_tokens": Tensor("REQUEST_OUTPUT_LEN", "INT32", (1,), optional=True),
    "bad_words": Tensor("BAD_WORDS_DICT", "STRING", (-1,), optional=True),
    "stop_words": Tensor("STOP_WORDS_DICT", "STRING", (-1,), optional=True),
}
OPTIONAL_SPECIAL = {
    "end_id": Tensor("END_ID", "INT32", (1,), optional=True),
    "pad_id": Tensor("PAD_ID", "INT32", (1,), optional=True),
}
# What the ensemble passes on as it is: its name of an input -> the model's names, whichever it has.
PASSED = {
    "top_k": ("runtime_top_k",),
    "top_p": ("runtime_top_p",),
    "temperature": ("temperature",),
    "length_penalty": ("len_penalty",),
    "repetition_penalty": ("repetition_penalty",),
    "beam_search_diversity_rate": ("beam_search_diversity_rate",),
    "min_tokens": ("min_tokens",),
    "presence_penalty": ("presence_penalty",),
    "frequency_penalty": ("frequency_penalty",),
    "seed": ("seed", "random_seed"),
    "beam_width": ("beam_width",),
    "prompt_embedding_table": ("prompt_embedding_table",),
    "prompt_vocab_size": ("prompt_vocab_size",),
    "lora_task_id": ("lora_task_id",),
    "lora_weights": ("lora_weights",),
    "lora_config": ("lora_config",),
    "guided_decoding_guide_type": ("guided_decoding_guide_type",),
    "guided_decoding_guide": ("guided_decoding_guide",),
}
OUTPUT = Tensor("text_output", "STRING", (-1,))  # a text for each beam

# What a model is warmed up with: a short text, and as many as the largest preferred batch.
SAMPLE = "The quick brown fox jumps over the lazy dog."
SAMPLE_TOKENS = 8  # generated for it


@dataclass(frozen=True)
class Speech:
    """What the text models have to know of the model between them.

    Args:
        config: the model's Hugging-Face-style config.
        repeats: whether its answers begin with the prompt.
        told: whether it has to be told its special tokens (TensorRT-LLM).
        max_tokens: of an answer, where a request does not say.
    """

    config: Config
    repeats: bool
    told: bool
    max_tokens: int = settings.MOST_TOKENS

    @property
    def has_encoder(self) -> bool:
        return bool(self.config.get("is_encoder_decoder"))

    @property
    def parameters(self) -> dict[str, str]:
        """Of preprocessing."""
        end, pad, start = (self._id(key) for key in ("eos_token_id", "pad_token_id", "decoder_start_token_id"))
        return {
            "has_encoder": settings.as_text(self.has_encoder),
            "end_id": str(end),
            "pad_id": str(end if pad < 0 else pad),  # a decoder without one: padding is never looked at
            "start_id": str(start),
            "vocab_size": str(self.config["vocab_size"]),
            "max_tokens": str(self.max_tokens),
        }

    def _id(self, key: str) -> int:
        """A special token; of several the first, -1 where there is none."""
        id = self.config.get(key)
        id = id[0] if isinstance(id, list) else id
        return -1 if id is None else int(id)


def tokenizer_files(uri: str) -> Companions:
    """The tokenizer that shall lie beside the Python models.

    Raises:
        SourceMissingError: nothing is there.
        SourceError: no tokenizer, or one that takes transformers to be opened.
    """
    found = huggingface.tokenizer(uri)
    if not set(text.FILES) & set(found.names):
        raise SourceError(
            f"{uri}: expected one of {', '.join(text.FILES)}, found {', '.join(sorted(found.names))}. transformers "
            "writes a tokenizer.json: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    if "tokenizer.json" in found.names:
        name = found.names["tokenizer.json"]
        where = found.storage.path(name)
        if not isinstance(load_json(found.storage.read(name), where).get("model"), dict):
            raise SourceError(f"{where}: expected a tokenizer.json, found no `model` in it")
    return found


def text_models(
    model: ModelConfig, version: int, speech: Speech, tokenizer: Companions, values: Mapping[str, Any]
) -> list[Model]:
    """The models beside `model`, the ensemble last; `values` are settings.TEXT."""
    beside = {f"{FOLDER}/{name}": data for name, data in tokenizer.read().items()}
    pre, post = preprocessing(model, version, speech), postprocessing(model, version, speech)
    for config, key in ((pre, "preprocessing_instance_count"), (post, "postprocessing_instance_count")):
        config.instance_group[0].count = values.get(key, 1)
    return [
        Model(pre, version, script("preprocessing") | beside),
        Model(post, version, script("postprocessing") | beside),
        Model(ensemble(model, version, pre, post), version, NO_FILES),
    ]


def script(name: str) -> dict[str, bytes]:
    """A Python model's files."""
    return {"model.py": (SCRIPTS / f"{name}.py").read_bytes(), "text.py": (SCRIPTS / "text.py").read_bytes()}


def given(model: ModelConfig, speech: Speech) -> dict[str, str]:
    """Input of the model -> output of preprocessing, for all that this model is given."""
    asked = GIVEN | (SPECIAL if speech.told else {}) | (DECODER_START if speech.told and speech.has_encoder else {})
    declared = {tensor.name for tensor in model.input}
    return {name: output for name, output in asked.items() if name in declared}


def optional(speech: Speech) -> dict[str, Tensor]:
    """Input of the ensemble -> input of preprocessing."""
    return OPTIONAL | (OPTIONAL_SPECIAL if speech.told else {})


def preprocessing(model: ModelConfig, version: int, speech: Speech) -> ModelConfig:
    """Text -> ids. Its batches are as large as the model's."""
    config = new_model(f"{model.name}_preprocessing", version, "python", model.max_batch_size)
    add_inputs(config, [Tensor("QUERY", "STRING", (1,)), *optional(speech).values()])
    types = {tensor.name: DataType.Name(tensor.data_type).removeprefix("TYPE_") for tensor in model.input}
    wanted = {output: types[name] for name, output in given(model, speech).items()}
    add_outputs(config, [Tensor(name, dtype, DIMS.get(name, (1,))) for name, dtype in wanted.items()])
    add_parameters(config, speech.parameters)
    if model.HasField("dynamic_batching") and not any(tensor.allow_ragged_batch for tensor in model.input):
        # Requests that it is handed together leave it with one width, so that the model may be handed them together.
        # Where the model takes unequal ones there is no need, and TensorRT-LLM takes the padding of a row for prompt.
        config.dynamic_batching.max_queue_delay_microseconds = 0
    return config


def postprocessing(model: ModelConfig, version: int, speech: Speech) -> ModelConfig:
    """Ids -> text."""
    config = new_model(f"{model.name}_postprocessing", version, "python", model.max_batch_size)
    types = {tensor.name: DataType.Name(tensor.data_type).removeprefix("TYPE_") for tensor in model.output}
    inputs = [
        Tensor("TOKENS_BATCH", types["output_ids"], (-1, -1)),
        Tensor("SEQUENCE_LENGTH", types["sequence_length"], (-1,)),
    ]
    if speech.repeats:
        lengths = next(tensor for tensor in model.input if given(model, speech).get(tensor.name) == "REQUEST_INPUT_LEN")
        inputs.append(Tensor("REQUEST_INPUT_LEN", DataType.Name(lengths.data_type).removeprefix("TYPE_"), (1,)))
    add_inputs(config, inputs)
    add_outputs(config, [Tensor("OUTPUT", "STRING", (-1,))])
    # TensorRT-LLM's answers are as long as their sequence_length; a request may name another end token there
    add_parameters(config, {"end_id": "-1" if speech.told else speech.parameters["end_id"]})
    return config


def ensemble(model: ModelConfig, version: int, pre: ModelConfig, post: ModelConfig) -> ModelConfig:
    """The chain of the three."""
    config = new_model(f"{model.name}_text", version, max_batch_size=model.max_batch_size)
    inputs = {tensor.name: tensor for tensor in pre.input}
    public = {"text_input": "QUERY", **{name: tensor.name for name, tensor in (OPTIONAL | OPTIONAL_SPECIAL).items()}}
    public = {name: inner for name, inner in public.items() if inner in inputs}
    passed = passed_on(model)
    for name, inner in public.items():
        _declare(config, name, inputs[inner])
    declared = {tensor.name: tensor for tensor in model.input}
    for name, inner in passed.items():
        _declare(config, name, declared[inner])
    add_outputs(config, [OUTPUT])
    outputs = [tensor.name for tensor in pre.output]
    to_model = {name: output for name, output in _all_given().items() if name in declared and output in outputs}
    _step(config, pre.name, {inner: name for name, inner in public.items()}, {name: name for name in outputs})
    ids = {"output_ids": "TOKENS_BATCH", "sequence_length": "SEQUENCE_LENGTH"}
    _step(config, model.name, to_model | {inner: name for name, inner in passed.items()}, ids)
    _step(config, post.name, {tensor.name: tensor.name for tensor in post.input}, {"OUTPUT": OUTPUT.name})
    return config


def bls(model: ModelConfig, version: int, ensemble: ModelConfig, tokenizer: Companions, count: int) -> Model:
    """A Python model that does what the ensemble does, and streams: `stream` asks for a response per piece of text.

    An ensemble hands each token on by itself, and of one token alone nobody knows its text: SentencePiece leaves out
    the blank before a first word, and half a character is none. This one keeps the tokens before.

    Args:
        count: instances, each of which is busy with one request at a time.
    """
    config = new_model(f"{model.name}_bls", version, "python", model.max_batch_size)
    config.model_transaction_policy.decoupled = model.model_transaction_policy.decoupled
    config.instance_group[0].count = count
    config.input.extend(ensemble.input)
    if config.model_transaction_policy.decoupled:
        add_inputs(config, [Tensor("stream", "BOOL", (1,), optional=True)])
    add_outputs(config, [OUTPUT])
    first, second, _ = ensemble.ensemble_scheduling.step
    maps = {"preprocessing": first.input_map, "model": second.input_map}
    add_parameters(
        config,
        {
            **{f"{step}_inputs": json.dumps(dict(sorted(inputs.items()))) for step, inputs in maps.items()},
            "preprocessing_name": first.model_name,
            "model_name": second.model_name,
        },
    )
    return Model(config, version, script("bls") | {f"{FOLDER}/{name}": data for name, data in tokenizer.read().items()})


def _all_given() -> dict[str, str]:
    return GIVEN | SPECIAL | DECODER_START


def passed_on(model: ModelConfig) -> dict[str, str]:
    """Input of the ensemble -> input of the model, for what passes preprocessing by."""
    declared = {tensor.name for tensor in model.input}
    return {name: inner for name, names in PASSED.items() for inner in names if inner in declared}


def _declare(config: ModelConfig, name: str, inner: Any) -> None:
    """An input of the ensemble, like the inner model's: its client sends what that one's would."""
    config.input.add(name=name, data_type=inner.data_type, dims=inner.dims, optional=inner.optional)


def _step(config: ModelConfig, name: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """One model of an ensemble: its tensors -> the ensemble's."""
    step = config.ensemble_scheduling.step.add(model_name=name, model_version=-1)  # whichever version is served
    step.input_map.update(inputs)
    step.output_map.update(outputs)


# -------------------------------------------------------------------------------------------------------------- warmup


class Samples(NamedTuple):
    """What config.pbtxt says of samples, and their files in the model's folder."""

    entries: Sequence[Any] = ()
    files: Mapping[str, bytes] = {}  # nothing changes it


def warmup(model: ModelConfig, speech: Speech, tokenizer: Companions | None, values: Mapping[str, Any]) -> Samples:
    """Real samples that Triton runs through the model before it is ready, where `--set warmup=true` asks for them.

    Raises:
        OptionsError: the tokenizer's library is not installed here.
        SourceError: the tokenizer cannot be opened, or is another model's.
    """
    if not values.get("warmup") or tokenizer is None:
        return Samples()
    ids = _sample_ids(speech, tokenizer)
    columns = {
        "INPUT_ID": ids,
        "REQUEST_INPUT_LEN": [len(ids)],
        "REQUEST_OUTPUT_LEN": [SAMPLE_TOKENS],
        "OUT_END_ID": [int(speech.parameters["end_id"])],
        "OUT_PAD_ID": [int(speech.parameters["pad_id"])],
        "DECODER_INPUT_ID": [int(speech.parameters["start_id"])],
        "REQUEST_DECODER_INPUT_LEN": [1],
    }
    made, files = ModelConfig(), dict[str, bytes]()
    types = {tensor.name: tensor.data_type for tensor in model.input}
    for size in sorted({1, *model.dynamic_batching.preferred_batch_size}):
        if size > 1 and speech.told:
            continue  # several rows of one request are several responses there, which warmup does not take
        sample = made.model_warmup.add(name=f"{size}_texts", batch_size=size)
        for name, output in given(model, speech).items():
            if output not in columns:
                continue
            dtype = np.int32 if DataType.Name(types[name]) == "TYPE_INT32" else np.uint32
            files[f"warmup/{name}"] = np.array(columns[output], dtype).tobytes()
            entry = sample.inputs[name]
            entry.data_type, entry.input_data_file = types[name], name
            entry.dims.append(len(columns[output]))
    return Samples(list(made.model_warmup), files)


def _sample_ids(speech: Speech, tokenizer: Companions) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in tokenizer.read().items():
            Path(folder, name).write_bytes(data)
        try:
            opened = text.load(Path(folder))
        except ImportError as error:
            raise OptionsError(
                f"--set warmup=true: samples are made with {error.name}; install ftconvert[eval]"
            ) from error
        except Exception as error:  # both libraries raise whatever they like
            raise SourceError(f"--tokenizer: expected a tokenizer, found: {error}") from error
        end = int(speech.parameters["end_id"])
        ids = [*opened.pieces(SAMPLE), end] if speech.has_encoder else opened.start(SAMPLE, end)
        if max(ids) >= speech.config["vocab_size"]:
            raise SourceError(
                f"--tokenizer: expected ids below {speech.config['vocab_size']}, found {max(ids)}: it is another "
                "model's tokenizer"
            )
        return ids
