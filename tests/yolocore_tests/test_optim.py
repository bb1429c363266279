import json
from pathlib import Path

import numpy as np
import pytest
import torch

from yolocore.hyperparameters import Hyperparameters
from yolocore.model import YOLOv5, initial_state
from yolocore.training.config import OptimizerName
from yolocore.training.optim import (
    Clock,
    EarlyStopping,
    PackEMA,
    PackOptimizer,
    Schedule,
    StepTable,
    ema_decay,
    initial_accumulate,
    parameter_group,
    row_norms,
    scaled_weight_decay,
)

CASES = ("linear", "cosine", "linear_bs64_resume_free", "bs128")


@pytest.fixture(scope="module")
def schedules(small_golden_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(small_golden_dir / "schedules.npz"))


def make_schedule(folder: Path, case: str) -> tuple[Schedule, int]:
    entry = json.loads((folder / "schedules.json").read_text())[case]
    schedule = Schedule(
        hyperparameters=Hyperparameters().replace(**entry["hyp"]),
        epochs=entry["epochs"],
        batches_per_epoch=entry["batches_per_epoch"],
        batch_size=entry["batch_size"],
        cosine=entry["cos_lr"],
    )
    assert schedule.warmup_iterations == entry["warmup_iterations"]
    return schedule, entry["epochs"] * entry["batches_per_epoch"]


@pytest.mark.parametrize("case", CASES)
def test_schedule_whole_run_matches_golden_rates(small_golden_dir, schedules, case) -> None:
    schedule, iterations = make_schedule(small_golden_dir, case)
    rates = [schedule.at(i) for i in range(iterations)]
    np.testing.assert_allclose([r.lr for r in rates], schedules[f"{case}/lr"], rtol=0, atol=1e-12)
    np.testing.assert_allclose([[r.momentum] * 3 for r in rates], schedules[f"{case}/momentum"], rtol=0, atol=1e-12)
    np.testing.assert_array_equal([r.accumulate for r in rates], schedules[f"{case}/accumulate"])


@pytest.mark.parametrize("case", CASES)
def test_step_table_whole_run_matches_golden_steps(small_golden_dir, schedules, case) -> None:
    schedule, iterations = make_schedule(small_golden_dir, case)
    table = StepTable.make([schedule], [Clock()], iterations, torch.device("cpu"), torch.float64)
    stepped = schedules[f"{case}/stepped"]
    np.testing.assert_array_equal(np.array(table.stepped)[:, 0], stepped.astype(bool))
    np.testing.assert_array_equal(table.values[:, 0, 4].numpy(), stepped)
    assert table.clocks[0].updates == stepped.sum()


@pytest.mark.parametrize("case", CASES)
def test_schedule_last_batch_of_each_epoch_matches_golden_logged_lr(small_golden_dir, schedules, case) -> None:
    schedule, iterations = make_schedule(small_golden_dir, case)
    batches = schedule.batches_per_epoch
    logged = [schedule.at(i).lr for i in range(batches - 1, iterations, batches)]
    np.testing.assert_allclose(logged, schedules[f"{case}/lr_logged_at_epoch_end"], rtol=0, atol=1e-12)


def test_schedule_adam_keeps_the_momentum_during_warmup() -> None:
    schedule = Schedule(hyperparameters=Hyperparameters(), epochs=5, batches_per_epoch=40, batch_size=16, adaptive=True)
    assert [schedule.at(i).momentum for i in (0, 60, 120, 150)] == [0.937] * 4


def test_weight_decay_batch_sizes_match_golden_table(schedules) -> None:
    sizes = schedules["weight_decay_table/batch_size"].tolist()
    np.testing.assert_array_equal([initial_accumulate(b) for b in sizes], schedules["weight_decay_table/accumulate"])
    scaled = [scaled_weight_decay(5e-4, b) for b in sizes]
    np.testing.assert_allclose(scaled, schedules["weight_decay_table/scaled_5e-4"], rtol=1e-12)


def test_ema_decay_updates_match_golden(schedules) -> None:
    decays = [ema_decay(int(u)) for u in schedules["ema/updates"]]
    np.testing.assert_allclose(decays, schedules["ema/decay"], rtol=0, atol=1e-12)


