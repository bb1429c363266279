"""From a split to batches: image cache, training stream, rectangular validation batches, worker processes.

The training stream is a function of (stream seed, epoch, image index): each sample has its own generator, so worker
processes, prefetching and the place in the batch change nothing.
"""

import logging
import os
import signal
import tempfile
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from yolocore.data.augment import (
    AugmentSettings,
    Float32Array,
    LoadedImage,
    UInt8Array,
    draw_sample,
    letterbox,
    plan_letterbox,
    resize_to_fit,
    resized_shape,
    to_corners,
    to_fractions,
    to_planes,
    training_sample,
)
from yolocore.data.dataset import LabelledImage, Split
from yolocore.data.images import read_image
from yolocore.data.sampling import draw_images, image_weights
from yolocore.errors import DatasetError
from yolocore.host import CACHE_VARIABLE, cache_folder, cached_file, memory_share, use_short_socket_folder

if TYPE_CHECKING:
    from yolocore.hyperparameters import Hyperparameters

CacheMode = Literal["ram", "disk", "none"]

TARGET_ROWS = 32
"""Targets are padded to a multiple of this, so that shapes repeat from batch to batch."""
VALIDATION_PAD = 0.5
RECT_STRIDE = 32
_PREFETCHED = 2
_RAM_MARGIN = 1.1
_log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What maps boxes of a network input back to the native image."""

    native: tuple[int, int]
    """(height, width) in pixels."""
    gain: float
    """Loaded height / native height; YOLOv5 divides both axes by it."""
    pad: tuple[float, float]
    """Letterbox shift (x, y) in pixels of the network input."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Images and targets as the trainer and the evaluation take them."""

    images: Tensor
    """uint8 [B, 3, H, W], RGB; divide by 255 on the device."""
    targets: Tensor
    """float32 [T, 6]: image in the batch, class, x, y, w, h as fractions; padding rows have image -1."""
    infos: tuple[ImageInfo, ...] = ()
    """One per image; only for validation."""
    index: tuple[int, ...] = ()
    """Position of each image in the split."""

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, from which copies to a CUDA device need not wait."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())


