"""What one training step costs, part by part, against the same recipe written the usual way.

BCCD, 160 pixels, batch 16, yolov5n from the official weights. "Plain" is a stand-in for an ordinary trainer, written
here: one model of torch's own layers in NCHW float32, the loss with boolean masks (benchmarks/loss.py), torch.optim.SGD
over parameters, a moving average tensor by tensor, a validation image by image; both are fed by our loader and share
the functions that turn matches into metrics. They train and validate in turn, epoch by epoch, the plain one in a
process of its own, and the best epoch of each counts. YOLOv5's own figures, measured on a 2-core machine with
AVX512-bf16, are printed beside them; other machines differ, so the ratio that counts is the one within a run.

`--yolov5 PATH` names a checkout of YOLOv5: its `train.py` is run by its command line in turn with ours, on the same
data and settings, each twice with few and twice with all epochs; the best of each tells the seconds per epoch, whose
ratio is printed.

    python benchmarks/step.py --quick
    python benchmarks/step.py --data fixtures/data/bccd --weights fixtures/weights/yolov5n.pt --yolov5 ~/yolov5
    python benchmarks/step.py --yolov5 ~/yolov5 --yolov5-python ~/yolov5/.venv/bin/python
"""

import argparse
import contextlib
import csv
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
import yaml
from loss import eager_loss
from torch import Tensor, nn

import yolocore.training.pack as pack_module
from yolocore.boxes import xywh_to_xyxy
from yolocore.data.loader import Batch, ImageInfo
from yolocore.device import resolve_device, supported_precisions
from yolocore.evaluate import CONFIDENCE, MAX_DETECTIONS, NMS_IOU, evaluate
from yolocore.hyperparameters import Hyperparameters
from yolocore.loss import LossWeights
from yolocore.metrics import DetectionMetrics, match_detections, summarise
from yolocore.model.anchors import STRIDES
from yolocore.model.yolov5 import ANCHORS_KEY, ARCHITECTURE, DETECT_SOURCES, SCALINGS, LayerSpec
from yolocore.postprocess import CLASS_OFFSET, MAX_CANDIDATES
from yolocore.training.config import TrainConfig
from yolocore.training.optim import Schedule, ema_decay, parameter_group, scaled_weight_decay
from yolocore.training.pack import Pack, PackSlot, fresh_state
from yolocore.training.trainer import PackTrainer, SlotStart, TrainingData, start_weights

YOLOV5_MS = {"data": 7.0, "forward": 33.0, "loss": 4.0, "backward": 46.0, "optimiser": 5.0, "ema": 5.0}
"""YOLOv5's own step, milliseconds, as measured on a 2-core machine with AVX512-bf16."""
YOLOV5_VALIDATION_SECONDS = 0.35
PARTS = tuple(YOLOV5_MS)
IMAGE_SIZE, BATCH_SIZE = 160, 16
PLAIN = "plain fp32"
ROUNDS = 2
"""How often each whole run is made in turn with the others; the best counts."""


# ------------------------------------------------------------------------------------------- stop watches


