"""Checkpoints of our own, which a crash cannot tear; weights from anywhere, read without executing them."""

import math
import os
import secrets
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from yolocore.errors import WEIGHTS_SOURCE, CheckpointError, WeightsError
from yolocore.unpickle import read_pickled_weights

_SCALARS = (bool, int, float, str, type(None))


def save_atomic(path: Path, tree: object) -> None:
    """Write a checkpoint; after a crash at any moment `path` holds the old one or the new one, whole.

    Args:
        path: The file; its folder is made if it is missing.
        tree: Dicts, lists, tuples, tensors and plain scalars only. Tensors are stored for the CPU, each with its own
            numbers only, even if it is a view into a larger one.

    Raises:
        TypeError: if the tree holds anything else, which `load` would refuse; names where.
        CheckpointError: if the file cannot be written.
    """
    plain = _plain(tree, "tree")
    try:
        _write_atomic(path, lambda file: torch.save(plain, file))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(f"{path}: cannot be written ({_first_line(error)})") from error


def load(path: Path) -> Any:
    """Read a checkpoint that `save_atomic` wrote.

    Returns:
        The tree, with its tensors on the CPU. Nothing in the file is executed, and its checksums are verified.

    Raises:
        CheckpointError: if the file is missing or damaged, or holds anything but plain data and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
            if (entry := archive.testzip()) is not None:
                raise CheckpointError(f"{path}: damaged: checksum of {entry} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a damaged file makes the readers raise almost anything
        raise CheckpointError(f"{path}: damaged or not a checkpoint ({_first_line(error)})") from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a weights file without executing it.

    Args:
        path: A `.safetensors` file, a state dict saved by torch, or an official YOLOv5 v6/v7 checkpoint (its `ema` if
            it has one, else its `model`).

    Returns:
        Official names (`model.0.conv.weight`, ...) in the file's order; floating-point tensors as float32, on the CPU.

    Raises:
        WeightsError: if the file is missing or damaged, holds no weights, or names code that it does not need.
    """
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such weights file; {WEIGHTS_SOURCE}; allowed: the path of a .safetensors file, "
            "a state-dict .pt or an official YOLOv5 .pt"
        )
    if path.suffix != ".safetensors":
        return read_pickled_weights(path)
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged or not a safetensors file ({_first_line(error)})") from None
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def save_weights(path: Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict atomically, as `.safetensors` or as a `.pt` that `torch.load(weights_only=True)` reads.

    Args:
        path: The file; its suffix chooses the format.
        state_dict: Official names; stored on the CPU in the given types and order (safetensors sorts by itself).
        metadata: What safetensors keeps beside the tensors; a `.pt` has no place for it.

    Raises:
        WeightsError: if the suffix is another, or the file cannot be written.
    """
    if path.suffix not in (".safetensors", ".pt"):
        raise WeightsError(f"{path}: suffix '{path.suffix}' of a weights file; allowed: .safetensors, .pt")
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}

    def write(file: BinaryIO) -> None:
        if path.suffix == ".pt":
            torch.save(state, file)
        else:
            file.write(safetensors.torch.save(state, metadata={"format": "pt", **(metadata or {})}))

    try:
        _write_atomic(path, write)
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{path}: cannot be written ({_first_line(error)})") from error


def transfer(
    state: Mapping[str, Tensor], target_state: Mapping[str, Tensor], *, keep_anchors: bool = False
) -> tuple[dict[str, Tensor], int, int]:
    """Start a model from the weights of another, as a fine-tune does: what fits by name and shape is taken.

    Args:
        state: The weights to start from.
        target_state: The fresh weights of the model (of the wanted classes).
        keep_anchors: Keep the target's anchors: right where the user has chosen anchors.

    Returns:
        The merged state dict (the target's names, order and types; new tensors), how many tensors came from `state`,
        and how many there are.
    """
    merged: dict[str, Tensor] = {}
    transferred = 0
    for name, own in target_state.items():
        found = state.get(name)
        fits = found is not None and found.shape == own.shape and not (keep_anchors and "anchor" in name)
        merged[name] = found.detach().to(own).clone() if found is not None and fits else own.detach().clone()
        transferred += fits
    return merged, transferred, len(merged)


def _plain(node: object, where: str) -> object:
    """A copy of the tree that `load` can read, tensors detached, on the CPU and without foreign storage.

    Types must be exact: a NumPy float passes for a float, and is stored as a NumPy object that `load` refuses.
    """
    if isinstance(node, Tensor):
        return _compact(node)
    if type(node) in _SCALARS:
        return node
    if isinstance(node, Mapping):
        for key in node:
            if type(key) not in (str, int):
                raise TypeError(f"{where}: key {key!r} of type {type(key).__name__}; allowed: str, int")
        return {key: _plain(value, f"{where}[{key!r}]") for key, value in node.items()}
    if type(node) is list or type(node) is tuple:
        parts = [_plain(value, f"{where}[{index}]") for index, value in enumerate(node)]
        return parts if type(node) is list else tuple(parts)
    raise TypeError(f"{where}: {type(node).__name__}; allowed: dict, list, tuple, Tensor, bool, int, float, str, None")


def _compact(tensor: Tensor) -> Tensor:
    """The tensor on the CPU with a storage of its own size: a view would be stored with everything it looks into."""
    own = tensor.detach().cpu()
    size = math.prod(own.shape) * own.element_size()
    return own if own.untyped_storage().nbytes() == size else own.clone()


def _write_atomic(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a new file beside `path`, make it durable, and put it in the place of `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Windows cannot open folders and needs no such step."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
