"""What is left out of a folder is what git leaves out."""

import os
import random
import shutil
import subprocess

import pytest

from linnet.errors import DataError
from linnet.text.folder import pack_folder
from linnet.text.folder.ignore import compile_rules

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def write(root, files):
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())


def packed(root, **options):
    try:
        return {file.path for file in pack_folder(root, **options).files}
    except DataError:
        return set()


def git(root, *arguments):
    """Run git without the settings of whoever runs the tests."""
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    process = subprocess.run(
        ["git", *arguments], cwd=root, env=env, capture_output=True, text=True, check=True
    )
    return process.stdout


def git_files(root):
    return set(filter(None, git(root, "ls-files", "-o", "-z", "--exclude-standard").split("\0")))


@needs_git
@pytest.mark.parametrize(
    "rules",
    [
        {"": "*.log\n!keep.log\n"},
        {"": "*\n!*/\n!*.py\n"},
        {"": "/top.txt\nsub/*.txt\n"},
        {"": "sub/\n!sub/keep.log\n"},
        {"": "sub/**\n!sub/deep/\n"},
        {"": "sub/**/\n"},
        {"": "**/deep/*.py\n"},
        {"": "*.txt\n", "sub": "!*.txt\n"},
        {"": "!sub\n*.py\n"},
        {"": "a.log \r\n\\#hash\n# comment\n\n!\n[z-a]\n"},
        {"": "\ufefftop.txt\n"},
        {"sub": "/deep\n", "sub/deep": "!*\n"},
    ],
    ids=lambda rules: repr(list(rules.values())),
)
def test_gitignore_files_are_applied_as_git_does(tmp_path, rules):
    names = ("top.txt", "a.log", "keep.log", "m.py", "#hash")
    folders = ("", "sub/", "sub/deep/", "other/")
    write(tmp_path, {f"{folder}{name}": "text\n" for folder in folders for name in names})
    write(tmp_path, {f"{folder}/.gitignore": text for folder, text in rules.items()})
    git(tmp_path, "init", "-q")
    assert packed(tmp_path) == git_files(tmp_path)


def random_tree(rng, root):
    names = ("a", "b", "ab", "c.py", "d.log", " e", "#f", "!g")
    folders = [root]
    for _ in range(6):
        folders.append(rng.choice(folders) / rng.choice(("a", "b", "ab", "x")))
        folders[-1].mkdir(exist_ok=True)
    for folder in folders:
        for name in rng.sample(names, 4):
            if not (folder / name).exists():
                (folder / name).write_text("text\n")
    for folder in rng.sample(folders, rng.choice((1, 2, 3))):
        lines = [random_rule(rng) for _ in range(rng.choice((1, 2, 3)))]
        (folder / ".gitignore").write_text("\n".join(lines) + "\n")
    return folders


def random_rule(rng):
    words = [
        "a",
        "b",
        "ab",
        "*",
        "**",
        "*.py",
        "a*",
        "?",
        "[ab]",
        "[!a]",
        "c.py",
        "d.log",
        "*.log",
        "\\#f",
        "\\!g",
        "[^b]*",
    ]
    rule = "/".join(rng.choice(words) for _ in range(rng.choice((1, 1, 1, 2, 2, 3))))
    start = rng.choice(("", "", "", "/")) if rng.random() < 0.7 else "!"
    return start + rule + rng.choice(("", "", "/", " "))


@needs_git
@pytest.mark.parametrize("seed", [*range(3), pytest.param(1000, marks=pytest.mark.slow)])
def test_random_rules_leave_out_what_git_leaves_out(tmp_path, seed):
    rng = random.Random(seed)
    for tree in range(300 if seed == 1000 else 5):
        root = tmp_path / str(tree)
        root.mkdir()
        folders = random_tree(rng, root)
        git(root, "init", "-q")
        expected = git_files(root)
        assert packed(root) == expected
        # Asked about a part of a repository, the rules above it hold, unless it is ignored itself.
        inner = rng.choice(folders[1:])
        prefix = f"{inner.relative_to(root).as_posix()}/"
        if part := {path.removeprefix(prefix) for path in expected if path.startswith(prefix)}:
            assert packed(inner) == part


def test_ignored_folder_that_is_named_is_packed(tmp_path):
    write(tmp_path, {".git/config": "", ".gitignore": "build/\n*.log\n", "build/a.txt": "text"})
    assert packed(tmp_path) == {".gitignore"}
    assert packed(tmp_path / "build") == {"a.txt"}


def test_rules_of_the_repository_that_are_not_in_a_file_of_it_hold(tmp_path):
    write(tmp_path, {".git/info/exclude": "drafts/\n", "sub/drafts/a.md": "x", "sub/b.md": "x"})
    assert packed(tmp_path) == {"sub/b.md"}
    assert packed(tmp_path / "sub") == {"b.md"}


def test_defaults_hold_whatever_gitignore_takes_back(tmp_path):
    files = ("node_modules/m/index.js", ".venv/lib/a.py", ".env", "id_rsa", "uv.lock", "a.min.js")
    write(tmp_path, dict.fromkeys((*files, ".env.example", "a.js", ".git/config"), "text"))
    write(tmp_path, {".gitignore": "*\n!*/\n!*.*\n!.env\n!id_rsa\n"})
    assert packed(tmp_path) == {".env.example", ".gitignore", "a.js"}
    everything = packed(tmp_path, use_ignore_rules=False)
    assert everything == {*files, ".env.example", ".gitignore", "a.js"}


def test_exclude_wins_and_include_selects(tmp_path):
    write(tmp_path, dict.fromkeys(("a.py", "b.md", "sub/c.py", "sub/d.md"), "text"))
    write(tmp_path, {".gitignore": "!a.py\n"})
    assert packed(tmp_path, exclude=["a.py", "sub/"]) == {".gitignore", "b.md"}
    assert packed(tmp_path, include=["*.py"]) == {"a.py", "sub/c.py"}
    assert packed(tmp_path, include=["sub/"], exclude=["*.md"]) == {"sub/c.py"}


def test_rule_that_would_take_for_ever_is_not_applied(tmp_path, caplog):
    rules = compile_rules(["*a*a*a*a*b", "*.log"])
    assert len(rules) == 1 and "over 3 wildcards" in caplog.text
    write(tmp_path, {".gitignore": "*a" * 40 + "b\n", "a" * 200: "text"})
    assert "a" * 200 in packed(tmp_path)
