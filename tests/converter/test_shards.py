"""Which files of a Hugging Face folder hold the tensors; index and shards that do not agree."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter.errors import SourceError, SourceMissingError
from converter.formats import shards
from converter.storage import LocalStorage

HOSTILE_SECONDS = 5.0  # of the processor: other tests run at the same time
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {f"layer.{i}.weight": torch.rand(3, i + 1) for i in range(4)}


def stored(folder: Path, **options: Any) -> shards.Stored:
    storage = LocalStorage(folder)
    return shards.read(storage, storage.files(), **options)


def read(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(tensor.read().copy()) for name, tensor in stored(folder, **options).tensors.items()}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def refused(folder: Path) -> str:
    started = time.process_time()
    with pytest.raises(SourceError) as caught:
        stored(folder)
    assert time.process_time() - started < HOSTILE_SECONDS
    assert str(folder) in str(caught.value)
    return str(caught.value)


def sharded(folder: Path, kind: str = ".safetensors", seed: int = 0) -> dict[str, torch.Tensor]:
    """Two tensors in each of two shards."""
    folder.mkdir(exist_ok=True)
    tensors = values(seed)
    stem = "model" if kind == ".safetensors" else "pytorch_model"
    weight_map = {}
    for number in (1, 2):
        names = list(tensors)[number * 2 - 2 : number * 2]
        file = f"{stem}-{number:05}-of-00002{kind}"
        weight_map |= dict.fromkeys(names, file)
        save(folder / file, {name: tensors[name] for name in names})
    index = {"metadata": {"total_size": 120}, "weight_map": weight_map}
    (folder / f"{stem}{kind}.index.json").write_text(json.dumps(index))
    return tensors


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def mapped(folder: Path, **changes: str | None) -> None:
    """Change the index: dots as double underscores; None removes a name."""
    index = json.loads((folder / INDEX).read_text())
    for name, shard in changes.items():
        index["weight_map"].pop(name.replace("__", "."), None)
        if shard is not None:
            index["weight_map"][name.replace("__", ".")] = shard
    (folder / INDEX).write_text(json.dumps(index))


# -------------------------------------------------------------------------------------------------------------- reading


def test_what_transformers_wrote(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    model.save_pretrained(tmp_path / "one")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    many, one, state = read(tmp_path / "many"), read(tmp_path / "one"), model.state_dict()
    assert equal(many, one)
    assert many.keys() < state.keys()  # without the aliases of the embedding
    assert all(torch.equal(tensor, state[name]) for name, tensor in many.items())


@pytest.mark.parametrize("kind", [".safetensors", ".bin"])
def test_shards_and_one_file_give_the_same(tmp_path: Path, kind: str) -> None:
    tensors = sharded(tmp_path / "many", kind)
    assert equal(read(tmp_path / "many"), tensors)
    (tmp_path / "one").mkdir()
    save(tmp_path / "one" / ("model.safetensors" if kind == ".safetensors" else "pytorch_model.bin"), tensors)
    assert equal(read(tmp_path / "one"), tensors)


def test_which_one_is_read_where_there_are_several(tmp_path: Path) -> None:
    """transformers' own order; each step removes what was read."""
    names = ["model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"]
    save_order = [values(1), sharded(tmp_path, seed=2), values(3), sharded(tmp_path, ".bin", seed=4)]
    save(tmp_path / names[0], save_order[0])
    save(tmp_path / names[2], save_order[2])
    for name, expected in zip(names, save_order, strict=True):
        assert shards.recognises(LocalStorage(tmp_path).files())
        assert equal(read(tmp_path), expected)
        (tmp_path / name).unlink()
    assert shards.recognises(LocalStorage(tmp_path).files())
    assert INDEX in refused(tmp_path)  # shards are left, no index
    for shard in tmp_path.glob("*model-*"):
        shard.unlink()
    assert not shards.recognises(LocalStorage(tmp_path).files())
    with pytest.raises(SourceMissingError, match="found no such file"):
        read(tmp_path)


