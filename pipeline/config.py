"""The config: what the schema in ``workflow/schemas`` allows, checked, completed and put into words.

Called while the Snakefile is parsed, by every job of a cluster run too: imports neither jax nor astropy.
"""

import difflib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from pipeline.columns import COLUMNS

SCHEMA = Path(__file__).resolve().parents[1] / "workflow" / "schemas" / "config.schema.yaml"


@functools.cache
def schema() -> dict[str, Any]:
    """The schema, a dict in the vocabulary of JSON schema draft 2020-12."""
    return yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))


def check_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The config with every default filled in, in the order of the schema.

    Parameters
    ----------
    raw : dict
        What the config file and the command line say; any key may be absent.

    Returns
    -------
    dict
        Every key of the schema, numbers as float where the schema says ``number``: two configs that mean
        the same are equal, so that the one replacing the other repeats no job.

    Raises
    ------
    ValueError
        One line a problem: key, what it got, what was wanted.
    """
    checker = jsonschema.Draft202012Validator(schema())
    problems = [line for error in checker.iter_errors(raw) for line in _sentences(error)]
    checked = {} if problems else _complete(raw, schema())
    problems = problems or list(_contradictions(checked))
    if problems:
        msg = "The config cannot be used:\n" + "\n".join(f"  {line}" for line in sorted(problems))
        raise ValueError(msg)
    return checked


def table() -> str:
    """The config as a Markdown table: key, what it accepts, default, meaning."""
    head = "| key | accepts | default | meaning |\n| --- | --- | --- | --- |\n"
    rows = (
        f"| `{key}` | {_wanted(part)} | `{_yaml(part['default'])}` | {part['description']} |\n"
        for key, part in _described(schema())
    )
    return head + "".join(rows)


def _yaml(value: Any) -> str:
    """``value`` as it stands in a YAML file, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _resolve(part: dict[str, Any]) -> dict[str, Any]:
    """``part`` with the definition that it refers to, its own keywords first."""
    name = part.get("$ref", "").removeprefix("#/$defs/")
    return {**schema()["$defs"][name], **part} if name else part


def _described(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key that is not itself a section, with its schema, in order."""
    for name, part in section["properties"].items():
        if "properties" in part:
            yield from _described(part, f"{prefix}{name}.")
        else:
            yield prefix + name, part


def _complete(value: Any, part: dict[str, Any]) -> Any:
    """``value`` with the defaults of ``part`` filled in, keys in its order, numbers as float, integers as int."""
    part = _resolve(part)
    if "properties" in part:
        return {key: _complete(value.get(key, sub.get("default")), sub) for key, sub in part["properties"].items()}
    if isinstance(value, list) and "items" in part:
        return [_complete(item, part["items"]) for item in value]
    for choice in part.get("anyOf", []):
        if jsonschema.Draft202012Validator({**choice, "$defs": schema()["$defs"]}).is_valid(value):
            return _with_defaults(value, choice) if "properties" in choice else _complete(value, choice)
    # 1.0e+4 is an integer to JSON schema, and a float to YAML.
    kind = {"number": float, "integer": int}.get(part.get("type", ""))
    return kind(value) if kind and not isinstance(value, bool) else value


def _with_defaults(value: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """A section that is one choice of several: complete where its keys have defaults, no others are added."""
    parts = {key: _resolve(sub) for key, sub in part["properties"].items()}
    return {
        key: _complete(value.get(key, sub.get("default")), sub)
        for key, sub in parts.items()
        if key in value or "default" in sub
    }


def _wanted(part: dict[str, Any]) -> str:
    """What ``part`` accepts, in words."""
    part = _resolve(part)
    if "title" in part:
        return part["title"]
    choices = _choices(part)
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))


def _choices(part: dict[str, Any]) -> list[str]:
    if "anyOf" in part:
        return [words for choice in part["anyOf"] for words in _choices(_resolve(choice))]
    if "enum" in part or "title" in part:
        return part.get("enum") or [part["title"]]
    words = {"integer": "an integer", "number": "a number", "string": "text", "object": "a section of keys"}
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<="}
    bounds = " and ".join(f"{sign} {part[limit]}" for limit, sign in limits.items() if limit in part)
    return [" ".join(filter(None, [words.get(part["type"], part["type"]), bounds]))]


def _sentences(error: jsonschema.ValidationError) -> Iterator[str]:
    """One sentence for each problem behind ``error``."""
    key = ".".join(str(step) for step in error.absolute_path)
    if error.validator == "additionalProperties":
        known = list(error.schema["properties"])
        for name in sorted(str(name) for name in error.instance if name not in known):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
            yield f"{key}{'.' if key else ''}{name}: unknown key; {hint}"
    else:
        yield f"{key or 'config'}: got {_shown(error.instance)}, wanted {_wanted(error.schema)}"


def _shown(value: Any) -> str:
    """``value`` as a person would name it, with the cure where YAML took a number for text (1e-6 has no dot)."""
    if not isinstance(value, str):
        return json.dumps(value, default=str)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    cure = _yaml(number).removesuffix(".0")
    return f"the text '{value}'" + (f" (as a number YAML wants {cure})" if math.isfinite(number) else "")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is neither dict nor list, with its dotted key."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inside is None:
        yield key, value
    else:
        for name, item in inside:
            yield from _leaves(item, f"{key}.{name}" if key else str(name))


def _contradictions(config: dict[str, Any]) -> Iterator[str]:
    """What the schema cannot say: finite numbers, and keys that must agree with each other."""
    for key, value in _leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key}: got {value}, wanted a finite number"
    ranges = {name: value for name, value in config["simulated"]["parameters"].items() if value is not None}
    for name, (low, high) in ranges.items():
        if low > high:
            yield f"simulated.parameters.{name}: got [{low}, {high}], wanted the lowest value first"
    if min(ranges["sigma"]) <= 0:
        yield f"simulated.parameters.sigma: got {ranges['sigma']}, wanted widths > 0"
    corner = max(abs(v) for v in ranges["diff"]) ** 2 + max(abs(v) for v in ranges["rho"]) ** 2 / 4
    if corner >= 1:
        yield f"simulated.parameters.rho, diff: got diff^2 + rho^2/4 up to {corner:g}, wanted it below 1"
    for name in sorted({column.name for column in COLUMNS}.intersection(config["images"]["carry"])):
        yield f"images.carry: got '{name}', which is a column of the catalogue already, wanted other names"
    if config["source"] == "images" and not config["images"]["files"]:
        yield "images.files: got an empty list, wanted paths, globs or folders (source is images)"
