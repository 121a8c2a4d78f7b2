"""A manifest.json whose fields are of another kind than what a conversion writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import done, ftconvert, refused

VALUES: tuple[Any, ...] = (None, True, 1, 2.5, "x", [], {}, ["x"], {"x": 1})
FILE = "rank0.safetensors"
# field -> the values that make sense to whoever opens the weights
FIELDS: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("format_version",): (1,),
    ("format",): (),
    ("family",): (),
    ("tool_version",): ("x",),
    ("config",): ({}, {"x": 1}),  # the rest is assumed, and said so
    ("source",): ({}, {"x": 1}),
    ("source", "uri"): ("x",),
    ("source", "format"): ("x",),
    ("source", "step"): (None, 1),
    ("source", "fingerprint"): ("x",),
    ("options",): ({}, {"x": 1}),
    ("options", "name"): ("x",),
    ("files",): ({},),
    ("files", FILE): (),
    ("files", FILE, "size"): (1,),
    ("files", FILE, "crc32c"): ("x",),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("manifest")
    done("hf-to-trtllm", tiny.gpt2().save(base / "hf"), base / "trtllm")
    return base / "trtllm"


@pytest.mark.parametrize("field", FIELDS, ids=".".join)
def test_every_field_is_of_its_kind(checkpoint: Path, field: tuple[str, ...]) -> None:
    path = checkpoint / "manifest.json"
    written = path.read_text()
    try:
        for value in VALUES:
            manifest = json.loads(written)
            inner = manifest
            for key in field[:-1]:
                inner = inner[key]
            inner[field[-1]] = value
            path.write_text(json.dumps(manifest))
            if any(type(value) is type(one) and value == one for one in FIELDS[field]):
                assert ftconvert("inspect", checkpoint).exit_code == 0, value
            else:
                message = refused(65, "inspect", checkpoint)
                assert "manifest.json" in message, (value, message)
                assert field[-1] in message or value in ("x", {}, {"x": 1}), (value, message)
    finally:
        path.write_text(written)


@pytest.mark.parametrize("key", ["format", "family", "config", "source", "options", "tool_version", "files"])
def test_every_field_is_there(checkpoint: Path, tmp_path: Path, key: str) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest[key]
    for name in ("config.json", FILE):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert f"{key}\n" in refused(65, "inspect", tmp_path)
