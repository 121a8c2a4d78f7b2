"""The Triton model of a Hugging Face model that Triton's Python backend serves with transformers: the slow, plain way.

<name>/config.pbtxt       text_input, max_tokens, sampling inputs -> text_output; which model it is, as parameter
<name>/1/model.py         model_repository/models/huggingface.py
<name>/1/tokenizer/       with --tokenizer, else the model's own is taken
"""

from __future__ import annotations

from converter.formats import huggingface
from converter.storage import open_storage
from model_repository import hub_model
from model_repository.build import Wanted
from model_repository.config import Tensor, add_inputs, add_outputs, add_parameters, new_model
from model_repository.ensemble import FOLDER, SCRIPTS
from model_repository.messages import ModelInstanceGroup
from model_repository.repository import add_model
from model_repository.settings import BATCHING, MOST_TOKENS, one_of, read, tune, whole

BACKEND = "python"
VERSION = 1
MAX_BATCH_SIZE = 8
INPUTS = (
    Tensor("text_input", "STRING", (1,)),
    Tensor("max_tokens", "INT32", (1,), optional=True),
    Tensor("top_k", "INT32", (1,), optional=True),
    Tensor("top_p", "FP32", (1,), optional=True),
    Tensor("temperature", "FP32", (1,), optional=True),
    Tensor("repetition_penalty", "FP32", (1,), optional=True),
    Tensor("length_penalty", "FP32", (1,), optional=True),
    Tensor("beam_width", "INT32", (1,), optional=True),
    Tensor("seed", "UINT64", (1,), optional=True),
)
OUTPUTS = (Tensor("text_output", "STRING", (1,)),)
KINDS = {"gpu": ModelInstanceGroup.KIND_GPU, "cpu": ModelInstanceGroup.KIND_CPU, "auto": ModelInstanceGroup.KIND_AUTO}
SETTINGS = {
    **BATCHING,
    "max_tokens": whole(1),
    "kind": one_of(*KINDS),  # auto: every GPU that there is, else the CPU
    "dtype": one_of("auto", "float32", "float16", "bfloat16"),
}


def build(wanted: Wanted) -> str:
    """Write the model and return its folder.

    Raises:
        UsageError, OptionsError: settings that are none, or a path that a server could not open.
        SourceMissingError, SourceError: no model or tokenizer there.
        DestinationError: there is such a model.
    """
    wanted.refuse("decoupled")
    values = read(wanted.settings, SETTINGS)
    model = hub_model.find(wanted)
    config = new_model(model.name, VERSION, BACKEND, MAX_BATCH_SIZE)
    config.instance_group[0].kind = KINDS[values.get("kind", "auto")]
    add_inputs(config, INPUTS)
    add_outputs(config, OUTPUTS)
    stated = {"model": model.path, "revision": model.revision, "dtype": values.get("dtype", "auto")}
    stated["max_tokens"] = str(values.get("max_tokens", MOST_TOKENS))
    add_parameters(config, {key: value for key, value in stated.items() if value})
    tune(config, values)
    files = {"model.py": (SCRIPTS / "huggingface.py").read_bytes()}
    if wanted.tokenizer:
        tokenizer = huggingface.tokenizer(wanted.tokenizer).read()
        if not tokenizer.keys() & {"tokenizer.json", "tokenizer_config.json"}:
            tokenizer["tokenizer_config.json"] = huggingface.SENTENCEPIECE_CONFIG
        files |= {f"{FOLDER}/{name}": data for name, data in tokenizer.items()}
    return str(add_model(open_storage(wanted.repository), config, VERSION, files))
