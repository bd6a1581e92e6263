"""`metaserve export` in a process of its own: what ends it leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.servers import EMBEDDED


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_while_tracing_ends_an_export_and_leaves_nothing(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    command = Path(sysconfig.get_path("scripts")) / "metaserve"
    arguments = ("--checkpoint", EMBEDDED / "weights.safetensors", "--out", tmp_path / "out")
    with subprocess.Popen(
        [command, "export", "caformer_digits", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell in the background leaves SIGINT ignored, which is to stay so; here it is not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        said = ""
        while "tracing" not in said:
            read = process.stderr.read(1)
            assert read, f"it ended before it traced: {said}"
            said += read
        process.send_signal(sent)
        said += process.communicate(timeout=60)[1]
        assert process.returncode == code, said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
