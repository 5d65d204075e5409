"""Reading pickles, and the files of torch.save, without executing anything they name.

A pickle is a program for a small stack machine. This one has the machine's instructions for data;
where a pickle calls or instantiates something, `_CALLS` must have its name and says what becomes of
the arguments: a dict, a tensor that is checked before it is made, a `Record` that holds them and
does nothing. No other name is accepted, none is ever imported, and what the file calls a state is
kept as data. (A subclass of pickle.Unpickler does not give that: its BUILD sets attributes, also of
the functions and classes it was allowed to find, and its memo takes any index.)
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from .contents import CheckpointError

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first of the five pickles of torch.save's format before zip files."""

_LARGEST_INTEGER = 2**63
_MOST_SHARED = 4
"""Times an element of a storage is copied into tensors, apart from a few."""
_FEW = 1024
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 256
_SIZED = (str, bytes, tuple, list, dict, set)


class Global(NamedTuple):
    """Something the file refers to by name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An object the file describes: its class, the arguments it is made with and its state."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


@dataclass(eq=False)
class Storage:
    """The memory of tensors. In a legacy file, what `read` returns follows what refers to it."""

    dtype: torch.dtype
    count: int
    read: Callable[[], bytes]
    taken: int = 0

    @cached_property
    def elements(self) -> torch.Tensor:
        data = self.read()
        if len(data) != self.count * self.dtype.itemsize:
            raise CheckpointError(f"{len(data)} bytes are not {self.count} of {self.dtype}")
        return torch.frombuffer(bytearray(data), dtype=self.dtype)


@dataclass(eq=False)
class StoredTensor:
    """A tensor that has not been made yet."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> torch.Tensor:
        """The tensor, with memory of its own; CheckpointError unless it lies inside its storage,
        or for so many tensors of one storage that they would take much more memory than the file.
        """
        storage, size, stride = self.storage, self.size, self.stride
        if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
            raise CheckpointError(f"a tensor has {len(size)} sizes and {len(stride)} strides")
        elements = math.prod(size)
        reach = self.offset + sum((n - 1) * step for n, step in zip(size, stride))
        if elements > storage.count or (elements > 0 and reach >= storage.count):
            raise CheckpointError(
                f"a tensor of {list(size)} with strides {list(stride)} from element {self.offset} "
                f"on does not fit into {storage.count} elements"
            )
        storage.taken += elements
        if storage.taken > _MOST_SHARED * storage.count + _FEW:
            raise CheckpointError("too many of its tensors share their memory")
        try:
            if elements == 0:
                return torch.empty(size, dtype=storage.dtype)
            view = storage.elements.as_strided(size, stride, self.offset)
            return view.clone(memory_format=torch.contiguous_format)
        except (RuntimeError, OverflowError, TypeError) as error:
            raise CheckpointError(f"a tensor of {list(size)} cannot be made: {error}") from error


def read_pickle(data: bytes) -> Any:
    """What a pickle holds: numbers, strings, tuples, lists, dicts and sets of Python, `Record`,
    `Global` and `StoredTensor`. CheckpointError for anything but a well-formed pickle of these."""
    return _Machine(len(data)).run(io.BytesIO(data))


def read_torch_legacy(data: bytes) -> Any:
    """What torch.save before version 1.6 wrote, also the storages inside other pickles."""
    file = io.BytesIO(data)
    if not data.startswith(LEGACY_MAGIC):
        raise CheckpointError("a nested file does not begin as those of torch.save do")
    file.seek(len(LEGACY_MAGIC))
    protocol, system = (_Machine(len(data)).run(file) for _ in range(2))
    if protocol != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
        raise CheckpointError("it was written by another release of PyTorch or on another machine")

    contents: dict[str, bytes] = {}
    machine = _Machine(len(data), contents.__getitem__)
    value = machine.run(file)
    for key in _of_type(list, _Machine(len(data)).run(file)):
        storage = machine.storages.get(_of_type(str, key))
        if storage is None:
            raise CheckpointError("its tensors are damaged")
        count = int.from_bytes(file.read(8), "little")
        contents[key] = file.read(min(count, len(data)) * storage.dtype.itemsize)
    if contents.keys() != machine.storages.keys():
        raise CheckpointError("its tensors are incomplete")
    return value


