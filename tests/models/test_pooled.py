import pytest
import torch

from accord.data.images import load_image
from accord.errors import CheckpointError
from accord.models.load import load_model
from accord.models.pooled import image_means, text_means
from accord.models.tower import vision_tower


def test_every_family_describes_a_picture_by_its_tower(vlm, square, tmp_path):
    """Two pictures differ, a file and its bytes do not, and neither does the projector's weight."""
    model, processor = vlm
    (tmp_path / "red.png").write_bytes(square("red"))
    red, same, blue = image_means(model, processor, [square("red"), tmp_path / "red.png", square("blue")])
    assert red.shape == (32,) and torch.equal(red, same) and not torch.allclose(red, blue, atol=1e-4)
    inside = {id(p) for p in vision_tower(model).parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in inside:
                parameter.zero_()
    assert torch.equal(image_means(model, processor, [square("red")])[0], red)


def test_a_convolutional_tower_is_averaged_over_places(efficientnet, square):
    model, processor = load_model(efficientnet)
    (mean,) = image_means(model, processor, [square("red")])
    pixels = processor.image_processor(images=[load_image(square("red"))], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = vision_tower(model)(pixels).last_hidden_state
    assert torch.allclose(mean, hidden.mean(dim=(2, 3))[0])


def test_a_text_is_the_mean_of_its_tokens(texts_only):
    model, processor = load_model(texts_only)
    red, both, none = text_means(model, processor, ["red", "red red", ""])
    ids = processor("red", add_special_tokens=False)["input_ids"]
    assert torch.allclose(red, model.get_input_embeddings().weight[ids].mean(dim=0).detach())
    assert not none.any() and both.isfinite().all()


def test_a_model_without_a_tower_is_told(texts_only, square):
    with pytest.raises(CheckpointError, match="reads no pictures"):
        image_means(*load_model(texts_only), [square("red")])
