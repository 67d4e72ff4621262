"""Reading a tokenizer from disk: `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from linnet.errors import DataError
from linnet.text.special import GPT2_END_OF_TEXT, SPECIAL_TOKENS, THINKING_AND_TOOLS


def read_backend(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:  # Any: a JSON file
    """Read the tokenizer in a folder or file, and the `tokenizer_config.json` beside it, if any.

    Raises:
        DataError: nothing is there, or it is damaged.
    """
    folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
    config = _read_config(folder / "tokenizer_config.json")
    if file.is_file() and file.name != "vocab.json":
        return _read_tokenizer_json(file), config
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _read_gpt2(folder, config), config
    raise DataError(
        f"no tokenizer at {str(path)!r}; expected tokenizer.json, or vocab.json and merges.txt"
    )


def token_text(token: str | dict[str, str] | None) -> str | None:
    """Return the text of a token as `tokenizer_config.json` writes it: plain, or with settings."""
    return token["content"] if isinstance(token, dict) else token


def _read_config(path: Path) -> dict[str, Any]:  # Any: a JSON file
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{str(path)!r} holds {type(config).__name__}; expected a JSON object")
    return config


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises nothing more precise
        raise DataError(f"{str(path)!r} is not a tokenizer.json: {error}") from None


def _read_gpt2(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # `tokenizers` raises nothing more precise
        raise DataError(
            f"vocab.json and merges.txt in {str(folder)!r} do not fit: {error}"
        ) from None
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for name in (*SPECIAL_TOKENS, GPT2_END_OF_TEXT):
        if backend.token_to_id(name) is not None:
            special = name not in THINKING_AND_TOOLS
            backend.add_tokens([AddedToken(name, special=special, normalized=False)])
    added = config.get("added_tokens_decoder", {})
    for token_id, token in sorted(added.items(), key=lambda item: int(item[0])):
        name, special = token["content"], token.get("special", True)
        backend.add_tokens([AddedToken(name, special=special, normalized=False)])
        if backend.token_to_id(name) != int(token_id):
            raise DataError(
                f"tokenizer_config.json in {str(folder)!r} gives {name!r} the id {token_id}; "
                f"vocab.json makes it {backend.token_to_id(name)}"
            )
    for key in ("bos_token", "eos_token"):
        if name := token_text(config.get(key)):
            backend.add_special_tokens([AddedToken(name, normalized=False)])
    return backend
