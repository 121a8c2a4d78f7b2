"""How tests ask a real Triton: tensors, streams, HTTP; what they have `evaluate` ask."""

from __future__ import annotations

import json
import queue
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from model_repository.server import TritonServer


def tensors(arrays: Mapping[str, np.ndarray]) -> list[Any]:
    """The inputs of a request; texts are arrays of bytes."""
    found = []
    for name, array in arrays.items():
        found.append(triton.InferInput(name, list(array.shape), triton.np_to_triton_dtype(array.dtype)))
        found[-1].set_data_from_numpy(array)
    return found


def padded(prompts: Sequence[Sequence[int]], dtype: Any, padding: int, width: int = 0) -> np.ndarray:
    """[prompts, longest] ids, with what no model may look at behind the shorter ones."""
    ids = np.full((len(prompts), max(width, *map(len, prompts))), padding, dtype)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids


def streamed(address: str, model: str, inputs: list[Any]) -> list[Any]:
    """All responses to one request; the last one, and no other, is marked as such."""
    heard: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: heard.put(error or result))
        client.async_stream_infer(model, inputs, enable_empty_final_response=True)
        responses = []
        while True:
            responses.append(heard.get(timeout=60))
            if isinstance(responses[-1], Exception):
                raise responses[-1]
            if responses[-1].get_response().parameters["triton_final_response"].bool_param:
                return responses


def http(server: TritonServer, path: str, body: Any = None, timeout: float = 60) -> str:
    """The answer to a POST of `body`, or to a GET without one; urllib's HTTPError where it is refused."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}/v2/{path}", data)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return str(answer.read().decode())


def loaded(server: TritonServer, model: str, timeout: float = 60) -> str:
    """What a server in explicit mode says to who asks it to load a model; empty when it is served."""
    try:
        return http(server, f"repository/models/{model}/load", {}, timeout)
    except urllib.error.HTTPError as error:
        return str(json.loads(error.read())["error"])


def evaluating(
    folder: Path, address: str, model: str, tokens: Sequence[str], prompts: Sequence[Sequence[int]], **options: Any
) -> dict[str, Any]:
    """Options of `evaluate` for rows that become these ids. Token i of the tokenizer is tokens[i]; </s> ends.

    Args:
        options: max_input_tokens, max_output_tokens.
    """
    tokenizer = Tokenizer(WordLevel({token: id for id, token in enumerate(tokens)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    documents = [" ".join(tokens[id] for id in prompt) for prompt in prompts]
    rows = [{"id": str(i), "document": document, "summary": "w1"} for i, document in enumerate(documents)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"dataset": folder / "rows.jsonl", "tokenizer": folder / "tokenizer.json", "output": folder / "out"}
    return {"endpoint": address, "model": model, "prompt": "{document}", "concurrency": 3, **files, **options}
