"""EuroSAT: found, unpacked or downloaded, and read."""

import os
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from datasets.pictures import Listing, data_digest, read_pictures
from system import files
from system.process import ReportedError, progress

CLASS_NAMES = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)
# By the names of folders: lower-case letters only, as copies write "Annual Crop" or "annual_crop".
CLASS_OF = {name.lower(): name for name in CLASS_NAMES}
CLASS_OF |= {"industrialbuildings": "Industrial", "residentialbuildings": "Residential"}
CLASS_OF |= {"seaorlake": "SeaLake"}
IM_SIZE = 64
EUROSAT_SIZE = 27_000  # images
EUROSAT_FOLDERS = (".", "2750", "EuroSAT_RGB", "EuroSAT", "EuroSAT/2750", "eurosat/2750")
EUROSAT_ARCHIVES = ("EuroSAT.zip", "EuroSAT_RGB.zip")  # in any case
EUROSAT_CACHE = "eurosat_cache.pt"
ARCHIVE_LIMIT = 2 * 10**9  # bytes that an archive may unpack to


def load_eurosat(data_path):
    """All `Images` of EuroSAT below `data_path`, 64×64, sorted by class and name.

    data_path  a folder, or the archive in it. Raises ReportedError if the data is unavailable,
               incomplete or damaged.
    """
    archive = data_path if data_path.is_file() else None
    place = data_path.parent if archive else data_path
    with files.locked(place, reader=True):  # one process unpacks, others wait for it
        folder = find_eurosat(place, archive)
    paths, labels = [], []
    for label, name in enumerate(CLASS_NAMES):
        names = list_jpegs(folder, name)
        paths += names
        labels += [label] * len(names)
    listing = Listing(folder, paths, labels, CLASS_NAMES)
    read = read_pictures(listing, place / EUROSAT_CACHE, IM_SIZE)
    warn_of_changes(folder, read)
    return read


def find_eurosat(data_path, archive=None):
    """The folder of EuroSAT's class folders below `data_path`, unpacked or downloaded first."""
    folder = class_parent(data_path)
    if folder and filled_classes(folder):
        return folder
    if archive := archive or find_archive(data_path):
        return unpack_eurosat(archive)
    if folder:
        return folder  # which `list_jpegs` refuses
    print(f"EuroSAT is not in {data_path}; downloading it (90 MB)", flush=True)
    try:
        return download_eurosat(data_path)
    except Exception as error:  # torchvision passes on whatever the network raises
        raise ReportedError(
            f"EuroSAT is not in --data_path={data_path}: looked for class folders "
            f"({CLASS_NAMES[0]}, ...) in {', '.join(EUROSAT_FOLDERS)} and for "
            f"{' or '.join(EUROSAT_ARCHIVES)}, and the download failed ({error}). Either unpack "
            "the data there, or put the archive there (EuroSAT_RGB.zip from "
            "zenodo.org/records/7711810), or run once with access to the network."
        ) from None


def class_parent(data_path):
    """The folder that has most class folders with pictures, the first if tied; None: there is none.

    An empty class folder may lie beside the complete data.
    """
    folders = [data_path / name for name in EUROSAT_FOLDERS]
    folders = [folder for folder in folders if class_folders(folder)]
    return max(folders, key=filled_classes, default=None)


def class_called(name):
    """The class that a folder's name stands for; None: none."""
    return CLASS_OF.get("".join(filter(str.isalpha, name.lower())))


def class_folders(folder):
    """EuroSAT's class folders in a folder, by class. Of two for a class, the one with pictures."""
    if not folder.is_dir():
        return {}
    places = [place for place in sorted(folder.iterdir()) if class_called(place.name)]
    places = sorted((place for place in places if place.is_dir()), key=has_jpegs)
    return {class_called(place.name): place for place in places}


def filled_classes(folder):
    """The number of class folders with pictures in a folder."""
    return sum(map(has_jpegs, class_folders(folder).values()))


def has_jpegs(folder):
    with os.scandir(folder) as entries:
        return any(is_jpeg(entry.name) for entry in entries)


def find_archive(data_path):
    """EuroSAT's archive in a folder; None: there is none."""
    wanted = [name.lower() for name in EUROSAT_ARCHIVES]
    found = (path for path in sorted(data_path.glob("*")) if path.name.lower() in wanted)
    return next(found, None)


def download_eurosat(data_path):
    """Let torchvision fetch and unpack EuroSAT into `2750/` below `data_path`, which it returns."""
    from torchvision import datasets  # when needed: it takes a third of a script's start

    data_path.mkdir(parents=True, exist_ok=True)
    with scratch_folder(data_path) as scratch:
        datasets.EuroSAT(scratch, download=True)
        unpacked = Path(scratch) / "eurosat" / "2750"
        return unpacked.rename(data_path / "2750")  # whole or not at all


