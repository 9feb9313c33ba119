"""Networks that leave as ONNX files, and that come in from state_dicts: the other side computes the same scores."""

import importlib.util
import json

import numpy as np
import pytest

import gemmnet

BLOCK = "res[conv{0}-bn-relu-conv{0}-bn]-relu".format
DOWN = "res[conv{0}s2-bn-relu-conv{0}-bn]-relu".format
RESNET20 = f"conv16-bn-relu-[{BLOCK(16)}]x3-{DOWN(32)}-[{BLOCK(32)}]x2-{DOWN(64)}-[{BLOCK(64)}]x2-gap-affine10"
NETWORKS = {
    "three-layer": "conv32k7-relu-pool-affine100-relu-affine10",
    "conv-bn-relu-pool": "[conv32-bn-relu-pool]x2-affine10",
    "resnet20": RESNET20,
    # every layer and option that the others lack
    "odd": "conv24k3b0-pool-bn0.6g0-gelu-conv24k5x3s2p1x0x2x1g3d1-silu-se4-avgpool3s2p1-leaky0.1-affine40-bn-relu"
    "-dropout0.5-res[affine40-relu]-affine10b0-div16",
    "gap": "conv8-pool3s2p1-bn-relu-conv8d2-res[conv10s2]-conv10-gap",
}


def trained(notation):
    """A network after a few steps, so that no parameter or statistic is what it was drawn as."""
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8), np.arange(60) % 10
    names = [f"kind {i}" for i in range(10)]
    result = gemmnet.train(
        notation, x, y, x[:10], y[:10], epochs=1, batch_size=20, learning_rate=1e-3, init="he", class_names=names,
        normalize="per-channel", progress=False, threads=1,
    )  # fmt: skip
    return result.model


def images(count=1000):
    """Noise around a level and with a contrast of its own for each, so that scores differ."""
    rng = np.random.default_rng(2)
    level, contrast = rng.uniform(60, 200, (count, 3, 1, 1)), rng.uniform(5, 60, (count, 1, 1, 1))
    return np.clip(level + contrast * rng.normal(size=(count, 3, 32, 32)), 0, 255).astype(np.uint8)


def assert_same(got, want):
    assert got.shape == want.shape
    assert want.std(axis=0).min() > 1e-3, "the scores depend on the images"
    assert np.abs(got - want).max() <= 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_onnxruntime_computes_our_scores(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, pixels = trained(NETWORKS[name]), images()
    want = model.scores(pixels)
    inputs = {False: model.normalize(pixels), True: pixels.astype(np.float32)}
    for of_pixels, x in inputs.items():
        path = tmp_path / f"{of_pixels}.onnx"
        model.save_onnx(path, pixels=of_pixels)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert_same(session.run(["scores"], {"images": x})[0], want)
        # The batch is free.
        assert_same(session.run(None, {"images": x[:7]})[0], want[:7])
        metadata = session.get_modelmeta().custom_metadata_map
        assert json.loads(metadata["class_names"]) == model.class_names
        assert gemmnet.Model(metadata["notation"], model.input_shape).notation == model.notation


def test_pixels_need_what_normalises_them(tmp_path):
    model = gemmnet.Model("conv4-relu-gap", (3, 8, 8))
    model.save_onnx(tmp_path / "network.onnx")
    with pytest.raises(gemmnet.InvalidError, match="a network alone"):
        model.save_onnx(tmp_path / "pixels.onnx", pixels=True)
    with pytest.raises(FileNotFoundError):
        model.save_onnx(tmp_path / "missing" / "network.onnx")


def test_models_are_drawn_and_saved_whole(tmp_path):
    first, again, other = (gemmnet.Model("conv4-bn-relu-gap", (3, 8, 8), init="xavier", seed=seed) for seed in (1, 1, 2))
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8))
    run = lambda model: model.session(2).run(x)
    assert (run(first) == run(again)).all() and (run(first) != run(other)).any()
    with pytest.raises(ValueError, match="hee"):
        gemmnet.Model("conv4-gap", (3, 8, 8), init="hee")
    with pytest.raises(ValueError, match="cnv4"):
        gemmnet.Model("cnv4-gap", (3, 8, 8))

    weights = {"0.weight": np.ones((2, 3, 1, 1)), "0.bias": np.arange(2)}
    kinds = {"mean": [0.5, 0.25, 0.0], "std": [0.25, 0.5, 1.0], "class_names": ["a", "b"]}
    model = gemmnet.Model.from_state_dict("conv2k1-gap", weights, (3, 2, 2), **kinds)
    model.save(tmp_path / "model.safetensors")
    read = gemmnet.Model.load(tmp_path / "model.safetensors")
    assert read.class_names == ["a", "b"]
    pixel = np.full((1, 3, 2, 2), 51, np.uint8)  # 0.2
    want = (0.2 - 0.5) / 0.25 + (0.2 - 0.25) / 0.5 + 0.2
    np.testing.assert_allclose(read.scores(pixel), [[want, want + 1]], rtol=1e-5)


