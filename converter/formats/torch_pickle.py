"""A pickle of torch, interpreted and never run.

A pickle is a program for a small machine: opcodes push values on a stack, collect those above a mark into a list or a
dict, keep some in a memo to be used again. Some import whatever they name (GLOBAL) and call whatever was imported
(REDUCE). Running them is how such files attack, so they are not run.

This is a machine of our own. It knows only the opcodes that a state dict takes, and its values are inert: an import
gives a `Global`, which is a name; a call gives what a function in `CALLS` makes of the arguments, such as a `Tensor`,
which describes a view of a `Stored`, elements elsewhere in the file. Every other opcode, import and call is refused by
its name. pickletools only cuts the bytes into opcodes. What a pickle may cost is limited by counting steps, and by
never looking into nested values.

Source of the facts: pickletools; torch/serialization.py, torch/_utils.py.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from converter.formats.outside import shown, stored_dtype

MAX_STEPS = 1_000_000  # opcodes, about 30 for each tensor: a second or two
PUSH_ARGUMENT = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
PUSH_VALUE = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
STORAGES = {
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.DoubleStorage": "float64",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.storage.UntypedStorage": "uint8",
}
# of tensors in an UntypedStorage; torch has no storage of their own for younger types
DTYPES = {
    **{f"torch.{name}": name for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")},
    **{f"torch.{name}": name for name in ("float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz")},
    **{f"torch.{name}": name for name in STORAGES.values()},
}
UNTYPED = "torch.storage.UntypedStorage"
CLEAN = "Save the model again as safetensors, on a machine that may run what the file holds."
AGAIN = "Copy or save the file again."


class PickleError(ValueError):
    """A file that does more than describe tensors, or is damaged."""


class DamagedError(PickleError):
    """A pickle that makes no sense; perhaps only because it goes on."""

    def __init__(self, what: str) -> None:
        super().__init__(f"a damaged pickle: {what}. {AGAIN}")


@dataclass(frozen=True, eq=False)
class Global:
    """What a pickle would import: its name, nothing else."""

    name: str


@dataclass(frozen=True, eq=False)
class Stored:
    """A storage: elements in a row, somewhere else in the file."""

    kind: str
    key: str
    numel: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return stored_dtype(STORAGES[self.kind])


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage; `offset` and `stride` count elements. Not checked yet."""

    stored: Stored
    offset: Any
    size: Any
    stride: Any
    dtype: np.dtype[Any]


def kind_of(value: Any) -> str:
    """What a value is, for messages; nothing looks into it."""
    if isinstance(value, dict):
        return f"dict of {len(value)}"
    return "storage" if isinstance(value, Stored) else type(value).__name__.lower()


def is_count(value: Any) -> bool:
    """Whether this can be a number of elements or an offset."""
    return type(value) is int and 0 <= value < 2**63


# ---------------------------------------------------------------------------------------------------------- the machine


def run(stream: io.BytesIO) -> Any:
    """The value of the next pickle in the stream, by opcodes on the list below and no others.

    Every value is inert: None, bool, int, float, str, bytes, tuple, list, dict, or one of the descriptions above.
    Nothing looks into nested values, so depth and shared values (which make hashing or printing exponential) cost
    nothing.

    Raises:
        PickleError: it would run code, is too long, or no pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    steps = 0

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def pop() -> Any:
        if marks and len(stack) <= marks[-1]:
            raise IndexError("nothing above the mark")
        return stack.pop()

    try:
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            steps += 1
            if name in PUSH_ARGUMENT:
                stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else int(argument or 0)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[int(argument or 0)])
            elif name in PUSH_VALUE:
                stack.append(PUSH_VALUE[name])
            elif name in ("EMPTY_LIST", "EMPTY_DICT"):
                stack.append([] if name == "EMPTY_LIST" else {})
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                stack.append(tuple([pop() for _ in range(int(name[-1]))][::-1]))
            elif name in ("APPEND", "APPENDS"):
                items = since_mark() if name == "APPENDS" else [pop()]
                _of(list, stack[-1], name).extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                items = since_mark() if name == "SETITEMS" else [pop(), pop()][::-1]
                _put(_of(dict, stack[-1], name), items)
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                # genops puts a space between the two lines of GLOBAL
                parts = str(argument).split(" ", 1) if name == "GLOBAL" else [pop(), pop()][::-1]
                stack.append(_global(parts))
            elif name == "REDUCE":
                arguments, function = pop(), pop()
                steps += _copied(arguments)
                stack.append(_call(function, arguments))
            elif name == "BINPERSID":
                stack.append(_stored(pop()))
            elif name == "BUILD":
                pop()  # torch hangs `_metadata` (versions of the modules) on the dict; nothing here needs it
                _of(dict, stack[-1], "BUILD, which calls __setstate__,")
            elif name == "STOP":
                if len(stack) != 1 or marks:
                    raise DamagedError(f"it ends with {len(stack)} values")
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                raise PickleError(f"a pickle that would run code, or is none: {name}. {CLEAN}")
            if steps > MAX_STEPS:
                raise PickleError(f"a pickle of more than {MAX_STEPS} steps")
    except PickleError:
        raise
    except (IndexError, KeyError) as error:  # below the stack, no mark, not in the memo
        raise DamagedError(f"step {steps} takes what is not there") from error
    except (ValueError, OverflowError) as error:  # from genops: no opcode, or cut off
        raise DamagedError(str(error)[:100]) from error
    raise DamagedError("it has no end")


def _copied(arguments: Any) -> int:
    """What a call may cost: the memo lends one long list to any number of calls."""
    if not isinstance(arguments, tuple):
        return 0
    return len(arguments) + sum(len(one) for one in arguments if isinstance(one, list | tuple))


def _of(kind: type, value: Any, what: str) -> Any:
    if type(value) is not kind:
        raise PickleError(f"a pickle that would run code: {what} on {kind_of(value)}. {CLEAN}")
    return value


def _put(found: dict[str, Any], items: list[Any]) -> None:
    """Keys are texts: another object's hash would have to be worked out, which can be made to take for ever."""
    if len(items) % 2:
        raise DamagedError("a key without a value")
    for key in items[::2]:
        if type(key) is not str:
            raise PickleError(f"a dict with a key that is no text, but {kind_of(key)}")
    found.update(zip(items[::2], items[1::2], strict=True))


