"""Tensors out of foreign `.pt` files (YOLOv5 checkpoints, state dicts) without running anything that they name.

A `.pt` file is a zip with a pickle, a program for a small machine that may call whatever it names. Here the machine
gets names from one list only, and each stands for an inert record of this module: no torch object, no foreign class and
no function of the standard library exists while the pickle runs. Tensors are built afterwards from checked records.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from yolocore.errors import WeightsError

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
            raise _RefusedError(f"it names '{module}.{name}'") from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _location, count = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise _RefusedError(f"it names a persistent object {kind!r}")
        return _Storage(str(key), storage_type.dtype, count)


class _Archive:
    """The zip behind a `.pt` file: one folder with `data.pkl` and `data/<key>` per storage."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._zip = archive
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
        return self._zip.read(info)

    def unpickle(self) -> object:
        """The tree of records behind the pickle."""
        return _Unpickler(io.BytesIO(self.read("data.pkl"))).load()

    def tensor(self, record: _TensorRecord, name: str) -> Tensor:
        """Build the tensor of a record: float32 if it is floating point, else its own type."""
        storage, offset, size, stride = record
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in (storage.numel, *numbers)):
            raise ValueError(f"tensor '{name}' is malformed")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) > storage.numel or (math.prod(size) and last >= storage.numel):
            raise ValueError(f"tensor '{name}' reaches beyond its storage")
        data = self.read(f"data/{storage.key}")
        if len(data) != storage.numel * storage.dtype.itemsize:
            raise ValueError(f"tensor '{name}' has {len(data)} bytes of {storage.numel} numbers")
        if not math.prod(size):
            return torch.empty(size, dtype=_target_dtype(storage.dtype))
        flat = torch.frombuffer(bytearray(data), dtype=storage.dtype)
        return flat.as_strided(size, stride, offset).to(_target_dtype(storage.dtype)).clone()


def _target_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def _module_records(module: _Module, prefix: str = "") -> dict[str, _TensorRecord]:
    """The state dict of a module bag: parameters, buffers, then children, names joined by dots."""
    state = module.state
    if not isinstance(state, dict):
        raise ValueError(f"module '{prefix}' has no state")
    transient = state.get("_non_persistent_buffers_set", set())
    records: dict[str, _TensorRecord] = {}
    for part in ("_parameters", "_buffers"):
        for name, value in state.get(part, {}).items():
            if isinstance(value, _TensorRecord) and name not in transient:
                records[f"{prefix}{name}"] = value
    for name, child in state.get("_modules", {}).items():
        if isinstance(child, _Module):
            records |= _module_records(child, f"{prefix}{name}.")
    return records


def _weight_records(tree: object) -> dict[str, _TensorRecord]:
    """The tensors of a checkpoint dict (its `ema`, else its `model`), a module or a state dict."""
    if isinstance(tree, dict) and ("model" in tree or "ema" in tree):
        tree = tree["ema"] if tree.get("ema") is not None else tree.get("model")
    if isinstance(tree, _Module):
        records = _module_records(tree)
    elif isinstance(tree, dict) and all(isinstance(value, _TensorRecord) for value in tree.values()):
        records = dict(tree)
    else:
        raise ValueError("neither a YOLOv5 checkpoint nor a state dict")
    # Files of v5.0 and before also carry the anchors as pixels.
    return {name: record for name, record in records.items() if not name.endswith(".anchor_grid")}


def _read(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        reader = _Archive(archive)
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: damaged or not a weights file ({reason})") from None
