"""The copy of the base that `podman kube play` runs is the base: what differs is listed here."""

from __future__ import annotations

import copy

import yaml

from tests.k8s.rendered import Object, objects, render

FOR_PODMAN = {
    "image",
    "imagePullPolicy",
    "ports",
    "livenessProbe",
    "readinessProbe",
    "startupProbe",
}


def deployment_of(rendered: list[Object]) -> Object:
    (found,) = (one for one in rendered if one["kind"] == "Deployment")
    return copy.deepcopy(found)


def test_podman_plays_the_base() -> None:
    played = list(yaml.safe_load_all(render("tests/k8s/podman")))
    ours, theirs = deployment_of(list(objects("base"))), deployment_of(played)
    (container,) = theirs["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("localhost/metaserve:")
    assert container["imagePullPolicy"] == "Never"
    # Without a path the probe asks /readyz: who is not ready would be started again.
    assert container["livenessProbe"]["exec"]["command"] == ["python", "-m", "app.probe", "/livez"]
    assert {one["containerPort"]: one["hostPort"] for one in container["ports"]} == {
        8000: 28080,
        9000: 29090,
    }
    for one in (ours, theirs):
        del one["spec"]["replicas"]
        for name in FOR_PODMAN:
            one["spec"]["template"]["spec"]["containers"][0].pop(name, None)
    assert theirs == ours
    assert [one for one in played if one["kind"] != "Deployment"] == [
        one for one in objects("base") if one["kind"] != "Deployment"
    ]
