"""What clients may send: the bodies of all POST routes as pydantic models (interfaces.md 5.1, 5.2).

Types are strict (no "1" for 1), null means "not given", and unknown fields are allowed but reported, see ``unknown``.
Ranges of sampling values are checked once, by ``SamplingParams``. Fields of the API that are not served yet are in
``Unserved`` with the values that ask for nothing; any other value is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WrapValidator
from pydantic_core import PydanticCustomError

from tuili.base.errors import RequestError


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 16.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _ids(value: Any, check: Callable[[Any], Any]) -> Any:
    """Token ids, looked at in C: prompts of hundreds of thousands are possible."""
    if not isinstance(value, list):
        return check(value)
    found: list[int] = []
    for start in range(0, len(value), _PART):
        part = value[start : start + _PART]
        kinds: set[type] = set(map(type, part))
        if kinds == {int, float} or kinds == {float}:  # JSON knows one kind of number
            whole = list(map(int, part))
            if whole == part:
                part, kinds = whole, {int}
        if kinds != {int} or min(part) < 0 or max(part) >= ID_LIMIT:
            place = start + next(at for at, id in enumerate(part) if type(id) is not int or not 0 <= id < ID_LIMIT)
            raise PydanticCustomError("item", "Token ids are integers from 0 to 2147483647", {"item": [place]})
        found += part
    return found


def _biases(value: Any, check: Callable[[Any], Any]) -> Any:
    """The first bias that is no number, instead of a fault for each of many."""
    if isinstance(value, dict) and not set(map(type, value.values())) <= {int, float}:
        key = next(key for key, bias in value.items() if type(bias) not in (int, float))
        raise PydanticCustomError("item", "Input should be a valid number", {"item": [key]})
    return check(value)


def _prompt_kind(value: Any) -> str:
    """The one member of the union that may fit, so that a fault is told once and of the right item."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else None
    return "texts" if isinstance(first, str) else "lists of ids" if isinstance(first, list) else "ids"


def _range(low: float | None = None, high: float | None = None, help: str | None = None, **more: Any) -> Any:
    """An optional field; its limits go into the document only, since ``SamplingParams`` and ``sampling`` check them."""
    limits = {"minimum": low, "maximum": high, **more}
    extra = {key: value for key, value in limits.items() if value is not None}
    return Field(None, description=help, json_schema_extra=lambda schema: _limit(schema, extra))


def _limit(schema: dict[str, Any], extra: dict[str, Any]) -> None:
    """Put limits where they count: on the members of a union other than null."""
    members = [member for member in schema.get("anyOf", [schema]) if member.get("type") != "null"]
    for member in members:
        member.update(extra)
        if "exclusiveMinimum" in extra:
            member.pop("minimum", None)


def _later(*neutral: Any) -> Any:
    """A field that is not served yet: null and ``neutral`` ask for nothing, any other value is refused."""
    help = "Not served yet: other values are refused."
    return Field(None, description=help, json_schema_extra={"enum": [None, *neutral]})


T = TypeVar("T")
ID_LIMIT = 2**31
_PART = 4096
#: Messages of a chat, and parts of a message.
MAX_MESSAGES = 8192
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63), BeforeValidator(_whole)]
#: The first fault of a list ends the search: a list of a client may have a hundred thousand.
List = Annotated[list[T], Field(fail_fast=True)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=ID_LIMIT)]], WrapValidator(_ids)]
Word = Annotated[str, Field(json_schema_extra={"minLength": 1})]
Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[List[str], Tag("texts")]
    | Annotated[List[TokenIds], Tag("lists of ids")],
    Discriminator(_prompt_kind),
]


