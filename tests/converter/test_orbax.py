"""Reading T5X checkpoints that Orbax wrote: the judge is Orbax itself, for what is whole and for what is not."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import tiny
from conftest import ftconvert, refused, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter import errors
from converter.convert import Request, convert, prepare
from converter.formats import orbax, t5x, zarr, zarr_chunks
from converter.storage import LocalStorage
from converter.tensor import dtype_named

SMALL = tiny.T5(d_model=24, d_kv=12, num_layers=1, num_decoder_layers=1)
QUERY = "target.encoder.layers_0.attention.query.kernel"  # [24, 48]
CHUNK_BYTES = 2400  # half of QUERY, and too much to lie in the B-tree itself
HOSTILE_SECONDS = 5.0


def save(base: Path, arrays: tiny.Arrays, step: int = 1000, chunk_bytes: int | None = None, **handler: Any) -> Path:
    """Write `<base>/checkpoint_<step>` through Orbax, with a bit of an optimizer, and return it."""
    import jax
    import orbax.checkpoint as ocp
    from flax import traverse_util

    leaves = {("target", *name.split(".")): jax.numpy.asarray(array) for name, array in arrays.items()}
    leaves["state", "step"] = np.asarray(step, np.int32)
    leaves["state", "param_states", "token_embedder", "embedding", "v"] = jax.numpy.ones(2000)
    target = traverse_util.unflatten_dict(leaves)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), target)
    item = ocp.args.PyTreeSave(target, save_args=save_args)
    folder = base / f"checkpoint_{step}"
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler(**handler)))
    checkpointer.save(folder, args=ocp.args.Composite(state=item))
    return folder


def checkpoint(base: Path, dtype: str = "float32", seed: int = 0, sizes: tiny.T5 = SMALL, **options: Any) -> Path:
    """A T5X checkpoint in Orbax's container, with config.gin; returns its base folder."""
    save(base, tiny.t5_arrays(sizes, dtype, seed), **options)
    (base / "config.gin").write_text(tiny.t5_gin(sizes))
    return base


def converted(source: Path, out: Path, *options: object) -> dict[str, bytes]:
    """The weights that a checkpoint gives."""
    result = ftconvert("jax-to-ft", source, out, "--model", "ul2", "--layout", "weights", *options)
    assert result.exit_code == 0, result.stderr
    return tree(out / "1-gpu")


def of_seed(seed: int, tmp_path: Path, dtype: str = "float32") -> dict[str, bytes]:
    """The weights as T5X's own container gives them."""
    base = tiny.t5x_checkpoint(tmp_path / f"legacy{seed}", SMALL, dtype, seed)
    return converted(base, tmp_path / f"legacy{seed}-out")


def bad(source: Path, *options: object, code: int = 65) -> str:
    """The message of a conversion that is refused."""
    return refused(code, "jax-to-ft", source, source.parent / "out", "--model", "ul2", *options)


def store(state: Path, context: Any = None) -> Any:
    """The key-value store of a step; only stores of one context can take keys over from each other."""
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{state}/"}, context=context).result()


