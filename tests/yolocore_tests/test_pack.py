"""The pack against the reference's training traces, and K slots against K lone runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from device_guard import backward, run_guarded
from fill_rule import fill_image, nano_state
from pack_cases import (
    BATCHES,
    CPU,
    EPOCHS,
    HYPS,
    SIZE,
    batches,
    config,
    curve,
    largest_gap,
    make_pack,
    make_slots,
    padded,
    train_epoch,
    widened,
)
from torch import Tensor

from yolocore.errors import TrainingError
from yolocore.hyperparameters import Hyperparameters
from yolocore.model import ANCHORS_KEY, YOLOv5, initial_state
from yolocore.model.trunk import Trunk
from yolocore.training.config import TrainConfig
from yolocore.training.optim import Clock
from yolocore.training.pack import Pack, PackSlot, fresh_state


def checksums(state: dict[str, Tensor], columns: Sequence[str]) -> list[float]:
    floating = [t.double() for t in state.values() if t.is_floating_point()]
    values = {"sum_all_float": sum(float(t.sum()) for t in floating)}
    values["abssum_all_float"] = sum(float(t.abs().sum()) for t in floating)
    row = []
    for column in columns:
        if column in values:
            row.append(values[column])
            continue
        name, what = column.rsplit(":", 1)
        flat = state[name].double().flatten()
        row.append(float({"sum": flat.sum(), "first": flat[0], "last": flat[-1]}[what]))
    return row


@dataclass
class Trace:
    """Our run of a golden trace, in the golden's columns."""

    total: list[float]
    items: list[list[float]]
    norm: list[float]
    stepped: list[bool]
    updates: list[int]
    model: list[list[float]]
    ema: list[list[float]]
    means: list[tuple[float, float, float]]
    pack: Pack


def run_trace(folder: Path, name: str, dtype: torch.dtype, iterations: int, every: int = 1) -> Trace:
    """Train the trace's first `iterations` batches; checksums after every `every`th."""
    about = json.loads((folder / f"{name}.json").read_text())
    golden, config, columns = np.load(folder / f"{name}.npz"), about["config"], about["checksum_columns"]
    size, batch, count = config["img"], config["bs"], config["nb"]
    settings = TrainConfig(
        model="n", data=Path("none"), image_size=size, batch_size=batch, epochs=config["epochs"], cos_lr=config["cos"]
    )
    slot = PackSlot("golden", Hyperparameters(**about["hyp"]), fresh_state(widened(nano_state(), dtype)))
    pack = Pack(settings, [slot], num_classes=config["nc"], batches_per_epoch=count, device=CPU)
    images = [
        torch.from_numpy(fill_image(f"{config['name']}-images-{j}", (batch, 3, size, size))) for j in range(count)
    ]
    targets = [padded(golden[f"targets_{j}"]) for j in range(count)]
    trace = Trace([], [], [], [], [], [], [], [], pack)
    updates = 0
    for iteration in range(iterations):
        j = iteration % count
        if j == 0:
            pack.begin_epoch()
        result = pack.train_step(images[j], targets[j])
        updates += result.stepped[0]
        trace.total.append(float(result.total[0]))
        trace.items.append(result.items[0].tolist())
        trace.norm.append(-1.0 if result.norm is None else float(result.norm[0]))
        trace.stepped.append(result.stepped[0])
        trace.updates.append(updates)
        if (iteration + 1) % every == 0:
            trace.model.append(checksums(pack.model.unstack(0), columns))
            trace.ema.append(checksums(pack.slot_weights(0), columns))
        if j == count - 1:
            trace.means.append(pack.end_epoch()[0].items)
    return trace


def check_rates(pack: Pack, golden: np.lib.npyio.NpzFile) -> None:
    rates = [pack.schedules[0].at(i) for i in range(len(golden["accumulate"]))]
    np.testing.assert_allclose([r.lr for r in rates], golden["f32_lr"], rtol=0, atol=1e-12)
    np.testing.assert_allclose([[r.momentum] * 3 for r in rates], golden["f32_mom"], rtol=0, atol=1e-12)
    np.testing.assert_array_equal([r.accumulate for r in rates], golden["accumulate"])


