"""Client of an SGLang server for benchmarks: streamed answers with their timing and acceptance counts.

It posts token ids to ``/generate``, which reports the verifications of a streamed answer.  The chat endpoint of 0.5.9
does not, and that of 0.5.23 only with a switch that 0.5.9 lacks (from their source).  The caller renders the
conversation with the tokenizer's own chat template, as the chat endpoint does.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import AsyncClient, Refused, Unreachable

HISTOGRAMS = ("spec_correct_drafts_histogram", "spec_accept_histogram")
"""Name of the histogram in newer and in older versions (0.5.9)."""
INCREMENTAL = ("incremental_streaming_output", "stream_output")
"""Server settings with which a chunk holds only its new text, not all text so far."""


@dataclass(frozen=True)
class Answer:
    """An answer with its timing and acceptance counts."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    verifications: int
    """Zero without a draft, and where the prefill alone finished the answer."""
    histogram: tuple[int, ...]
    """Verifications that accepted 0, 1, 2 … draft tokens."""
    arrivals: tuple[tuple[float, int], ...]
    """For each chunk: seconds since the request was sent, and the number of tokens so far."""
    stopped: bool
    """Whether it ended with a stop token, not at max_new_tokens."""

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the request to the first token."""
        return self.arrivals[0][0]

    @property
    def latency(self) -> float:
        """Seconds from the request to the last token."""
        return self.arrivals[-1][0]

    @property
    def inter_token_latencies(self) -> list[float]:
        """Seconds for each token after the first chunk.

        A chunk holds the tokens of at least one verification; the time since the chunk before is divided evenly among
        its tokens, and each of them counts (as in SGLang's own ``bench_serving``).
        """
        gaps: list[float] = []
        for (previous, tokens_before), (now, tokens) in zip(self.arrivals, self.arrivals[1:], strict=False):
            new_tokens = tokens - tokens_before
            gaps += [(now - previous) / new_tokens] * new_tokens
        return gaps


class Client(AsyncClient):
    """An asynchronous client of one SGLang server; see :class:`~nemo_speculative.utils.http.AsyncClient`."""

    incremental = False
    """Whether the server's chunks hold only new text; :meth:`server_info` finds out."""

    async def server_info(self) -> dict[str, Any]:
        """The server's version and settings; raises UserError if it is not reachable, or not SGLang."""
        reply = await self.request("GET", "/server_info")
        self._require_success(reply)
        try:
            info = {"version": reply.json()["version"], **reply.json()}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.url}: /server_info is not answered as by SGLang; expected its url") from None
        self.incremental = any(info.get(name) for name in INCREMENTAL)
        return info

    async def flush_cache(self) -> None:
        """Empties the prefix cache, so that no prompt is cheaper the second time."""
        self._require_success(await self.request("POST", "/flush_cache"))

    async def generate(self, input_ids: Sequence[int], *, temperature: float, max_new_tokens: int) -> Answer:
        """The answer to the prompt ``input_ids``.

        Raises:
            Refused: the server refuses this prompt, for example because it is longer than its context.
            Unreachable: it cannot be reached or does not finish.
            Unauthorized: it refuses the token.
        """
        sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        body = {"input_ids": list(input_ids), "sampling_params": sampling, "stream": True}
        texts: list[str] = []
        arrivals: list[tuple[float, int]] = []
        info: dict[str, Any] = {}
        started = time.perf_counter()
        async with self.stream("POST", "/generate", json=body) as reply:
            if reply.is_error:
                await reply.aread()
                self._require_success(reply)
            async for line in reply.aiter_lines():
                if not line.startswith("data:") or line == "data: [DONE]":
                    continue
                text, info = self._parse_chunk(line.removeprefix("data:"))
                texts.append(text)
                if info["completion_tokens"] > (arrivals[-1][1] if arrivals else 0):
                    arrivals.append((time.perf_counter() - started, info["completion_tokens"]))
        reason = info.get("finish_reason") or {}
        # The scheduler refuses some requests only after the stream has started.
        if reason.get("type") == "abort" and reason.get("status_code") == httpx.codes.BAD_REQUEST:
            raise Refused(f"{self.url}: {reason.get('message')}")
        if reason.get("type") not in ("stop", "length") or not arrivals:
            raise Unreachable(f"{self.url}: the answer broke off ({reason.get('message', 'it has no end')})")
        return Answer(
            text="".join(texts) if self.incremental else texts[-1],
            prompt_tokens=info["prompt_tokens"],
            completion_tokens=info["completion_tokens"],
            verifications=info.get("spec_verify_ct", 0),
            histogram=tuple(next((info[name] for name in HISTOGRAMS if name in info), ())),
            arrivals=tuple(arrivals),
            stopped=reason["type"] == "stop",
        )

    def _parse_chunk(self, data: str) -> tuple[str, dict[str, Any]]:
        """Text and ``meta_info`` of a server-sent event."""
        try:
            chunk = json.loads(data)
            if "error" not in chunk:
                return chunk["text"], chunk["meta_info"]
        except (ValueError, KeyError, TypeError):
            raise Unreachable(f"{self.url}: its stream is not SGLang's ({data:.60})") from None
        error = chunk["error"]
        raise Refused(f"{self.url}: {error.get('message') if isinstance(error, dict) else error}")

    def _require_success(self, reply: httpx.Response) -> None:
        if reply.is_error:
            raise Refused(f"{self.url}{reply.url.path}: HTTP {reply.status_code}: {reply.text:.200}")
