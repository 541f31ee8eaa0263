"""Dataclasses of settings as TOML: nested sections, and errors that say what is allowed."""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from launch.exit_codes import ConfigError
from launch.files import read_text


def read_toml(config: Any, path: Path, removed: Mapping[str, str]) -> None:
    """Copy the values of a TOML file into `config`, a dataclass whose fields are sections.

    Args:
        removed: names of settings of earlier versions, with the reason.

    Raises:
        ConfigError: the file cannot be read, or names or types are wrong.
    """
    try:
        table = tomllib.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"job.config_file {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"job.config_file {path} is not TOML: {error}.") from None
    except RecursionError:
        raise ConfigError(f"job.config_file {path} is not TOML: nested too deep.") from None
    _read_table(config, table, path, "", removed)


def _read_table(
    section: Any, table: dict[str, Any], path: Path, prefix: str, removed: Mapping[str, str]
) -> None:
    """Copy a TOML table into a section, whose fields are values or sections."""
    hints = typing.get_type_hints(type(section))
    known = [prefix + each for each in hints]
    for key, value in table.items():
        name = prefix + key
        if name in removed:
            # Resolved configs of earlier runs say false.
            if value:
                raise ConfigError(f"{path}: {name} was removed: {removed[name]}.")
            continue
        is_section = dataclasses.is_dataclass(hints.get(key))
        if key not in hints:
            word, form = ("unknown key ", "{}") if prefix else ("unknown section ", "[{}]")
            raise ConfigError(f"{path}: {word}{form.format(name)}{_hint(name, known, form)}")
        if not is_section:
            setattr(section, key, typed(value, hints[key], f"{path}: {name}"))
        elif isinstance(value, dict):
            _read_table(getattr(section, key), value, path, f"{name}.", removed)
        else:
            raise ConfigError(f"{path}: {name} is a section: write [{name}] on a line of its own.")


def to_toml(config: Any) -> str:
    """The resolved config as a TOML file that `--job.config_file` reads back."""
    lines: list[str] = []
    _add_tables(lines, dataclasses.asdict(config), "")
    return "\n".join(lines)


def _add_tables(lines: list[str], section: dict[str, Any], name: str) -> None:
    values = {key: value for key, value in section.items() if not isinstance(value, dict)}
    if values:
        lines.append(f"[{name}]")
        # TOML has no None; it is always the default, which a missing key means.
        lines += [f"{k} = {_toml_value(v)}" for k, v in values.items() if v is not None]
        lines.append("")
    for key, value in section.items():
        if isinstance(value, dict):
            _add_tables(lines, value, f"{name}.{key}".removeprefix("."))


def _toml_value(value: Any) -> str:
    # Like JSON, but without surrogate pairs and with DEL escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _hint(name: str, known: list[str], form: str) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {form.format(close[0])}?"
    return f"; known: {', '.join(map(form.format, known))}."


_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
}
_PAIR = tuple[str, float]
_LIST_NAMES = {
    int: "a list of whole numbers",
    str: "a list of strings",
    _PAIR: "a list of pairs of a string and a number, such as [['a', 0.7], ['b', 0.3]]",
}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found


def typed(value: Any, annotation: Any, where: str) -> Any:
    """`value` if it fits `annotation` (an int fits a float), else ConfigError.

    Annotations are int, float, bool, str, Literal, tuple[int, ...], tuple[str, ...],
    tuple[tuple[str, float], ...], and unions of them.
    """
    # Literal[...] | None is a typing.Union.
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    words = []
    for option in typing.get_args(annotation) if is_union else (annotation,):
        origin = typing.get_origin(option) or option
        if origin is Literal:
            if value in typing.get_args(option):
                return value
            words.append("one of " + ", ".join(map(repr, typing.get_args(option))))
            continue
        if origin is types.NoneType:
            continue
        if origin is tuple:
            item = typing.get_args(option)[0]
            if type(value) is list and all(_is_item(each, item) for each in value):
                return tuple((each[0], float(each[1])) if item == _PAIR else each for each in value)
            words.append(_LIST_NAMES[item])
            continue
        if type(value) is origin or (origin is float and type(value) is int):
            return origin(value)
        words.append(_TYPE_NAMES[origin])
    raise ConfigError(f"{where} is {value!r}, must be {' or '.join(words)}.")


def _is_item(value: Any, annotation: Any) -> bool:
    if annotation == _PAIR:
        return type(value) is list and [type(each) for each in value] in ([str, int], [str, float])
    return type(value) is annotation
