"""A frozen trunk exists once per cohort of slots, and every slot still computes what it computes alone."""

from dataclasses import replace

import pytest
import torch
from pack_cases import BATCHES, HYPS, batches, curve, largest_gap, make_pack, make_slots, train_epoch, widened
from torch import Tensor

from yolocore.model import YOLOv5, initial_state
from yolocore.model.trunk import Trunk
from yolocore.training.optim import Clock, PackEMA, PackOptimizer
from yolocore.training.pack import Pack, PackSlot


def states_with_trunks(layers: int, seeds: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """State dicts in float64, each with the first layers of one seed and the rest of another."""
    made = []
    for trunk_seed, seed in seeds:
        first, rest = (widened(initial_state("n", 3, number), torch.float64) for number in (trunk_seed, seed))
        made.append({name: (first if Trunk(layers, (0,)).holds(name) else rest)[name] for name in rest})
    return made


# Layers after which a trunk may end: before a convolution, a C3, the pooling, up-sampling, a concatenation, the head.
ENDS = [(layers, trunks) for layers in (1, 2, 9, 11, 12, 18, 24) for trunks in ((1, 1, 1), (1, 2, 1))]


@pytest.mark.parametrize(("layers", "trunks"), [*ENDS, (10, (1, 2, 3))])
def test_forward_with_trunk_gives_each_slots_own_output_and_gradients(layers: int, trunks: tuple[int, ...]) -> None:
    states = states_with_trunks(layers, [(trunk, 10 + slot) for slot, trunk in enumerate(trunks)])
    images = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trunk = Trunk.of(layers, states)
    assert trunk.copies == len(set(trunks))
    stack = YOLOv5.stack("n", 3, states, trunk=trunk).train()
    plain = YOLOv5.stack("n", 3, states).train()
    raw, expected = stack(images), plain(images)
    for ours, theirs in zip(raw, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for model, outputs in ((stack, raw), (plain, expected)):
        torch.autograd.backward([(output**2).mean() for output in outputs])
        assert model.num_slots == 3
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in stack.named_parameters():
        assert (parameter.grad is None) == trunk.holds(name)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=0, atol=1e-9)
    for slot in range(3):
        assert largest_gap(stack.unstack(slot), plain.unstack(slot)) < 1e-9  # statistics moved alike


def test_forward_with_trunk_in_channels_last_equals_the_other_format() -> None:
    states = [widened(state, torch.float32) for state in states_with_trunks(10, [(1, 3), (2, 4), (1, 5)])]
    images = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    model = YOLOv5.stack("n", 3, states, trunk=Trunk.of(10, states)).eval()
    expected = model(images)
    model.to(memory_format=torch.channels_last)
    for ours, theirs in zip(model(images.to(memory_format=torch.channels_last)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_select_divides_the_slots_anew() -> None:
    states = states_with_trunks(10, [(1, 3), (2, 4), (1, 5), (2, 6)])
    model = YOLOv5.stack("n", 3, states, trunk=Trunk.of(10, states))
    assert model.official_tensors()["model.0.conv.weight"].shape == (2, 16, 3, 6, 6)
    assert model.official_tensors()["model.10.conv.weight"].shape == (4, 128, 256, 1, 1)
    for trunk, copies in ((None, 2), (Trunk(10, (0, 1, 0)), 2), (Trunk.none(3), 3)):
        chosen = model.select([1, 2, 3], trunk)
        assert len(chosen.official_tensors()["model.9.cv1.bn.bias"]) == copies
        for slot, old in enumerate([1, 2, 3]):
            assert largest_gap(chosen.unstack(slot), states[old]) == 0


def check_lone(pack: Pack, entry: PackSlot, curves: list[Tensor], first: int, **changes: object) -> None:
    """One slot of a pack against its lone run over the same epochs of the stream."""
    lone = make_pack([entry], **changes)
    for epoch, together in enumerate(curves, start=first):
        torch.testing.assert_close(together, curve(train_epoch(lone, epoch), 0), rtol=0, atol=1e-9)
    slot = pack.keys.index(entry.key)
    assert pack.clocks[slot] == lone.clocks[0]
    assert largest_gap(pack.model.unstack(slot), lone.model.unstack(0)) < 1e-9
    assert largest_gap(pack.slot_weights(slot), lone.slot_weights(0)) < 1e-9
    ours, theirs = pack.evaluation_model([slot]), lone.evaluation_model()
    averages = {name: t for name, t in theirs.unstack(0).items() if t.is_floating_point()}  # counters have no average
    assert largest_gap({name: ours.unstack(0)[name] for name in averages}, averages) < 1e-9


@pytest.mark.parametrize(("freeze_bn", "copies"), [(True, [1, 1, 1]), (False, [1, 2, 2])])
def test_pack_frozen_with_staggered_starts_equals_lone_runs(freeze_bn: bool, copies: list[int]) -> None:
    """Two start, one joins an epoch later: with statistics at rest one trunk serves all, else one per start."""
    changes = {"epochs": 6, "freeze": 10, "freeze_bn": freeze_bn}
    # Another warm-up steps at other batches, which the moving average sees, and the trunk does not.
    hyps = [HYPS[0], replace(HYPS[1], warmup_epochs=60.0), HYPS[2]]
    entries = make_slots(hyps)
    pack = make_pack(entries[:2], **changes)
    curves: dict[str, list[Tensor]] = {entry.key: [] for entry in entries}
    seen = []
    for epoch in range(3):
        if epoch == 1:
            pack.add(entries[2:])
        seen.append(pack.model.trunk.copies)
        results = train_epoch(pack, epoch)
        for slot, key in enumerate(pack.keys):
            curves[key].append(curve(results, slot))
    assert seen == copies
    for first, entry in enumerate(entries[1:]):
        check_lone(pack, entry, curves[entry.key], first, **changes)
    pack.drop([0, 1])
    assert pack.model.trunk == Trunk(10, (0,))


def test_pack_frozen_evaluation_shares_what_the_averages_have_in_common() -> None:
    pack = make_pack(make_slots(HYPS[:3], torch.float32), freeze=10, freeze_bn=True)
    train_epoch(pack)
    assert pack.evaluation_model().trunk == Trunk(10, (0, 0, 0))
    pack.ema.flat[1, -1] += 1.0  # a frozen parameter
    assert pack.evaluation_model().trunk == Trunk(10, (0, 1, 0))
    assert pack.evaluation_model([1, 2]).trunk == Trunk(10, (0, 1))
    for slot in range(3):
        name = pack.ema.layout.names[-1]
        found = pack.evaluation_model().unstack(slot)[name]
        assert torch.equal(found, pack.slot_weights(slot)[name])


@pytest.mark.parametrize("freeze_bn", [False, True])
def test_pack_frozen_resumed_from_saved_states_gives_the_identical_curve(tmp_path, freeze_bn: bool) -> None:
    changes = {"epochs": 6, "freeze": 10, "freeze_bn": freeze_bn}
    through = make_pack(make_slots(HYPS[:2], torch.float32), **changes)
    train_epoch(through)
    through.add([PackSlot("late", HYPS[2], make_slots(HYPS[:1], torch.float32)[0].state)])
    train_epoch(through, 1)
    torch.save([(slot.key, slot.state) for slot in through.slots()], tmp_path / "states.pt")
    saved = torch.load(tmp_path / "states.pt", weights_only=True)
    assert all(len(state["model"]) == len(state["ema"]) == 349 for _, state in saved)
    entries = [PackSlot(key, hyp, state) for (key, state), hyp in zip(saved, HYPS, strict=False)]
    resumed = make_pack(entries, **changes)
    assert resumed.model.trunk == through.model.trunk
    assert resumed.model.trunk.copies == (1 if freeze_bn else 2)
    expected, got = train_epoch(through, 2), train_epoch(resumed, 2)
    for slot in range(3):
        assert torch.equal(curve(expected, slot), curve(got, slot))
        assert largest_gap(through.slot_weights(slot), resumed.slot_weights(slot)) == 0
        assert largest_gap(through.model.unstack(slot), resumed.model.unstack(slot)) == 0


def test_pack_frozen_slot_made_non_finite_leaves_the_others_bit_identical() -> None:
    healthy, sick = (make_pack(make_slots(HYPS[:3], torch.float32), freeze=10) for _ in range(2))
    sick.model.official_tensors()["model.13.cv1.conv.weight"][1] = float("nan")
    healthy_curve = train_epoch(healthy)
    sick.begin_epoch()
    results = [sick.train_step(*batch) for batch in batches()]
    reports = sick.end_epoch()
    assert [report.failure for report in reports] == [None, "the loss is not finite (epoch 0, batch 0)", None]
    for slot in (0, 2):
        assert torch.equal(curve(healthy_curve, slot), curve(results, slot))
        assert largest_gap(healthy.slot_weights(slot), sick.slot_weights(slot)) == 0


def test_pack_ema_frozen_parameters_follow_the_recursion_of_the_slots_that_stepped() -> None:
    states = states_with_trunks(2, [(1, 3), (1, 4)])
    model = YOLOv5.stack("n", 3, states, trunk=Trunk.of(2, states))
    model.model[:2].requires_grad_(False)
    ema = PackEMA(model, PackOptimizer(model, HYPS[:2], batch_size=16))
    name = "model.1.conv.weight"
    target = states[0][name]
    expected = [torch.full_like(target, value) for value in (2.0, -1.0)]
    for slot, start in enumerate(expected):
        ema.load_slot(slot, {**states[slot], name: start})
    for step in range(5):
        share = torch.tensor([0.9 / (step + 1), 0.2], dtype=torch.float64)
        apply = torch.tensor([True, step % 2 == 0])
        ema.update(share, apply)
        for slot in range(2):
            if bool(apply[slot]):
                expected[slot] = expected[slot].lerp(target, share[slot])
    for slot in range(2):
        torch.testing.assert_close(ema.slot_weights(slot)[name], expected[slot], rtol=0, atol=1e-12)
        torch.testing.assert_close(ema.slot_weights(slot)["model.0.conv.weight"], states[0]["model.0.conv.weight"])


def test_pack_frozen_keeps_the_trunk_and_its_optimiser_state_out_of_the_slots() -> None:
    whole, frozen = make_pack(make_slots(HYPS)), make_pack(make_slots(HYPS), freeze=10)
    trunk = sum(t.numel() for n, t in whole.slot_weights(0).items() if frozen.model.trunk.holds(n) and t.ndim == 4)
    saved = sum(p.numel() for p in whole.model.parameters()) - sum(p.numel() for p in frozen.model.parameters())
    assert saved >= 3 * trunk
    assert frozen.optimizer.flat.shape[1] <= whole.optimizer.flat.shape[1] - trunk
    assert frozen.clocks == (Clock(),) * 4
    train_epoch(frozen)
    counters = {int(frozen.model.unstack(slot)["model.0.bn.num_batches_tracked"]) for slot in range(4)}
    assert counters == {1 + BATCHES}
