"""Every rule finds what it is there for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests import __main__ as lint
from manifests import built as builds
from manifests.broken import BROKEN
from manifests.broken.right import RIGHT
from manifests.broken.words import UL2, Break, overlay
from manifests.built import Built
from manifests.rules import RULES, references, schemas, secrets


@pytest.mark.parametrize(
    ("rule", "name", "broken", "told"), BROKEN, ids=[f"{rule.__name__}-{told}" for rule, _, _, told in BROKEN]
)
def test_what_is_broken_is_found(rule: Callable[[Built], Any], name: str, broken: Break, told: str) -> None:
    built = overlay(name).copy()
    assert not [found for found in rule(built) if told in found]
    broken(built)
    assert [found for found in rule(built) if told in found], list(rule(built))


@pytest.mark.parametrize(("rule", "change"), RIGHT)
def test_what_is_right_is_not_found(rule: Callable[[Built], Any], change: Break) -> None:
    built = overlay(UL2).copy()
    change(built)
    assert list(rule(built)) == []


def test_every_rule_is_broken_once() -> None:
    assert set(RULES) - {rule for rule, *_ in BROKEN} == set()


def test_overlays_that_mix() -> None:
    """Without a label of its own an overlay selects the pods of others; without a suffix it has their names."""
    one, other = overlay(UL2).copy(), overlay("ul2-20b-2xa100").copy()
    one.one("Service")["spec"]["selector"].pop("app.kubernetes.io/instance")
    assert any("its own pods alone" in found for found in references.apart([one, other]))
    one.one("Service")["metadata"]["name"] = other.one("Service")["metadata"]["name"]
    assert any("a name of its own" in found for found in references.apart([one, other]))


def test_a_warning_is_an_error(tmp_path: Path) -> None:
    """kustomize builds what it calls deprecated, and says so."""
    (tmp_path / "kustomization.yaml").write_text("commonLabels: {a: b}\n")
    with pytest.raises(builds.BuildError, match="deprecated"):
        builds.build(tmp_path)
    (tmp_path / "kustomization.yaml").write_text("resource: [a.yaml]\n")
    with pytest.raises(builds.BuildError, match="resource"):
        builds.build(tmp_path)


def test_a_key_in_a_file_is_found(tmp_path: Path) -> None:
    """Where git would see it, and not where a test calls it one."""
    for folder in ("docs", "models"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.md").write_text("a: b\nc: hf_" + "x" * 34 + "\n")
    (tmp_path / "test.py").write_text("'hf_" + "secret" * 5 + "'\n'postgres://" + "u:pw@db'\n")
    (tmp_path / "binary").write_bytes(b"\0hf_" + b"x" * 34)
    told = "expected nothing secret, found what looks like a key"
    assert list(secrets.in_files(tmp_path)) == [f"test.py:2: {told}", f"docs/a.md:2: {told}"]


def test_without_cel_everything_else_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on Python 3.10, where no wheel of it is: a line says so, and is no finding."""
    monkeypatch.setattr(schemas, "cel", None)
    monkeypatch.setattr("sys.argv", ["lint", str(builds.TREE / "overlays" / "t5-small-dev")])
    assert lint.main() == 0
    assert "not checked: CEL rules" in capsys.readouterr().err


@pytest.mark.skipif(not schemas.cel, reason="CEL needs Python 3.11")
def test_a_rule_of_cel_is_run() -> None:
    """On what its part of the schema is about, through lists, maps and references; rules on changes are left out."""
    schema = {
        "properties": {"parts": {"items": {"$ref": "#/$defs/part"}, "type": "array"}},
        "$defs": {
            "part": {
                "x-kubernetes-validations": [
                    {"rule": "self.a < self.b", "message": "a below b"},
                    {"rule": "self.a == oldSelf.a", "message": "never changes"},
                ]
            }
        },
    }
    assert list(schemas.rules({"parts": [{"a": 1, "b": 2}, {"a": 3, "b": 2}]}, schema, schema)) == [
        ".parts[1]: a below b"
    ]
    assert "b" in next(schemas.rules({"parts": [{"a": 1}]}, schema, schema))
