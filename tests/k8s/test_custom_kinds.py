"""Objects of CRDs, which kubernetes-validate has no schemas for: their shape, and what they ask."""

from __future__ import annotations

import re

import pytest
import yaml

from app.metrics import Metrics
from tests.k8s.fields import FIELDS, unknown
from tests.k8s.rendered import OVERLAYS, ROOT, Object, objects, of_kind, selected, workloads

WAIT = "metaserve_queue_wait_estimate_seconds"
API_VERSIONS = {
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "ScaledObject": "keda.sh/v1alpha1",
    "InferenceService": "serving.kserve.io/v1beta1",
}
MONITORED = ["autoscale", "keda", "volume"]


def only(overlay: str, kind: str) -> Object:
    (found,) = of_kind(overlay, kind)
    assert found["apiVersion"] == API_VERSIONS[kind]
    return found


def adapter() -> Object:
    """Return the values for prometheus-adapter's chart."""
    path = ROOT / "k8s/overlays/autoscale/prometheus-adapter.yaml"
    values: Object = yaml.safe_load(path.read_text())
    return values


@pytest.mark.parametrize("overlay", ["base", "cpu", "gpu", "triton", "export"])
def test_no_operator_is_needed(overlay: str) -> None:
    assert not {one["kind"] for one in objects(overlay)} & API_VERSIONS.keys()


@pytest.mark.parametrize("kind", API_VERSIONS)
def test_every_field_is_one_that_its_kind_has(kind: str) -> None:
    found = [one for overlay in OVERLAYS for one in of_kind(overlay, kind)]
    assert found
    for one in found:
        assert not list(unknown(kind, one))
    assert FIELDS.keys() == API_VERSIONS.keys()


@pytest.mark.parametrize("overlay", MONITORED)
def test_prometheus_finds_the_metrics_under_the_name_that_alerts_have(overlay: str) -> None:
    monitor = only(overlay, "ServiceMonitor")
    (service,) = of_kind(overlay, "Service")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["namespaceSelector"]["matchNames"] == [service["metadata"]["namespace"]]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert "metrics" in {one["name"] for one in service["spec"]["ports"]}
    assert (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics")
    # Without a jobLabel the job is named after the Service.
    assert service["metadata"]["name"] == "metaserve"
    assert "jobLabel" not in monitor["spec"]


@pytest.mark.parametrize("overlay", MONITORED)
def test_the_operator_gets_the_same_rules_as_prometheus(overlay: str) -> None:
    rules = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    assert only(overlay, "PrometheusRule")["spec"] == rules, "run make k8s-rules"


def test_the_autoscaler_asks_for_a_metric_we_have() -> None:
    assert f"# TYPE {WAIT} gauge" in Metrics().render().decode()
    (autoscaler,) = of_kind("autoscale", "HorizontalPodAutoscaler")
    cpu, wait = autoscaler["spec"]["metrics"]
    (workload,) = workloads("autoscale")
    assert cpu["containerResource"]["container"] in {one["name"] for one in workload.containers}
    assert wait["pods"]["metric"]["name"] == WAIT


def test_the_adapter_serves_the_metric_that_the_autoscaler_asks_for() -> None:
    (rule,) = adapter()["rules"]["custom"]
    assert rule["seriesQuery"].startswith(f"{WAIT}{{")
    assert rule["name"]["as"] == WAIT
    assert {one["resource"] for one in rule["resources"]["overrides"].values()} == {
        "namespace",
        "pod",
    }
    for part in ("<<.Series>>", "<<.LabelMatchers>>", "<<.GroupBy>>"):
        assert part in rule["metricsQuery"]
    # Of several series of one pod the mean; that over the pods is the autoscaler's.
    assert rule["metricsQuery"].startswith("avg by (<<.GroupBy>>) (")


def test_keda_asks_for_a_metric_we_have() -> None:
    scaled = only("keda", "ScaledObject")
    cpu, wait = scaled["spec"]["triggers"]
    (workload,) = workloads("keda")
    (service,) = of_kind("keda", "Service")
    assert (cpu["type"], cpu["metricType"]) == ("cpu", "Utilization")
    assert cpu["metadata"]["containerName"] in {one["name"] for one in workload.containers}
    assert (wait["type"], wait["metricType"]) == ("prometheus", "AverageValue")
    # KEDA divides by the number of replicas, so a mean would be divided twice.
    assert wait["metadata"]["query"].startswith("sum(")
    metric, labels = re.findall(r"(metaserve_\w+)\{(.*?)\}", wait["metadata"]["query"])[0]
    namespace, job = service["metadata"]["namespace"], service["metadata"]["name"]
    assert metric == WAIT
    assert labels == f'namespace="{namespace}",job="{job}"'
    # What a trigger is told is text.
    for trigger in (cpu, wait):
        assert all(isinstance(value, str) for value in trigger["metadata"].values())


def test_both_autoscalers_ask_the_prometheus_that_may_scrape() -> None:
    asked = only("keda", "ScaledObject")["spec"]["triggers"][1]["metadata"]["serverAddress"]
    prometheus = adapter()["prometheus"]
    assert asked == f"{prometheus['url']}:{prometheus['port']}"
    # The operator's Service, in the namespace that test_wiring.py lets in.
    assert asked == "http://prometheus-operated.monitoring.svc:9090"


def test_both_autoscalers_do_the_same() -> None:
    (autoscaler,) = of_kind("autoscale", "HorizontalPodAutoscaler")
    scaled = only("keda", "ScaledObject")["spec"]
    hpa = autoscaler["spec"]
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (
        scaled["minReplicaCount"],
        scaled["maxReplicaCount"],
    )
    assert scaled["minReplicaCount"] <= scaled["fallback"]["replicas"] <= scaled["maxReplicaCount"]
    assert hpa["behavior"] == scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    cpu, wait = hpa["metrics"]
    by_cpu, by_wait = (one["metadata"] for one in scaled["triggers"])
    assert str(cpu["containerResource"]["target"]["averageUtilization"]) == by_cpu["value"]
    millis = wait["pods"]["target"]["averageValue"].removesuffix("m")
    assert int(millis) / 1000 == float(by_wait["threshold"])


def test_kserve_finds_the_container_that_serves() -> None:
    service = only("kserve", "InferenceService")
    (container,) = service["spec"]["predictor"]["containers"]
    assert container["name"] == "kserve-container"
    assert container["ports"][0]["name"] == "http", "KServe sends requests to the first port"
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Standard"
    label = "serving.kserve.io/inferenceservice"
    assert selected("kserve", {label: service["metadata"]["name"]})
