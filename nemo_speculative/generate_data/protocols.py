"""How a server is asked for an answer, and what it tells of it.

What is wanted are the ids as generated: the text of an answer does not always give them back.  SGLang's ``/generate``
takes and gives ids.  Some other servers' ``/v1/completions`` takes a prompt of ids, and gives ids where it is asked to
(vLLM).  Of all others there is the text.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data.rollout import Completion, Request

ENDS = {"stop": True, "eos": True, "tool_calls": True, "length": False}
"""What servers call the end of an answer, and whether it ended by itself."""
TOKEN_ID = "token_id:"
"""What vLLM puts before an id that stands where text is expected."""


class Protocol(ABC):
    """
    Args:
        model: which of the server's models answers.
        sampling: how.
        stop_ids: what ends an answer, beside what the server knows itself.
        vocab_size: ids lie below it.
    """

    NAME: ClassVar[str]
    """As a manifest says it."""
    PATH: ClassVar[str]

    def __init__(self, model: str, sampling: Sampling, stop_ids: list[int], vocab_size: int):
        self.model, self.sampling, self.stop_ids, self.vocab_size = model, sampling, stop_ids, vocab_size

    @abstractmethod
    def body(self, request: Request) -> dict[str, Any]:
        """What is sent."""

    @abstractmethod
    def read(self, reply: Any) -> Completion:
        """What came back.

        Raises:
            ValueError, KeyError, TypeError, IndexError: it is not what was asked for.
        """

    def _ids(self, ids: Any) -> list[int]:
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"{ids!r:.60} are no ids of the target's vocabulary of {self.vocab_size}")
        return ids

    def _openai_sampling(self, request: Request) -> dict[str, Any]:
        sampling = self.sampling
        body = {"model": self.model, "max_tokens": request.limit, "temperature": sampling.temperature}
        if sampling.temperature:
            body |= {"top_p": sampling.top_p, "seed": request.seed}
            body |= {"top_k": sampling.top_k} if sampling.top_k else {}
        return body


class SGLangGenerate(Protocol):
    """SGLang's own.  Seeds count there with --enable-deterministic-inference only."""

    NAME, PATH = "sglang", "/generate"

    def body(self, request: Request) -> dict[str, Any]:
        sampling = self.sampling
        said = {"max_new_tokens": request.limit, "temperature": sampling.temperature, "stop_token_ids": self.stop_ids}
        if sampling.temperature:
            said |= {"top_p": sampling.top_p, "top_k": sampling.top_k or -1, "sampling_seed": request.seed}
        return {"input_ids": request.prompt, "sampling_params": said}

    def read(self, reply: Any) -> Completion:
        end = reply["meta_info"]["finish_reason"]
        if end["type"] == "abort":
            raise ValueError(f"aborted: {end.get('message')}")
        return Completion(self._ids(reply["output_ids"]), ENDS[end["type"]])


class CompletionIds(Protocol):
    """``/v1/completions`` with ids both ways."""

    NAME, PATH = "completions", "/v1/completions"
    ASKING: ClassVar[dict[str, Any]] = {"return_token_ids": True}

    def body(self, request: Request) -> dict[str, Any]:
        body = {**self._openai_sampling(request), **self.ASKING, "prompt": request.prompt}
        return body | ({"stop_token_ids": self.stop_ids} if self.stop_ids else {})

    def read(self, reply: Any) -> Completion:
        choice = reply["choices"][0]
        return Completion(self._ids(self._told(choice)), ENDS[choice["finish_reason"]])

    def _told(self, choice: Any) -> Any:
        return choice["token_ids"]


class CompletionLogprobs(CompletionIds):
    """The same with ids where the log-probabilities name their tokens, as older versions of vLLM give them."""

    NAME = "completions-logprobs"
    ASKING: ClassVar[dict[str, Any]] = {"logprobs": 0, "return_tokens_as_token_ids": True}

    def _told(self, choice: Any) -> Any:
        tokens = choice["logprobs"]["tokens"]
        return [int(token.removeprefix(TOKEN_ID)) if token.startswith(TOKEN_ID) else -1 for token in tokens]


class Chat(Protocol):
    """``/v1/chat/completions``: the server renders the conversation, and tells the text alone."""

    NAME, PATH = "chat", "/v1/chat/completions"

    def body(self, request: Request) -> dict[str, Any]:
        if not request.messages:
            raise ValueError("a row of token ids cannot be asked of a server that takes text")
        messages = [_with_arguments(message, json.dumps, dict) for message in request.messages]
        body = {**self._openai_sampling(request), "messages": messages}
        return body | ({"tools": request.tools} if request.tools else {})

    def read(self, reply: Any) -> Completion:
        choice = reply["choices"][0]
        said = choice["message"]
        message = {key: said[key] for key in ("content", "reasoning_content", "tool_calls") if said.get(key)}
        stopped = ENDS[choice["finish_reason"]]
        silent = not message.keys() & {"content", "tool_calls"}  # at its limit, it had not come beyond the reasoning
        if not isinstance(said.get("content") or "", str) or (silent and stopped):
            raise ValueError("an answer without content")
        message.setdefault("content", "" if "tool_calls" not in message else None)
        message = _with_arguments({"role": "assistant", **message}, json.loads, str)
        return Completion(None, stopped, message)


def _with_arguments(message: dict[str, Any], convert: Callable[[Any], Any], found: type) -> dict[str, Any]:
    """The arguments of calls are text in this API, and objects to chat templates, so in the data."""
    if not message.get("tool_calls"):
        return message
    calls = [{**call, "function": dict(call["function"])} for call in message["tool_calls"]]
    for call in calls:
        if isinstance(call["function"].get("arguments"), found):
            call["function"]["arguments"] = convert(call["function"]["arguments"])
    return {**message, "tool_calls": calls}
