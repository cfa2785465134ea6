"""Who answers: one protocol for the target in this process and for servers."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from nemo_speculative.data.token_store import tokenizer_digest
from nemo_speculative.generate_data.rollout import Completion, Request
from nemo_speculative.targets.describe import stop_ids_of
from nemo_speculative.targets.embedding_and_head import load_tokenizer, text_config
from nemo_speculative.utils.errors import UserError


class Failed(UserError):
    """A request that was given up: recorded, and tried again by the next run.

    Args:
        reason: what is counted, the same for all that failed alike.
        detail: what was found.
        attempts: how often it was tried.
    """

    def __init__(self, reason: str, detail: str = "", attempts: int = 1):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.attempts = reason, detail, attempts


class Engine(ABC):
    """Answers of the target in ``directory``, of which it reads the tokenizer and the configuration at once.

    Whoever makes one calls :meth:`prepare` before the first request, and :meth:`close` at the end.

    Raises:
        UserError: the directory holds no usable tokenizer or configuration.
    """

    def __init__(self, directory: Path, trust_remote_code: bool = False):
        self.directory, self.trust_remote_code = directory, trust_remote_code
        self.tokenizer = load_tokenizer(directory, trust_remote_code)
        self.config = text_config(directory, trust_remote_code)
        self.context: int = self.config.max_position_embeddings
        """Tokens of its longest sequence."""
        self.stop_ids = stop_ids_of(directory, self.config, self.tokenizer)
        """What ends an answer."""

    @property
    @abstractmethod
    def concurrency(self) -> int:
        """Conversations to be in flight at once."""

    @abstractmethod
    async def identity(self) -> dict[str, Any]:
        """What its answers depend on; called first.

        Raises:
            UserError: it cannot be had.
        """

    @abstractmethod
    async def complete(self, request: Request) -> Completion:
        """The answer to ``request``.

        Raises:
            Failed: there is none.
            UserError: nor will there be any to other requests.
        """

    def prepare(self) -> None:  # noqa: B027
        """Gets ready to answer, however long it takes; by default there is nothing to do."""

    async def close(self) -> None:  # noqa: B027
        """Gives back what it holds open; by default nothing."""

    def rendering(self) -> dict[str, Any]:
        """What prompts and ends of answers depend on."""
        return {"tokenizer": tokenizer_digest(self.tokenizer), "stop_ids": sorted(self.stop_ids)}
