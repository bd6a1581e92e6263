from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.errors import StartupError
from app.settings import PREFIX, Settings, load_settings
from app.settings_page import settings_page

ROOT = Path(__file__).parents[1]

CONTRACT = (
    "MODEL MODEL_STORE BACKEND DEVICE HOST PORT WORKERS MAX_BATCH_SIZE MAX_WAIT_MS "
    "QUEUE_BUDGET_MS REQUEST_TIMEOUT_MS OVERLOAD_STATUS BODY_LIMIT_BYTES MAX_PIXELS DECODE "
    "EXIF_ORIENTATION THREADS STALL_SECONDS DRAIN_DELAY_S DRAIN_TIMEOUT_S API_KEYS_FILE "
    "METRICS_PORT TRITON_URL TRITON_MODEL LOG_LEVEL LOG_FORMAT"
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)


def refusal(flags: dict[str, str] | None = None) -> str:
    with pytest.raises(StartupError) as caught:
        load_settings(flags)
    return str(caught.value)


@pytest.mark.parametrize("name", CONTRACT.split())
def test_every_setting_of_the_contract_exists(name: str) -> None:
    assert name.lower() in Settings.model_fields


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_described_in_a_sentence(name: str) -> None:
    description = Settings.model_fields[name].description

    assert description is not None
    assert description.endswith(".")
    assert "|" not in description, "it would break the table"


def test_defaults_are_those_of_the_contract() -> None:
    settings = load_settings()

    assert (settings.port, settings.backend, settings.device) == (8000, "onnxruntime", "auto")
    assert (settings.max_wait_ms, settings.overload_status) == (0, 503)
    assert (settings.decode, settings.exif_orientation) == ("scaled", True)
    assert settings.model == "caformer_digits"


VALUES: list[tuple[str, str, Any]] = [
    ("model", "some/folder", "some/folder"),
    ("model_store", "/srv/models", Path("/srv/models")),
    ("backend", "torch", "torch"),
    ("device", "cpu", "cpu"),
    ("port", "0", 0),
    ("max_wait_ms", "2.5", 2.5),
    ("overload_status", "429", 429),
    ("overload_status", "503", 503),
    ("body_limit_bytes", "1000", 1000),
    ("decode", "exact", "exact"),
    ("exif_orientation", "false", False),
    ("exif_orientation", "0", False),
    ("exif_orientation", "on", True),
    ("api_keys_file", "/run/keys", Path("/run/keys")),
    ("metrics_port", "9090", 9090),
    ("log_level", "debug", "debug"),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_a_variable_sets_a_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object
) -> None:
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", text)

    assert getattr(load_settings(), name) == value


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METASERVE_PORT", "")
    monkeypatch.setenv("METASERVE_API_KEYS_FILE", "")

    settings = load_settings()
    assert (settings.port, settings.api_keys_file) == (8000, None)


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_a_flag_goes_before_a_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object
) -> None:
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", "?")  # never looked at

    assert getattr(load_settings({name: text}), name) == value


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("METASERVE_MODLE", "METASERVE_MODEL"),
        ("METASERVE_MAX_BATCHSIZE", "METASERVE_MAX_BATCH_SIZE"),
        ("METASERVE_LOGLEVEL", "METASERVE_LOG_LEVEL"),
        ("METASERVE_PORTS", "METASERVE_PORT"),
        ("metaserve_prot", "METASERVE_PORT"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, meant: str
) -> None:
    monkeypatch.setenv(variable, "1")

    message = refusal()

    assert message == f"there is no setting {variable}; did you mean {meant}?"


def test_an_unknown_variable_like_no_other_is_refused_with_the_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("METASERVE_XYZZY_42", "1")

    assert refusal() == "there is no setting METASERVE_XYZZY_42; docs/settings.md lists them all"


def test_variables_of_others_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METASERVER_PORT", "1")
    monkeypatch.setenv("PORT", "1")

    assert load_settings().port == 8000


BAD = [
    ("port", "abc"),
    ("port", "-1"),
    ("port", "65536"),
    ("port", "80.5"),
    ("workers", "0"),
    ("backend", "tensorflow"),
    ("device", "CUDA:0"),
    ("max_batch_size", "0"),
    ("max_wait_ms", "-0.1"),
    ("max_wait_ms", "nan"),
    ("queue_budget_ms", "0"),
    ("request_timeout_ms", "inf"),
    ("drain_timeout_s", "inf"),
    ("overload_status", "500"),
    ("overload_status", "abc"),
    ("body_limit_bytes", "0"),
    ("body_limit_bytes", "32MB"),
    ("max_pixels", "0"),
    ("decode", "best"),
    ("exif_orientation", "perhaps"),
    ("metrics_port", "x"),
    ("log_level", "LOUD"),
]


@pytest.mark.parametrize(("name", "text"), BAD)
def test_a_bad_variable_is_one_sentence_that_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    variable = f"{PREFIX}{name.upper()}"
    monkeypatch.setenv(variable, text)

    message = refusal()

    shown = text if text == "500" else repr(text)
    assert message.startswith(f"{variable}={shown} cannot be used: ")
    assert "\n" not in message


@pytest.mark.parametrize(("name", "text"), BAD)
def test_a_bad_flag_is_one_sentence_that_names_it(name: str, text: str) -> None:
    message = refusal({name: text})

    shown = text if text == "500" else repr(text)
    assert message.startswith(f"--{name.replace('_', '-')}={shown} cannot be used: ")
    assert "\n" not in message


def test_the_flag_is_blamed_and_not_the_variable_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("METASERVE_PORT", "8001")

    assert refusal({"port": "abc"}).startswith("--port='abc'")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().port = 1


def test_the_command_says_it_in_one_line_and_exits_with_2() -> None:
    environment = os.environ | {"METASERVE_MODLE": "x"}

    done = subprocess.run(
        [sys.executable, "-c", "from app.cli import main; raise SystemExit(main(['serve']))"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    expected = "metaserve: there is no setting METASERVE_MODLE; did you mean METASERVE_MODEL?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_the_page_in_docs_is_what_the_class_says() -> None:
    page = (ROOT / "docs" / "settings.md").read_text("utf-8")

    assert page == settings_page(), "run `make docs`"


def test_the_page_lists_every_setting_with_its_bounds() -> None:
    rows = dict(re.findall(r"^\| `(METASERVE_\w+)` \| (.+) \|$", settings_page(), re.MULTILINE))

    assert set(rows) == {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert all(row.count(" | ") == 3 for row in rows.values())
    assert rows["METASERVE_PORT"].startswith("`--port` | `8000` | whole number ≥ 0, ≤ 65535 | ")
    assert rows["METASERVE_QUEUE_BUDGET_MS"].split(" | ")[1:3] == ["`5000`", "number > 0"]
    assert rows["METASERVE_METRICS_PORT"].split(" | ")[1:3] == [
        "none",
        "whole number ≥ 0, ≤ 65535",
    ]
    assert rows["METASERVE_OVERLOAD_STATUS"].split(" | ")[1:3] == ["`503`", "`503`, `429`"]
    assert rows["METASERVE_EXIF_ORIENTATION"].split(" | ")[1:3] == ["`true`", "`true`, `false`"]
