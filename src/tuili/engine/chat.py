"""Messages to a prompt, by the model's own Jinja chat template (interfaces.md 5.4). No template, no chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tuili.base.errors import ConfigError, ModelError, RequestError

Messages = Sequence[Mapping[str, Any]]
#: What a content part may be called, and the key of its text.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
MEDIA_PARTS = ("image", "image_url", "input_image", "input_audio", "audio_url", "video_url", "video", "file")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class ChatTemplate:
    """A compiled template. ``parts`` tells whether it wants message contents as lists of parts, or as strings.

    Raises jinja2.TemplateSyntaxError for text that is no template.
    """

    def __init__(self, source: str, now: Callable[[], datetime] = datetime.now):
        environment = _environment(now)
        self.source = source
        self.parts = wants_parts(environment.parse(source))
        self._template = environment.from_string(source)

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
        conversation = [normalize(message, self.parts) for message in _listed(messages)]
        values = {
            **(special_tokens or {}),
            "tools": tools or None,
            "documents": documents,
            **(kwargs or {}),
            "messages": conversation,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(values)
        except RequestError:
            raise
        except Exception as error:  # a template is a program: it may fail in any way
            raise RequestError(f"the chat template failed: {type(error).__name__}: {error}", "messages") from error
        return _cut_after(text, conversation[-1]) if continue_final_message else text


@lru_cache(maxsize=64)
def compiled(source: str) -> ChatTemplate:
    """The template, compiled once."""
    return ChatTemplate(source)


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}`` marks what training learns from; for a prompt it is its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's protocol)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise RequestError(f"the chat template refuses these messages: {message}", "messages")


# ------------------------------------------------------------------------------------------------ where templates are


def find_template(
    directory: Path, tokenizer_config: Mapping[str, Any], override: str | None = None, *, tools: bool = False
) -> str | None:
    """The model's template: ``override`` (a file, or the text itself), chat_template.jinja, then tokenizer_config.json.

    Where the latter has several, ``tool_use`` is taken for requests with tools, else ``default``. None: there is none.
    """
    if override is not None:
        return read_override(override)
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = tokenizer_config.get("chat_template")
    if found is None or isinstance(found, str):
        return found
    try:
        named = {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError) as error:
        raise ModelError(
            f"{directory}: chat_template in tokenizer_config.json must be a string or a list of names"
        ) from error
    return named.get("tool_use", named.get("default")) if tools else named.get("default")


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


def normalize(message: Mapping[str, Any], parts: bool) -> dict[str, Any]:
    """A copy as templates expect it: content as string or parts, arguments of tool calls as objects."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"each message must be an object with a role, got {message!r:.200}", "messages")
    if message["role"] not in ROLES:
        raise RequestError(f"role {message['role']!r} is unknown. Known: {', '.join(ROLES)}.", "messages")
    texts = _texts(message.get("content"))
    own = dict(message)
    if parts:
        own["content"] = [{"type": "text", "text": text} for text in texts]
    else:
        own["content"] = "\n".join(texts)
    if message.get("tool_calls"):
        own["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    return own


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
    if not isinstance(arguments, str):
        return dict(call)
    try:
        return {**call, "function": {**function, "arguments": json.loads(arguments or "{}")}}
    except ValueError as error:
        raise RequestError(f"arguments of a tool call are not JSON ({error}): {arguments:.200}", "messages") from error


def _cut_after(text: str, message: Mapping[str, Any]) -> str:
    """The rendered text up to the end of the last message's content, so that the model goes on writing it."""
    content = message["content"]
    if isinstance(content, list):
        content = content[-1]["text"] if content else ""
    bare = content.strip()
    start = text.rfind(bare)
    if start < 0 or not bare:
        raise RequestError(
            "continue_final_message: the last message is empty, or the chat template does not write it as it is",
            "continue_final_message",
        )
    # Templates may trim: keep the content's trailing blanks only where they were written.
    end = start + len(bare)
    tail = content[len(content.rstrip()) :]
    return text[:end] + (tail if text.startswith(tail, end) else "")


# ------------------------------------------------------------------------------------------------ string or parts?


def wants_parts(tree: nodes.Template) -> bool:
    """True when the template loops over a message's content, by name or by way of a variable or a macro's argument."""
    names = {"content"} | set(_aliases(tree))
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _aliases(tree: nodes.Template) -> Iterator[str]:
    """Variables that are set to a message's content."""
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, set()):
            yield assign.target.name


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names
