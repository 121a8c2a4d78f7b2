"""TensorRT-LLM models: parameters that the backend asserts, and the engine (or checkpoint) that they name.

Source: NVIDIA/TensorRT-LLM, triton_backend (inflight_batcher_llm/src/model_instance_state.cc, docs of the parameters)
and issues 2419 and 2814 for cross_kv_cache_fraction; tensorrt_llm/mapping.py for ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converter import manifest
from converter.errors import SourceError
from converter.formats.outside import load_json
from converter.storage import LocalStorage
from model_repository.rules.base import WARNING, Finding, Model, Models, placeholder, some, whole
from model_repository.rules.fastertransformer import manifest_is_the_one
from model_repository.settings import SCALAR, parsed
from model_repository.tensorrt_llm import SETTINGS

CONFIG = "config.json"
BATCHING = ("inflight_fused_batching", "inflight_batching", "V1", "v1")  # getBatchingTypeFromParams throws at others
# Asked for without a default, so they are there, empty (getGuidedDecodingConfigFromParams).
EMPTY = ("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend")
PATHS = ("gpt_model_path", "encoder_model_path")
CROSS = "cross_kv_cache_fraction"
CHECKED = {key: one for key, one in SETTINGS.items() if one is not SCALAR and key != "gpt_model_type"}
OTHERS = {"gpt_model_path": "EncoderModel", "encoder_model_path": "DecoderModel"}  # `architecture` of the wrong half


def parameters_are_there(model: Model, models: Models) -> Iterator[Finding]:
    """The backend throws without them; what it says names no parameter of the template."""
    at = "parameters:{}".format
    if not model.parameters.get("gpt_model_path", "").strip():
        mend = "name the folder of the engine (or of its decoder), as the server sees it"
        found = "empty" if "gpt_model_path" in model.parameters else "no such parameter"
        yield model.finding("parameter gpt_model_path", found, mend, at=at("gpt_model_path"))
    kind = model.parameters.get("gpt_model_type", "")
    if kind not in BATCHING and not placeholder(kind):
        expected = f"parameter gpt_model_type, one of {', '.join(BATCHING)}"
        yield model.finding(expected, repr(kind), f"gpt_model_type {BATCHING[0]}", at=at("gpt_model_type"))
    for key in EMPTY:
        if key not in model.parameters:
            found, mend = "no such parameter", f'parameters {{ key: "{key}" value {{ string_value: "" }} }}'
            yield model.finding(f"parameter {key}, at least empty: the backend asks for it", found, mend)


def values_can_be(model: Model, models: Models) -> Iterator[Finding]:
    """Of many values that it cannot read the backend says in its log that it takes its default."""
    for key in sorted(model.parameters.keys() & CHECKED.keys()):
        value = model.filled(key)
        if value and not CHECKED[key].holds(parsed(value)):
            yield model.finding(f"{key}: {CHECKED[key].expected}", value, "correct it", at=f"parameters:{key}")


def encoders_share_the_cache(model: Model, models: Models) -> Iterator[Finding]:
    """An encoder-decoder model needs cross_kv_cache_fraction, any other must not have it: the runtime asserts both."""
    encoder, fraction = (bool(model.parameters.get(key, "").strip()) for key in ("encoder_model_path", CROSS))
    if encoder and not fraction:
        mend = f"{CROSS} 0.5: the share of the cache that cross-attention has"
        yield model.finding(f"{CROSS} beside encoder_model_path", "none", mend, at="parameters:encoder_model_path")
    if fraction and not encoder:
        mend = "remove it, or name the engine of the encoder"
        found = f"{CROSS} without encoder_model_path"
        yield model.finding(f"no {CROSS} without an encoder", found, mend, at=f"parameters:{CROSS}")


def encoders_take_whole_prompts(model: Model, models: Models) -> Iterator[Finding]:
    """Chunked context is not for encoder-decoder models (TensorRT-LLM, docs of the parameters)."""
    if model.filled("encoder_model_path") and model.filled("enable_chunked_context") == "true":
        at, expected = "parameters:enable_chunked_context", "enable_chunked_context false: the model has an encoder"
        yield model.finding(expected, "true", "remove it", at=at)


def the_backend_takes_the_gpus(model: Model, models: Models) -> Iterator[Finding]:
    """Without a group, or with one of another kind, Triton starts an instance on every GPU."""
    if not model.kinds() or set(model.kinds()) != {"KIND_CPU"}:
        yield model.finding(
            "an instance group of KIND_CPU: the backend takes the GPUs itself",
            some(model.kinds()),
            "instance_group { count: 1 kind: KIND_CPU }",
            at="instance_group",
        )


def streams_can_be_asked_for(model: Model, models: Models) -> Iterator[Finding]:
    """Only a decoupled model streams; it then takes no plain gRPC calls, so it should stream."""
    decoupled = model.config.model_transaction_policy.decoupled
    if decoupled and "streaming" not in [tensor.name for tensor in model.config.input]:
        yield model.finding(
            "an input streaming (TYPE_BOOL) of a decoupled model",
            "none: no request can ask for a stream",
            "declare it, or decoupled: false",
            at="model_transaction_policy.decoupled",
        )


# -------------------------------------------------------------------------------------------------------------- engine


def engines_are_there(model: Model, models: Models) -> Iterator[Finding]:
    """What the paths name, as far as this machine can see it: the server may be another one."""
    for key in PATHS:
        path, at = model.filled(key), f"parameters:{key}"
        if not path:
            continue
        if not path.startswith("/"):
            mend = "mount or copy it there, and give that path"
            yield model.finding("an absolute path that the server can open", repr(path), mend, at=at)
        elif model.local and not Path(path, CONFIG).is_file():
            found = f"{path}, with no {CONFIG} on this machine"
            mend = "correct it, unless the server is another machine"
            yield model.finding("the folder of an engine or a checkpoint", found, mend, at=at, severity=WARNING)
        elif model.local:
            yield from _ranks(model, key, LocalStorage(path))


def _ranks(model: Model, key: str, engine: LocalStorage) -> Iterator[Finding]:
    """A file per rank, tp * pp of them, and a GPU for each."""
    where = engine.path(CONFIG)
    try:
        stated = load_json(engine.read(CONFIG), where)
    except SourceError as error:
        yield model.finding("an engine's configuration", str(error), "build or copy it again", file=where)
        return
    built = isinstance(stated.get("pretrained_config"), dict)
    config = stated["pretrained_config"] if built else stated
    if config.get("architecture") == OTHERS[key]:
        at, mend = f"parameters:{key}", "encoder_model_path names the encoder, gpt_model_path the decoder"
        yield model.finding(f"the other half of the model in {key}", f"architecture {OTHERS[key]}", mend, at=at)
        return
    world, ranks = _sizes(config)
    if world != ranks:
        found = f"world_size {world}"
        yield model.finding(f"world_size {ranks}, as tp and pp give it", found, "build it again", file=where)
        return
    names = [f"rank{rank}.engine" if built else f"rank{rank}.safetensors" for rank in range(ranks)]
    files = engine.files()
    for name in names:
        if not files.get(name):
            found = "an empty file" if name in files else "no such file"
            yield model.finding(
                f"a file for each of the {ranks} ranks", found, "build or copy it again", file=engine.path(name)
            )
    beams = stated["build_config"].get("max_beam_width") if built and "build_config" in stated else None
    if isinstance(beams, int) and (wanted := whole(model.filled("max_beam_width"))) > beams:
        at, mend = "parameters:max_beam_width", f"max_beam_width {beams}, or build the engine for more"
        yield model.finding(f"at most {beams} beams, as the engine is built for", str(wanted), mend, at=at)
    if key == PATHS[0]:
        yield from _devices(model, ranks)
        parent = engine.parent() if engine.name == "decoder" else None
        for root in (engine, *([parent] if parent else [])):
            if root.is_file(manifest.MANIFEST):
                yield from manifest_is_the_one(model, hashlib.sha256(root.read(manifest.MANIFEST)).hexdigest())


def _sizes(config: dict[str, Any]) -> tuple[int, int]:
    """(world size as stated, as its factors give it); absent ones are 1."""
    mapping = config.get("mapping")
    values = mapping if isinstance(mapping, dict) else {}
    sizes = {key: value for key, value in values.items() if isinstance(value, int) and value > 0}
    ranks = sizes.get("tp_size", 1) * sizes.get("pp_size", 1) * sizes.get("cp_size", 1)
    return sizes.get("world_size", ranks), ranks


def _devices(model: Model, ranks: int) -> Iterator[Finding]:
    """`0,1;2,3`: commas within an instance, semicolons between (docs of gpu_device_ids)."""
    given = model.filled("gpu_device_ids")
    counts = [len(group.split(",")) for group in given.split(";")] if given else []
    if any(count != ranks for count in counts):
        mend = "name as many, or build for another tp and pp"
        at = "parameters:gpu_device_ids"
        yield model.finding(f"{ranks} GPUs for each instance, one per rank", given, mend, at=at)


RULES = (
    parameters_are_there,
    values_can_be,
    encoders_share_the_cache,
    encoders_take_whole_prompts,
    the_backend_takes_the_gpus,
    streams_can_be_asked_for,
    engines_are_there,
)
