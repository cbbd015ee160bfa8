"""Settings that a user writes: YAML read safely into typed, immutable sections; every error is one line."""

import difflib
import os
import re
import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from flash_stu.errors import UserError, why_not_text
from flash_stu.reading import read_text

LARGEST_COUNT = 10**9  # of steps, documents, items: more than anybody can wait for
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
LARGEST_SEED = 2**63 - 1
_LONGEST_INTEGER = 1024  # bits; Python refuses to print much longer ones
_LARGEST_DOCUMENT = 100_000  # nodes, aliases written out: a short file of nested aliases can stand for billions


def expand(path: str) -> str:
    """Returns a path with a leading `~` or `~user` replaced by that home directory.

    Raises:
        UserError: if there is no such home directory.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{path}: there is no home directory {path.split('/')[0]}; write ./{path} for a name with ~")
    return expanded


ExpandedPath = Annotated[str, AfterValidator(expand)]


class Section(BaseModel):
    """A part of a file of settings: no unknown keys, no silent conversions, finite numbers, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        if isinstance(value, str) and (problem := why_not_text(value)):
            raise ValueError(problem)
        return value


def read_yaml(path: str | Path, label: str) -> Any:
    """Read a YAML file as `parse_yaml` does.

    Raises:
        UserError: if it cannot be read, or as `parse_yaml`.
    """
    return parse_yaml(read_text(path, label), f"{label} {path}")


def parse_yaml(text: str, source: str) -> Any:
    """Read YAML without running anything that it names.

    Args:
        text: the document.
        source: what a message calls it.

    Returns:
        mappings with strings as keys, lists and single values.

    Raises:
        UserError: if it is not valid, or absurdly deep or large.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise UserError(f"{source}: not valid YAML{line}: {problem}") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 3e-4 is a number and a repeated key an error."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _size(node, {}) > _LARGEST_DOCUMENT:
            raise yaml.constructor.ConstructorError(
                problem=f"more than {_LARGEST_DOCUMENT} values, aliases written out", problem_mark=node.start_mark
            )
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > _LONGEST_INTEGER:
                raise ValueError(f"an integer of {value.bit_length()} bits")
            return value
        except (ValueError, OverflowError) as error:  # of int, datetime and base64
            problem = str(error).partition(";")[0]
        except (AttributeError, KeyError):  # of a tag that does not fit its value
            problem = f"{shown(node.value)} is not {node.tag.rpartition(':')[2]}"
        raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):  # as the tag !!map says of any node
            return super().construct_mapping(node, deep)
        own = [key.value for key, _ in node.value if key.tag == "tag:yaml.org,2002:str"]
        repeated = {key for key in own if own.count(key) > 1}
        if repeated:
            raise yaml.constructor.ConstructorError(
                problem=f"repeated key {shown(min(repeated))}", problem_mark=node.start_mark
            )
        self.flatten_mapping(node)
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {shown(key.value) if isinstance(key.value, str) else 'there'} is not a string",
                    problem_mark=key.start_mark,
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Returns how many values a node stands for, each alias counted as what it repeats."""
    if id(node) not in known:
        known[id(node)] = _LARGEST_DOCUMENT + 1  # of a node that contains itself
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def shown(value: Any) -> str:
    """Returns a value as a message shows it: `repr`, shortened."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def override(settings: dict[str, Any], text: str) -> None:
    """Apply one "section.key=value", the value in YAML, to nested settings in place.

    Raises:
        UserError: for another form, or a section that is a single value.
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"override {shown(text)}: expected section.key=value")
    for part in parts[:-1]:
        if settings.get(part) is None:
            settings[part] = {}
        settings = settings[part]
        if not isinstance(settings, dict):
            raise UserError(f"override {shown(text)}: {part} is a single value, not a section")
    settings[parts[-1]] = parse_yaml(value, f"override {shown(text)}")


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def first_problem(error: ValidationError, root: str = "") -> str:
    """Returns the first of pydantic's complaints as "key: problem"; root stands for the key of the whole."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"])) or root
    return " ".join(f"{key and key + ': '}{first['msg']}".split())


def describe(error: ValidationError, root: type[Section] | None = None) -> str:
    """Returns one line for the first of pydantic's complaints: the key, its value and what is allowed.

    Names similar to an unknown one are suggested if the settings that were validated are given.
    """
    first = error.errors()[0]
    if first["type"] == "extra_forbidden" and root is not None:
        return _describe_unknown(".".join(map(str, first["loc"])), root)
    key, value = ".".join(str(part) for part in first["loc"] if isinstance(part, str)), shown(first["input"])
    context = first.get("ctx", {})
    match first["type"]:
        case "missing":
            return f"missing setting {key}"
        case "value_error" if isinstance(context["error"], UserError):  # of a check that names its keys
            return str(context["error"])
        case "value_error":
            return f"{key} is {value}; {context['error']}"
        case "literal_error":
            return f"{key} is {value}; allowed: {context['expected']}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{key} is {value}; it is a section, a mapping of settings"
    return f"{key} is {value}; {first['msg'][0].lower()}{first['msg'][1:]}"


def _describe_unknown(key: str, root: type[Section]) -> str:
    known = _dotted_names(root)
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    elsewhere = [k for k in known if k.rpartition(".")[2] == name]
    close = elsewhere or [siblings[match] for match in difflib.get_close_matches(name, siblings, n=1)]
    hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(siblings.values())}"
    return f"unknown setting {key}; {hint}"


def _dotted_names(root: type[BaseModel]) -> list[str]:
    """Returns the names of all settings, sections included."""
    names = []
    for name, field in root.model_fields.items():
        names.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += [f"{name}.{key}" for key in field.annotation.model_fields]
    return names
