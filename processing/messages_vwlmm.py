# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What a conversation may hold, and how what its authors have typed is kept apart from what the template writes."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from .building_vwlmm import IMAGE_CODE_PREFIX
from .chat_templates_vwlmm import LITERAL_MARK, NORMALIZED_LITERAL_MARK


logger = logging.get_logger(__name__)

# Where a part can say which image it is.
IMAGE_SOURCES = ("image", "url", "path", "base64")
# What a message may have beside a role and content, and an answer depends on.
CALLS = ("tool_calls", "tool_call_id", "function_call")


def check_conversation(messages: Any, chat_template: str, where: str = "") -> None:
    """
    Checks that a conversation holds texts and images, and nothing that would be rendered as something else or left
    out.

    Args:
        messages (`list[dict]`): The conversation.
        chat_template (`str`): The template that it is for.
        where (`str`, *optional*): What stands in front of the name of a message in errors.

    Raises:
        ValueError: If not, with the message and the part.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"{where}`messages` is {_show(messages)}, expected a list of messages, one at least.")
    for number, message in enumerate(messages):
        name = f"{where}messages[{number}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{name} is {_show(message)}, expected a dictionary with 'role' and 'content'.")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise ValueError(f"{name}['role'] is {_show(role)}, expected a string, such as 'user' or 'assistant'.")
        for key in message.keys() - {"role", "content"}:
            if message[key] and key in CALLS and key not in chat_template:
                raise ValueError(f"{name} has {key!r}, for which the chat template has no place. Leave it out.")
            if message[key] is not None and key not in chat_template:
                logger.warning_once(f"Messages have {key!r}, which the chat template does not read.")
        if isinstance(content, str):
            check_text(content, f"{name}['content']")
        elif isinstance(content, (list, tuple)) and content:
            for index, part in enumerate(content):
                _check_part(part, f"{name}['content'][{index}]")
        elif not any(message.get(key) for key in CALLS):
            raise ValueError(
                f"{name}, a message of role {role!r}, has no content: found {_show(content)}, expected text or a list "
                "of parts."
            )


def _check_part(part: Any, name: str) -> None:
    if not isinstance(part, Mapping):
        raise ValueError(f"{name} is {_show(part)}, expected a dictionary with 'type'.")
    kind = part.get("type")
    if kind not in ("text", "image", "image_url"):
        raise ValueError(f"{name} has type {_show(kind)}, expected 'text' or 'image': the model has no other inputs.")
    sources = [key for key in (*IMAGE_SOURCES, "image_url") if part.get(key) is not None]
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{name}['text'] is {_show(part.get('text'))}, expected a string.")
        check_text(part["text"], f"{name}['text']")
        if sources:
            raise ValueError(f"{name} is a text and has {sources[0]!r}. Make a part of type 'image' of the image.")
    elif part.get("text") is not None:
        raise ValueError(f"{name} is an image and has 'text'. Make a part of type 'text' of the text.")
    elif len(sources) > 1:
        raise ValueError(f"{name} has {' and '.join(map(repr, sources))}, expected one image.")


def check_text(text: str, name: str) -> None:
    """Raises `ValueError` if a text has half of a surrogate pair, which is no character and cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half of a surrogate pair at character {error.start}, {text[error.start]!r}, which is no "
            "character. Remove it."
        ) from error


def _show(value: Any) -> str:
    return "missing or None" if value is None else repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."


def hide_control_tokens(value: Any, hidden: Mapping[str, str]) -> Any:
    """
    What a user has typed, with the control tokens in it written so that they are tokenized as text.

    Args:
        value (`Any`): A string, or lists and dictionaries of them. Images and their addresses stay as they are.
        hidden (`Mapping[str, str]`): What to write for each control token, from [`get_hidden_control_tokens`].

    Returns:
        The same with other strings; nothing is changed in place. Keys that are `None` are left out.
    """
    if isinstance(value, str):
        pattern = _pattern(tuple(hidden))
        while pattern.search(value):  # again, for one may lie in another
            value = pattern.sub(lambda match: hidden[match.group()], value)
        return value
    if isinstance(value, Mapping):
        is_image = value.get("type") in ("image", "image_url")
        return {k: v if is_image else hide_control_tokens(v, hidden) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        value = [hide_control_tokens(part, hidden) for part in value]
        for before, part in zip(value, value[1:], strict=False):
            texts = [p["text"] for p in (before, part) if isinstance(p, dict) and isinstance(p.get("text"), str)]
            if len(texts) == 2 and _pattern(tuple(hidden)).search("".join(texts)):
                # A control token in two halves, which the template puts together.
                part["text"] = NORMALIZED_LITERAL_MARK + part["text"]
        return value
    return value


@lru_cache(maxsize=8)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def get_hidden_control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """
    The tokenizer's special tokens, the longest first, and how each is written where it is text.

    Added tokens that are not special are words of the vocabulary, unless `chat_control_tokens` names them. A single
    character has no inside that a mark could be put in.
    """
    named = getattr(tokenizer, "chat_control_tokens", None) or ()
    tokens = [t for t in tokenizer.added_tokens_decoder.values() if t.special or t.content in named]
    # Thousands of codes, which have one beginning.
    num_tokens, tokens = len(tokens), [t for t in tokens if not t.content.startswith(IMAGE_CODE_PREFIX)]
    hidden = {} if len(tokens) == num_tokens else {IMAGE_CODE_PREFIX: f"<{LITERAL_MARK}{IMAGE_CODE_PREFIX[1:]}"}
    return hidden | {
        token.content: token.content[0]
        + (NORMALIZED_LITERAL_MARK if token.normalized else LITERAL_MARK)
        + token.content[1:]
        for token in sorted(tokens, key=lambda token: (-len(token.content), token.content))
        if len(token.content) > 1
    }
