"""The Kubernetes example against its schemas."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from kubeflow_trainer_api.models import IoK8sApiCoreV1PodTemplateSpec as PodTemplate
from pydantic import BaseModel, ConfigDict, ValidationError

from scalora_dist.config.parser import parse_options

FILE = Path(__file__).parents[2] / "launch" / "kubernetes" / "pytorchjob.yaml"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


# What kubeflow.org/v1's PyTorchJob has above its pods (its CRD; no package ships one that can be
# checked against). The pods are Kubernetes' own, whose models kubeflow-trainer-api has.
class Metadata(Strict):
    name: str
    namespace: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class ReplicaSpec(Strict):
    replicas: int
    restartPolicy: Literal["Always", "OnFailure", "Never", "ExitCode"]
    template: dict[str, Any]


class RunPolicy(Strict):
    activeDeadlineSeconds: int | None = None
    backoffLimit: int | None = None
    cleanPodPolicy: Literal["None", "Running", "All"] | None = None
    suspend: bool | None = None
    ttlSecondsAfterFinished: int | None = None


class ReplicaSpecs(Strict):
    Master: ReplicaSpec
    Worker: ReplicaSpec


class Spec(Strict):
    pytorchReplicaSpecs: ReplicaSpecs
    runPolicy: RunPolicy = RunPolicy()
    nprocPerNode: str | None = None


class PyTorchJob(Strict):
    apiVersion: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: Metadata
    spec: Spec


def check(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Both pods' templates; raises where the schemas have no such field or type."""
    specs = PyTorchJob.model_validate(job).spec.pytorchReplicaSpecs
    templates = [specs.Master.template, specs.Worker.template]
    for template in templates:
        # Kubernetes' models leave unknown fields out: they must not be other than what was given.
        known = PodTemplate.from_dict(copy.deepcopy(template)).to_dict()
        if known != template:
            raise ValueError(f"unknown fields: {template} is read as {known}")
    return templates


@pytest.fixture
def job() -> dict[str, Any]:
    return copy.deepcopy(yaml.safe_load(FILE.read_text()))


@pytest.mark.floors
def test_the_example_is_valid(job: dict[str, Any]) -> None:
    for template in check(job):
        (container,) = template["spec"]["containers"]
        assert container["name"] == "pytorch"  # which the operator gives its environment
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in template["spec"]["volumes"]}
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert env["NNODES"] == str(len(check(job)))
        assert env["NPROC_PER_NODE"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
        words = [word for arg in container["args"] for word in arg.split("=", 1)]
        options = parse_options(words)
        assert options.train.resume_from_checkpoint == "latest"
        assert (
            options.launch.ds_config and Path(FILE.parents[2] / options.launch.ds_config).exists()
        )
    assert job["spec"]["pytorchReplicaSpecs"]["Master"]["restartPolicy"] == "OnFailure"


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (["spec", "nprocPerNode"], 8),
        (["spec", "runPolicy", "backofLimit"], 3),
        (["spec", "pytorchReplicaSpecs", "Worker", "restartPolicy"], "onFailure"),
        (["spec", "pytorchReplicaSpecs", "Chief"], {}),
        (["spec", "pytorchReplicaSpecs", "Master", "template", "spec", "volume"], []),
        (["spec", "pytorchReplicaSpecs", "Master", "template", "spec", "containers"], [{}]),
    ],
)
def test_the_schemas_refuse_what_is_wrong(
    job: dict[str, Any], where: list[str], value: Any
) -> None:
    inner = job
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises((ValidationError, ValueError)):
        check(job)
