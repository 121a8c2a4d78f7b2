"""adapter_config.json: what an adapter says of itself, checked, and which modules it means.

Everything comes from outside: wrong types are named together, what cannot be merged is refused with the reason, and
patterns (PEFT takes regular expressions) run under a time limit.

Source of the facts: huggingface/peft 0.21: tuners/lora/{config,layer}.py, tuners/tuners_utils.py
(check_target_module_exists), utils/other.py (get_pattern_key).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from converter.errors import Problem, SourceError, report
from converter.formats.outside import shown

# Settings that change what the tensors mean, and why they are refused where they are set.
REFUSED = {
    "use_dora": "DoRA: the merged columns are scaled by a trained magnitude",
    "use_qalora": "QALoRA: its A is of pooled inputs of a quantized model",
    "use_bdlora": "BD-LoRA: its factors are block-diagonal and stored in another shape",
    "lora_bias": "the product has a trained bias, which only PEFT's own layer can add",
    "layer_replication": "the adapter is for a model whose layers were repeated",
    "target_parameters": "it adapts parameters, not modules (experts kept in one tensor)",
    "trainable_token_indices": "rows of the embedding were trained instead of the whole",
    "megatron_config": "it was trained on Megatron's parallel layers",
    "alora_invocation_tokens": "aLoRA adapts only the tokens after its invocation: it cannot be merged",
    "arrow_config": "Arrow chooses between adapters for every token: it cannot be merged",
    "kasa_config": "KaSA: the base was truncated before training, and a diagonal was trained between A and B",
    "monteclora_config": "Monteclora: the weights are sampled",
    "velora_config": "VeLoRA: keeps buffers that this version does not know",
}
# Settings that look like such and are none: they concern only how A and B began, or how the adapter is loaded.
HARMLESS = ("use_rslora", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "runtime_config")
# Beginnings that leave the base alone (layer.py: LoraLayer.update_layer) ...
BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")
# ... and those that subtract from it what the adapter begins with: merged into the original base, it counts twice.
CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")

ANY_LAYER = re.compile(r"\.[^.]*\.(\d+)(?=\.)")  # what stands for layers_pattern where there is none

MAX_ENTRIES = 10_000  # of a list or a mapping in the config
MAX_PATTERN = 1000  # characters
MAX_REPEATS = 1_000_000  # counts of a pattern, multiplied: `regex` writes repetitions out before it matches
PATTERN_SECONDS = 1  # for one pattern and one name; together they get `PATTERNS_SECONDS`
PATTERNS_SECONDS = 10

MEND = "Save the adapter again with PEFT, or merge it there (merge_and_unload) and convert the merged model."


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says, checked for its types; names as PEFT has them where it matters.

    Attributes:
        targets: names, one pattern, or None where the config leaves it to PEFT.
        layers: the layers that are adapted; None: all.
        saved: modules_to_save.
    """

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    fan_in_fan_out: bool
    bias: str
    targets: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str | None
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    base: str

    def scaling(self, alpha: float, rank: int) -> float:
        """What B @ A is multiplied by."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


class _Reader:
    """Values of a config from outside: what has the wrong type becomes a problem and the default."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where
        self.problems: list[Problem] = []

    def wrong(self, key: str, expected: str, value: Any) -> None:
        self.problems.append(Problem(key, expected, short(value), source=self.where))

    def flag(self, key: str) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            self.wrong(key, "true or false", value)
        return value is True

    def text(self, key: str, default: str = "") -> str:
        value = self.config.get(key)
        if value is not None and not isinstance(value, str):
            self.wrong(key, "a text", value)
        return value if isinstance(value, str) else default

    def rank(self, key: str, value: Any) -> int:
        if type(value) is int and value > 0:  # true is an int, too
            return value
        self.wrong(key, "a positive whole number", value)
        return 1

    def number(self, key: str, value: Any) -> float:
        if type(value) in (int, float):
            try:
                if math.isfinite(value):
                    return float(value)
            except OverflowError:
                pass
        self.wrong(key, "a finite number", value)
        return 1.0

    def names(self, key: str) -> tuple[str, ...]:
        value = self.config.get(key)
        found = [] if value is None else value
        if isinstance(found, list) and len(found) <= MAX_ENTRIES and all(isinstance(one, str) for one in found):
            return tuple(found)
        self.wrong(key, f"a list of at most {MAX_ENTRIES} names", value)
        return ()

    def names_or_pattern(self, key: str) -> tuple[str, ...] | str | None:
        value = self.config.get(key)
        return value if value is None or isinstance(value, str) else self.names(key)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.config.get(key)
        found = {} if value is None else value
        if isinstance(found, dict) and len(found) <= MAX_ENTRIES:
            return found
        self.wrong(key, f"a mapping of at most {MAX_ENTRIES} names", value)
        return {}

    def layers(self, key: str) -> frozenset[int] | None:
        value = self.config.get(key)
        found = [] if value is None else value if isinstance(value, list) else [value]
        if len(found) <= MAX_ENTRIES and all(type(one) is int for one in found):
            return frozenset(found) or None  # an empty list chooses nothing in PEFT, so all of them
        self.wrong(key, f"a layer or a list of at most {MAX_ENTRIES}", value)
        return None


