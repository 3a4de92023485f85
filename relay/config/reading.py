"""Reading settings: a file's tables become structs, and every mistake becomes a line that says what is allowed instead.

This differs from a plain `msgspec.convert` in one way: it finds every mistake, not only the first.
"""

from __future__ import annotations

import difflib
import json
import re
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar, get_args, get_origin

import msgspec

from relay.address import Address, UpstreamConfig, parse_address, parse_address_or_off, parse_upstream
from relay.config.tables import Config, Table, UpstreamTable

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T", bound=Table)


class Problem(NamedTuple):
    """One mistake: the setting's key (``pool[0].upstreams[1]``; a line number in what is not TOML), and a sentence."""

    key: str
    message: str

    def line(self, source: str) -> str:
        """The problem as a person reads it: where it is, what is wrong, what is allowed."""
        return ":".join(filter(None, (source, self.key))) + ": " + self.message


# Reading: a value goes in; a setting comes out, or `_WRONG` after a line was added to `problems`.

_WRONG: Any = object()
#: So alike that a name is taken for a misspelt one, though another table has it as it is.
_MISSPELT = 0.85

_TEXT_READERS: dict[Any, Callable[[str], Any]] = {
    Address: parse_address,
    Address | None: parse_address_or_off,
    UpstreamConfig: parse_upstream,
}


def read_table(struct: type[_T], table: dict[str, Any], key: str, problems: list[Problem]) -> _T:
    """Read the settings of one table; those that are wrong keep their default."""
    return struct(**_read_settings(struct, table, key, problems))


def _read_settings(struct: type[Table], table: dict[str, Any], key: str, problems: list[Problem]) -> dict[str, Any]:
    fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    values = {}
    for name, value in table.items():
        path = _joined(key, name)
        if name not in fields:
            problems.append(_unknown(path, name, [*fields]))
        elif (setting := _read(fields[name].type, value, path, problems)) is not _WRONG:
            values[fields[name].name] = setting
    return values


def _read(setting: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    plain = _without_meta(setting)
    if get_origin(plain) is tuple:
        return _read_list(setting, value, key, problems)
    if get_origin(plain) is dict:
        return _read_named(setting, value, key, problems)
    if _is_table(plain):
        if isinstance(value, dict):
            return read_table(plain, value, key, problems)
        problems.append(Problem(key, f"{shown(value)} is not valid; allowed: a table"))
        return _WRONG
    if _is_optional_table(plain):
        return _read_whole_table(setting, value, key, problems)
    if plain is UpstreamConfig and isinstance(value, dict):
        return _read_upstream_table(value, key, problems)
    try:
        return read_value(setting, value)
    except ValueError as error:
        problems.append(Problem(key, str(error)))
        return _WRONG


def read_value(setting: Any, value: Any, *, strict: bool = True) -> Any:
    """Read one value that holds no others; a wrong one raises `ValueError` with what is allowed."""
    reader = _TEXT_READERS.get(_without_meta(setting))
    try:
        if reader is None:
            return msgspec.convert(value, setting, strict=strict)
        text = msgspec.convert(value, str)
    except msgspec.ValidationError:
        raise ValueError(_not_valid(setting, value)) from None
    try:
        return reader(text)
    except ValueError as error:
        raise ValueError(f"{shown(text)} {error}") from None


def _read_list(setting: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    item_type = get_args(_without_meta(setting))[0]
    if not isinstance(value, list):
        allowed = f"[[{key}]]" if _is_table(item_type) else "a list, [ … ]"
        problems.append(Problem(key, f"{shown(value)} is not valid; allowed: {allowed}"))
        return _WRONG
    items = [_read(item_type, item, f"{key}[{at}]", problems) for at, item in enumerate(value)]
    if any(item is _WRONG for item in items):
        return _WRONG
    try:
        return msgspec.convert(tuple(items), setting)
    except msgspec.ValidationError:  # too short: the items are right by now
        problems.append(Problem(key, _not_valid(setting, value)))
        return _WRONG


def _read_named(setting: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    """Tables by names of the user's choice."""
    item_type = get_args(_without_meta(setting))[1]
    if not isinstance(value, dict):
        problems.append(Problem(key, _not_valid(setting, value)))
        return _WRONG
    return {name: _read(item_type, item, _joined(key, name), problems) for name, item in value.items()}


def _read_upstream_table(table: dict[str, Any], key: str, problems: list[Problem]) -> Any:
    if "url" not in table:
        problems.append(Problem(key, 'has no url; allowed: { url = "http://HOST:PORT" }'))
        return _WRONG
    before = len(problems)
    own = _read_settings(UpstreamTable, table, key, problems)
    if len(problems) > before:
        return _WRONG
    return msgspec.structs.replace(own.pop("url"), **own)


def _read_whole_table(setting: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    """A table that may be missing, but not in parts."""
    struct = get_args(_without_meta(setting))[0]
    required = {field.encode_name for field in msgspec.structs.fields(struct) if field.required}
    if not isinstance(value, dict) or not required <= value.keys():
        problems.append(Problem(key, _not_valid(setting, value)))
        return _WRONG
    before = len(problems)
    settings = _read_settings(struct, value, key, problems)
    return _WRONG if len(problems) > before else struct(**settings)


def _unknown(path: str, name: str, known: list[str]) -> Problem:
    meant, homes, hint = difflib.get_close_matches(name, known, n=1), _tables_with(name), ""
    if homes and not difflib.get_close_matches(name, meant, cutoff=_MISSPELT):
        hint = f"; {name} stands in {' and '.join(homes)}"
    elif meant:
        hint = f"; perhaps {meant[0]} is meant"
    return Problem(path, f"is not a known name{hint}; allowed: {', '.join(known)}")


def _tables_with(name: str) -> list[str]:
    """The tables that have a setting of this name, as the file has them; without those of the user's names."""
    homes = []
    for field in msgspec.structs.fields(Config):
        is_list = get_origin(field.type) is tuple
        table = get_args(field.type)[0] if is_list else field.type
        if _is_table(table) and name in (own.encode_name for own in msgspec.structs.fields(table)):
            homes.append(f"[[{field.encode_name}]]" if is_list else f"[{field.encode_name}]")
    return homes


def _without_meta(setting: Any) -> Any:
    return get_args(setting)[0] if get_origin(setting) is Annotated else setting


def _is_table(setting: Any) -> bool:
    return isinstance(setting, type) and issubclass(setting, Table)


def _is_optional_table(setting: Any) -> bool:
    choices = get_args(setting)
    return len(choices) == 2 and _is_table(choices[0]) and choices[1] is NoneType


def _joined(key: str, name: str) -> str:
    name = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
    return f"{key}.{name}" if key else name


def _not_valid(setting: Any, value: Any) -> str:
    return f"{shown(value)} is not valid; allowed: {get_args(setting)[1].description}"


def shown(value: Any) -> str:
    """The value as the file has it, short, on one line, and without a URL's password."""
    text = re.sub(r"//[^/@]*@", "//…@", json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= 80 else text[:79] + "…"
