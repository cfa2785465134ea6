"""Conversations tokenized to rows, with the counts of those left out."""

import pytest

from nemo_speculative.data.conversations import Conversation, TokenRow
from nemo_speculative.data.tokenized_dataset import Tokenization, TokenizedDataset, preview
from nemo_speculative.utils.errors import UserError
from tests.conftest import make_tokenizer

END = 1


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def row(identity: str, mask: str, first_id: int = 10) -> TokenRow:
    """``"0011"``: four tokens, of which the last two are supervised."""
    ids = list(range(first_id, first_id + len(mask)))
    return TokenRow(identity, ids, [m == "1" for m in mask], f"data.jsonl:{identity}")


def conversation(*roles: str, identity: str = "1") -> Conversation:
    return Conversation(identity, [{"role": r, "content": "the quick"} for r in roles], f"data.jsonl:{identity}")


@pytest.mark.parametrize("roles", [("user",), ("system", "user"), ("user", "user")])
def test_a_conversation_without_an_answer_names_its_line(tokenizer, roles):
    items = [conversation("user", "assistant"), conversation(*roles, identity="2")]
    with pytest.raises(UserError) as caught:
        Tokenization(tokenizer, {END}, 100, 300)(items)
    message = str(caught.value)
    assert message.startswith("data.jsonl:2: the conversation has no assistant turn")
    assert "data.answers=target" in message
    assert "\n" not in message


def test_token_rows_and_conversations_mix_in_their_order(tokenizer):
    out = Tokenization(tokenizer, {END}, 100, 300)([row("a", "01"), conversation("user", "assistant"), row("b", "11")])
    assert [r.id for r in out.rows] == ["a", "1", "b"]
    assert out.tokens == 4 + len(out.rows[1].input_ids)
    assert int(out.all_counts.sum()) == 3 + sum(out.rows[1].loss_mask)


def test_truncated_and_left_out_rows_are_counted(tokenizer):
    items = [
        row("fits", "0111"),
        row("cut", "011111"),  # loses two supervised tokens
        row("cut away", "0000111"),  # loses all three, and with them its place
        row("never", "0000"),
        row("exact", "0001"),
    ]
    out = Tokenization(tokenizer, {END}, 4, 300)(items)
    assert [(r.id, len(r.input_ids), sum(r.loss_mask)) for r in out.rows] == [
        ("fits", 4, 3),
        ("cut", 4, 3),
        ("exact", 4, 1),
    ]
    assert out.unsupervised == ["cut away", "never"]
    assert (out.truncated, out.supervised_tokens_cut) == (2, 5)
    assert out.report() == (
        "3 conversations, 12 tokens, 58% supervised; 2 cut to length, losing 5 supervised tokens; "
        "2 without a supervised token left out (cut away, never)"
    )


def test_only_the_first_ids_left_out_are_named(tokenizer):
    out = Tokenization(tokenizer, {END}, 4, 300)([row(str(i), "00") for i in range(5)])
    assert out.report().endswith("5 without a supervised token left out (0, 1, 2, …)")


def test_an_empty_dataset():
    assert TokenizedDataset(300).report() == "0 conversations, 0 tokens, 0% supervised"


@pytest.mark.parametrize(("vocab_size", "refused"), [(14, False), (13, True), (5, True)])
def test_an_id_outside_the_vocabulary_names_the_line(tokenizer, vocab_size, refused):
    items = [row("7", "0011")]  # ids 10 to 13
    if not refused:
        assert Tokenization(tokenizer, {END}, 100, vocab_size)(items).rows == items
        return
    with pytest.raises(UserError) as caught:
        Tokenization(tokenizer, {END}, 100, vocab_size)(items)
    assert str(caught.value) == f"data.jsonl:7: token id 13 is not in the target's vocabulary of {vocab_size}"


def test_an_id_outside_the_vocabulary_is_found_even_where_it_is_cut_off(tokenizer):
    with pytest.raises(UserError, match="token id 500"):
        Tokenization(tokenizer, {END}, 2, 300)([TokenRow("a", [5, 6, 500], [False, True, True], "here")])


def test_a_template_that_renders_nothing_leaves_the_conversation_out():
    silent = make_tokenizer("{% if false %}{% generation %}{% endgeneration %}{% endif %}")
    out = Tokenization(silent, {END}, 100, 300)([conversation("user", "assistant", identity="9")])
    assert (out.rows, out.unsupervised) == ([], ["9"])


def test_the_preview_marks_what_the_assistant_wrote(tokenizer):
    messages = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    item = Conversation("1", [{"role": r, "content": c} for r, c in messages], "here")
    document = Tokenization(tokenizer, {END}, 100, 300)([item]).rows[0]
    plain = preview(document, tokenizer, color=False)
    assert plain == (
        "<|begin|><|user|>one<|end|><|assistant|>⟦two<|end|>⟧<|user|>three<|end|><|assistant|>⟦four<|end|>⟧"
    )
    assert preview(document, tokenizer, color=True) == plain.replace("⟦", "\x1b[32m").replace("⟧", "\x1b[0m")


@pytest.mark.parametrize(("mask", "expected"), [("1111", "⟦{}⟧"), ("0000", "{}"), ("1", "⟦{}⟧")])
def test_the_preview_of_a_row_of_one_kind(tokenizer, mask, expected):
    r = row("a", mask, first_id=50)
    assert preview(r, tokenizer, color=False) == expected.format(tokenizer.decode(r.input_ids))
