from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from app.http import schemas
from app.http.errors import STATUSES
from tests.http.wire import grey, parts, text
from tests.servers import RunningService, running_service


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with running_service() as running:
        yield running


@pytest.fixture(scope="module")
def openapi(service: RunningService) -> dict[str, Any]:
    reply = service.client.get("/openapi.json")
    assert reply.status_code == 200
    content: dict[str, Any] = reply.json()
    return content


def test_the_root_leads_to_the_documentation(service: RunningService) -> None:
    reply = service.client.get("/", follow_redirects=True)

    assert reply.status_code == 200
    assert reply.url.path == "/docs"


def test_the_documentation_works_without_a_network(service: RunningService) -> None:
    page = service.client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")

    named = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)["']""", page.text)

    assert len(named) >= 4  # a style, an icon, a script, the description
    for url in named:
        assert url.startswith("/"), f"{url} is not ours"
        assert not url.startswith("//"), f"{url} is not ours"
        reply = service.client.get(url)
        assert reply.status_code == 200, url
        assert reply.content
    assert "://" not in page.text


def test_all_routes_are_documented(openapi: dict[str, Any]) -> None:
    assert {path: set(methods) for path, methods in openapi["paths"].items()} == {
        "/classify": {"post"},
        "/embed": {"post"},
        "/models": {"get"},
        "/livez": {"get"},
        "/readyz": {"get"},
        "/startupz": {"get"},
        "/metrics": {"get"},
    }


@pytest.mark.parametrize("path", ["/classify", "/embed"])
def test_the_three_forms_of_input_are_documented(openapi: dict[str, Any], path: str) -> None:
    body = openapi["paths"][path]["post"]["requestBody"]

    assert body["required"] is True
    assert set(body["content"]) == {"image/*", "multipart/form-data", "application/json"}
    parts_of_form = body["content"]["multipart/form-data"]["schema"]
    assert parts_of_form["properties"]["image"]["type"] == "array"
    forms = body["content"]["application/json"]["schema"]["oneOf"]
    assert [list(form["properties"]) for form in forms] == [["image"], ["images"]]


@pytest.mark.parametrize("path", ["/classify", "/embed"])
def test_every_error_of_an_image_route_is_documented(openapi: dict[str, Any], path: str) -> None:
    responses = openapi["paths"][path]["post"]["responses"]
    known = {error.code: status for error, status in STATUSES.items()}
    elsewhere = {"not_found", "method_not_allowed"}

    assert set(responses) == {"200"} | {
        str(status) for code, status in known.items() if code not in elsewhere
    }
    for code, status in known.items():
        if code not in elsewhere:
            assert f"`{code}`" in responses[str(status)]["description"]
    for status_text, response in responses.items():
        if status_text != "200":
            schema = response["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Error"}


def test_what_is_referred_to_is_there(openapi: dict[str, Any]) -> None:
    def references(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    found = set(references(openapi))

    assert found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in openapi["components"]["schemas"]


BROKEN = b"no image"


@pytest.mark.parametrize(
    ("request_", "schema"),
    [
        (("POST", "/classify", {"content": grey(0)}), schemas.ClassifyOne),
        (("POST", "/classify", {"files": parts(grey(0), BROKEN)}), schemas.ClassifySeveral),
        (("POST", "/classify", {"json": {"images": [text(grey(0))]}}), schemas.ClassifySeveral),
        (("POST", "/embed", {"content": grey(0)}), schemas.EmbedOne),
        (("POST", "/embed?encoding=base64&normalize=1", {"content": grey(0)}), schemas.EmbedOne),
        (("POST", "/embed", {"files": parts(BROKEN, grey(0))}), schemas.EmbedSeveral),
        (("GET", "/models", {}), schemas.ModelInfo),
        (("GET", "/livez", {}), schemas.Health),
        (("GET", "/readyz", {}), schemas.Health),
        (("GET", "/startupz", {}), schemas.Health),
        (("POST", "/classify", {"content": BROKEN}), schemas.Error),
        (("POST", "/classify?top_k=0", {"content": BROKEN}), schemas.Error),
        (("GET", "/nope", {}), schemas.Error),
        (("GET", "/classify", {}), schemas.Error),
    ],
)
def test_replies_are_what_their_schema_says_no_more_and_no_less(
    service: RunningService,
    request_: tuple[str, str, dict[str, Any]],
    schema: type[BaseModel],
) -> None:
    method, path, options = request_
    reply: httpx.Response = service.client.request(method, path, **options)

    validated = schema.model_validate_json(reply.content, strict=True)

    assert validated.model_dump() == reply.json()
