"""What belongs to weights beside the weights: configuration, labels, WordNet ids, origin."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save, save_file

from app.cli import main
from app.http.schemas import ClassifyOne
from export.source import SourceError, Wanted, find_source
from export.timm_config import read_timm_config
from models.classes import FOLDER, NOTICE, SHIPPED_CLASSES, read_names, shipped_names
from models.metaformer import MetaFormer
from models.package import MANIFEST, PackageError, hash_files, open_package
from models.variants import CHECKPOINTS, find_variant
from tests.export.hub_server import COMMIT, running_hub
from tests.reference import randomise, save_as_timm, timm_model
from tests.servers import running_service

DIGITS, _ = find_variant("caformer_digits")
IMAGE = Path(__file__).parents[2] / "examples/images/scan_three.png"
IDS = [f"n0000000{index}" for index in range(3)]
CONFIG: dict[str, Any] = {
    "architecture": "caformer_digits",
    "num_classes": 3,
    "label_names": IDS,
    "label_descriptions": {IDS[0]: "zero", IDS[1]: "one, single"},
    "pretrained_cfg": {
        "num_classes": 1000,
        "input_size": [3, 48, 48],
        "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    },
}


def weights(classes: int = 3) -> dict[str, Any]:
    return randomise(MetaFormer(DIGITS, classes), 3).state_dict()


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file(weights(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_a_fine_tune_on_the_hub_is_exported_and_served_as_it_was_evaluated(tmp_path: Path) -> None:
    content = save(weights())
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": content}
    out = tmp_path / "digits"
    with running_hub({"me/digits": files}) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "app", "export", "hf-hub:me/digits", "--out", str(out)],
            env=os.environ | hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    manifest = open_package(out).manifest
    assert manifest.input.model_dump() == {
        "size": 48, "crop_pct": 0.9, "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25),
    }  # fmt: skip
    assert manifest.source.model_dump() == {
        "file": "model.safetensors", "sha256": hashlib.sha256(content).hexdigest(),
        "layout": "timm", "repository": "me/digits", "commit": COMMIT,
    }  # fmt: skip
    with running_service("onnxruntime", package=out) as service:
        reply = service.client.post("/classify", content=IMAGE.read_bytes())
    validated = ClassifyOne.model_validate_json(reply.content, strict=True)
    assert validated.model_dump() == reply.json()
    predictions = sorted(reply.json()["predictions"], key=lambda one: int(one["index"]))
    named = [(one["label"], one["wordnet_id"]) for one in predictions]
    assert named == [("zero", IDS[0]), ("one, single", IDS[1]), (IDS[2], IDS[2])]
    assert [list(one) for one in predictions] == [
        ["index", "label", "probability", "wordnet_id"]
    ] * 3


def test_flags_go_before_the_configuration(checkpoint: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\n")
    out = tmp_path / "out"
    code = run(
        "export", "caformer_digits", "--checkpoint", checkpoint, "--out", out,
        "--config", write_json(tmp_path / "config.json", CONFIG),
        "--input-size", "32", "--mean", "0", "0", "0", "--labels", labels,
    )  # fmt: skip
    assert code == 0
    package = open_package(out)
    spec = package.manifest.input
    assert (spec.size, spec.crop_pct, spec.interpolation) == (32, 0.9, "bilinear")
    assert (spec.mean, spec.std) == ((0, 0, 0), (0.25, 0.25, 0.25))
    assert (package.labels, package.wordnet_ids) == (("a", "b", "c"), None)


def test_a_users_checkpoint_never_gets_guessed_labels(tmp_path: Path) -> None:
    (tmp_path / "mine.pth").touch()
    found = find_source(Wanted("caformer_s18.sail_in1k", checkpoint=tmp_path / "mine.pth"), print)
    assert (found.names, found.classes) == (None, None)


@pytest.mark.parametrize("nested", [True, False])
def test_label_names_are_read_from_either_place_of_a_config(tmp_path: Path, nested: bool) -> None:
    content: dict[str, Any] = {"label_names": ["cat", "dog"], "num_classes": 2}
    path = write_json(tmp_path / "c.json", {"pretrained_cfg": content} if nested else content)
    config = read_timm_config(path)
    assert config.names is not None
    assert (config.names.labels, config.names.wordnet_ids) == (("cat", "dog"), None)
    assert config.classes == 2
    found = find_source(Wanted("caformer_digits", checkpoint=path, labels=str(path)), print)
    assert found.names == config.names


def test_label_names_may_be_a_table_of_indices(tmp_path: Path) -> None:
    path = write_json(tmp_path / "c.json", {"label_names": {"1": "dog", "0": "cat"}})
    names = read_timm_config(path).names
    assert names is not None
    assert names.labels == ("cat", "dog")


def test_what_timm_saves_is_understood(tmp_path: Path) -> None:
    model = timm_model("caformer_s18.sail_in1k_384", classes=2)
    save_as_timm(model, str(tmp_path), {"label_names": ["cat", "dog"]}, safe_serialization=True)
    config = read_timm_config(tmp_path / "config.json")
    assert (config.architecture, config.classes) == ("caformer_s18", 2)
    assert config.names is not None
    assert config.names.labels == ("cat", "dog")
    assert config.preprocessing == {
        "size": 384, "crop_pct": 1.0, "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"pretrained_cfg": {"crop_mode": "squash"}}, "wants crop_mode 'squash'"),
        ({"pretrained_cfg": {"interpolation": "lanczos"}}, "wants interpolation 'lanczos'"),
        ({"pretrained_cfg": {"input_size": [1, 32, 32]}}, "wants 1 channels"),
        ({"pretrained_cfg": {"input_size": [3, 32, 64]}}, "wants 32x64 images"),
        ({"pretrained_cfg": {"crop_pct": 1.5}}, "crop_pct in config.json: 1.5"),
        ({"model_args": {"in_chans": 1}}, "builds the network with in_chans=1"),
        ({"model_args": {"mlp_act": "gelu"}}, "builds the network with mlp_act='gelu'"),
        ({"architecture": "caformer_s18"}, "is of caformer_s18, and caformer_digits was asked"),
        ({"num_classes": 4, "label_names": None}, "has 3 classes, and 4 are stated for it"),
        ({"label_names": ["a", "b"]}, "holds 2 labels for 3 classes"),
        ({"label_names": ["a", "b\nc", "d"]}, "holds a label with a line break"),
        ({"label_names": {"0": "a", "2": "c"}}, "leaves out classes"),
        ({"num_classes": "many"}, "num_classes: Input should be a valid integer"),
    ],
)
def test_what_cannot_be_served_as_evaluated_is_refused(
    checkpoint: Path,
    tmp_path: Path,
    change: Mapping[str, object],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_json(tmp_path / "config.json", {**CONFIG, **change})
    arguments = ("--checkpoint", checkpoint, "--config", config, "--out", tmp_path / "out")
    assert run("export", "caformer_digits", *arguments) == 2
    (sentence,) = [one for one in capsys.readouterr().err.splitlines() if "metaserve:" in one]
    assert complaint in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ({"config": "c.json"}, "--config belongs to --checkpoint FILE"),
        ({"checkpoint": "x.pth", "revision": "v1"}, "--revision belongs to a download"),
        ({"variant": "hf-hub:me/pets", "checkpoint": "x.pth"}, "hf-hub:me/pets is a download"),
        ({"checkpoint": "x.pth", "config": "no.json"}, "no.json cannot be read: No such file"),
        ({"checkpoint": "x.pth", "labels": "no.txt"}, "labels file no.txt cannot be read"),
        ({"checkpoint": "x.pth", "config": "empty.json"}, "empty.json is no config.json of timm"),
        ({"checkpoint": "x.pth", "labels": "bare.json"}, "bare.json holds no label_names"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    wanted: dict[str, Any], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.json").touch()
    Path("bare.json").write_text("{}")
    paths = {name: Path(wanted[name]) for name in ("checkpoint", "config") if name in wanted}
    with pytest.raises((SourceError, PackageError), match=complaint):
        find_source(Wanted(**({"variant": "caformer_s18"} | wanted | paths)), print)


def test_every_published_checkpoint_has_a_list_of_its_length() -> None:
    for entry in CHECKPOINTS.values():
        names = shipped_names(SHIPPED_CLASSES[entry.classes])
        assert names.wordnet_ids is not None
        assert len(names.labels) == len(set(names.wordnet_ids)) == entry.classes


def test_known_classes_stand_where_the_published_weights_have_them() -> None:
    small, large = shipped_names("imagenet-1k"), shipped_names("imagenet-21k")
    assert small.wordnet_ids is not None
    assert large.wordnet_ids is not None
    assert (small.wordnet_ids[281], small.labels[281]) == ("n02123045", "tabby, tabby cat")
    assert small.labels[134] == small.labels[517].split(",")[0] == "crane"  # why ids are given
    assert (large.wordnet_ids[0], large.labels[0]) == ("n00004475", "organism, being")
    # The teddy bear is the one class of the small list that the large one has not.
    assert set(small.wordnet_ids) - set(large.wordnet_ids) == {"n04399382"}


def test_the_lists_are_what_the_script_makes_of_timms(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.make_labels", str(tmp_path)]
    subprocess.run(command, check=True, timeout=60, cwd=Path(__file__).parents[2])
    for path in sorted(FOLDER.glob("*.tsv")):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_shipped_labels_come_with_the_notice_of_wordnet(tmp_path: Path) -> None:
    shipped_names("imagenet-1k").write(tmp_path, 1000)
    assert {path.name for path in tmp_path.iterdir()} == {"labels.txt", "wordnet_ids.txt", NOTICE}
    notice = (tmp_path / NOTICE).read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice
    assert read_names(tmp_path / "labels.txt").labels == shipped_names("imagenet-1k").labels


def test_wordnet_ids_that_are_none_stop_the_start(checkpoint: Path, tmp_path: Path) -> None:
    config = write_json(tmp_path / "config.json", CONFIG)
    out = tmp_path / "out"
    arguments = ("--checkpoint", checkpoint, "--config", config, "--out", out)
    assert run("export", "caformer_digits", *arguments) == 0
    (out / "wordnet_ids.txt").write_text("n00000000\ncat\nn00000002\n")
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"] = dict(hash_files(out))
    (out / MANIFEST).write_text(json.dumps(manifest))
    with (
        pytest.raises(PackageError, match="holds lines that are no WordNet ids"),
        running_service("onnxruntime", package=out),
    ):
        pass
