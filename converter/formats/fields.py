"""Hyper-parameters as rows: what a file of settings says about a config, read through a family's fields."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from converter.checkpoint import Statement
from converter.errors import Problem
from converter.families.base import Config, Field, Section


@dataclass(frozen=True)
class Fields:
    """What a file says.

    Attributes:
        file: its name.
        fields: the rows.
        sections: the file; of one without sections the only one has an empty name.
        values: field's key -> what it says about the config.
        absent: config keys of fields that are not there, for which the reader of the file has a value of its own.
    """

    file: str
    fields: Sequence[Field]
    sections: Mapping[str, Section]
    values: dict[str, Config] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    @property
    def merged(self) -> dict[str, Any]:
        return {key: value for values in self.values.values() for key, value in values.items()}

    def statements(self, config: Config | None = None) -> list[Statement]:
        """Everything it says; with the complete config from a manifest, what contradicts that, and the config."""
        if config is None:
            return [(f"{key} of {self.file}", values) for key, values in self.values.items()]
        rows = {one.key: one for one in self.fields}
        contradicting = [
            (f"{key} of {self.file}", values)
            for key, values in self.values.items()
            if not self._repeats(rows[key], config, values)
        ]
        return [*contradicting, ("manifest.json", config)]

    def contradictions(self, config: Config) -> list[Problem]:
        """Values that follow from others, where they do not."""
        problems = []
        for one in self.fields:
            name, key = one.place
            section = self.sections.get(name, {})
            if one.repeats and key in section and not _alike(section[key], expected := one.write(config)):
                rule = "it follows from the other values"
                problems.append(Problem(one.key, repr(expected), repr(section[key])[:80], rule, self.file))
        return problems

    def _repeats(self, one: Field, config: Config, values: Config) -> bool:
        """Whether a field that holds less than the config would be written alike for this one."""
        try:
            return one.narrow and one.read(one.write(config), self.sections[one.place[0]]) == values
        except (ValueError, KeyError, TypeError, ArithmeticError):  # a damaged manifest
            return False


def _alike(found: Any, expected: Any) -> bool:
    """Whether two numbers are the same but for how they were rounded."""
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (found, expected))
    return math.isclose(found, expected, rel_tol=1e-6) if numbers else found == expected


def read(file: str, fields: Sequence[Field], sections: Mapping[str, Section]) -> Fields:
    """What the fields find in the sections of a file; what they cannot make sense of is in `problems`."""
    found = Fields(file, fields, sections)
    for one in fields:
        name, key = one.place
        section = sections.get(name, {})
        stated = section.get(key.lower())
        text = one.absent if stated is None else stated
        if one.required and key.lower() not in section:
            rule = "without it the file's own reader takes another model's value"
            found.problems.append(Problem(one.key, "a value", "not there", rule, file))
            continue
        try:
            found.values[one.key] = {} if text is None else one.read(text, section)
        except (ValueError, KeyError, TypeError, ArithmeticError) as error:
            found.problems.append(Problem(one.key, got=repr(text), rule=str(error), source=file))
        if key.lower() not in section:
            found.absent.update(found.values.get(one.key, {}))
    return found
