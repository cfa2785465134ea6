"""What the real SGLang makes of our checkpoints: it loads all of them, answers the same, and counts as we count."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_speculative.checkpoints.servable import read_servable
from nemo_speculative.decoding.drafters import Eagle3Drafter
from nemo_speculative.decoding.generate import Generation, generate_greedy
from nemo_speculative.serving.command import ServeOptions
from nemo_speculative.targets.hf import HFTarget


@pytest.fixture(scope="session")
def decoded(case) -> list[Generation]:
    """Our own decoder on the same questions."""
    draft = read_servable(case.options.draft)
    target = HFTarget(Path(case.options.target), aux_layers=list(draft.shape.aux_layers))
    drafter = Eagle3Drafter(draft.build(), target, case.options.speculative.num_steps)
    return [generate_greedy(target, drafter, q, case.max_new_tokens, case.stop_ids) for q in case.questions]


@pytest.fixture(scope="session")
def on_cpu(case, inspect) -> dict[str, object]:
    """SGLang's reading of the CPU command and of the draft."""
    return inspect(case.options, load=True)


def test_no_tensor_is_lost(case, on_cpu):
    assert on_cpu["architecture"] == "LlamaForCausalLMEagle3"
    assert on_cpu["unfilled"] == ["model.embed_tokens.weight"], "only the embedding is the target's"
    assert on_cpu["ignored"] == ["t2d"], "only t2d is for other tools"
    assert on_cpu["ids"] == read_servable(case.options.draft).build().draft_ids.tolist()


def test_the_cpu_command_is_understood(case, on_cpu):
    assert on_cpu["settings"] == _settings(case.options)


def test_the_gpu_command_is_understood(case, inspect):
    options = replace(case.options, device="cuda", trust_remote_code=True, tp_size=2, dtype="bfloat16", host="0.0.0.0")
    assert inspect(options)["settings"] == _settings(options)


def _settings(options: ServeOptions) -> dict[str, object]:
    return {
        "model_path": options.target,
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": str(options.draft),
        "speculative_num_steps": options.speculative.num_steps,
        "speculative_eagle_topk": options.speculative.topk,
        "speculative_num_draft_tokens": options.speculative.num_draft_tokens,
        "dtype": options.dtype,
        "host": options.host,
        "port": options.port,
        "tp_size": options.tp_size,
        "trust_remote_code": options.trust_remote_code,
    }


def test_the_draft_changes_no_answer(plain, served):
    assert [a.tokens for a in served] == [a.tokens for a in plain]


def test_a_tree_changes_no_answer(plain, served_as_tree):
    assert [a.tokens for a in served_as_tree] == [a.tokens for a in plain]


def test_our_decoder_gives_the_same_answers(served, decoded):
    assert [a.tokens for a in served] == [g.tokens for g in decoded]


def test_our_decoder_counts_the_same_verifications(served, decoded):
    """The first token comes from the prefill on both sides; a verification that is cut short counts on both."""
    assert [a.verifications for a in served] == [len(g.emitted) for g in decoded]


def test_our_decoder_accepts_the_same_chains(served, decoded):
    """Chain by chain.  The last one of an answer may be cut by its end: SGLang's histogram does not know that."""
    for answer, generation in zip(served, decoded, strict=True):
        theirs = Counter({accepted: n for accepted, n in enumerate(answer.histogram) if n})
        ours = Counter(emitted - 1 for emitted in generation.emitted[:-1])
        last = list((theirs - ours).elements())
        assert not ours - theirs
        assert len(last) == min(len(generation.emitted), 1)
        assert all(accepted >= generation.emitted[-1] - 1 for accepted in last)


def test_the_judge_saw_chains_accepted_and_rejected(case, decoded):
    """On equal counts of nothing the tests above would prove little."""
    if case.name != "trained":
        pytest.skip("other drafts accept what they accept")
    emitted = Counter(n for g in decoded for n in g.emitted)
    assert len(emitted) >= 3 and sum(n > 1 for n in emitted.elements()) > 20
    assert any(g.finished for g in decoded) and not all(g.finished for g in decoded)