def test_an_adapter_has_names_of_its_own(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert not shards.recognises(LocalStorage(tmp_path).files(), "adapter_model")
    for kind in (".bin", ".safetensors"):
        tensors = {"lora_A.weight": torch.rand(2, 3)}
        save(tmp_path / f"adapter_model{kind}", tensors)
        assert shards.recognises(LocalStorage(tmp_path).files(), "adapter_model")
        assert equal(read(tmp_path, stem="adapter_model"), tensors)
    assert shards.recognises(["pytorch_model-00001-of-00002.bin"])
    assert not shards.recognises(["config.json", "models.safetensors", "sub/model.safetensors", "optimizer.bin"])


def test_the_digest_is_of_index_names_sizes_and_headers(tmp_path: Path) -> None:
    def digest(folder: Path) -> bytes:
        return stored(folder).digest

    sharded(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    index = tmp_path / "b" / INDEX
    index.write_text(index.read_text() + " ")
    assert digest(tmp_path / "a") != digest(tmp_path / "b")
    shutil.copy(tmp_path / "a" / INDEX, index)
    for folder, dtype in (("a", torch.float16), ("b", torch.int16)):  # the same size, another header
        save(tmp_path / folder / ONE, {name: tensor.to(dtype) for name, tensor in list(values().items())[:2]})
    assert (tmp_path / "a" / ONE).stat().st_size == (tmp_path / "b" / ONE).stat().st_size
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


# ------------------------------------------------------------------------------------------------------ do not agree


def test_everything_that_does_not_agree_is_named_at_once(tmp_path: Path) -> None:
    sharded(tmp_path)
    mapped(
        tmp_path, layer__0__weight=TWO, layer__3__weight=None, missing__weight=ONE, far__weight="model-3.safetensors"
    )
    save(tmp_path / "model-00003-of-00003.safetensors", values())
    message = refused(tmp_path)
    blocks = {block.split("\n")[0].strip(): block for block in message.split("  tensor ")[1:]}
    assert blocks.keys() == {
        "model-3.safetensors",
        "model-00003-of-00003.safetensors",
        "layer.0.weight",
        "layer.3.weight",
        "missing.weight",
    }
    assert "no such file" in blocks["model-3.safetensors"]
    assert "not in the index" in blocks["model-00003-of-00003.safetensors"]
    assert f"expected in {TWO}\n  got      in {ONE}" in blocks["layer.0.weight"]
    assert "nowhere: not in the index" in blocks["layer.3.weight"]
    assert "in no shard" in blocks["missing.weight"]


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    save(tmp_path / TWO, {name: tensors[name] for name in list(tensors)[1:]})
    message = refused(tmp_path)
    assert f"layer.1.weight\n  expected in {ONE}\n  got      in {ONE} and {TWO}" in message
    assert "layer.2.weight" not in message


@pytest.mark.parametrize("kind", [".safetensors", ".bin"])
def test_a_missing_and_a_damaged_shard(tmp_path: Path, kind: str) -> None:
    sharded(tmp_path, kind)
    one, two = sorted(tmp_path.glob(f"*00002{kind}"))
    two.write_bytes(two.read_bytes()[:100])
    assert str(two) in refused(tmp_path)
    one.unlink()
    message = refused(tmp_path)
    assert one.name in message
    assert str(two) in message
    assert "layer." not in message  # what would be in them goes without saying


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a\\b", "a\n"])
def test_shards_outside_the_folder(tmp_path: Path, shard: str) -> None:
    sharded(tmp_path)
    mapped(tmp_path, layer__0__weight=shard)
    assert "beside the index" in refused(tmp_path)


@pytest.mark.parametrize(
    "index",
    {
        "empty": b"",
        "no JSON": b"\xff\x00",
        "a list": b"[]",
        "no map": b"{}",
        "an empty map": b'{"weight_map": {}}',
        "a list as map": b'{"weight_map": []}',
        "numbers": b'{"weight_map": {"a": 1}}',
        "lists": b'{"weight_map": {"a": ["b"]}}',
        "null": b'{"weight_map": {"a": null}}',
        "NaN": b'{"weight_map": NaN}',
        "deep": b'{"weight_map": ' + b"[" * 400_000,
        "many": b'{"weight_map": {"a": [' + b"0," * 2_000_000 + b"0]}}",
        "no text": b'{"weight_map": {"a": "\\ud800"}}',
        "a name that is no text": b'{"weight_map": {"\\ud800": "' + ONE.encode() + b'"}}',
    }.values(),
)
def test_an_index_that_is_none(tmp_path: Path, index: bytes) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_bytes(index)
    assert refused(tmp_path).encode()


def test_keys_twice_are_no_fault(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    text = (tmp_path / INDEX).read_text()
    (tmp_path / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"layer.0.weight": "x", '))
    assert equal(read(tmp_path), tensors)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.integers(0, 2),
    how=st.sampled_from(["flip", "cut", "empty"]),
    where=st.integers(0, 999),
    bit=st.integers(0, 7),
)
def test_damage_is_refused_or_leaves_the_names(tmp_path: Path, which: int, how: str, where: int, bit: int) -> None:
    tensors = sharded(tmp_path)
    path = tmp_path / [INDEX, ONE, TWO][which]
    data = bytearray(path.read_bytes())
    at = where % len(data)
    data[at] ^= (1 << bit) if how == "flip" else 0
    path.write_bytes(data if how == "flip" else data[:at] if how == "cut" else b"")
    try:
        found = stored(tmp_path).tensors
    except SourceError:
        return
    assert how == "flip"
    assert found.keys() == tensors.keys()