def pad_targets(labels: Sequence[Float32Array]) -> Tensor:
    """Join the labels of a batch.

    Args:
        labels: One float32 [n, 5] (class, x, y, w, h) per image.

    Returns:
        float32 [T, 6], T a positive multiple of `TARGET_ROWS`; padding rows have image -1 and zeros.
    """
    count = sum(len(rows) for rows in labels)
    total = max(1, -(-count // TARGET_ROWS)) * TARGET_ROWS
    targets = np.zeros((total, 6), dtype=np.float32)
    targets[:, 0] = -1
    if count:
        targets[:count, 0] = np.repeat(np.arange(len(labels)), [len(rows) for rows in labels])
        targets[:count, 1:] = np.concatenate(labels)
    return torch.from_numpy(targets)


# ------------------------------------------------------------------------------------------- images


class ImageCache:
    """The images of a split, resized for loading, decoded once if they are kept.

    ``ram`` decodes everything at once and keeps the resized pixels: in memory, or with `shared` in an unlinked-at-exit
    temporary file that worker processes map too. ``disk`` keeps the decoded native images as ``.npy`` files in
    `yolocore.host.cache_folder`, which any number of processes may share.
    """

    def __init__(
        self,
        images: Sequence[LabelledImage],
        image_size: int,
        cache: CacheMode = "none",
        *,
        augmenting: bool,
        shared: bool = False,
        memory: int | None = None,
    ) -> None:
        """Decode the images if they are to be kept.

        Args:
            images: The images of a split.
            image_size: Longer side after loading, in pixels.
            cache: Where decoded images are kept.
            augmenting: Whether they are for training (decides the interpolation).
            shared: Whether other processes will read them.
            memory: Bytes that ``ram`` may take, else nothing is kept; None: this trainer's share of the host's.

        Raises:
            DatasetError: An image cannot be decoded (``ram``).
            InputError: There is no folder to keep images in (``disk``).
        """
        self._images = tuple(images)
        self._image_size = image_size
        self._augmenting = augmenting
        self._shapes = tuple(resized_shape(item.size, image_size) for item in self._images)
        self._offsets = np.concatenate(([0], np.cumsum([3 * h * w for h, w in self._shapes], dtype=np.int64)))
        self.mode: CacheMode = self._affordable(cache, memory_share() if memory is None else memory)
        self._folder = cache_folder() if self.mode == "disk" else None
        self._file: Path | None = None
        self._pixels: UInt8Array | None = None
        if self.mode == "ram":
            self._fill(shared)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> UInt8Array:
        """A resized image, uint8 [h, w, 3] BGR; do not write to it."""
        if self._pixels is None and self._file is not None:
            self._pixels = np.memmap(self._file, dtype=np.uint8, mode="r")
        if self._pixels is not None:
            return self._slot(self._pixels, index)
        return self._load(index)

    def labels(self) -> list[Float32Array]:
        """The labels of every image."""
        return [item.labels for item in self._images]

    def labelled(self, index: int) -> LoadedImage:
        """An image with its labels.

        Args:
            index: Position in the split.

        Returns:
            The resized image, its labels as fractions and its polygons.
        """
        item = self._images[index]
        return LoadedImage(self[index], item.labels, item.polygons)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the file anew instead of receiving a copy of every pixel.
        state = dict(self.__dict__)
        if self._file is not None:
            state["_pixels"] = None
        return state

    def _affordable(self, cache: CacheMode, available: int | None) -> CacheMode:
        needed = int(self._offsets[-1] * _RAM_MARGIN)
        if cache == "ram" and available is not None and needed > available:
            have = (needed / 1e9, available / 1e9)
            _log.warning("cache ram: %.1f GB needed, %.1f GB may be taken; images are read anew", *have)
            return "none"
        return cache

    def _fill(self, shared: bool) -> None:
        total = max(1, int(self._offsets[-1]))
        if shared:
            handle, name = tempfile.mkstemp(prefix="yolosearch-images-")
            os.close(handle)
            self._file = Path(name)
            weakref.finalize(self, self._file.unlink, missing_ok=True)
            pixels: UInt8Array = np.memmap(self._file, dtype=np.uint8, mode="w+", shape=(total,))
        else:
            pixels = np.empty(total, dtype=np.uint8)

        def decode(index: int) -> None:
            self._slot(pixels, index)[...] = self._load(index)

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(decode, range(len(self._images))):
                pass
        self._pixels = pixels

    def _slot(self, pixels: UInt8Array, index: int) -> UInt8Array:
        height, width = self._shapes[index]
        return pixels[self._offsets[index] : self._offsets[index + 1]].reshape(height, width, 3)

    def _load(self, index: int) -> UInt8Array:
        item = self._images[index]
        native = read_image(item.image) if self._folder is None else _read_through_disk(item.image, self._folder)
        height, width = native.shape[:2]
        if (height, width) != item.size:
            raise DatasetError(
                f"{item.image}: image is {width}x{height} pixels now and was {item.size[1]}x{item.size[0]} "
                "when the data set was scanned",
            )
        return resize_to_fit(native, self._image_size, augmenting=self._augmenting)


def _read_through_disk(path: Path, folder: Path) -> UInt8Array:
    """The native image from its ``.npy`` file, which is written if it is missing."""
    try:
        kept = cached_file(folder, path)
        return np.asarray(np.load(kept, allow_pickle=False), dtype=np.uint8)
    except (OSError, ValueError, EOFError):
        pass  # not there yet, or damaged, by a full disk perhaps: written anew
    image = read_image(path)
    kept = cached_file(folder, path)
    try:
        kept.parent.mkdir(exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".new-", dir=kept.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                np.save(stream, image, allow_pickle=False)
            Path(temporary).replace(kept)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DatasetError(
            f"{kept}: cannot keep the decoded image ({error.strerror or error}); "
            f"allowed: cache ram or none, or another folder in {CACHE_VARIABLE}",
        ) from None
    return image


# ------------------------------------------------------------------------------------------- sources of batches


class _Source(Protocol):
    """Makes the batch of a key; pickled into the worker processes."""

    def make(self, key: Any) -> Batch: ...


@dataclass(frozen=True, slots=True)
class _Epoch:
    """What the batches of a training epoch have in common."""

    number: int
    class_weights: tuple[float, ...] | None = None
    """With image weights: by which the images of the epoch are drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _TrainSource:
    cache: ImageCache
    settings: AugmentSettings
    image_size: int
    stream_seed: int
    drawn: "dict[_Epoch, list[int]]" = field(default_factory=dict)
    """The images of the last weighted epoch."""

    def make(self, key: "tuple[_Epoch, PlannedBatch]") -> Batch:
        epoch, batch = key
        rows = self.rows(epoch)
        samples = [self.sample(epoch.number, rows, place, batch.shape) for place in batch.index]
        images = torch.from_numpy(np.stack([image for image, _ in samples]))
        index = tuple(rows[place] for place in batch.index)
        return Batch(images=images, targets=pad_targets([labels for _, labels in samples]), index=index)

    def rows(self, epoch: _Epoch) -> Sequence[int]:
        """The split's images as this epoch sees it, by place: all of them, or a weighted draw with replacement.

        Worker processes draw for themselves: a few numbers travel to them, and no list of images.
        """
        if epoch.class_weights is None:
            return range(len(self.cache))
        if epoch not in self.drawn:
            weights = image_weights(self.cache.labels(), np.array(epoch.class_weights))
            self.drawn.clear()
            self.drawn[epoch] = draw_images(weights, sample_generator(self.stream_seed, epoch.number, -1))
        return self.drawn[epoch]

    def sample(
        self, epoch: int, rows: Sequence[int], place: int, shape: tuple[int, int]
    ) -> tuple[UInt8Array, Float32Array]:
        # By place: an image that was drawn twice is augmented in two ways, and mosaics are made of what was drawn.
        rng = sample_generator(self.stream_seed, epoch, place)
        draw = draw_sample(self.settings, place, len(rows), self.image_size, rng)
        return training_sample(lambda other: self.cache.labelled(rows[other]), place, draw, self.settings, shape)


def sample_generator(stream_seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample; index -1 is that of the epoch's order.

    Args:
        stream_seed: Not negative.
        epoch: From 0.
        index: Position of the image in the split.

    Returns:
        A fresh generator.
    """
    # NumPy pads seeds with zeros, so [s, e] and [s, e, 0] would be the same: index 0 must not be seeded with 0.
    return np.random.default_rng([stream_seed, epoch, index + 1])


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """Which images make a batch, and how large it is."""

    index: tuple[int, ...]
    """Positions in the split."""
    shape: tuple[int, int]
    """(height, width) of the network input in pixels."""


def plan_rect_batches(
    sizes: Sequence[tuple[int, int]],
    batch_size: int,
    image_size: int,
    *,
    stride: int = RECT_STRIDE,
    pad: float = VALIDATION_PAD,
) -> tuple[PlannedBatch, ...]:
    """Group images by aspect ratio and give each group the smallest fitting input.

    Args:
        sizes: Native (height, width) per image.
        batch_size: Images per batch.
        image_size: Longer side of the loaded images in pixels.
        stride: Inputs are a multiple of this.
        pad: Extra cells before rounding up; 0.5 for validation, 0 for training.

    Returns:
        The batches in ascending order of height / width; ties keep the images' order.
    """
    aspect = np.array([height / width for height, width in sizes])
    order = np.argsort(aspect, kind="stable")
    batches = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        lowest, highest = aspect[rows].min(), aspect[rows].max()
        ratio = (highest, 1.0) if highest < 1 else (1.0, 1 / lowest) if lowest > 1 else (1.0, 1.0)
        height, width = (np.ceil(np.array(ratio) * image_size / stride + pad).astype(int) * stride).tolist()
        batches.append(PlannedBatch(index=tuple(rows.tolist()), shape=(height, width)))
    return tuple(batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ValSource:
    cache: ImageCache
    sizes: tuple[tuple[int, int], ...]

    def make(self, key: PlannedBatch) -> Batch:
        samples = [self.sample(row, key.shape) for row in key.index]
        return Batch(
            images=torch.from_numpy(np.stack([image for image, _, _ in samples])),
            targets=pad_targets([labels for _, labels, _ in samples]),
            infos=tuple(info for _, _, info in samples),
            index=key.index,
        )

    def sample(self, row: int, shape: tuple[int, int]) -> tuple[UInt8Array, Float32Array, ImageInfo]:
        item = self.cache.labelled(row)
        height, width = item.image.shape[:2]
        plan = plan_letterbox((height, width), shape, scale_up=False)
        boxes = to_corners(item.labels, (plan.ratio * height, plan.ratio * width), plan.pad)
        info = ImageInfo(native=self.sizes[row], gain=height / self.sizes[row][0], pad=plan.pad)
        return to_planes(letterbox(item.image, plan)), to_fractions(boxes, shape), info


# ------------------------------------------------------------------------------------------- running a source


class _BatchDataset(Dataset[Batch | str]):
    """What runs in a worker process: the key comes from the sampler."""

    def __init__(self, source: _Source) -> None:
        self.source = source

    def __getitem__(self, key: Any) -> Batch | str:
        # An exception would come back wrapped in a traceback: the message of a user's mistake travels as a value.
        try:
            return self.source.make(key)
        except DatasetError as error:
            return str(error)


class _Keys:
    """The sampler: yields whatever keys were set last."""

    def __init__(self) -> None:
        self.keys: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def _as_it_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer ends its workers


class _Pipeline:
    """Turns keys into batches, here or in worker processes, in order."""

    def __init__(self, source: _Source, workers: int, pin_memory: bool) -> None:
        self.source = source
        self.workers = workers
        self.pin_memory = pin_memory
        self._keys = _Keys()
        self._loader: DataLoader[Batch | str] | None = None

    def run(self, keys: Sequence[Any]) -> Iterator[Batch]:
        if self.workers:
            return self._from_processes(keys)
        return self._from_thread(keys) if self.pin_memory else map(self.source.make, keys)

    def close(self) -> None:
        self._loader = None

    def _from_thread(self, keys: Sequence[Any]) -> Iterator[Batch]:
        # With a GPU the host waits most of the time: one thread fills that time, OpenCV and NumPy release the GIL.
        def make(key: Any) -> Batch:
            return self.source.make(key).pin_memory()

        waiting: deque[Future[Batch]] = deque()
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="yolosearch-batches")
        try:
            for key in keys:
                waiting.append(pool.submit(make, key))
                if len(waiting) > _PREFETCHED:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _from_processes(self, keys: Sequence[Any]) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = self._start()
        self._keys.keys = keys
        for item in self._loader:
            if isinstance(item, str):
                raise DatasetError(item)
            yield item

    def _start(self) -> "DataLoader[Batch | str]":
        use_short_socket_folder()
        return DataLoader(
            _BatchDataset(self.source),
            batch_size=None,
            sampler=self._keys,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory,
            worker_init_fn=_start_worker,
            # spawn: a fork would inherit the threads and the CUDA context of the trainer
            multiprocessing_context="spawn",
            persistent_workers=True,
            # its own generator, else every epoch would advance torch's global one, but only with workers
            generator=torch.Generator(),
        )


# ------------------------------------------------------------------------------------------- the loaders


class TrainLoader:
    """The training stream of a split: a function of (stream seed, epoch, image), whatever `workers` is."""

    def __init__(
        self,
        split: Split,
        hyp: "Hyperparameters | AugmentSettings",
        image_size: int,
        batch_size: int,
        stream_seed: int,
        cache: CacheMode = "ram",
        workers: int = 0,
        *,
        pin_memory: bool = False,
        rect: bool = False,
        images: ImageCache | None = None,
    ) -> None:
        """Prepare the stream; with ``cache="ram"`` decode every image.

        Args:
            split: The images.
            hyp: Augmentation keys.
            image_size: Side of the square samples in pixels.
            batch_size: Images per batch, at most all; the last batch of an epoch may be smaller.
            stream_seed: Not negative.
            cache: Where decoded images are kept.
            workers: Worker processes; 0 makes batches in this process.
            pin_memory: Whether batches go to a CUDA device.
            rect: Whether each batch holds images of like aspect ratio, letterboxed as little as possible: every epoch
                the same batches in the same order, and no mosaic.
            images: A cache to reuse, made for the same split and size with ``augmenting=True``.

        Raises:
            DatasetError: An image cannot be decoded.
        """
        self.images = images or ImageCache(split.images, image_size, cache, augmenting=True, shared=workers > 0)
        self.batch_size = min(batch_size, len(self.images))
        self._split = split
        settings = hyp if isinstance(hyp, AugmentSettings) else AugmentSettings.from_hyperparameters(hyp)
        sizes = [item.size for item in split.images]
        self._rect = plan_rect_batches(sizes, self.batch_size, image_size, pad=0.0) if rect else ()
        self._source = _TrainSource(
            cache=self.images,
            settings=replace(settings, mosaic=0.0) if rect else settings,
            image_size=image_size,
            stream_seed=stream_seed,
        )
        self._pipeline = _Pipeline(self._source, workers, pin_memory)

    @property
    def runs_beside(self) -> bool:
        """Whether batches are made by other threads or processes while the model trains."""
        return self._pipeline.workers > 0 or self._pipeline.pin_memory

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self.images) // self.batch_size)

    def epoch(self, epoch: int, class_weights: Sequence[float] | None = None) -> Iterator[Batch]:
        """The batches of one epoch.

        Args:
            epoch: From 0; epochs may be asked for in any order, one at a time.
            class_weights: [C]; the epoch's images are then drawn with replacement, each by the sum over its labels.

        Returns:
            `len(self)` batches.

        Raises:
            DatasetError: An image cannot be read (while iterating).
        """
        shared = _Epoch(epoch, None if class_weights is None else tuple(class_weights))
        return self._pipeline.run([(shared, batch) for batch in self._rect or self._shuffled(shared)])

    def _shuffled(self, epoch: _Epoch) -> list[PlannedBatch]:
        rows = list(range(len(self.images)))
        if epoch.class_weights is None:  # else what stands at each place is random
            rows = sample_generator(self._source.stream_seed, epoch.number, -1).permutation(len(rows)).tolist()
        shape = (self._source.image_size, self._source.image_size)
        starts = range(0, len(rows), self.batch_size)
        return [PlannedBatch(tuple(rows[at : at + self.batch_size]), shape) for at in starts]

    def restarted(self, hyp: "Hyperparameters | AugmentSettings", stream_seed: int) -> "TrainLoader":
        """Another stream over the same decoded images.

        Args:
            hyp: Augmentation keys.
            stream_seed: Not negative.

        Returns:
            A new loader; close this one first if it has worker processes.
        """
        return TrainLoader(
            self._split,
            hyp,
            self._source.image_size,
            self.batch_size,
            stream_seed,
            workers=self._pipeline.workers,
            pin_memory=self._pipeline.pin_memory,
            rect=bool(self._rect),
            images=self.images,
        )

    def close(self) -> None:
        """Stop the worker processes; the next epoch starts new ones."""
        self._pipeline.close()


class ValLoader:
    """The rectangular validation batches of a split: no augmentation, no shuffling, no upscaling."""

    def __init__(
        self,
        split: Split,
        image_size: int,
        batch_size: int,
        cache: CacheMode = "ram",
        workers: int = 0,
        *,
        pin_memory: bool = False,
    ) -> None:
        """Plan the batches; with ``cache="ram"`` decode every image.

        Args:
            split: The images.
            image_size: Longer side of the loaded images in pixels.
            batch_size: Images per batch; YOLOv5 takes twice the training's.
            cache: Where decoded images are kept.
            workers: Worker processes; 0 makes batches in this process.
            pin_memory: Whether batches go to a CUDA device.

        Raises:
            DatasetError: An image cannot be decoded.
        """
        self.images = ImageCache(split.images, image_size, cache, augmenting=False, shared=workers > 0)
        sizes = tuple(item.size for item in split.images)
        self.batches = plan_rect_batches(sizes, min(batch_size, len(sizes)), image_size)
        self._pipeline = _Pipeline(_ValSource(cache=self.images, sizes=sizes), workers, pin_memory)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        """The batches, the same ones each time."""
        return self._pipeline.run(self.batches)

    def close(self) -> None:
        """Stop the worker processes; the next pass starts new ones."""
        self._pipeline.close()
