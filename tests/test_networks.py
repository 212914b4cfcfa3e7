"""The networks agree with MTT's: outputs, parameter names and order, sizes."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from networks import ALIASES, NETWORKS, AvgPool, get_network
from reparam_module import ReparamModule

TOO_DEEP = ("ConvNetD7", "ConvNetD8")


@pytest.mark.parametrize("name", ["ConvNet", "MLP", "ResNet18"])
def test_logits_equal_the_reference(golden, name):
    reference = golden("networks")
    network = ReparamModule(get_network(name, 3, 10, 64).double())
    flat = 0.05 * torch.sin(torch.arange(network.num_params, dtype=torch.float64))
    with torch.no_grad():
        logits = network(reference["net_input"], flat)
    torch.testing.assert_close(logits, reference[f"logits_{name}"], rtol=1e-10, atol=1e-10)


SHAPES = json.loads((Path(__file__).parent / "golden" / "parameter_shapes.json").read_text())


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_names_shapes_and_order_equal_the_reference(name):
    parameters = [
        [key, list(p.shape)] for key, p in get_network(name, 3, 10, 64).named_parameters()
    ]
    assert parameters == SHAPES[name]


@pytest.mark.parametrize("name", [name for name in (*NETWORKS, *ALIASES) if name not in TOO_DEEP])
def test_every_network_maps_images_to_ten_finite_logits(name):
    with torch.no_grad():
        logits = get_network(name, 3, 10, 64)(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", TOO_DEEP)
def test_a_depth_that_leaves_no_pixels_is_refused_with_the_deepest_that_fits(name):
    with pytest.raises(
        ValueError, match=rf"^{name[-1]} poolings leave nothing of 64x64 images.*ConvNetD6"
    ):
        get_network(name, 3, 10, 64)


@pytest.mark.parametrize("name", ["ResNet18", "VGG11", "VGG16"])
def test_networks_of_five_halvings_refuse_sides_that_do_not_divide(name):
    with pytest.raises(ValueError, match=rf"{name}.*multiple of 32, not 40"):
        get_network(name, 3, 10, 40)


@pytest.mark.parametrize("name", ["VGG11", "VGG16", "ResNet18"])
def test_the_classifier_has_2048_inputs_at_64_pixels(name):
    assert get_network(name, 3, 10, 64).classifier.in_features == 2048


@pytest.mark.parametrize(
    "name, attribute, value",
    [
        ("ConvNetD2", "in_features", 128 * 16 * 16),
        ("ConvNetW32", "in_features", 32 * 8 * 8),
        ("ConvNetNP", "in_features", 128 * 64 * 64),
        ("ConvNet", "out_features", 10),
    ],
)
def test_variants_change_what_their_names_say(name, attribute, value):
    assert getattr(get_network(name, 3, 10, 64).classifier, attribute) == value


@pytest.mark.parametrize("side", [8, 9])
def test_the_compiled_form_of_average_pooling_has_the_same_values_and_gradients(side):
    x = torch.randn(3, 4, side, side, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_(True)
    weights = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(AvgPool(), dynamic=False, backend="aot_eager")
    results = []
    for pool in (compiled, lambda x: F.avg_pool2d(x, 2)):
        y = pool(x)
        results.append((y, *torch.autograd.grad((weights * y).sum(), x)))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


def test_only_a_student_that_is_differentiated_twice_keeps_pytorchs_pooling():
    def forms(module):
        pools = [pool for pool in module.modules() if isinstance(pool, AvgPool)]
        return [pool.differentiated_twice for pool in pools]

    network = get_network("ConvNetD2", 3, 10, 16)
    assert forms(network) == [False] * 2
    student = ReparamModule(network)
    assert forms(student.once()) == [False] * 2
    assert forms(student) == [True] * 2
