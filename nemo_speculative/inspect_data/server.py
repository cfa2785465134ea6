"""Prompts rendered by a running SGLang server."""

from typing import Any

from nemo_speculative.data.chat_template import Message
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import Client, Refused

TIMEOUT_SECONDS = 60.0
PROBE: list[Message] = [{"role": "user", "content": "Hello"}]


class RunningServer:
    """An SGLang server's ``/tokenize`` route, which renders messages as for a chat completion.

    SGLang 0.5.23 returns the ids themselves (read in its ``serving_tokenize.py``); 0.5.9 accepts no messages there.
    A ``with`` block closes its connection.
    """

    def __init__(self, url: str, api_key: str | None = None):
        self._http = Client(url, api_key, timeout=TIMEOUT_SECONDS, name=f"url: {url.rstrip('/')}")

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *error: object) -> None:
        self._http.__exit__(*error)

    def check(self) -> None:
        """Renders a first message.

        Raises:
            UserError: the server cannot be reached, or cannot render messages.
        """
        try:
            self.prompt_ids(PROBE, None)
        except Refused as error:
            raise UserError(
                f"url: {error}; expected an SGLang server that renders messages over /tokenize, as 0.5.23 does"
            ) from None

    def prompt_ids(self, messages: list[Message], tools: list[Message] | None) -> list[int]:
        """The ids of the prompt for the answer to ``messages``.

        Raises:
            Refused: the server cannot render these messages.
            Unreachable, Unauthorized: no request will succeed.
        """
        body = {"messages": messages} | ({"tools": tools} if tools else {})
        response = self._http.request("POST", "/tokenize", json=body)
        try:
            content: Any = response.json()
        except ValueError:
            content = None
        tokens = content.get("tokens") if isinstance(content, dict) else None
        if response.status == 200 and isinstance(tokens, list) and all(isinstance(token, int) for token in tokens):
            return tokens
        text = " ".join(response.data.decode(errors="replace").split())
        raise Refused(f"{self._http.url}/tokenize: HTTP {response.status}: {text:.200}")
