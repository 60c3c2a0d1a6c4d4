"""Groups of options: dataclasses whose fields become the options of a command.

A verb that takes a parameter `size: SizeOptions`, a group with a field `width`, has an option
--width, and is called with a `SizeOptions`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from inspect import Parameter, signature
from typing import Annotated, Any, ClassVar, get_type_hints

import typer


class OptionGroup:
    """Base of the groups. `panel` is the heading of their options in the help."""

    panel: ClassVar[str]


def option(
    default: object, metavar: str, help: str, parse: Callable[[str], object] | None = None
) -> Any:
    """A field of a group.

    `metavar` stands for the value in the help, and is empty for a switch, which takes none; `help`
    says the default too. `parse` makes the field's value of typed text, or raises `ValueError`.
    """
    return field(default=default, metadata={"metavar": metavar, "help": help, "parse": parse})


def with_groups(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb` with each group unfolded, for typer, which makes the options of its signature."""
    declared = signature(verb, eval_str=True)
    groups = {p.name: p.annotation for p in declared.parameters.values() if _is_group(p.annotation)}

    def command(**typed: Any) -> None:
        for name, group in groups.items():
            typed[name] = group(**{f.name: _value(f, typed.pop(f.name)) for f in fields(group)})
        verb(**typed)

    unfolded: list[Parameter] = []
    for parameter in declared.parameters.values():
        group = groups.get(parameter.name)
        unfolded += [parameter] if group is None else _parameters(group)
    command.__signature__ = declared.replace(parameters=unfolded)  # type: ignore[attr-defined]
    command.__name__, command.__doc__ = verb.__name__, verb.__doc__
    return command


def _is_group(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, OptionGroup)


def _value(entry: Any, typed: Any) -> Any:
    parse = entry.metadata["parse"]
    return typed if parse is None or typed is None else parse(typed)


def _parameters(group: Any) -> list[Parameter]:
    types = get_type_hints(group)
    return [
        Parameter(
            entry.name, Parameter.KEYWORD_ONLY, default=entry.default,
            annotation=_annotation(entry, types[entry.name], group.panel),
        )
        for entry in fields(group)
    ]  # fmt: skip


def _annotation(entry: Any, kind: Any, panel: str) -> Any:
    told = dict(entry.metadata)
    if told.pop("parse") is not None:
        kind = str | None
    flag = f"--{entry.name.replace('_', '-')}"
    return Annotated[kind, typer.Option(flag, show_default=False, rich_help_panel=panel, **told)]