def edit(state: Path, change: Callable[[Any], Any]) -> None:
    """Change _METADATA."""
    stated = json.loads((state / "_METADATA").read_text())
    (state / "_METADATA").write_text(json.dumps(change(stated) or stated))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several chunks per array; do not write there."""
    return checkpoint(tmp_path_factory.mktemp("orbax") / "t5x", chunk_bytes=CHUNK_BYTES)


@pytest.fixture
def base(pristine: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "t5x"))


@pytest.fixture
def state(base: Path) -> Path:
    return base / "checkpoint_1000" / "state"


# ------------------------------------------------------------------------------------------------------ the same bits


def test_both_containers_give_the_same_bytes(golden: Callable[[str], Path], tmp_path: Path) -> None:
    """Written by T5X itself, twice, from the same model."""
    written = {}
    for container in ("legacy", "orbax"):
        out = tmp_path / container
        assert ftconvert("jax-to-ft", golden(f"ul2_tied_{container}_f32"), out, "--model", "ul2").exit_code == 0
        written[container] = tree(out / "ul2" / "1")
    manifests = [json.loads(files.pop("manifest.json")) for files in written.values()]
    assert written["legacy"] == written["orbax"]
    sources = [manifest.pop("source") for manifest in manifests]
    assert manifests[0] == manifests[1]
    assert [source["step"] for source in sources] == [1001, 1001]
    assert sources[0]["fingerprint"] != sources[1]["fingerprint"]


def test_every_array_equals_what_orbax_reads(golden: Callable[[str], Path]) -> None:
    import orbax.checkpoint as ocp
    from flax import traverse_util

    folder = golden("ul2_tied_orbax_f32") / "checkpoint_1001"
    restored = ocp.PyTreeCheckpointer().restore(folder / "state")["target"]
    expected = {".".join(path): np.asarray(array) for path, array in traverse_util.flatten_dict(restored).items()}
    found = arrays_of(folder)
    assert found.tensors.keys() == expected.keys()
    for name, tensor in found.tensors.items():
        assert tensor.spec.shape == expected[name].shape, name
        assert tensor.read().tobytes() == expected[name].tobytes(), name


def arrays_of(folder: Path) -> zarr.Arrays:
    storage = LocalStorage(folder)
    return t5x._arrays(storage, orbax.METADATA, storage.read(orbax.METADATA), storage.files())


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("chunk_bytes", [None, 300])
def test_what_orbax_writes(tmp_path: Path, use_ocdbt: bool, dtype: str, chunk_bytes: int | None) -> None:
    source = checkpoint(tmp_path / "t5x", dtype, chunk_bytes=chunk_bytes, use_ocdbt=use_ocdbt)
    assert (source / "checkpoint_1000/state/manifest.ocdbt").exists() == use_ocdbt
    model = t5x.open(str(source))
    assert model.dtypes == (dtype_named(dtype),)
    assert any(
        tensor.grain != tensor.spec.shape for tensor in arrays_of(source / "checkpoint_1000").tensors.values()
    ) == bool(chunk_bytes)
    assert converted(source, tmp_path / "out") == of_seed(0, tmp_path, dtype)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrays=st.dictionaries(
        st.sampled_from(["a", "b.c", "b.d.e", "long.name_1.kernel"]),
        st.tuples(st.lists(st.integers(1, 9), max_size=3), st.sampled_from(["float32", "float16", "bfloat16"])),
        min_size=1,
    ),
    chunk_bytes=st.sampled_from([None, 8, 40]),
    use_ocdbt=st.booleans(),
)
def test_any_tree(
    tmp_path: Path, arrays: dict[str, tuple[list[int], str]], chunk_bytes: int | None, use_ocdbt: bool
) -> None:
    random = np.random.default_rng(0)
    expected = {
        name: random.standard_normal(shape).astype(dtype_named(dtype)) for name, (shape, dtype) in arrays.items()
    }
    shutil.rmtree(tmp_path / "any", ignore_errors=True)
    found = arrays_of(save(tmp_path / "any", expected, chunk_bytes=chunk_bytes, use_ocdbt=use_ocdbt))
    assert found.tensors.keys() == expected.keys()
    for name, tensor in found.tensors.items():
        assert tensor.spec.dtype == expected[name].dtype
        assert tensor.read().tobytes() == expected[name].tobytes()


def test_every_process_has_its_folder(tmp_path: Path) -> None:
    """As on several hosts: each writes its chunks to a store of its own, then Orbax merges the B-trees."""
    from etils import epath
    from orbax.checkpoint._src.serialization import ocdbt_utils

    plain = checkpoint(tmp_path / "plain", chunk_bytes=CHUNK_BYTES)
    state = Path(shutil.copytree(plain, tmp_path / "t5x")) / "checkpoint_1000" / "state"
    whole = store(state)
    parts = [store(state / f"ocdbt.process_{process}") for process in (0, 1, 2)]
    pairs = {key: whole.read(key).result().value for key in whole.list().result()}
    for name in ("manifest.ocdbt", "d", "ocdbt.process_0"):
        path = state / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(state / "ocdbt.process_1", ignore_errors=True)
    for (key, value), part in zip(pairs.items(), itertools.cycle(parts)):
        part.write(key, value).result()
    merge = ocdbt_utils.merge_ocdbt_per_process_files
    context = tensorstore.Context({"cache_pool#ocdbt": {"total_bytes_limit": 0}})
    asyncio.run(merge(epath.Path(state), context, use_zarr3=False))
    assert all((state / f"ocdbt.process_{process}" / "d").is_dir() for process in (0, 1, 2))
    assert converted(tmp_path / "t5x", tmp_path / "a") == converted(plain, tmp_path / "b")


def test_large_stores_have_nodes_below_nodes(base: Path, state: Path, tmp_path: Path) -> None:
    pairs = {key: (old := store(state)).read(key).result().value for key in store(state).list().result()}
    assert old is not None
    for name in ("manifest.ocdbt", "d", "ocdbt.process_0"):
        path = state / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = {"max_decoded_node_bytes": 500, "max_inline_value_bytes": 20}
    spec = {"driver": "ocdbt", "base": f"file://{state}/", "config": config}
    kvstore = tensorstore.KvStore.open(spec).result()
    for key, value in pairs.items():
        kvstore.write(key, value).result()
    versions = tensorstore.ocdbt.dump(tensorstore.KvStore.open(f"file://{state}/").result()).result()["versions"]
    assert versions[-1]["root_height"] > 1
    assert converted(base, tmp_path / "a") == of_seed(0, tmp_path)
    kvstore.write(f"{QUERY}/0.1", None).result()
    assert "chunk 0.1" in bad(base, "--dry-run")


def test_for_inference_only(tmp_path: Path) -> None:
    """What T5X saves without the optimizer has the step at state/step and nothing else."""
    source = checkpoint(tmp_path / "t5x", use_ocdbt=False)
    state = source / "checkpoint_1000" / "state"
    for folder in state.glob("state.param_states*"):
        shutil.rmtree(folder)
    edit(state, lambda stated: drop(stated, "state.param_states"))
    assert converted(source, tmp_path / "out") == of_seed(0, tmp_path)


def test_the_optimizer_and_the_data_set_are_never_opened(base: Path, state: Path, tmp_path: Path) -> None:
    context = tensorstore.Context()
    kvstore, elsewhere = store(state, context), store(state / "ocdbt.process_9", context)
    for key in [key for key in kvstore.list().result() if key.startswith(b"state.")]:
        kvstore.write(key, b"garbage").result()
    elsewhere.write("state.param_states.unheard_of/.zarray", bytes(5000)).result()
    with tensorstore.Transaction(atomic=True) as transaction:  # takes the keys over, not the values
        elsewhere.experimental_copy_range_to(kvstore.with_transaction(transaction)).result()
    shutil.rmtree(state / "ocdbt.process_9")
    edit(state, lambda stated: stated["tree_metadata"]["('state', 'step')"].update(value_metadata={"value_type": "x"}))
    (base / "checkpoint_1000" / "dataset").mkdir()
    (base / "checkpoint_1000" / "dataset" / "0.json").write_text("garbage")
    assert converted(base, tmp_path / "out") == of_seed(0, tmp_path)


def drop(stated: Any, name: str) -> None:
    """Take leaves out of _METADATA."""
    entries = stated["tree_metadata"]
    for path in list(entries):
        if ".".join(key["key"] for key in entries[path]["key_metadata"]).startswith(name):
            del entries[path]


def test_an_old_orbax_says_less(base: Path, state: Path, tmp_path: Path) -> None:
    """Neither which store it is nor whether zeros are stored; no commit time, no commit_success.txt."""
    edit(state, lambda stated: {"tree_metadata": stated["tree_metadata"]})
    for path in (base / "checkpoint_1000").glob("_CHECKPOINT_METADATA"):
        path.unlink()
    for path in base.rglob("commit_success.txt"):
        path.unlink()
    assert converted(base, tmp_path / "out") == of_seed(0, tmp_path)


def test_a_copy_is_the_same_source_and_what_is_written_again_another_one(pristine: Path, base: Path) -> None:
    one, other = t5x.open(str(pristine)), t5x.open(str(base))
    assert one.source.fingerprint == other.source.fingerprint
    data = next((base / "checkpoint_1000/state/ocdbt.process_0/d").iterdir())
    os.utime(data, ns=(1, 1))
    assert t5x.open(str(base)).stamp != other.stamp
    data.write_bytes(data.read_bytes() + b"x")
    assert t5x.open(str(base)).source.fingerprint != other.source.fingerprint


# -------------------------------------------------------------------------------------------------------------- steps


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """Steps 2 (T5X's container) and 10 (Orbax's), and what a run that was killed leaves."""
    folder = tmp_path / "steps"
    tiny.write_t5x(folder, tiny.t5_arrays(SMALL, seed=2), step=2)
    save(folder, tiny.t5_arrays(SMALL, seed=10), step=10)
    shutil.copytree(folder / "checkpoint_10", folder / "checkpoint_12.orbax-checkpoint-tmp")
    shutil.copytree(folder / "checkpoint_10", folder / "checkpoint_13.orbax-checkpoint-tmp-1700000000")
    (folder / "config.gin").write_text(tiny.t5_gin(SMALL))
    return folder


def test_the_newest_step_is_taken_whatever_its_container(steps: Path, tmp_path: Path) -> None:
    assert converted(steps, tmp_path / "a") == of_seed(10, tmp_path)
    assert converted(steps, tmp_path / "b", "--step", 2) == of_seed(2, tmp_path)
    assert t5x.open(str(steps)).notes == ()
    tiny.write_t5x(steps, tiny.t5_arrays(SMALL, seed=11), step=11)
    assert converted(steps, tmp_path / "c") == of_seed(11, tmp_path)
    assert converted(steps, tmp_path / "d", "--step", 10) == of_seed(10, tmp_path / "again")


@pytest.mark.parametrize("below", ["checkpoint_10", "checkpoint_10/state"])
def test_a_step_folder_and_its_state_may_be_given(steps: Path, tmp_path: Path, below: str) -> None:
    assert converted(steps / below, tmp_path / "a") == of_seed(10, tmp_path)
    assert t5x.open(str(steps / below)).source.step == 10
    assert converted(steps / below, tmp_path / "b", "--step", 10) == of_seed(10, tmp_path / "again")
    assert "--step 2" in bad(steps / below, "--step", 2, code=2)


def uncommitted(folder: Path) -> None:
    """As Orbax's directory looks before its last two acts."""
    (folder / "commit_success.txt").unlink()
    path = folder / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps({**json.loads(path.read_text()), "commit_timestamp_nsecs": None}))


