"""The networks of the experiments: ConvNet and its variants, MLP, ResNet18, VGG11, VGG16.

Every network maps images (B, channels, im_size, im_size) to logits (B, num_classes). Parameter
names and their order are those of MTT's networks. Trajectory files are bare lists in this order,
and can be exchanged with MTT. `layers` returns a network's features (B, ...): after each activation
(of ResNet18, of the stem and each stage), and last, those that the last layer takes, flattened.
"""

import torch
from torch import nn
from torch.nn import functional as F

# --------------------------------------------------------------------------------------------------
# MLP


class MLP(nn.Module):
    """Three linear layers with two hidden layers of 128 units."""

    def __init__(self, channels, num_classes, im_size):
        super().__init__()
        self.fc_1 = nn.Linear(channels * im_size * im_size, 128)
        self.fc_2 = nn.Linear(128, 128)
        self.fc_3 = nn.Linear(128, num_classes)

    def forward(self, x):
        return self.fc_3(self.layers(x)[-1])

    def layers(self, x):
        first = F.relu(self.fc_1(x.flatten(1)))
        second = F.relu(self.fc_2(first))
        return [first, second, second]


# --------------------------------------------------------------------------------------------------
# ConvNet (Gidaris & Komodakis 2018; the network of all dataset-distillation papers)

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "leakyrelu": lambda: nn.LeakyReLU(0.01)}


def is_compiled_for_cpu(x):
    return torch.compiler.is_compiling() and x.device.type == "cpu"


class AvgPool(nn.AvgPool2d):
    """`AvgPool2d(2)`, in two forms for the compiler.

    Means over cells compile to the faster first derivatives on a CPU, with the same digits in
    float32: a ConvNetW32 trains 1.1 to 1.7 times as fast. The second derivatives of an unrolled
    student are faster without them.
    """

    differentiated_twice = False

    def __init__(self):
        super().__init__(2)

    def forward(self, x):
        if self.differentiated_twice or not is_compiled_for_cpu(x):
            return super().forward(x)
        height, width = (side // 2 * 2 for side in x.shape[2:])
        cells = x[..., :height, :width].unflatten(2, (-1, 2)).unflatten(4, (-1, 2))
        return cells.mean((3, 5))


POOLINGS = {"none": None, "max": lambda: nn.MaxPool2d(2), "avg": AvgPool}

NORMS = {  # each takes the feature map's channels and side length
    "none": None,
    "batch": lambda channels, size: nn.BatchNorm2d(channels),
    "layer": lambda channels, size: nn.LayerNorm([channels, size, size]),
    "instance": lambda channels, size: nn.GroupNorm(channels, channels),
    "group": lambda channels, size: nn.GroupNorm(4, channels),
}


class ConvNet(nn.Module):
    """`depth` blocks of [3×3 convolution → norm → activation → pooling by 2], a linear layer."""

    def __init__(
        self,
        channels,
        num_classes,
        im_size,
        *,
        width=128,
        depth=3,
        act="relu",
        norm="instance",
        pooling="avg",
    ):
        super().__init__()
        layers, size = [], im_size
        for _ in range(depth):
            layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
            if NORMS[norm]:
                layers.append(NORMS[norm](width, size))
            layers.append(ACTIVATIONS[act]())
            if POOLINGS[pooling]:
                layers.append(POOLINGS[pooling]())
                size //= 2
            channels = width
        if size == 0:
            raise ValueError(
                f"{depth} poolings leave nothing of {im_size}x{im_size} images: "
                f"use at most {im_size.bit_length() - 1} (ConvNetD{im_size.bit_length() - 1})"
            )
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * size * size, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))

    def layers(self, x):
        return layers_of(self.features, x)


def layers_of(modules, x):
    """The features after each activation among modules in sequence, and the last, flattened."""
    found = []
    for module in modules:
        x = module(x)
        if isinstance(module, (nn.ReLU, nn.LeakyReLU, nn.Sigmoid)):
            found.append(x)
    return [*found, x.flatten(1)]


