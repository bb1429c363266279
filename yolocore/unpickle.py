"""Tensors out of foreign `.pt` files (YOLOv5 checkpoints, state dicts) without running anything that they name.

A `.pt` file is a zip with a pickle, a program for a small machine that may call whatever it names. Here the machine
gets names from one list only, and each stands for an inert record of this module: no torch object, no foreign class and
no function of the standard library exists while the pickle runs. Tensors are built afterwards from checked records.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from yolocore.errors import WeightsError
from yolocore.text import one_line

_STORAGE_DTYPES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_MODULE_CLASSES: Mapping[str, tuple[str, ...]] = {
    "torch.nn.modules.container": ("Sequential", "ModuleList"),
    "torch.nn.modules.conv": ("Conv2d",),
    "torch.nn.modules.batchnorm": ("BatchNorm2d",),
    "torch.nn.modules.activation": ("SiLU", "LeakyReLU", "Hardswish"),
    "torch.nn.modules.pooling": ("MaxPool2d",),
    "torch.nn.modules.upsampling": ("Upsample",),
    "models.yolo": ("Detect", "DetectionModel", "Model"),
    "models.common": ("Conv", "C3", "Bottleneck", "SPPF", "Concat", "SPP", "Focus", "BottleneckCSP"),
}
_VALUE_CLASSES: Mapping[str, tuple[str, ...]] = {  # training bookkeeping of files that were not stripped
    "torch": ("Size", "device"),
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "_codecs": ("encode",),
    "pathlib": ("PosixPath", "WindowsPath"),
}
# What a small file may ask of memory and time. The largest YOLOv5 has fewer than 1000 tensors, and in its
# modules 5000 entries.
_MOST_TENSORS, _MOST_ENTRIES = 20_000, 200_000
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 500
_MOST_SHARING = 8
"""Bytes of all tensors per byte of the file: float16 becomes float32, and models share a few tensors."""
_SMALLEST = 2**20
_LARGEST_VALUE = 10_000
"""Parts of a tuple, or of the arguments of a call, written out; those of a tensor are about 20."""
_HASHED_WHOLE = frozenset(
    ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "BINPERSID")
)
_SHOWN = 200


class _StorageType(NamedTuple):
    """Stands for `torch.FloatStorage` and its like."""

    dtype: torch.dtype


class _Storage(NamedTuple):
    """Numbers in the zip: the entry's key, their type and how many there are."""

    key: str
    dtype: torch.dtype
    numel: int


class _TensorRecord(NamedTuple):
    """A tensor as the pickle describes it; every field is unchecked."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


class _RefusedError(Exception):
    """The pickle wants something that is not on the list; the message says what."""


class _Bag:
    """Stands for an object of a foreign class: keeps the state that it was pickled with and does nothing."""

    __slots__ = ("state",)
    state: object

    def __new__(cls, *_args: object) -> Self:
        bag = super().__new__(cls)
        bag.state = None
        return bag

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Value(_Bag):
    """Stands for a value that nobody needs (NumPy scalars, paths); takes any arguments and drops them."""

    __slots__ = ()


class _Module(_Bag):
    """Stands for a `torch.nn.Module`, which pickles as class and state and is never called with arguments."""

    __slots__ = ()
    origin: ClassVar[str]

    def __new__(cls, *args: object) -> Self:
        if args:
            raise _RefusedError(f"it calls '{cls.origin}'")
        return super().__new__(cls)


def _module_class(origin: str) -> type[_Module]:
    """A bag class for the modules of one foreign class."""
    return type("_Module", (_Module,), {"__slots__": (), "origin": origin})


class _Dict(OrderedDict[Any, Any]):
    """An OrderedDict that ignores the attributes a pickle wants to give it."""

    def __setstate__(self, state: object) -> None:
        """Drop the state (`_metadata` of a state dict)."""


class _RebuildTensor:
    """Stands for `torch._utils._rebuild_tensor_v2`."""

    __slots__ = ()

    def __call__(self, storage: object, offset: object, size: object, stride: object, *_rest: object) -> _TensorRecord:
        return _TensorRecord(storage, offset, size, stride)


class _RebuildParameter:
    """Stands for `torch._utils._rebuild_parameter`."""

    __slots__ = ()

    def __call__(self, data: object, *_rest: object) -> object:
        return data


def _allowed_globals() -> dict[tuple[str, str], Any]:
    """What each allowed (module, name) stands for."""
    allowed: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): _Dict,
        ("builtins", "set"): set,
        ("__builtin__", "set"): set,
        ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
        ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    }
    allowed |= {("torch", name): _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()}
    for module, names in _MODULE_CLASSES.items():
        allowed |= {(module, name): _module_class(f"{module}.{name}") for name in names}
    allowed |= {(module, name): _Value for module, names in _VALUE_CLASSES.items() for name in names}
    return allowed


_ALLOWED = _allowed_globals()


class _Unpickler(pickle.Unpickler):
    """A pickle machine that knows the names of `_ALLOWED` only."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _RefusedError(f"it names '{_shown(f'{module}.{name}')}'") from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _location, count = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            # Only text is shown: a nest of shared tuples has no end when it is written out.
            named = f" '{_shown(kind)}'" if isinstance(kind, str) else ""
            raise _RefusedError(f"it names a persistent object{named}")
        return _Storage(key, storage_type.dtype, count)


