"""The table of all settings of a run: name, type, default, allowed values and description, generated from the code."""

import inspect
import re
from typing import Any, NamedTuple

import yaml
from pydantic import TypeAdapter

from flash_stu.model.config import BOUNDS, CHOICES, LAYER_TYPES, FlashSTUConfig
from flash_stu.training.run_config import RunConfig


class Setting(NamedTuple):
    """One setting; default and allowed values are written as in YAML, a missing default is empty."""

    name: str
    kind: str
    default: str
    allowed: str
    description: str


class SettingsSection(NamedTuple):
    """A section of the run config; the settings outside of sections have an empty name."""

    name: str
    description: str
    settings: list[Setting]


def list_settings() -> list[SettingsSection]:
    """Returns all settings, in the order of the run config."""
    schema = RunConfig.model_json_schema()
    top = SettingsSection("", "Outside of the sections.", [])
    sections = [top]
    for name, entry in schema["properties"].items():
        if name == "model":
            sections.append(_model_section())
        elif "$ref" in entry:
            section = schema["$defs"][entry["$ref"].rpartition("/")[2]]
            settings = [_setting(f"{name}.{key}", value) for key, value in section["properties"].items()]
            sections.append(SettingsSection(name, section["description"], settings))
        else:
            top.settings.append(_setting(name, entry))
    return sections


def as_text() -> str:
    """Returns the table for a terminal."""
    blocks = []
    for section in list_settings():
        lines = [f"{section.name or 'top level'}: {section.description}"]
        for setting in section.settings:
            allowed = f"; allowed: {setting.allowed}" if setting.allowed else ""
            lines.append(f"  {setting.name}  {setting.kind}; default: {setting.default or 'none'}{allowed}")
            lines.append(f"      {setting.description}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_markdown() -> str:
    """Returns docs/config.md."""
    blocks = [
        "# Settings\n\nWritten by `python scripts/docs.py` from the code; `python train.py --list-settings` prints "
        "the same. A run config is a YAML file with these sections, see configs/; `section.key=value` on the command "
        "line overrides it. A setting without a default must be given."
    ]
    for section in list_settings():
        rows = ["| setting | type | default | allowed | description |", "|---|---|---|---|---|"]
        for setting in section.settings:
            default = f"`{setting.default}`" if setting.default else "none"
            cells = f"`{setting.name}`", setting.kind, default, setting.allowed, setting.description
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        blocks.append(f"## {section.name or 'top level'}\n\n{section.description}\n\n" + "\n".join(rows))
    return "\n\n".join(blocks) + "\n"


def _model_section() -> SettingsSection:
    """Returns the settings of FlashSTUConfig, with the descriptions of its docstring."""
    summary, _, arguments = inspect.cleandoc(FlashSTUConfig.__doc__ or "").partition("\n\nArgs:\n")
    descriptions = {
        name: " ".join(text.split()).replace("None", "null")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", arguments, re.MULTILINE)
    }
    settings = []
    for name, annotation in FlashSTUConfig.__annotations__.items():
        entry = TypeAdapter(annotation).json_schema()
        for part in entry.get("anyOf", [entry]):
            if part["type"] in ("integer", "number") and name in BOUNDS:
                part["minimum"], part["maximum"] = BOUNDS[name]
            elif part["type"] == "string" and name in CHOICES:
                part["enum"] = CHOICES[name]
            elif name == "layer_types" and "items" in part:
                part["items"]["enum"] = LAYER_TYPES
        entry |= {"default": getattr(FlashSTUConfig, name), "description": descriptions[name]}
        settings.append(_setting(f"model.{name}", entry))
    return SettingsSection("model", summary, settings)


def _setting(name: str, entry: dict[str, Any]) -> Setting:
    """Returns a setting from its JSON schema."""
    parts = entry.get("anyOf", [entry])
    if any(part["type"] == "number" for part in parts):
        parts = [part for part in parts if part["type"] != "integer"]
    kinds = [f"list of {part['items']['type']}s" if part["type"] == "array" else part["type"] for part in parts]
    allowed = [text for part in parts if (text := _allowed(part))]
    default = _yaml(entry["default"]) if "default" in entry else ""
    return Setting(name, " or ".join(kinds), default, ", ".join(allowed), entry["description"].removesuffix("."))


def _allowed(entry: dict[str, Any]) -> str:
    """Returns the values that a JSON schema allows."""
    if "enum" in entry:
        return ", ".join(map(_yaml, entry["enum"]))
    if "const" in entry:
        return _yaml(entry["const"])
    if entry["type"] == "boolean":
        return "true, false"
    if entry["type"] == "array":
        length = f"{entry['minItems']} values, " if "minItems" in entry else ""
        each = _allowed(entry["items"])
        return f"{length}each {each}" if each else length
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "up to", "exclusiveMaximum": "below"}
    return " ".join(f"{word} {_number(entry[key])}" for key, word in words.items() if key in entry)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,g}"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
