"""Messages to a prompt, by the model's own Jinja chat template (interfaces.md 5.4). No template, no chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from tuili.base.errors import ConfigError, ModelError, RequestError
from tuili.engine.dialect import OTHER_ROLES, Dialect, read_dialect
from tuili.engine.sandbox import BUDGET, Budget, Sandbox
from tuili.models.checkpoint import TEMPLATES
from tuili.models.read import read_json, read_text

Messages = Sequence[Mapping[str, Any]]
#: What a content part may be called, and the key of its text.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
MEDIA_PARTS = ("image", "image_url", "input_image", "input_audio", "audio_url", "video_url", "video", "file")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
#: What a message's reasoning is called; templates read the first, or gpt-oss's the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
#: Marks the end of the message that is to be continued. The blank shows whether the template trims.
MARK = "End_of_final_message_{} "


class ChatTemplate:
    """A compiled template. ``dialect`` tells what it wants messages to be like.

    Raises jinja2.TemplateSyntaxError for text that is no template.
    """

    def __init__(self, source: str, now: Callable[[], datetime] = datetime.now):
        environment = Sandbox()
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        self.source = source
        self._template = environment.from_string(source)
        self.dialect = read_dialect(environment.parse(source))

    def render(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        special_tokens: Mapping[str, str] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. RequestError for messages that the template refuses, or that are not messages."""
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other; set the second to false",
                "continue_final_message",
            )
        conversation = [normalize(message, self.dialect) for message in _listed(messages)]
        values = {
            **(special_tokens or {}),
            "tools": tools or None,
            "documents": documents,
            **(kwargs or {}),
            "messages": conversation,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._text(values, conversation)
        if not continue_final_message:
            return text
        number = next(n for n in range(len(text) + 1) if MARK.format(n).strip() not in text)
        mark = MARK.format(number)
        marked = [*conversation[:-1], _marked(conversation[-1], mark)]
        return _cut_at(mark, self._text(values | {"messages": marked}, marked), text)

    def _text(self, values: Mapping[str, Any], conversation: list[dict[str, Any]]) -> str:
        characters = sum(_size(value) for value in (conversation, values["tools"], values["documents"]))
        try:
            text: str = self._template.render({**values, BUDGET: Budget(characters, len(conversation))})
        except RequestError:
            raise
        except Exception as error:  # a template is a program: it may fail in any way
            raise RequestError(f"the chat template failed: {type(error).__name__}: {error}", "messages") from error
        return text


@lru_cache(maxsize=64)
def compiled(source: str) -> ChatTemplate:
    """The template, compiled once."""
    return ChatTemplate(source)


def _raise(message: str) -> None:
    raise RequestError(f"the chat template refuses these messages: {message}", "messages")


# ------------------------------------------------------------------------------------------------ where templates are


def find_template(
    directory: Path, tokenizer_config: Mapping[str, Any], override: str | None = None, *, tools: bool = False
) -> str | None:
    """The model's template: ``override`` (a file, or the text itself), else that of its files. None: there is none.

    Where there are several, ``tool_use`` is taken for requests with tools, else ``default``. ModelError for files that
    cannot be read.
    """
    if override is not None:
        return read_override(override)
    named = _listed_templates(directory, tokenizer_config) | _template_files(directory)
    return named.get("tool_use", named.get("default")) if tools else named.get("default")


def _template_files(directory: Path) -> dict[str, str]:
    files = {"default": directory / "chat_template.jinja", "tool_use": directory / TEMPLATES / "tool_use.jinja"}
    return {name: read_text(path) for name, path in files.items() if path.exists()}


def _listed_templates(directory: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Those of tokenizer_config.json, or of the file in which older multimodal checkpoints have it."""
    where, found = "tokenizer_config.json", tokenizer_config.get("chat_template")
    if found is None:
        where = "chat_template.json"
        found = read_json(directory / where, optional=True).get("chat_template")
    listed = [{"name": "default", "template": found}] if isinstance(found, str) else found or []
    if not isinstance(listed, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in listed
    ):
        raise ModelError(f"{directory}: chat_template in {where} must be a string or a list of names and templates")
    return {entry["name"]: entry["template"] for entry in listed}


def read_override(text: str) -> str:
    """``--chat-template``: the content of the file of that name, or the text where it looks like a template."""
    if "{" in text or "\n" in text:
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # not UTF-8, a NUL in the name, no such user's home
        raise ConfigError(f"--chat-template {text!r} is no readable file ({error}), and no Jinja text") from error


# ------------------------------------------------------------------------------------------------------- the messages


def _listed(messages: Messages) -> Messages:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages must be a non-empty list", "messages")
    return messages


class Content(str):
    """A string to templates that treat it as one; to those that loop over it, a list of one part of text.

    ``indexed``: its first item is that part too.
    """

    indexed = False

    def __iter__(self) -> Iterator[Any]:
        return iter([{"type": "text", "text": str(self)}])

    def __getitem__(self, key: Any) -> Any:
        return next(iter(self)) if self.indexed and key == 0 else super().__getitem__(key)


class IndexedContent(Content):
    indexed = True


def normalize(message: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    """A copy as templates expect it: content as string or parts, arguments of tool calls as objects."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"each message must be an object with a role, got {message!r:.200}", "messages")
    if message["role"] not in ROLES:
        raise RequestError(f"role {message['role']!r} is unknown. Known: {', '.join(ROLES)}.", "messages")
    own = {key: value for key, value in message.items() if value is not None}
    if own["role"] not in dialect.roles:
        own["role"] = OTHER_ROLES.get(own["role"], own["role"])
    missing = "content" not in (message if dialect.asks_none else own)
    if not (missing and dialect.asks_defined):
        own["content"] = _content(message, dialect)
    if (reasoning := next((own[key] for key in REASONING if key in own), None)) is not None:
        own = {"thinking": reasoning, **own, "reasoning_content": reasoning}
    calls = own.pop("tool_calls", None)
    if calls:  # none at all: templates ask for the key
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise RequestError(f"tool_calls must be a list, got {calls!r:.200}", "messages")
        own["tool_calls"] = [_tool_call(call) for call in calls]
    return own


def _content(message: Mapping[str, Any], dialect: Dialect) -> Any:
    content = message.get("content")
    if content is None and dialect.asks_none and message["role"] == "assistant":
        return None
    if dialect.parts and isinstance(content, str | None):
        return (Content if dialect.tests_strings else IndexedContent)(content or "")
    texts = _texts(content)
    return [{"type": "text", "text": text} for text in texts] if dialect.parts else "\n".join(texts)


def _texts(content: Any) -> list[str]:
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence):
        raise RequestError(f"content must be a string or a list of parts, got {content!r:.200}", "messages")
    return [_text(part) for part in content]


def _text(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in MEDIA_PARTS:
        raise RequestError(f"content parts of type {kind!r} are not supported yet; send text only", "messages")
    if kind not in TEXT_PARTS or not isinstance(part.get(TEXT_PARTS[kind]), str):
        raise RequestError(f"content part {part!r:.200} is not {{'type': 'text', 'text': ...}}", "messages")
    return part[TEXT_PARTS[kind]]


def _tool_call(call: Any) -> dict[str, Any]:
    """OpenAI sends arguments as a JSON string; templates write them with ``tojson``."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(f"tool_calls must hold {{'function': {{...}}}}, got {call!r:.200}", "messages")
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str):
        arguments = _parsed(arguments or "")
    return {**call, "function": {**function, "arguments": arguments}}


def _parsed(arguments: str) -> Any:
    """A function that takes no arguments is called with none, however that is written."""
    try:
        value = json.loads(arguments.strip() or "{}")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"arguments of a tool call are not JSON ({error}): {arguments:.200}", "messages") from error
    return {} if value is None else value


def _size(value: Any) -> int:
    """About the characters that ``value`` has, of what JSON is made of."""
    size, waiting = 0, [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            waiting.extend(part.values())
        elif isinstance(part, list | tuple):
            waiting.extend(part)
        size += len(part) if isinstance(part, str) else 4
    return size


# ------------------------------------------------------------------------------------- continuing the last message


def _marked(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """``message`` with ``mark`` behind its last text. RequestError for one that has none."""
    content = message.get("content")
    if isinstance(content, list) and content and content[-1]["text"].strip():
        return {**message, "content": [*content[:-1], content[-1] | {"text": content[-1]["text"] + mark}]}
    if isinstance(content, str) and content.strip():
        return {**message, "content": type(content)(content + mark)}
    raise RequestError("continue_final_message: the last message is empty", "continue_final_message")


def _cut_at(mark: str, marked: str, text: str) -> str:
    """``text`` up to where ``marked``, the same with a mark in it, has its mark."""
    at = marked.rfind(mark.strip())
    start = marked[: max(at, 0)]
    if not marked.startswith(mark, at):  # the template trims the message, and would have trimmed its end too
        start = start.rstrip()
    if at < 0 or not text.startswith(start):
        raise RequestError(
            "continue_final_message: the chat template does not write the last message as it is",
            "continue_final_message",
        )
    return start
