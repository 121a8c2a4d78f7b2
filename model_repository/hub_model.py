"""What backends have in common that read a Hugging Face model by themselves: vLLM, the LLM API, transformers.

WEIGHTS ─> a folder with config.json, or hub:ORG/NAME[@REVISION] ─> what the server shall open, and under which name

Any model may be served, of families that this project does not convert, too: so nothing of it is checked but that
config.json is there and that ranks can share its heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.convert import checked_name
from converter.errors import OptionsError, SourceError
from converter.formats import folder, hub, huggingface, is_hub
from converter.formats.huggingface import CONFIG
from converter.formats.outside import load_json
from converter.storage import LocalStorage, open_storage
from model_repository.build import Wanted, absolute, served_path


@dataclass(frozen=True)
class HubModel:
    """A model to be served.

    Args:
        name: of the served model.
        path: what the server opens: an absolute path, or ORG/NAME.
        revision: of the hub, empty where none is asked for.
        config: its config.json; empty where it lies on the hub.
    """

    name: str
    path: str
    revision: str
    config: Mapping[str, Any]


def find(wanted: Wanted) -> HubModel:
    """The model that WEIGHTS names. Nothing is downloaded: the server does.

    Raises:
        SourceMissingError, SourceError: no such folder, or no model in it.
        UsageError, OptionsError: a name or a path that cannot be served.
    """
    if is_hub(wanted.weights):
        path, revision = hub.named(wanted.weights)
        name = checked_name(wanted.name or path.split("/")[-1])
        if wanted.engine_dir:  # a folder has no revisions
            return HubModel(name, absolute(wanted.engine_dir), "", {})
        return HubModel(name, path, revision or "", {})
    weights = folder(wanted.weights)
    if not weights.is_file(CONFIG):
        raise SourceError(f"{wanted.weights}: expected a Hugging Face model, found no {CONFIG}")
    config = load_json(weights.read(CONFIG), weights.path(CONFIG))
    if "model_type" not in config:
        raise SourceError(f"{weights.path(CONFIG)}: expected a Hugging Face model, found no `model_type`")
    return HubModel(checked_name(wanted.name or weights.name), served_path(wanted.engine_dir, weights), "", config)


def tokenizer(wanted: Wanted) -> dict[str, str]:
    """The engine's argument for --tokenizer, empty where none is given: a folder, which transformers opens.

    Raises:
        SourceMissingError, SourceError: no tokenizer there.
        OptionsError: one that only the server of ids could take: a single file, or one in a bucket.
    """
    if not wanted.tokenizer:
        return {}
    huggingface.tokenizer(wanted.tokenizer)
    where = open_storage(wanted.tokenizer)
    if not (isinstance(where, LocalStorage) and where.is_folder()):
        raise OptionsError(
            f"--tokenizer {wanted.tokenizer}: expected a folder on a disk, as save_pretrained writes it: that is what "
            f"--backend {wanted.backend} opens. --set tokenizer=PATH names one that only the server has"
        )
    return {"tokenizer": str(Path(str(where)).resolve())}


def check_ranks(model: HubModel, tensor_parallel: int) -> None:
    """Raise OptionsError where the ranks cannot share the model's heads."""
    text = model.config.get("text_config")  # of a model that sees pictures, too
    text = text if isinstance(text, dict) else model.config
    heads = text.get("num_attention_heads") or text.get("n_head") or text.get("num_heads")
    if isinstance(heads, int) and heads % tensor_parallel:
        raise OptionsError(
            f"--set tensor_parallel_size={tensor_parallel}: {heads} heads cannot be shared by that many ranks"
        )