def test_a_step_that_is_not_committed_is_passed_over_and_named(steps: Path, tmp_path: Path) -> None:
    shutil.copytree(steps / "checkpoint_10", steps / "checkpoint_11")
    uncommitted(steps / "checkpoint_11")
    (steps / "checkpoint_12").mkdir()
    assert converted(steps, tmp_path / "a") == of_seed(10, tmp_path)
    (note,) = t5x.open(str(steps)).notes
    assert note.startswith("passed over: checkpoint_11, checkpoint_12 (unfinished")
    assert "commit_success.txt" in note
    assert "no complete step 11; there: 2, 10" in bad(steps, "--step", 11, code=66)
    for below in ("checkpoint_11", "checkpoint_11/state"):
        message = bad(steps / below)
        assert "checkpoint_11: unfinished" in message
        assert "commit_success.txt" in message


@pytest.mark.parametrize(
    ("missing", "complete_on_a_disk"),
    [
        ([], True),
        (["_CHECKPOINT_METADATA"], True),
        (["commit_success.txt"], True),  # the commit time is in _CHECKPOINT_METADATA
        (["commit_success.txt", "_CHECKPOINT_METADATA"], True),  # an old Orbax: the name is all there is
        (["commit_success.txt", "_CHECKPOINT_METADATA", "state/_METADATA"], False),
    ],
)
def test_what_makes_a_step_complete(steps: Path, missing: list[str], complete_on_a_disk: bool) -> None:
    folder = steps / "checkpoint_10"
    for name in missing:
        (folder / name).unlink()
    assert t5x._is_complete(LocalStorage(folder)) == complete_on_a_disk
    # a bucket has no rename: only the file that is written last says so
    assert t5x._is_complete(Bucket(folder)) == ("commit_success.txt" not in missing)


