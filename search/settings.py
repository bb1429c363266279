"""The sections of a study file: what each key means, its type, its bounds, its default."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, StrictBool
from pydantic_core import PydanticCustomError

METRICS = ("fitness", "map50", "map", "precision", "recall", "f1")
"""What an objective may weigh, besides `class_ap:NAME`."""

LARGEST_PACK = 64
"""Slots that a pack may have."""

CLASS_AP = "class_ap:"
"""Prefix of the objective terms for the AP (mean over IoU 0.50 to 0.95) of one class."""


def _number(value: object) -> float:
    """A finite float; also from text, because YAML reads `1e-3` as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise PydanticCustomError("number", "not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise PydanticCustomError("number", "not a number") from None
    if not math.isfinite(number):
        raise PydanticCustomError("number", "not finite")
    return number


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PydanticCustomError("whole", "not a whole number")
    return value


def _count_or_auto(value: object) -> object:
    if value != "auto" and _whole(value) < 0:
        raise PydanticCustomError("count", "below 0")
    return value


def pack_size(value: object) -> int | Literal["auto"]:
    """`auto`, or how many."""
    if value == "auto":
        return "auto"
    size = _whole(value)
    if not 1 <= size <= LARGEST_PACK:
        raise PydanticCustomError("pack", "out of range")
    return size


def choice_list(value: object) -> object:
    """`[0.3, 0.5]` is short for `{choices: [0.3, 0.5]}`."""
    return {"choices": value} if isinstance(value, list | tuple) else value


def named(value: object) -> object:
    """`tpe` is short for `{name: tpe}`; an empty value stands for `none`."""
    if value is None:
        return {"name": "none"}
    return {"name": value} if isinstance(value, str) else value


def objective_terms(value: object) -> object:
    """Accepts `fitness`, `{metric: fitness, at: best}` and `{fitness: 0.7, class_ap:cat: 0.3, at: last}`."""
    if isinstance(value, str):
        return {"weights": {value: 1.0}}
    if not isinstance(value, dict) or "weights" in value:
        return value
    terms = {key: term for key, term in value.items() if key != "at"}
    if "metric" in terms:
        if len(terms) > 1 or not isinstance(terms["metric"], str):
            raise PydanticCustomError("objective", "metric stands for one metric's name")
        terms = {terms["metric"]: 1.0}
    return {"weights": terms, **({"at": value["at"]} if "at" in value else {})}


def objective_list(value: object) -> object:
    """Accepts `[fitness, class_ap:cat]`; every entry is what `objective` may be."""
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("objectives", "not a list")
    return [objective_terms(entry) for entry in value]


def path_or_mapping(value: object) -> object:
    """The base hyp: a path, or a mapping whose values the hyp check will look at."""
    if value is None or isinstance(value, Path):
        return value
    if isinstance(value, str) and value:
        return Path(value)
    if isinstance(value, dict):
        return {str(key): _float_text(item) for key, item in value.items()}
    raise PydanticCustomError("base_hyp", "neither a path nor a mapping")


def _float_text(value: object) -> object:
    """Text such as `1e-3` as a number, everything else as it is, so that the hyp check can name it."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def allowed_text(text: str) -> dict[str, Any]:
    """What an error says is allowed, where the type alone does not say it."""
    return {"allowed": text}


NAME_OR_MAPPING = "a name, or a mapping with name and options"

Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_whole)]


class Section(BaseModel):
    """A mapping of the study file: unknown keys are errors, nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class TrainSettings(Section):
    """How every trial is trained."""

    model: Literal["n", "s", "m", "l", "x"] = "n"
    """Size of YOLOv5."""
    weights: Path | None = None
    """Start weights: an official `.pt`, a state-dict `.pt` or a `.safetensors`; none trains from scratch."""
    image_size: Annotated[Whole, Field(ge=32, multiple_of=32)] = 640
    """Side of the square training image, pixels."""
    batch_size: Annotated[Whole, Field(ge=1)] = 16
    """Images per batch; all slots of a pack see the same batch."""
    epochs: Annotated[Whole, Field(ge=1)] = 100
    """Epochs of a trial that is not pruned."""
    seed: Annotated[Whole, Field(ge=0)] = 0
    """Seed of the initialisation and of the image stream."""
    device: Annotated[
        str,
        Field(
            pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
            json_schema_extra=allowed_text("auto, cpu, cuda, cuda:N (N = 0, 1, ...) or mps"),
        ),
    ] = "auto"
    """Where to train."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the network's forward pass; the loss is always computed in float32."""
    compile: Literal["none", "inductor", "cudagraphs"] = "none"
    """torch.compile for the training pass, on a GPU also into CUDA graphs; takes minutes to begin."""
    optimizer: Literal["SGD", "Adam", "AdamW"] = "SGD"
    """Optimiser; hyp files are written for SGD."""
    cos_lr: StrictBool = False
    """Cosine instead of linear learning rate schedule."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Smoothing of the class targets; a training option of YOLOv5, no hyp key."""
    autobalance: StrictBool = False
    """Adapt the objectness balance of the three levels during training."""
    multi_scale: StrictBool = False
    """Every batch at another size, half to one and a half times `image_size`, the same for all slots of a pack."""
    patience: Annotated[Whole, Field(ge=0)] = 100
    """A trial ends early, as COMPLETE, when its fitness has not improved for so many epochs; 0 never."""
    eval_every: Annotated[Whole, Field(ge=1)] = 1
    """Evaluate every so many epochs, and after the last; pruning decides at these epochs."""
    cache: Literal["ram", "disk", "none"] = "ram"
    """Where decoded images are kept."""
    workers: Annotated[
        int | Literal["auto"],
        PlainValidator(_count_or_auto),
        Field(json_schema_extra=allowed_text("auto, or a whole number >= 0")),
    ] = "auto"
    """Loader processes; 0 loads in the trainer itself; auto: 0 on the CPU, else a share of the cores, at most 8."""
    rect: StrictBool = False
    """Batches of images of like shape, letterboxed as little as possible; no mosaic and no shuffling."""
    single_cls: StrictBool = False
    """Train as if all labels were of one class."""
    image_weights: StrictBool = False
    """Draw images by how rare and how badly detected their classes are; trials then train one at a time."""
    autoanchor: StrictBool = True
    """When the study is created, replace the anchors if they do not fit the labels; all trials use the same."""
    freeze: Annotated[Whole, Field(ge=0, le=24)] = 0
    """Layers 0 to freeze - 1 keep their weights; 10 is the backbone, 24 everything but the detection head."""
    freeze_bn: StrictBool = False
    """Frozen layers also keep their BatchNorm statistics; YOLOv5 lets these move."""
    keep_weights: Literal["none", "best", "all"] = "best"
    """Whose trained weights stay: nobody's, those of the base, the best three and what `confirm` reruns, or all."""
    pack: Annotated[
        int | Literal["auto"],
        PlainValidator(pack_size),
        Field(json_schema_extra=allowed_text(f"auto, or a whole number from 1 to {LARGEST_PACK}")),
    ] = "auto"
    """Trials that train together on one device; auto lets each worker measure which number is the fastest."""


class SpaceEntry(Section):
    """The values that one hyp key may take: a range or a list of choices."""

    low: Number | None = None
    """Smallest value."""
    high: Number | None = None
    """Largest value."""
    log: StrictBool = False
    """Search on a logarithmic scale."""
    step: Annotated[Number, Field(gt=0)] | None = None
    """Only values low, low + step, ..., high."""
    choices: tuple[Number, ...] | None = None
    """Only these values, without an order."""
    off: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Search whether the key takes part at all: 0, with this probability before anything is learned, or the range."""
    compensate: StrictBool = False
    """At `fl_gamma`: rescale obj and cls so that their initial losses are as large as without the focal loss."""

    def contains(self, value: float) -> bool:
        """Whether the search could propose `value`."""
        if self.off is not None and value == 0:
            return True
        if self.choices is not None:
            return value in self.choices
        if self.low is None or self.high is None or not self.low <= value <= self.high:
            return False
        return self.step is None or on_grid(value, self.low, self.step)

    def grid(self) -> tuple[float, ...] | None:
        """All values if there are finitely many, else None."""
        if self.choices is not None:
            return self.choices
        if self.step is None or self.low is None or self.high is None:
            return None
        return tuple(self.low + index * self.step for index in range(round((self.high - self.low) / self.step) + 1))

    def describe(self) -> str:
        """The range or the choices in words."""
        off = f", or off (0) with probability {self.off:g}" if self.off is not None else ""
        return f"{self._values()}{off}{', gains compensated' if self.compensate else ''}"

    def _values(self) -> str:
        if self.choices is not None:
            return f"one of {', '.join(f'{choice:g}' for choice in self.choices)}"
        scale = ", logarithmic" if self.log else f" in steps of {self.step:g}" if self.step else ""
        return f"{self.low:g} to {self.high:g}{scale}"


class _Sampler(Section):
    seed: Annotated[Whole, Field(ge=0)] = 0
    """Study-wide seed; each ticket derives its own from it."""


class TpeSampler(_Sampler):
    """Tree-structured Parzen estimator."""

    name: Literal["tpe"]
    n_startup_trials: Annotated[Whole, Field(ge=1)] = 10
    """Random trials before the model is used."""
    n_ei_candidates: Annotated[Whole, Field(ge=1)] = 24
    """Candidates drawn per proposal."""
    multivariate: StrictBool = True
    """Model the keys together."""
    constant_liar: StrictBool = True
    """Keep away from the points that are being tried now."""


class GpSampler(_Sampler):
    """Gaussian process."""

    name: Literal["gp"]
    n_startup_trials: Annotated[Whole, Field(ge=1)] = 10
    """Random trials before the model is used."""
    deterministic_objective: StrictBool = False
    """Treat the objective as free of noise."""


class CmaesSampler(_Sampler):
    """Covariance matrix adaptation, started in the middle of the ranges."""

    name: Literal["cmaes"]
    n_startup_trials: Annotated[Whole, Field(ge=1)] = 1
    """Random trials before the strategy starts."""
    popsize: Annotated[Whole, Field(ge=2)] | None = None
    """Trials per generation."""
    with_margin: StrictBool = False
    """Keep steps from freezing at one value; for spaces with `step`."""
    consider_pruned_trials: StrictBool = False
    """Let pruned trials take part with their last value."""


class Nsga2Sampler(_Sampler):
    """Genetic algorithm."""

    name: Literal["nsga2"]
    population_size: Annotated[Whole, Field(ge=2)] = 20
    """Trials per generation."""
    mutation_prob: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Chance that a key mutates; by default one over the number of keys."""
    crossover_prob: Annotated[Number, Field(ge=0, le=1)] = 0.9
    """Chance that two parents are crossed."""
    swapping_prob: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Chance that a key comes from the second parent."""


class RandomSampler(_Sampler):
    """Independent draws."""

    name: Literal["random"]


class QmcSampler(_Sampler):
    """A low-discrepancy sequence: covers the space evenly."""

    name: Literal["qmc"]
    qmc_type: Literal["sobol", "halton"] = "sobol"
    """Which sequence."""
    scramble: StrictBool = True
    """Randomise the sequence by the seed."""


class GridSampler(_Sampler):
    """Every combination once, the base first, then in an order that the seed shuffles."""

    name: Literal["grid"]


SamplerConfig = Annotated[
    TpeSampler | GpSampler | CmaesSampler | Nsga2Sampler | RandomSampler | QmcSampler | GridSampler,
    Field(discriminator="name"),
]


class NonePruner(Section):
    """Every trial runs to its end."""

    name: Literal["none"]


class _Pruner(Section):
    min_epochs: Annotated[Whole, Field(ge=1)] | None = None
    """First rung: the epochs that every trial gets before pruning may stop it; by default a fifth of `train.epochs`."""


class MedianPruner(_Pruner):
    """Stops a trial whose best value so far is below the median of the others at the same epoch."""

    name: Literal["median"]
    n_startup_trials: Annotated[Whole, Field(ge=0)] = 4
    """Trials that must be complete before any is stopped."""
    n_min_trials: Annotated[Whole, Field(ge=1)] = 1
    """Trials that must have a value at the same epoch."""


class AshaPruner(_Pruner):
    """Asynchronous successive halving: at each rung only the best 1/reduction_factor go on."""

    name: Literal["asha"]
    reduction_factor: Annotated[Whole, Field(ge=2)] = 3
    """Rungs are at min_epochs, times this, times this again, ..."""


class HyperbandPruner(_Pruner):
    """Several successive halvings with different first rungs."""

    name: Literal["hyperband"]
    reduction_factor: Annotated[Whole, Field(ge=2)] = 3
    """As in asha."""


class ThresholdPruner(_Pruner):
    """Stops a trial whose value leaves the given limits."""

    name: Literal["threshold"]
    lower: Number | None = None
    """Stop below this value."""
    upper: Number | None = None
    """Stop above this value."""


class PatientPruner(_Pruner):
    """Stops a trial that has not improved for a while; with `wrapped`, only if that pruner agrees."""

    name: Literal["patient"]
    patience: Annotated[Whole, Field(ge=1)]
    """Evaluated epochs without improvement that are tolerated."""
    min_delta: Annotated[Number, Field(ge=0)] = 0.0
    """Smallest gain that counts as improvement."""
    wrapped: (
        Annotated[
            Annotated[
                MedianPruner | AshaPruner | HyperbandPruner | ThresholdPruner,
                Field(discriminator="name"),
            ],
            BeforeValidator(named),
        ]
        | None
    ) = None
    """A second pruner that must agree."""


PrunerConfig = Annotated[
    NonePruner | MedianPruner | AshaPruner | HyperbandPruner | ThresholdPruner | PatientPruner,
    Field(discriminator="name"),
]


class ObjectiveConfig(Section):
    """What is maximised: a metric, or a weighted sum of metrics."""

    weights: dict[str, Annotated[Number, Field(gt=0)]] = {"fitness": 1.0}
    """Metric to weight."""
    at: Literal["last", "best"] = "last"
    """Which evaluated epoch gives a trial its value."""

    def class_names(self) -> tuple[str, ...]:
        """The classes whose AP takes part."""
        return tuple(term.removeprefix(CLASS_AP) for term in self.weights if term.startswith(CLASS_AP))

    @property
    def name(self) -> str:
        """What is maximised, as `fitness` or `0.7 fitness + 0.3 class_ap:cat`."""
        if list(self.weights.values()) == [1.0]:
            return next(iter(self.weights))
        return " + ".join(f"{weight:g} {term}" for term, weight in self.weights.items())

    def describe(self) -> str:
        """The objective in words, for tables and headers."""
        return f"{self.name} at the {self.at} epoch"


class StopConfig(Section):
    """When the study ends before its budget is spent; running trials go to their ends."""

    hours: Annotated[Number, Field(gt=0)] | None = None
    """Hours after its creation, or after it was taken up again, from which on no new trial starts."""
    below_noise: StrictBool = False
    """Stop once what is left to gain is less than the measured noise of a rerun."""


class FidelityConfig(Section):
    """A cheap training that every trial has to pass before the full one, with the first layers frozen."""

    freeze: Annotated[Whole, Field(ge=1, le=24)] = 10
    """Layers 0 to freeze - 1 keep the start weights; 10 is the backbone."""
    epochs: Annotated[Whole, Field(ge=1)]
    """Length of this training; its learning rate falls to its end within them."""
    reduction_factor: Annotated[Whole, Field(ge=2)] = 3
    """Of all that have a value by then, the best 1/reduction_factor go on to the full training."""
    freeze_bn: StrictBool = True
    """The frozen layers keep their BatchNorm statistics, so that one copy of them serves all slots of a pack."""


class NoiseConfig(Section):
    """How much a rerun of the base varies, measured before the search begins."""

    seeds: Annotated[
        Whole,
        Field(ge=0, json_schema_extra=allowed_text("0 for none, or a number of seeds from 2 to 1000")),
    ] = 0
    """Seeds on which the base is trained, beside the budget of `trials`."""


_PATH_PART = r"[^/\\\x00-\x1f]*[^./\\\x00-\x1f][^/\\\x00-\x1f]*"
"""Of an experiment's name, which also names a folder."""


class TrackingConfig(Section):
    """Where MLflow records."""

    enabled: StrictBool = True
    """Whether to record at all."""
    uri: str | None = None
    """Tracking server or store; by default MLFLOW_TRACKING_URI, else a file beside the studies."""
    experiment: Annotated[
        str | None,
        Field(
            max_length=250,
            pattern=rf"^/?{_PATH_PART}(/{_PATH_PART})*$",
            json_schema_extra=allowed_text(
                "1 to 250 characters, with '/' between parts that are neither empty nor all dots; no '\\'"
            ),
        ),
    ] = None
    """Experiment's name; by default the study's."""
    review: StrictBool = True
    """Draw plots, the report and pictures of the best trials into MLflow, by a process of low priority."""


def on_grid(value: float, low: float, step: float) -> bool:
    """Whether `value` is low plus a whole number of steps, as Optuna counts."""
    steps = (value - low) / step
    return abs(steps - round(steps)) < 1e-8
