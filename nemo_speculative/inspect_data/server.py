"""What a running SGLang server makes of messages."""

from types import TracebackType
from typing import Any

import httpx

from nemo_speculative.data.chat_template import Message
from nemo_speculative.serving.client import API_KEY, WRONG_TOKEN, Refused, Unauthorized, Unreachable
from nemo_speculative.utils.errors import UserError, describe_error

TIMEOUT_SECONDS = 60.0
PROBE: list[Message] = [{"role": "user", "content": "Hello"}]


class RunningServer:
    """The server at ``url``, asked over ``/tokenize``: with messages it renders them as for a chat completion.

    SGLang 0.5.23 answers with the ids themselves (read in its ``serving_tokenize.py``); 0.5.9 takes no messages there.
    A ``with`` block holds its connection.
    """

    def __init__(self, url: str, api_key: str | None = None):
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(headers=headers, timeout=TIMEOUT_SECONDS, trust_env=False)

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def check(self) -> None:
        """
        Raises:
            UserError: it cannot be reached, or cannot say what it renders.
        """
        try:
            self.prompt_ids(PROBE, None)
        except Refused as error:
            raise UserError(
                f"url: {error}; expected an SGLang server that renders messages over /tokenize, as 0.5.23 does"
            ) from None

    def prompt_ids(self, messages: list[Message], tools: list[Message] | None) -> list[int]:
        """The ids after which the answer to ``messages`` begins.

        Raises:
            Refused: it renders none of these.
            Unreachable: it does not answer.
            Unauthorized: it wants another token.
        """
        body = {"messages": messages} | ({"tools": tools} if tools else {})
        try:
            reply = self._http.post(f"{self.url}/tokenize", json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unreachable(
                f"url: {self.url} cannot be reached ({describe_error(error)}); is an SGLang server running there?"
            ) from None
        if reply.status_code in WRONG_TOKEN:
            raise Unauthorized(f"url: {self.url} refuses the token; give the server's as the variable {API_KEY}")
        return self._tokens(reply)

    def _tokens(self, reply: httpx.Response) -> list[int]:
        try:
            said: Any = reply.json()
        except ValueError:
            said = None
        tokens = said.get("tokens") if isinstance(said, dict) else None
        if reply.is_success and isinstance(tokens, list) and all(isinstance(token, int) for token in tokens):
            return tokens
        raise Refused(f"{self.url}/tokenize: HTTP {reply.status_code}: {' '.join(reply.text.split()):.200}")
