"""Registry: adding a family is one file beside this one and one line here."""

from __future__ import annotations

from converter.errors import UsageError
from converter.families import bloom, gemma, gemma2, gpt2, gptj, gptneox, llama, mistral, opt, qwen2, t5, umt5
from converter.families.base import Family, Preset

FAMILIES: tuple[Family, ...] = (
    t5.FAMILY,
    umt5.FAMILY,
    gpt2.FAMILY,
    opt.FAMILY,
    bloom.FAMILY,
    gptneox.FAMILY,
    gptj.FAMILY,
    llama.FAMILY,
    mistral.FAMILY,
    gemma.FAMILY,
    gemma2.FAMILY,
    qwen2.FAMILY,
)
PRESETS: dict[str, tuple[Family, Preset]] = {
    name: (family, preset) for family in FAMILIES for name, preset in family.presets.items()
}


def family_named(name: str) -> Family:
    """The family called `name` in a manifest.

    Raises:
        UsageError: this version does not know it.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise UsageError(f"unknown model family {name!r}: expected one of {', '.join(f.name for f in FAMILIES)}")


def preset_named(name: str) -> tuple[Family, Preset]:
    """What `--model name` stands for.

    Raises:
        UsageError: no such preset.
    """
    if name not in PRESETS:
        raise UsageError(f"unknown model {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