@dataclass
class Times:
    """Seconds by part, of one epoch."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    total: float = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def batches(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            with self.part("data"):
                batch = next(stream, None)
            if batch is None:
                return
            yield batch

    def milliseconds(self, steps: int) -> dict[str, float]:
        rows = {name: spent / steps * 1000 for name, spent in self.seconds.items()}
        total = self.total / steps * 1000
        return rows | {"other": total - sum(rows.values()), "step": total}


def watch(times: Callable[[], Times], owner: Any, name: str, part: str) -> None:
    """Time every call of `owner.name`."""
    function = getattr(owner, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        with times().part(part):
            return function(*arguments, **named)

    setattr(owner, name, timed)


# ------------------------------------------------------------------------------------------- the plain trainer


class PlainConv(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, padding: int | None = None) -> None:
        super().__init__()
        pad = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.bn(self.conv(x)))
        return result


class PlainBottleneck(nn.Module):
    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2 = PlainConv(channels, channels), PlainConv(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.cv2(self.cv1(x))
        return x + result if self.shortcut else result


class PlainC3(nn.Module):
    def __init__(self, c_in: int, c_out: int, repeats: int, shortcut: bool) -> None:
        super().__init__()
        half = c_out // 2
        self.cv1, self.cv2, self.cv3 = PlainConv(c_in, half), PlainConv(c_in, half), PlainConv(2 * half, c_out)
        self.m = nn.Sequential(*(PlainBottleneck(half, shortcut) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))
        return result


class PlainSPPF(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = PlainConv(c_in, c_in // 2), PlainConv(c_in * 2, c_out)
        self.pool = nn.MaxPool2d(kernel, 1, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.cv1(x)
        second = self.pool(first)
        third = self.pool(second)
        result: Tensor = self.cv2(torch.cat((first, second, third, self.pool(third)), 1))
        return result


class PlainDetect(nn.Module):
    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.outputs = 5 + num_classes
        self.m = nn.ModuleList(nn.Conv2d(c, 3 * self.outputs, 1) for c in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        raw = [conv(x) for conv, x in zip(self.m, maps, strict=True)]
        return [r.view(len(r), 3, self.outputs, *r.shape[2:]).permute(0, 1, 3, 4, 2).contiguous() for r in raw]


class PlainYOLOv5(nn.Module):
    """The network of `yolocore.model` for one model, with torch's own layers and official names."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels: list[int] = []
        for spec in ARCHITECTURE:
            c_in = [channels[source] if channels else 3 for source in spec.sources]
            layer, c_out = self._layer(spec, c_in)
            layers.append(layer)
            channels.append(c_out)
        self.model = nn.ModuleList([*layers, PlainDetect([channels[s] for s in DETECT_SOURCES], num_classes)])

    @staticmethod
    def _layer(spec: LayerSpec, c_in: Sequence[int]) -> tuple[nn.Module, int]:
        scaling = SCALINGS["n"]
        c_out = scaling.channels(spec.channels)
        if spec.kind == "conv":
            return PlainConv(c_in[0], c_out, spec.kernel, spec.stride, spec.padding), c_out
        if spec.kind == "c3":
            return PlainC3(c_in[0], c_out, scaling.repeats(spec.repeats), spec.shortcut), c_out
        if spec.kind == "sppf":
            return PlainSPPF(c_in[0], c_out, spec.kernel), c_out
        return (nn.Upsample(scale_factor=2), c_in[0]) if spec.kind == "upsample" else (nn.Identity(), sum(c_in))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for spec, layer in zip(ARCHITECTURE, self.model, strict=False):
            inputs = [x if source == -1 else maps[source] for source in spec.sources]
            x = layer(torch.cat(inputs, 1) if spec.kind == "concat" else inputs[0])
            maps.append(x)
        raw: list[Tensor] = self.model[-1]([maps[source] for source in DETECT_SOURCES])
        return raw


