"""Checkpoints in the real SGLang: it loads every tensor, gives the same answers, and counts the same acceptances."""

import json
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nemo_speculative.checkpoint.draft_checkpoint import Servable, read_servable
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.decoding.drafters import EagleDrafter
from nemo_speculative.decoding.engine import Generation, generate
from nemo_speculative.decoding.tree_builder import tree_builder_for
from nemo_speculative.serving.command import ServeOptions
from nemo_speculative.targets.hf import HFTarget
from tests.sglang.conftest import (
    MAX_NEW_TOKENS,
    NUM_QUESTIONS,
    RUN,
    Answer,
    Ask,
    PromptFile,
    with_draft,
    without_draft,
)
from tests.sglang.family import expected_ids, ignored, never_loaded
from tests.sglang.random_run import NAMES, make_runs

TREE = SpeculativeSettings(num_steps=3, topk=4, num_draft_tokens=8)


@dataclass(frozen=True)
class Case:
    """A checkpoint under test."""

    name: str
    options: ServeOptions
    servable: Servable
    questions: PromptFile

    @property
    def target(self) -> HFTarget:
        return HFTarget(Path(self.options.target), aux_layers=self.servable.aux_layers)


@pytest.fixture(scope="session")
def cases(tmp_path_factory, options_for) -> dict[str, Case]:
    runs = {"run": Path(RUN)} if RUN else make_runs(tmp_path_factory.mktemp("runs"), NUM_QUESTIONS, MAX_NEW_TOKENS)
    return {name: _case(name, run, options_for(run)) for name, run in runs.items()}


def _case(name: str, run: Path, options: ServeOptions) -> Case:
    lines = (run / "questions.jsonl").read_text().splitlines()[:NUM_QUESTIONS]
    case = Case(name, options, read_servable(run), PromptFile([json.loads(line)["input_ids"] for line in lines], ()))
    return replace(case, questions=replace(case.questions, stop_ids=tuple(sorted(case.target.stop_ids))))


@pytest.fixture(scope="session", params=["run"] if RUN else NAMES)
def case(request, cases) -> Case:
    return cases[request.param]


@pytest.fixture(scope="session", params=["as_remembered", "tree"])
def speculative(request, case) -> SpeculativeSettings:
    return _settings_called(request.param, case)


def _settings_called(name: str, case: Case) -> SpeculativeSettings:
    """A dynamic tree, or the recorded settings: usually a chain."""
    return TREE if name == "tree" else case.options.speculative


@pytest.fixture(scope="session")
def asked_ahead(request, cases, ask) -> None:
    """Starts the servers that the selected tests need concurrently."""
    for item in (item for item in request.session.items if item.path == Path(__file__)):
        needs = getattr(item, "fixturenames", ())
        if "plain" in needs:
            _ask_plain(ask, cases[item.callspec.params["case"]])
        if "served" in needs:
            case = cases[item.callspec.params["case"]]
            _ask_served(ask, case, _settings_called(item.callspec.params["speculative"], case))


def _ask_plain(ask: Ask, case: Case) -> Future[list[Answer]]:
    return ask(without_draft, case.options, case.questions)


def _ask_served(ask: Ask, case: Case, speculative: SpeculativeSettings) -> Future[list[Answer]]:
    return ask(with_draft, replace(case.options, speculative=speculative), case.questions)


@pytest.fixture(scope="session")
def inspected(cases, inspect, asked_ahead) -> dict[str, Any]:
    """All commands and drafts as SGLang reads them."""
    cpu = {name: case.options for name, case in cases.items()}
    gpu = {f"{name} on GPUs": _on_gpus(case.options) for name, case in cases.items()}
    return inspect(cpu | gpu, {name: case.options.draft for name, case in cases.items()})


def _on_gpus(options: ServeOptions) -> ServeOptions:
    return replace(options, device="cuda", trust_remote_code=True, tp_size=2, dtype="bfloat16", host="0.0.0.0")


