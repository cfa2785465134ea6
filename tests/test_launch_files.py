"""launch/: the Slurm script, run with mocked commands, and the Kubernetes manifest, against the fields of the API."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_speculative import launch
from nemo_speculative.utils.errors import PeerLostError, UserError
from tests.config.test_groups import composed
from tests.serving.test_containers import linter

ROOT = Path(__file__).parents[1]
SCRIPT, MANIFEST = ROOT / "launch" / "slurm.sbatch", ROOT / "launch" / "pytorchjob.yaml"
SRUN = r"""#!/bin/bash
case "$*" in
  *" ip "*) [[ "$*" == "--nodes=1 --ntasks=1 --nodelist=node7 ip -4 -oneline address show dev ib0" ]] || exit 9
    echo '3: ib0    inet 10.9.8.7/24 brd 10.9.8.255 scope global ib0\       valid_lft forever preferred_lft forever';;
  *) shift; export SLURM_NODEID=1 PATH=$MOCKS; cd "$MOCKS" || exit 9; "$@";;
esac
"""
PYTHON = '#!/bin/bash\nprintf "%s\\n" "$@" > "$MOCKS/arguments"\nexit "$ENDS_WITH"\n'
SCONTROL = """#!/bin/bash
case "$1" in
  show) printf 'node7\nnode8\n';;
  requeue) echo "$2" > "$MOCKS/requeued";;
esac
"""


@pytest.fixture
def submitted(tmp_path):
    """Runs the script on node 1 of two; the launcher ends with the given status.  Returns the script's process, the
    launcher's arguments, and the job that was queued again."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), (".venv/bin/python", PYTHON)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bash").symlink_to("/bin/bash")

    def run(ends_with, **more):
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "MOCKS": str(tmp_path), "ENDS_WITH": str(ends_with),
            "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "41234",
            "OUTPUT_DIR": "/shared/one", "INTERFACE": "ib0", **more,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", SCRIPT, "model=llama31_8b", "data=jsonl", "data.path=/shared/my file.jsonl"], env=environment,
            text=True, capture_output=True, check=False,
        )  # fmt: skip
        arguments, requeued = tmp_path / "arguments", tmp_path / "requeued"
        return (
            done,
            arguments.read_text().splitlines() if arguments.exists() else [],
            requeued.read_text().strip() if requeued.exists() else None,
        )

    return run


def parse(arguments):
    """The launcher's parsed arguments, and the composed job of the recipe."""
    args = launch._parser().parse_args(arguments)
    args.interface = "lo"
    launch.resolve_arguments(args)
    assert (ROOT / args.training_script).exists()
    return args, composed(Path(args.training_script).stem, *args.training_script_args)


def test_the_script_starts_a_launcher_on_each_node(submitted):
    done, arguments, requeued = submitted(0)
    assert done.returncode == 0 and requeued is None, done.stderr
    assert arguments[:2] == ["-m", "nemo_speculative.launch"] and arguments[arguments.index("--interface") + 1] == "ib0"
    args, job = parse([{"gpu": "8"}.get(word, word) for word in arguments[2:]])
    assert (args.nnodes, args.max_restarts, args.stopped_status) == ("2", 3, 75)
    assert args.rdzv_endpoint == "10.9.8.7:21234" and "rank=1" in args.rdzv_conf
    assert job.data.path == "/shared/my file.jsonl" and job.output_dir and job.parallelism.replicate == -1


@pytest.mark.parametrize(("status", "requeued"), [(75, "41234"), (1, None)])
def test_a_stopped_run_is_queued_again_and_a_failed_one_is_not(submitted, status, requeued):
    done, _, job = submitted(status)
    assert (done.returncode, job) == (status, requeued), done.stderr


def test_the_script_requires_the_interface_before_it_starts_anything(submitted):
    done, arguments, _ = submitted(0, INTERFACE="")
    assert done.returncode and not arguments
    assert "name the network interface that the nodes share" in done.stderr


def test_the_script_passes_shellcheck():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    done = subprocess.run([linter("shellcheck"), SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_slurm_options_come_before_the_first_command():
    text = SCRIPT.read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.M))
    assert text.index("set -euo pipefail") > text.rindex("#SBATCH")
    assert "requeue" in options and options["open-mode"] == "append" and options["ntasks-per-node"] == "1"
    assert re.fullmatch(r"TERM@\d+", options["signal"])  # to the steps: B: would be to the script alone


