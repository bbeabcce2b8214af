"""The option --control: how a control is said in one argument.

    NET[=IMAGE][:weight=0.8][:start=0][:stop=0.6][:mode=prompt][:preprocess=canny][:map=where.png] ...

A setting begins at a colon, its known name and "=", so pictures may have colons in their names (C:\\edges.png).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from glassine.runtime.control import Control

GRAMMAR = "NET[=IMAGE][:weight=0.8][:start=0][:stop=0.6][:mode=prompt][:preprocess=canny][:map=where.png]"
_NUMBERS = ("weight", "start", "stop")
# As it is said -> the field of `Control`.
_FIELDS = {name: name for name in (*_NUMBERS, "mode", "map", "mask", "preprocess", "interval", "fit")}
_FIELDS["type"] = "control_type"
_SETTING = re.compile(rf":({'|'.join(_FIELDS)})=")
_PACKAGE = re.compile(r"(.+\.(?:mlpackage|mlmodelc))(?:=(.*))?$")
_LOOKS_LIKE_ONE = re.compile(r":([a-z_]+)=")

control_option = click.option(
    "--control", "controls", multiple=True, metavar="NET=IMAGE[:weight=0.8...]",
    callback=lambda _, __, values: tuple(read_control(value) for value in values),
    help="Steer with a control net of the model's and its picture; may be repeated. Settings: weight (0 to 2), start "
         "and stop (shares of the steps), mode (balanced, prompt, control, guess), preprocess (canny ...), map, mask, "
         "type, fit: see docs/control.md.",
)  # fmt: skip


def read_control(text: str) -> dict[str, Any]:
    """Read a --control into the fields of `Control`.

    Raises:
        click.BadParameter: it does not follow the grammar; values are checked by `Control`.
    """
    head, *rest = _SETTING.split(text)
    said = dict(zip(rest[::2], rest[1::2], strict=True))
    if len(said) < len(rest) // 2:
        raise _refused(text, "a setting is said twice")
    # A map in words has settings of its own, such as soft; anywhere else such a word is a slip of the pen.
    strange = [match[1] for name, value in {"": head, **said}.items() if name != "map"
               for match in _LOOKS_LIKE_ONE.finditer(value)]  # fmt: skip
    if strange:
        raise _refused(text, f'no setting "{strange[0]}"; there are {", ".join(_FIELDS)}')
    package = _PACKAGE.match(head)  # a path, which may hold a "=" itself
    net, _, image = head.partition("=") if package is None else (package[1], "=", package[2])
    if not net:
        raise _refused(text, "no net before the =")
    fields: dict[str, Any] = {"net": net, "image": Path(image) if image else None}
    for name, value in said.items():
        fields[_FIELDS[name]] = _number(text, name, value) if name in _NUMBERS else value
    return fields


def controls_of(asked: dict[str, Any]) -> list[Control]:
    """The controls among a verb's parameters."""
    from glassine.runtime.control import Control

    return [Control(**fields) for fields in asked.get("controls", ())]


def _number(text: str, name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise _refused(text, f'{name} is "{value}", expected a number') from None


def _refused(text: str, why: str) -> click.BadParameter:
    return click.BadParameter(f'"{text}": {why}; expected {GRAMMAR}')