@pytest.fixture(scope="session")
def plain(case, ask, asked_ahead) -> list[Answer]:
    """SGLang without the draft."""
    return _ask_plain(ask, case).result()


@pytest.fixture(scope="session")
def served(case, speculative, ask, asked_ahead) -> list[Answer]:
    """SGLang with the draft."""
    return _ask_served(ask, case, speculative).result()


@pytest.fixture(scope="session")
def decoded(case, speculative) -> list[Generation]:
    return decode(case, speculative)


def decode(case: Case, speculative: SpeculativeSettings) -> list[Generation]:
    """Answers of this project's decoder to all questions of a case."""
    target, questions = case.target, case.questions
    drafter = EagleDrafter(case.servable.build(), target, tree_builder_for(speculative))
    limit, stop_ids = questions.max_new_tokens, questions.stop_ids
    return generate(target, drafter, questions.prompts, max_new_tokens=limit, stop_ids=stop_ids)


def test_no_tensor_is_lost(case, inspected):
    found, servable = inspected["drafts"][case.name], case.servable
    assert found["architecture"] == servable.contract.architecture
    assert set(found["unfilled"]) == never_loaded(servable)
    assert found["ignored"] == ignored(servable)
    assert found["ids"] == expected_ids(servable)


def test_the_cpu_command_is_understood(case, inspected):
    assert inspected["commands"][case.name] == _settings(case.options, case.servable.algorithm)


def test_the_gpu_command_is_understood(case, inspected):
    found = inspected["commands"][f"{case.name} on GPUs"]
    assert found == _settings(_on_gpus(case.options), case.servable.algorithm)


def _settings(options: ServeOptions, algorithm: str) -> dict[str, object]:
    return {
        "model_path": options.target,
        "speculative_algorithm": algorithm,
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


def test_the_draft_does_not_change_answers(plain, served):
    assert [a.tokens for a in served] == [a.tokens for a in plain]


def test_our_decoder_gives_the_same_answers(served, decoded):
    assert [a.tokens for a in served] == [g.tokens for g in decoded]


def test_our_decoder_counts_the_same_verifications(served, decoded):
    """The first token comes from the prefill on both sides; a verification that is cut short counts on both."""
    assert [a.verifications for a in served] == [len(g.emitted) for g in decoded]


def test_our_decoder_accepts_the_same_drafts(served, decoded):
    """Verification by verification.  An answer's last may be cut by its end: SGLang's histogram does not know that."""
    for answer, generation in zip(served, decoded, strict=True):
        theirs = Counter({accepted: n for accepted, n in enumerate(answer.histogram) if n})
        ours = Counter(emitted - 1 for emitted in generation.emitted[:-1])
        last = list((theirs - ours).elements())
        assert not ours - theirs
        assert len(last) == min(len(generation.emitted), 1)
        assert all(accepted >= generation.emitted[-1] - 1 for accepted in last)


@pytest.mark.skipif(bool(RUN), reason="other drafts accept what they accept")
def test_drafts_are_accepted_and_rejected(case, speculative, decoded):
    """With no accepted or no rejected drafts the tests above would prove little."""
    emitted = Counter(n for g in decoded for n in g.emitted)
    assert emitted[1] and emitted[1 + speculative.num_steps] and len(emitted) >= 4
    assert sum(n > 1 for n in emitted.elements()) > 20
    assert any(g.finished for g in decoded) and not all(g.finished for g in decoded)


@pytest.mark.skipif(bool(RUN), reason="other drafts accept what they accept")
def test_a_tree_accepts_side_branches(case):
    """A tree with as many levels of the same draft must accept side branches, else it proves no more than a chain."""
    chain = replace(TREE, topk=1, num_draft_tokens=TREE.num_steps + 1)
    verifications = [sum(len(g.emitted) for g in decode(case, settings)) for settings in (TREE, chain)]
    assert verifications[0] < verifications[1]