def _shown(text: str) -> str:
    """Text of a foreign file for a message: one line, no terminal codes, not too long."""
    line = one_line(text[: _SHOWN + 1])
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


class _DryRun:
    """Goes through a pickle without making anything, and refuses what would take memory or time without end.

    Two things do. The machine reserves a table as long as the largest memo number; a pickler counts its entries, and
    each takes more than a byte. And the hash of a tuple goes through all that is in it: a pair of the pair before,
    forty times, is a thousand bytes of pickle and weeks of hashing as the key of a dict. So the size of every value is
    followed, written out as if nothing were shared.
    """

    def __init__(self, program: bytes) -> None:
        self._program = program
        self._stack: list[int | None] = []
        """Sizes; None is a mark."""
        self._memo: dict[int, int | None] = {}

    def check(self) -> None:
        """Go through all of it."""
        argument: Any
        for opcode, argument, _ in pickletools.genops(self._program):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                self._put(len(self._memo) if argument is None else argument)
            elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[argument])
            elif opcode.name == "DUP":
                self._stack.append(self._stack[-1])
            elif opcode.name == "MARK":
                self._stack.append(None)
            else:
                self._step(opcode)

    def _put(self, number: int) -> None:
        if not 0 <= number < len(self._program):
            raise ValueError(f"memo entry {number} in a pickle of {len(self._program)} bytes")
        self._memo[number] = self._stack[-1]

    def _step(self, opcode: pickletools.OpcodeInfo) -> None:
        """Take from the stack what an opcode takes, and put there what it leaves."""
        popped: list[int] = []
        below_mark = len(opcode.stack_before)
        if pickletools.markobject in opcode.stack_before:
            popped = self._pop_to_mark()
            below_mark = opcode.stack_before.index(pickletools.markobject)
        popped += [self._stack.pop() or 0 for _ in range(below_mark)]  # POP may take a mark
        if opcode.stack_after:
            self._stack.append(self._size(opcode.name, popped))

    def _pop_to_mark(self) -> list[int]:
        popped: list[int] = []
        while (size := self._stack.pop()) is not None:
            popped.append(size)
        return popped

    @staticmethod
    def _size(name: str, popped: list[int]) -> int:
        if name == "BUILD":
            return popped[-1]  # the object, whose state is no part of its hash
        size = 1 + sum(popped) if name in _HASHED_WHOLE else 1
        if size > _LARGEST_VALUE:
            raise ValueError(f"a value of more than {_LARGEST_VALUE} parts")
        return size


