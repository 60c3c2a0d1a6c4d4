"""Law 8: every example of the README runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_foreign import theirs

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("code", EXAMPLES, ids=[str(i) for i in range(len(EXAMPLES))])
def test_an_example_runs(code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    if "load_svd" in names:
        vae = names["load_svd"](theirs().float())  # type: ignore[operator]
        assert vae.config.time_conv_out


def test_the_shapes_it_states_are_true() -> None:
    stated = re.findall(r"^(\w+) = (.*?) +# (\([\d, ]+\))", EXAMPLES[0], re.M)
    assert len(stated) == 2
    names: dict[str, object] = {}
    for line in EXAMPLES[0].splitlines():
        exec(line, names)
        for target, call, shape in stated:
            if line.startswith(f"{target} = {call}"):
                assert str(tuple(names[target].shape)) == shape  # type: ignore[attr-defined]


def test_every_verb_is_in_the_readme() -> None:
    from temporal_vae.cli import command

    for verb in command.registered_commands:
        assert verb.callback is not None
        assert f"tvae {verb.callback.__name__}" in README