def _global(parts: list[Any]) -> Global:
    name = ".".join(part if isinstance(part, str) else kind_of(part) for part in parts)
    if name not in CALLS and name not in STORAGES and name not in DTYPES:
        raise PickleError(f"a pickle that would run code: {shown(name)}. {CLEAN}")
    return Global(name)


def _call(function: Any, arguments: Any) -> Any:
    name = function.name if isinstance(function, Global) else kind_of(function)
    if name not in CALLS or not isinstance(arguments, tuple):
        raise PickleError(f"a pickle that would run code: a call of {shown(name)}. {CLEAN}")
    try:
        return CALLS[name](*arguments)
    except TypeError as error:  # another number of arguments
        raise PickleError(f"a call of {name} with {len(arguments)} arguments, which it does not take") from error


def _stored(identity: Any) -> Stored:
    """A persistent id: ("storage", type, key, device, number of elements), in streams with a view after it: None."""
    if isinstance(identity, tuple) and len(identity) in (5, 6) and all(one is None for one in identity[5:]):
        what, kind, key, _, numel = identity[:5]
        known = isinstance(kind, Global) and kind.name in STORAGES
        if type(what) is str and what == "storage" and known and type(key) is str and is_count(numel):
            return Stored(kind.name, key, numel)
    raise PickleError("a reference to something else than a storage")


# -------------------------------------------------------------------------------------- what may be called, described


def _ordered_dict(items: Any = ()) -> dict[str, Any]:
    """collections.OrderedDict, of pairs as Python 2 wrote it."""
    found: dict[str, Any] = {}
    if not isinstance(items, list | tuple):
        raise PickleError(f"an OrderedDict of {kind_of(items)}")
    for pair in items:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise PickleError("an OrderedDict of something else than pairs")
        _put(found, list(pair))
    return found


def _size(axes: Any = ()) -> tuple[Any, ...]:
    if not isinstance(axes, list | tuple):
        raise PickleError(f"a torch.Size of {kind_of(axes)}")
    return tuple(axes)


def _tensor(stored: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """_rebuild_tensor, and _rebuild_tensor_v2 with (requires_grad, hooks[, metadata]) after it."""
    if not isinstance(stored, Stored) or stored.kind == UNTYPED:
        raise PickleError("a tensor of something else than a typed storage")
    if len(rest) > 2 and rest[2]:  # conjugated or negated views: the elements are not what is stored
        raise PickleError("a tensor with metadata: a conjugated or negated view")
    return Tensor(stored, offset, size, stride, stored.dtype)


def _tensor_v3(
    stored: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Tensor:
    if not isinstance(stored, Stored) or not isinstance(dtype, Global) or dtype.name not in DTYPES or metadata:
        raise PickleError("a tensor of something else than a storage with a dtype")
    return Tensor(stored, offset, size, stride, stored_dtype(DTYPES[dtype.name]))


def _parameter(data: Any, *rest: Any) -> Tensor:
    """A tensor that was trained; hooks and attributes that hang on it are left aside."""
    if not isinstance(data, Tensor):
        raise PickleError(f"a parameter of {kind_of(data)}")
    return data


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
