"""What the server answers, for the OpenAPI document. Answers themselves are plain dicts; tests hold them to this."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Fault(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(BaseModel):
    """Every error of every route."""

    error: Fault


class UsageAnswer(Open):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class ChatMessageAnswer(Open):
    role: str
    content: str | None
    refusal: str | None
    reasoning: str | None


class ChatTopLogprob(Open):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(Open):
    content: list[ChatLogprob]


FinishReason = Literal["stop", "length", "abort", "error"]
PromptLogprobs = list[dict[str, dict[str, Any]] | None] | None


class ChatChoice(Open):
    index: int
    message: ChatMessageAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatAnswer(Open):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    prompt_logprobs: PromptLogprobs = None
    prompt_token_ids: list[int] | None = None


class CompletionLogprobsAnswer(Open):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Open):
    index: int
    text: str
    logprobs: CompletionLogprobsAnswer | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionAnswer(Open):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer


class ModelAnswer(Open):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[dict[str, Any]]


class ModelsAnswer(Open):
    object: Literal["list"]
    data: list[ModelAnswer]


class TokenizeAnswer(Open):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(Open):
    prompt: str


class VersionAnswer(Open):
    version: str


class LoadAnswer(Open):
    server_load: int = Field(description="Generations in flight.")


class Default(BaseModel):
    value: Any
    source: str


class ServerInfoAnswer(Open):
    version: str
    model: str
    max_model_len: int
    config: dict[str, Any]
    sampling_defaults: dict[str, Default]
