"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), as torchvision reads them."""

import numpy as np
import torch

from datasets.pictures import Images, data_digest
from system import files
from system.process import ReportedError, first_line

CLASSES_10 = ("airplane", "automobile", "bird", "cat", "deer")
CLASSES_10 += ("dog", "frog", "horse", "ship", "truck")


def load_cifar(name, data_path):
    """`Images`, 32×32, of "CIFAR10" or "CIFAR100", as torchvision reads them.

    torchvision unpickles the files, but verifies their checksums first. Raises ReportedError if
    they are missing or damaged and cannot be downloaded.
    """
    from torchvision import datasets  # when needed: it takes a third of a script's start

    dataset = getattr(datasets, name)
    with files.locked(data_path, reader=True):
        if not any((data_path / part).exists() for part in (dataset.base_folder, dataset.filename)):
            print(f"{name} is not in {data_path}; downloading it (170 MB)", flush=True)
        try:
            parts = [dataset(data_path, train=train, download=True) for train in (True, False)]
        except Exception as error:  # torchvision passes on whatever the network raises
            raise ReportedError(
                f"{name} is not in --data_path={data_path}, or is damaged, and the download failed "
                f"({first_line(error)}). Put {dataset.filename} there ({dataset.url}), or run once "
                "with access to the network"
            ) from None
    pixels = torch.from_numpy(np.concatenate([part.data for part in parts]))  # (N, H, W, 3)
    images = pixels.permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([label for part in parts for label in part.targets])
    num_test = len(parts[1])
    digest = data_digest(images, labels, num_test)
    return Images(images, labels, digest, tuple(parts[0].classes), num_test)
