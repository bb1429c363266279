"""Lanes: a pack cut into several gives what the whole one gives, slot by slot."""

from collections.abc import Iterator

import pytest
import torch
from pack_cases import BATCHES, CPU, HYPS, batches, config, largest_gap, make_pack, make_slots, validation_batches

from yolocore.errors import TrainingError
from yolocore.training.lanes import Lanes, lane_count
from yolocore.training.pack import Pack, PackSlot, SlotEpoch

FIVE = (*HYPS, HYPS[1].replace(box=0.07))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make_lanes(slots: list[PackSlot]) -> Lanes:
    return Lanes(config(), slots, num_classes=3, batches_per_epoch=BATCHES, device=CPU)


def train_epoch(pack: Pack | Lanes, epoch: int = 0) -> list[SlotEpoch]:
    pack.begin_epoch()
    for images, targets in batches(seed=epoch):
        pack.train_step(images, targets)
    return pack.end_epoch()


@pytest.mark.parametrize(("slots", "lanes"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (64, 2)])
def test_lane_count_large_packs_on_a_cpu_are_cut(slots: int, lanes: int) -> None:
    assert lane_count(slots, CPU) == lanes
    assert lane_count(slots, torch.device("cuda:0")) == 1


def test_lanes_of_five_slots_equal_one_pack_also_after_slots_left_and_joined() -> None:
    lanes, pack = make_lanes(make_slots(FIVE)), make_pack(make_slots(FIVE))
    assert [lane.keys for lane in lanes.lanes] == [("t0", "t1"), ("t2", "t3", "t4")]
    for epoch in range(3):
        if epoch == 1:
            joining = [PackSlot(key, HYPS[0], make_slots(HYPS[:1])[0].state) for key in ("x", "y")]
            for one in (lanes, pack):
                one.reshape(drop=[0, 3], add=joining)
        if epoch == 2:
            for one in (lanes, pack):
                one.reshape(drop=[1, 4])
        ours, theirs = train_epoch(lanes, epoch), train_epoch(pack, epoch)
        assert [(row.key, row.epoch, row.failure, row.lr) for row in ours] == [
            (row.key, row.epoch, row.failure, row.lr) for row in theirs
        ]
        for one, other in zip(ours, theirs, strict=True):
            assert one.items == pytest.approx(other.items, rel=1e-9)
    assert lanes.keys == pack.keys == ("t1", "t4", "x")
    assert lanes.epochs == pack.epochs == (3, 3, 2)
    assert len(lanes.lanes) == 1
    for slot in range(3):
        assert largest_gap(lanes.slot_weights(slot), pack.slot_weights(slot)) < 1e-9
        assert lanes.slot(slot).state["clock"] == pack.slot(slot).state["clock"]


def test_lanes_evaluate_gives_the_slots_asked_for_in_their_order() -> None:
    lanes, pack = make_lanes(make_slots(FIVE)), make_pack(make_slots(FIVE))
    for one in (lanes, pack):
        train_epoch(one)
    for chosen in ([3, 0, 4], [1], list(range(5))):
        ours = lanes.evaluate(validation_batches(), chosen)
        theirs = pack.evaluate(validation_batches(), chosen)
        assert len({slot.metrics.obj_loss for slot in ours}) == len(chosen)
        for one, other in zip(ours, theirs, strict=True):
            assert one.metrics.to_mapping() == pytest.approx(other.metrics.to_mapping(), rel=1e-9, abs=1e-9)
            assert one.details(7).epoch == 7


def test_lanes_slot_that_is_not_finite_fails_alone_and_leaves_other_lanes_bit_identical() -> None:
    healthy, sick = make_lanes(make_slots(FIVE, torch.float32)), make_lanes(make_slots(FIVE, torch.float32))
    with torch.no_grad():
        sick.lanes[1].model.official_tensors()["model.3.conv.weight"][1].fill_(float("nan"))
    train_epoch(healthy)
    failures = [row.failure for row in train_epoch(sick)]
    assert failures == [None, None, None, "the loss is not finite (epoch 0, batch 0)", None]
    assert not sick.all_failed()
    for slot in (0, 1, 2, 4):
        assert largest_gap(healthy.slot_weights(slot), sick.slot_weights(slot)) == 0


def test_lanes_error_in_a_lane_is_raised_after_all_lanes_have_ended() -> None:
    lanes = make_lanes(make_slots(FIVE))
    lanes.lanes[0].begin_epoch()
    with pytest.raises(TrainingError, match="outside an epoch"):
        lanes.train_step(*batches()[0])
    for image, targets in batches()[1:]:
        lanes.lanes[0].train_step(image, targets)
    assert [row.failure for row in lanes.lanes[0].end_epoch()] == [None, None]


def test_lanes_newcomer_that_does_not_fit_raises_and_changes_nothing() -> None:
    lanes = make_lanes(make_slots(FIVE))
    train_epoch(lanes)
    newcomer = PackSlot("new", HYPS[0].replace(mosaic=0.5), make_slots(HYPS[:1])[0].state)
    with pytest.raises(TrainingError, match="mosaic cannot differ inside a pack"):
        lanes.reshape(drop=[1], add=[newcomer])
    assert lanes.keys == ("t0", "t1", "t2", "t3", "t4")
    assert lanes.epochs == (1, 1, 1, 1, 1)
