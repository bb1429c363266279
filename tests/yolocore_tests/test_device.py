"""Device and precision words."""

from pathlib import Path

import pytest
import torch

from yolocore.device import (
    autocast,
    available_devices,
    images_as_input,
    input_dtype,
    resolve_device,
    resolve_precision,
    supported_precisions,
)
from yolocore.errors import DeviceError
from yolocore.model import YOLOv5

CPU = torch.device("cpu")


def test_resolve_device_auto_takes_an_accelerator_if_there_is_one() -> None:
    if torch.cuda.is_available():
        assert resolve_device("auto") == torch.device("cuda", 0)
    elif torch.backends.mps.is_available():
        assert resolve_device("auto") == torch.device("mps")
    else:
        assert resolve_device("auto") == CPU
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cuda:", "", "CPU", "0"])
def test_resolve_device_that_is_not_there_names_what_is(name: str) -> None:
    with pytest.raises(DeviceError) as caught:
        resolve_device(name)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"device '{name}': not on this machine; allowed: auto, cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_resolve_device_cuda_without_cuda_is_refused() -> None:
    with pytest.raises(DeviceError, match="device 'cuda': not on this machine"):
        resolve_device("cuda")


def test_resolve_precision_auto_on_cpu_follows_the_instructions() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no /proc/cpuinfo on this system")
    flags = cpuinfo.read_text().split()
    native = "avx512_bf16" in flags or "amx_bf16" in flags
    assert resolve_precision("auto", CPU) == ("bf16" if native else "fp32")


def test_resolve_precision_fp16_on_cpu_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(DeviceError, match=r"^precision 'fp16' on cpu: allowed: auto, bf16, fp32$"):
        resolve_precision("fp16", CPU)
    with pytest.raises(DeviceError, match="precision 'half'"):
        resolve_precision("half", CPU)
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"


def test_supported_precisions_every_device_has_fp32() -> None:
    for name in available_devices():
        assert "fp32" in supported_precisions(resolve_device(name))
    assert supported_precisions(torch.device("mps"))[0] == "fp32"


def test_autocast_gives_the_named_precision() -> None:
    model, images = YOLOv5("n", 3, 2).eval(), torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        with autocast(CPU, "fp32"):
            assert {o.dtype for o in model(images)} == {torch.float32}
        with autocast(CPU, "bf16"):
            assert {o.dtype for o in model(images)} == {torch.bfloat16}
        assert {o.dtype for o in model(images)} == {torch.float32}


def test_images_as_input_bf16_equals_rounded_float32_division() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    expected = images.float() / 255
    assert torch.equal(images_as_input(images, torch.float32), expected)
    assert torch.equal(images_as_input(images, torch.bfloat16), expected.bfloat16())
    assert images_as_input(images, torch.float32).is_contiguous(memory_format=torch.channels_last)
    assert images_as_input(images, torch.float64).is_contiguous()


def test_input_dtype_is_autocasts_on_the_cpu_alone() -> None:
    assert input_dtype(torch.device("cpu"), "bf16", torch.float32) == torch.bfloat16
    assert input_dtype(torch.device("cpu"), "fp32", torch.float64) == torch.float64
    assert input_dtype(torch.device("cuda:0"), "fp16", torch.float32) == torch.float32