class PlainTrainer:
    """The recipe of `yolocore.training` for one model, as one would write it without thinking of speed."""

    def __init__(self, config: TrainConfig, data: TrainingData, weights: dict[str, Tensor], anchors: Tensor) -> None:
        hyp = Hyperparameters()
        self.data, self.anchors, self.hyp, self.times = data, anchors, hyp, Times()
        self.schedule = Schedule(
            hyperparameters=hyp, epochs=config.epochs, batches_per_epoch=len(data.train), batch_size=config.batch_size
        )
        self.model = PlainYOLOv5(data.num_classes)
        self.model.load_state_dict({name: t for name, t in weights.items() if not name.endswith("anchors")})
        self.ema, self.updates = deepcopy(self.model).eval(), 0
        groups: list[list[nn.Parameter]] = [[], [], []]
        for name, parameter in self.model.named_parameters():
            groups[parameter_group(name)].append(parameter)
        decay = scaled_weight_decay(hyp.weight_decay, config.batch_size)
        settings = [{"params": group, "weight_decay": decay * (i == 1)} for i, group in enumerate(groups)]
        self.optimizer = torch.optim.SGD(settings, lr=hyp.lr0, momentum=hyp.momentum, nesterov=True, foreach=False)
        one = LossWeights.from_hyperparameters(hyp, data.num_classes, config.image_size)
        self.gains = (float(one.box), float(one.obj), float(one.cls))
        self.iteration, self.last_step = 0, -1

    def epoch(self, number: int) -> Times:
        self.times = Times()
        started = time.perf_counter()
        self.model.train()
        self.optimizer.zero_grad()
        for batch in self.times.batches(self.data.train.epoch(number)):
            self._step(batch)
        self.times.total = time.perf_counter() - started
        return self.times

    def _step(self, batch: Batch) -> None:
        rates = self.schedule.at(self.iteration)
        for group, lr in zip(self.optimizer.param_groups, rates.lr, strict=True):
            group["lr"], group["momentum"] = lr, rates.momentum
        images = batch.images.float() / 255
        with self.times.part("forward"):
            predictions = self.model(images)
        with self.times.part("loss"):
            targets = batch.targets[batch.targets[:, 0] >= 0]
            loss = eager_loss(predictions, targets, self.anchors, self.gains, self.hyp.anchor_t)
        with self.times.part("backward"):
            loss.backward()
        if self.iteration - self.last_step >= rates.accumulate:
            self._update()
            self.last_step = self.iteration
        self.iteration += 1

    def _update(self) -> None:
        with self.times.part("optimiser"):
            nn.utils.clip_grad_norm_(self.model.parameters(), 10.0, foreach=False)
            self.optimizer.step()
            self.optimizer.zero_grad()
        with self.times.part("ema"):
            self.updates += 1
            decay, state = ema_decay(self.updates), self.model.state_dict()
            for name, value in self.ema.state_dict().items():
                if value.is_floating_point():
                    value *= decay
                    value += (1 - decay) * state[name].detach()

    @torch.no_grad()
    def validate(self) -> DetectionMetrics:
        """The moving average on the validation split: losses, detections and metrics, image by image."""
        losses: list[float] = []
        matches: list[np.ndarray] = [np.zeros((0, 10), dtype=np.bool_)]
        scored: list[np.ndarray] = [np.zeros((0, 2), dtype=np.float32)]
        classes: list[np.ndarray] = [np.zeros(0, dtype=np.float32)]
        images = 0
        for batch in self.data.validation:
            raw = self.ema(batch.images.float() / 255)
            targets = batch.targets[batch.targets[:, 0] >= 0]
            total = eager_loss(raw, targets, self.anchors, self.gains, self.hyp.anchor_t)
            losses.append(float(total) / len(batch.images))
            decoded = plain_decode(raw, self.anchors)
            for index, info in enumerate(batch.infos):
                found = plain_nms(decoded[index])
                found[:, :4] = to_native(found[:, :4], info)
                own = targets[targets[:, 0] == index]
                corners = xywh_to_xyxy(own[:, 2:]) * torch.tensor(batch.images.shape[2:]).flip(0).repeat(2)
                labels = torch.cat((own[:, 1:2], to_native(corners, info)), 1)
                matches.append(match_detections(found.numpy(), labels.numpy()))
                scored.append(found[:, 4:].numpy())
                classes.append(own[:, 1].numpy())
                images += 1
        confidence, label = np.concatenate(scored).T
        loss = sum(losses) / max(len(losses), 1)
        return summarise(np.concatenate(matches), confidence, label, np.concatenate(classes), (loss, 0.0, 0.0), images)

    def validation_seconds(self) -> float:
        started = time.perf_counter()
        self.validate()
        return time.perf_counter() - started


