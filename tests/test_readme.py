"""What the README tells people to type exists, parses and points at files that are there."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Commands of other programs, that a README may use without our being able to check them.
OTHERS = {"git", "cd", "pip", "python", "source", "curl", "export"}
SEPARATORS = {"|", "||", "&", "&&", ";"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Return each command of the bash blocks as words, without redirections and variables."""
    found = []
    for line in "".join(blocks("bash")).replace("\\\n", " ").splitlines():
        words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        words.whitespace_split = True
        found.append([])
        for word in words:
            if word in SEPARATORS:
                found.append([])
            else:
                found[-1].append(word)
    return [cleaned for command in found if (cleaned := without_shell(command))]


def without_shell(command: list[str]) -> list[str]:
    while command and re.match(r"\w+=", command[0]):
        command = command[1:]
    redirections = [place for place, word in enumerate(command) if word[0] in "<>"]
    return command[: redirections[0]] if redirections else command


def linnet_commands() -> list[list[str]]:
    """Return the arguments of `linnet`, whoever starts it."""
    starts = [
        words.index("linnet")
        for words in commands()
        if Path(words[0]).name in ("linnet", "torchrun") and "linnet" in words
    ]
    own = [words for words in commands() if Path(words[0]).name in ("linnet", "torchrun")]
    return [words[start + 1 :] for words, start in zip(own, starts, strict=True)]


@pytest.mark.parametrize("command", [["make", "run"], ["make", "test"]], ids=" ".join)
def test_the_two_commands_of_a_newcomer_are_there(command):
    assert command in commands()


def test_every_command_is_known():
    programs = {Path(words[0]).name for words in commands()}
    assert programs <= OTHERS | {"make", "linnet", "torchrun"}


def test_every_make_target_exists():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", text, flags=re.MULTILINE))
    used = {
        word for words in commands() if words[0] == "make" for word in words[1:] if "=" not in word
    }
    assert used <= targets


@pytest.mark.parametrize("arguments", linnet_commands(), ids=" ".join)
def test_linnet_command_parses(arguments, capsys):
    from linnet.cli import build_parser

    try:
        build_parser().parse_args(arguments)
    except SystemExit as stop:
        assert stop.code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "verb", sorted({arguments[0] for arguments in linnet_commands() if arguments})
)
def test_linnet_verb_has_help(verb, capsys):
    from linnet.cli import build_parser

    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([verb, "--help"])
    assert stop.value.code == 0 and capsys.readouterr().out


def test_every_recipe_in_a_command_exists():
    recipes = [word for words in commands() for word in words if word.endswith(".toml")]
    assert [recipe for recipe in recipes if not (ROOT / recipe).is_file()] == []


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_block_compiles(number):
    compile(blocks("python")[number], f"README.md python block {number}", "exec")


def test_operator_block_runs():
    (block,) = [text for text in blocks("python") if "lightning_attention" in text]
    exec(compile(block, "README.md", "exec"), {})


def test_every_relative_link_exists():
    text = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    paths = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_figures_are_those_of_the_committed_results():
    spec = importlib.util.spec_from_file_location(
        "readme_figures", ROOT / "scripts" / "readme_figures.py"
    )
    assert spec is not None and spec.loader is not None
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    assert figures.with_figures(README) == README
