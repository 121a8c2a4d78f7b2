"""LoRA adapters as PEFT saves them, merged into a checkpoint while it streams: W + (B @ A) * scaling.

    adapter_config.json           r, lora_alpha, target_modules, ...
    adapter_model.safetensors     or adapter_model.bin, with the names of the model inside two wrappers:
        base_model.model.<module>.lora_A.weight        [r, in];  .lora_B.weight     [out, r]
        base_model.model.<module>.lora_embedding_A     [r, rows]; .lora_embedding_B [width, r]
        base_model.model.<module>.weight               a tensor that was trained itself (modules_to_save, bias)

The tensors say what was adapted; the config says how they are scaled, and is held against them: an adapter that lost
tensors on its way still loads in PEFT, with a warning. Refused is everything that a sum of two matrices cannot hold,
and everything that was trained on a base that is not the one given.

Source of the facts: huggingface/peft 0.21: tuners/lora/{layer,model}.py, utils/save_and_load.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np

from converter import ops
from converter.checkpoint import Checkpoint, Watched
from converter.errors import Problem, SourceError, SourceMissingError, report
from converter.families.base import Tensors
from converter.formats.lora_config import MEND, Patterns, Settings, of_module, settings_of, short, targeted
from converter.formats.outside import load_json, shown
from converter.formats.shards import READERS
from converter.storage import Storage
from converter.tensor import DTYPES, LazyTensor, short_name

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT takes the first that is there
PREFIX = "base_model.model."  # PeftModel.base_model (the tuner) .model (the transformers model)

# What the input embedding and the output layer are called; PEFT saves them whole when the vocabulary was resized.
VOCABULARY = ("shared", "embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head", "embed_out")

LINEAR = ("lora_A", "lora_B")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")

# Drop this, then add that: an adapter trained on the bare model (GPT2Model), or on one inside another module.
RENAMINGS = (("", ""), ("", "transformer."), ("", "model."), ("transformer.", ""), ("model.", ""))

MAX_CONFIG = 1 << 24  # bytes


def recognises(storage: Storage) -> bool:
    """Whether this folder holds an adapter."""
    return storage.is_file(CONFIG)


def merge(base: Checkpoint, adapter: Storage, of_hub: bool = False) -> Checkpoint:
    """The base with the adapter's product added to its weights; nothing of either is read.

    Args:
        of_hub: the folder is this machine's copy of a commit, which is its name.

    Raises:
        SourceMissingError: no config or no weights there.
        SourceError: damaged, of another model, or of a kind that cannot be merged; names everything at once.
    """
    opened = _open(adapter)
    tensors = _Merge(base.tensors, opened, bool(base.config.get("tie_word_embeddings", False))).result()
    digest = hashlib.sha256(f"{base.source.fingerprint}\0{opened.digest}".encode()).hexdigest()
    own = adapter.name if of_hub else opened.watched.stamp
    return replace(
        base,
        tensors=tensors,
        source=replace(base.source, fingerprint=digest),
        stamp=hashlib.sha256(f"{base.stamp}\0{own}".encode()).hexdigest(),
        watched=base.watched if of_hub else (*base.watched, opened.watched),
    )


def merged(tensors: Tensors, adapter: Storage, tied: bool) -> dict[str, LazyTensor]:
    """Canonical tensors with the adapter's product added; those that it does not touch are the same objects.

    Args:
        tied: whether the model has one tensor for its input embedding and its output layer.

    Raises:
        SourceMissingError, SourceError: see `merge`.
    """
    return _Merge(tensors, _open(adapter), tied).result()


def describe(adapter: Storage) -> dict[str, Any]:
    """What an adapter is, for people; also of one that `merge` refuses.

    Raises:
        SourceMissingError, SourceError: nothing there, damaged, or a config that makes no sense.
    """
    opened = _open(adapter, refuse=False)
    settings = opened.settings
    targets = settings.targets
    return {
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "target_modules": sorted(map(shown, targets)) if isinstance(targets, tuple) else targets and shown(targets),
        "adapted_tensors": len(opened.products),
        "dtypes": sorted({short_name(tensor.spec.dtype) for tensor in opened.tensors.values()}),
        "parameters": sum(tensor.spec.size for tensor in opened.tensors.values()),
        "nbytes": sum(tensor.spec.nbytes for tensor in opened.tensors.values()),
        "base_model_name_or_path": shown(settings.base),
    }


# ------------------------------------------------------------------------------------------------------------- opening


@dataclass(frozen=True)
class _Adapter:
    """An opened adapter.

    Attributes:
        watched: its files.
        products: module -> {"lora_A": ..., "lora_B": ...}, either may be missing.
        saved: name of a tensor of the model -> what it was trained to be.
        unknown: what else is there.
        digest: over its config and the names, sizes and headers of its files.
    """

    where: str
    settings: Settings
    tensors: Tensors
    watched: Watched
    products: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    saved: dict[str, LazyTensor] = field(default_factory=dict)
    unknown: list[Problem] = field(default_factory=list)
    digest: str = ""


def _open(storage: Storage, refuse: bool = True) -> _Adapter:
    files = storage.files()
    weights = next((name for name in WEIGHTS if name in files), None)
    missing = [" or ".join(names) for names in ((CONFIG,), WEIGHTS) if not files.keys() & set(names)]
    if missing or weights is None:
        raise SourceMissingError(f"{storage}: expected a LoRA adapter of PEFT, found no {' and no '.join(missing)}")
    where = storage.path(CONFIG)
    if files[CONFIG] > MAX_CONFIG:
        raise SourceError(f"{where}: expected an adapter's config, found {files[CONFIG]} bytes")
    text = storage.read(CONFIG)
    settings = settings_of(load_json(text, where), where, refuse)
    tensors, header = READERS[weights[weights.rindex(".") :]](storage, weights, files[weights])
    digest = hashlib.sha256(b"\0".join((text, repr((weights, files[weights])).encode(), header))).hexdigest()
    watched = Watched.of(storage, files, CONFIG, *WEIGHTS)
    opened = _Adapter(str(storage), settings, tensors, watched, digest=digest)
    for name, tensor in tensors.items():
        _sort_in(opened, name, tensor)
    return opened


def _sort_in(opened: _Adapter, name: str, tensor: LazyTensor) -> None:
    """`base_model.model.encoder.q.lora_A.default.weight` -> product `encoder.q`, its lora_A."""
    parts = name.removeprefix(PREFIX).split(".")
    kinds = [number for number, part in enumerate(parts) if part.startswith("lora_")]
    if not name.startswith(PREFIX):
        opened.unknown.append(Problem(shown(name), f"{PREFIX}<module>.lora_A.weight and the like", str(tensor.spec)))
    elif not kinds:
        # PEFT wraps what it adapts or saves; older versions left the wrapper in the name
        path = ".".join(parts).replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
        _put(opened, opened.saved, path.replace(".base_layer.", "."), name, tensor)
    else:
        at = kinds[0]
        kind, rest = parts[at], parts[at + 1 :]
        if kind in LINEAR and rest[-1:] == ["weight"]:
            rest = rest[:-1]
        elif kind not in EMBEDDING:
            at = 0
        if at == 0 or len(rest) > 1:  # one more part is the adapter's name, which newer versions leave out
            rule = "only lora_A, lora_B, lora_embedding_A and lora_embedding_B can be merged"
            opened.unknown.append(Problem(shown(name), "no such tensor", str(tensor.spec), rule))
        else:
            _put(opened, opened.products.setdefault(".".join(parts[:at]), {}), kind, name, tensor)


def _put(opened: _Adapter, where: dict[str, LazyTensor], key: str, name: str, tensor: LazyTensor) -> None:
    if key in where:
        opened.unknown.append(Problem(shown(name), "one such tensor", f"also {shown(where[key].origin)}"))
    where.setdefault(key, tensor)


# ------------------------------------------------------------------------------------------------------------- merging


@dataclass(frozen=True)
class _Names:
    """How the adapter calls the base's tensors."""

    drop: str
    add: str

    def canonical(self, name: str) -> str:
        return self.add + name[len(self.drop) :] if name.startswith(self.drop) else name

    def of_adapter(self, canonical: str) -> str | None:
        """None: a tensor beside the part of the model that it was trained on."""
        return self.drop + canonical[len(self.add) :] if canonical.startswith(self.add) else None


