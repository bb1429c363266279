"""The compiled training pass: the same curves, and hosts that cannot compile say so."""

from pathlib import Path

import pytest
import torch
from pack_cases import HYPS, config, make_pack, make_slots, train_epoch

from yolocore.errors import DeviceError, InputError
from yolocore.training.compiled import compiled, require_compiler
from yolocore.training.config import CompilerName


def test_compiled_none_is_the_model_itself() -> None:
    model = make_pack(make_slots(HYPS[:1])).model

    assert compiled(model, "none") is model


@pytest.mark.slow
@pytest.mark.parametrize("how", ["inductor", "cudagraphs"])  # on the CPU torch leaves the graphs out
def test_pack_compiled_has_the_curve_of_the_eager_one_also_after_a_slot_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: CompilerName
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    eager, pack = make_pack(make_slots(HYPS[:2])), make_pack(make_slots(HYPS[:2]), compile=how)
    torch._dynamo.utils.counters.clear()

    for _ in range(2):
        for one, other in zip(train_epoch(eager), train_epoch(pack), strict=True):
            torch.testing.assert_close(other.total, one.total, rtol=0, atol=1e-9)
        eager.reshape(drop=[len(eager.keys) - 1] if len(eager.keys) > 1 else [])
        pack.reshape(drop=[len(pack.keys) - 1] if len(pack.keys) > 1 else [])

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # it did compile, once for each number of slots


def test_require_compiler_graphs_need_a_cuda_device() -> None:
    require_compiler("cudagraphs", "cuda")
    with pytest.raises(DeviceError, match="compile 'cudagraphs' on cpu: allowed: none, inductor"):
        require_compiler("cudagraphs", "cpu")


def test_require_compiler_host_without_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    require_compiler("none", "cpu")
    with pytest.raises(DeviceError, match=r"compile 'inductor': no (g|clang)\+\+ here; allowed: none"):
        require_compiler("inductor", "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": "jit"}, "compile: 'jit' is not allowed: one of none, inductor, cudagraphs is"),
        ({"compile": "inductor", "multi_scale": True}, "compile: not possible with multi_scale or rect"),
        ({"compile": "cudagraphs", "rect": True}, "compile: not possible with multi_scale or rect"),
    ],
)
def test_train_config_compile_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**changes)