CONTAINER = {
    "name!": str, "image!": str, "workingDir": str, "command": [str], "args": [str],
    "env": [{"name!": str, "value": str}], "ports": [{"name!": str, "containerPort!": int}],
    "securityContext": {"allowPrivilegeEscalation": bool, "capabilities": {"add": [str]}},
    "resources": {"limits": {"nvidia.com/gpu": int}}, "volumeMounts": [{"name!": str, "mountPath!": str}],
}  # fmt: skip
REPLICAS = {
    "replicas!": int,
    "restartPolicy!": str,
    "template!": {
        "spec!": {
            "terminationGracePeriodSeconds": int,
            "containers!": [CONTAINER],
            "volumes": [
                {
                    "name!": str,
                    "persistentVolumeClaim": {"claimName!": str},
                    "emptyDir": {"medium": str, "sizeLimit": str},
                }
            ],
        }
    },
}
PYTORCH_JOB = {
    "apiVersion!": str,
    "kind!": str,
    "metadata!": {"name!": str},
    "spec!": {
        "nprocPerNode": str,
        "runPolicy": {"cleanPodPolicy": str, "backoffLimit": int},
        "pytorchReplicaSpecs!": {"Master!": REPLICAS, "Worker": REPLICAS},
    },
}
"""Fields of kubeflow.org/v1 PyTorchJob and of Kubernetes' pods that the manifest may use; ``!``: required."""


def mismatches(value: Any, shape: Any, place: str = "") -> list[str]:
    """Places where ``value`` does not have ``shape``."""
    if isinstance(shape, list):
        if not isinstance(value, list) or not value:
            return [f"{place}: not a list"]
        return [line for i, one in enumerate(value) for line in mismatches(one, shape[0], f"{place}[{i}]")]
    if not isinstance(shape, dict):
        return [] if type(value) is shape else [f"{place}: not {shape.__name__}"]
    if not isinstance(value, dict):
        return [f"{place}: not a mapping"]
    fields = {key.rstrip("!"): inner for key, inner in shape.items()}
    lines = [f"{place}.{key}: no such field" for key in value.keys() - fields.keys()]
    lines += [f"{place}.{key[:-1]}: missing" for key in shape if key.endswith("!") and key[:-1] not in value]
    return lines + [
        line for key in value.keys() & fields for line in mismatches(value[key], fields[key], f"{place}.{key}")
    ]


@pytest.fixture
def manifest():
    return yaml.safe_load(MANIFEST.read_text())


def test_the_manifest_has_the_fields_of_the_api(manifest):
    assert mismatches(manifest, PYTORCH_JOB) == []
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = manifest["spec"]
    assert spec["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")
    for replicas in spec["pytorchReplicaSpecs"].values():
        assert replicas["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        pod = replicas["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"  # the operator looks for it
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_unknown_missing_and_mistyped_fields_are_detected(manifest):
    del manifest["spec"]["pytorchReplicaSpecs"]["Master"]["restartPolicy"]
    manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] = "1"
    manifest["spec"]["nproc"] = 8
    assert sorted(line.split(".")[-1] for line in mismatches(manifest, PYTORCH_JOB)) == [
        "nproc: no such field",
        "replicas: not int",
        "restartPolicy: missing",
    ]


def test_the_pods_start_the_launcher_with_valid_arguments(manifest):
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    variables = {"RANK": "1", "MASTER_ADDR": "10.9.8.7", "MASTER_PORT": "23456"}
    for pod in replicas.values():
        (container,) = pod["template"]["spec"]["containers"]
        assert container["command"] == ["python", "-m", "nemo_speculative.launch"]
        words = [re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], word) for word in container["args"]]
        args, job = parse(words)
        assert args.rdzv_endpoint == "10.9.8.7:23456" and "rank=1" in args.rdzv_conf
        assert int(args.nnodes) == sum(other["replicas"] for other in replicas.values())
        assert int(args.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
        assert job.data._target_ == composed("train_eagle3", "data=jsonl").data._target_  # not the model's data set
        # The operator's ExitCode: 1 to 127 ends the job, more is started again.
        assert pod["restartPolicy"] == "ExitCode" and UserError.exit_code < 128 <= PeerLostError.exit_code
        assert 128 <= args.stopped_status < 256 and job.resume.name == "auto" and job.parallelism.replicate == -1