class LastFeatures(nn.Module):
    """The features that a network's last layer takes, [(B, D)], as a network of their own."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network.layers(x)[-1:]


# --------------------------------------------------------------------------------------------------
# ResNet18 (He et al. 2016), in its CIFAR form: a 3×3 stem without pooling


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut. `norm` makes a layer for a number of channels."""

    def __init__(self, channels, planes, stride, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(
            channels, planes, kernel_size=3, stride=stride, padding=1, bias=False
        )
        self.bn1 = norm(planes)  # called bn whatever it is, as in MTT's files and code
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, padding=1, bias=False)
        self.bn2 = norm(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, planes, kernel_size=1, stride=stride, bias=False), norm(planes)
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """Four stages of two basic blocks, 64 to 512 channels, average-pooled by 4, a linear layer."""

    def __init__(self, channels, num_classes, im_size, *, norm="instance"):
        super().__init__()
        if im_size % 32:
            raise ValueError(f"ResNet18 takes images whose side is a multiple of 32, not {im_size}")
        norm_layer = {
            "instance": lambda planes: nn.GroupNorm(planes, planes),
            "batch": nn.BatchNorm2d,
        }[norm]
        self.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
        self.bn1 = norm_layer(64)
        for stage, (inputs, planes, stride) in enumerate(
            [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)], start=1
        ):
            blocks = nn.Sequential(
                BasicBlock(inputs, planes, stride, norm_layer),
                BasicBlock(planes, planes, 1, norm_layer),
            )
            self.add_module(f"layer{stage}", blocks)
        self.classifier = nn.Linear(512 * (im_size // 32) ** 2, num_classes)

    def forward(self, x):
        return self.classifier(self.layers(x)[-1])

    def layers(self, x):
        found = [F.relu(self.bn1(self.conv1(x)))]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            found.append(stage(found[-1]))
        return [*found, F.avg_pool2d(found[-1], 4).flatten(1)]


# --------------------------------------------------------------------------------------------------
# VGG11 and VGG16 (Simonyan & Zisserman 2015), with one linear layer

VGG_STAGES = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


class VGG(nn.Module):
    """[3×3 convolution → instance norm → ReLU] in five stages, each max-pooled.

    VGG11 has eight of them, VGG16 thirteen.
    """

    def __init__(self, channels, num_classes, im_size, *, depth):
        super().__init__()
        if im_size % 32:
            raise ValueError(
                f"VGG{depth} takes images whose side is a multiple of 32, not {im_size}"
            )
        layers = []
        for widths in VGG_STAGES[depth]:
            for width in widths:
                layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                layers.append(nn.GroupNorm(width, width))
                layers.append(nn.ReLU())
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512 * (im_size // 32) ** 2, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))

    def layers(self, x):
        return layers_of(self.features, x)


# --------------------------------------------------------------------------------------------------
# Networks by name

NETWORKS = {
    "MLP": (MLP, {}),
    "ConvNet": (ConvNet, {}),
    **{f"ConvNetD{depth}": (ConvNet, {"depth": depth}) for depth in range(1, 9)},
    **{f"ConvNetW{width}": (ConvNet, {"width": width}) for width in (32, 64, 128, 256, 512, 1024)},
    **{f"ConvNetA{act[0].upper()}": (ConvNet, {"act": act}) for act in ACTIVATIONS},
    **{f"ConvNet{norm[0].upper()}N": (ConvNet, {"norm": norm}) for norm in NORMS},
    **{f"ConvNet{way[0].upper()}P": (ConvNet, {"pooling": way}) for way in POOLINGS},
    "ResNet18": (ResNet18, {}),
    "ResNet18BN": (ResNet18, {"norm": "batch"}),
    **{f"VGG{depth}": (VGG, {"depth": depth}) for depth in VGG_STAGES},
}
ALIASES = {"ResNet": "ResNet18"}


def get_network(name, channels, num_classes, im_size):
    """Build a network by its name, initialised by PyTorch's defaults from the global generator.

    `im_size` is the side of the square images in pixels. Raises ValueError for an unknown name, and
    for a side that does not fit.
    """
    name = ALIASES.get(name, name)
    if name not in NETWORKS:
        raise ValueError(
            f"unknown network {name!r}; choose from {', '.join([*NETWORKS, *ALIASES])}"
        )
    network_class, variant = NETWORKS[name]
    return network_class(channels, num_classes, im_size, **variant)