class Bucket(LocalStorage):
    """A folder that says it is a bucket."""

    def kvstore(self, name: str) -> dict[str, Any]:
        return {"driver": "gcs", "bucket": "bucket", "path": name}


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"commit_timestamp_nsecs": "soon"}', "\udcff"])
def test_a_commit_time_that_is_none(steps: Path, text: str) -> None:
    folder = steps / "checkpoint_10"
    (folder / "commit_success.txt").unlink()
    (folder / "_CHECKPOINT_METADATA").write_bytes(text.encode(errors="surrogateescape"))
    assert t5x.open(str(steps)).source.step == 2


# ------------------------------------------------------------------------------------------------------------ damaged


@pytest.mark.parametrize(
    "text",
    {
        "empty": "",
        "no JSON": "{",
        "a list": "[]",
        "deep": "[" * 100_000,
        "no tree": "{}",
        "no map": '{"tree_metadata": []}',
        "no entries": '{"tree_metadata": {}}',
        "an entry of text": '{"tree_metadata": {"a": "b"}}',
        "no keys": '{"tree_metadata": {"a": {"value_metadata": {}}}}',
        "keys that are none": '{"tree_metadata": {"a": {"key_metadata": [1], "value_metadata": {}}}}',
        "no value": '{"tree_metadata": {"a": {"key_metadata": [{"key": "target"}, {"key": "b"}]}}}',
        "only an optimizer": '{"tree_metadata": {"a": {"key_metadata": [{"key": "state"}], "value_metadata": {}}}}',
    }.items(),
    ids=lambda case: case[0],
)
def test_metadata_that_is_none(state: Path, text: tuple[str, str]) -> None:
    (state / "_METADATA").write_text(text[1])
    started = time.monotonic()
    assert "state/_METADATA" in bad(state.parent)
    assert time.monotonic() - started < HOSTILE_SECONDS


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_what_opens_the_store_is_missing(state: Path, name: str) -> None:
    (state / name).unlink()
    assert f"state/{name}: not there" in bad(state.parent)


