"""Run directories without a training run: a random target and briefly trained drafts of the family.

The target's weights are drawn wide, so that its choices are far from a tie, and what its layers add is damped, so that
its text is neither a loop nor chaos: the drafts agree with it for whole, half and no chains.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.schedule import Layout, Slots
from nemo_speculative.algorithms.common.ttt import compute_step0, unroll
from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.checkpoint.draft_checkpoint import write_servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.data.vocab_mapping import VocabMapping
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.targets.hf import HFTarget

NAMES = ("eagle3", "eagle3_1", "eagle1")
VOCAB, DRAFT_VOCAB, CONTEXT = 256, 200, 512
SPREAD, DAMPING = 0.15, 0.03
ROWS, LENGTH, BATCH, EPOCHS, UNROLL = 96, 48, 16, 12, 3
SETTINGS = SpeculativeSettings(num_steps=5, topk=1, num_draft_tokens=6)


def make_runs(root: Path, num_questions: int, max_new_tokens: int) -> dict[str, Path]:
    """Run directories of drafts for one target, by their :data:`NAMES`, in ``root``."""
    torch.manual_seed(0)
    draw = random.Random(0)
    questions = [[draw.randrange(VOCAB) for _ in range(draw.randint(4, 40))] for _ in range(num_questions)]
    model = _make_model()
    texts = torch.tensor(_greedy(model, torch.randint(VOCAB, (ROWS, 16)).tolist(), LENGTH))
    eos = _stop_token([_greedy(model, [question], max_new_tokens)[0] for question in questions])
    target = _save(model, eos, root / "the target")  # a path with a space, on purpose
    runs = {}
    for name, draft in _random_drafts(target).items():
        _train(draft.attach(target), target, texts)
        runs[name] = _write_run(root / name, target, draft, questions)
    return runs


def _random_drafts(target: HFTarget) -> dict[str, Draft]:
    like = (target.config, target.aux_layers, DRAFT_VOCAB)
    eagle3 = Eagle3Draft(Eagle3Shape.like_target(*like))
    eagle3_1 = Eagle3Draft(Eagle3Shape.like_target(*like, num_layers=2, fc_norm=True, norm_output=True))
    for draft in (eagle3, eagle3_1):
        draft.set_vocab_mapping(VocabMapping(torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values, VOCAB, coverage=1.0))
    return dict(zip(NAMES, (eagle3, eagle3_1, EagleDraft(EagleDraft.shape_for(None, target.config))), strict=True))


def _make_model() -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=SPREAD,
                    bos_token_id=None, eos_token_id=None)
    ).eval().requires_grad_(False)  # fmt: skip
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(DAMPING)
    return model


def _save(model: LlamaForCausalLM, eos: int, path: Path) -> HFTarget:
    """Writes the model and a tokenizer of one word per id."""
    model.config.eos_token_id = model.generation_config.eos_token_id = eos
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"t{eos}").save_pretrained(path)
    return HFTarget(path, aux_layers=None)


def _stop_token(answers: list[list[int]]) -> int:
    """A stop token for about a third of the answers, never as their first token."""
    late = [t for t in range(VOCAB) if not any(t in answer[:6] for answer in answers)]
    return min(late, key=lambda t: abs(sum(t in answer for answer in answers) - len(answers) / 3))


def _greedy(model: Any, prompts: list[list[int]], length: int) -> list[list[int]]:
    """The answers to prompts of one length, before there is a stop token."""
    ids = torch.tensor(prompts)
    return model.generate(ids, max_new_tokens=length, do_sample=False, pad_token_id=0)[:, ids.shape[1] :].tolist()


def _train(draft: Draft, target: HFTarget, tokens: torch.Tensor) -> None:
    """A plain training loop on ``tokens`` [B, L], independent of the trainer that these tests check."""
    with torch.no_grad():
        draft.init_head(target.head_weight, None)
        draft.init_fc()
    positions = torch.arange(tokens.shape[1]).expand(BATCH, -1)
    count = tokens.shape[1] - UNROLL - 1
    index = torch.arange(count).expand(BATCH, -1)
    layout = Layout.of(positions, positions)
    slots = Slots.of(positions, torch.where(positions < count, UNROLL, 0), torch.device("cpu"))
    draft_id = torch.full((VOCAB,), -100).index_put((draft.draft_ids,), torch.arange(len(draft.draft_ids)))
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    for rows in tokens.split(BATCH) * EPOCHS:
        aux, hidden = target.forward(rows, positions)
        best = draft_id[target.logits(hidden).argmax(-1)]
        features = draft.project_hidden_states(aux, hidden)
        state = compute_step0(draft, draft.embed_input_ids(rows).flatten(0, 1), features.flatten(0, 1), layout)
        outputs = [output[: index.numel()] for output in unroll(draft, state.window(slots), slots)]
        labels = torch.stack([best.gather(1, index + 1 + step) for step in range(UNROLL)])
        cross_entropy(draft.compute_logits(torch.cat(outputs)), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def _write_run(run: Path, target: HFTarget, draft: Draft, questions: list[list[int]]) -> Path:
    step = run / "checkpoints" / "step_1"
    provenance = Provenance(str(target.path), target_fingerprint(target.path), "float32", SETTINGS, step=1)
    ids = {"bos_token_id": None, "eos_token_id": target.config.eos_token_id}
    write_servable(step / "model", type(draft), draft.state_dict(), draft.shape, provenance, torch.float32, ids)
    (step.parent / "best").symlink_to(step.name)
    (run / "questions.jsonl").write_text("".join(json.dumps({"input_ids": q}) + "\n" for q in questions))
    return run
