"""The study file: what is searched, how each trial is trained, and for how long.

`load_study_config` reads a YAML file into a frozen `StudyConfig` or raises one `StudyConfigError` whose message has one
line per mistake: file and line, dotted key, value, what is allowed. The shape (types, bounds, unknown keys) is the
business of pydantic; what a combination of keys means is checked by the small functions at the end.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from search.data_facts import PREPARED_KEY, DataFacts
from search.errors import StudyConfigError, StudyConflictError
from search.ranges import OWN_BASE, POWER_KEY, RATIO_KEYS, default_space, expanded_space, widened
from search.settings import (
    CLASS_AP,
    METRICS,
    NAME_OR_MAPPING,
    AshaPruner,
    CmaesSampler,
    FidelityConfig,
    GpSampler,
    GridSampler,
    HyperbandPruner,
    MedianPruner,
    NoiseConfig,
    NonePruner,
    Nsga2Sampler,
    Number,
    ObjectiveConfig,
    PatientPruner,
    PrunerConfig,
    QmcSampler,
    RandomSampler,
    SamplerConfig,
    Section,
    SpaceEntry,
    StopConfig,
    ThresholdPruner,
    TpeSampler,
    TrackingConfig,
    TrainSettings,
    Whole,
    allowed_text,
    choice_list,
    named,
    objective_list,
    objective_terms,
    on_grid,
    path_or_mapping,
)
from yolocore.errors import WEIGHTS_SOURCE, HyperparameterError
from yolocore.hyperparameters import (
    HYPERPARAMETER_KEYS,
    IGNORED_KEYS,
    PER_CLASS_KEY,
    RANGES,
    SHARED_KEYS,
    Hyperparameters,
)

if TYPE_CHECKING:
    from yolocore.training.config import TrainConfig

BUDGET_KEYS = frozenset({"trials", "timeout", "noise.seeds", "stop.hours", "stop.below_noise"})
"""What may change when a study is resumed."""

FORMER_DEFAULTS: Mapping[str, object] = {"pack": 4, "workers": 0, "patience": 0}
"""What keys of `train` that a study file left out once stood for; 0 is what trainings did before there was patience."""

MOST_RERUN_SEEDS = 1000
RERUN_SEEDS, CONFIRM_TOP = 5, 3
"""How many seeds reruns have, and how many trials are confirmed, unless the user says otherwise."""
NO_OFF_SAMPLERS = ("gp", "cmaes", "nsga2", "grid")
"""They need every key in every trial, so that none can be off."""
"""More are not worth training."""

STUDY_WIDE_KEYS = frozenset({"pack", "autoanchor", "keep_weights"})
"""Keys of `train` that are settled before a training starts."""

BUILTIN_DATA = ("digits",)
"""Data sets that `data: builtin:NAME` can name."""


class StudyConfig(Section):
    """A study file, checked and frozen; paths are absolute."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
            json_schema_extra=allowed_text(
                "1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit"
            ),
        ),
    ]
    """Name of the study, its folder and its experiment."""
    data: Annotated[
        str, Field(min_length=1, json_schema_extra=allowed_text("the path of a data set YAML, or builtin:digits"))
    ]
    """Data set YAML, or `builtin:NAME`."""
    train: TrainSettings = TrainSettings()
    """How every trial is trained."""
    base_hyp: Annotated[
        Path | dict[str, Any] | None,
        PlainValidator(path_or_mapping),
        Field(json_schema_extra=allowed_text("the path of a hyp YAML, or a mapping of hyp keys to numbers")),
    ] = None
    """Trial 0, and the value of every key that is not searched."""
    space: dict[str, Annotated[SpaceEntry, BeforeValidator(choice_list)]] = Field(default_factory=default_space)
    """The searched keys; without it the six loss weights, each with its default range."""
    parametrisation: Literal["raw", "ratios"] = "raw"
    """Search the gains box, obj and cls as they are, or as one scale and their ratios to obj."""
    sampler: Annotated[
        SamplerConfig, BeforeValidator(named), Field(json_schema_extra=allowed_text(NAME_OR_MAPPING))
    ] = TpeSampler(name="tpe")
    """Who proposes."""
    pruner: Annotated[PrunerConfig, BeforeValidator(named), Field(json_schema_extra=allowed_text(NAME_OR_MAPPING))] = (
        MedianPruner(name="median")
    )
    """Who stops hopeless trials."""
    fidelity: FidelityConfig | None = None
    """A cheap training with a frozen backbone that a trial has to pass first; none by default."""
    trials: Annotated[Whole, Field(ge=1)]
    """Number of trials, the base (trial 0) included."""
    timeout: Annotated[Number, Field(gt=0)] | None = None
    """Seconds after which no new trial starts."""
    stop: StopConfig = StopConfig()
    """When the study ends before its budget is spent."""
    objective: Annotated[
        ObjectiveConfig,
        BeforeValidator(objective_terms),
        Field(
            json_schema_extra=allowed_text(
                f"{', '.join(METRICS)}, {CLASS_AP}NAME, or a mapping of these to weights > 0"
            )
        ),
    ] = ObjectiveConfig()
    """What is maximised; of several objectives the first."""
    objectives: Annotated[
        tuple[ObjectiveConfig, ...],
        BeforeValidator(objective_list),
        Field(json_schema_extra=allowed_text(f"a list of two or more of {', '.join(METRICS)}, {CLASS_AP}NAME")),
    ] = ()
    """Two or more things to maximise at once, in place of `objective`."""
    max_failures_in_a_row: Annotated[Whole, Field(ge=1)] = 5
    """The study stops after so many failed trials in a row."""
    noise: NoiseConfig = NoiseConfig()
    """Reruns of the base, to know what a difference is worth."""
    tracking: TrackingConfig = TrackingConfig()
    """Where MLflow records."""
    _facts: DataFacts | None = PrivateAttr(None)

    @property
    def facts(self) -> DataFacts | None:
        """What its space needs to know of the data; None unless it comes from the database and needs something."""
        return self._facts

    @property
    def builtin_data(self) -> str | None:
        """Name of the built-in data set, or None if `data` is a path."""
        return self.data.removeprefix("builtin:") if self.data.startswith("builtin:") else None

    def data_path(self, runs_dir: Path) -> Path:
        """The data set YAML; a built-in data set lies in `runs_dir/data/NAME/NAME.yaml` once it is written."""
        name = self.builtin_data
        return runs_dir / "data" / name / f"{name}.yaml" if name else Path(self.data)

    def base_hyperparameters(self) -> Hyperparameters:
        """The base hyp: the preset for training from scratch, changed by `base_hyp`."""
        if isinstance(self.base_hyp, Path):
            return Hyperparameters.from_yaml(self.base_hyp)
        return Hyperparameters.from_mapping(self.base_hyp or {}, "base_hyp")

    @property
    def all_objectives(self) -> tuple[ObjectiveConfig, ...]:
        """What is maximised: one objective, or several at once."""
        return self.objectives or (self.objective,)

    @property
    def base_is_default(self) -> bool:
        """Whether the base is YOLOv5's preset, however the study file says so."""
        return self.base_hyperparameters() == Hyperparameters()

    @property
    def base_name(self) -> str:
        """What the base is called in running text: the defaults, unless the study has a base of its own."""
        return "the defaults" if self.base_is_default else "the base"

    def objective_text(self) -> str:
        """What is maximised, in words."""
        if not self.objectives:
            return self.objective.describe()
        names = [objective.name for objective in self.objectives]
        return f"{', '.join(names[:-1])} and {names[-1]} at the last epoch"

    def evaluated_epochs(self) -> tuple[int, ...]:
        """The epochs after which a trial is evaluated, counted from 1: the study-wide grid of pruning decisions."""
        every = self.train.eval_every
        return (*range(every, self.train.epochs, every), self.train.epochs)

    def train_config(self, data: Path) -> "TrainConfig":
        """What the trainer needs, on the given data set YAML."""
        from yolocore.training.config import TrainConfig

        return TrainConfig(data=data, **self.train.model_dump(exclude=set(STUDY_WIDE_KEYS)))

    def to_json(self) -> dict[str, Any]:
        """The frozen form: plain JSON data with the whole base hyp in it, independent of any file but the data's."""
        return {**self.model_dump(mode="json"), "base_hyp": self.base_hyperparameters().to_document()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StudyConfig":
        """The inverse of `to_json`; needs none of the files to exist."""
        own = {key: value for key, value in data.items() if key != PREPARED_KEY}
        if "train" in own and "patience" not in own["train"]:
            own["train"] = {**own["train"], "patience": FORMER_DEFAULTS["patience"]}
        config = parse_study(own, source=f"study {data.get('name')} in the database")
        config._facts = DataFacts.of(data)
        return config

    def differing_keys(self, other: "StudyConfig") -> list[str]:
        """Dotted keys whose values differ, those of the budget included."""
        mine, theirs = _flatten(self.to_json()), _flatten(other.to_json())
        return [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]


def load_study_config(path: Path) -> StudyConfig:
    """Read and check a study file.

    Args:
        path: the YAML file; relative paths in it are relative to its folder.

    Raises:
        StudyConfigError: one line per mistake, each naming file and line, dotted key, value and what is allowed.
    """
    data, lines = _read_yaml(path)
    return parse_study(data, source=str(path), folder=path.resolve().parent, lines=lines)


def parse_study(
    data: object, *, source: str, folder: Path | None = None, lines: Mapping[str, int] | None = None
) -> StudyConfig:
    """Check the content of a study file.

    Args:
        data: what the YAML holds.
        source: what to call it in an error.
        folder: where relative paths start; without it no file has to exist (a worker on another host).
        lines: line of each dotted key, to name it in an error.

    Raises:
        StudyConfigError: one line per mistake.
    """
    if not isinstance(data, dict):
        kind = "nothing" if data is None else f"a {type(data).__name__}"
        raise StudyConfigError(f"{source}: holds {kind}; allowed: a mapping with name, data, space, trials, ...")
    space, left_open = expanded_space(data.get("space"), data.get("parametrisation"))
    data = {**data, "space": space}
    problems = list(_check_keys(data))
    if problems:
        raise StudyConfigError("\n".join(problem.line(source, lines or {}) for problem in problems))
    config: StudyConfig | None = None
    try:
        config = StudyConfig.model_validate(data)
    except ValidationError as error:
        problems = [_from_pydantic(details) for details in _without_echoes(error.errors())]
    if config is not None:
        problems = list(_check_two_objectives(config, data))
        config = _with_leading_objective(_with_absolute_paths(config, folder))
        config = _with_first_rung(config, chosen="pruner" in data)
        config = _with_base_inside(config, left_open)
        problems += _check_meaning(config, check_files=folder is not None)
    if problems or config is None:
        raise StudyConfigError("\n".join(problem.line(source, lines or {}) for problem in problems))
    return config


def require_resumable(stored: StudyConfig, asked: StudyConfig) -> None:
    """Refuse to resume a study with anything changed but its budget.

    A key that the file leaves out may stand for what it stood for when the study was created.

    Raises:
        StudyConflictError: one line per differing key, with both values.
    """
    mine, theirs = _flatten(stored.to_json()), _flatten(asked.to_json())
    lines = [
        f"study {stored.name}: {key}: got {_show(theirs.get(key))}, the database has {_show(mine.get(key))}; "
        f"allowed: changes of {', '.join(sorted(BUDGET_KEYS))} only, anything else is a study with another name"
        for key in stored.differing_keys(asked)
        if key not in BUDGET_KEYS and not _is_former_default(key, stored, asked)
    ]
    if lines:
        raise StudyConflictError("\n".join(lines))


def _is_former_default(key: str, stored: StudyConfig, asked: StudyConfig) -> bool:
    section, _, name = key.partition(".")
    if section != "train" or name not in FORMER_DEFAULTS or name in asked.train.model_fields_set:
        return False
    return bool(getattr(stored.train, name) == FORMER_DEFAULTS[name])


def check_objective(config: StudyConfig, names: Sequence[str], labelled: Sequence[int] | None = None) -> None:
    """Check the classes that the objective names against a data set.

    Args:
        config: the study.
        names: the data set's class names.
        labelled: indices of the classes that have labels in the validation split, where known.

    Raises:
        StudyConfigError: a class that the data set does not have, or that cannot be evaluated.
    """
    for name in dict.fromkeys(name for objective in config.all_objectives for name in objective.class_names()):
        key = f"study {config.name}: objective{'s' if config.objectives else ''}: {CLASS_AP}{name}"
        if name not in names:
            raise StudyConfigError(
                f"{key}: no class of the data set{_closest(name, names)}; allowed: {', '.join(names)}"
            )
        if labelled is not None and list(names).index(name) not in labelled:
            having = ", ".join(names[index] for index in sorted(labelled)) or "none"
            raise StudyConfigError(
                f"{key}: no labels in the validation split; allowed: a class that has some ({having})"
            )


def objective_value(objective: ObjectiveConfig, metrics: Mapping[str, float], names: Sequence[str]) -> float:
    """The value of one evaluated epoch.

    Args:
        objective: the weighted metrics.
        metrics: `DetectionMetrics.to_mapping()`; class APs are called `class_ap/<index>`.
        names: the data set's class names.

    Returns:
        The weighted sum. A class without any entry counts 0: that it has labels is checked before the start.
    """
    total = 0.0
    for term, weight in objective.weights.items():
        if term.startswith(CLASS_AP):
            total += weight * metrics.get(f"class_ap/{list(names).index(term.removeprefix(CLASS_AP))}", 0.0)
        else:
            total += weight * metrics[term]
    return total


def objective_values(config: StudyConfig, metrics: Mapping[str, float], names: Sequence[str]) -> tuple[float, ...]:
    """The values of one evaluated epoch under several objectives; () in a study of one.

    Args:
        config: the study.
        metrics: as for `objective_value`.
        names: the data set's class names.
    """
    return tuple(objective_value(objective, metrics, names) for objective in config.objectives)


# ---- reading YAML ----------------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> tuple[object, dict[str, int]]:
    """The content of a YAML file and the line of each dotted key; a key that stands twice is an error."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StudyConfigError(f"{path}: no such study file; allowed: the path of a study YAML") from None
    except UnicodeDecodeError:
        raise StudyConfigError(f"{path}: not a text file; allowed: YAML in UTF-8") from None
    except OSError as error:
        raise StudyConfigError(f"{path}: cannot be read: {error.strerror}; allowed: a readable study YAML") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise StudyConfigError(_syntax_message(path, error)) from None
    except ValueError as error:  # for example a timestamp with month 13
        raise StudyConfigError(f"{path}: not valid YAML: {error}; allowed: a mapping of keys to values") from None
    lines: dict[str, int] = {}
    duplicates = [] if root is None else list(_walk(root, "", lines))
    if duplicates:
        raise StudyConfigError("\n".join(problem.line(str(path), {}) for problem in duplicates))
    return data, lines


def _syntax_message(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f":{mark.line + 1}" if mark else ""
    what = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{path}{place}: not valid YAML: {what}; allowed: 'key: value' lines, indented by spaces"


def _walk(node: yaml.Node, prefix: str, lines: dict[str, int]) -> Iterator["Problem"]:
    """Note the line of every key below `node` and yield the keys that stand twice."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            key, line = f"{prefix}{name}", key_node.start_mark.line + 1
            if name in seen:
                yield Problem(key, f"stands twice, in lines {seen[name]} and {line}", "each key once", at_line=line)
            seen.setdefault(name, line)
            lines.setdefault(key, line)
            yield from _walk(value_node, f"{key}.", lines)


# ---- problems --------------------------------------------------------------------------------------------------------


def _check_keys(data: Mapping[Any, Any], prefix: str = "") -> Iterator["Problem"]:
    """YAML reads `3:`, `on:` and `2026-01-01:` as keys that are no text."""
    for key, value in data.items():
        if not isinstance(key, str):
            yield Problem(f"{prefix}{key}", f"YAML reads this key as {type(key).__name__}", "text (put it in quotes)")
        elif isinstance(value, dict):
            yield from _check_keys(value, f"{prefix}{key}.")


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a study file."""

    key: str
    """Dotted key."""
    found: str
    """What is wrong, with the value."""
    allowed: str
    at_line: int | None = None

    def line(self, source: str, lines: Mapping[str, int]) -> str:
        """The mistake in one line."""
        number = self.at_line
        key = re.sub(r"\[\d+\]$", "", self.key)
        while number is None and key:
            number = lines.get(key)
            key = key.rpartition(".")[0]
        place = f"{source}:{number}" if number else source
        return " ".join(f"{place}: {self.key}: {self.found}; allowed: {self.allowed}".split())


def _show(value: object) -> str:
    """A value as YAML would write it, shortened and without a password."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = re.sub(r"://[^/@\s]*@", "://***@", text)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _closest(name: object, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


def _flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


SAMPLERS: dict[str, type[Section]] = {
    "tpe": TpeSampler,
    "gp": GpSampler,
    "cmaes": CmaesSampler,
    "nsga2": Nsga2Sampler,
    "random": RandomSampler,
    "qmc": QmcSampler,
    "grid": GridSampler,
}
PRUNERS: dict[str, type[Section]] = {
    "none": NonePruner,
    "median": MedianPruner,
    "asha": AshaPruner,
    "hyperband": HyperbandPruner,
    "threshold": ThresholdPruner,
    "patient": PatientPruner,
}


def _section_of(place: Sequence[str | int]) -> type[Section] | None:
    """The section that holds the last part of pydantic's location."""
    match list(place[:-1]):
        case []:
            return StudyConfig
        case ["train"]:
            return TrainSettings
        case ["space", _]:
            return SpaceEntry
        case ["sampler", tag]:
            return SAMPLERS.get(str(tag))
        case ["pruner", tag] | ["pruner", "patient", "wrapped", tag]:
            return PRUNERS.get(str(tag))
        case ["objective"]:
            return ObjectiveConfig
        case ["fidelity"]:
            return FidelityConfig
        case ["noise"]:
            return NoiseConfig
        case ["stop"]:
            return StopConfig
        case ["tracking"]:
            return TrackingConfig
    return None


def _dotted(place: Sequence[str | int]) -> str:
    """Pydantic's location as the user would write it: without the tags of sampler and pruner."""
    parts: list[str] = []
    previous: str | int = ""
    for part in place:
        if isinstance(part, int) and parts:
            parts[-1] += f"[{part}]"
        elif not (previous in ("sampler", "pruner", "wrapped") and part in {**SAMPLERS, **PRUNERS}):
            parts.append(str(part))
        previous = part
    return ".".join(parts)


def _without_echoes(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Drop `data: missing` where `dat: unknown key, did you mean data?` says it all."""
    unknown = [error["loc"] for error in errors if error["type"] == "extra_forbidden"]
    return [
        error
        for error in errors
        if error["type"] != "missing"
        or not any(
            place[:-1] == error["loc"][:-1] and _closest(place[-1], [str(error["loc"][-1])]) for place in unknown
        )
    ]


def _from_pydantic(error: ErrorDetails) -> Problem:
    place, value, kind = error["loc"], error["input"], error["type"]
    key = _dotted(place)
    if place[:2] == ("objective", "weights"):
        key = ".".join(["objective", *map(str, place[2:])])
    if place[:1] == ("objectives",):
        allowed = _describe(StudyConfig.model_fields["objectives"])
        return Problem(key.replace(".weights", ""), f"got {_show(value)}", allowed)
    section = _section_of(place)
    if kind == "extra_forbidden" and section is not None:
        names = sorted(section.model_fields, key=lambda name: name != "name")
        return Problem(key, f"unknown key (value {_show(value)}){_closest(place[-1], names)}", ", ".join(names))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _tag_problem(key, value)
    field = _field(place)
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return Problem(key, f"got {_show(value)}", _describe(field) if field else "a mapping of keys to values")
    if kind == "missing":
        return Problem(key, "missing", f"{_describe(field)} (required)" if field else "a value (required)")
    return Problem(key, f"got {_show(value)}", _describe(field) if field else str(error["msg"]))


def _tag_problem(key: str, value: object) -> Problem:
    names = list(SAMPLERS) if key == "sampler" else list(PRUNERS)
    if key.endswith("wrapped"):
        names = [name for name in names if name not in ("none", "patient")]
    if isinstance(value, dict):
        found = value.get("name")
        what = f"got {_show(found)}{_closest(found, names)}" if "name" in value else "missing"
        return Problem(f"{key}.name", what, f"one of {', '.join(names)}")
    return Problem(key, f"got {_show(value)}", f"one of {', '.join(names)}, or a mapping with name and options")


def _field(place: Sequence[str | int]) -> FieldInfo | None:
    names = [part for part in place if isinstance(part, str)]
    if place[:2] == ("objective", "weights") and len(place) > 2:
        return FieldInfo.from_annotation(cast("type[Any]", Annotated[float, Field(gt=0)]))
    if place and isinstance(place[-1], int):
        return FieldInfo.from_annotation(float)
    section = _section_of(names)
    return section.model_fields.get(names[-1]) if section else None


def _describe(field: FieldInfo) -> str:
    """What a field allows, in words, from its own declaration."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    return _in_words(field.annotation, field.metadata)


def _in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, such as `a whole number >= 1`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, UnionType):
        return " or ".join(_in_words(option, metadata) for option in arguments if option is not NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return "a list of numbers"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return " ".join([names.get(annotation, "a mapping of keys to values"), " and ".join(_bounds(metadata))]).strip()


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("multiple_of", "a multiple of")):
            if not isinstance(item, FieldInfo) and getattr(item, name, None) is not None:
                yield f"{sign} {getattr(item, name):g}"


# ---- completing and checking -----------------------------------------------------------------------------------------


def _with_absolute_paths(config: StudyConfig, folder: Path | None) -> StudyConfig:
    if folder is None:
        return config
    changes: dict[str, Any] = {}
    if config.builtin_data is None:
        changes["data"] = str(_absolute(folder, Path(config.data)))
    if isinstance(config.base_hyp, Path):
        changes["base_hyp"] = _absolute(folder, config.base_hyp)
    if config.train.weights is not None:
        changes["train"] = config.train.model_copy(update={"weights": _absolute(folder, config.train.weights)})
    return config.model_copy(update=changes)


def _absolute(folder: Path, path: Path) -> Path:
    return (folder / path.expanduser()).resolve()


def _with_base_inside(config: StudyConfig, left_open: frozenset[str]) -> StudyConfig:
    """Stretch the ranges that the file leaves open to have the base inside; one that cannot be read is named later."""
    try:
        base = config.base_hyperparameters()
    except HyperparameterError:
        return config
    return config.model_copy(update={"space": widened(config.space, left_open, base)})


def usual_first_rung(epochs: int, every: int = 1) -> int:
    """A fifth of a trial's epochs, on the grid of those that are evaluated."""
    return math.ceil(max(1, epochs / 5) / every) * every


def _with_first_rung(config: StudyConfig, *, chosen: bool) -> StudyConfig:
    """Fill `pruner.min_epochs`: a fifth of the epochs, on the grid of evaluated epochs.

    A study too short to prune anything, or of several objectives, falls back to no pruner, unless its file asks for
    one.
    """
    pruner, every = config.pruner, config.train.eval_every
    if config.objectives and not chosen:
        return config.model_copy(update={"pruner": NonePruner(name="none")})
    if isinstance(pruner, NonePruner):
        return config
    first = pruner.min_epochs or usual_first_rung(config.train.epochs, every)
    if not chosen and first >= config.train.epochs:
        return config.model_copy(update={"pruner": NonePruner(name="none")})
    changes: dict[str, Any] = {"min_epochs": first}
    if isinstance(pruner, PatientPruner) and pruner.wrapped is not None and pruner.wrapped.min_epochs is None:
        changes["wrapped"] = pruner.wrapped.model_copy(update={"min_epochs": first})
    return config.model_copy(update={"pruner": pruner.model_copy(update=changes)})


def _check_meaning(config: StudyConfig, *, check_files: bool) -> Iterator[Problem]:
    if check_files:
        yield from _check_files(config)
    elif config.builtin_data is not None and config.builtin_data not in BUILTIN_DATA:
        yield _unknown_builtin(config)
    yield from _check_train(config)
    yield from _check_space(config)
    yield from _check_base(config)
    yield from _check_sampler(config)
    yield from _check_pruner(config)
    yield from _check_fidelity(config)
    yield from _check_objective(config)
    yield from _check_noise(config)
    yield from _check_tracking(config)


def _unknown_builtin(config: StudyConfig) -> Problem:
    return Problem(
        "data", f"got {_show(config.data)}", " or ".join(f"builtin:{name}" for name in BUILTIN_DATA) + ", or a path"
    )


def _check_files(config: StudyConfig) -> Iterator[Problem]:
    if config.builtin_data is None:
        if not Path(config.data).is_file():
            yield Problem("data", f"got {_show(config.data)}, no such file", "a data set YAML, or builtin:digits")
    elif config.builtin_data not in BUILTIN_DATA:
        yield _unknown_builtin(config)
    if config.train.weights is not None and not config.train.weights.is_file():
        found = f"got {_show(config.train.weights)}, no such file; {WEIGHTS_SOURCE}"
        yield Problem(
            "train.weights", found, "an existing .pt or .safetensors file, or no key at all to train from scratch"
        )
    if isinstance(config.base_hyp, Path) and not config.base_hyp.is_file():
        yield Problem("base_hyp", f"got {_show(config.base_hyp)}, no such file", "a hyp YAML, or a mapping of hyp keys")


def _check_train(config: StudyConfig) -> Iterator[Problem]:
    train = config.train
    if train.eval_every > train.epochs:
        yield Problem("train.eval_every", f"got {train.eval_every}", f"1 to train.epochs ({train.epochs})")
    if train.rect and train.image_weights:
        yield Problem("train.rect", "got true with train.image_weights, which draws images anew", "one of the two")
    if train.compile != "none" and (train.multi_scale or train.rect):
        other = "multi_scale" if train.multi_scale else "rect"
        yield Problem("train.compile", f"got {train.compile} with train.{other}, of many sizes", "one of the two")


def _check_space(config: StudyConfig) -> Iterator[Problem]:
    if not config.space:
        yield Problem("space", "is empty", "at least one hyp key, such as box: {low: 0.02, high: 0.2, log: true}")
    for name, entry in config.space.items():
        key = f"space.{name}"
        if name in IGNORED_KEYS:
            yield Problem(key, "does nothing in YOLOv5, searching it is a waste", "a hyp key that has an effect")
        elif name not in (names := _search_keys(config)):
            yield _unknown_search_key(config, name, names)
        else:
            yield from [*_check_limits(key, name, entry)] or [*_check_entry(key, entry)] or _check_off(key, name, entry)
    gains = {*RATIO_KEYS, *RATIO_KEYS.values()}
    if config.parametrisation == "ratios" and config.space and not set(config.space) & gains:
        yield Problem("parametrisation", 'got "ratios" with no gain in the space', "obj with box, cls or both")


def _search_keys(config: StudyConfig) -> tuple[str, ...]:
    """What may stand in `space`."""
    ratios = config.parametrisation == "ratios"
    gains = frozenset(RATIO_KEYS.values()) if ratios else frozenset()
    plain = [key for key in HYPERPARAMETER_KEYS if key not in IGNORED_KEYS | gains]
    return (*plain, POWER_KEY, *(RATIO_KEYS if ratios else ()))


def _unknown_search_key(config: StudyConfig, name: str, names: Sequence[str]) -> "Problem":
    key, ratios = f"space.{name}", ", ".join(RATIO_KEYS)
    if name in RATIO_KEYS:
        return Problem(key, "is a key of parametrisation ratios", "parametrisation: ratios, or box, obj and cls")
    if config.parametrisation == "ratios" and name in RATIO_KEYS.values():
        allowed = f"default, with obj among them, or ranges of {ratios}"
        return Problem(key, "has a range of its own with parametrisation ratios", allowed)
    return Problem(key, f"unknown hyp key{_closest(name, names)}", ", ".join(names))


def _check_off(key: str, name: str, entry: SpaceEntry) -> Iterator["Problem"]:
    if entry.off is not None:
        if entry.choices is not None:
            yield Problem(key, "has choices and off", "either 0 among the choices, or off with low and high")
        elif name in OWN_BASE or RANGES[name][0] > 0:
            yield Problem(f"{key}.off", f"got {entry.off:g}, and {name} has no off", "a key that may be 0")
        elif entry.low is not None and entry.low <= 0:
            yield Problem(f"{key}.low", f"got {entry.low:g} with off", "low > 0 (0 is what off stands for)")
    if entry.compensate and name != "fl_gamma":
        yield Problem(f"{key}.compensate", "got true", "true at fl_gamma only")


def _check_limits(key: str, name: str, entry: SpaceEntry) -> Iterator[Problem]:
    smallest, largest = RANGES.get(name) or ((0.0, 3.0) if name == POWER_KEY else (1e-3, 1e3))
    values = [("low", entry.low), ("high", entry.high)]
    values += [(f"choices[{index}]", choice) for index, choice in enumerate(entry.choices or ())]
    for part, value in values:
        if value is not None and not smallest <= value <= largest:
            yield Problem(f"{key}.{part}", f"got {value:g}", f"a number from {smallest:g} to {largest:g}")


def _check_entry(key: str, entry: SpaceEntry) -> Iterator[Problem]:
    low, high, step = entry.low, entry.high, entry.step
    if entry.choices is not None:
        others = [part for part in ("low", "high", "step", "log") if getattr(entry, part) not in (None, False)]
        if others:
            yield Problem(key, f"has choices and {', '.join(others)}", "either choices, or low and high")
        if len(entry.choices) < 2 or len(set(entry.choices)) < len(entry.choices):
            yield Problem(f"{key}.choices", f"got {_show(list(entry.choices))}", "at least two different numbers")
        return
    if low is None or high is None:
        missing = " and ".join(part for part, value in (("low", low), ("high", high)) if value is None)
        yield Problem(key, f"{missing} missing", "low and high, or choices")
    elif low >= high:
        yield Problem(key, f"low {low:g}, high {high:g}", "low < high (a fixed value belongs into base_hyp)")
    elif entry.log and low <= 0:
        yield Problem(f"{key}.low", f"got {low:g} with log: true", "low > 0 on a logarithmic scale")
    elif entry.log and step is not None:
        yield Problem(f"{key}.step", f"got {step:g} with log: true", "either log or step")
    elif step is not None and not on_grid(high, low, step):
        yield Problem(f"{key}.step", f"got {step:g}", f"a step that divides high - low = {high - low:g}")


def _check_base(config: StudyConfig) -> Iterator[Problem]:
    if isinstance(config.base_hyp, Path) and not config.base_hyp.is_file():
        return
    problems = list(_check_base_keys(config.base_hyp or {}))
    yield from problems
    if problems:
        return
    hyp = config.base_hyperparameters()
    base = {**hyp.to_mapping(), **OWN_BASE}
    if POWER_KEY in config.space and hyp.cls_pw_per_class is not None:
        yield Problem(f"space.{POWER_KEY}", "with cls_pw_per_class in base_hyp", "a base without weights per class")
    if "fl_gamma" in config.space and config.space["fl_gamma"].compensate and base["fl_gamma"] > 0:
        yield Problem("space.fl_gamma.compensate", f"with {base['fl_gamma']:g} in base_hyp", "a base with fl_gamma 0")
    for name, entry in config.space.items():
        sound = name in base and not [*_check_entry(name, entry)]
        if sound and not entry.contains(base[name]):
            yield Problem(
                f"space.{name}", f"the base value {base[name]:g} is not in {entry.describe()}", _base_advice(name)
            )


def _check_base_keys(base_hyp: Path | Mapping[str, Any]) -> Iterator[Problem]:
    if isinstance(base_hyp, Path):
        try:
            Hyperparameters.from_yaml(base_hyp)
        except HyperparameterError as error:
            found, _, allowed = str(error).partition("; ")
            yield Problem("base_hyp", found, re.sub(r"^allowed (is|are) ", "", allowed) or "a hyp YAML")
        return
    for name, value in base_hyp.items():
        key = f"base_hyp.{name}"
        if name not in (*HYPERPARAMETER_KEYS, "anchors", PER_CLASS_KEY):
            hint = _closest(name, HYPERPARAMETER_KEYS)
            yield Problem(key, f"unknown hyp key (value {_show(value)}){hint}", ", ".join(HYPERPARAMETER_KEYS))
            continue
        try:
            Hyperparameters.from_mapping({name: value}, "base_hyp")
        except HyperparameterError:
            low, high = RANGES["cls_pw" if name == PER_CLASS_KEY else name]
            yield Problem(key, f"got {_show(value)}", f"a number from {low:g} to {high:g}")


def _base_advice(name: str) -> str:
    return f"values that include the base, which is trial 0; widen space.{name} or set base_hyp.{name}"


def _check_sampler(config: StudyConfig) -> Iterator[Problem]:
    name = config.sampler.name
    if name in NO_OFF_SAMPLERS and (key := next(iter(conditional_keys(config)), None)):
        found = f"has off, and sampler {name} cannot search a key that is not always there"
        yield Problem(f"space.{key}", found, "sampler tpe, random or qmc, or choices with 0 among them")
    elif name == "grid":
        yield from _check_grid(config)
    if name == "cmaes":
        for key, entry in config.space.items():
            if entry.choices is not None:
                yield Problem(
                    f"space.{key}", "has choices, which cmaes cannot search", "low and high, or another sampler"
                )
        if len(config.space) == 1:
            yield Problem(
                "sampler.name", 'got "cmaes" with one searched key', "cmaes with two keys or more, or another sampler"
            )


def _check_grid(config: StudyConfig) -> Iterator[Problem]:
    size = 1
    for key, entry in config.space.items():
        values = entry.grid() if not [*_check_entry(key, entry)] else ()
        if values is None:
            yield Problem(
                f"space.{key}", f"{entry.describe()} has no end for sampler grid", "choices, or low, high and step"
            )
        size *= len(values or ())
    if 0 < size < config.trials:
        yield Problem("trials", f"got {config.trials}", f"1 to {size}, the number of combinations of sampler grid")


def _check_pruner(config: StudyConfig) -> Iterator[Problem]:
    pruner, train = config.pruner, config.train
    if isinstance(pruner, NonePruner):
        return
    parts: list[tuple[str, Any]] = [("pruner", pruner)]
    if isinstance(pruner, PatientPruner) and pruner.wrapped is not None:
        parts.append(("pruner.wrapped", pruner.wrapped))
    for key, part in parts:
        first = part.min_epochs or 0
        if first >= train.epochs:
            yield Problem(
                f"{key}.min_epochs", f"got {first}", f"less than train.epochs ({train.epochs}), or pruner: none"
            )
        elif first % train.eval_every:
            yield Problem(f"{key}.min_epochs", f"got {first}", f"a multiple of train.eval_every ({train.eval_every})")
        if isinstance(part, ThresholdPruner):
            yield from _check_threshold(key, part)


def _check_threshold(key: str, pruner: ThresholdPruner) -> Iterator[Problem]:
    if pruner.lower is None and pruner.upper is None:
        yield Problem(key, "threshold without limits", "lower, upper or both")
    elif pruner.lower is not None and pruner.upper is not None and pruner.lower >= pruner.upper:
        yield Problem(key, f"lower {pruner.lower:g}, upper {pruner.upper:g}", "lower < upper")


def _check_fidelity(config: StudyConfig) -> Iterator[Problem]:
    fidelity, train = config.fidelity, config.train
    if fidelity is None:
        return
    if fidelity.freeze < train.freeze:
        yield Problem("fidelity.freeze", f"got {fidelity.freeze}", f"at least train.freeze ({train.freeze})")
    if train.weights is None:
        found = "without train.weights the frozen layers would keep random weights"
        yield Problem("fidelity", found, "a study that starts from weights, or no fidelity")
    if config.objectives:
        found = "stands beside several objectives, where nothing says which trials are behind"
        yield Problem("fidelity", found, "one of the two")


def _with_leading_objective(config: StudyConfig) -> StudyConfig:
    """Of several objectives the first stands for a trial where there is room for one number, as on its curve."""
    return config.model_copy(update={"objective": config.objectives[0]}) if config.objectives else config


def _check_two_objectives(config: StudyConfig, data: Mapping[str, Any]) -> Iterator[Problem]:
    # The frozen form has both, and they agree.
    if config.objectives and "objective" in data and config.objective != config.objectives[0]:
        yield Problem("objective", "stands beside objectives", "one of the two")


def _check_objective(config: StudyConfig) -> Iterator[Problem]:
    if not config.objectives:
        yield from _check_terms(config, "objective", config.objective)
        return
    for index, objective in enumerate(config.objectives):
        yield from _check_terms(config, f"objectives[{index}]", objective)
        if objective.at != "last":
            yield Problem(f"objectives[{index}]", "got at: best", "at: last; one epoch is seldom the best of all")
    if len(config.objectives) == 1:
        yield Problem("objectives", "names one objective", "two or more, or objective in its place")
    if len({objective.name for objective in config.objectives}) < len(config.objectives):
        yield Problem("objectives", "names one objective twice", "each once")
    if not isinstance(config.pruner, NonePruner):
        found = f"got {_show(config.pruner.name)} with several objectives, where nothing says which trials are behind"
        yield Problem("pruner.name", found, "none, or one objective")
    if config.stop.below_noise:
        yield Problem("stop.below_noise", "got true with several objectives", "false, or one objective")
    if config.sampler.name == "cmaes":
        found = 'got "cmaes", which follows one objective'
        yield Problem("sampler.name", found, "tpe, nsga2, gp, random, qmc or grid with several objectives")


def _check_terms(config: StudyConfig, key: str, objective: ObjectiveConfig) -> Iterator[Problem]:
    if not objective.weights:
        yield Problem(key, "names no metric", f"{', '.join(METRICS)} or {CLASS_AP}NAME")
    for term in objective.weights:
        if config.train.single_cls and term.startswith(CLASS_AP):
            yield Problem(key, f"got {_show(term)} with train.single_cls", ", ".join(METRICS))
        elif term not in METRICS and not (term.startswith(CLASS_AP) and term != CLASS_AP):
            found = f"unknown metric {_show(term)}{_closest(term, METRICS)}"
            yield Problem(key, found, f"{', '.join(METRICS)} or {CLASS_AP}NAME")


def _check_noise(config: StudyConfig) -> Iterator[Problem]:
    seeds = config.noise.seeds
    if seeds == 1 or seeds > MOST_RERUN_SEEDS:
        yield Problem("noise.seeds", f"got {seeds}", _describe(NoiseConfig.model_fields["seeds"]))


def _check_tracking(config: StudyConfig) -> Iterator[Problem]:
    """Passwords must not stand in a file that people share; the line does not repeat it."""
    uri = config.tracking.uri
    if uri is not None and "@" in urlsplit(uri).netloc:
        host = urlsplit(uri).netloc.rpartition("@")[2]
        found = f"got an address of {host} with user name or password"
        yield Problem(
            "tracking.uri", found, "an address without them; put them into the environment (MLFLOW_TRACKING_URI)"
        )


def shared_keys(config: StudyConfig) -> tuple[str, ...]:
    """The searched keys that all slots of a pack must share: only trials of equal values train together."""
    return tuple(key for key in config.space if key in SHARED_KEYS)


def conditional_keys(config: StudyConfig) -> tuple[str, ...]:
    """The searched keys that not every trial has."""
    return tuple(key for key, entry in config.space.items() if entry.off is not None)