def test_a_state_dict_that_does_not_fit_is_explained():
    weights = {"0.weight": np.ones((2, 3, 1, 1)), "0.bias": np.arange(2)}
    of = lambda notation, weights=weights, **more: gemmnet.Model.from_state_dict(notation, weights, (3, 2, 2), **more)
    with pytest.raises(gemmnet.DataError, match="`0.weight` of .2, 3, 1, 1., needed is one of .4, 3, 1, 1."):
        of("conv4k1-gap")
    with pytest.raises(gemmnet.DataError, match="left over here are conv1, conv2, there 0"):
        of("conv2k1-conv2-gap")
    with pytest.raises(gemmnet.InvalidError, match="no layer `first`"):
        of("conv2k1-gap", names={"first": "0"})
    with pytest.raises(gemmnet.InvalidError, match="std: 0 numbers for 3 channels"):
        of("conv2k1-gap", mean=[0.5] * 3)
    with pytest.raises(gemmnet.InvalidError, match="3 names for a network of 2 classes"):
        of("conv2k1-gap", class_names=["a", "b", "c"])
    counted = {**weights, "bn.num_batches_tracked": np.array(3)}
    assert of("conv2k1-gap", counted, names={"conv1": "0"}).classes == 2


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_a_resnet_of_pytorch_computes_the_same_scores_here():
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            if stride != 1 or inputs != outputs:
                shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

        def forward(self, x):
            out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(out + (self.downsample(x) if hasattr(self, "downsample") else x))

    class ResNet18(nn.Module):
        """torchvision's, name by name."""

        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            widths = [64, 64, 128, 256, 512]
            for stage, (inputs, outputs) in enumerate(zip(widths, widths[1:]), 1):
                blocks = Block(inputs, outputs, 1 if stage == 1 else 2), Block(outputs, outputs, 1)
                setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            self.fc = nn.Linear(512, 1000)

        def forward(self, x):
            x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
            for stage in range(1, 5):
                x = getattr(self, f"layer{stage}")(x)
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    net = ResNet18()
    x = torch.randn(1000, 3, 64, 64)
    with torch.no_grad():
        net(x[:50])  # statistics that are not 0 and 1
        want = torch.cat([net.eval()(part) for part in x.split(100)]).numpy()
    down = lambda f: f"res[conv{f}s2p1-bn-relu-conv{f}-bn]-relu-{BLOCK(f)}"
    notation = f"conv64k7s2p3-bn-relu-pool3s2p1-[{BLOCK(64)}]x2-{down(128)}-{down(256)}-{down(512)}-gap-affine1000"
    session = gemmnet.Model.from_state_dict(notation, net.state_dict(), (3, 64, 64)).session(100)
    got = np.concatenate([session.run(part) for part in x.split(100)])
    assert_same(got, want)
