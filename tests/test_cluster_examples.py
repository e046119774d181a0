"""examples/cluster: the scripts are shell, the YAML is YAML, and what they ask of torchrun and models.train exists."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from models.command_line import _options
from models.published_rows import PUBLISHED_ROWS
from models.recipes import TrainConfig

FOLDER = Path(__file__).parent.parent / "examples/cluster"
SCRIPT = FOLDER / "slurm.sh"

PYTORCHJOB = {
    "spec": {"elasticPolicy": dict, "pytorchReplicaSpecs": dict, "runPolicy": dict},
    "elasticPolicy": {
        "maxReplicas": int,
        "maxRestarts": int,
        "metrics": list,
        "minReplicas": int,
        "rdzvBackend": str,
        "rdzvConf": list,
        "rdzvHost": str,
        "rdzvId": str,
        "rdzvPort": int,
        "standalone": bool,
    },
    "runPolicy": {
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "cleanPodPolicy": str,
        "schedulingPolicy": dict,
        "ttlSecondsAfterFinished": int,
    },
    "Worker": {"replicas": int, "restartPolicy": str, "template": dict},
}
"""Fields that the operator has had since there is an elasticPolicy, with their types: those common to
manifests/base/crds/kubeflow.org_pytorchjobs.yaml in kubeflow/training-operator at 04538cc6 and in kubeflow/trainer, its
later name, at ee38ae8a. The numbers of processes a machine are left out. elasticPolicy.nProcPerNode has been deprecated
since 1.7; spec.nprocPerNode came with it, and was ignored at first where there is no Master (kubeflow/trainer#1947)."""


def documents(name: str) -> list[dict]:
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def pods() -> dict[str, dict]:
    (job,) = documents("pytorchjob.yaml")
    return {
        "pytorchjob": job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"],
        "kueue": documents("kueue_job.yaml")[0]["spec"]["template"]["spec"],
    }


def check_command(text: str) -> None:
    """Options of torchrun and of the program, where there are any behind a program's name."""
    torchrun = re.search(r"torchrun ((?:--|\\).*?)-m cascadeops\.models\.train", text, re.DOTALL)[1]
    known = set(get_args_parser()._option_string_actions)
    given = set(re.findall(r"(--[a-z-]+)", torchrun))
    assert given and given <= known
    known = {"--" + name.replace("_", "-") for name in _options(TrainConfig)} | {"--preset"}
    given = set(re.findall(r"(?<!\S)[(]?(--[a-z-]+)", " ".join(re.findall(r"(?:set --|options=\()(.*)", text))))
    assert given and given - {"--resume"} <= known
    assert all(preset in PUBLISHED_ROWS for preset in re.findall(r"--preset (\w+)|PRESET:-(\w+)", text)[0] if preset)


def test_the_script_is_shell_and_asks_slurm_for_what_it_relies_on():
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    text = SCRIPT.read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert {"nodes", "gpus-per-node", "requeue", "open-mode", "signal"} <= asked.keys()
    assert asked["signal"].startswith("B:USR1@") and "USR1 TERM" in text
    assert "/" not in asked["output"]  # Slurm makes no folder, and a job that cannot write its log fails without one
    check_command(text)


def test_the_script_requeues_a_job_that_was_told_to_stop(tmp_path):
    """With Slurm's programs, and torchrun, in the form of scripts that note how they were called."""
    tools = {
        "scontrol": 'if [ "$1" = show ]; then echo first; sleep 0.1; echo second; else echo "$@" >> called; fi',
        "scancel": 'echo "$@" >> called; kill -TERM "$(cat step)"',
        "srun": 'echo $$ > step; echo "$@" > started; trap "exit 143" TERM; kill -USR1 $PPID; sleep 5 & wait',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run").mkdir()
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_NAME": "x",
        "SLURM_JOB_ID": "12",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "64",
    }
    environment |= {"SLURM_JOB_NODELIST": "n[1-2]", "OUTPUT": "run", "DATA": "coco", "BACKBONE": "r50.pth"}
    done = subprocess.run(["bash", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "called").read_text() == "--signal=TERM 12.0\nrequeue 12\n"
    started = (tmp_path / "started").read_text()
    assert "--cpus-per-task=64 torchrun" in started  # srun reads it from no variable since Slurm 22.05
    assert "--rdzv-endpoint=first:20012" in started and "--preset htc_r50_fpn_1x_coco" in started
    (tmp_path / "run/config.json").touch()
    subprocess.run(["bash", SCRIPT], cwd=tmp_path, env=environment, check=True, timeout=20)
    started = (tmp_path / "started").read_text()
    assert "train --resume --output run" in started and "--preset" not in started


def test_the_pytorchjob_has_fields_that_every_operator_knows():
    (job,) = documents("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    assert spec["pytorchReplicaSpecs"].keys() == {"Worker"}
    for name, fields in {"spec": spec, **spec, **spec["pytorchReplicaSpecs"]}.items():
        if name != "pytorchReplicaSpecs":
            assert {field: type(value) for field, value in fields.items()}.items() <= PYTORCHJOB[name].items()
    elastic, worker = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == worker["replicas"]  # batches have one size
    assert worker["restartPolicy"] == "OnFailure" and spec["runPolicy"]["cleanPodPolicy"] == "None"


def test_the_job_for_kueue_can_be_created_again_and_again():
    """Its queue exists already then, and comes from a file of its own. Of Kueue it needs nothing else: a job of a
    priority class that does not exist waits for ever (kubernetes-sigs/kueue#3439)."""
    (job,), (queue,) = documents("kueue_job.yaml"), documents("kueue_queue.yaml")
    assert (job["apiVersion"], job["kind"], job["spec"]["suspend"]) == ("batch/v1", "Job", True)
    assert job["metadata"]["generateName"] and "name" not in job["metadata"]
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": queue["metadata"]["name"]}
    assert (queue["apiVersion"], queue["kind"]) == ("kueue.x-k8s.io/v1beta1", "LocalQueue")
    assert queue["spec"].keys() == {"clusterQueue"}


@pytest.mark.parametrize("name", ["pytorchjob", "kueue"])
def test_the_pods(name):
    pod = pods()[name]
    (container,) = pod["containers"]
    assert container["resources"]["requests"]["nvidia.com/gpu"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["terminationGracePeriodSeconds"] > 10
    (command,) = container["args"]
    assert command.count("exec torchrun") == 1  # so that SIGTERM reaches it
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']} " in command
    subprocess.run(["bash", "-n"], input=command, text=True, check=True)
    check_command(command)
