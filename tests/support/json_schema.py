"""Validation with the JSON schema keywords that the command `schema` writes."""

from __future__ import annotations

from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}
KEYWORDS = {
    *("$schema", "$defs", "$ref", "anyOf", "enum", "type", "properties", "additionalProperties", "required", "items"),
    *("prefixItems", "minItems", "maxItems", "description", "default", "format"),
}


def problems(value: Any, schema: Any, root: dict[str, Any], where: str = "") -> list[str]:
    """Return the problems of a value. Each message begins with the key.

    Args:
        value: The value, as parsed from YAML.
        schema: Schema of the value.
        root: The complete schema, with `$defs`.
        where: Dotted key of the value, for messages.
    """
    if isinstance(schema, bool):
        return [] if schema else [f"{where}: nothing is allowed here"]
    unknown = schema.keys() - KEYWORDS
    assert not unknown, f"{where}: this test does not know the keywords {unknown}"
    if "$ref" in schema:
        return problems(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, where)
    messages: list[str] = []
    if "anyOf" in schema:
        alternatives = [problems(value, alternative, root, where) for alternative in schema["anyOf"]]
        messages += min(alternatives, key=len) if all(alternatives) else []
    if "enum" in schema and value not in schema["enum"]:
        messages.append(f"{where}: {value!r} is none of {schema['enum']}")
    kinds = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", [])
    if kinds and not any(_is(value, kind) for kind in kinds):
        return [*messages, f"{where}: {value!r} is no {' or '.join(kinds)}"]
    if isinstance(value, dict):
        others = schema.get("additionalProperties", True)
        for key, part in value.items():
            messages += problems(
                part, schema.get("properties", {}).get(key, others), root, f"{where}.{key}".lstrip(".")
            )
        messages += [f"{where}.{key} is missing" for key in schema.get("required", ()) if key not in value]
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            messages.append(f"{where}: {len(value)} items")
        first = schema.get("prefixItems", [])
        for number, part in enumerate(value):
            alternative = first[number] if number < len(first) else schema.get("items", True)
            messages += problems(part, alternative, root, f"{where}[{number}]")
    return messages


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
