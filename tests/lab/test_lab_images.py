"""Image sets: found, split, scaled, refused; and an experiment on them from start to resumption."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from lab.test_lab_resume import Interrupter, _results
from PIL import Image

from monge.lab import VisionConfig, compare
from monge.lab.images import load_images, read_idx
from monge.lab.leak import leak_kl_of, leak_of
from monge.lab.models import build_model, moe_layers, parameter_counts


def write_idx(path: Path, array: np.ndarray) -> None:
    data = (
        struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    )
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def idx_folder(tmp_path):
    """Two classes that differ in brightness: 40 to train on, 12 held out, 12 pixels wide."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 12)):
        labels = (np.arange(count) % 2).astype(np.uint8)
        images = (draw.integers(0, 90, (count, 12, 12)) + 150 * labels[:, None, None]).astype(np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def tiny(**fields) -> VisionConfig:
    settings = {
        "routers": ("dense", "topk", "maxscore"), "seeds": 1, "layers": 1, "width": 16, "heads": 2,
        "experts": 4, "expert_width": 8, "steps": 12, "batch": 8, "warmup": 2, "log_every": 4,
        "load_every": 4, "eval_every": 6, "checkpoint_every": 4, "threads": 1,
    }  # fmt: skip
    return VisionConfig(**settings | fields)


def test_the_digits_are_all_there_once():
    images = load_images(VisionConfig())
    assert images.shape == (1, 8, 10)
    assert (len(images.train), len(images.val), images.tokens_per_example) == (1438, 359, 17)
    assert images.train.inputs_N.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.train.inputs_N.std().item() == pytest.approx(1, abs=1e-4)
    rows = {image.numpy().tobytes() for image in torch.cat([images.train_NCHW, images.val_NCHW])}
    assert len(rows) == 1797
    assert images.digest == load_images(VisionConfig()).digest


@pytest.mark.parametrize("spelling", ["{}/*.gz", "{}"])
def test_idx_files_are_paired_and_the_smaller_set_is_held_out(idx_folder, spelling):
    images = load_images(VisionConfig(images=(spelling.format(idx_folder),), image_size=8))
    assert (len(images.train), len(images.val), images.shape) == (40, 12, (1, 8, 2))
    bright_N = images.val_NCHW.mean(dim=(1, 2, 3)) > 0.4
    assert torch.equal(bright_N.long(), images.val_N)
    assert 0 <= images.train_NCHW.min() < images.train_NCHW.max() <= 1


def test_a_set_in_one_part_is_split_and_a_large_one_cut(idx_folder):
    name = (f"{idx_folder}/train*",)
    images = load_images(VisionConfig(images=name, max_images=20, max_val_images=5))
    assert (len(images.train), len(images.val), images.shape.size) == (20, 5, 12)


def test_a_folder_by_class_keeps_its_names_and_colours(tmp_path):
    for index, name in enumerate(("blue", "red")):
        (tmp_path / name).mkdir()
        for i in range(10):
            colour = (0, 0, 250) if name == "blue" else (250, 0, 0)
            Image.new("RGB", (9 + index, 9), colour).save(tmp_path / name / f"{i}.png")
    with pytest.raises(ValueError, match="2 sizes: scale them with --image-size"):
        load_images(VisionConfig(images=(str(tmp_path),)))
    images = load_images(VisionConfig(images=(str(tmp_path),), image_size=4))
    assert (images.classes, images.shape) == (["blue", "red"], (3, 4, 2))
    assert torch.equal((images.train_NCHW[:, 0].mean(dim=(1, 2)) > 0.5).long(), images.train_N)


def test_what_is_no_image_set_is_named(idx_folder, tmp_path):
    (tmp_path / "bad.gz").write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 9) + b"123"))
    cases = {
        "nothing/*.png": "match no file.*folder of images by class.*apt-get install dataset-fashion-mnist",
        str(tmp_path / "bad.gz"): "is no idx file of bytes",
        f"{idx_folder}/train-images*": "has 40 images, and 0 label files fit it",
    }
    for name, said in cases.items():
        with pytest.raises(ValueError, match=said):
            load_images(VisionConfig(images=(name,)))
    (tmp_path / "bad.gz").unlink()
    (tmp_path / "classes" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match="of a class holds no image"):
        load_images(VisionConfig(images=(str(tmp_path / "classes"),)))
    (tmp_path / "classes" / "empty" / "a.png").write_text("text")
    with pytest.raises(ValueError, match=r"a\.png is no image"):
        load_images(VisionConfig(images=(str(tmp_path / "classes"),)))
    with pytest.raises(ValueError, match="12 x 12 pixels cannot be cut into patches of 5: give --image-size"):
        load_images(VisionConfig(images=(f"{idx_folder}/*.gz",), patch=5))