def short(value: Any) -> str:
    """A value from outside, fit for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more than 4300 digits
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:76]}..."


def settings_of(config: Mapping[str, Any], where: str, refuse: bool) -> Settings:
    """Raises SourceError that names every value that makes no sense, and every setting that cannot be merged."""
    read = _Reader(config, where)
    pattern = config.get("layers_pattern")
    settings = Settings(
        r=read.rank("r", config.get("r", 8)),
        alpha=read.number("lora_alpha", config.get("lora_alpha", 8)),
        rank_pattern={
            key: read.rank(f"rank_pattern {short(key)}", value) for key, value in read.mapping("rank_pattern").items()
        },
        alpha_pattern={
            key: read.number(f"alpha_pattern {short(key)}", value)
            for key, value in read.mapping("alpha_pattern").items()
        },
        use_rslora=read.flag("use_rslora"),
        fan_in_fan_out=read.flag("fan_in_fan_out"),
        bias=read.text("bias", "none"),
        targets=read.names_or_pattern("target_modules"),
        excluded=read.names_or_pattern("exclude_modules") or None,
        layers=read.layers("layers_to_transform"),
        layers_pattern=((pattern,) if pattern else ()) if isinstance(pattern, str) else read.names("layers_pattern"),
        saved=read.names("modules_to_save"),
        base=read.text("base_model_name_or_path"),
    )
    if settings.bias not in ("none", "all", "lora_only"):
        read.wrong("bias", "none, all or lora_only", settings.bias)
    if config.get("peft_type") != "LORA":
        read.wrong("peft_type", "'LORA'", config.get("peft_type"))
    problems = read.problems + (list(_refused(config, where)) if refuse else [])
    if problems:
        raise SourceError(report(f"{where}: cannot be merged", problems, MEND))
    return settings


def _refused(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Settings with which W + (B @ A) * scaling is not the model that was trained."""
    for key, value in config.items():
        if not value or key in HARMLESS:
            continue
        why = REFUSED.get(key)
        if why is None and (key.startswith("use_") or key.endswith("_config")):
            why = "a setting that this version does not know: it may change what the tensors mean"
        if why is not None:
            yield Problem(shown(key), "not set", short(value), why, where)
    begun = config.get("init_lora_weights")
    if begun is None or isinstance(begun, bool) or (isinstance(begun, str) and begun.lower() in BEGINNINGS):
        return
    if isinstance(begun, str) and begun.lower().startswith(CHANGED_BASE):
        why = (
            "it was trained on a changed base, so merged into the original it counts twice; PEFT saves it for the "
            "original with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    else:
        why = "this version does not know whether the base was changed"
    yield Problem("init_lora_weights", f"true, false, {', '.join(BEGINNINGS)}", short(begun), why, where)


class Patterns:
    """Patterns of a config, which come from outside: an endless one is a problem, not a command that hangs."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[Problem] = []
        self.compiled: dict[str, Any] = {}  # None: did not work
        self.left = float(PATTERNS_SECONDS)

    def match(self, shape: str, pattern: str, name: str) -> Any:
        """The match of `name` with the whole of `shape`, a pattern in which `{}` stands for the one from outside."""
        import regex

        key = shape.replace("{}", pattern)
        if key in self.compiled and self.compiled[key] is None:
            return None
        started = time.monotonic()
        try:
            if self.left <= 0:
                raise TimeoutError
            if key not in self.compiled:
                self.compiled[key] = self._compile(pattern, key)
            return self.compiled[key].fullmatch(name, timeout=min(PATTERN_SECONDS, self.left))
        except TimeoutError:
            why = f"still at it after {PATTERN_SECONDS} s, or {PATTERNS_SECONDS} s for all of them"
        except (regex.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
            why = short(str(error))
        finally:
            self.left -= time.monotonic() - started
        self.compiled[key] = None
        self.problems.append(Problem(short(pattern), "a pattern that matches or does not", why, source=self.where))
        return None

    def _compile(self, pattern: str, key: str) -> Any:
        """Raises ValueError for what would take too long already here, where `regex` knows no limit of time."""
        import regex

        repeats = math.prod(int(count) for count in re.findall(r"\{(\d{1,9})", pattern[:MAX_PATTERN]))
        if len(pattern) > MAX_PATTERN or repeats > MAX_REPEATS:
            raise ValueError(f"longer than {MAX_PATTERN} characters, or too many repetitions")
        return regex.compile(key)


def of_module(values: Mapping[str, Any], default: Any, module: str, patterns: Patterns) -> Any:
    """A module's own rank or alpha: the first name or pattern that its name ends with (get_pattern_key)."""
    for pattern, value in values.items():
        if patterns.match(r"(.*\.)?({})", pattern, module):
            return value
    return values.get(module, default)


def targeted(settings: Settings, module: str, patterns: Patterns, certain: bool) -> bool:
    """Whether the config asks for this module to be adapted (check_target_module_exists).

    Which number in a name is the layer's depends on PEFT's version where there are several (T5's `block.0.layer.1`).

    Args:
        certain: whether every version has to agree, or one is enough.
    """
    if _named(settings.excluded, module, patterns) or any(f".{one}." in f".{module}." for one in settings.saved):
        return False
    if isinstance(settings.targets, str) and settings.targets.lower() == "all-linear":
        return not certain  # what is linear only the model's code knows
    if settings.targets is None:
        return not certain
    if not _named(settings.targets, module, patterns):
        return False
    if settings.layers is None or isinstance(settings.targets, str):
        return True
    layers = _layers(settings, module, patterns)
    return bool(layers) and (all if certain else any)(layer in settings.layers for layer in layers)


def _named(names: tuple[str, ...] | str | None, module: str, patterns: Patterns) -> bool:
    """Whether a list has the module's name or an end of it, or a pattern matches the whole."""
    if not names:
        return False
    if isinstance(names, str):
        return bool(patterns.match("{}", names, module))
    parts = module.split(".")
    return not {".".join(parts[start:]) for start in range(len(parts))}.isdisjoint(names)


def _layers(settings: Settings, module: str, patterns: Patterns) -> list[int]:
    """The numbers in a module's name that may be its layer's, first and last."""
    if not settings.layers_pattern:
        found = ANY_LAYER.findall(module)
    else:
        shapes = (r"(?:.*?\.)?{}\.(?P<idx>\d+)\..*", r"(?:.*\.)?{}\.(?P<idx>\d+)\..*")
        matches = [patterns.match(shape, one, module) for one in settings.layers_pattern for shape in shapes]
        found = [match["idx"] for match in matches if match and match["idx"]]
    return [int(number) for number in (found[0], found[-1])] if found else []
