"""The HTTP routes that complete a prompt, and what their responses contain.

The ids as generated are needed: tokenizing an answer's text does not always give them back.  SGLang's ``/generate``
accepts and returns ids.  The ``/v1/completions`` of some other servers (vLLM) accepts a prompt of ids and returns ids
on request.  All others return text only.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data.rollout import Completion, Request

STOPPED = {"stop": True, "eos": True, "tool_calls": True, "length": False}
"""Whether an answer ended by itself, by the servers' names of finish reasons."""
TOKEN_ID_PREFIX = "token_id:"
"""vLLM's prefix of an id in place of a token's text."""


class Protocol(ABC):
    """A route, its request bodies and its responses.

    Args:
        model: the server's name of the model.
        stop_ids: ids that end an answer, in addition to the server's own.
        vocab_size: ids are below it.
    """

    NAME: ClassVar[str]
    """Name of the route in a manifest."""
    PATH: ClassVar[str]

    def __init__(self, model: str, sampling: Sampling, stop_ids: list[int], vocab_size: int):
        self.model, self.sampling, self.stop_ids, self.vocab_size = model, sampling, stop_ids, vocab_size

    @abstractmethod
    def body(self, request: Request) -> dict[str, Any]:
        """The JSON to send.

        Raises:
            ValueError: the route cannot express the request.
        """

    @abstractmethod
    def read(self, response: Any) -> Completion:
        """The completion in a response's JSON.

        Raises:
            ValueError, KeyError, TypeError, IndexError: there is none.
        """

    def _check_ids(self, ids: Any) -> list[int]:
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"{ids!r:.60} are no ids of the target's vocabulary of {self.vocab_size}")
        return ids

    def _openai_body(self, request: Request) -> dict[str, Any]:
        """The fields that the OpenAI-compatible routes share."""
        sampling = self.sampling
        body = {"model": self.model, "max_tokens": request.limit, "temperature": sampling.temperature}
        if sampling.temperature:
            body |= {"top_p": sampling.top_p, "seed": request.seed}
            body |= {"top_k": sampling.top_k} if sampling.top_k else {}
        return body


class SGLangGenerate(Protocol):
    """SGLang's own route.  It uses seeds with --enable-deterministic-inference only."""

    NAME, PATH = "sglang", "/generate"

    def body(self, request: Request) -> dict[str, Any]:
        sampling = self.sampling
        params = {
            "max_new_tokens": request.limit, "temperature": sampling.temperature, "stop_token_ids": self.stop_ids
        }  # fmt: skip
        if sampling.temperature:
            params |= {"top_p": sampling.top_p, "top_k": sampling.top_k or -1, "sampling_seed": request.seed}
        return {"input_ids": request.prompt, "sampling_params": params}

    def read(self, response: Any) -> Completion:
        reason = response["meta_info"]["finish_reason"]
        if reason["type"] == "abort":
            raise ValueError(f"aborted: {reason.get('message')}")
        return Completion(self._check_ids(response["output_ids"]), STOPPED[reason["type"]])


class CompletionIds(Protocol):
    """``/v1/completions`` with ids both ways."""

    NAME, PATH = "completions", "/v1/completions"
    ID_OPTIONS: ClassVar[dict[str, Any]] = {"return_token_ids": True}
    """The fields that request ids."""

    def body(self, request: Request) -> dict[str, Any]:
        body = {**self._openai_body(request), **self.ID_OPTIONS, "prompt": request.prompt}
        return body | ({"stop_token_ids": self.stop_ids} if self.stop_ids else {})

    def read(self, response: Any) -> Completion:
        choice = response["choices"][0]
        return Completion(self._check_ids(self._ids(choice)), STOPPED[choice["finish_reason"]])

    def _ids(self, choice: Any) -> Any:
        return choice["token_ids"]


class CompletionLogprobs(CompletionIds):
    """``/v1/completions`` with ids as the token names of the log-probabilities, for older versions of vLLM."""

    NAME = "completions-logprobs"
    ID_OPTIONS: ClassVar[dict[str, Any]] = {"logprobs": 0, "return_tokens_as_token_ids": True}

    def _ids(self, choice: Any) -> Any:
        tokens = choice["logprobs"]["tokens"]
        return [int(t.removeprefix(TOKEN_ID_PREFIX)) if t.startswith(TOKEN_ID_PREFIX) else -1 for t in tokens]


class Chat(Protocol):
    """``/v1/chat/completions``: the server renders the conversation and returns text only."""

    NAME, PATH = "chat", "/v1/chat/completions"

    def body(self, request: Request) -> dict[str, Any]:
        if not request.messages:
            raise ValueError("a row of token ids cannot be sent to a server that accepts text only")
        messages = [_convert_arguments(message, json.dumps, dict) for message in request.messages]
        body = {**self._openai_body(request), "messages": messages}
        return body | ({"tools": request.tools} if request.tools else {})

    def read(self, response: Any) -> Completion:
        choice = response["choices"][0]
        received = choice["message"]
        message = {key: received[key] for key in ("content", "reasoning_content", "tool_calls") if received.get(key)}
        stopped = STOPPED[choice["finish_reason"]]
        # At its limit an answer may consist of reasoning only.
        empty = not message.keys() & {"content", "tool_calls"}
        if not isinstance(received.get("content") or "", str) or (empty and stopped):
            raise ValueError("an answer without content")
        message.setdefault("content", "" if "tool_calls" not in message else None)
        message = _convert_arguments({"role": "assistant", **message}, json.loads, str)
        return Completion(None, stopped, message)


def _convert_arguments(message: dict[str, Any], convert: Callable[[Any], Any], kind: type) -> dict[str, Any]:
    """``message`` with the tool calls' arguments of type ``kind`` converted.

    They are text in this API, and objects for chat templates and in the data.
    """
    if not message.get("tool_calls"):
        return message
    calls = [{**call, "function": dict(call["function"])} for call in message["tool_calls"]]
    for call in calls:
        if isinstance(call["function"].get("arguments"), kind):
            call["function"]["arguments"] = convert(call["function"]["arguments"])
    return {**message, "tool_calls": calls}
