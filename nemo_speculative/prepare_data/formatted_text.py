"""Text that a chat template has formatted already: its token ids, and which of them the assistant wrote."""

import hashlib
from dataclasses import dataclass
from typing import Any

from nemo_speculative.data.chat_template import template_of
from nemo_speculative.prepare_data import reasons
from nemo_speculative.prepare_data.reasons import LeftOut
from nemo_speculative.utils.errors import UserError, describe_error

QUESTION, ANSWER = "a question", "an answer"


@dataclass(frozen=True)
class FormattedText:
    """Finds answers by what the template puts before and behind one."""

    tokenizer: Any
    before: str
    behind: str

    @classmethod
    def of(cls, path: str) -> "FormattedText":
        """For the texts of that tokenizer's template.

        Raises:
            UserError: it cannot be had, or its template does not mark answers.
        """
        from transformers import AutoTokenizer  # slow to import, and rarely needed

        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception as error:  # one class per way in which a hub can fail
            raise UserError(
                f"tokenizer: {path} cannot be had here ({describe_error(error, 100)}); give a directory"
            ) from None
        asked, prompt, answered = _rendered(tokenizer)
        before, behind = prompt.removeprefix(asked).strip(), answered.rpartition(ANSWER)[2].strip()
        if not prompt.startswith(asked) or not before or not behind:
            raise UserError(f"tokenizer: the chat template of {path} puts no mark around an answer; give input_ids")
        return cls(tokenizer, before, behind)

    @property
    def identity(self) -> str:
        """Tells whether another one would give the same rows."""
        whole = self.tokenizer.backend_tokenizer.to_str() + self.tokenizer.chat_template
        return hashlib.sha256(whole.encode()).hexdigest()

    def read(self, text: str) -> dict[str, Any]:
        """``input_ids`` and ``loss_mask`` of ``text``; an answer includes the mark that ends it.

        Raises:
            LeftOut: it holds no answer.
        """
        spans = self._spans(text)
        if not spans:
            raise LeftOut(reasons.NO_SPAN, f"no {self.before!r} in {text!r:.60}")
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = [any(first <= start < last for first, last in spans) for start, _ in tokens["offset_mapping"]]
        return {"input_ids": tokens["input_ids"], "loss_mask": [int(i) for i in inside]}

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Where answers lie in characters, first to behind the last."""
        spans, at = [], text.find(self.before)
        while at >= 0:
            start = at + len(self.before)
            start += len(text[start:]) - len(text[start:].lstrip("\n"))
            end = text.find(self.behind, start)
            end = len(text) if end < 0 else end + len(self.behind)
            spans.append((start, end))
            at = text.find(self.before, end)
        return spans


def _rendered(tokenizer: Any) -> tuple[str, str, str]:
    """A question, the same as a prompt, and with its answer."""
    template_of(tokenizer)
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    return asked, prompt, tokenizer.apply_chat_template(messages, tokenize=False)
