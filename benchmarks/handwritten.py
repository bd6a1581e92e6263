"""An image service as one would write it in an afternoon: what ours is compared with.

FastAPI, a plain `def` handler in its thread pool, Pillow, NumPy, one `session.run` for each image,
with the options that the libraries come with. It is treated kindly: the body is the bare image, no
multipart form; the graph is the same network, exported from normalised floats.
"""

from __future__ import annotations

import io
import json
import os
from typing import Annotated, Any

import numpy as np
import onnxruntime
from fastapi import Body, FastAPI
from PIL import Image

app = FastAPI()
session = onnxruntime.InferenceSession(os.environ["HANDWRITTEN_MODEL"])
spec: dict[str, Any] = json.loads(os.environ["HANDWRITTEN_INPUT"])
mean = np.array(spec["mean"], np.float32)
std = np.array(spec["std"], np.float32)


@app.post("/classify")
def classify(
    image: Annotated[bytes, Body(media_type="application/octet-stream")],
) -> dict[str, list[dict[str, float]]]:
    pixels = prepare(Image.open(io.BytesIO(image)).convert("RGB"))
    (logits,) = session.run(None, {"images": pixels})
    exponentials = np.exp(logits[0] - logits[0].max())
    probabilities = exponentials / exponentials.sum()
    best = np.argsort(probabilities)[::-1][:5]
    return {
        "predictions": [
            {"index": int(index), "probability": float(probabilities[index])} for index in best
        ]
    }


@app.get("/readyz")
def ready() -> dict[str, bool]:
    return {"ready": True}


def prepare(image: Image.Image) -> np.ndarray[Any, Any]:
    size = spec["size"]
    short = int(size / spec["crop_pct"])
    factor = short / min(image.size)
    width, height = (max(short, round(side * factor)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    floats = (np.asarray(image, np.float32) / 255 - mean) / std
    return np.ascontiguousarray(floats.transpose(2, 0, 1)[None])
