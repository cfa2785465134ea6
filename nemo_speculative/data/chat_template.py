"""Token ids and assistant mask of a conversation, by the tokenizer's own chat template.

Training must see what serving renders, so the template alone decides.  A template with ``{% generation %}`` marks the
assistant's tokens itself; otherwise prefixes of the conversation are rendered, and the tokens that an assistant turn
adds to the prompt before it are the assistant's.  A template whose prefixes are no prefixes in token ids is refused.
"""

import hashlib
import json
from collections.abc import Collection
from typing import Any

from nemo_speculative.data.conversations import Conversation, TokenRow
from nemo_speculative.utils.errors import UserError

Message = dict[str, Any]


def tokenize(tokenizer, conversation: Conversation, stop_ids: Collection[int]) -> TokenRow:
    """Token ids and assistant mask of one conversation.

    An assistant span ends with its first stop token where it has one: what the template prints after it (a newline,
    for example) is never generated.  Raises UserError if the template rejects the conversation or hides its answers.
    """
    messages, origin, tools = conversation.messages, conversation.origin, conversation.tools
    template = chat_template_of(tokenizer)
    if "{% generation" in template or "{%- generation" in template:
        rendered = render(tokenizer, messages, origin, tools=tools, return_assistant_tokens_mask=True)
        ids, mask = rendered["input_ids"], [bool(inside) for inside in rendered["assistant_masks"]]
    else:
        ids = render(tokenizer, messages, origin, tools=tools)["input_ids"]
        mask = _mask_by_prefixes(tokenizer, conversation, ids)
    stopped = False
    for i, inside in enumerate(mask):
        mask[i] = inside and not stopped
        stopped = inside and (stopped or ids[i] in stop_ids)
    return TokenRow(conversation.id, ids, mask, origin, conversation.source)


def _mask_by_prefixes(tokenizer, conversation: Conversation, ids: list[int]) -> list[bool]:
    """The mask of a conversation's ``ids``: an assistant turn is the part that it adds to the prompt before it."""
    messages, origin, tools = conversation.messages, conversation.origin, conversation.tools
    mask = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before = prompt_ids(tokenizer, messages[:turn], origin, tools)
            after = render(tokenizer, messages[: turn + 1], origin, tools=tools)["input_ids"]
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise UserError(
                    f"{origin}: the chat template of {tokenizer.name_or_path} renders message {turn} differently "
                    "within the whole conversation and at its end, so the assistant's tokens cannot be located; add "
                    "{% generation %} to the template, or give input_ids and loss_mask (recipes/generate_data.py does)"
                )
            mask[len(before) : len(after)] = [True] * (len(after) - len(before))
    return mask


def chat_template_of(tokenizer) -> str:
    """The tokenizer's chat template; raises UserError if it has none."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; add one to it, or give data that is "
            'tokenized already ({"input_ids", "loss_mask"} a line)'
        )
    return tokenizer.chat_template


def tokenizer_digest(tokenizer) -> str:
    """Hash of everything that determines how a conversation becomes ids: the rules and the chat template."""
    rules = [rules_digest(tokenizer), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:16]


def rules_digest(tokenizer) -> str:
    """Hash of everything that determines how a text becomes ids, except padding and truncation, which calls change."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(fast.to_str()) if fast else {"vocabulary": tokenizer.get_vocab()}
    rules = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
    content = [type(tokenizer).__name__, rules, tokenizer.get_added_vocab()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def prompt_ids(tokenizer, messages: list[Message], origin: str, tools: list[Message] | None = None) -> list[int]:
    """The token ids of ``messages`` and of the header that starts the assistant's answer."""
    return render(tokenizer, messages, origin, tools=tools, add_generation_prompt=True)["input_ids"]


def render(tokenizer, messages: list[Message], origin: str, **options) -> dict[str, list[int]]:
    """Renders and tokenizes ``messages`` by the chat template: ``input_ids``, and what ``options`` request.

    Raises UserError if there is no chat template, or if it rejects the messages.
    """
    chat_template_of(tokenizer)
    try:
        return tokenizer.apply_chat_template(normalize_messages(messages), tokenize=True, return_dict=True, **options)
    except Exception as error:  # jinja2 and the templates' own raise_exception
        reason = " ".join(str(error).split())
        raise UserError(f"{origin}: the chat template rejects this conversation: {reason}") from error


def normalize_messages(messages: list[Message]) -> list[Message]:
    """``messages`` as chat servers pass them to the template: without null values and with text as content.

    The arguments of tool calls, which OpenAI writes as text, become objects.
    """
    messages = [{k: v for k, v in m.items() if v is not None} | {"content": m.get("content") or ""} for m in messages]
    for message in messages:
        if message.get("tool_calls"):
            message["tool_calls"] = [_with_parsed_arguments(call) for call in message["tool_calls"]]
    return messages


def _with_parsed_arguments(call: Message) -> Message:
    function = call.get("function", {})
    if not isinstance(function.get("arguments"), str):
        return call
    try:
        return call | {"function": function | {"arguments": json.loads(function["arguments"])}}
    except json.JSONDecodeError:
        return call
