"""T5X checkpoints as Orbax writes them: every array of a step in one OCDBT key-value store.

    _CHECKPOINT_METADATA      JSON: when the step was begun and committed; old versions have none
    commit_success.txt        written last
    state/_METADATA           JSON: the tree, and how its arrays are stored
    state/manifest.ocdbt      the key-value store: a B-tree, whose nodes lie in d/
    state/ocdbt.process_0/d/  the values that process 0 wrote; the B-tree says file, offset and length of each
    dataset/                  the input pipeline; not ours, as is everything in `state` that is not below `target`

Keys are `target.a.b/.zarray`, `target.a.b/1.0`: what T5X's own container has as files. With `use_ocdbt` false they are
files here, too. The files of the store have random names, so two saves of the same weights have different fingerprints.

TensorStore reads a value whose file is missing as an empty one, without an error (measured, 0.1.86); so before anything
is read, the B-tree is walked, and each value's file has to be there and long enough.

Source of the facts: orbax-checkpoint, path/atomicity.py, metadata/tree.py, serialization/tensorstore_utils.py;
TensorStore, kvstore/ocdbt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import unquote

from converter.errors import Problem, SourceError
from converter.formats import zarr, zarr_chunks
from converter.formats.outside import load_json
from converter.storage import Storage

STATE = "state"
TREE = "_METADATA"
METADATA = f"{STATE}/{TREE}"
STEP = "_CHECKPOINT_METADATA"
COMMITTED = "commit_success.txt"
MANIFEST = "manifest.ocdbt"
ARRAYS = ("jax.Array", "np.ndarray", "scalar")  # kinds of leaves that are stored as arrays
# What TensorStore may keep of B-trees: without it, every chunk would read the way down to it again. A key takes 100
# bytes or so, and a model of 20 billion parameters has a few thousand.
CACHE_BYTES = 32 << 20


def recognises(folder: Storage) -> bool:
    """Whether this is a step folder that Orbax wrote, finished or not."""
    return folder.is_file(METADATA) or folder.is_file(STEP)


def is_complete(folder: Storage) -> bool:
    """Whether Orbax had committed the step.

    In a bucket it writes in place, and commit_success.txt decides. On a disk it writes under a temporary name
    (`checkpoint_5.orbax-checkpoint-tmp`) and the rename decides; where a copy from a bucket may have lost that, the
    commit time in _CHECKPOINT_METADATA tells. Old versions (utils.py of 0.2) wrote neither
    file on a disk.
    """
    if folder.is_file(COMMITTED):
        return True
    if folder.kvstore("")["driver"] != "file":
        return False
    if not folder.is_file(STEP):
        return folder.is_file(METADATA)
    text = folder.read(STEP)
    try:
        stated = load_json(text, folder.path(STEP))
    except SourceError:
        return False
    return isinstance(stated.get("commit_timestamp_nsecs"), int)


def read(folder: Storage, index: bytes, files: Mapping[str, int], model: str) -> zarr.Arrays:
    """The arrays below `model` (`target.`) of a step, with what is wrong with them.

    Args:
        index: content of state/_METADATA.
        files: every file of the step folder with its size.

    Raises:
        SourceError: unusable state/_METADATA or key-value store.
        IncompleteError, SourceMissingError: the store cannot be reached, or may not be read.
    """
    where = folder.path(METADATA)
    stated = load_json(index, where)
    try:
        leaves = dict(_leaves(stated["tree_metadata"], model))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SourceError(f"{where}: expected Orbax's description of a tree of arrays, found: {reason}") from error
    ocdbt, stores_fill = stated.get("use_ocdbt"), stated.get("store_array_data_equal_to_fill_value")
    if stated.get("use_zarr3"):
        raise SourceError(
            f"{where}: `use_zarr3`: the arrays are stored as zarr v3, which T5X does not write and this version cannot "
            "read. Save the checkpoint again with use_zarr3=False."
        )
    if not leaves:
        raise SourceError(f"{where}: expected T5X's tree, {model.rstrip('.')} and state, found no array of a model")
    state = folder.below(STATE)
    there = {name.removeprefix(f"{STATE}/"): size for name, size in files.items() if name.startswith(f"{STATE}/")}
    # Orbax itself goes by the file where an old version has not stated it
    ocdbt = MANIFEST in there if ocdbt is None else bool(ocdbt)
    if ocdbt:
        place, problems = _ocdbt(state, there, not stores_fill, model)
    else:
        read_each = partial(state.each, state.read)
        place = zarr.Place(str(state), there, read_each, state.kvstore, state, absent_is_fill=not stores_fill)
        problems = []
    names = [name for name, kind in leaves.items() if kind in ARRAYS]
    found = zarr.arrays(names, place, METADATA, leaves, model)
    found.problems += problems
    for name, kind in leaves.items():
        if kind not in ARRAYS:
            found.problems.append(Problem(name, "an array", str(kind), f"stated in {METADATA}", str(folder)))
    return found


def _leaves(tree: Mapping[str, Any], model: str) -> Iterator[tuple[str, Any]]:
    """Name -> kind of every leaf below `model`; Orbax joins the keys of its path with dots."""
    for entry in tree.values():
        name = ".".join(str(key["key"]) for key in entry["key_metadata"])
        if name.startswith(model):
            yield name, entry["value_metadata"].get("value_type")


# ------------------------------------------------------------------------------------------------------------- OCDBT


def _ocdbt(
    state: Storage, files: Mapping[str, int], absent_is_fill: bool, model: str
) -> tuple[zarr.Place, list[Problem]]:
    import tensorstore

    if MANIFEST not in files:
        raise SourceError(f"{state.path(MANIFEST)}: not there. Copy or save the checkpoint again.")
    base, where = state.kvstore(""), str(state)
    # a cache for B-trees only: what is kept of arrays is the engine's to decide
    trees = "cache_pool#ocdbt"
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}, trees: {"total_bytes_limit": CACHE_BYTES}})

    def kvstore(path: str) -> dict[str, Any]:
        return {"driver": "ocdbt", "base": base, "path": path, "cache_pool": trees}

    try:
        root = tensorstore.KvStore.open(base, context=context).result()
        store = tensorstore.KvStore.open(kvstore(""), context=context).result()
        values = dict(_values(lambda node: tensorstore.ocdbt.dump(root, node, context=context).result()))
        problems = [
            Problem(
                key, f"{stop} bytes in {file}", f"{files[file]} bytes" if file in files else "no such file", "", where
            )
            for key, (file, _, stop) in values.items()
            if key.startswith(model) and file and files.get(file, -1) < stop
        ]
    except (ValueError, RuntimeError) as error:
        raise zarr_chunks.tensorstore_error(error, where) from error

    def read(keys: Sequence[str]) -> list[bytes]:
        return [read_value(key, answer) for key, answer in [(key, store.read(key)) for key in keys]]

    def read_value(key: str, answer: Any) -> bytes:
        try:
            value: bytes = answer.result().value
        except (ValueError, RuntimeError) as error:
            raise zarr_chunks.tensorstore_error(error, f"{where}/{key}") from error
        return value

    sizes = {key: stop - start for key, (_, start, stop) in values.items()}
    return zarr.Place(where, sizes, read, lambda name: kvstore(f"{name}/"), None, context, absent_is_fill), problems


Stretch = tuple[str, int, int]  # (file, start, stop)


def _values(dump: Callable[[str | None], Any]) -> Iterator[tuple[str, Stretch]]:
    """Every key of a store and where its value lies; without a file where it lies in the B-tree itself.

    Args:
        dump: `tensorstore.ocdbt.dump`, which shows a node as it is stored: keys begin after what the nodes above say
            that all keys below them have in common.

    Raises:
        ValueError: nodes that lead back to themselves.
    """
    versions = dump(None)["versions"]
    root = versions[-1]["root"].get("location") if versions else None
    nodes = [(root, b"")] if root else []  # an empty store has no root
    seen = set()
    while nodes:
        location, prefix = nodes.pop()
        if location in seen:
            raise ValueError(f"the B-tree leads back to {location}")
        seen.add(location)
        for entry in dump(location)["entries"]:
            key = (prefix + entry["key"]).decode(errors="replace")
            if "location" in entry:
                nodes.append((entry["location"], prefix + entry["subtree_common_prefix"]))
            elif "indirect_value" in entry:
                yield key, _stretch(entry["indirect_value"])
            else:
                yield key, ("", 0, len(entry["inline_value"]))


def _stretch(location: str) -> Stretch:
    """`value:ocdbt.process_0/:d/146978fc:5743:7637` (kind, folder, file, offset, length), percent-encoded."""
    _, folder, name, start, length = location.split(":")
    return unquote(folder) + unquote(name), int(start), int(start) + int(length)
