"""A real Prometheus with the project's own configuration, on a free port."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.monitoring.files import PROMETHEUS, read_yaml
from tests.required import missing
from tests.servers import WAIT_SECONDS, wait_until

SCRAPE_INTERVAL = "500ms"


def program(name: str) -> str:
    """Return the path of a program of Debian's package `prometheus`; without it the test skips."""
    path = shutil.which(name)
    if path is None:
        missing(f"there is no {name}; it is in the package `prometheus` of Debian and Ubuntu")
    return path


@dataclass(frozen=True)
class Prometheus:
    """One that runs; `client` asks its HTTP API."""

    url: str
    client: httpx.Client

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of each sample that an expression has now."""
        reply = self.client.get("/api/v1/query", params={"query": expression})
        assert reply.status_code == 200, f"{expression}: {reply.text}"
        result = reply.json()["data"]["result"]
        return [(one["metric"], float(one["value"][1])) for one in result]

    def label_values(self, series: str, label: str) -> list[str]:
        """Return the values that a label has among the series that a selector matches."""
        reply = self.client.get(f"/api/v1/label/{label}/values", params={"match[]": series})
        assert reply.status_code == 200, f"{series}: {reply.text}"
        values: list[str] = reply.json()["data"]
        return values

    def rules(self) -> list[dict[str, Any]]:
        """Return every rule with its health."""
        groups = self.client.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]


@contextmanager
def running_prometheus(folder: Path, targets: Sequence[str]) -> Iterator[Prometheus]:
    """Run one with the project's configuration; targets, intervals and paths are the test's.

    Args:
        folder: for its configuration and data.
        targets: `host:port` of each service.
    """
    config = read_yaml(PROMETHEUS / "prometheus.yml")
    config["global"] = dict.fromkeys(config["global"], SCRAPE_INTERVAL)
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": list(targets)}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    process = subprocess.Popen(
        [
            program("prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    lines: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
    reader.start()
    try:

        def said(pattern: str) -> re.Match[str] | None:
            return re.search(pattern, "".join(lines))

        def is_up() -> bool:
            assert process.poll() is None, f"Prometheus ended:\n{''.join(lines)}"
            return said("ready to receive web requests") is not None

        wait_until(is_up, "Prometheus is ready")
        address = said(r"address=(127\.0\.0\.1:[1-9]\d*)")
        assert address is not None, "".join(lines)
        url = f"http://{address[1]}"
        with httpx.Client(base_url=url, timeout=WAIT_SECONDS, trust_env=False) as client:
            yield Prometheus(url, client)
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)
        reader.join(WAIT_SECONDS)
        process.stderr.close()
