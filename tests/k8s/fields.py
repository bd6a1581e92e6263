"""The fields that our objects of CRDs may have, by what they stand in.

kubernetes-validate knows no CRD, and an API server may drop a field that it does not know. These
are the fields that we use: another one is a slip, or is to be looked up and added.
"""

from __future__ import annotations

from collections.abc import Iterator

OBJECT = {"": "apiVersion kind metadata spec", "metadata": "name namespace labels annotations"}

# Kind -> a field -> those that may stand in it.
FIELDS: dict[str, dict[str, str]] = {
    "ServiceMonitor": OBJECT
    | {
        "spec": "selector namespaceSelector endpoints",
        "selector": "matchLabels",
        "namespaceSelector": "matchNames",
        "endpoints": "port path interval scrapeTimeout",
    },
    "PrometheusRule": OBJECT
    | {
        "spec": "groups",
        "groups": "name rules",
        "rules": "record alert expr for labels annotations",
    },
    "ScaledObject": {
        "": OBJECT[""],
        # The object's; those that a trigger is told: cpu's, then prometheus'.
        "metadata": "name namespace labels"
        " containerName value serverAddress query threshold ignoreNullValues",
        "spec": "scaleTargetRef minReplicaCount maxReplicaCount pollingInterval fallback triggers"
        " advanced",
        "scaleTargetRef": "apiVersion kind name",
        "fallback": "failureThreshold replicas behavior",
        "triggers": "type metricType metadata",
        "advanced": "horizontalPodAutoscalerConfig",
        "horizontalPodAutoscalerConfig": "behavior",
        "behavior": "scaleUp scaleDown",
        "scaleUp": "stabilizationWindowSeconds selectPolicy policies",
        "scaleDown": "stabilizationWindowSeconds policies",
        "policies": "type value periodSeconds",
    },
    "InferenceService": OBJECT
    | {
        "spec": "predictor",
        "predictor": "minReplicas maxReplicas scaleMetric scaleTarget deploymentStrategy containers"
        " serviceAccountName automountServiceAccountToken enableServiceLinks affinity"
        " terminationGracePeriodSeconds securityContext topologySpreadConstraints volumes",
        "deploymentStrategy": "type rollingUpdate",
        "rollingUpdate": "maxSurge maxUnavailable",
        # The pod's; the container's.
        "securityContext": "runAsNonRoot runAsUser runAsGroup seccompProfile"
        " allowPrivilegeEscalation privileged readOnlyRootFilesystem capabilities",
        "seccompProfile": "type",
        "capabilities": "drop",
        "topologySpreadConstraints": "maxSkew topologyKey whenUnsatisfiable labelSelector",
        "labelSelector": "matchLabels",
        "affinity": "podAntiAffinity",
        "podAntiAffinity": "preferredDuringSchedulingIgnoredDuringExecution",
        "preferredDuringSchedulingIgnoredDuringExecution": "weight podAffinityTerm",
        "podAffinityTerm": "topologyKey labelSelector",
        "containers": "name image imagePullPolicy env ports startupProbe readinessProbe"
        " livenessProbe resources securityContext volumeMounts",
        "env": "name value valueFrom",
        "valueFrom": "resourceFieldRef",
        "resourceFieldRef": "containerName resource divisor",
        "ports": "name containerPort protocol",
        "startupProbe": "httpGet periodSeconds timeoutSeconds failureThreshold",
        "readinessProbe": "httpGet periodSeconds timeoutSeconds failureThreshold",
        "livenessProbe": "httpGet periodSeconds timeoutSeconds failureThreshold",
        "httpGet": "path port",
        "resources": "requests limits",
        "requests": "cpu memory ephemeral-storage",
        "limits": "cpu memory ephemeral-storage",
        "volumeMounts": "name mountPath",
        "volumes": "name emptyDir",
        "emptyDir": "sizeLimit",
    },
}
# Their keys are ours to choose.
FREE = {"labels", "annotations", "matchLabels"}


def unknown(kind: str, value: object, within: str = "") -> Iterator[str]:
    """Yield the fields of an object that the table does not have where they stand."""
    if isinstance(value, list):
        for one in value:
            yield from unknown(kind, one, within)
    elif isinstance(value, dict) and within not in FREE:
        for name, inner in value.items():
            if name not in FIELDS[kind].get(within, "").split():
                yield f"{within}.{name}"
            yield from unknown(kind, inner, name)