def _names(opened: _Adapter, tensors: Tensors) -> _Names:
    """The one renaming with which the base has most of the adapter's names; none where two do as well."""
    names = [f"{module}.weight" for module in opened.products] + list(opened.saved)
    found = {_Names(*one): sum(_Names(*one).canonical(name) in tensors for name in names) for one in RENAMINGS}
    most = [one for one, count in found.items() if count == max(found.values())]
    return most[0] if len(most) == 1 else _Names("", "")


class _Merge:
    """One adapter on its way into one base: collects problems, then puts the tensors together."""

    def __init__(self, tensors: Tensors, opened: _Adapter, tied: bool) -> None:
        self.base, self.opened, self.tied = tensors, opened, tied
        self.settings = opened.settings
        self.names = _names(opened, tensors)
        self.patterns = Patterns(f"{opened.where}/{CONFIG}")
        self.problems = list(opened.unknown)
        self.changed: dict[str, str] = {}  # canonical name of what was added to or replaced -> the adapter's name
        self.turned = {module: self._turned(module) for module in opened.products}

    def result(self) -> dict[str, LazyTensor]:
        """Raises SourceError that names everything that does not fit."""
        result = dict(self.base)
        for name, tensor in self.opened.saved.items():
            canonical = self.names.canonical(name)
            if self._fits(canonical, name, tensor):
                result[canonical] = tensor
        if not self.opened.products and not self.opened.saved:
            self.problems.append(Problem("the whole adapter", f"tensors {PREFIX}<module>.lora_A.weight", "none"))
        for module, parts in self.opened.products.items():
            rank = of_module(self.settings.rank_pattern, self.settings.r, module, self.patterns)
            alpha = of_module(self.settings.alpha_pattern, self.settings.alpha, module, self.patterns)
            if self._mergeable(module, parts, rank, alpha):
                canonical = self.names.canonical(f"{module}.weight")
                a, b = (parts[kind] for kind in sorted(parts))
                left, right = (ops.transpose(a), ops.transpose(b)) if self.turned[module] else (b, a)
                scaling = self.settings.scaling(alpha, rank)
                result[canonical] = ops.add_lora(result[canonical], left, right, scaling)
        self._missing()
        self.problems += self.patterns.problems
        if self.problems:
            raise SourceError(report(f"{self.opened.where}: this adapter does not fit the model", self.problems, MEND))
        return result

    def _wrong(self, name: str, expected: str, got: str, rule: str = "") -> bool:
        self.problems.append(Problem(shown(name), expected, got, rule, self.opened.where))
        return False

    def _known(self, canonical: str, name: str, spec: str) -> bool:
        """Whether the base has such a tensor, and the adapter may change it."""
        if self.tied and _of_vocabulary(canonical):
            rule = (
                "the model ties them (tie_word_embeddings): embedding and output layer are one tensor, and the adapter "
                "changes only one of their two uses, or each in its own way"
            )
            return self._wrong(name, "embedding and output layer left as they are", spec, rule)
        if canonical not in self.base:
            return self._wrong(name, "a tensor of the model", "the model has none of this name")
        other = self.changed.setdefault(canonical, name)
        # the embedding that is adapted is saved as well, as it was before
        if other != name and other != f"{name}.weight":
            return self._wrong(name, "one name for every module", f"also {shown(other)} for {canonical}")
        return True

    def _typed(self, name: str, tensor: LazyTensor) -> bool:
        if tensor.spec.dtype.name not in DTYPES.values():
            return self._wrong(name, " or ".join(DTYPES), str(tensor.spec))
        return True

    # ------------------------------------------------------------------------------------------------- whole tensors

    def _fits(self, canonical: str, name: str, tensor: LazyTensor) -> bool:
        """Whether a tensor that was trained itself can stand in the base's place."""
        spec = str(tensor.spec)
        if not self._known(canonical, name, spec) or not self._typed(name, tensor):
            return False
        if not self._declared(name):
            return self._wrong(name, "modules_to_save or bias that name it", spec, "the config does not say so")
        shape = self.base[canonical].spec.shape
        if tensor.spec.shape != shape:
            return self._wrong(
                name, str(list(shape)), str(list(tensor.spec.shape)), _resized(canonical, shape, tensor.spec.shape)
            )
        return True

    def _declared(self, name: str) -> bool:
        """Whether the config says that this tensor was trained; PEFT saves embeddings also without being told."""
        # older versions saved with `all` whatever has bias in its name: T5's relative_attention_bias
        bias = name.endswith(".bias") if self.settings.bias == "lora_only" else "bias" in name
        return (bias and self.settings.bias != "none") or _of_vocabulary(name) or self._below(name, self.settings.saved)

    def _below(self, name: str, modules: tuple[str, ...]) -> bool:
        """Whether a tensor belongs to one of the modules, which PEFT finds by how their names end."""
        return any(module.endswith(modules) for module in _modules(name))

    # ------------------------------------------------------------------------------------------------------ products

    def _turned(self, module: str) -> bool | None:
        """Whether the base keeps the weight as [in, out], which is A and B transposed; None: both, or neither.

        PEFT goes by the module's class and sets `fan_in_fan_out` to it, of a model with both kinds to the last one's.
        """
        parts, weight = self.opened.products[module], self.base.get(self.names.canonical(f"{module}.weight"))
        if any(kind in parts for kind in EMBEDDING):
            return True
        if weight is None or any(len(part.spec.shape) != 2 for part in parts.values()) or len(parts) != 2:
            return None
        shape = (parts["lora_B"].spec.shape[0], parts["lora_A"].spec.shape[1])
        if shape[0] == shape[1] or weight.spec.shape not in (shape, shape[::-1]):
            return None
        return weight.spec.shape != shape

    def _mergeable(self, module: str, parts: Mapping[str, LazyTensor], rank: int, alpha: float) -> bool:
        """Whether A and B are whole and fit."""
        canonical = self.names.canonical(f"{module}.weight")
        specs = ", ".join(f"{kind} {part.spec}" for kind, part in sorted(parts.items()))
        if not self._known(canonical, module, specs):
            return False
        if parts.keys() not in ({*LINEAR}, {*EMBEDDING}):
            return self._wrong(module, "lora_A and lora_B, or lora_embedding_A and lora_embedding_B", specs)
        if not targeted(self.settings, module, self.patterns, certain=False):
            targets = short(self.settings.targets)
            return self._wrong(module, "a module that the config targets", specs, f"target_modules: {targets}")
        if not all(self._typed(f"{module}.{kind}", part) for kind, part in parts.items()):
            return False
        a, b = (parts[kind].spec.shape for kind in sorted(parts))
        shape = self.base[canonical].spec.shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            return self._wrong(module, "A [r, in] and B [out, r]", specs)
        if a[0] != rank:
            return self._wrong(module, f"r = {rank}", specs, "r and rank_pattern of the config")
        linear = "lora_A" in parts
        product = (b[0], a[1]) if linear else (a[1], b[0])
        if shape != product and not (linear and shape == product[::-1]):
            return self._wrong(module, f"factors of {list(shape)}", specs, _resized(canonical, shape, product))
        if not abs(self.settings.scaling(alpha, rank)) <= float(np.finfo(np.float32).max):
            return self._wrong(module, "a scaling that fp32 can hold", f"alpha {alpha}, r {rank}")
        return self.turned[module] is not None or self._settled(module, specs)

    def _settled(self, module: str, specs: str) -> bool:
        """Whether `fan_in_fan_out` can say how a square weight lies: no other weight may contradict it."""
        flag = self.settings.fan_in_fan_out
        for other, turned in self.turned.items():
            if turned is (not flag) and "lora_A" in self.opened.products[other]:
                rule = f"fan_in_fan_out is {str(flag).lower()}, but {shown(other)} lies the other way"
                return self._wrong(module, "to know whether the weight is [in, out] or [out, in]", specs, rule)
        self.turned[module] = flag
        return True

    # ------------------------------------------------------------------------------------------------------- missing

    def _missing(self) -> None:
        """What the config says was trained, and the adapter does not have."""
        saved = set(map(self.names.canonical, self.opened.saved))
        adapted = {self.names.canonical(f"{module}.weight") for module in self.opened.products}
        absent: dict[str, str] = {}
        for canonical, tensor in self.base.items():
            name = self.names.of_adapter(canonical)
            if name is None or canonical in saved:
                continue
            module, _, kind = name.rpartition(".")
            weight = kind == "weight" and len(tensor.spec.shape) == 2 and canonical not in adapted
            if weight and targeted(self.settings, module, self.patterns, certain=True):
                absent[module] = f"target_modules: {short(self.settings.targets)}"
            if self.settings.saved and self._below(name, self.settings.saved):
                absent[name] = f"modules_to_save: {short(list(self.settings.saved))}"
            if kind == "bias" and self._trained_bias(canonical, adapted):
                bias = self.settings.bias
                absent[name] = f"bias: {bias} (some versions of PEFT did not save it; `none` merges without)"
        for name, rule in absent.items():
            self._wrong(name, "trained values in the adapter", "no tensor", rule)
        known = [*self.opened.saved, *filter(None, map(self.names.of_adapter, self.base))]
        modules = {module for name in known for module in _modules(name)}
        for module in self.settings.saved:
            if not any(one.endswith(module) for one in modules):
                self._wrong(module, "a module of the model", "neither model nor adapter has it", "modules_to_save")

    def _trained_bias(self, canonical: str, adapted: set[str]) -> bool:
        of_adapted = f"{canonical.removesuffix('bias')}weight" in adapted
        return self.settings.bias == "all" or (self.settings.bias == "lora_only" and of_adapted)


def _modules(name: str) -> Iterator[str]:
    """The modules that a tensor lies in: `a.b.weight` -> `a`, `a.b`."""
    return accumulate(name.split(".")[:-1], "{}.{}".format)


def _of_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for every token."""
    return name.rpartition(".")[0].rpartition(".")[2] in VOCABULARY


def _resized(canonical: str, shape: tuple[int, ...], trained: tuple[int, ...]) -> str:
    """Why the adapter's tensor or product has other rows than the base's; empty where it is something else."""
    if _of_vocabulary(canonical) and len(shape) == 2 and shape[1:] == trained[1:]:
        return f"the vocabulary was resized to {trained[0]} before training; resize the base to it and save it first"
    return ""