def test_zarr_v3_is_refused_by_name(tmp_path: Path) -> None:
    message = bad(checkpoint(tmp_path / "t5x", use_zarr3=True))
    assert "zarr v3" in message
    assert "use_zarr3=False" in message


def test_every_array_and_chunk_that_is_missing_is_named_at_once(state: Path) -> None:
    kvstore = store(state)
    gone = ["target.decoder.decoder_norm.scale", "target.encoder.encoder_norm.scale"]
    for name in gone:
        for key in [key for key in kvstore.list().result() if key.startswith(f"{name}/".encode())]:
            kvstore.write(key, None).result()
    kvstore.write(f"{QUERY}/0.1", None).result()
    extra = "target.encoder.layers_9.attention.query.kernel"
    kvstore.write(f"{extra}/.zarray", kvstore.read(f"{QUERY}/.zarray").result().value).result()
    edit(state, lambda stated: drop(stated, "target.token_embedder"))
    message = bad(state.parent, "--dry-run")
    for name in (*gone, QUERY, extra, "target.token_embedder.embedding"):
        assert name in message
    assert message.count("no such folder") == 2
    assert message.count("not in state/_METADATA") == 2
    assert "chunk 0.1" in message


@pytest.mark.parametrize("how", ["deleted", "truncated"])
def test_a_data_file_that_is_missing_or_short_is_seen_by_the_plan(state: Path, how: str) -> None:
    """TensorStore takes what is in a missing file for empty."""
    damaged = damage_data(state, how)
    message = bad(state.parent, "--dry-run")
    assert any(f"bytes in ocdbt.process_0/d/{name}" in message for name in damaged)
    assert QUERY in message or "more" in message


def damage_data(state: Path, how: str) -> list[str]:
    files = list((state / "ocdbt.process_0" / "d").iterdir())
    for path in files:
        path.unlink() if how == "deleted" else os.truncate(path, 100)
    return [path.name for path in files]