def plain_decode(raw: Sequence[Tensor], anchors: Tensor) -> Tensor:
    """Centre, size and probabilities [B, N, 5 + C] of the maps [B, A, H, W, 5 + C]."""
    rows = []
    for level, sizes, stride in zip(raw, anchors, STRIDES, strict=True):
        values = level.sigmoid()
        y, x = torch.meshgrid(*(torch.arange(side) for side in level.shape[2:4]), indexing="ij")
        centre = (2 * values[..., :2] - 0.5 + torch.stack((x, y), -1)) * stride
        size = (2 * values[..., 2:4]) ** 2 * sizes.view(1, -1, 1, 1, 2) * stride
        rows.append(torch.cat((centre, size, values[..., 4:]), -1).flatten(1, 3))
    return torch.cat(rows, 1)


def plain_nms(rows: Tensor) -> Tensor:
    """The detections [n, 6] of one image [N, 5 + C], several classes per box allowed."""
    rows = rows[rows[:, 4] > CONFIDENCE]
    scores = rows[:, 5:] * rows[:, 4:5]
    row, label = (scores > CONFIDENCE).nonzero(as_tuple=True)
    score = scores[row, label]
    order = score.argsort(descending=True, stable=True)[:MAX_CANDIDATES]
    row, label, score = row[order], label[order].float(), score[order]
    boxes = xywh_to_xyxy(rows[row, :4])
    kept = torchvision.ops.nms(boxes + label[:, None] * CLASS_OFFSET, score, NMS_IOU)[:MAX_DETECTIONS]
    return torch.cat((boxes, score[:, None], label[:, None]), 1)[kept]


def to_native(corners: Tensor, info: ImageInfo) -> Tensor:
    """Corners [n, 4] of the network input in pixels of the image as it is on disk, clipped to it."""
    native = (corners - torch.tensor(info.pad).repeat(2)) / info.gain
    return native.clamp(min=0).minimum(torch.tensor(info.native[::-1]).repeat(2))


def serve_plain(config: TrainConfig, requests: "multiprocessing.connection.Connection") -> None:
    """Train the epochs whose numbers arrive, and validate for each `VALIDATE`; answer with the times."""
    data = TrainingData.load(config, Hyperparameters())
    weights = start_weights(config, data.num_classes).state
    trainer = PlainTrainer(config, data, weights, weights[ANCHORS_KEY])
    while (number := requests.recv()) is not None:
        requests.send(trainer.validation_seconds() if number == VALIDATE else trainer.epoch(number))


VALIDATE = -1


