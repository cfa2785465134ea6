"""Who proposes draft tokens: an EAGLE-3 draft, n-grams of the text so far, or nobody."""

from collections.abc import Sequence
from typing import Protocol

import torch

from nemo_speculative.drafts.eagle3 import DraftCache, Eagle3Draft
from nemo_speculative.targets.hf import HFTarget

FIRST_POSITIONS = 512


class Drafter(Protocol):
    """Proposes the continuation of one sequence."""

    def start(self) -> None:
        """Forgets the sequence before."""
        ...

    def propose(self, tokens: Sequence[int], aux: torch.Tensor) -> list[int]:
        """Draft tokens behind ``tokens``.

        Args:
            tokens: the whole sequence; the target has not seen the last one.
            aux: [1, n, A * h], the target's aux states of the n positions verified since the last call.
        """
        ...


class NoDrafter:
    """Plain decoding."""

    def start(self) -> None:
        """Nothing to forget."""

    def propose(self, tokens: Sequence[int], aux: torch.Tensor) -> list[int]:
        return []


class NgramDrafter:
    """Prompt lookup: what followed the latest earlier occurrence of the last n tokens, for the largest n found."""

    def __init__(self, num_steps: int, max_ngram: int = 3):
        self.num_steps, self.max_ngram = num_steps, max_ngram

    def start(self) -> None:
        """Nothing to forget: the sequence is given whole each time."""

    def propose(self, tokens: Sequence[int], aux: torch.Tensor) -> list[int]:
        tokens = list(tokens)
        for n in range(min(self.max_ngram, len(tokens) - 1), 0, -1):
            tail = tokens[-n:]
            for start in range(len(tokens) - n - 1, -1, -1):
                if tokens[start : start + n] == tail:
                    return tokens[start + n : start + n + self.num_steps]
        return []


class Eagle3Drafter:
    """A chain of ``num_steps`` draft tokens: the draft reads the true features, then its own outputs."""

    def __init__(self, draft: Eagle3Draft, target: HFTarget, num_steps: int):
        if draft.shape.aux_layers != tuple(target.aux_layers):
            raise ValueError(
                f"the draft reads the layers {draft.shape.aux_layers}, the target gives {target.aux_layers}"
            )
        self.draft, self.target, self.num_steps = draft, target, num_steps
        self._ids = draft.draft_ids
        self._cache = DraftCache()
        self._rotation = self._rotations(FIRST_POSITIONS)

    def start(self) -> None:
        self._cache.crop(0)

    def propose(self, tokens: Sequence[int], aux: torch.Tensor) -> list[int]:
        known, new = self._cache.length, aux.shape[1]
        following = torch.tensor([tokens[known + 1 :]], device=self.target.device)
        feature = self.draft.fc(aux.to(self.draft.fc.weight.dtype))
        output = self._extend(following, feature)[:, -1:]
        proposed = [self._best(output)]
        # Position t of the draft belongs to the token after it, so a chain may reach max_positions - 1.
        for _ in range(min(self.num_steps, self.draft.shape.max_positions - len(tokens)) - 1):
            output = self._extend(proposed[-1], output)
            proposed.append(self._best(output))
        self._cache.crop(known + new)
        return torch.cat(proposed, dim=1)[0].tolist()

    def _extend(self, tokens: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        start, end = self._cache.length, self._cache.length + tokens.shape[1]
        if end > self._rotation[0].shape[2]:
            self._rotation = self._rotations(2 * end)
        cos, sin = (table[:, :, start:end] for table in self._rotation)
        return self.draft.extend(self.target.embed(tokens).to(feature.dtype), feature, (cos, sin), self._cache)

    def _rotations(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A table of the rotary cos and sin: computing them anew would cost as much as the rest of a draft step."""
        return self.draft.rotary(torch.arange(length, device=self.target.device)[None], self.draft.fc.weight.dtype)

    def _best(self, output: torch.Tensor) -> torch.Tensor:
        return self._ids[self.draft.logits(output).argmax(-1)]
