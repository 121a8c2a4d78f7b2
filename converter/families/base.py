"""What a model family is: tables of names, shapes, layouts and hyper-parameters. rows.py runs them.

Canonical names are the state-dict names of transformers' models. A shape is written in words of the model's own
config (`"num_heads*d_kv d_model"`), so every row is checked against the checkpoint before anything is read. `{i}` is
expanded from the config, never matched by a pattern: missing and unexpected tensors are set differences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from converter import ops
from converter.errors import Problem, SourceError
from converter.tensor import DTYPES, LazyTensor, TensorSpec

Config = Mapping[str, Any]  # a Hugging-Face-style config: {"d_model": 4096, "num_heads": 16, ...}
Tensors = Mapping[str, LazyTensor]
NONE: Config = {}  # nothing changes it


class Layout(NamedTuple):
    """How canonical tensors lie in one stored tensor, and back.

    `forward` takes the row's canonical tensors and gives the stored one; `inverse` takes the stored tensor and gives
    the canonical ones in the same order. A layout without `forward` is only read; its rows state the stored shape. A
    `redundant` one stores more than that (padding, heads repeated), which on reading is compared. An `arithmetic` one
    computes with values: it is given the source's own, not those already cast to the type that is written.
    """

    name: str
    forward: Callable[[Sequence[LazyTensor]], LazyTensor] | None
    inverse: Callable[[LazyTensor], tuple[LazyTensor, ...]]
    redundant: bool = False
    arithmetic: bool = False


COPY = Layout("copy", lambda tensors: tensors[0], lambda stored: (stored,))
TRANSPOSE = Layout("transpose", lambda tensors: ops.transpose(tensors[0]), lambda stored: (ops.transpose(stored),))
STACKED = Layout("stacked", lambda tensors: ops.stack(tensors, axis=0), lambda stored: ops.unstack(stored, axis=0))
# n canonical [out, in] -> one stored [in, n, out]: FasterTransformer's fused q, k, v
STACKED_TRANSPOSES = Layout(
    "stacked transposes",
    lambda tensors: ops.stack([ops.transpose(tensor) for tensor in tensors], axis=1),
    lambda stored: tuple(ops.transpose(part) for part in ops.unstack(stored, axis=1)),
)


def scanned(name: str, heads: int | None = None, transposed: bool = True) -> Layout:
    """Layers stacked on axis 1 of one stored tensor, [in, n, out] -> n x [out, in]; only read.

    Args:
        heads: which axis of a layer is heads, followed by head_dim; both become one axis.
    """

    def layer(tensor: LazyTensor) -> LazyTensor:
        merged = tensor if heads is None else ops.merge_axes(tensor, heads)
        return ops.transpose(merged) if transposed else merged

    return Layout(name, None, lambda stored: tuple(layer(part) for part in ops.unstack(stored, axis=1)))


def one_way(name: str, forward: Callable[[Sequence[LazyTensor]], LazyTensor]) -> Layout:
    """A layout that is only written."""

    def inverse(stored: LazyTensor) -> tuple[LazyTensor, ...]:
        raise ValueError(f"the layout `{name}` is only written")

    return Layout(name, forward, inverse)


class Weight(NamedTuple):
    """A canonical tensor: its name (`{i}` = layer), its shape in words of the config, and when it exists.

    `each` names the config key that counts `{i}`; `when` names a feature of the model that must hold.
    """

    name: str
    shape: str
    each: str = ""
    when: str = ""


class Row(NamedTuple):
    """A stored tensor: which canonical tensors it is made of, how, and which axis tensor parallelism splits.

    A `derived` row is written, and on reading checked against the tensors it repeats, then dropped. A `lossy` one says
    why: what is read back is the nearest value, and writes the same bits again. With `across`, a config key, the one
    stored tensor holds the canonical ones of all layers, and `of` is expanded over them. `shape` is the stored shape in
    words of the config, where the layout cannot give it. `stage`: the one of the pipeline that has it, every one if
    there is none given; layers are divided among all.
    """

    name: str
    of: tuple[str, ...]
    layout: Layout = COPY
    split: int | None = None
    each: str = ""
    when: str = ""
    derived: bool = False
    across: str = ""
    shape: str = ""
    lossy: str = ""
    stage: str = ""  # FIRST or LAST
    otherwise: str = ""  # what it means where a derived one differs


FIRST, LAST = "first", "last"

Section = Mapping[str, Any]  # of a file: the texts of an INI file, {"head_num": "16", ...}, or the values of a JSON one


class Field(NamedTuple):
    """A hyper-parameter as it stands in a file: `write` gives its text (in JSON its value) from the config, `read` the
    config from it.

    The key is written `section.key`; a file without sections has keys alone. `read` is given the text and the section
    that it stands in, and raises ValueError (or KeyError: what else it takes is not there) where it cannot make sense
    of them. `absent` is what the reader of the file takes where there is none; without one nothing is stated, or, if it
    is `required`, the file is refused: its reader would take another model's value. A `narrow` field holds less than
    the config: what is read back need only be written alike. One that `repeats` others is compared with them.
    """

    key: str
    write: Callable[[Config], Any]
    read: Callable[[Any, Section], Config]
    absent: Any = None
    narrow: bool = False
    required: bool = False
    repeats: bool = False

    @property
    def place(self) -> tuple[str, str]:
        """(section, key), the section empty in a file that has none."""
        section, _, key = self.key.rpartition(".")
        return section, key


def number(key: str, config: str) -> Field:
    """An integer of the config under another name."""
    return Field(key, lambda values: str(values[config]), lambda text, _: {config: int(text)})


def flag(key: str, config: str, absent: str | None = None) -> Field:
    """A boolean of the config, spelled True or False."""
    return Field(key, lambda values: str(bool(values[config])), lambda text, _: {config: boolean(text)}, absent)


def boolean(text: str) -> bool:
    """What FasterTransformer's INI reader takes for true and false (3rdparty/INIReader.h); ValueError otherwise."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise ValueError(f"expected true, yes, on, 1 or false, no, off, 0, found {text!r}")