class PlainProcess:
    """The plain trainer in a process of its own, which what ours asks of the allocator does not reach."""

    def __init__(self, config: TrainConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self._requests, theirs = context.Pipe()
        self._process = context.Process(target=serve_plain, args=(config, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def epoch(self, number: int) -> Times:
        self._requests.send(number)
        times: Times = self._requests.recv()
        return times

    def validation_seconds(self) -> float:
        self._requests.send(VALIDATE)
        seconds: float = self._requests.recv()
        return seconds

    def close(self) -> None:
        self._requests.send(None)
        self._process.join()


# ------------------------------------------------------------------------------------------- ours


class OurTrainer:
    """A pack of one, its parts watched from outside."""

    def __init__(self, config: TrainConfig, data: TrainingData, weights: dict[str, Tensor]) -> None:
        device = resolve_device(config.device)
        precision = "bf16" if config.precision == "bf16" else "fp32"
        slot = PackSlot("lone", Hyperparameters(), fresh_state(weights))
        self.data, self.times, self.device, self.precision = data, Times(), device, precision
        self.pack = Pack(
            config,
            [slot],
            num_classes=data.num_classes,
            batches_per_epoch=len(data.train),
            device=device,
            precision=precision,
        )
        for owner, name, part in (
            (self.pack.model, "forward", "forward"),
            (self.pack.ema, "update", "ema"),
            (self.pack.optimizer, "collect", "optimiser"),
            (self.pack.optimizer, "step", "optimiser"),
        ):
            watch(lambda: self.times, owner, name, part)

    @contextlib.contextmanager
    def _watched_functions(self) -> Iterator[None]:
        """Watch what the pack module calls, for the time of one epoch."""
        kept = pack_module.detection_loss, pack_module.assign_targets, torch.autograd.backward
        watch(lambda: self.times, pack_module, "detection_loss", "loss")
        watch(lambda: self.times, pack_module, "assign_targets", "loss")
        watch(lambda: self.times, torch.autograd, "backward", "backward")
        try:
            yield
        finally:
            pack_module.detection_loss, pack_module.assign_targets, torch.autograd.backward = kept

    def epoch(self, number: int) -> Times:
        self.times = Times()
        started = time.perf_counter()
        with self._watched_functions():
            self.pack.begin_epoch()
            for batch in self.times.batches(self.data.train.epoch(number)):
                self.pack.train_step(batch.images, batch.targets)
            self.pack.end_epoch()
        self.times.total = time.perf_counter() - started
        return self.times

    def validation_seconds(self) -> float:
        started = time.perf_counter()
        model = self.pack.evaluation_model()
        evaluate(model, self.data.validation, self.pack.loss_weights, 4.0, self.device, self.precision)
        return time.perf_counter() - started


def compare(
    config: TrainConfig, precisions: Sequence[str], epochs: int
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Milliseconds by part of each contender's best epoch, and seconds of its best validation.

    Args:
        config: What they train.
        precisions: Those of ours.
        epochs: At least 2, of which the first warms up.
    """
    data = TrainingData.load(config, Hyperparameters())
    weights = start_weights(config, data.num_classes).state
    ours = {p: OurTrainer(replace(config, precision=p), data, weights) for p in precisions}
    plain = PlainProcess(config)
    trainers = {PLAIN: plain} | {f"ours {p}": o for p, o in ours.items()}
    best: dict[str, Times] = {}
    validation = dict.fromkeys(trainers, math.inf)
    for epoch in range(epochs):
        for name, trainer in trainers.items():
            times = trainer.epoch(epoch)
            # The first epoch warms up. In every epoch all have equally many optimiser steps, so epochs may be compared
            # between contenders; the same epoch is not needed.
            if epoch and (name not in best or times.total < best[name].total):
                best[name] = times
        for name, trainer in trainers.items():
            validation[name] = min(validation[name], trainer.validation_seconds())
    plain.close()
    return {name: times.milliseconds(len(data.train)) for name, times in best.items()}, validation


# ------------------------------------------------------------------------------------------- YOLOv5's train.py

RUN = "run"


@dataclass(frozen=True, slots=True)
class Checkout:
    """A checkout of YOLOv5 that the user has."""

    folder: Path
    python: str
    """The interpreter with what it needs."""


def yolov5_device(device: str) -> str:
    """How YOLOv5 calls a device of ours: a GPU by its number, and `auto` by what it comes to here."""
    resolved = resolve_device(device)
    return str(resolved.index or 0) if resolved.type == "cuda" else resolved.type


def yolov5_command(
    checkout: Checkout, config: TrainConfig, data: Path, hyp: Path, epochs: int, project: Path
) -> list[str]:
    """The command line that trains what `config` says in a checkout of YOLOv5."""
    options = {
        "--img": config.image_size,
        "--batch": config.batch_size,
        "--epochs": epochs,
        "--data": data,
        "--weights": config.weights,
        "--hyp": hyp,
        "--cache": "ram",
        "--workers": config.workers,
        "--device": yolov5_device(config.device),
        "--project": project,
        "--name": RUN,
        "--seed": config.seed,
    }
    words = [str(word) for pair in options.items() for word in pair]
    return [checkout.python, str(checkout.folder / "train.py"), *words, "--exist-ok"]


def write_inputs(folder: Path, config: TrainConfig) -> tuple[Path, Path]:
    """The data set YAML with an absolute root, and the hyp YAML."""
    described = yaml.safe_load(config.data.read_text())
    described["path"] = str((config.data.parent / Path(described.get("path") or ".").expanduser()).resolve())
    data, hyp = folder / "data.yaml", folder / "hyp.yaml"
    data.write_text(yaml.safe_dump(described))
    hyp.write_text(Hyperparameters().to_yaml())
    return data, hyp


def run_yolov5(checkout: Checkout, config: TrainConfig, epochs: int) -> float:
    """Seconds of one whole run of YOLOv5's train.py; fails unless its results.csv has a row for every epoch."""
    with tempfile.TemporaryDirectory() as name:  # one for each run: results.csv would grow
        folder = Path(name)
        data, hyp = write_inputs(folder, config)
        command = yolov5_command(checkout, config, data, hyp, epochs, folder)
        started = time.perf_counter()
        done = subprocess.run(command, cwd=checkout.folder, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        rows = results_rows(folder / RUN / "results.csv")
    if rows != epochs:
        raise SystemExit(f"{checkout.folder}: results.csv has {rows} epochs, expected {epochs}")
    return seconds


def results_rows(file: Path) -> int:
    """Epochs in a results.csv of YOLOv5."""
    if not file.exists():
        return 0
    with file.open(newline="") as stream:
        return sum(1 for row in csv.DictReader(stream, skipinitialspace=True) if row)


def seconds_per_epoch(
    runs: Mapping[str, Callable[[int], float]], short: int, long: int, rounds: int = ROUNDS
) -> dict[str, float]:
    """What one more epoch costs each contender: start-up, caching and the final validation cancel out.

    Args:
        runs: By name, what trains so many epochs and returns the seconds that it took.
        short: Epochs of the short run.
        long: Epochs of the long run, more than `short`.
        rounds: Short and long runs of all contenders take turns so often, lest a busy minute meets only one of them.

    Returns:
        By name, from the best short and the best long run.
    """
    best: dict[tuple[str, int], float] = {}
    for _ in range(rounds):
        for epochs in (short, long):
            for name, run in runs.items():
                best[name, epochs] = min(best.get((name, epochs), math.inf), run(epochs))
    seconds = {name: (best[name, long] - best[name, short]) / (long - short) for name in runs}
    for name, value in seconds.items():
        if value <= 0:
            raise SystemExit(
                f"{name}: {long} epochs took no longer than {short}; give more --epochs, or an idle machine"
            )
    return seconds


def our_run(config: TrainConfig, epochs: int) -> float:
    """Seconds of one whole training of ours in this process, evaluation of every epoch included."""
    started = time.perf_counter()
    trainer = PackTrainer(replace(config, epochs=epochs), [SlotStart("lone", Hyperparameters())])
    while not trainer.finished:
        trainer.run_epoch()
    return time.perf_counter() - started


def against_yolov5(checkout: Checkout, config: TrainConfig, precisions: Sequence[str], epochs: int) -> dict[str, float]:
    """Seconds per epoch of YOLOv5's train.py and of ours in each precision, run in turn."""
    runs: dict[str, Callable[[int], float]] = {"yolov5": lambda n: run_yolov5(checkout, config, n)}
    for precision in precisions:
        exact = replace(config, precision=precision)
        runs[f"ours {precision}"] = lambda n, c=exact: our_run(c, n)
    return seconds_per_epoch(runs, max(1, epochs // 4), epochs)


# ------------------------------------------------------------------------------------------- output


def print_table(rows: dict[str, dict[str, float]], validation: dict[str, float]) -> None:
    columns = (*PARTS, "other", "step")
    print(f"{'ms per step':24}" + "".join(f"{name:>10}" for name in columns) + "   87 images, s")
    theirs = YOLOV5_MS | {"other": 0.0, "step": sum(YOLOV5_MS.values())}
    print(f"{'YOLOv5, other machine':24}" + "".join(f"{theirs[c]:10.1f}" for c in columns) + f"{0.35:15.2f}")
    for name, row in rows.items():
        print(f"{name:24}" + "".join(f"{row[c]:10.1f}" for c in columns) + f"{validation[name]:15.2f}")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    fixtures = os.environ.get("YOLOSEARCH_FIXTURES")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fixtures and Path(fixtures) / "data/bccd", help="BCCD's folder")
    parser.add_argument("--weights", type=Path, default=fixtures and Path(fixtures) / "weights/yolov5n.pt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, help="epochs of each contender, at least 2 (default 6; 4 with --quick)")
    parser.add_argument("--yolov5", type=Path, metavar="PATH", help="a YOLOv5 checkout to run in turn with ours")
    parser.add_argument(
        "--yolov5-python", default=sys.executable, metavar="FILE", help="interpreter for it (default this one)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer epochs: about a minute")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    if options.epochs is not None and options.epochs < 2:
        parser.error(f"--epochs: got {options.epochs}; allowed: 2 or more, of which the first warms up")
    if options.yolov5 and not (options.yolov5 / "train.py").is_file():
        parser.error(f"--yolov5: {options.yolov5} holds no train.py; give the folder of a YOLOv5 checkout")
    if options.yolov5 and shutil.which(options.yolov5_python) is None:
        parser.error(f"--yolov5-python: {options.yolov5_python} is no program")
    if not options.data or not options.weights:
        parser.error("--data and --weights are needed where YOLOSEARCH_FIXTURES does not name their folder")
    return options


def main() -> None:
    options = parse()
    config = TrainConfig(
        model="n",
        data=(options.data / "bccd.yaml" if options.data.is_dir() else options.data).resolve(),
        weights=options.weights.resolve(),
        image_size=IMAGE_SIZE,
        batch_size=BATCH_SIZE,
        epochs=30,
        device=options.device,
        workers=0,
    )
    epochs = options.epochs or (4 if options.quick else 6)
    supported = supported_precisions(resolve_device(config.device))
    precisions = [precision for precision in ("fp32", "bf16") if precision in supported]
    rows, validation = compare(config, precisions, epochs)
    ratios = {p: rows[f"ours {p}"]["step"] / rows[PLAIN]["step"] for p in precisions}
    result: dict[str, Any] = {"milliseconds": rows, "validation_seconds": validation, "ratio": ratios}
    result["validation_ratio"] = {p: validation[f"ours {p}"] / validation[PLAIN] for p in precisions}
    result["yolov5_elsewhere"] = {"milliseconds": YOLOV5_MS, "validation_seconds": YOLOV5_VALIDATION_SECONDS}
    if options.yolov5:
        checkout = Checkout(options.yolov5.resolve(), options.yolov5_python)
        seconds = against_yolov5(checkout, config, precisions, epochs)
        result["seconds_per_epoch"] = seconds
        result["ratio_to_yolov5"] = {p: seconds[f"ours {p}"] / seconds["yolov5"] for p in precisions}
    if options.json:
        print(json.dumps(result))
        return
    print_table(rows, validation)
    if options.yolov5:
        print("seconds per epoch: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()))
        against = result["ratio_to_yolov5"]
        print("epoch against YOLOv5's train.py: " + ", ".join(f"{p} {r:.2f}" for p, r in against.items()))
    validations = result["validation_ratio"]
    print("validation against the plain trainer: " + ", ".join(f"{p} {r:.2f}" for p, r in validations.items()))
    print("step against the plain trainer: " + ", ".join(f"{p} {r:.2f}" for p, r in ratios.items()))


if __name__ == "__main__":
    main()