def read_torch_zip(data: bytes) -> Any:
    """What torch.save writes since version 1.6."""
    archive = _well_formed(zipfile.ZipFile, io.BytesIO(data))
    if sum(member.file_size for member in archive.infolist()) > len(data):
        raise CheckpointError("it is a zip file with compressed or overlapping members")
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise CheckpointError("it is a zip file, but not one of torch.save")
    folder = names[0].removesuffix("data.pkl")

    def read(name: str) -> bytes:
        return _well_formed(archive.read, f"{folder}{name}")

    if f"{folder}byteorder" in archive.namelist() and read("byteorder") != b"little":
        raise CheckpointError("it was written on a big-endian machine")
    machine = _Machine(len(data), lambda key: read(f"data/{key}"))
    return machine.run(io.BytesIO(read("data.pkl")))


def _well_formed(read: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return read(argument)
    except Exception as error:  # whatever malformed bytes lead to
        raise CheckpointError(f"it is a damaged or incomplete zip file: {error}") from error


class _Machine:
    """The stack, the marks on it and the memo of a pickle in a file of `length` bytes. `read` gets
    the bytes of a storage of the file, if it has storages outside of the pickle."""

    def __init__(self, length: int, read: Callable[[str], bytes] | None = None) -> None:
        self.read = read
        self.storages: dict[str, Storage] = {}
        self.nested: dict[int, tuple[bytes, Storage]] = {}
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.budget = _MOST_SHARED * length + _FEW

    def run(self, file: BinaryIO) -> Any:
        """The value of the pickle that begins here; the file is left at its end."""
        try:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.step(opcode.name, argument)
            raise CheckpointError("it is incomplete")
        except CheckpointError:
            raise
        except Exception as error:  # whatever malformed bytes lead to
            raise CheckpointError(f"it is a damaged or incomplete pickle: {error}") from error

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4":
                if abs(argument) > _LARGEST_INTEGER:
                    raise CheckpointError("it holds an integer of more than 64 bits")
                stack.append(argument)
            case "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(argument)

            case "MARK":
                self.marked.append(stack)
                self.stack = []
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])

            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items = self.to_mark()
                self.stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                _of_type(list, stack[-1]).append(item)
            case "APPENDS":
                items = self.to_mark()
                _of_type(list, self.stack[-1]).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _of_type(dict, stack[-1])[_key(key)] = value
            case "SETITEMS":
                items = self.to_mark()
                target = _of_type(dict, self.stack[-1])
                for key, value in zip(items[::2], items[1::2], strict=True):
                    target[_key(key)] = value
            case "EMPTY_SET":
                stack.append(set())
            case "ADDITEMS":
                items = self.to_mark()
                _of_type(set, self.stack[-1]).update(map(_key, items))

            case "GLOBAL":
                stack.append(_known(Global(*argument.split(" ", 1))))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_known(Global(_of_type(str, module), _of_type(str, name))))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.call(_of_type(Global, function), _of_type(tuple, arguments)))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Record):
                    stack[-1].state = state
                else:  # attributes of a dictionary, such as state_dict()._metadata
                    _of_type(dict, stack[-1])
            case "BINPERSID":
                stack.append(self.persistent(_of_type(tuple, stack.pop())))
            case _:
                raise CheckpointError(f"it has the instruction {opcode}, which no checkpoint needs")

    def call(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        # What a call copies has been read before, but the same value may be given to many calls.
        self.budget -= len(arguments)
        self.budget -= sum(len(a) for a in arguments if isinstance(a, _SIZED))
        if self.budget < 0:
            raise CheckpointError("it uses the same values too often")
        if function == _NESTED:
            return self.nested_storage(*arguments)
        if function in _CALLS:
            return _CALLS[function](*arguments)
        return Record(str(function), arguments)

    def nested_storage(self, data: Any) -> Storage:
        """The storage in the bytes of another file. (Files in such files could be many.)"""
        if self.read is not None:
            raise CheckpointError("it nests files in files")
        if id(data) not in self.nested:
            storage = _of_type(Storage, read_torch_legacy(_of_type(bytes, data)))
            self.nested[id(data)] = data, storage
        return self.nested[id(data)][1]

    def persistent(self, identity: tuple[Any, ...]) -> Storage:
        known = len(identity) in (5, 6) and identity[0] == "storage" and not any(identity[5:])
        if self.read is None or not known:
            raise CheckpointError("it refers to something outside of it")
        _, storage_type, key, _, count, *_ = identity
        dtype = _STORAGES.get(_of_type(Global, storage_type))
        if dtype is None:
            raise CheckpointError(f"it holds a {storage_type}, which is no storage of numbers")
        storage = Storage(dtype, _natural(count), partial(self.read, _of_type(str, key)))
        return self.storages.setdefault(key, storage)


def _of_type(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise CheckpointError(f"it has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _key(value: Any) -> Any:
    """A key of a dictionary or a member of a set. (The hash of nested tuples can take forever.)"""
    if value is not None and not isinstance(value, (str, int, float, bytes)):
        raise CheckpointError(f"it has a {type(value).__name__} as a key")
    return value


def _natural(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise CheckpointError(f"it has a {type(value).__name__} where a count belongs")
    return value


# What becomes of the calls a checkpoint makes


def _dictionary(items: Any = ()) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, dict) else items
    return {_key(key): value for key, value in pairs}


def _set(items: Any = ()) -> set[Any]:
    return set(map(_key, items))


def _bytes(text: Any, encoding: Any) -> bytes:
    """How a pickle of protocol 2 holds bytes."""
    if encoding != "latin1":
        raise CheckpointError("it has bytes in an unusual encoding")
    return _of_type(str, text).encode("latin1")


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, *_: Any
) -> StoredTensor:
    natural = tuple(tuple(map(_natural, _of_type(tuple, sizes))) for sizes in (size, stride))
    return StoredTensor(_of_type(Storage, storage), _natural(offset), *natural)


def _parameter(data: Any, *_: Any) -> StoredTensor:
    return _of_type(StoredTensor, data)


def _number(dtype: Any, data: Any) -> Any:
    """A NumPy scalar of a dtype made from a code such as "f8", whose state has the byte order."""
    code = _of_type(str, _of_type(Record, dtype).arguments[0])
    order = ">" if isinstance(dtype.state, tuple) and dtype.state[1:2] == (">",) else "<"
    if not re.fullmatch(r"[fiub][1248]", code):
        raise CheckpointError(f"it has a NumPy scalar of dtype {code!r}")
    (number,) = np.frombuffer(_of_type(bytes, data), np.dtype(order + code))
    return number.item()


def _persistent(meta: Any) -> Record:
    """An object that comes with its own source code, which is not looked at."""
    meta = _of_type(dict, meta)
    return Record(_of_type(str, meta.get("class_name")), (), meta.get("state"))


_NESTED = Global("torch.storage", "_load_from_bytes")

_CALLS: dict[Global, Callable[..., Any]] = {
    Global("_codecs", "encode"): _bytes,
    Global("builtins", "set"): _set,
    Global("__builtin__", "set"): _set,
    Global("collections", "OrderedDict"): _dictionary,
    Global("dnnlib", "EasyDict"): _dictionary,
    Global("dnnlib.util", "EasyDict"): _dictionary,
    Global("numpy.core.multiarray", "scalar"): _number,
    Global("numpy._core.multiarray", "scalar"): _number,
    Global("torch", "Size"): lambda sizes: _of_type(tuple, sizes),
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
}

_STORAGES = {
    Global("torch", "BFloat16Storage"): torch.bfloat16,
    Global("torch", "BoolStorage"): torch.bool,
    Global("torch", "ByteStorage"): torch.uint8,
    Global("torch", "CharStorage"): torch.int8,
    Global("torch", "DoubleStorage"): torch.float64,
    Global("torch", "FloatStorage"): torch.float32,
    Global("torch", "HalfStorage"): torch.float16,
    Global("torch", "IntStorage"): torch.int32,
    Global("torch", "LongStorage"): torch.int64,
    Global("torch", "ShortStorage"): torch.int16,
}

_OTHERS = {
    _NESTED,
    Global("argparse", "Namespace"),
    Global("numpy", "dtype"),
    Global("numpy", "ndarray"),
    Global("numpy.core.multiarray", "_reconstruct"),
    Global("numpy._core.multiarray", "_reconstruct"),
    Global("pathlib", "PosixPath"),
    Global("torch", "device"),
    *(Global("torch", str(dtype).removeprefix("torch.")) for dtype in _STORAGES.values()),
}
"""What becomes a `Record` when called."""

_MODULES = ("networks.", "training.", "torch_utils.", "torch.nn.modules.", "R3GAN.")
"""What becomes a `Record` too: networks that came without their source."""


def _known(function: Global) -> Global:
    if len(function.module) + len(function.name) > _LONGEST_NAME:
        raise CheckpointError("it refers to something by a very long name")
    known = function in _CALLS or function in _STORAGES or function in _OTHERS
    if function.module.startswith("dnnlib.tflib"):
        raise CheckpointError("it is of the TensorFlow release; the PyTorch releases convert those")
    if not known and not f"{function.module}.".startswith(_MODULES):
        raise CheckpointError(
            f"it refers to {function}, which no checkpoint of networks needs; it may be malicious"
        )
    return function