def test_pack_trace20_float64_matches_golden(small_golden_dir) -> None:
    golden = np.load(small_golden_dir / "train_trace20.npz")
    trace = run_trace(small_golden_dir, "train_trace20", torch.float64, 20)
    check_rates(trace.pack, golden)
    np.testing.assert_array_equal(trace.stepped, golden["f32_stepped"].astype(bool))
    np.testing.assert_array_equal(trace.updates, golden["f32_upd"])
    for ours, theirs in (("total", "total"), ("items", "items"), ("norm", "norm"), ("model", "m"), ("ema", "e")):
        np.testing.assert_allclose(getattr(trace, ours), golden[f"f64_{theirs}"], rtol=1e-9, atol=1e-9, err_msg=ours)
    np.testing.assert_allclose(trace.means, golden["f64_mloss"][4::5], rtol=0, atol=1e-9)
    finals = {"": trace.pack.model.unstack(0), "ema_": trace.pack.slot_weights(0)}
    for key in golden.files:
        if key.startswith("f64_final_") and "[" not in key:
            which = "ema_" if key.startswith("f64_final_ema_") else ""
            tensor = finals[which][key.removeprefix("f64_final_").removeprefix("ema_")]
            np.testing.assert_allclose(tensor.numpy(), golden[key], rtol=0, atol=1e-9, err_msg=key)