class _Archive:
    """The zip behind a `.pt` file: one folder with `data.pkl` and `data/<key>` per storage."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._zip = archive
        self._unread = size
        self._unbuilt = _MOST_SHARING * max(size, _SMALLEST)
        self._storages: dict[str, bytearray] = {}
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("no data.pkl in it")
        self._folder = pickles[0].removesuffix("data.pkl")
        if f"{self._folder}byteorder" in archive.namelist() and self.read("byteorder") != b"little":
            raise ValueError("written on a big-endian machine")

    def read(self, name: str) -> bytes:
        """The bytes of an entry. torch stores without compression: anything else could be a zip bomb."""
        info = self._zip.getinfo(self._folder + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"entry {name} is compressed")
        self._unread -= info.file_size
        if self._unread < 0:
            raise ValueError("its entries together are longer than the file")
        return self._zip.read(info)

    def unpickle(self) -> object:
        """The tree of records behind the pickle."""
        program = self.read("data.pkl")
        _DryRun(program).check()
        return _Unpickler(io.BytesIO(program)).load()

    def _storage(self, key: str) -> bytearray:
        """The bytes of a storage, read once however many tensors look into it."""
        if key not in self._storages:
            self._storages[key] = bytearray(self.read(f"data/{key}"))
        return self._storages[key]

    def tensor(self, record: _TensorRecord, name: str) -> Tensor:
        """Build the tensor of a record: float32 if it is floating point, else its own type."""
        storage, offset, size, stride = record
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or len(size) > _MOST_DIMENSIONS:
            raise ValueError(f"tensor '{name}' is malformed")
        if any(type(n) is not int or not 0 <= n < 2**63 for n in (storage.numel, *numbers)):
            raise ValueError(f"tensor '{name}' is malformed")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) > storage.numel or (math.prod(size) and last >= storage.numel):
            raise ValueError(f"tensor '{name}' reaches beyond its storage")
        self._unbuilt -= math.prod(size) * _target_dtype(storage.dtype).itemsize
        if self._unbuilt < 0:
            raise ValueError("its tensors together are many times larger than the file")
        data = self._storage(storage.key)
        if len(data) != storage.numel * storage.dtype.itemsize:
            raise ValueError(f"tensor '{name}' has {len(data)} bytes of {storage.numel} numbers")
        if not math.prod(size):
            return torch.empty(size, dtype=_target_dtype(storage.dtype))
        flat = torch.frombuffer(data, dtype=storage.dtype)
        return flat.as_strided(size, stride, offset).to(_target_dtype(storage.dtype)).clone()


def _target_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


class _ModuleReader:
    """Collects the state dict of a module bag: parameters, buffers, then children, names joined by dots.

    Modules may be shared, as YOLOv5 shares one activation, so that few of them can stand for a tree without end.
    """

    def __init__(self) -> None:
        self.records: dict[str, _TensorRecord] = {}
        self._path: list[_Module] = []
        self._entries = 0

    def add(self, module: _Module, prefix: str = "") -> None:
        """Take in a module and what is below it."""
        if any(module is above for above in self._path):
            raise ValueError(f"module '{prefix}' is inside itself")
        if len(prefix) > _LONGEST_NAME:
            raise ValueError(f"modules so deep that a name has more than {_LONGEST_NAME} letters")
        if not isinstance(module.state, dict):
            raise ValueError(f"module '{prefix}' has no state")
        parameters, buffers, children = (
            self._part(module.state, f"_{p}") for p in ("parameters", "buffers", "modules")
        )
        transient = module.state.get("_non_persistent_buffers_set")
        left_out = transient if isinstance(transient, set) else set()
        for name, value in (*parameters.items(), *buffers.items()):
            if isinstance(value, _TensorRecord) and name not in left_out:
                self.records[f"{prefix}{_checked_name(name)}"] = value
        self._path.append(module)
        for name, child in children.items():
            if isinstance(child, _Module):
                self.add(child, f"{prefix}{_checked_name(name)}.")
        self._path.pop()

    def _part(self, state: dict[Any, Any], name: str) -> dict[Any, Any]:
        part = state.get(name, {})
        if not isinstance(part, dict):
            raise ValueError(f"{name} of a module is a {type(part).__name__}")
        self._entries += 1 + len(part)
        if self._entries > _MOST_ENTRIES:
            raise ValueError(f"more than {_MOST_ENTRIES} entries in its modules")
        return part


def _checked_name(name: object) -> str:
    if not isinstance(name, str):
        shown = f" {name}" if type(name) is int else ""
        raise ValueError(f"the key{shown} of type {type(name).__name__} is no name of a tensor; names are text")
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"a name of {len(name)} letters; at most {_LONGEST_NAME} are allowed")
    return name


def _weight_records(tree: object) -> dict[str, _TensorRecord]:
    """The tensors of a checkpoint dict (its `ema`, else its `model`), a module or a state dict."""
    if isinstance(tree, dict) and ("model" in tree or "ema" in tree):
        tree = tree["ema"] if tree.get("ema") is not None else tree.get("model")
    if isinstance(tree, _Module):
        reader = _ModuleReader()
        reader.add(tree)
        records = reader.records
    elif isinstance(tree, dict) and all(isinstance(value, _TensorRecord) for value in tree.values()):
        records = {_checked_name(name): record for name, record in tree.items()}
    else:
        raise ValueError("neither a YOLOv5 checkpoint nor a state dict")
    if len(records) > _MOST_TENSORS:
        raise ValueError(f"{len(records)} tensors; at most {_MOST_TENSORS} are allowed")
    # Files of v5.0 and before also carry the anchors as pixels.
    return {name: record for name, record in records.items() if not name.endswith(".anchor_grid")}


def _read(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        reader = _Archive(archive, path.stat().st_size)
        return {name: reader.tensor(record, name) for name, record in _weight_records(reader.unpickle()).items()}


def read_pickled_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a zip-format `.pt` file of YOLOv5 v6/v7 or with a plain state dict.

    Args:
        path: The file.

    Returns:
        Official names in the file's order; floating-point tensors as float32, on the CPU.

    Raises:
        WeightsError: if the file is damaged, holds no weights, or names anything that such files do not need.
    """
    try:
        return _read(path)
    except _RefusedError as error:
        raise WeightsError(f"{path}: refused: {error}, which a YOLOv5 weights file does not need") from None
    except zipfile.BadZipFile:
        raise WeightsError(f"{path}: not a weights file: allowed: .safetensors, zip-format .pt of torch") from None
    except Exception as error:  # a damaged pickle makes its machine raise almost anything
        reason = _shown(str(error)) if str(error) else type(error).__name__
        raise WeightsError(f"{path}: damaged or not a weights file ({reason})") from None
