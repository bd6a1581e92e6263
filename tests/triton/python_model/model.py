"""Stands in for Triton's ONNX Runtime backend: runs the `model.onnx` beside it.

Loaded by the Python backend of the test server, in that server's own virtual environment.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton

PATIENCE_SECONDS = 60


class TritonPythonModel:
    """The name and methods that the Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        parameters = json.loads(args["model_config"])["parameters"]
        self.gate = parameters.get("gate", {}).get("string_value")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests with one run, as a batching backend does."""
        batches = [triton.get_input_tensor_by_name(one, "images").as_numpy() for one in requests]
        self.wait_at_gate()
        logits, embedding = self.session.run(
            ["logits", "embedding"], {"images": np.concatenate(batches)}
        )
        responses, start = [], 0
        for batch in batches:
            rows = slice(start, start + len(batch))
            start += len(batch)
            responses.append(
                triton.InferenceResponse(
                    [
                        triton.Tensor("logits", logits[rows]),
                        triton.Tensor("embedding", embedding[rows]),
                    ]
                )
            )
        return responses

    def wait_at_gate(self) -> None:
        """Hold a batch while the gate's file is missing; another file tells that one waits."""
        if self.gate is None:
            return
        waited_until = time.monotonic() + PATIENCE_SECONDS
        Path(f"{self.gate}.waiting").touch()
        while not os.path.exists(self.gate):
            if time.monotonic() > waited_until:
                raise TimeoutError(f"{self.gate} stayed away for {PATIENCE_SECONDS} s")
            time.sleep(0.002)
