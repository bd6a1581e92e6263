"""What reviewers and linters ask of every pod and container, as tables.

The comments name the checks that ask by default: kube-linter's and Polaris' by their names,
kube-score's by its ids, Kubescape's by its numbers. Where two disagree, or where we do not follow,
the comment says so. What they ask of objects among each other is in test_wiring.py.

Not followed: Polaris priorityClassNotSet (classes are the cluster's), Kubescape C-0078 (which
registries are allowed is yours to say).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.k8s.environment import memory_bytes
from tests.k8s.rendered import OVERLAYS, Object, Workload, workloads

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
# An image's name -> the paths of its probes, in that order.
PROBED = {
    "metaserve": ("/startupz", "/readyz", "/livez"),
    "tritonserver": ("/v2/health/live", "/v2/health/ready", "/v2/health/live"),
}

CONTAINERS: dict[str, Callable[[Object], object]] = {
    # kube-linter unset-cpu-requirements, unset-memory-requirements; kube-score container-resources,
    # container-ephemeral-storage-request-and-limit; Polaris cpuRequestsMissing, cpuLimitsMissing,
    # memoryRequestsMissing, memoryLimitsMissing; C-0268 to C-0271
    "has requests and limits": lambda one: all(
        resource in one["resources"][kind]
        for kind in ("requests", "limits")
        for resource in ("cpu", "memory", "ephemeral-storage")
    ),
    # QoS class Guaranteed; kube-score container-resource-requests-equal-limits
    "gets what it is limited to": lambda one: (
        one["resources"]["requests"] == one["resources"]["limits"]
    ),
    # kube-linter latest-tag; kube-score container-image-tag; Polaris tagNotSpecified; C-0075
    "has an image with a version": lambda one: re.search(r":\d[\w.-]+$", one["image"]),
    # kube-score container-image-pull-policy; Polaris pullPolicyNotAlways
    "asks the registry for its image": lambda one: one["imagePullPolicy"] == "Always",
    # kube-linter privilege-escalation-container; Polaris privilegeEscalationAllowed; C-0016
    "cannot gain privileges": lambda one: (
        one["securityContext"]["allowPrivilegeEscalation"] is False
    ),
    # kube-linter privileged-container; kube-score container-security-context-privileged;
    # Polaris runAsPrivileged; C-0057
    "has no privileges": lambda one: one["securityContext"]["privileged"] is False,
    # kube-linter drop-net-raw-capability; Polaris dangerousCapabilities, insecureCapabilities,
    # linuxHardening; C-0046, C-0055
    "drops every capability": lambda one: (
        one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    ),
    # kube-linter no-read-only-root-fs; kube-score
    # container-security-context-readonlyrootfilesystem; Polaris notReadOnlyRootFilesystem; C-0017
    "cannot write to its image": lambda one: (
        one["securityContext"]["readOnlyRootFilesystem"] is True
    ),
    # The pod's context, which the next table looks at, is not undone. Polaris procMount
    "changes nothing else of the pod's security": lambda one: (
        one["securityContext"].keys()
        == {"allowPrivilegeEscalation", "privileged", "readOnlyRootFilesystem", "capabilities"}
    ),
    # Polaris hostPortSet; C-0044
    "takes no port of the node": lambda one: all(
        "hostPort" not in port for port in one.get("ports", [])
    ),
    # kube-linter ssh-port
    "opens no privileged port": lambda one: all(
        port["containerPort"] > 1024 for port in one.get("ports", [])
    ),
    # kube-linter duplicate-env-var; kube-score environment-variable-key-duplication
    "names no variable twice": lambda one: (
        len({variable["name"] for variable in one.get("env", [])}) == len(one.get("env", []))
    ),
    # kube-linter env-var-secret; Polaris sensitiveContainerEnvVar; C-0012
    "has no secret among its variables": lambda one: (
        not any(
            re.search(r"(?i)secret|password|token|key", variable["name"])
            or "secretKeyRef" in variable.get("valueFrom", {})
            for variable in one.get("env", [])
        )
        and all("secretRef" not in source for source in one.get("envFrom", []))
    ),
    "mounts models read-only, unless it makes them": lambda one: all(
        mount.get("readOnly") is True
        for mount in one.get("volumeMounts", [])
        if mount["name"] == "models" and one["name"] != "export"
    ),
}

SERVING: dict[str, Callable[[Object], object]] = {
    # kube-score pod-probes; Polaris readinessProbeMissing, livenessProbeMissing; C-0018, C-0056
    "has the three probes": lambda one: all(probe in one for probe in PROBES),
    # kube-score pod-probes-identical
    "is asked by each probe what that probe is for": lambda one: (
        tuple(one[probe]["httpGet"]["path"] for probe in PROBES) == PROBED[image_name(one)]
    ),
    "gives liveness longer to answer than readiness": lambda one: (
        one["livenessProbe"]["timeoutSeconds"] > one["readinessProbe"]["timeoutSeconds"]
    ),
    "has five minutes to start": lambda one: (
        one["startupProbe"]["periodSeconds"] * one["startupProbe"]["failureThreshold"] >= 300
    ),
    # kube-linter liveness-port, readiness-port, startup-port
    "is probed at the port of its callers": lambda one: (
        "http" in {port["name"] for port in one["ports"]}
        and all(one[probe]["httpGet"]["port"] == "http" for probe in PROBES)
    ),
    "has somewhere to write": lambda one: any(
        mount["mountPath"] == "/tmp" for mount in one["volumeMounts"]
    ),
}

# Pod Security Standards, restricted: nothing else may be mounted.
VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}

PODS: dict[str, Callable[[Object], object]] = {
    # kube-linter run-as-non-root; Polaris runAsRootAllowed; C-0013
    "does not run as root": lambda pod: pod["securityContext"]["runAsNonRoot"] is True,
    # kube-score container-security-context-user-group-id
    "has a user and a group that no node has": lambda pod: (
        pod["securityContext"]["runAsUser"] > 10_000
        and pod["securityContext"]["runAsGroup"] > 10_000
    ),
    # kube-score container-seccomp-profile; Polaris linuxHardening; C-0055, C-0210
    "has the runtime's seccomp profile": lambda pod: (
        pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    ),
    # kube-linter unsafe-sysctls
    "sets no sysctls": lambda pod: "sysctls" not in pod["securityContext"],
    # Polaris automountServiceAccountToken; C-0034
    "has no token": lambda pod: pod["automountServiceAccountToken"] is False,
    # kube-linter deprecated-service-account-field
    "names its service account the new way": lambda pod: (
        "serviceAccount" not in pod and pod["serviceAccountName"]
    ),
    # kube-linter host-ipc, host-network, host-pid; Polaris hostIPCSet, hostNetworkSet, hostPIDSet,
    # hostProcess; C-0038, C-0041
    "shares nothing with the node": lambda pod: (
        not {"hostIPC", "hostNetwork", "hostPID", "hostUsers"} & pod.keys()
    ),
    # kube-linter docker-sock, sensitive-host-mounts; Polaris hostPathSet; C-0045, C-0048, C-0074
    "mounts nothing of the node": lambda pod: all(
        len(volume) == 2 and volume.keys() - {"name"} <= VOLUMES for volume in pod["volumes"]
    ),
    "bounds what it may write": lambda pod: all(
        "sizeLimit" in volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume
    ),
    "gets no variables for Services": lambda pod: pod["enableServiceLinks"] is False,
}


@pytest.mark.parametrize("check", CONTAINERS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container(overlay: str, check: str) -> None:
    checked = 0
    for workload in workloads(overlay):
        for container in workload.containers:
            assert CONTAINERS[check](container), f"{workload.name}/{container['name']}"
            checked += 1
    assert checked


@pytest.mark.parametrize("check", SERVING)
@pytest.mark.parametrize("overlay", [one for one in OVERLAYS if not one.startswith("export")])
def test_every_container_that_serves(overlay: str, check: str) -> None:
    checked = 0
    for workload in workloads(overlay):
        for container in workload.pod["containers"]:
            assert SERVING[check](container), f"{workload.name}/{container['name']}"
            checked += 1
    assert checked


@pytest.mark.parametrize("check", PODS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod(overlay: str, check: str) -> None:
    for workload in workloads(overlay):
        assert PODS[check](workload.pod), workload.name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_stay_apart(overlay: str) -> None:
    # kube-linter no-anti-affinity; kube-score deployment-has-host-podantiaffinity,
    # pod-topology-spread-constraints; Polaris topologySpreadConstraint
    for workload in workloads(overlay):
        if workload.runs_once:
            continue
        preferred = workload.pod["affinity"]["podAntiAffinity"]
        (term,) = preferred["preferredDuringSchedulingIgnoredDuringExecution"]
        (spread,) = workload.pod["topologySpreadConstraints"]
        assert term["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
        assert spread["topologyKey"] == "topology.kubernetes.io/zone"
        for selector in (term["podAffinityTerm"]["labelSelector"], spread["labelSelector"]):
            assert selector["matchLabels"].items() <= workload.labels.items()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_memory_volumes_fit_into_the_memory(overlay: str) -> None:
    for workload in workloads(overlay):
        in_memory = sum(
            memory_bytes(volume["emptyDir"]["sizeLimit"])
            for volume in workload.pod["volumes"]
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        )
        limits = (one["resources"]["limits"]["memory"] for one in workload.pod["containers"])
        assert in_memory * 4 <= min(map(memory_bytes, limits)), workload.name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_disk_volumes_fit_into_the_disk(overlay: str) -> None:
    for workload in workloads(overlay):
        on_disk = sum(
            memory_bytes(volume["emptyDir"]["sizeLimit"])
            for volume in workload.pod["volumes"]
            if volume.get("emptyDir", {"medium": "Memory"}).get("medium") != "Memory"
        )
        writers = [one for one in workload.containers if _mounts(one, "tmp")]
        limit = sum(
            memory_bytes(one["resources"]["limits"]["ephemeral-storage"]) for one in writers
        )
        assert on_disk < limit, workload.name


@pytest.mark.parametrize("overlay", ["gpu", "triton"])
def test_processes_beside_a_gpu_have_shared_memory(overlay: str) -> None:
    on_gpu = [one for one in workloads(overlay) if _has_gpu(one)]
    assert on_gpu
    for workload in on_gpu:
        (container,) = workload.pod["containers"]
        (mount,) = (one for one in container["volumeMounts"] if one["mountPath"] == "/dev/shm")
        (volume,) = (one for one in workload.pod["volumes"] if one["name"] == mount["name"])
        assert volume["emptyDir"]["medium"] == "Memory"
        assert any(one["key"] == "nvidia.com/gpu" for one in workload.pod["tolerations"])


def image_name(container: Object) -> str:
    """Return an image's name, without its registry and tag."""
    return str(container["image"]).rpartition("/")[2].partition(":")[0]


def _has_gpu(workload: Workload) -> bool:
    return any("nvidia.com/gpu" in one["resources"]["limits"] for one in workload.containers)


def _mounts(container: Object, volume: str) -> bool:
    return any(mount["name"] == volume for mount in container.get("volumeMounts", []))