@pytest.mark.parametrize("how", ["deleted", "truncated"])
def test_a_data_file_that_goes_missing_after_the_plan_is_not_read_as_zeros(
    pristine: Path, base: Path, state: Path, how: str
) -> None:
    conversion = prepare(Request(str(base), str(base.parent / "out"), "ul2"))
    damage_data(state, how)
    with pytest.raises(errors.SourceError, match="damaged"):
        convert(conversion)
    assert not list((base.parent / "out").rglob("manifest.json"))


@pytest.mark.parametrize("what", ["manifest.ocdbt", "d/*"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "emptied", "replaced"])
def test_a_damaged_b_tree(state: Path, what: str, how: str) -> None:
    for path in state.glob(what):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        changed = {"truncated": data[: len(data) // 2], "flipped": data, "emptied": b"", "replaced": b"<html>" * 100}
        path.write_bytes(changed[how])
    message = bad(state.parent)
    assert str(state) in message
    assert "Copy or save it again" in message


def test_nodes_that_lead_back_to_themselves() -> None:
    nodes: dict[str | None, Any] = {
        None: {"versions": [{"root": {"location": "a"}}]},
        "a": {"entries": [{"key": b"x", "location": "b", "subtree_common_prefix": b"x"}]},
        "b": {"entries": [{"key": b"y", "location": "a", "subtree_common_prefix": b"y"}]},
    }
    with pytest.raises(ValueError, match="leads back to a"):
        list(orbax._values(lambda node: nodes[node]))


def test_an_empty_store(state: Path) -> None:
    for key in (kvstore := store(state)).list().result():
        kvstore.write(key, None).result()
    assert "more" in bad(state.parent)


def test_a_chunk_that_cannot_be_decoded_is_named(state: Path) -> None:
    store(state).write(f"{QUERY}/0.1", b"<html>404</html>").result()
    message = bad(state.parent)
    assert f"{QUERY}: cannot be decoded" in message
    assert "tensorstore_spec" not in message


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [10**12, 24]},
        {"shape": [10**12, 10**12], "chunks": [10**12, 10**12]},
        {"shape": [10**300, 24]},
        {"shape": [2] * 5000, "chunks": [1] * 5000},
        {"shape": "twelve"},
        {"chunks": [0, 24]},
        {"dtype": "<f8"},
        {"dtype": "<u2"},
        {"order": "F"},
    ],
    ids=str,
)
@pytest.mark.parametrize("stored", [True, False])
def test_hostile_zarr_metadata(state: Path, change: dict[str, Any], stored: bool) -> None:
    kvstore = store(state)
    metadata = json.loads(kvstore.read(f"{QUERY}/.zarray").result().value)
    kvstore.write(f"{QUERY}/.zarray", json.dumps({**metadata, **change}).encode()).result()
    edit(state, lambda stated: stated.update(store_array_data_equal_to_fill_value=stored))
    started = time.monotonic()
    assert QUERY.removeprefix("target.") in bad(state.parent)
    assert time.monotonic() - started < HOSTILE_SECONDS


def test_a_leaf_that_is_no_array(state: Path) -> None:
    def change(stated: Any) -> None:
        for entry in stated["tree_metadata"].values():
            if entry["key_metadata"][-2]["key"] == "encoder_norm":
                entry["value_metadata"]["value_type"] = "string"

    edit(state, change)
    message = bad(state.parent)
    assert "target.encoder.encoder_norm.scale" in message
    assert "string" in message


# --------------------------------------------------------------------------------------------- chunks that are left out


@pytest.mark.parametrize("fill", [None, 0.0, 1.5])
@pytest.mark.parametrize("stated", [False, None])
def test_chunks_that_orbax_left_out_are_their_fill_value(
    base: Path, state: Path, fill: float | None, stated: bool | None
) -> None:
    kvstore = store(state)
    metadata = json.loads(kvstore.read(f"{QUERY}/.zarray").result().value)
    rows, columns = metadata["chunks"]
    kvstore.write(f"{QUERY}/.zarray", json.dumps({**metadata, "fill_value": fill}).encode()).result()
    expected = tiny.t5_arrays(SMALL)[QUERY.removeprefix("target.")]
    expected[:rows, columns : 2 * columns] = fill or 0
    kvstore.write(f"{QUERY}/0.1", None).result()
    edit(state, lambda metadata: metadata.pop("store_array_data_equal_to_fill_value") and None)
    if stated is not None:
        edit(state, lambda metadata: metadata.update(store_array_data_equal_to_fill_value=stated))
    found = arrays_of(state.parent).tensors[QUERY.removeprefix("target.")]
    assert np.array_equal(found.read(), expected)
    (note,) = t5x.open(str(base)).notes
    assert note.startswith("1 chunks were left out")
    assert QUERY in note


