"""Every class that a YAML file names can be built, by the code that a recipe would use."""

import dataclasses
import json
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from hydra.errors import InstantiationException
from hydra.utils import get_class, get_method, instantiate
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from nemo_speculative.config.app import to_job
from nemo_speculative.config.groups import CONF
from nemo_speculative.data.tokenized_dataset import TokenizedDataset
from nemo_speculative.targets import demo
from nemo_speculative.targets.describe import text_config
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.training import build
from nemo_speculative.training.build import load_split
from nemo_speculative.training.optimizer import build_optimizers, build_schedules
from nemo_speculative.utils.errors import UserError
from tests.config.test_groups import GROUPS, composed
from tests.target_servers import serving
from tests.training.ranks import on_ranks

ROWS = [
    {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{i}"}]} for i in range(9)
]


def job_of(*overrides):
    return to_job(composed("train_eagle3", *overrides))


def options(group):
    return [option for owner, option in GROUPS if owner == group]


@pytest.fixture
def data_dir(tmp_path):
    rows = "".join(json.dumps(row | {"messages": row["conversations"]}) + "\n" for row in ROWS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    return tmp_path / "data"


@pytest.mark.parametrize("option", options("model"))
def test_model(option, target_dir, monkeypatch):
    job = job_of(f"model={option}", *([] if option == "tiny" else ["data=tiny"]))
    if option == "tiny":
        config = demo.llama_config(job.model)
    else:
        local = job.model.path == "somewhere"
        if not local:  # a hub name: not available offline, which is an error
            with pytest.raises(UserError, match="could not be downloaded"):
                get_method(job.model._target_)(job.model)
        job.model.path = str(target_dir)
        config = text_config(get_method(job.model._target_)(job.model))
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() > 0
    assert len(job.draft.chosen_aux_layers(config.num_hidden_layers)) == 3


def test_backend_hf(target_dir):
    target = instantiate(job_of("backend=hf").backend, path=target_dir, aux_layers=None)
    assert target.aux_layers == [1, 3, 4]


def test_backend_sglang(target_dir, monkeypatch):
    """The flags for SGLang; tests/sglang builds the backend with SGLang."""
    words = []
    monkeypatch.setattr("nemo_speculative.targets.sglang.installed_version", lambda: "0.5.23")
    monkeypatch.setattr("nemo_speculative.targets.sglang._make_importable", lambda device: None)
    monkeypatch.setattr("nemo_speculative.targets.sglang.parse_flags", lambda flags, _: words.extend(flags))
    job = job_of("backend=sglang", "data=tiny", "data.answers=given", "backend.flags=[--quantization,fp8]")
    with pytest.raises(InstantiationException, match="internals of SGLang"):  # SGLang is not installed
        instantiate(job.backend, path=target_dir, aux_layers=None)
    command = " ".join(words)
    assert "--return-aux-hidden-state-layer-ids 1 3 4" in command and command.endswith("--quantization fp8")
    assert "--max-total-tokens 16384" in command and "--dtype float32" in command


def test_backend_remote(target_dir):
    with serving(HFTarget(target_dir, aux_layers=None)) as server:
        job = job_of("backend=remote", f"backend.urls=[{server.url}]", "data.answers=given")
        target = instantiate(job.backend, path=target_dir, aux_layers=None)
    assert target.aux_layers == [1, 3, 4]


def actual_and_planned(target_dir, folder):
    """Properties of every backend's target on these ranks, next to those that the plan takes from its configuration."""
    ranks = dist.get_world_size()
    with pytest.MonkeyPatch.context() as patch, serving(HFTarget(target_dir, aux_layers=None)) as server:
        patch.setenv("RANK", str(dist.get_rank()))  # only the first one locks a directory
        patch.setattr("nemo_speculative.targets.sglang.load_runner", lambda *_: SimpleNamespace(max_total_num_tokens=9))
        patch.setattr("nemo_speculative.targets.sglang.SGLangTarget._check_head", lambda self: None)
        needs = {
            "features": [f"backend.directory={folder}", "backend.fill=true"],
            "remote": [f"backend.urls=[{server.url},{server.url}/other]"],
        }
        patch.setattr("nemo_speculative.targets.remote.client.ServerPool.check", lambda self, identity: None)
        results = {}
        for option in options("backend"):
            if option == "hf_tp" and ranks == 1:
                continue  # refused
            backend = job_of(f"backend={option}", "data.answers=given", *needs.get(option, [])).backend
            with closing(instantiate(backend, path=target_dir, aux_layers=None)) as target:
                properties = target.requests_ahead, target.collective
            results[option] = properties, (backend.requests_ahead, backend.together(ranks))
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_targets_have_the_properties_that_the_plan_counts(ranks, target_dir, tmp_path):
    (results, *_) = on_ranks(ranks, actual_and_planned, target_dir, tmp_path / "features")
    assert len(results) == len(options("backend")) - (ranks == 1)
    for option, (properties, planned) in results.items():
        assert properties == planned, option
    assert results["sglang"][0] == (0, ranks > 1) and results["remote"][0] == (2, False)


@pytest.mark.parametrize("option", options("draft"))
def test_draft(option, target):
    entries = 50 if "eagle3" in option else target.config.vocab_size
    job = job_of(f"draft={option}", *(["draft.vocab_size=50"] if entries == 50 else []))
    rows = TokenizedDataset(300)
    draft = build.build_draft(job, target, build.build_draft_vocabulary(job, target, rows))
    assert isinstance(draft, get_class(job.draft._target_)) and len(draft.draft_ids) == entries
    assert build.build_objective(job, target).num_steps == job.draft.ttt_steps


@pytest.mark.parametrize("option", options("loss"))
def test_loss(option, target):
    loss_function = build.build_objective(job_of(f"loss={option}"), target).loss_function
    logits = torch.zeros(2, 5)
    assert loss_function(logits, logits.softmax(-1)).shape == (2,)


@pytest.mark.parametrize("option", options("data"))
def test_data(option, data_dir):
    job = job_of(f"data={option}", "data.held_out_share=0.3")
    if hasattr(job.data, "prepared"):
        job.data.prepared = str(data_dir / "prepared")
        for source in getattr(job.data, "sources", [job.data]):
            source.path = str(data_dir / "train.jsonl")
    elif job.data.path == "somewhere":
        job.data.path = str(data_dir / "train.jsonl")
    split = load_split(job)
    assert split.training and split.held_out


@pytest.mark.parametrize("option", options("optimizer"))
def test_optimizer(option):
    config = job_of(f"optimizer={option}").optimizer
    optimizers = build_optimizers(config, torch.nn.Linear(2, 2))
    assert build_schedules(config, optimizers, 10).schedulers[0].get_last_lr()[0] > 0


@pytest.mark.parametrize("option", options("form"))
def test_form(option):
    form = instantiate(dataclasses.asdict(to_job(composed("convert_draft", f"form={option}")).form))
    assert callable(form.write)


@pytest.mark.parametrize("option", options("logger"))
def test_logger(option, tmp_path):
    logger = instantiate(
        job_of(f"logger={option}").logger, output_dir=tmp_path, run_config={"a": 1}, _recursive_=False, _convert_="all"
    )
    logger.log({"train/loss": 1.0}, 1)
    logger.close()


def test_groups_of_plain_values_have_no_other_options():
    """Groups without a class; an option that names one needs a test above."""
    plain = {"parallelism", "trainer", "exporter", "evaluation", "server", "hydra"}
    built = {"model", "backend", "draft", "loss", "data", "optimizer", "logger", "form"}
    elsewhere = {"model_draft", "experiment", "suite", "engine", "reasoning"}  # tested below or in their own tests
    assert {group for group, _ in GROUPS} == plain | built | elsewhere


@pytest.mark.parametrize("option", options("model_draft"))
def test_settings_for_a_draft_on_a_model(option):
    """Files named after a model and a draft are composed with them."""
    model, draft = next((m, d) for m in options("model") for d in options("draft") if option == f"{m}_{d}")
    suited = yaml.safe_load((CONF / "model_draft" / f"{option}.yaml").read_text())
    config = composed("train_eagle3", f"model={model}", f"draft={draft}")
    assert suited and OmegaConf.merge(config, suited) == config
