"""Turns what a user wrote (text of a flag, a YAML or Python value) into a setting's type.

Knows types and nothing of meaning: ranges and combinations are `config/validate.py`'s.
"""

import json
import re
from typing import Any

from jaxinfer.config.fields import Setting
from jaxinfer.errors import ConfigError

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([kmgtKMGT])")

_EXPECTED = {
    "str": "text",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "int_list": "integers, comma or space separated",
    "str_list": "one or more names",
    "dict": "a JSON object",
}


def _expected(setting: Setting) -> str:
    if setting.kind == "choice":
        return "one of " + ", ".join(setting.choices)
    text = _EXPECTED[setting.kind]
    return f"{text}, like 32768, 32K (1024s) or 32k (1000s)" if setting.units else text


def _refuse(setting: Setting, value: Any, where: str) -> ConfigError:
    return ConfigError(f"{where}: expected {_expected(setting)}, got {value!r}.")


def _integer(setting: Setting, value: Any, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch(r"[+-]?\d+", text):
            return int(text)
        match = _NUMBER.fullmatch(text) if setting.units else None
        if match:
            number, unit = match.groups()
            if unit in _UNITS:
                return round(float(number) * _UNITS[unit])
            if "." not in number:  # as in vLLM: binary units take whole numbers only
                return int(number) * _BINARY_UNITS[unit]
    raise _refuse(setting, value, where)


def _number(setting: Setting, value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _refuse(setting, value, where)
    try:
        return float(value)
    except ValueError as error:
        raise _refuse(setting, value, where) from error


def _mapping(setting: Setting, value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not JSON ({error}), got {value!r}.") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _refuse(setting, value, where)
    return value


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _int_list(setting: Setting, value: Any, where: str) -> list[int]:
    items: list[Any] = []
    for item in _items(value):
        items += item.replace(",", " ").split() if isinstance(item, str) else [item]
    return [_integer(setting, item, where) for item in items]


def _str_list(setting: Setting, value: Any, where: str) -> list[str]:
    # No splitting at commas: a key with a comma in it must not become two keys.
    items = _items(value)
    if not all(isinstance(item, str) for item in items):
        raise _refuse(setting, value, where)
    return items


def convert(setting: Setting, value: Any, *, where: str) -> Any:
    """`value` in the setting's type; raises ConfigError that names `where`, value and expected."""
    if setting.optional and (value is None or (value == "auto" and setting.kind == "int")):
        return None
    if setting.kind == "int":
        return _integer(setting, value, where)
    if setting.kind == "float":
        return _number(setting, value, where)
    if setting.kind == "int_list":
        return _int_list(setting, value, where)
    if setting.kind == "str_list":
        return _str_list(setting, value, where)
    if setting.kind == "dict":
        return _mapping(setting, value, where)
    if setting.kind == "choice" and value in setting.choices:
        return value
    expected_type = {"bool": bool, "str": str}.get(setting.kind)
    if expected_type is None or not isinstance(value, expected_type):
        raise _refuse(setting, value, where)
    return value