@pytest.mark.parametrize("zeros", [True, False])
def test_orbax_stores_zeros_too(tmp_path: Path, zeros: bool) -> None:
    """The law behind the rule: today's Orbax says so in _METADATA, and an absent chunk is damage."""
    arrays = tiny.t5_arrays(SMALL)
    if zeros:
        arrays = {name: np.zeros_like(array) for name, array in arrays.items()}
    folder = save(tmp_path / "t5x", arrays)
    assert json.loads((folder / "state/_METADATA").read_text())["store_array_data_equal_to_fill_value"] is True
    assert not arrays_of(folder).filled


# ------------------------------------------------------------------------------------------------- TensorStore's errors


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("NOT_FOUND", errors.SourceError),
        ("DATA_LOSS", errors.SourceError),
        ("FAILED_PRECONDITION", errors.SourceError),
        ("OUT_OF_RANGE", errors.SourceError),
        ("UNAVAILABLE", errors.IncompleteError),
        ("DEADLINE_EXCEEDED", errors.IncompleteError),
        ("PERMISSION_DENIED", errors.SourceMissingError),
        ("UNAUTHENTICATED", errors.SourceMissingError),
    ],
)
def test_what_tensorstore_says(status: str, expected: type[errors.FtconvertError]) -> None:
    error = zarr_chunks.tensorstore_error(ValueError(f"{status}: of \"a\" [tensorstore_spec='{{}}']"), "gs://bucket/a")
    assert type(error) is expected
    assert str(error).startswith("gs://bucket/a: ")
    assert str(error).endswith(f'{status}: of "a"')


def test_a_connection_that_is_not_there(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: Any, **options: Any) -> Any:
        raise ValueError("UNAVAILABLE: CURL error Couldn't connect to server")

    monkeypatch.setattr(tensorstore.ocdbt, "dump", gone)
    assert "cannot be reached" in bad(state.parent, code=74)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_store_that_may_not_be_read(state: Path) -> None:
    for path in (state / "d").iterdir():
        path.chmod(0)
    assert "may not be read" in bad(state.parent, code=66)


# --------------------------------------------------------------------------------------------------------------- fuzz


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    what=st.sampled_from(["_METADATA", "manifest.ocdbt", "d/*", "ocdbt.process_0/d/*", "../_CHECKPOINT_METADATA"]),
    which=st.integers(0, 100),
    how=st.sampled_from(["flip", "truncate", "delete", "double"]),
    where=st.integers(0, 10**6),
)
def test_random_damage_is_refused_or_harmless(
    pristine: Path, tmp_path: Path, what: str, which: int, how: str, where: int
) -> None:
    copy, out = tmp_path / "copy", tmp_path / "out"
    for folder in (copy, out):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, copy)
    files = sorted((copy / "checkpoint_1000" / "state").glob(what))
    path = files[which % len(files)]
    data = bytearray(path.read_bytes())
    at = where % len(data)
    if how == "flip":
        data[at] ^= 1 << where % 8
    path.write_bytes(data[:at] if how == "truncate" else data * 2 if how == "double" else data)
    if how == "delete":
        path.unlink()
    started = time.monotonic()
    result = ftconvert("jax-to-ft", copy, out, "--model", "ul2", "--layout", "weights")
    assert time.monotonic() - started < 5
    if result.exit_code:
        shutil.rmtree(out, ignore_errors=True)
        refused(65, "jax-to-ft", copy, out, "--model", "ul2")
    elif (what, how) != ("ocdbt.process_0/d/*", "flip"):  # nothing has a checksum over the values themselves
        assert tree(out / "1-gpu") == weights_of(pristine)


@cache
def weights_of(source: Path) -> dict[str, bytes]:
    return converted(source, source.parent / "weights")
