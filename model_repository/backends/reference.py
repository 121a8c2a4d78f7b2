"""A checkpoint of any format as a transformers model in float32: what the CPU backends compute with.

The tensors come through the same tables as a conversion, inverted, so a model that answers rightly here was written
rightly. float32 whatever the files hold: bfloat16 and float16 weights are exact in it, and a CPU is no slower.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM, PreTrainedModel

from converter import ops
from converter.checkpoint import Checkpoint, check_repeats
from converter.errors import Problem, SourceError, report

# transformers' names for what canonical names leave out: aliases of the embedding
ALIASES = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"}


def load(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model with these weights, in eval mode. Reads every tensor once.

    Raises:
        SourceError: a tensor that only repeats others does not equal them; transformers misses or does not know one.
    """
    check_repeats(checkpoint)
    config = CONFIG_MAPPING[checkpoint.config["model_type"]](
        **{key: value for key, value in checkpoint.config.items() if key not in ("architectures", "torch_dtype")}
    )
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    float32 = np.dtype(np.float32)
    weights = {
        name: torch.from_numpy(np.array(ops.cast(tensor, float32).read()))  # a copy that is torch's own
        for name, tensor in checkpoint.tensors.items()
    }
    weights |= {alias: weights[name] for alias, name in ALIASES.items() if name in weights}
    if checkpoint.config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["shared.weight"]
    # transformers 5 ties T5's lm_head whatever the config says; assigned one by one, an untied one stays untied.
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected:
        problems = [Problem(name, got="not there") for name in missing]
        problems += [Problem(name, expected="no such tensor") for name in unexpected]
        raise SourceError(report("transformers' model does not fit the tensors", problems))
    model.config.tie_word_embeddings = bool(checkpoint.config["tie_word_embeddings"])
    return model.eval()
