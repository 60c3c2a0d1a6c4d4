"""Law 8: every example of the README runs."""

from __future__ import annotations

import doctest
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from test_adapters import embeds, svd_pipeline
from test_checkpoints import image_vae, save_single
from test_foreign import theirs
from test_laws import FLOORS
from test_video import smooth, write
from test_wan_pipelines import qwen_pipeline, wan_pipeline

import temporal_vae
from temporal_vae import TemporalVAE, model
from temporal_vae.walks import plan

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) == 9


# the first one runs line by line in `test_the_shapes_it_states_are_true`
@pytest.mark.parametrize("code", EXAMPLES[1:], ids=[str(i) for i in range(1, len(EXAMPLES))])
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


def test_the_examples_of_the_page_for_users_of_diffusers_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With small pipelines, whose prompts are numbers."""
    page = (ROOT / "docs/from-diffusers.md").read_text()
    wan, qwen = wan_pipeline(), qwen_pipeline()
    wan.encode_prompt = lambda **_: (embeds(1, 4, 8), embeds(1, 4, 8, seed=9))
    qwen.encode_prompt = lambda **_: (embeds(1, 4, 8).double(), torch.ones(1, 4).long())
    stock, size = wan.vae, {"height": 32, "width": 32, "num_inference_steps": 1}
    names = {"pipe": svd_pipeline(), "wan": wan, "qwen": qwen, "prompt": "a cat", "size": size}
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(code, "from-diffusers.md", "exec"), names)
    assert wan.vae is stock and names["frames"].shape == (1, 9, 32, 32, 3)
    assert type(qwen.vae) is temporal_vae.DiffusersWanVAE and len(names["images"]) == 1
    assert "dB" in capsys.readouterr().out


def test_the_example_of_the_page_on_training_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.S)
    (tmp_path / "clips").mkdir()
    for name in ("a", "b"):
        write(tmp_path / "clips" / f"{name}.mp4", smooth(8, 64, 64))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    exec(compile(code[0], "training.md", "exec"), {})
    assert capsys.readouterr().out.count("\n") == 2


def test_the_shapes_it_states_are_true() -> None:
    stated = re.findall(r"^(\w+) = (.*?) +# (\([\d, ]+\))", EXAMPLES[0], re.M)
    assert len(stated) == 2
    names: dict[str, object] = {}
    for line in EXAMPLES[0].splitlines():
        exec(line, names)
        for target, call, shape in stated:
            if line.startswith(f"{target} = {call}"):
                assert str(tuple(names[target].shape)) == shape  # type: ignore[attr-defined]


def test_the_examples_of_docstrings_run() -> None:
    found = doctest.testmod(model, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0 and found.attempted >= 28


def reference() -> list[tuple[str, str]]:
    """(there, here) of every row of the reference."""
    rows = re.findall(
        r"^\| (.+?) \| (.+?) \| .*\|$", (ROOT / "docs/reference.md").read_text(), re.M
    )
    return [(there, here) for there, here in rows if there not in ("there", "---")]


def test_the_reference_names_members_that_are_there() -> None:
    named = {name for _, here in reference() for name in re.findall(r"`(\w+)`", here)}
    torch_own = {"named_parameters", "load_state_dict"}
    missing = {name for name in named if not hasattr(temporal_vae.TemporalVAE, name)} - torch_own
    assert not missing
    public = {
        name
        for name, value in vars(temporal_vae.TemporalVAE).items()
        if not name.startswith("_")
        and (callable(value) or isinstance(value, property | classmethod))
    }
    text = (ROOT / "docs/reference.md").read_text()
    ours_alone = {"dtype", "device", "forward"}
    assert {name for name in public if f"`{name}`" not in text} - ours_alone == set()


def test_the_reference_has_every_member_of_the_page() -> None:
    page = ROOT.parent / "shared/spec/temporal_vae_page.txt"
    if not page.exists():
        pytest.skip("the page is not part of the project")
    members = set(re.findall(r"^public .*?(\w+)(?:\(.*\)| \{ get; \})$", page.read_text(), re.M))
    there = " ".join(there for there, _ in reference())
    assert len(members) >= 17
    assert {name for name in members if f"`{name}" not in there} == set()


def test_the_public_names_are_the_documented_ones() -> None:
    table = README.split("## Public names")[1].split("##")[0]
    first = re.findall(r"^\| (`.*?) \|", table, re.M)
    named = {name for cell in first for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(temporal_vae.__all__)


def test_every_verb_is_in_the_readme() -> None:
    from temporal_vae.cli.main import command

    for verb in command.registered_commands:
        assert verb.callback is not None
        assert f"tvae {verb.callback.__name__.replace('_', '-')}" in README


PATH = re.compile(r"`((?:[\w.]+/)*[\w.]+/|(?:[\w.]+/)*\w+\.(?:py|md|txt|toml))`")


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_a_path_that_the_map_names_is_there(page: str) -> None:
    named = set(PATH.findall((ROOT / page).read_text()))
    assert len(named) > 3
    places = (ROOT, ROOT / "src" / "temporal_vae", ROOT / "docs")
    lost = {path for path in named if not any((place / path).exists() for place in places)}
    assert not lost, f"{page} names what is not there"


def test_the_map_draws_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawing = text.split("```")[1]
    for room in FLOORS:
        name = f"{room}/" if (ROOT / "src" / "temporal_vae" / room).is_dir() else f"{room}.py"
        assert re.search(rf"\b{re.escape(name)}", drawing), f"the floors lack {name}"


def test_the_table_of_memory_is_what_plans_say() -> None:
    spec = importlib.util.spec_from_file_location("budgets", ROOT / "benchmarks" / "budgets.py")
    assert spec is not None and spec.loader is not None
    budgets = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:  # as it is outside of tests, see conftest
        patched.setattr(plan, "KERNELS_BYTES", 32 * 2**20)
        patched.setattr(plan, "GAPS_BYTES", 256 * 2**20)
        plan.planner.cache_clear()
        spec.loader.exec_module(budgets)
        cells = [
            ("SVD", "float32", "256x256", "14 frames"), ("SDXL", "bfloat16", "832x480", "image"),
            ("tiny", "float32", "3840x2160", "image"), ("tiny", "bfloat16", "256x256", "stream"),
        ]  # fmt: skip
        found = [budgets.cell(name, getattr(torch, dtype), *rest) for name, dtype, *rest in cells]
    plan.planner.cache_clear()
    page = (ROOT / "docs" / "memory.md").read_text()
    assert page.startswith(budgets.HEAD)
    for (name, dtype, size, kind), cell in zip(cells, found, strict=True):
        table = page.split(f"## {name}, {dtype}")[1].split("##")[0]
        row = next(line for line in table.splitlines() if line.startswith(f"| {size} "))
        stated = row.split("|")[2 + list(budgets.KINDS).index(kind)].strip()
        assert stated == " / ".join(map(budgets.in_words, cell))
    tiny = TemporalVAE.from_pretrained("tiny").bfloat16()  # whose least is enough
    assert tiny.plan((1, 4, 1, 32, 32), budget=found[3][0], stream=True, keep_state=False)
