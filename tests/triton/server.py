"""A real tritonserver: the binary in the nvidia-pytriton wheel, on a repository that we wrote.

It has the Python backend and no other, so `python_model/model.py` stands in for the ONNX Runtime
backend; everything else in the repository is as `export.triton` writes it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from export.triton import CONFIG, VERSION, write_repository
from models.package import Package, open_package
from tests.required import missing
from tests.servers import EMBEDDED, wait_until
from tests.triton.place import VENV

MODEL_SCRIPT = Path(__file__).parent / "python_model" / "model.py"
START_SECONDS = 60.0


@dataclass(frozen=True)
class Installation:
    """What the wheel brought, and what it needs around it."""

    binary: Path
    backend: Path
    stub: Path
    environment: dict[str, str]


@cache
def installation() -> Installation:
    """Find the server; a test that needs it skips, or fails, where it is not installed."""
    python = VENV / "bin" / "python"
    if not python.exists():
        missing(f"{VENV} holds no Triton server; `make .venv-triton/.ready` installs it")
    asked = (
        "import sys, sysconfig as s; print(s.get_config_var('LIBDIR')); "
        "print(s.get_path('purelib')); print('%d.%d' % sys.version_info[:2])"
    )
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True, timeout=60)
    library_folder, packages, version = done.stdout.split()
    server = Path(packages) / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    binary = server / "bin" / "tritonserver"
    for path in (binary, stub):
        if not path.exists():
            missing(f"{path} is not there; `make .venv-triton/.ready` installs nvidia-pytriton")
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # The stub must find the interpreter's own libpython before the wheel's older one.
    libraries = f"{library_folder}:{Path(packages) / 'nvidia_pytriton.libs'}"
    return Installation(
        binary,
        server / "backends" / "python",
        stub,
        inherited
        | {"LD_LIBRARY_PATH": libraries, "PATH": f"{VENV / 'bin'}:{inherited.get('PATH', '')}"},
    )


@dataclass
class Repository:
    """A model repository of packages, each served by the Python backend.

    Attributes:
        path: its folder.
    """

    path: Path

    def add(
        self,
        name: str,
        package: Package | None = None,
        *,
        max_batch_size: int = 8,
        max_queue_size: int | None = None,
        gate: Path | None = None,
    ) -> Path:
        """Write a package as a model, by our export; returns its folder.

        Args:
            name: of the model.
            package: the embedded one when None.
            max_batch_size: as of `write_repository`.
            max_queue_size: another than the export's.
            gate: batches wait until this file exists.
        """
        model = write_repository(
            package or open_package(EMBEDDED),
            self.path,
            name=name,
            max_batch_size=max_batch_size,
            device="cpu",
        )
        config = text_format.Parse((model / CONFIG).read_text(), ModelConfig())
        config.backend = "python"
        config.default_model_filename = "model.py"
        if max_queue_size is not None:
            config.dynamic_batching.default_queue_policy.max_queue_size = max_queue_size
        if gate is not None:
            config.parameters["gate"].string_value = str(gate)
            del config.model_warmup[:]  # it would wait at the gate
        (model / CONFIG).write_text(text_format.MessageToString(config))
        shutil.copyfile(MODEL_SCRIPT, model / VERSION / "model.py")
        return model


@dataclass
class TritonServer:
    """A server process and its address.

    Attributes:
        folder: for backends and the log.
        repository: what it serves.
        port: of gRPC, on 127.0.0.1; stays the same over restarts.
    """

    folder: Path
    repository: Repository
    port: int = field(default_factory=lambda: free_port())
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Everything it has said so far."""
        return (self.folder / "triton.log").read_text(errors="replace")

    def start(self) -> None:
        """Start it and wait until server and models are ready."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start it."""
        found = installation()
        backend = self.folder / "backends" / "python"
        if not backend.exists():
            shutil.copytree(found.backend, backend, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy2(found.stub, backend)
        command = [
            str(found.binary),
            f"--model-repository={self.repository.path}",
            f"--backend-directory={backend.parent}",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self.port}",
            "--allow-http=false",
            "--allow-metrics=false",
            "--disable-auto-complete-config",
            "--model-control-mode=explicit",
            "--load-model=*",
            "--exit-on-error=false",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
        ]
        with (self.folder / "triton.log").open("ab") as output:
            # A session of its own: the stubs that it starts are signalled with it.
            self._process = subprocess.Popen(
                command,
                env=found.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Return once server and models are ready."""
        with InferenceServerClient(self.url) as client:

            def is_ready() -> bool:
                assert self._process is not None
                assert self._process.poll() is None, f"Triton ended:\n{self.log}"
                try:
                    return bool(client.is_server_ready(client_timeout=1.0))
                except InferenceServerException:
                    time.sleep(0.02)
                    return False

            wait_until(is_ready, f"Triton is ready:\n{self.log[-3000:]}", seconds=START_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and the processes it started."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def terminate(self) -> None:
        """Let it end as an orchestrator does: it finishes what runs and refuses the rest."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(START_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End it without a chance to say goodbye; nothing of it is left afterwards."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self._process.wait(START_SECONDS)
        self._process = None
        for left in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
            left.unlink(missing_ok=True)

    def unload(self, model: str) -> None:
        """Take a model out of service and wait until it is gone."""
        with InferenceServerClient(self.url) as client:
            client.unload_model(model, client_timeout=START_SECONDS)
            wait_until(lambda: not client.is_model_ready(model), f"{model} is unloaded")

    def load(self, model: str) -> None:
        """Take a model into service."""
        with InferenceServerClient(self.url) as client:
            client.load_model(model, client_timeout=START_SECONDS)

    @property
    def _shm_prefix(self) -> str:
        return f"metaserve-test-{self.port}-"


@contextmanager
def triton_server(folder: Path, repository: Repository) -> Iterator[TritonServer]:
    """Run a server on a free port; kill it at the end."""
    server = TritonServer(folder, repository)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port