def constant(key: str, text: str, absent: str | None = None) -> Field:
    """The same text for every model of the family; another one, whatever its case, is another kind of model."""

    def read(found: str, section: Section) -> Config:
        if _meant(found) != _meant(text):
            raise ValueError(f"only {text!r} is supported")
        return {}

    return Field(key, lambda values: text, read, absent)


def value(key: str, config: str, absent: Any = None) -> Field:
    """A value of the config under another name, in JSON."""
    return Field(key, lambda values: values[config], lambda found, _: {config: found}, absent)


def fixed(key: str, meant: Any) -> Field:
    """The same JSON value for every model of the family; another one is another kind of model."""

    def read(found: Any, section: Section) -> Config:
        if found != meant or isinstance(found, bool) != isinstance(meant, bool):
            raise ValueError(f"only {meant!r} is supported")
        return {}

    return Field(key, lambda values: meant, read)


def _meant(text: str) -> str | bool:
    try:
        return boolean(text)
    except ValueError:
        return text.lower()


class Preset(NamedTuple):
    """What `--model` fixes: config values (activation, special tokens), and transformers' class if it has its own."""

    config: Config
    identity: Config = NONE


class T5XTable(NamedTuple):
    """How T5X stores the family: arrays, and the gin bindings that give config values."""

    marker: str  # an array that every checkpoint of the family has, and of no other
    rows: tuple[Row, ...]
    gin: Mapping[str, tuple[str, ...]]  # config key -> spellings in config.gin, without module prefix
    read_gin: Callable[[str, Any], Config]  # (config key, gin's value) -> config values
    read_names: Callable[[Collection[str]], Config]  # what the presence of arrays states
    write_gin: Callable[[Config], Mapping[str, Any]] | None  # {"T5Config.emb_dim": 512, ...}; None: only read


class Ignored(NamedTuple):
    """A stored name that may be left out, and why; `each` as in `Weight`."""

    name: str
    why: str
    each: str = ""


