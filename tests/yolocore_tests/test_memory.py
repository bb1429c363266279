"""What is known about memory."""

import pytest
import torch

from yolocore.memory import free_bytes, is_out_of_memory, peak_bytes

CPU = torch.device("cpu")


def test_is_out_of_memory_of_a_real_failure_is_told_from_others() -> None:
    with pytest.raises(RuntimeError) as too_much:
        torch.empty(2**50)
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)

    assert is_out_of_memory(too_much.value)
    assert not is_out_of_memory(other.value)


def test_free_and_peak_bytes_follow_what_this_process_takes() -> None:
    before, free = peak_bytes(CPU), free_bytes(CPU)
    taken = torch.ones(2**27, dtype=torch.uint8)
    assert free is not None
    assert free > taken.numel()
    assert peak_bytes(CPU) >= before
    assert peak_bytes(CPU) >= taken.numel()
