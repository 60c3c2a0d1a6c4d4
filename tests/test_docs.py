"""Law 8: every example of the README runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_adapters import svd_pipeline
from test_checkpoints import image_vae, save_single
from test_foreign import theirs

import temporal_vae

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) == 8


@pytest.mark.parametrize("code", EXAMPLES, ids=[str(i) for i in range(len(EXAMPLES))])
def test_an_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    if "load" in names or "inflate" in names:  # folders of these names stand for the Hub
        svd, image = theirs().float(), image_vae().float()
        svd.save_pretrained("stabilityai/stable-video-diffusion-img2vid/vae", variant="fp16")
        image.save_pretrained("stabilityai/sd-vae-ft-mse")
        save_single(svd, tmp_path / "svd.safetensors")
    if "load" in names:
        models = names["load"]()  # type: ignore[operator]
        assert [model.config.time_conv_out for model in models] == [True, False, True]
        assert (tmp_path / "svd" / "diffusion_pytorch_model.safetensors").is_file()
    if "inflate" in names:
        assert names["inflate"]().is_causal  # type: ignore[operator]
    if "upgraded" in names:
        folder = "stabilityai/stable-video-diffusion-img2vid"
        svd_pipeline().save_pretrained(folder, variant="fp16")
        pipe = names["upgraded"]()  # type: ignore[operator]
        assert type(pipe.vae) is temporal_vae.DiffusersTemporalVAE


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
