"""Folders of pictures, one for each class, as torchvision's ImageFolder takes them."""

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from datasets.bands import count_bands, read_rasters
from datasets.pictures import Listing, read_pictures
from system.process import ReportedError, first_line

PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
OTHER_PICTURES = (".gif", ".jp2", ".j2k", ".jfif", ".heic", ".avif")


def load_image_folder(data_path, im_size):
    """`Images` of any folder of class folders, as torchvision's ImageFolder takes it.

    Pictures are scaled to cover the square, then centre-cropped. Raises ReportedError if a class
    has none, or if one cannot be decoded.
    """
    listing = list_folder(data_path)
    cache = data_path / f"imagefolder_{im_size}_cache.pt"
    return read_pictures(listing, cache, im_size, crop=True)


def load_folder_bands(data_path, im_size, fill_nodata):
    """`Images` of the same folders with all bands of their GeoTIFFs, in the type of the files.

    Nothing is scaled or cropped. Raises ReportedError for a file that is no GeoTIFF, or differs
    from the first one.
    """
    listing = list_folder(data_path)
    cache = data_path / f"imagefolder_{im_size}_bands_cache.pt"
    return read_rasters(listing, cache, im_size, fill_nodata)


def folder_bands(data_path):
    """The bands of the GeoTIFFs in class folders by position, "1" to the first file's last."""
    listing = listing_of(Walk(data_path))
    count = count_bands(listing.folder / listing.paths[0])
    return tuple(str(number) for number in range(1, count + 1))


def list_folder(data_path):
    """The `Listing` of all pictures in class folders; warns of what is left out."""
    walk = Walk(data_path)
    listing = listing_of(walk)
    walk.warn_of_left_out()
    return listing


def listing_of(walk):
    """The `Listing` of the pictures that a `Walk` has found."""
    data_path = walk.data_path
    parts = parts_of(walk.root, data_path)
    samples = [samples_of(part, data_path) for part in parts]
    paths, labels = zip(*(sample for part in samples for sample in part))
    num_test = len(samples[1]) if len(samples) > 1 else None
    return Listing(data_path, paths, labels, tuple(parts[0].classes), num_test)


def class_names(data_path):
    """The names of the classes that `load_image_folder` finds, with the same errors."""
    return tuple(parts_of(Walk(data_path).root, data_path)[0].classes)


# --------------------------------------------------------------------------------------------------
# All pictures below a folder

# Of file servers, operating systems and notebooks, in lower case. Some hold copies of the pictures.
SYSTEM_FOLDERS = {"@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", ".@__thumb"}
SYSTEM_FOLDERS |= {"$recycle.bin", "recycler", "system volume information", "found.000"}
SYSTEM_FOLDERS |= {"lost+found", "__macosx", ".appledouble", ".ipynb_checkpoints"}


@dataclass
class Folder:
    """A folder with what is in it, without what is hidden or the system's."""

    path: Path
    pictures: list = field(default_factory=list)  # paths
    folders: dict = field(default_factory=dict)  # by name, sorted
    has_repeated: bool = False  # links to pictures that count elsewhere

    def all_pictures(self):
        """The paths of all pictures below, sorted folder by folder."""
        below = [path for folder in self.folders.values() for path in folder.all_pictures()]
        return sorted([*self.pictures, *below], key=lambda path: (str(path.parent), path.name))

    def has_pictures(self):
        return bool(self.pictures) or any(f.has_pictures() for f in self.folders.values())

    @property
    def classes(self):
        """Its folders by name, but those of which all pictures count elsewhere."""
        return {
            name: folder
            for name, folder in self.folders.items()
            if folder.has_pictures() or not folder.has_repeated
        }


class Walk:
    """Finds all pictures below a folder, its `root`: a `Folder`.

    Links are followed, but every real file or folder counts once, known by its device and inode.
    Links come last, so that they never hide what is reached without them. Raises ReportedError for
    a folder that cannot be read.
    """

    def __init__(self, data_path):
        self.data_path = data_path
        self.root = Folder(data_path)
        self.seen = set()
        self.links = []  # links still to be followed, with the folder that each is in
        self.others, self.system, self.repeated = [], [], []  # what is left out
        try:
            if not self.is_repeated(data_path):
                self.enter(self.root)
            while self.links:
                folder, path = self.links.pop(0)
                self.add(folder, path, path.is_dir())
        except OSError as error:
            raise ReportedError(
                f"--data_path={data_path} cannot be read ({first_line(error)})"
            ) from None
        sort_folders(self.root)

    def enter(self, folder):
        """Add what is in a folder to it."""
        with os.scandir(folder.path) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        for entry in entries:
            if entry.is_symlink():
                self.links.append((folder, Path(entry.path)))
            else:
                self.add(folder, Path(entry.path), entry.is_dir())

    def add(self, folder, path, is_folder):
        """Add a picture or a folder to the `folder` that it is in."""
        name = path.name.lower()
        if is_folder and name in SYSTEM_FOLDERS:
            self.system.append(path)
        elif name.startswith("."):
            return
        elif is_folder:
            self.add_folder(folder, path)
        elif name.endswith(OTHER_PICTURES):
            self.others.append(path)
        elif (
            name.endswith(PICTURES) and path.is_file()
        ):  # a link may lead nowhere; a pipe never ends
            if self.is_repeated(path):
                folder.has_repeated = True
                self.repeated.append(path)
            else:
                folder.pictures.append(path)

    def add_folder(self, parent, path):
        if self.is_repeated(path):
            self.repeated.append(path)
            return
        parent.folders[path.name] = Folder(path)
        self.enter(parent.folders[path.name])

    def is_repeated(self, path):
        """Tell whether another path has led to the same file or folder."""
        stat = path.stat()
        key = stat.st_dev, stat.st_ino
        is_known = key in self.seen and stat.st_ino != 0  # 0: the file system has no inodes
        self.seen.add(key)
        return is_known

    def warn_of_left_out(self):
        """Warn, with a line for each kind, of what is below the folder and is not read."""
        where = f"below {self.data_path}"
        if self.others:
            kinds = ", ".join(sorted({path.suffix.lower() for path in self.others}))
            warnings.warn(
                f"{len(self.others)} pictures {where} are left out ({kinds}): convert them to PNG "
                "to include them"
            )
        if self.system:
            names = ", ".join(sorted({path.name for path in self.system}))
            warnings.warn(f"{len(self.system)} folders of the system {where} are left out: {names}")
        if self.repeated:
            warnings.warn(
                f"{len(self.repeated)} links {where} are left out, as what they lead to counts "
                f"already: for example {self.repeated[0]}"
            )


