"""The study file as JSON Schema, so that editors complete its keys and mark mistakes.

Made from the models of the study file, short forms included. What a combination of keys means is checked by `yolosearch
check` only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from inspect import getsource
from re import DOTALL, MULTILINE, findall
from typing import Any

from search.config import StudyConfig
from search.ranges import DEFAULT, OWN_KEYS, PER_CLASS
from search.settings import CLASS_AP, LARGEST_PACK, METRICS
from yolocore.hyperparameters import HYPERPARAMETER_KEYS, IGNORED_KEYS, PER_CLASS_KEY, RANGES, Hyperparameters

SCHEMA_FILE = "study.schema.json"
"""What `init` calls the file beside a study file."""

Schema = dict[str, Any]

_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "multiple_of": "multipleOf",
}


def study_schema() -> Schema:
    """The schema of study files (draft 2020-12): plain data."""
    schema = StudyConfig.model_json_schema()
    definitions, properties = schema["$defs"], schema["properties"]
    definitions["TrainSettings"]["properties"]["pack"] |= _auto_or_count(1, LARGEST_PACK)
    definitions["TrainSettings"]["properties"]["workers"] |= _auto_or_count(0)
    properties["base_hyp"] |= {"anyOf": [{"type": "string"}, _hyp_mapping(), {"type": "null"}]}
    for node in list(_nodes(schema)):
        _translate(node)
    for node in list(_nodes(schema)):
        _add_short_forms(node, definitions)
    properties["space"] = _space(properties["space"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "yolosearch study file",
        "description": "A study of YOLOv5's loss weights; `yolosearch check STUDY.yaml` says what it will do.",
    }


def schema_text() -> str:
    """The schema as a file has it."""
    return json.dumps(study_schema(), indent=2, ensure_ascii=False) + "\n"


def hyp_descriptions() -> Mapping[str, str]:
    """What each hyp key means, in the words of `Hyperparameters`."""
    found = dict(
        findall(r'^    (\w+): float = [^\n]+\n    """(.*?)"""', getsource(Hyperparameters), DOTALL | MULTILINE)
    )
    return {key: " ".join(found[key].split()) for key in HYPERPARAMETER_KEYS}


def _nodes(node: object) -> Iterator[Schema]:
    """Every mapping of the schema, inner ones first."""
    if isinstance(node, list):
        for item in node:
            yield from _nodes(item)
    if isinstance(node, dict):
        for key, item in node.items():
            if key != "default":
                yield from _nodes(item)
        yield node


def _translate(node: Schema) -> None:
    """Bounds in JSON Schema's words, what pydantic adds for itself left out, and what is allowed into the text."""
    for name, word in _BOUNDS.items():
        if isinstance(node.get(name), int | float):
            node[word] = node.pop(name)
    if isinstance(node.get("title"), str):
        del node["title"]
    if isinstance(allowed := node.get("allowed"), str):
        del node["allowed"]
        node["description"] = " ".join(filter(None, [node.get("description"), f"Allowed: {allowed}."]))
    if isinstance(node.get("default"), dict | list):
        del node["default"]


def _add_short_forms(node: Schema, definitions: Mapping[str, Schema]) -> None:
    """The forms that the study file takes besides the full mapping."""
    if isinstance(tags := node.pop("discriminator", None), dict):
        names = {name: definitions[place.rpartition("/")[2]] for name, place in tags["mapping"].items()}
        bare = [name for name, options in names.items() if options.get("required") == ["name"]]
        node["anyOf"] = [{"enum": bare}, *node.pop("oneOf"), *([{"type": "null"}] if "none" in bare else [])]
    elif node.get("$ref") == "#/$defs/SpaceEntry":
        choices = {"type": "array", "items": {"type": "number"}, "minItems": 2}
        node["anyOf"] = [{"$ref": node.pop("$ref")}, choices, {"enum": [DEFAULT, None]}]
    elif node.get("$ref") == "#/$defs/ObjectiveConfig":
        node["anyOf"] = [_metric(), _one_metric(), _weighted_metrics(), {"$ref": node.pop("$ref")}]


def _auto_or_count(low: int, high: int | None = None) -> Schema:
    bounds = {"minimum": low} | ({} if high is None else {"maximum": high})
    return {"anyOf": [{"const": "auto"}, {"type": "integer", **bounds}]}


def _hyp_mapping() -> Schema:
    """Hyp keys to numbers."""
    texts = hyp_descriptions()
    numbers = {
        key: {"type": "number", "minimum": RANGES[key][0], "maximum": RANGES[key][1], "description": texts[key]}
        for key in HYPERPARAMETER_KEYS
    }
    per_class = {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}}
    others = {"anchors": {"description": "Read by YOLOv5 only."}, PER_CLASS_KEY: per_class}
    return {"type": "object", "properties": {**numbers, **others}, "additionalProperties": False}


def _space(space: Schema) -> Schema:
    """The keys that can be searched, each with its meaning; a list of them; or nothing."""
    entry = space.pop("additionalProperties")
    texts = {**hyp_descriptions(), **OWN_KEYS}
    keys = [key for key in texts if key not in IGNORED_KEYS]
    properties = {key: {"description": texts[key], **entry} for key in keys}
    properties["cls_pw"] = {**properties["cls_pw"], "anyOf": [*entry["anyOf"], {"const": PER_CLASS}]}
    mapping = {"properties": properties, "additionalProperties": False, "minProperties": 1}
    names = {"items": {"enum": keys}, "minItems": 1}
    return {"description": space["description"], "type": ["object", "array", "null"], **mapping, **names}


def _metric() -> Schema:
    return {"anyOf": [{"enum": list(METRICS)}, {"type": "string", "pattern": f"^{CLASS_AP}.+"}]}


def _one_metric() -> Schema:
    at = {"enum": ["last", "best"]}
    properties = {"metric": _metric(), "at": at}
    return {"type": "object", "properties": properties, "required": ["metric"], "additionalProperties": False}


def _weighted_metrics() -> Schema:
    weight = {"type": "number", "exclusiveMinimum": 0}
    return {
        "type": "object",
        "properties": {**dict.fromkeys(METRICS, weight), "at": {"enum": ["last", "best"]}},
        "patternProperties": {f"^{CLASS_AP}.+": weight},
        "additionalProperties": False,
    }
