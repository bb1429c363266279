"""Runs a training step on a fake `cuda` device and raises where a real one would have to wait, copy or reshape.

Fake tensors alone raise for data-dependent shapes, `.item()` and mixed devices, but let `.cpu()` pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS_FOR_DEVICE = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
)
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class DeviceGuardError(AssertionError):
    """An operation that a training step must not contain."""


class DeviceGuard(TorchDispatchMode):
    """Forbids every operation that copies between devices or makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        name = func.overloadpacket.__name__
        if name in WAITS_FOR_DEVICE:
            raise DeviceGuardError(f"{func} waits for the device")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in INDEXING and any(_is_mask(leaf) for leaf in tree_leaves(args[1])):
            raise DeviceGuardError(f"{func} with a mask has a data-dependent shape")
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if inputs and len({leaf.device for leaf in inputs + outputs}) > 1:
            raise DeviceGuardError(f"{func} crosses devices: {sorted({str(leaf.device) for leaf in inputs + outputs})}")
        return result


def _is_mask(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8)


def backward(loss: Tensor) -> int:
    """`loss.backward()` for fake tensors of a device that this machine lacks; returns the number of nodes run.

    The autograd engine asks the CUDA runtime for the current streams, which fails without a GPU. So this walks the
    graph itself, calling the same derivative formulas, and stores the gradients in the leaves.
    """
    assert loss.grad_fn is not None
    order = _topological_order(loss.grad_fn)
    pending: dict[Any, list[Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    for node in order:
        gradients = pending.pop(node, None)
        if gradients is None:
            continue
        for (target, slot), gradient in zip(node.next_functions, _as_tuple(_call(node, gradients)), strict=False):
            if target is not None and gradient is not None:
                _accumulate(pending.setdefault(target, []), slot, gradient)
    return len(order)


def _call(node: Any, gradients: list[Tensor | None]) -> Any:
    if hasattr(node, "variable"):
        leaf = node.variable
        leaf.grad = gradients[0] if leaf.grad is None else leaf.grad + gradients[0]
        return ()
    with torch.no_grad():
        return node(*gradients) if callable(node) else node.apply(*gradients)  # the latter: a torch.autograd.Function


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _accumulate(slots: list[Tensor | None], slot: int, gradient: Tensor) -> None:
    slots.extend([None] * (slot + 1 - len(slots)))
    held = slots[slot]
    slots[slot] = gradient if held is None else held + gradient


def _topological_order(root: Any) -> list[Any]:
    """The nodes of the graph, every node before those it passes gradients to."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((target, False) for target, _ in node.next_functions if target is not None)
    return order[::-1]


def run_guarded(build: Callable[[], Any], step: Callable[[Any], Any]) -> DeviceGuard:
    """Run `step(build())` on fake tensors, the step under the guard; no GPU is needed for tensors on `cuda`.

    `build` makes model and batch, and may copy. `step` raises DeviceGuardError or torch's own error where it breaks
    the rules.
    """
    with FakeTensorMode():
        made = build()
        with DeviceGuard() as guard:
            step(made)
    return guard
