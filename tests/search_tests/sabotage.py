"""A real trainer in which one chosen trial does something fatal in every epoch that it is trained."""

import ctypes
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from search.worker import trainer_process
from search.worker.trainer_process import TrainerSettings
from yolocore.training.capacity import Capacity
from yolocore.training.trainer import EpochReport, PackTrainer

ROOM_BYTES = 64 << 20
"""What is left to a process whose memory is limited, and a quarter of what it asks for then."""


@dataclass(frozen=True)
class Sabotage:
    """Which trial, how it ends its trainer, and where the moments are noted."""

    key: str
    how: str
    log: Path

    def strike(self, trainer: PackTrainer) -> None:
        with self.log.open("a") as log:
            log.write(f"{time.time()}\n")
        METHODS[self.how](trainer, self.key)

    def moments(self) -> list[float]:
        """UTC epoch seconds."""
        return [float(line) for line in self.log.read_text().split()]


def _segfault(_trainer: PackTrainer, _key: str) -> None:
    ctypes.string_at(0)


def _exit_139(_trainer: PackTrainer, _key: str) -> None:
    os._exit(139)


def _cuda_memory(_trainer: PackTrainer, _key: str) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def _host_memory(_trainer: PackTrainer, _key: str) -> None:
    """The kernel refuses more memory, and torch's allocator reports it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, resource.RLIM_INFINITY))
    torch.empty(4 * ROOM_BYTES, dtype=torch.uint8)


def _not_a_number(trainer: PackTrainer, key: str) -> None:
    (lane,) = (lane for lane in trainer._pack.lanes if key in lane.keys)
    slot = lane.keys.index(key)
    for tensor in lane.model.official_tensors().values():
        if tensor.is_floating_point():
            tensor[slot].fill_(math.nan)


def _hang(_trainer: PackTrainer, _key: str) -> None:
    time.sleep(10_000)


METHODS: dict[str, Callable[[PackTrainer, str], None]] = {
    "segfault": _segfault,
    "exit-139": _exit_139,
    "cuda-memory": _cuda_memory,
    "host-memory": _host_memory,
    "nan": _not_a_number,
    "hang": _hang,
}


def main(sabotage: Sabotage, connection: Connection, settings: TrainerSettings) -> None:
    """Entry point of the trainer process, instead of the product's."""

    class Sabotaged(PackTrainer):
        def run_epoch(self) -> list[EpochReport]:
            if sabotage.key in self.active:
                sabotage.strike(self)
            return super().run_epoch()

    trainer_process.PackTrainer = Sabotaged  # type: ignore[misc]
    trainer_process.main(connection, settings)


def spoil_the_device(connection: Connection, settings: TrainerSettings) -> None:
    """Entry point of the trainer process: a measurement of packs leaves the device as an illegal access leaves CUDA."""
    text = "CUDA error: an illegal memory access was encountered"

    def measure(*_arguments: object) -> Iterator[Capacity]:
        def fail(*_arguments: object, **_options: object) -> None:
            raise RuntimeError(text)

        trainer_process.PackTrainer = fail  # type: ignore[assignment, misc]
        yield Capacity(1, 10.0, 0)
        raise RuntimeError(text)

    trainer_process.measure_capacity = measure
    trainer_process.main(connection, settings)