class HuggingFaceTable(NamedTuple):
    """How transformers stores the family: config.json, and names beside the canonical ones."""

    model_types: tuple[str, ...]
    # (config.json, names of the stored tensors) -> with everything that the tables use; raises ValueError
    read_config: Callable[[Config, Collection[str]], Config]
    write_config: Callable[[Config], Config]  # what transformers wants to read beside the values of the config
    aliases: Mapping[str, str]  # stored name -> canonical name that it only repeats
    tied: Mapping[str, str]  # the same for models that tie their embedding
    ignored: tuple[Ignored, ...]
    generation: tuple[str, ...]  # keys that generation_config.json repeats
    caveat: Callable[[Config], str] = lambda config: ""  # what to know of a written model before it is loaded
    prefix: str = ""  # of the base model, which checkpoints saved without a head leave out of all its names
    words: Mapping[str, str] = NONE  # another word of config.json -> the one that is meant


class Equivalent(NamedTuple):
    """Another family that a model belongs to, too, when some of its tensors are equal.

    `repeats` (expanded like any row): name = a tensor that has to be equal to `of`, which the other family keeps.
    """

    family: str
    repeats: tuple[Row, ...]
    identity: Config
    otherwise: str  # why it is impossible when they differ


class Folded(NamedTuple):
    """How models that a format has no place for become others of the family that compute the same.

    `rows`: the canonical tensors that change, made of those that there are (only forwards). What is read back is the
    other model.
    """

    when: str  # the feature of the models that it takes
    rows: tuple[Row, ...]
    config: Callable[[Config], Config]  # what changes in the config
    why: str


class FasterTransformerTable(NamedTuple):
    """How FasterTransformer stores the family: files, config.ini, what tensor parallelism must divide."""

    model_type: str  # for config.pbtxt
    rows: Callable[[Config, int], Iterable[Row]]  # for a config and a tensor-parallel size
    sections: tuple[str, ...]  # of config.ini; each states the name and the type of the weights
    name_key: str
    fields: tuple[Field, ...]
    divisible: tuple[str, ...]  # config keys that tensor parallelism must divide
    layers: tuple[str, ...]  # config keys that pipeline parallelism must divide
    compute_dtype: str  # default `data_type` of config.pbtxt; empty: the type of the weights
    check: Callable[[Config], Sequence[Problem]]  # what the C++ fixes and cannot express
    compute_dtypes: tuple[str, ...] = tuple(DTYPES)  # that the C++ has for the family
    caveat: Callable[[Config], str] = lambda config: ""  # where the C++ computes only nearly the same
    read_names: Callable[[Collection[str]], Config] = lambda names: {}  # what the presence of files states
    typical: Config = NONE  # tells its config.ini from those of families with the same sections
    folded: Folded | None = None


class Variant(NamedTuple):
    """What a TensorRT-LLM checkpoint depends on beside the model, named as in its config.json."""

    tp_size: int = 1
    pp_size: int = 1
    embedding_sharding_dim: int | None = None  # None: every rank has the whole embedding
    use_implicit_relative_attention: bool = False
    skip_cross_kv: bool = False
    quant_algo: str | None = None
    old_names: bool = False  # of T5's tensors, before version 1.0

    @property
    def use_parallel_embedding(self) -> bool:
        return self.embedding_sharding_dim is not None


class TensorRTLLMPart(NamedTuple):
    """One folder of a checkpoint: `encoder`, `decoder`, or the whole of a decoder alone, whose folder is the root.

    Its fields have keys in the section of the folder's name.
    """

    folder: str
    layers: str  # config key of its depth, which pipeline parallelism must divide
    rows: Callable[[Config, Variant], Iterable[Row]]
    fields: tuple[Field, ...]  # of config.json
    variant: tuple[str, ...] = ()  # what else of the variant stands there


