"""Prompts: the tokens at the start of a generation."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from portax.checkpoints import config_json
from portax.converters.base import BaseConverter
from portax.errors import ConfigError, MissingPackageError, ValidationError


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The prompt for an engine.

    Attributes:
        tokens: Token ids.
        bos: The `<bos>` that was added in front because the family needs one and the prompt had none; None otherwise.
    """

    tokens: tuple[int, ...]
    bos: int | None


def make_prompt(tokens: Sequence[int], converter: BaseConverter, hub_config: Mapping[str, Any]) -> Prompt:
    """Checks token ids, and adds `<bos>` in front if this family's prompts begin with it.

    Args:
        tokens: Token ids.
        converter: The model's converter.
        hub_config: The hub's `config.json`, which names the `<bos>`.

    Raises:
        ValidationError: There are no tokens, or one is outside the vocabulary.
        ConfigError: The family needs a `<bos>`, and the hub's config names none.
    """
    if not tokens:
        raise ValidationError("the prompt is empty: give at least one token")
    bos = config_json.field(hub_config, "bos_token_id") if converter.starts_with_bos else None
    if converter.starts_with_bos and bos is None:
        raise ConfigError("prompts of this family begin with <bos>, and the hub config has no bos_token_id: add it")
    added = None if tokens[0] == bos else bos
    prompt = Prompt((*tokens,) if added is None else (added, *tokens), added)
    last = converter.config.vocab_size - 1
    if odd := [token for token in prompt.tokens if not 0 <= token <= last]:
        raise ValidationError(f"token {odd[0]} is outside this model's vocabulary, 0 to {last}")
    return prompt


def read_tokenizer(path: str | os.PathLike) -> Any:
    """Reads the tokenizer in a local folder.

    Args:
        path: The folder, with `tokenizer.json` or other files that transformers reads.

    Raises:
        ValidationError: There is no tokenizer.
        MissingPackageError: transformers is not installed.
    """
    if not pathlib.Path(path).exists():
        raise ValidationError(f"{path}: there is no such tokenizer; name a folder with tokenizer.json")
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"a tokenizer needs transformers, and there is no module named {error.name!r}: "
            "pip install 'portax[transformers]', or give --tokens"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(os.fspath(path), local_files_only=True)
    except Exception as error:  # whatever it is, it says why
        raise ValidationError(f"{path}: holds no tokenizer that transformers reads ({error})") from error