@pytest.mark.parametrize("dtype", [b"\0\0\x0d\x01", b"nothing", b""])
def test_other_types_than_bytes_are_refused(tmp_path, dtype):
    (tmp_path / "x").write_bytes(dtype)
    with pytest.raises(ValueError, match="is no idx file of bytes"):
        read_idx(tmp_path / "x")


def test_a_vision_model_has_the_active_size_of_its_dense_baseline():
    config = tiny(layers=2)
    shape = load_images(config).shape
    dense, topk = (build_model(name, config, 0, shape) for name in ("dense", "topk"))
    routers = config.layers * config.experts * config.width
    biases = config.layers * (config.top_k * config.expert_width + config.width)  # of transformers' own MLP
    assert parameter_counts(topk, config)[1] - routers == parameter_counts(dense, config)[1] - biases
    assert len(moe_layers(topk)) == 2
    shared = dense.state_dict().keys() & topk.state_dict().keys()
    assert len(shared) > 10
    assert all(torch.equal(dense.state_dict()[name], topk.state_dict()[name]) for name in shared)


def test_other_images_of_a_batch_reach_the_routes_of_batch_routers_alone():
    config = VisionConfig()
    images = load_images(config)
    inputs = [batch.inputs_N for batch in images.val.batches(config)]
    for router, leaks in (("maxscore", True), ("prices", False)):
        model = build_model(router, config, 0, images.shape)
        with torch.no_grad():
            for layer in moe_layers(model).values():
                layer.router.weight.mul_(30)
        share, divergence = (f(model, inputs, halved=images.halved) for f in (leak_of, leak_kl_of))
        assert (share > 0.01 and divergence > 1e-4) if leaks else (share == 0 and divergence < 1e-9)


def test_an_experiment_on_images_learns_measures_and_resumes(idx_folder, tmp_path):
    config = tiny(
        images=(f"{idx_folder}/*.gz",),
        image_size=8,
        steps=30,
        lr=1e-2,
        routers=("dense", "maxscore", "prices"),
    )
    summary = compare(config, tmp_path / "whole")
    for row in summary:
        assert row["accuracy"] > 0.9
        assert 0.4 < row["accuracy_corrupted"] <= 1
        assert row["val_loss_by_domain"].keys() == {"0", "1"}
        assert row["tokens"] == 30 * 8 * 17
    dense, maxscore, prices = summary
    assert dense["leak"] is None
    assert maxscore["leak"] >= 0
    assert prices["leak"] == 0
    assert maxscore["specialisation"] > 0
    stored = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (stored["data"]["train_images"], stored["data"]["size"]) == (40, 8)
    assert not (tmp_path / "whole" / "tokenizer.json").exists()
    while True:
        try:
            compare(config, tmp_path / "broken", observer=Interrupter(17))
            break
        except KeyboardInterrupt:
            pass
    assert _results(tmp_path / "broken") == _results(tmp_path / "whole")
    write_idx(idx_folder / "t10k-labels-idx1-ubyte.gz", np.zeros(12, dtype=np.uint8))
    with pytest.raises(ValueError, match="the set of images has changed"):
        compare(config, tmp_path / "whole")


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'monge\[vision\]'.*--images"):
        load_images(VisionConfig())
