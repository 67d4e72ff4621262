"""docs/parallelism.md: its pictures are there and can be drawn, its keys and commands are real."""

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from linnet.cli import build_parser
from linnet.parallel.layout import Layout
from linnet.train import Recipe
from linnet.train.recipe import ParallelSection

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
MAX_BYTES = 200_000


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "parallelism_pictures.py"
    spec = importlib.util.spec_from_file_location("parallelism_pictures", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands() -> list[list[str]]:
    """Return the lines of the bash blocks as words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for line in "".join(blocks).replace("\\\n", " ").splitlines()]


def linnet_commands() -> list[list[str]]:
    return [words[words.index("linnet") + 1 :] for words in commands() if "linnet" in words]


def torchrun_commands() -> list[list[str]]:
    return [words for words in commands() if words[0] == "torchrun"]


def test_pictures_can_be_drawn(script, tmp_path):
    paths = script.draw_all(tmp_path)
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()}
    assert all(1_000 < path.stat().st_size < MAX_BYTES for path in paths)


def test_page_shows_every_picture(script):
    shown = {link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if "parallelism-" in link}
    assert shown == {f"images/parallelism-{name}.png" for name in script.PICTURES}
    for link in shown:
        assert (ROOT / "docs" / link).stat().st_size < MAX_BYTES


def test_passes_of_a_pipeline_follow_what_they_need(script):
    costs = [1.0, 2.0, 1.5]
    turns = {(t.stage, t.is_forward, t.number): t for t in script.timeline(costs, 5)}
    assert len(turns) == 3 * 2 * 5
    for (stage, is_forward, number), turn in turns.items():
        needs = [(stage - 1, True, number)] if is_forward else [(stage + 1, False, number)]
        needs += [] if is_forward else [(stage, True, number)]
        assert all(turns[need].stop <= turn.start for need in needs if need in turns)


def test_page_and_recipes_have_the_same_keys():
    named = set(re.findall(r"parallel\.(\w+)", PAGE)) - {"md", "py"}
    assert named == {field.name for field in dataclasses.fields(ParallelSection)}


def test_page_gives_the_defaults_of_the_recipe():
    rows = dict(re.findall(r"^\| `parallel\.(\w+)` \| (\S+) \|", PAGE, flags=re.MULTILINE))
    for field in dataclasses.fields(ParallelSection):
        value = str(field.default).lower().removesuffix(".0")
        assert rows[field.name].strip('`"') == value


@pytest.mark.parametrize("arguments", linnet_commands(), ids=" ".join)
def test_command_parses(arguments):
    args = build_parser().parse_args(arguments)
    recipe = getattr(args, "recipe", "recipe.toml")
    assert recipe == "recipe.toml" or (ROOT / recipe).is_file()


@pytest.mark.parametrize("words", torchrun_commands(), ids=" ".join)
def test_torchrun_command_can_be_run(words):
    args = build_parser().parse_args(words[words.index("linnet") + 1 :])
    recipe = Recipe.from_file(ROOT / args.recipe, args.set)
    layout = recipe.parallel.layout(int(words[words.index("--nproc-per-node") + 1]))
    assert isinstance(layout, Layout)
    layout.check_model(recipe.model)
    rows = recipe.train.batch_tokens // recipe.train.micro_batch_tokens
    assert rows % layout.num_rows == 0 and rows // layout.num_rows >= layout.pp


def test_every_file_the_page_names_exists():
    names = re.findall(r"`(test_\w+\.py|parallel/\w+\.py|scripts/\w+\.py)`", PAGE)
    homes = (ROOT, ROOT / "linnet", ROOT / "tests" / "parallel")
    assert names
    assert [name for name in names if not any((home / name).is_file() for home in homes)] == []
