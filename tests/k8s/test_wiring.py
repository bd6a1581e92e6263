"""What objects say of each other: selectors, ports, policies, counts.

The comments name the checks of linters, as in test_pods.py.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml

from tests.k8s.environment import environment, servers
from tests.k8s.rendered import (
    OVERLAYS,
    ROOT,
    Object,
    Workload,
    objects,
    of_kind,
    selected,
    workloads,
)

DEFAULT_DENY = "default-deny"
# Read-only in the volume too: a container that forgot to say so cannot write either.
CLAIM = {"persistentVolumeClaim": {"claimName": "metaserve-models", "readOnly": True}}
everywhere = pytest.mark.parametrize("overlay", OVERLAYS)


@everywhere
def test_everything_is_in_our_namespace(overlay: str) -> None:
    # checkov CKV_K8S_21; Kubescape C-0061
    (namespace,) = of_kind(overlay, "Namespace")
    for one in objects(overlay):
        if one is not namespace:
            assert one["metadata"]["namespace"] == namespace["metadata"]["name"], one


@everywhere
def test_the_namespace_enforces_restricted_pods(overlay: str) -> None:
    (namespace,) = of_kind(overlay, "Namespace")
    for mode in ("enforce", "audit", "warn"):
        label = f"pod-security.kubernetes.io/{mode}"
        assert namespace["metadata"]["labels"][label] == "restricted"


@everywhere
def test_everything_is_labelled(overlay: str) -> None:
    # Kubescape C-0076, C-0077
    for one in objects(overlay):
        assert one["metadata"]["labels"]["app.kubernetes.io/part-of"] == "metaserve", one


@everywhere
def test_workloads_are_labelled_as_an_instance(overlay: str) -> None:
    # Polaris metadataAndInstanceMismatched
    for workload in workloads(overlay):
        labels = workload.object["metadata"]["labels"]
        if workload.kind != "InferenceService":
            assert labels["app.kubernetes.io/instance"] == workload.name
            assert labels.items() <= workload.labels.items()


@everywhere
def test_deployments_select_their_own_pods_only(overlay: str) -> None:
    # kube-linter mismatching-selector; kube-score
    # deployment-pod-selector-labels-match-template-metadata-labels
    for one in of_kind(overlay, "Deployment"):
        chosen = selected(overlay, one["spec"]["selector"]["matchLabels"])
        assert [workload.name for workload in chosen] == [one["metadata"]["name"]]


@everywhere
def test_service_accounts_are_there_and_have_no_token(overlay: str) -> None:
    # kube-linter non-existent-service-account; Kubescape C-0034
    accounts = {one["metadata"]["name"]: one for one in of_kind(overlay, "ServiceAccount")}
    for workload in workloads(overlay):
        account = accounts.pop(workload.pod["serviceAccountName"])
        assert account["automountServiceAccountToken"] is False
    assert not accounts, "accounts that nobody uses"


@everywhere
def test_claims_are_there(overlay: str) -> None:
    claims = {one["metadata"]["name"] for one in of_kind(overlay, "PersistentVolumeClaim")}
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for workload in workloads(overlay)
        for volume in workload.pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert used == claims


@pytest.mark.parametrize(
    ("overlay", "source"),
    [
        ("volume", CLAIM),
        ("gpu", CLAIM),
        ("triton", CLAIM),
        (
            "image",
            {"image": {"reference": "registry.example.com/models:7", "pullPolicy": "Always"}},
        ),
    ],
)
def test_packages_come_from_where_the_overlay_says(overlay: str, source: Object) -> None:
    for workload in workloads(overlay):
        (volume,) = (one for one in workload.pod["volumes"] if one["name"] == "models")
        assert volume == {"name": "models"} | source, workload.name


@everywhere
def test_services_lead_to_ports_of_one_deployment(overlay: str) -> None:
    # kube-linter dangling-service, invalid-target-ports; kube-score service-targets-pod,
    # service-type
    for service in of_kind(overlay, "Service"):
        assert service["spec"]["type"] == "ClusterIP"
        (workload,) = selected(overlay, service["spec"]["selector"])
        assert not workload.runs_once
        for port in service["spec"]["ports"]:
            assert workload.ports[port["targetPort"]] == port["port"]


@everywhere
def test_a_rollout_never_has_fewer_pods_than_asked_for(overlay: str) -> None:
    # kube-score deployment-strategy
    for one in of_kind(overlay, "Deployment"):
        assert one["spec"]["strategy"] == {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
        }


@everywhere
def test_a_rollout_waits_as_long_as_a_start_may_take(overlay: str) -> None:
    for one in of_kind(overlay, "Deployment"):
        for container in one["spec"]["template"]["spec"]["containers"]:
            probe = container["startupProbe"]
            start_seconds = probe["periodSeconds"] * probe["failureThreshold"]
            assert one["spec"]["progressDeadlineSeconds"] > start_seconds


@everywhere
def test_there_are_two_replicas_or_more(overlay: str) -> None:
    # kube-score deployment-replicas, horizontalpodautoscaler-replicas; Polaris
    # deploymentMissingReplicas, hpaMinAvailability, hpaMaxAvailability
    for workload in workloads(overlay):
        if not workload.runs_once:
            least, most = _replicas(overlay, workload)
            assert 2 <= least <= most


@everywhere
def test_every_deployment_keeps_replicas_when_nodes_are_drained(overlay: str) -> None:
    # kube-linter pdb-max-unavailable, pdb-min-available, pdb-unhealthy-pod-eviction-policy;
    # kube-score deployment-has-poddisruptionbudget, poddisruptionbudget-has-policy; Polaris
    # missingPodDisruptionBudget, pdbDisruptionsIsZero, pdbMinAvailableGreaterThan...
    kept = []
    for budget in of_kind(overlay, "PodDisruptionBudget"):
        (workload,) = selected(overlay, budget["spec"]["selector"]["matchLabels"])
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        assert "minAvailable" not in budget["spec"]
        assert 1 <= budget["spec"]["maxUnavailable"] < _replicas(overlay, workload)[0]
        kept.append(workload.name)
    assert kept == [one["metadata"]["name"] for one in of_kind(overlay, "Deployment")]


@everywhere
def test_nothing_is_reachable_unless_a_policy_says_so(overlay: str) -> None:
    # checkov CKV2_K8S_6; kube-score pod-networkpolicy, networkpolicy-targets-pod; Polaris
    # missingNetworkPolicy; Kubescape C-0030, C-0260
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(overlay, "NetworkPolicy")}
    deny = policies.pop(DEFAULT_DENY)
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    covered = []
    for spec in policies.values():
        (workload,) = selected(overlay, spec["podSelector"]["matchLabels"])
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        covered.append(workload.name)
    assert sorted(covered) == sorted(one.name for one in workloads(overlay))


@everywhere
def test_policies_name_peers_and_ports(overlay: str) -> None:
    for policy in _own_policies(overlay):
        (workload,) = selected(overlay, policy["podSelector"]["matchLabels"])
        for rule in policy["ingress"]:
            assert rule["from"]
            for peer in rule["from"]:
                if "namespaceSelector" in peer:
                    assert peer["namespaceSelector"]["matchLabels"], "the whole cluster"
            for port in rule["ports"]:
                assert port["port"] in workload.ports
        for rule in policy["egress"]:
            assert rule["to"]
            assert rule["ports"]


@everywhere
def test_prometheus_alone_reaches_the_metrics(overlay: str) -> None:
    monitoring = {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
    for workload in workloads(overlay):
        rules = [
            rule["from"]
            for rule in _policy_of(overlay, workload)["ingress"]
            if any(port["port"] == "metrics" for port in rule["ports"])
        ]
        has_metrics = "metrics" in workload.ports
        assert rules == ([[{"namespaceSelector": monitoring}]] if has_metrics else [])


@pytest.mark.parametrize("overlay", [one for one in OVERLAYS if one != "triton"])
def test_the_service_has_nowhere_to_go(overlay: str) -> None:
    for policy in _own_policies(overlay):
        (workload,) = selected(overlay, policy["podSelector"]["matchLabels"])
        if not workload.runs_once:
            assert policy["egress"] == []


def test_the_service_reaches_triton_and_names_only() -> None:
    server = _deployment("triton", "metaserve")
    triton = _deployment("triton", "metaserve-triton")
    ours, theirs = (_policy_of("triton", one) for one in (server, triton))
    (container,) = servers(server)
    host, _, port = environment("triton", container)["METASERVE_TRITON_URL"].partition(":")
    (service,) = (one for one in of_kind("triton", "Service") if one["metadata"]["name"] == host)
    (grpc,) = (one for one in service["spec"]["ports"] if one["port"] == int(port))
    names, inference = ours["egress"]
    assert {one["port"] for one in names["ports"]} == {53}
    assert names["to"][0]["podSelector"]["matchLabels"] == {"k8s-app": "kube-dns"}
    # A policy sees the port of the pod, not that of the Service.
    assert [one["port"] for one in inference["ports"]] == [triton.ports[grpc["targetPort"]]]
    assert inference["to"][0]["podSelector"]["matchLabels"].items() <= triton.labels.items()
    assert theirs["egress"] == []
    callers = [rule for rule in theirs["ingress"] if rule["ports"][0]["port"] == grpc["targetPort"]]
    peers = [peer["podSelector"]["matchLabels"] for rule in callers for peer in rule["from"]]
    assert [labels.items() <= server.labels.items() for labels in peers] == [True]


@pytest.mark.parametrize("overlay", ["export", "export-triton"])
def test_the_export_reaches_the_hub_and_nothing_private(overlay: str) -> None:
    (policy,) = _own_policies(overlay)
    names, hub = policy["egress"]
    assert {one["port"] for one in names["ports"]} == {53}
    assert [one["port"] for one in hub["ports"]] == [443]
    (v4, v6) = (one["ipBlock"] for one in hub["to"])
    # Among them the metadata service of clouds, 169.254.169.254.
    assert {"10.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"} <= set(v4["except"])
    assert {"fc00::/7", "fe80::/10"} <= set(v6["except"])


@pytest.mark.parametrize("overlay", ["export", "export-triton"])
def test_the_export_ends_and_goes_away(overlay: str) -> None:
    # kube-linter job-ttl-seconds-after-finished
    (job,) = of_kind(overlay, "Job")
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    assert job["spec"]["backoffLimit"] <= 3
    assert job["spec"]["activeDeadlineSeconds"] > 0
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    ("export", "reader", "into"),
    [("export", "gpu", "{out}"), ("export-triton", "triton", "{out}/caformer_s18/1")],
)
def test_the_exports_write_what_the_overlays_read(export: str, reader: str, into: str) -> None:
    (job,) = workloads(export)
    arguments = " ".join(job.pod["initContainers"][0]["args"]).replace("=", " ").split()
    package = into.format(out=arguments[arguments.index("--out") + 1])
    server = _deployment(reader, "metaserve")
    model = environment(reader, server.pod["initContainers"][0])["METASERVE_MODEL"]
    assert str(PurePosixPath("/models", model)) == package
    assert job.pod["containers"][0]["command"] == ["sha256sum", f"{package}/manifest.json"]


def test_triton_serves_the_repository_that_the_export_writes() -> None:
    (job,) = workloads("export-triton")
    (container,) = _deployment("triton", "metaserve-triton").pod["containers"]
    assert "--out=/models/triton" in job.pod["initContainers"][0]["args"]
    assert "--model-repository=/models/triton" in container["args"]


def test_the_service_asks_triton_for_the_model_whose_package_it_reads() -> None:
    (job,) = workloads("export-triton")
    (name,) = re.findall(r"--name=(\S+)", " ".join(job.pod["initContainers"][0]["args"]))
    (container,) = servers(_deployment("triton", "metaserve"))
    given = environment("triton", container)
    # The service takes the package's name where it is told none.
    asked = given.get("METASERVE_TRITON_MODEL", name)
    assert given["METASERVE_MODEL"] == f"/models/triton/{asked}/1"


def test_triton_may_stop_longer_than_it_waits_for_what_it_runs() -> None:
    triton = _deployment("triton", "metaserve-triton")
    (container,) = triton.pod["containers"]
    (waits,) = re.findall(r"--exit-timeout-secs=(\d+)", " ".join(container["args"]))
    assert triton.pod["terminationGracePeriodSeconds"] > int(waits)


def test_triton_is_one_release_everywhere() -> None:
    (container,) = _deployment("triton", "metaserve-triton").pod["containers"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    image = compose["services"]["triton"]["image"]
    assert re.sub(r"\$\{TRITON_VERSION:-(.+?)\}", r"\1", image) == container["image"]


@pytest.mark.parametrize(
    ("overlay", "kind"), [("autoscale", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")]
)
def test_one_autoscaler_owns_the_count(overlay: str, kind: str) -> None:
    # kube-score deployment-targeted-by-hpa-does-not-have-replicas-configured,
    # horizontalpodautoscaler-has-target
    scalers = [*of_kind(overlay, "HorizontalPodAutoscaler"), *of_kind(overlay, "ScaledObject")]
    (deployment,) = of_kind(overlay, "Deployment")
    assert [one["kind"] for one in scalers] == [kind]
    assert scalers[0]["spec"]["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]


def _own_policies(overlay: str) -> list[Object]:
    found = of_kind(overlay, "NetworkPolicy")
    return [one["spec"] for one in found if one["metadata"]["name"] != DEFAULT_DENY]


def _policy_of(overlay: str, workload: Workload) -> Object:
    (policy,) = (
        one
        for one in _own_policies(overlay)
        if one["podSelector"]["matchLabels"].items() <= workload.labels.items()
    )
    return policy


def _deployment(overlay: str, name: str) -> Workload:
    (found,) = (one for one in workloads(overlay) if one.name == name)
    return found


def _replicas(overlay: str, workload: Workload) -> tuple[Any, Any]:
    """Return the least and the most replicas of a workload."""
    if workload.kind == "InferenceService":
        return workload.pod["minReplicas"], workload.pod["maxReplicas"]
    for one in of_kind(overlay, "HorizontalPodAutoscaler"):
        return one["spec"]["minReplicas"], one["spec"]["maxReplicas"]
    for one in of_kind(overlay, "ScaledObject"):
        return one["spec"]["minReplicaCount"], one["spec"]["maxReplicaCount"]
    return workload.object["spec"]["replicas"], workload.object["spec"]["replicas"]
