"""The plan of the rooms, kept by walking the import statements."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Who may import whom: room -> prefixes of modules of ours. A room may always import itself.
PLAN = {
    "models": set[str](),
    "export": {"models"},
    "app.errors": set[str](),
    "app.types": set[str](),
    "app.cpu": set[str](),
    "app.signals": set[str](),
    "app.ending": set[str](),
    "app.garbage": set[str](),
    "app.probe": set[str](),
    "app.logs": set[str](),
    "app.settings": {"app.errors"},
    "app.settings_page": {"app.settings"},
    "app.metrics": {"app.errors", "app.engine.base"},
    "app.metrics_page": {
        "app.metrics",
        "app.processes.metrics_whole",
        "app.processes.roster",
    },
    "app.backends": {"models", "app.errors", "app.types", "app.settings"},
    "app.images": {"models.package", "app.errors", "app.types"},
    "app.engine": {
        "models.buckets",
        "models.package",
        "models.golden",
        "models.tolerances",
        "app.errors",
        "app.types",
        "app.backends.base",
    },
    "app.engine.shared": {
        "app.errors",
        "app.types",
        "app.backends.base",
        "app.engine.admission",
        "app.engine.base",
        "app.engine.core",
        "app.engine.window",
    },
    "app.http": {
        "models.package",
        "app.errors",
        "app.types",
        "app.settings",
        "app.metrics",
        "app.images",
        "app.engine.base",
        "app.engine.shared.board",
        "app.backends.base",
    },
    "app.server": {"app.http.protocol", "app.http.proxied", "app.http.state", "app.listener"},
    "app.listener": {"app.errors", "app.settings"},
    "app.processes": set[str](),
    "app.processes.acceptor": {"app.listener"},
    "app.processes.worker_server": {
        "app.processes.acceptor",
        "app.engine.base",
        "app.engine.shared.board",
        "app.http.state",
        "app.metrics",
        "app.processes.roster",
        "app.processes.seat",
        "app.server",
    },
    "app.processes.metrics_port": {"app.errors", "app.settings"},
    "app.processes.metrics_whole": {
        "app.engine.base",
        "app.engine.shared.board",
        "app.metrics",
        "app.processes.roster",
    },
    "app.processes.metric_files": {"app.errors"},
    "app.processes.shape": {"models.gpu", "app.cpu", "app.settings"},
    "app.processes.seat": {"models.package"},
    "app.processes.roster": {"app.engine.shared.board"},
    "app.processes.runtime_folder": {"app.errors"},
    "app.processes.child": {"app.processes.seat"},
    "app.processes.supervisor": {
        "models.package",
        "app.processes.child",
        "app.engine.shared.board",
        "app.errors",
        "app.first_use",
        "app.listener",
        "app.logs",
        "app.processes.metrics_port",
        "app.processes.metrics_whole",
        "app.processes.roster",
        "app.processes.runtime_folder",
        "app.processes.seat",
        "app.settings",
        "app.processes.shape",
    },
    "app.serve": {
        "app.errors",
        "app.logs",
        "app.main",
        "app.settings",
        "app.signals",
        "app.processes.shape",
        "app.processes.supervisor",
    },
    "app.processes.run_child": {
        "models.package",
        "app.ending",
        "app.errors",
        "app.logs",
        "app.processes.seat",
        "app.settings",
    },
    "app.processes.worker": {
        "models.package",
        "app.engine.shared.wire",
        "app.engine.shared.board",
        "app.engine.shelf",
        "app.engine.shared.remote",
        "app.garbage",
        "app.http.app",
        "app.http.state",
        "app.main",
        "app.metrics",
        "app.processes.metric_files",
        "app.processes.metrics_whole",
        "app.processes.roster",
        "app.processes.run_child",
        "app.processes.seat",
        "app.processes.worker_server",
        "app.settings",
    },
    "app.processes.engine_process": {
        "models.package",
        "app.assemble",
        "app.engine.shared.board",
        "app.engine.shelf",
        "app.engine.shared.host",
        "app.garbage",
        "app.metrics",
        "app.processes.metric_files",
        "app.processes.run_child",
        "app.processes.seat",
        "app.settings",
    },
    "app.bench": {"app.errors"},
    "app.tune": {"app.bench", "app.cpu", "app.errors"},
    "app.assemble": {
        "models.package",
        "app.backends",
        "app.cpu",
        "app.engine",
        "app.settings",
    },
    "app.first_use": {
        "app.signals",
        "models.cache",
        "models.package",
        "models.variants",
        "app.errors",
        "app.settings",
    },
    "app.offline": {"models.package", "app"},
    "app.main": {"models.package", "app"},
    "app.__main__": {"app.cli", "app.signals"},
    "app.cli": {
        "models.package",
        "models.variants",
        "export.arguments",
        "export.cli",
        "export.verify_cli",
        "export.seams",
        "app",
    },
}

# What each heavy library is imported by; nothing else may, not even inside a function.
HEAVY = {
    "torch": {"models.layers", "models.metaformer", "models.checkpoints", "models.build",
              "models.folding", "models.serving", "models.precision", "export.onnx",
              "export.verify", "export.calibration", "export.graph_proof", "app.backends.pytorch",
              "app.backends.pytorch_buckets", "app.backends.pytorch_compile",
              "app.backends.pytorch_cuda", "app.backends.pytorch_paths"},
    "safetensors": {"models.checkpoints", "app.backends.pytorch"},
    "onnx": {"export.onnx", "export.graph_runner"},
    "huggingface_hub": {"export.hub"},
    "onnxruntime": {"models.onnx_runtime"},
    "tensorrt": {"models.tensorrt"},
    "tensorrt_rtx": {"models.tensorrt"},
    "tritonclient": {"app.backends.triton_connection", "export.triton"},
    "grpc": set[str](),
    "cykooz_resizer": {"app.images.fast"},
    "matplotlib": {"app.tune.report"},
    "timm": set[str](),
    "torchvision": set[str](),
    "sklearn": set[str](),
}  # fmt: skip


def modules() -> dict[str, set[str]]:
    """Return every module of ours -> the modules it names in import statements."""
    found = {}
    for package in ("app", "export", "models"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = imports_of(path)
    return found


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


MODULES = modules()


def room_of(module: str) -> str:
    rooms = [room for room in PLAN if within(module, room)]
    assert rooms, f"{module} is in no room of the plan"
    return max(rooms, key=len)


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ("app",)])
def test_imports_go_the_way_of_the_plan(module: str) -> None:
    room = room_of(module)
    allowed = PLAN[room] | {room}
    ours = {name for name in MODULES[module] if name.split(".")[0] in ("app", "export", "models")}
    strays = {name for name in ours if not any(within(name, prefix) for prefix in allowed)}
    assert not strays, f"{module} (room {room}) may not import {sorted(strays)}"


@pytest.mark.parametrize("library", HEAVY)
def test_heavy_libraries_are_imported_where_they_belong_and_nowhere_else(library: str) -> None:
    importers = {
        module for module, names in MODULES.items() if any(within(name, library) for name in names)
    }
    assert importers == HEAVY[library]


def test_the_plan_would_see_a_stray_import(tmp_path: Path) -> None:
    stray = tmp_path / "stray.py"
    stray.write_text("def f():\n    from export.onnx import OPSET\n    import torch\n")
    assert imports_of(stray) == {"export.onnx.OPSET", "torch"}


@pytest.mark.parametrize(
    ("modules", "libraries"),
    [
        ("app.cli app.serve app.processes.supervisor", "uvicorn torch onnxruntime tensorrt"),
        ("app.processes.engine_process", "uvicorn torch"),
    ],
)
def test_no_process_loads_what_another_needs(modules: str, libraries: str) -> None:
    heavy = {"fastapi", "starlette", *libraries.split()}
    script = f"import sys, {', '.join(modules.split())}; print({heavy!r} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "set()\n", done.stderr


def test_serving_the_embedded_model_imports_no_torch_and_no_exporter() -> None:
    script = """
import sys
heavy = "torch onnx onnxscript safetensors huggingface_hub timm torchvision sklearn"
for name in (heavy + " tritonclient grpc").split():
    sys.modules[name] = None  # any import of it fails from here on
from app.cli import main
from app.main import build_state, load_model
from app.http.app import create_app
from app.settings import Settings
state = build_state(Settings())
create_app(state)
state.loaded = load_model(state)
print(state.loaded.backend.runtime)
code = main(["classify", sys.argv[1]])
sys.exit(code)
"""
    image = ROOT / "examples/images/scan_three.png"
    done = subprocess.run(
        [sys.executable, "-c", script, str(image)], cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"onnxruntime")
    assert b'"label":"three"' in done.stdout
