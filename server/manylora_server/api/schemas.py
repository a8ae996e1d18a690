"""The bodies of requests: OpenAI's fields, ours, and those of OpenAI's that we must refuse."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from manylora_server.api.field_types import Adapter, Content, Prompt, Stop
from manylora_server.api.strict import StrictModel, only

Unit = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
MaxTokens = Annotated[int, Field(ge=1, lt=2**31)]


class StreamOptions(StrictModel):
    """``include_usage`` adds a last chunk with the usage and no choices."""

    include_usage: bool = False
    include_obfuscation: Annotated[Any, only(False)] = False


class GenerationRequest(StrictModel):
    """What completions and chat completions have in common."""

    keeps_null: ClassVar[frozenset[str]] = frozenset({"adapter"})

    model: str | None = None
    adapter: Adapter = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    max_tokens: MaxTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=1024, default_factory=dict)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop = Field(default_factory=list)
    user: str | None = None

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Unit = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[
        list[Annotated[int, Field(ge=0)]], Field(max_length=128, default_factory=list)
    ]
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: Prompt
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: Annotated[Any, only("")] = None


class ChatMessage(StrictModel):
    """One message; the last group of fields is what OpenAI's client sends back with an answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    refusal: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None


class ChatCompletionRequest(GenerationRequest):
    """``POST /v1/chat/completions``. The last group of fields changes nothing here."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    functions: Annotated[Any, only([])] = None
    modalities: Annotated[Any, only(["text"])] = None
    moderation: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only("none")] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    store: Annotated[Any, only(False)] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    tools: Annotated[Any, only([])] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None

    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None


class TokenizeRequest(StrictModel):
    """``POST /tokenize``: either ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_generation_prompt: bool = True


class DetokenizeRequest(StrictModel):
    """``POST /detokenize``; special tokens are written out."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


REQUEST_MODELS: tuple[type[StrictModel], ...] = (
    CompletionRequest,
    ChatCompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
)