class Strict(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


def unknown(model: BaseModel, limit: int) -> tuple[list[str], list[str]]:
    """Paths of fields that the API does not know, at most ``limit`` of each kind: those that are ignored, and those of
    messages, which the chat template may see. null asks for nothing."""
    ignored = [key for key, value in (model.model_extra or {}).items() if value is not None]
    if isinstance(model, Control) and model.stream_options is not None:
        ignored += _extras(model.stream_options, "stream_options")
    passed_on: list[str] = []
    for place, message in enumerate(model.messages or () if isinstance(model, (ChatRequest, TokenizeRequest)) else ()):
        passed_on += _extras(message, f"messages.{place}")
        if not isinstance(message.content, str):
            for number, part in enumerate(message.content or ()):
                passed_on += _extras(part, f"messages.{place}.content.{number}")
    return ignored[:limit], passed_on[:limit]


def _extras(model: BaseModel, path: str) -> list[str]:
    return [f"{path}.{key}" for key, value in (model.model_extra or {}).items() if value is not None]


class StreamOptions(Strict):
    include_usage: bool | None = Field(None, description="Send a last chunk with the usage.")
    continuous_usage_stats: bool | None = Field(None, description="With include_usage: usage so far in every chunk.")


class Sampling(Strict):
    """Sampling fields that chat and completions share; null takes the model's default, shown by /server_info."""

    model: str | None = Field(None, description="The served name; left out: the one model that is served.")
    n: Integer | None = _range(1, 1024)
    temperature: float | None = _range(0, 2, "0 is greedy.")
    top_p: float | None = _range(None, 1, exclusiveMinimum=0)
    top_k: Integer | None = _range(-1, None, "0 or -1: off.")
    min_p: float | None = _range(0, 1)
    repetition_penalty: float | None = _range(1e-6, 1e6)
    presence_penalty: float | None = _range(-2, 2)
    frequency_penalty: float | None = _range(-2, 2)
    seed: Integer | None = None
    stop: Word | List[Word] | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Integer | None = _range(0)
    logit_bias: Annotated[dict[str, float], WrapValidator(_biases)] | None = _range(
        help="Token id as a string: bias in [-100, 100].",
        propertyNames={"pattern": "^[0-9]{1,9}$"},
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
    )
    allowed_token_ids: TokenIds | None = _range(minItems=1)
    bad_words: List[Word] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: Integer | None = _range(-1, None, "Top logprobs per prompt token; not with stream.")


class Unserved(Strict):
    """Fields of the API that this server knows and does not serve yet."""

    use_beam_search: Any = _later(False)
    length_penalty: Any = _later(1, 1.0)
    logprob_token_ids: Any = _later([])
    thinking_token_budget: Any = _later()
    include_reasoning: Any = _later(True)
    repetition_detection: Any = _later()
    response_format: Any = _later({"type": "text"})
    structured_outputs: Any = _later()
    guided_json: Any = _later()
    guided_regex: Any = _later()
    guided_choice: Any = _later()
    guided_grammar: Any = _later()
    guided_decoding_backend: Any = _later()
    guided_whitespace_pattern: Any = _later()
    kv_transfer_params: Any = _later()
    vllm_xargs: Any = _later({})
    mm_processor_kwargs: Any = _later({})
    media_io_kwargs: Any = _later({})
    return_prompt_text: Any = _later(False)
    return_weight_versions: Any = _later(False)
    stream_interval: Any = _later(1)

    @classmethod
    @cache
    def unserved(cls) -> dict[str, list[Any]]:
        """The fields of ``_later`` and what may be sent for them."""
        extras = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return {name: extra["enum"] for name, extra in extras.items() if isinstance(extra, dict)}  # type: ignore[misc]

    def refuse_unserved(self) -> None:
        """Raises RequestError that names the first field whose value asks for something that is not served.

        400 and not 501, because clients (openai-python among them) send a request again after any 5xx.
        """
        known = self.unserved()
        for name in known.keys() & self.model_fields_set:
            value, neutral = getattr(self, name), known[name]
            if not any(type(value) is type(item) and value == item for item in neutral):
                raise RequestError(f"{name} is not supported by this server yet; leave it out", name)


class Control(Strict):
    """Fields about the answer and the request, not about the text."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    request_id: str | None = Field(None, min_length=1, max_length=128)
    priority: Integer | None = Field(None, description="Lower goes first; needs --scheduling-policy priority.")
    cache_salt: str | None = _range(
        help="Prefixes are reused between equal salts only.", pattern=r"^[^@/\\\x00]{1,128}$"
    )
    truncate_prompt_tokens: Integer | None = _range(-1, None, "Keep so many prompt tokens; -1: what fits.")
    truncation_side: Literal["left", "right"] | None = Field(None, description="The side that is cut off; left.")
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(None, description='Write tokens of logprobs as "token_id:123".')
    add_special_tokens: bool | None = None
    echo: bool | None = None
    user: str | None = Field(None, description="Accepted; has no effect.")


class TemplateFields(Strict):
    """What shapes the prompt of a chat."""

    add_generation_prompt: bool | None = Field(None, description="True, unless continue_final_message is set.")
    continue_final_message: bool | None = Field(None, description="Go on with the last message instead of answering.")
    chat_template: str | None = Field(None, description="Needs --trust-request-chat-template.")
    chat_template_kwargs: dict[str, Any] | None = None


class TextPart(Strict):
    """Only text is served: parts of type image_url, input_audio, video_url are refused."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None


Parts = Annotated[List[TextPart], Field(max_length=MAX_MESSAGES)]


class PlainMessage(Strict):
    role: Literal["system", "developer", "user"]
    content: str | Parts
    name: str | None = None


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: str | Parts | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = Field(None, description="Other name of reasoning.")
    tool_calls: List[dict[str, Any]] | None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: str | Parts
    tool_call_id: str


Message = Annotated[PlainMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class ChatRequest(Sampling, Control, TemplateFields, Unserved):
    """Body of POST /v1/chat/completions."""

    messages: List[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Integer | None = _range(1, None, "Left out: to the end of the context.")
    max_tokens: Integer | None = _range(1, None, "Old name of max_completion_tokens, which wins.")
    logprobs: bool | None = None
    top_logprobs: Integer | None = _range(-1, None, "Needs logprobs; -1: all, where --max-logprobs allows it.")
    tools: List[dict[str, Any]] | None = Field(None, description='Only with tool_choice "none".')
    tool_choice: Any = Field(None, description='Only "none" is served yet.')
    parallel_tool_calls: bool | None = None
    documents: List[dict[str, Any]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    service_tier: str | None = Field(None, description="Accepted; has no effect.")
    metadata: dict[str, Any] | None = Field(None, description="Accepted; has no effect.")
    store: bool | None = Field(None, description="Accepted; nothing is stored.")
    functions: Any = _later([])
    function_call: Any = _later("none")
    modalities: Any = _later(["text"])
    audio: Any = _later()


class CompletionRequest(Sampling, Control, Unserved):
    """Body of POST /v1/completions."""

    prompt: Prompt = Field(description="One or several, as text or token ids.")
    max_tokens: Integer | None = Field(
        16,
        description="null: to the end of the context; 0 with echo: only the prompt.",
        json_schema_extra=lambda schema: _limit(schema, {"minimum": 0}),
    )
    logprobs: Integer | None = _range(-1, None, "Top logprobs per token; -1: all, where --max-logprobs allows it.")
    best_of: Integer | None = Field(None, description="Only the value of n is served.")
    suffix: Any = _later("")
    prompt_embeds: Any = _later()


class TokenizeRequest(TemplateFields):
    """Body of POST /tokenize: ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: List[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tools: List[dict[str, Any]] | None = None
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