def sort_folders(folder):
    """Sort the folders below a folder by name, since links are found last."""
    folder.folders = dict(sorted(folder.folders.items()))
    for each in folder.folders.values():
        sort_folders(each)


# --------------------------------------------------------------------------------------------------
# Which folders are classes

TRAINING = ("train", "training")
TESTING = ("test", "testing", "val", "valid", "validation", "eval")


def parts_of(root, data_path):
    """The `Folder` that has the class folders, or those for training and for testing.

    The latter if there are train/ and test/, val/ or val/images/, as in Tiny ImageNet. Raises
    ReportedError for fewer than two classes, or if folders are no classes.
    """
    parts = [name for name in root.folders if name.lower() in TRAINING + TESTING]
    # Vehicles have a class "train". A part of a data set has its pictures in class folders.
    if len(parts) == 1 and parts[0].lower() == "train" and root.folders[parts[0]].pictures:
        parts = []
    if not parts:
        check_classes(root, data_path)
        return [root]
    parts.sort(key=lambda name: (TRAINING + TESTING).index(name.lower()))
    others = [n for n, f in root.folders.items() if n not in parts and f.has_pictures()]
    if others:
        raise ReportedError(
            f"--data_path={data_path} holds {', '.join(parts)}, which are parts of a data set, "
            f"beside {', '.join(others)}: move the others away, or name the folder in which every "
            f"class has one, such as {data_path / parts[0]}"
        )
    training = [root.folders[name] for name in parts if name.lower() in TRAINING]
    testing = [root.folders[name] for name in parts if name.lower() in TESTING]
    if not (training and testing and training[0].classes):
        raise ReportedError(
            f"--data_path={data_path} holds {', '.join(parts)}, which are no classes: call them "
            "train and test (or val), with a folder per class, or name one of them to have it split"
        )
    return training_and_testing(training[0], testing, data_path)


def training_and_testing(training, testing, data_path):
    """The folder for training, and the first one for testing that has the same classes."""
    check_classes(training, data_path)
    candidates = [each for part in testing for each in (part, part.folders.get("images")) if each]
    for part in candidates:
        if part.classes.keys() == training.classes.keys():
            return [training, part]
    names = " and ".join(str(part.path.relative_to(data_path)) for part in candidates)
    raise ReportedError(
        f"--data_path={data_path}: {names} do not have the {len(training.classes)} class folders "
        f"of {training.path.name}: sort the pictures into them, or name {training.path} itself to "
        "have it split"
    )


def check_classes(folder, data_path):
    """Raise ReportedError if the folders of a folder are no classes."""
    classes = folder.classes
    # Folders of folders: each may be a data set of its own.
    sets = [each.path for each in classes.values() if len(each.classes) > 1]
    if len(classes) < 2:
        raise ReportedError(
            f"--data_path={folder.path} holds {len(classes)} class folders "
            f"({', '.join(classes) or 'none'}): name the folder in which every class has one, "
            f"{f'such as {sets[0]}' if sets else 'with its pictures'}"
        )
    if any(each.pictures for each in classes.values()):
        return
    inside = {name for each in classes.values() for name in each.classes}
    if len(inside) > 1:  # Tiny ImageNet's classes all have the one folder "images"
        raise ReportedError(
            f"--data_path={folder.path}: the pictures of {', '.join(classes)} lie deeper, in "
            f"{', '.join(sorted(inside)[:4])}{', ...' if len(inside) > 4 else ''}: name the folder "
            f"in which every class has one{f', such as {sets[0]}' if sets else ''}"
        )


def samples_of(part, data_path):
    """Paths relative to `data_path`, and labels, of the pictures in the class folders of a part.

    Sorted by class and path. Raises ReportedError if a class has none.
    """
    samples = []
    for label, folder in enumerate(part.classes.values()):
        members = folder.all_pictures()
        if not members:
            raise ReportedError(
                f"{folder.path} holds no pictures ({', '.join(PICTURES)}): add some, or move the "
                "folder away"
            )
        samples += [(os.path.relpath(path, data_path), label) for path in members]
    return samples