def scratch_folder(parent):
    """A temporary folder. If a killed process leaves it behind, `files.locked` removes it."""
    return tempfile.TemporaryDirectory(dir=parent, prefix=".unpack", suffix=files.TEMPORARY)


def unpack_eurosat(archive):
    """Unpack the JPEGs of EuroSAT's class folders, wherever they are, to `2750/` beside `archive`.

    Raises ReportedError for an archive that is damaged, too large, or not EuroSAT's.
    """
    with scratch_folder(archive.parent) as scratch:
        unpacked = Path(scratch) / "2750"
        unpacked.mkdir()
        try:
            with zipfile.ZipFile(archive) as zipped:
                unpack_jpegs(zipped, unpacked)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise ReportedError(f"{archive} cannot be unpacked ({error}): fetch it again") from None
        missing = [name for name in CLASS_NAMES if not (unpacked / name).is_dir()]
        if missing:
            raise ReportedError(
                f"{archive} lacks JPEGs of {len(missing)} of EuroSAT's {len(CLASS_NAMES)} classes "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): is it the "
                "complete RGB archive? Nothing was unpacked"
            )
        folder = archive.parent / "2750"
        os.replace(unpacked, folder)  # whole or not at all
    return folder


def unpack_jpegs(zipped, target):
    """Unpack JPEGs in class folders. Only the last two names of a path are used."""
    members = {}
    for member in zipped.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))  # some tools write backslashes
        name = class_called(path.parent.name)
        if name and is_jpeg(path.name):
            members[target / name / path.name] = member
    size = sum(member.file_size for member in members.values())  # zipfile reads no more than that
    if size > ARCHIVE_LIMIT:
        raise ReportedError(
            f"{zipped.filename} unpacks to {size / 1e9:.0f} GB, EuroSAT to 0.1: fetch it again"
        )
    for path, member in progress(members.items(), desc="unpacking EuroSAT", unit="images"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(zipped.read(member))


def is_jpeg(name):
    """Tell whether a name is an image's, unlike the `._*.jpg` that macOS leaves beside it."""
    return name.lower().endswith((".jpg", ".jpeg")) and not name.startswith(".")


def list_jpegs(folder, name):
    """Sorted paths, relative to `folder`, of the JPEGs of class `name`."""
    place = class_folders(folder).get(name)
    if not place:
        raise ReportedError(
            f"class folder {folder / name} is missing: EuroSAT has {len(CLASS_NAMES)}, unpack it "
            "again"
        )
    others = [entry.name for entry in os.scandir(place)]
    names = sorted(f"{place.name}/{entry}" for entry in others if is_jpeg(entry))
    if not names:
        kinds = {Path(entry).suffix.lower() for entry in others}
        found = "holds no JPEG: unpack EuroSAT again"
        if kinds & {".tif", ".tiff"}:
            found = "holds TIFFs, as EuroSAT-MS with its 13 bands: fetch the RGB archive"
        elif ".png" in kinds:
            found = "holds PNGs: read them by --dataset=ImageFolder --im_size=64"
        raise ReportedError(f"class folder {place} {found}")
    return names


# --------------------------------------------------------------------------------------------------
# Whether it is EuroSAT as it was published

EUROSAT_DIGEST = "269b45cd57c14c4d"  # of all, as `data_digest` says
CLASS_DIGESTS = {  # the same of each class
    "AnnualCrop": "4c5dbde35126812b",
    "Forest": "80951cd9aba42587",
    "HerbaceousVegetation": "1a67b14a4bf56ab1",
    "Highway": "abc62ec00dd3f9f1",
    "Industrial": "1fd505a934e936b1",
    "Pasture": "565d01a7f1830da8",
    "PermanentCrop": "7da043bb07a6d85b",
    "Residential": "5c341dc909b2950a",
    "River": "88daeeb9756c2400",
    "SeaLake": "bfe72bd301671863",
}


def warn_of_changes(folder, read):
    """Warn if the pictures in a folder, `read` as `Images`, are not those that were published."""
    if len(read.images) != EUROSAT_SIZE:
        warnings.warn(f"{folder} holds {len(read.images)} images, EuroSAT has {EUROSAT_SIZE}")
    elif read.digest != EUROSAT_DIGEST:
        changed = [name for name, digest in class_digests(read) if digest != CLASS_DIGESTS[name]]
        warnings.warn(
            f"{folder}: pictures of {', '.join(changed)} are not those of EuroSAT as it was "
            "published: one may be damaged, in another folder, or under another name. Unpack it "
            "again to compare results"
        )


def class_digests(read):
    """The `data_digest` of each class of these `Images`, in pairs with its name."""
    for label, name in enumerate(read.classes):
        of_class = read.labels == label
        yield name, data_digest(read.images[of_class], read.labels[of_class])
