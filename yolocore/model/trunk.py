"""The trunk of a stack: first layers that are frozen, so that slots of equal weights can share one copy of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Trunk:
    """Layers 0 to `layers` - 1 of a stack, of which there is one copy per cohort of slots."""

    layers: int
    """How many layers, from the first; 0 is no trunk."""
    cohorts: tuple[int, ...]
    """Per slot, which copy it uses; numbered in the order of the first slot that uses it."""

    @classmethod
    def none(cls, num_slots: int) -> Self:
        """No layer is shared."""
        return cls(0, tuple(range(num_slots)))

    @classmethod
    def of(cls, layers: int, state_dicts: Sequence[Mapping[str, Tensor]]) -> Self:
        """Slots whose tensors of these layers agree in every bit share a copy.

        Args:
            layers: How many layers, from the first.
            state_dicts: One per slot, under official names. Compares on their device, and waits for it.
        """
        if layers == 0:
            return cls.none(len(state_dicts))
        found: list[Mapping[str, Tensor]] = []
        cohorts: list[int] = []
        for state in state_dicts:
            known = (index for index, other in enumerate(found) if _same(layers, state, other))
            cohort = next(known, len(found))
            if cohort == len(found):
                found.append(state)
            cohorts.append(cohort)
        return cls(layers, tuple(cohorts))

    @property
    def copies(self) -> int:
        """G, how many copies there are."""
        return max(self.cohorts) + 1

    @property
    def first_slots(self) -> tuple[int, ...]:
        """Per copy, the first slot that uses it."""
        return tuple(self.cohorts.index(copy) for copy in range(self.copies))

    def holds(self, name: str) -> bool:
        """Whether the tensor with this official name is in the trunk."""
        return layer_of(name) < self.layers

    def select(self, slots: Sequence[int]) -> Self:
        """The trunk of a stack of some of the slots, in this order."""
        order = list(dict.fromkeys(self.cohorts[slot] for slot in slots))
        return type(self)(self.layers, tuple(order.index(self.cohorts[slot]) for slot in slots))


def layer_of(name: str) -> int:
    """The layer that an official name such as `model.3.conv.weight` belongs to."""
    return int(name.split(".", 2)[1])


def _same(layers: int, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    if one is other:
        return True
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items() if layer_of(name) < layers)