def test_pack_trace20_float32_stays_within_tolerance(small_golden_dir) -> None:
    golden = np.load(small_golden_dir / "train_trace20.npz")
    trace = run_trace(small_golden_dir, "train_trace20", torch.float32, 20, every=20)
    np.testing.assert_allclose(trace.total, golden["f32_total"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(trace.items, golden["f32_items"], rtol=0, atol=3e-4)
    np.testing.assert_array_equal(trace.stepped, golden["f32_stepped"].astype(bool))


def test_pack_trace120_float64_matches_golden(small_golden_dir) -> None:
    golden = np.load(small_golden_dir / "train_trace120_long.npz")
    trace = run_trace(small_golden_dir, "train_trace120_long", torch.float64, 120, every=12)
    check_rates(trace.pack, golden)
    np.testing.assert_array_equal(trace.stepped, golden["f32_stepped"].astype(bool))
    np.testing.assert_array_equal(trace.updates, golden["f32_upd"])
    for ours in ("total", "items", "norm"):
        np.testing.assert_allclose(getattr(trace, ours), golden[f"f64_{ours}"], rtol=1e-6, atol=1e-6, err_msg=ours)
    np.testing.assert_allclose(trace.model, golden["f64_m"][11::12], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(trace.ema, golden["f64_e"][11::12], rtol=1e-6, atol=1e-6)


def test_pack_trace120_float32_first_25_iterations_stay_within_tolerance(small_golden_dir) -> None:
    golden = np.load(small_golden_dir / "train_trace120_long.npz")
    trace = run_trace(small_golden_dir, "train_trace120_long", torch.float32, 25, every=25)
    np.testing.assert_allclose(trace.total, golden["f32_total"][:25], rtol=0, atol=1e-3)


# K slots against K lone runs


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_pack_four_slots_equal_four_lone_runs(dtype, atol) -> None:
    pack = make_pack(make_slots(HYPS, dtype))
    together = [result for _ in range(EPOCHS) for result in train_epoch(pack)]
    assert len(together) == 20
    for slot, hyp in enumerate(HYPS):
        lone = make_pack([PackSlot("lone", hyp, make_slots([hyp], dtype)[0].state)])
        alone = [result for _ in range(EPOCHS) for result in train_epoch(lone)]
        torch.testing.assert_close(curve(together, slot), curve(alone, 0), rtol=0, atol=atol)
        assert pack.clocks[slot] == lone.clocks[0]
        if dtype is torch.float64:
            assert largest_gap(pack.model.unstack(slot), lone.model.unstack(0)) < atol
            assert largest_gap(pack.slot_weights(slot), lone.slot_weights(0)) < atol


def test_pack_slots_with_staggered_clocks_equal_lone_runs_on_the_same_images() -> None:
    """A slot that joins later keeps its own warm-up, accumulation, gradients and average."""
    first = make_pack(make_slots(HYPS[:1]))
    train_epoch(first)
    late = PackSlot("late", HYPS[1], make_slots(HYPS[1:2])[0].state)
    # The older slot already accumulates over several batches, while the newcomer starts with one.
    old = first.slots()[0]
    old.state["clock"].update(iteration=15, last_step=5, updates=12)
    pack = make_pack([old, late], epochs=40)
    assert pack.epochs == (3, 0)
    together = [result for _ in range(3) for result in train_epoch(pack)]
    assert {result.stepped for result in together} == {(True, True), (True, False), (False, True), (False, False)}
    for slot, entry in enumerate((old, late)):
        lone = make_pack([entry], epochs=40)
        alone = [result for _ in range(3) for result in train_epoch(lone)]
        torch.testing.assert_close(curve(together, slot), curve(alone, 0), rtol=0, atol=1e-9)
        assert largest_gap(pack.slot_weights(slot), lone.slot_weights(0)) < 1e-9
        assert pack.clocks[slot] == lone.clocks[0]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_pack_refilled_slots_equal_lone_runs_on_the_same_images(dtype, atol) -> None:
    """Slots leave and join at epoch boundaries; each one's curve is that of its lone run on the same epochs' images."""
    slots = dict(zip(("a", "b", "c", "d"), HYPS, strict=True))
    fresh = make_slots(HYPS[:1], dtype)[0].state
    newcomers = {1: ("b",), 2: ("c", "d")}
    leavers = {2: ("a",)}
    pack = make_pack([PackSlot("a", HYPS[0], fresh)], epochs=6)
    curves: dict[str, list[Tensor]] = {key: [] for key in slots}
    for epoch in range(5):
        if epoch:
            gone = [pack.keys.index(key) for key in leavers.get(epoch, ())]
            joining = [PackSlot(key, slots[key], fresh) for key in newcomers.get(epoch, ())]
            pack.reshape(drop=gone, add=joining)
        results = train_epoch(pack, epoch)
        for slot, key in enumerate(pack.keys):
            curves[key].append(curve(results, slot))
    assert pack.keys == ("b", "c", "d")
    assert pack.epochs == (4, 3, 3)
    for key, first in (("a", 0), ("b", 1), ("c", 2), ("d", 2)):
        lone = make_pack([PackSlot(key, slots[key], fresh)], epochs=6)
        for epoch, together in enumerate(curves[key], start=first):
            torch.testing.assert_close(together, curve(train_epoch(lone, epoch), 0), rtol=0, atol=atol)
        if dtype is torch.float64 and key in pack.keys:
            slot = pack.keys.index(key)
            assert largest_gap(pack.model.unstack(slot), lone.model.unstack(0)) < atol
            assert largest_gap(pack.slot_weights(slot), lone.slot_weights(0)) < atol
            assert pack.clocks[slot] == lone.clocks[0]


def test_pack_newcomer_that_does_not_fit_raises_and_changes_nothing() -> None:
    pack = make_pack(make_slots(HYPS[:2]))
    train_epoch(pack)
    state = make_slots(HYPS[:1])[0].state
    for newcomer, message in (
        (PackSlot("t0", HYPS[0], state), "slot t0 is in the pack twice"),
        (PackSlot("new", Hyperparameters(mosaic=0.5), state), r"mosaic cannot differ inside a pack: 1\.0 in t0, 0\.5"),
        (PackSlot("new", HYPS[0], {**state, "format": 7}), "slot new: its state has format 7"),
    ):
        with pytest.raises(TrainingError, match=message):
            pack.reshape(drop=[1], add=[newcomer])
    assert pack.keys == ("t0", "t1")
    assert pack.epochs == (1, 1)
    pack.begin_epoch()
    with pytest.raises(TrainingError, match="between epochs"):
        pack.add([PackSlot("new", HYPS[0], state)])


def poison_gradient(pack: Pack, name: str, value: float) -> torch.utils.hooks.RemovableHandle:
    """From now on slot 1's gradient of this parameter holds a value that the loss knows nothing of."""

    def spoil(gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        pack.model.per_slot(spoiled)[1, 0, 0, 0, 0] = value
        return spoiled

    return pack.model.get_parameter(name).register_hook(spoil)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_pack_slot_made_non_finite_leaves_the_others_bit_identical(poison) -> None:
    healthy, sick = (make_pack(make_slots(HYPS[:3], torch.float32)) for _ in range(2))
    train_epoch(healthy)
    train_epoch(sick)
    frozen = sick.slot_state(1)
    weight = "model.3.conv.weight"
    if poison == "loss":
        sick.model.official_tensors()[weight][1] = float("nan")
    else:
        poison_gradient(sick, weight, float("nan"))
    healthy_curve = train_epoch(healthy)
    sick.begin_epoch()
    sick_curve = [sick.train_step(*batch) for batch in batches()]
    reports = sick.end_epoch()
    for slot in (0, 2):
        assert torch.equal(curve(healthy_curve, slot), curve(sick_curve, slot))
        assert largest_gap(healthy.model.unstack(slot), sick.model.unstack(slot)) == 0
        assert largest_gap(healthy.slot_weights(slot), sick.slot_weights(slot)) == 0
        assert reports[slot].failure is None
    # A gradient is looked at when the slot steps, which in this epoch is first after batch 1.
    assert reports[1].failure == f"the {poison} is not finite (epoch 1, batch {0 if poison == 'loss' else 1})"
    assert torch.isfinite(torch.tensor(reports[1].items)).all()
    after = sick.slot_state(1)
    assert largest_gap(after["ema"], frozen["ema"]) == 0
    assert largest_gap(after["optimizer"]["buffers"]["momentum"], frozen["optimizer"]["buffers"]["momentum"]) == 0


def test_pack_drop_keeps_the_curve_of_the_other() -> None:
    whole, shrunk = make_pack(make_slots(HYPS[:3])), make_pack(make_slots(HYPS[:3]))
    train_epoch(whole)
    train_epoch(shrunk)
    shrunk.drop([0, 2])
    assert shrunk.keys == ("t1",)
    torch.testing.assert_close(curve(train_epoch(shrunk), 0), curve(train_epoch(whole), 1), rtol=0, atol=1e-9)
    assert largest_gap(shrunk.slot_weights(0), whole.slot_weights(1)) < 1e-9


def test_pack_drop_everybody_raises() -> None:
    with pytest.raises(TrainingError, match="at least one slot"):
        make_pack(make_slots(HYPS[:2])).drop([0, 1])


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("slots", [1, 2])
def test_pack_resumed_from_saved_states_gives_the_identical_curve(tmp_path, slots, optimizer) -> None:
    through = make_pack(make_slots(HYPS[:slots], torch.float32), optimizer=optimizer, autobalance=True)
    train_epoch(through)
    torch.save([(s.key, s.state) for s in through.slots()], tmp_path / "states.pt")
    saved = torch.load(tmp_path / "states.pt", weights_only=True)
    resumed = make_pack(
        [PackSlot(key, hyp, state) for (key, state), hyp in zip(saved, HYPS, strict=False)],
        optimizer=optimizer,
        autobalance=True,
    )
    assert resumed.epochs == (1,) * slots
    for _ in range(2):
        expected, got = train_epoch(through), train_epoch(resumed)
        for slot in range(slots):
            assert torch.equal(curve(expected, slot), curve(got, slot))
    for slot in range(slots):
        assert largest_gap(through.slot_weights(slot), resumed.slot_weights(slot)) == 0
        assert largest_gap(through.model.unstack(slot), resumed.model.unstack(slot)) == 0


def test_pack_autobalance_changes_the_balance_of_each_slot() -> None:
    pack = make_pack(make_slots(HYPS[:2]), autobalance=True)
    train_epoch(pack)
    assert float((pack.balance - torch.tensor([4.0, 1.0, 0.4])).abs().min(dim=1).values.max()) < 1e-12  # the middle
    assert float((pack.balance[0] - pack.balance[1]).abs().max()) > 1e-6


FROZEN_NAMES = tuple(f"model.{layer}." for layer in range(10))


@pytest.mark.parametrize("freeze_bn", [False, True])
def test_pack_frozen_layers_keep_their_weights_and_equal_lone_runs(freeze_bn) -> None:
    pack = make_pack(make_slots(HYPS[:2]), freeze=10, freeze_bn=freeze_bn)
    before = pack.model.unstack(0)
    curves = [result for _ in range(2) for result in train_epoch(pack)]
    after, averages = pack.model.unstack(1), pack.slot_weights(1)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith(FROZEN_NAMES)}
    statistics = {name for name in frozen if "running" in name or "num_batches" in name}
    assert moved & frozen == (set() if freeze_bn else statistics)
    assert {name for name in before if name.endswith(".weight")} - frozen <= moved
    assert set(pack.optimizer.slot_state(0)["buffers"]["momentum"]).isdisjoint(frozen)
    assert list(averages) == list(after)
    lone = make_pack([make_slots(HYPS[:2])[1]], freeze=10, freeze_bn=freeze_bn)
    alone = [result for _ in range(2) for result in train_epoch(lone)]
    torch.testing.assert_close(curve(curves, 1), curve(alone, 0), rtol=0, atol=1e-9)
    assert largest_gap(averages, lone.slot_weights(0)) < 1e-9


def test_pack_frozen_layers_get_no_gradient() -> None:
    pack = make_pack(make_slots(HYPS[:1]), freeze=10)
    pack.begin_epoch()
    torch.autograd.backward([pack._loss(*batches()[0]).total], [torch.ones(1, dtype=torch.float64)])
    with_gradient = {name for name, tensor in pack.model.named_parameters() if tensor.grad is not None}
    assert with_gradient == {name for name, _ in pack.model.named_parameters() if not name.startswith(FROZEN_NAMES)}


def test_pack_with_frozen_layers_resumed_gives_the_identical_curve() -> None:
    through = make_pack(make_slots(HYPS[:2]), freeze=10)
    train_epoch(through)
    resumed = make_pack(through.slots(), freeze=10)
    assert torch.equal(curve(train_epoch(through), 1), curve(train_epoch(resumed), 1))


def test_pack_evaluation_model_holds_the_moving_averages() -> None:
    pack = make_pack(make_slots(HYPS[:2], torch.float32))
    train_epoch(pack)
    model = pack.evaluation_model()
    assert not model.training
    for slot in range(2):
        ours, averages = model.unstack(slot), pack.slot_weights(slot)
        assert list(ours) == list(averages)
        floating = [name for name in ours if ours[name].is_floating_point()]
        assert all(torch.equal(ours[name], averages[name]) for name in floating)
        assert int(averages["model.0.bn.num_batches_tracked"]) == 1  # the average's counter never moves
        assert int(pack.model.unstack(slot)["model.0.bn.num_batches_tracked"]) == 1 + BATCHES


def half_precision_pack() -> Pack:
    slots = make_slots(HYPS[:2], torch.float32)
    return Pack(config(), slots, num_classes=3, batches_per_epoch=BATCHES, device=CPU, precision="fp16")


def test_pack_fp16_overflow_of_one_slot_skips_and_rescales_that_slot_alone() -> None:
    calm, stormy = half_precision_pack(), half_precision_pack()
    stormy.begin_epoch()
    calm.begin_epoch()
    before = stormy.optimizer.flat.clone()
    hook = poison_gradient(stormy, "model.3.conv.weight", float("inf"))
    images, targets = batches()[0]
    calm_first, stormy_first = calm.train_step(images, targets), stormy.train_step(images, targets)
    assert calm_first.norm is not None
    assert stormy_first.norm is not None
    assert torch.isfinite(calm_first.norm).all()
    assert torch.isinf(stormy_first.norm).tolist() == [False, True]
    assert torch.equal(stormy.optimizer.flat[1], before[1])
    hook.remove()
    for batch in batches()[1:]:
        calm.train_step(*batch)
        stormy.train_step(*batch)
    assert [report.failure for report in stormy.end_epoch()] == [None, None]
    calm.end_epoch()
    assert largest_gap(calm.model.unstack(0), stormy.model.unstack(0)) == 0
    assert not torch.equal(stormy.optimizer.flat[1], before[1])
    scales = [stormy.slot_state(slot)["loss_scale"] for slot in range(2)]
    assert scales == [[65536.0, calm.slot_state(0)["loss_scale"][1]], [32768.0, scales[0][1] - 1]]


def test_pack_fp16_endless_overflow_fails_the_slot() -> None:
    pack = half_precision_pack()
    state = pack.slots()[1]
    state.state["loss_scale"][0] = 1.0
    pack = Pack(
        config(), [pack.slots()[0], state], num_classes=3, batches_per_epoch=BATCHES, device=CPU, precision="fp16"
    )
    poison_gradient(pack, "model.3.conv.weight", float("inf"))
    pack.begin_epoch()
    for batch in batches():
        pack.train_step(*batch)
    assert [r.failure for r in pack.end_epoch()] == [None, "the gradient is not finite (epoch 0, batch 0)"]


def test_pack_state_in_the_middle_of_an_epoch_raises() -> None:
    pack = make_pack(make_slots(HYPS[:1]))
    pack.begin_epoch()
    pack.train_step(*batches()[0])
    with pytest.raises(TrainingError, match="between epochs"):
        pack.slot_state(0)
    with pytest.raises(TrainingError, match="after 1 of 5 batches"):
        pack.end_epoch()


def test_pack_shared_key_that_differs_raises_naming_it() -> None:
    slots = make_slots([Hyperparameters(), Hyperparameters(anchor_t=3.0)])
    with pytest.raises(TrainingError, match=r"anchor_t cannot differ inside a pack: 4\.0 in t0, 3\.0 in t1"):
        make_pack(slots)


def test_fresh_state_rounds_the_model_to_half_but_not_the_average() -> None:
    weights = {"model.0.conv.weight": torch.tensor([0.1, 1 / 3]), "model.0.bn.num_batches_tracked": torch.tensor(1)}
    state = fresh_state(weights)
    assert state["model"]["model.0.conv.weight"].tolist() == [0.0999755859375, 0.333251953125]
    assert state["ema"]["model.0.conv.weight"].tolist() == weights["model.0.conv.weight"].tolist()
    assert state["clock"] == {"iteration": 0, "last_step": -1, "updates": 0}
    assert Clock(**state["clock"]) == Clock()


# No wait for the device


class FakeCudaPack(Pack):
    """A pack whose fake model is made on the device: `Module.to` cannot move fake parameters."""

    def _stack(self, weights: Sequence[dict[str, Tensor]]) -> YOLOv5:
        frozen = self.config.freeze
        trunk = Trunk(frozen, (0,) * len(weights)) if frozen else None
        with torch.device("cuda"):
            model = YOLOv5(self.config.model, self.num_classes, len(weights), trunk=trunk)
        model.model[:frozen].requires_grad_(False)
        return model


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(("optimizer", "precision", "freeze"), [("SGD", "fp32", 0), ("AdamW", "fp16", 10)])
def test_pack_step_of_four_slots_on_fake_cuda_never_copies_or_waits(optimizer, precision, freeze) -> None:
    state = {name: t for name, t in initial_state("n", 3, seed=1).items() if name != ANCHORS_KEY}

    def build() -> tuple[Pack, Tensor, Tensor]:
        weights = {name: torch.zeros(t.shape, dtype=t.dtype, device="cuda") for name, t in state.items()}
        slots = [PackSlot(f"t{i}", hyp, fresh_state(weights)) for i, hyp in enumerate(HYPS)]
        pack = FakeCudaPack(
            config(optimizer=optimizer, autobalance=True, freeze=freeze),
            slots,
            num_classes=3,
            batches_per_epoch=BATCHES,
            device=torch.device("cuda"),
            precision=precision,
        )
        pack.clocks = (Clock(40, 39, 40), *pack.clocks[1:])  # so that some steps are of some slots only
        pack.begin_epoch()
        images = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8, device="cuda")
        return pack, images, torch.zeros(32, 6, device="cuda")

    def step(made: tuple[Pack, Tensor, Tensor]) -> None:
        pack, images, targets = made
        table = pack._table
        assert table is not None
        for batch in range(2):
            loss = pack._loss(images, targets)
            backward((loss.total * pack._loss_scale).sum())
            result = pack._finish(loss, table.values[batch], table.stepped[batch])
            assert result.norm is not None
            assert result.norm.device.type == "cuda"
            assert result.stepped == (False, True, True, True)

    assert run_guarded(build, step).calls > 5000