class TensorRTLLMTable(NamedTuple):
    """How TensorRT-LLM stores the family: rank files, config.json, what parallelism must divide."""

    parts: tuple[TensorRTLLMPart, ...]
    divisible: tuple[str, ...]  # config keys that tensor parallelism must divide
    build: tuple[str, ...] = ()  # options of trtllm-build that its attention needs
    kv_heads: str = ""  # config key of key and value heads, where there may be fewer than ranks
    positions: str = ""  # config key of the longest sequence that a decoder alone was made for
    pipeline: bool = True  # whether TensorRT-LLM's own network of the family can be divided into stages
    check: Callable[[Config], Sequence[Problem]] = lambda config: ()  # what TensorRT-LLM cannot express
    caveat: Callable[[Config], str] = lambda config: ""  # where it computes only nearly the same
    # max_attention_window_size of the runtime, which no checkpoint can say: how many tokens each layer looks back on,
    # as far as they do not repeat; () where every layer looks back on all
    windows: Callable[[Config], tuple[int, ...]] = lambda config: ()
    unsaid: Config = NONE  # what a checkpoint has no word for, as it computes without one
    # the variant as it has to be for this model; raises OptionsError where it cannot be
    adapt: Callable[[Config, Variant], Variant] = lambda config, variant: variant


class Family(NamedTuple):
    """Everything known about a model family, as tables."""

    name: str
    architectures: tuple[str, ...]
    presets: Mapping[str, Preset]
    identity: Config  # what is true of every model of the family: architectures, model_type, ...
    defaults: Config  # values that a stored format may not hold; inspect marks them as assumed
    flags: tuple[str, ...]  # boolean config keys that the tables use, beside the sizes in the shapes
    token_ids: tuple[str, ...]  # config keys that name a token of the vocabulary
    numbers: tuple[str, ...]  # config keys that hold a positive number, beside the sizes
    features: Callable[[Config], frozenset[str]]
    weights: tuple[Weight, ...]
    huggingface: HuggingFaceTable
    t5x: T5XTable | None = None
    fastertransformer: FasterTransformerTable | None = None
    tensorrt_llm: TensorRTLLMTable | None = None
    sizes: tuple[str, ...] = ()  # config keys of sizes that no shape has
    nullable: tuple[str, ...] = ()  # of sizes, numbers and defaults: keys whose null says that there is none
    equivalent: Equivalent | None = None  # as what it can be written in formats that it has no table for

    def specs(self, config: Config, dtype: np.dtype[Any]) -> dict[str, TensorSpec]:
        """Canonical name -> shape for this config, layer after layer."""
        features = self.features(config)
        found = {}
        for _, neighbours in itertools.groupby(self.weights, lambda weight: weight.each):
            places = [(i, weight) for weight in neighbours for i in layers_of(weight, config, features)]
            for i, weight in sorted(places, key=lambda place: place[0]):
                found[weight.name.format(i=i)] = TensorSpec(dims(weight.shape, config), dtype)
        return found


Table = TypeVar("Table", T5XTable, FasterTransformerTable, TensorRTLLMTable)


def table_of(family: Family, table: Table | None, target: str) -> Table:
    """The table of a family for a format.

    Raises:
        SourceError: there is none.
    """
    if table is None:
        tables: dict[str, object] = {"FasterTransformer": family.fastertransformer, "TensorRT-LLM": family.tensorrt_llm}
        others = ", ".join([*(name for name, one in {**tables, "T5X": family.t5x}.items() if one), "Hugging Face"])
        raise SourceError(f"{target} cannot hold models of the family {family.name}; these can: {others}")
    return table


def dims(shape: str, config: Config) -> tuple[int, ...]:
    """`"num_heads*d_kv 4*d_model rows+2"` -> (1024, 2048, 514)."""

    def value(word: str) -> int:
        return int(word) if word.isdecimal() else int(config[word])

    return tuple(
        sum(math.prod(value(word) for word in product.split("*")) for product in axis.split("+"))
        for axis in shape.split()
    )


def words_of(shape: str) -> set[str]:
    """The config keys in a shape."""
    return {word for word in shape.replace("*", " ").replace("+", " ").split() if not word.isdecimal()}


def layers_of(entry: Weight | Row, config: Config, features: frozenset[str]) -> range:
    """The values of `{i}` for one entry of a table; empty where its feature does not hold."""
    if entry.when and entry.when not in features:
        return range(0)
    return range(int(config[entry.each])) if entry.each else range(1)
