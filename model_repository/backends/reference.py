"""A checkpoint of any format as a transformers model in float32: what the CPU backends compute with.

The tensors come through the same tables as a conversion, inverted, so a model that answers rightly here was written
rightly. float32 whatever the files hold: bfloat16 and float16 weights are exact in it, and a CPU is no slower.
What it computes is the source's model, not what FasterTransformer makes of it: epsilon and gelu are the config's own.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.initialization import no_init_weights

from converter import ops
from converter.checkpoint import Checkpoint, check_repeats
from converter.errors import Problem, SourceError, report

Weights = dict[str, torch.Tensor]


def load(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model with these weights, in eval mode. Reads every tensor once.

    Raises:
        SourceError: a tensor that only repeats others does not equal them; transformers misses or does not know one.
    """
    check_repeats(checkpoint)
    values = copy.deepcopy(dict(checkpoint.config))  # transformers writes into rope_scaling
    config = CONFIG_MAPPING[checkpoint.config["model_type"]](
        **{key: value for key, value in values.items() if key not in ("architectures", "torch_dtype")}
    )
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # Memory that nothing has touched yet, and no tying. Not on torch's device "meta": tables of rotary positions, which
    # no file holds, are made here.
    with no_init_weights():
        model = auto.from_config(config, dtype=torch.float32)
    float32 = np.dtype(np.float32)
    weights = {
        name: torch.from_numpy(np.array(ops.cast(tensor, float32).read()))  # a copy that is torch's own
        for name, tensor in checkpoint.tensors.items()
    }
    # transformers 5 ties T5's lm_head whatever the config says; assigned one by one, an untied one stays untied.
    missing, unexpected = model.load_state_dict(
        _in_memory(checkpoint, weights, set(model.state_dict())), strict=False, assign=True
    )
    if missing or unexpected:
        problems = [Problem(name, got="not there") for name in missing]
        problems += [Problem(name, expected="no such tensor") for name in unexpected]
        raise SourceError(report("transformers' model does not fit the tensors", problems))
    model.config.tie_word_embeddings = bool(checkpoint.config["tie_word_embeddings"])
    return model.eval()


def _in_memory(checkpoint: Checkpoint, weights: Weights, names: Collection[str]) -> Weights:
    """Canonical tensors under transformers' names of its parameters: with what it keeps twice, and as it spells them.

    Args:
        names: of the parameters. GPT-NeoX's output layer is `embed_out` in every file and `lm_head` in memory.
    """
    table = checkpoint.family.huggingface
    tied = table.tied if checkpoint.config["tie_word_embeddings"] else {}
    weights = weights | {name: weights[of] for name, of in tied.items()}
    aliases = {alias: of for alias, of in table.aliases.items() if alias in names and of in weights}
    respelled = set(aliases.values()) - set(names)
    return {name: weight for name, weight in weights.items() if name not in respelled} | {
        alias: weights[of] for alias, of in aliases.items()
    }
