from dataclasses import dataclass, field
from typing import Literal

import pytest

from linnet.config import apply_overrides, build, nearest, read_toml
from linnet.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; expected more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    name: str
    steps: int = 10
    compile: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    stages: Literal[1, 2] = 1
    seed: int | None = None
    budget: int | Literal["auto"] = "auto"
    limit: float | None = None
    files: tuple[str, ...] = ()
    optimizer: Optimizer = field(default_factory=Optimizer)
    derived: int = field(default=0, init=False)


def recipe(**values):
    return build(Recipe, {"name": "nano", **values})


def test_defaults_fill_what_the_recipe_leaves_out():
    assert recipe() == Recipe(name="nano")


def test_missing_key_is_named():
    with pytest.raises(ConfigError, match="missing key 'name'"):
        build(Recipe, {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 1}, r"unknown key 'step'; did you mean 'steps'\?"),
        ({"optimizer": {"lr": 1.0}}, "unknown key 'optimizer.lr'"),
        ({"optimizer": {"learnin_rate": 1.0}}, "did you mean 'learning_rate'"),
        ({"zzzz": 1}, "unknown key 'zzzz'; valid: budget, compile"),
        ({"derived": 1}, "unknown key 'derived'"),
    ],
    ids=["near", "nested", "nested-near", "far", "not-settable"],
)
def test_unknown_key_suggests_the_nearest(values, message):
    with pytest.raises(ConfigError, match=message):
        recipe(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "10"}, "'steps' is '10'; expected int"),
        ({"steps": 10.0}, "'steps' is 10.0; expected int"),
        ({"steps": True}, "'steps' is True; expected int"),
        ({"compile": 1}, "'compile' is 1; expected bool"),
        ({"name": 3}, "'name' is 3; expected str"),
        ({"seed": "x"}, "'seed' is 'x'; expected int"),
        ({"limit": True}, "'limit' is True; expected float"),
        ({"files": "a.txt"}, "'files' is 'a.txt'; expected tuple"),
        ({"files": [1]}, "'files' is 1; expected str"),
        ({"optimizer": 3}, "'optimizer' is a section; got 3"),
        ({"optimizer": {"learning_rate": "1e-3"}}, "'optimizer.learning_rate' is '1e-3'"),
        ({"optimizer": {"betas": [0.9]}}, "'optimizer.betas' has 1 items; expected 2"),
        ({"dtype": "float23"}, "'dtype' is 'float23'; did you mean 'float32'"),
        ({"stages": True}, "'stages' is True; valid: 1, 2"),
        ({"stages": 1.0}, "'stages' is 1.0"),
        ({"budget": "automatic"}, "'budget' is 'automatic'; did you mean 'auto'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_value_of_the_wrong_type_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        recipe(**values)


def test_values_are_widened_where_nothing_is_lost():
    built = recipe(optimizer={"learning_rate": 1, "betas": [0, 1]}, files=["a", "b"], limit=2)
    assert built.optimizer == Optimizer(learning_rate=1.0, betas=(0.0, 1.0))
    assert type(built.optimizer.learning_rate) is float and type(built.limit) is float
    assert built.files == ("a", "b")


def test_unions_take_each_of_their_types():
    assert recipe(seed=None).seed is None and recipe(seed=3).seed == 3
    assert recipe(budget=5).budget == 5 and recipe(budget="auto").budget == "auto"


def test_config_error_of_the_section_comes_through():
    with pytest.raises(ConfigError, match="more than 0"):
        recipe(optimizer={"learning_rate": 0})


def test_config_error_is_a_value_error():
    with pytest.raises(ValueError, match="unknown key"):
        recipe(x=1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a = 1.5", 1.5),
        ("a=true", True),
        ("a=[1, 2]", [1, 2]),
        ('a="1"', "1"),
        ("a=plain text", "plain text"),
        ("a=x=y", "x=y"),
        ("a=", ""),
        ("a=1\nb = 2", "1\nb = 2"),
    ],
)
def test_override_values_are_toml_or_text(text, value):
    assert apply_overrides({}, [text]) == {"a": value}


def test_overrides_reach_nested_sections_and_leave_the_original_alone():
    original = {"optimizer": {"learning_rate": 1.0}, "steps": 1}
    changed = apply_overrides(original, ["optimizer.learning_rate=2.0", "new.deep.key=3"])
    assert changed["optimizer"] == {"learning_rate": 2.0} and changed["steps"] == 1
    assert changed["new"] == {"deep": {"key": 3}}
    assert original == {"optimizer": {"learning_rate": 1.0}, "steps": 1}


def test_later_override_wins():
    assert apply_overrides({}, ["a=1", "a=2"]) == {"a": 2}


@pytest.mark.parametrize("text", ["a", "=1", " =1", "a..b=1", ".a=1", "a.=1"])
def test_malformed_override_is_an_error(text):
    with pytest.raises(ConfigError, match="not of the form path=value"):
        apply_overrides({}, [text])


def test_override_through_a_value_is_an_error():
    with pytest.raises(ConfigError, match="'steps' is a value, not a section"):
        apply_overrides({"steps": 1}, ["steps.x=1"])


def test_nearest_names_one_or_lists_all():
    assert nearest("stepz", ["steps", "name"]) == "; did you mean 'steps'?"
    assert nearest("qqq", ["steps", "name"]) == "; valid: name, steps"


def test_recipe_file_is_read(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('name = "nano"\n[optimizer]\nlearning_rate = 1\n')
    assert build(Recipe, read_toml(path)).optimizer.learning_rate == 1.0


@pytest.mark.parametrize("name", ["none.toml", ".", "recipe.toml/inner.toml"])
def test_missing_recipe_is_a_config_error(tmp_path, name):
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(ConfigError, match="is not a file"):
        read_toml(tmp_path / name)


@pytest.mark.parametrize("content", [b"a = ", b"a = 1\na = 2", b"\xff\xfe"])
def test_broken_recipe_is_a_config_error(tmp_path, content):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_toml(path)
