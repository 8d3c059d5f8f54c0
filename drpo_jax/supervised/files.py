"""Training texts from JSON Lines and Parquet: chats, and prompts with responses.

A row is a chat if it has `messages` (or `conversations`), and a pair otherwise:

    {"messages": [{"role": "user", "content": "12+34="}, {"role": "assistant", "content": "46"}]}
    {"prompt": "12+34=", "response": "46"}

The formats of common data sets are accepted as well: `from` and `value` with human and gpt
(ShareGPT), contents in text parts, a `prompt` or `completion` that is a list of messages, `instruction`
with `input` and `output` (Alpaca), and the names in `PROMPTS` and `RESPONSES`.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from drpo_jax.data.rows import matching_files, read_rows, shown, text_field
from drpo_jax.storage import path_of

CHATS = ("messages", "conversations")
PROMPTS = ("prompt", "question", "problem", "instruction")
# The first of these fields is the response; a worked solution precedes a bare answer.
RESPONSES = ("response", "completion", "output", "solution", "answer")
_COLUMNS = {*CHATS, *PROMPTS, *RESPONSES, "input"}
_ROLES = {"human": "user", "gpt": "assistant"}

PAIR_EXAMPLE = '{"prompt": "12+34=", "response": "46"}'
CHAT_EXAMPLE = (
    '{"messages": [{"role": "user", "content": "12+34="}, {"role": "assistant", "content": "46"}]}'
)


class Pair(NamedTuple):
    """A prompt with its response; `where` is the file and line, for messages."""

    where: str
    prompt: str
    response: str


class Chat(NamedTuple):
    """A chat as messages with role and content; `where` is the file and line, for messages."""

    where: str
    messages: list[dict[str, str]]


def read_texts(path: str | os.PathLike) -> Iterator[Pair | Chat]:
    """Yields the rows of a file, or of several files if the last part of the path contains "*".

    Raises:
      ValueError: there are no rows, or a row is malformed; the message names the file, the line (the
        row of a Parquet file) and the field, and shows a correct example.
      OSError: a file cannot be read.
    """
    empty = True
    for file in matching_files(path_of(path)):
        for where, record in read_rows(file, _COLUMNS, (*CHATS, *PROMPTS), PAIR_EXAMPLE):
            empty = False
            yield _parse({k: v for k, v in record.items() if v is not None}, where)
    if empty:
        raise ValueError(
            f"{path}: the file is empty; it needs lines like {PAIR_EXAMPLE} or {CHAT_EXAMPLE}"
        )


def _parse(record: Mapping[str, Any], where: str) -> Pair | Chat:
    chats = [name for name in CHATS if name in record]
    if chats:
        return Chat(where, _checked(_messages(record[chats[0]], chats[0], where), chats[0], where))
    prompt = _first(record, PROMPTS, where)
    response = _first(record, RESPONSES, where)
    if not isinstance(record[prompt], list) and not isinstance(record[response], list):
        text = text_field(record, prompt, where, PAIR_EXAMPLE)
        if prompt == "instruction" and record.get("input"):
            text += "\n\n" + text_field(record, "input", where, PAIR_EXAMPLE)
        return Pair(where, text, text_field(record, response, where, PAIR_EXAMPLE))
    messages = []
    for name, role in ((prompt, "user"), (response, "assistant")):
        if isinstance(record[name], list):
            messages += _messages(record[name], name, where)
        else:
            text = text_field(record, name, where, CHAT_EXAMPLE)
            messages.append({"role": role, "content": text})
    return Chat(where, _checked(messages, response, where))


def _first(record, names, where):
    """Returns the first of the names that is in the record; raises ValueError if none is."""
    for name in names:
        if name in record:
            return name
    present = ", ".join(map(repr, record)) or "no field at all"
    raise ValueError(
        f"{where}: the line has {present}, but none of {', '.join(names)}. A line looks like "
        f"{PAIR_EXAMPLE} or {CHAT_EXAMPLE}"
    )


def _messages(value: Any, name: str, where: str) -> list[dict[str, str]]:
    """Returns the messages of the list in field `name`, with role and content."""
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{where}: field '{name}' is {shown(value)}, but must be a list of messages, as in "
            f"{CHAT_EXAMPLE}"
        )
    messages = []
    for number, message in enumerate(value):
        place = f"{name}[{number}]"
        if not isinstance(message, dict):
            raise ValueError(
                f"{where}: field '{place}' is {shown(message)}, but must be a message with role and "
                f"content, as in {CHAT_EXAMPLE}"
            )
        message = {k: v for k, v in message.items() if v is not None}
        if "role" not in message and "from" in message:
            message = {"role": message["from"], "content": message.get("value")}
        content = message.get("content")
        if isinstance(content, list):
            message["content"] = _joined(content, place, where)
        role = text_field(message, "role", where, CHAT_EXAMPLE, f"{place}.")
        text = text_field(message, "content", where, CHAT_EXAMPLE, f"{place}.")
        messages.append({"role": _ROLES.get(role, role), "content": text})
    return messages


def _joined(parts, place, where):
    """Returns the text of content in parts: [{"type": "text", "text": "…"}]."""
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if wrong := [part for part, text in zip(parts, texts) if not isinstance(text, str)]:
        raise ValueError(
            f"{where}: field '{place}.content' has the part {shown(wrong[0])}, but only text parts "
            "are supported"
        )
    return "".join(texts)


def _checked(messages: list[dict[str, str]], name: str, where: str) -> list[dict[str, str]]:
    """Returns the messages; raises ValueError unless an assistant answers one of them."""
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant":
        raise ValueError(
            f"{where}: field '{name}' begins with the assistant; a user message must come first"
        )
    if "assistant" not in roles:
        raise ValueError(
            f"{where}: field '{name}' has the roles {', '.join(roles)}, but no assistant, so it has no "
            f"response to learn from. A line looks like {CHAT_EXAMPLE}"
        )
    return messages