def test_early_stopping_patience_6_matches_golden(schedules) -> None:
    stopper = EarlyStopping(6)
    rows = []
    for epoch, fitness in enumerate(schedules["early_stopping/fitness"]):
        stop = stopper.update(epoch, float(fitness))
        rows.append([stop, stopper.imminent(epoch), stopper.best_epoch, stopper.best])
    np.testing.assert_array_equal(rows, schedules["early_stopping/patience6_stop_possible_bestepoch_best"])


def test_early_stopping_without_patience_never_stops() -> None:
    stopper = EarlyStopping(0)
    assert not any(stopper.update(epoch, 0.0) for epoch in range(1000))


def tiny_pack(hyps: list[Hyperparameters], name: OptimizerName = "SGD") -> tuple[YOLOv5, PackOptimizer]:
    state = {k: v.double() if v.is_floating_point() else v for k, v in initial_state("n", 2, seed=3).items()}
    model = YOLOv5.stack("n", 2, [state] * len(hyps))
    return model, PackOptimizer(model, hyps, batch_size=64, name=name)


def set_gradients(model: YOLOv5, seed: int, scale: float = 1e-3) -> None:
    """The same gradients for every slot."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        view = model.per_slot(parameter)
        one = torch.randn(view.shape[1:], generator=generator, dtype=view.dtype) * scale
        parameter.grad = one.expand_as(view).reshape(parameter.shape).contiguous()


def rates_row(*rows: tuple[float, float]) -> torch.Tensor:
    """[K, 7] of (lr, momentum) per slot, everything else as in a step."""
    return torch.tensor([[lr, lr, lr, momentum, 1.0, 0.1, 0.0] for lr, momentum in rows], dtype=torch.float64)


def torch_groups(model: YOLOv5, hyp: Hyperparameters) -> list[dict]:
    groups: list[list] = [[], [], []]
    for name, parameter in model.named_parameters():
        groups[parameter_group(name)].append(parameter)
    return [{"params": g, "weight_decay": hyp.weight_decay if i == 1 else 0.0} for i, g in enumerate(groups)]


def test_parameter_group_yolov5n_has_60_60_57_tensors() -> None:
    names = [parameter_group(name) for name, _ in YOLOv5("n", 2).named_parameters()]
    assert [names.count(group) for group in range(3)] == [60, 60, 57]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_pack_optimizer_two_slots_match_torch_optimizers(name) -> None:
    hyps = [
        Hyperparameters(momentum=0.9, weight_decay=5e-4, lr0=0.01),
        Hyperparameters(momentum=0.6, weight_decay=0.02, lr0=0.1),
    ]
    model, optimizer = tiny_pack(hyps, name)
    one = torch.ones(2, dtype=torch.float64)
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.collect()
        optimizer.step(rates_row(*((h.lr0, h.momentum) for h in hyps)), one.bool(), one)
        optimizer.clear_stepped([True, True])
    for slot, hyp in enumerate(hyps):
        lone, _ = tiny_pack([hyp])
        groups = torch_groups(lone, hyp)
        if name == "SGD":
            reference = torch.optim.SGD(groups, lr=hyp.lr0, momentum=hyp.momentum, nesterov=True)
        else:
            reference = getattr(torch.optim, name)(groups, lr=hyp.lr0, betas=(hyp.momentum, 0.999))
        for seed in range(3):
            set_gradients(lone, seed)
            reference.step()
        for (key, expected), got in zip(lone.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(
                model.per_slot(got)[slot], expected, rtol=1e-12, atol=1e-14, msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_pack_optimizer_slot_that_stands_aside_keeps_every_bit(name) -> None:
    model, optimizer = tiny_pack([Hyperparameters()] * 2, name)
    ones = torch.ones(2, dtype=torch.float64)
    for seed in range(2):
        set_gradients(model, seed)
        optimizer.collect()
        optimizer.step(rates_row((0.01, 0.9), (0.01, 0.9)), ones.bool(), ones)
        optimizer.clear_stepped([True, True])
    before = optimizer.slot_state(1)
    weights = optimizer.flat.clone()
    set_gradients(model, 9)
    optimizer.collect()[1].fill_(float("nan"))
    optimizer.step(rates_row((0.01, 0.9), (0.01, 0.9)), torch.tensor([True, False]), torch.tensor([1.0, float("nan")]))
    after = optimizer.slot_state(1)
    assert torch.equal(optimizer.flat[1], weights[1])
    assert not torch.equal(optimizer.flat[0], weights[0])
    assert before["steps"] == after["steps"] == 2
    for key, buffer in before["buffers"].items():
        assert all(torch.equal(buffer[n], after["buffers"][key][n]) for n in buffer)


def test_pack_optimizer_zero_learning_rate_keeps_every_weight() -> None:
    model, optimizer = tiny_pack([Hyperparameters()])
    weights = optimizer.flat.clone()
    set_gradients(model, 0)
    optimizer.collect()
    optimizer.step(rates_row((0.0, 0.9)), torch.tensor([True]), torch.ones(1, dtype=torch.float64))
    assert torch.equal(optimizer.flat, weights)


def test_collect_slots_with_different_accumulation_sum_their_own_batches() -> None:
    model, optimizer = tiny_pack([Hyperparameters()] * 2)
    batches = []
    for seed in range(4):
        set_gradients(model, seed)
        batches.append(optimizer.collect()[0].clone())
        optimizer.clear_stepped([True, True])
    for seed, stepped in enumerate(([True, False], [True, False], [False, False], [True, True])):
        kept = [p.grad for p in model.parameters()]
        set_gradients(model, seed)
        for parameter, grad in zip(model.parameters(), kept, strict=True):
            if grad is not None:  # as a backward pass would
                parameter.grad += grad
        if any(stepped):
            sums = optimizer.collect().clone()
            optimizer.clear_stepped(stepped)
    torch.testing.assert_close(sums[0], batches[2] + batches[3])
    torch.testing.assert_close(sums[1], sum(batches))


def test_pack_ema_one_weight_matches_golden_trace(schedules) -> None:
    model, optimizer = tiny_pack([Hyperparameters()])
    weight, mean = model.official_tensors()["model.0.bn.bias"], model.official_tensors()["model.0.bn.running_mean"]
    optimizer.flat[:, 0] = 0.0  # model.0.bn.bias is the first tensor of the first group
    mean.zero_()
    ema = PackEMA(model, optimizer)
    trace = []
    for update, value in enumerate(schedules["ema/input"].tolist(), start=1):
        optimizer.flat[0, 0] = value
        mean[0, 0] = 2 * value
        share = torch.tensor([1 - ema_decay(update)], dtype=torch.float64)
        ema.update(share, torch.tensor([True]))
        weights = ema.slot_weights(0)
        trace.append([float(weights["model.0.bn.bias"][0]), float(weights["model.0.bn.running_mean"][0])])
    np.testing.assert_allclose(trace, schedules["ema/weight_runningmean_nbt"][:, :2], rtol=0, atol=1e-6)
    assert weight.shape == (1, 16)


def test_pack_ema_slot_with_nan_statistics_standing_aside_keeps_every_bit() -> None:
    model, optimizer = tiny_pack([Hyperparameters()] * 2)
    ema = PackEMA(model, optimizer)
    before = ema.flat.clone()
    model.official_tensors()["model.0.bn.running_mean"][1] = float("nan")
    optimizer.flat[0] += 1.0
    ema.update(torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([True, False]))
    assert torch.equal(ema.flat[1], before[1])
    assert torch.isfinite(ema.flat).all()
    assert not torch.equal(ema.flat[0], before[0])


def test_optimizer_slot_state_loaded_into_another_pack_continues_identically() -> None:
    model, optimizer = tiny_pack([Hyperparameters()] * 2)
    set_gradients(model, 1)
    optimizer.collect()
    ones = torch.ones(2, dtype=torch.float64)
    optimizer.step(rates_row((0.01, 0.9), (0.02, 0.5)), ones.bool(), ones)
    state = optimizer.slot_state(1)
    _, other = tiny_pack([Hyperparameters()])
    other.load_slot(0, state["buffers"], state["steps"])
    assert torch.equal(other.buffers["momentum"][0], optimizer.buffers["momentum"][1])
    assert float(other.steps) == 1


def test_row_norms_millions_of_float32_values_are_accurate() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(2, 1_767_976, generator=generator) * 1e-2
    exact = flat.double().norm(dim=1)
    assert float((row_norms(flat) / exact - 1).abs().max()) < 1e-6
    assert row_norms(torch.tensor([[3.0, 4.0]])).tolist() == [5.0]
