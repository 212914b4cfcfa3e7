"""EuroSAT: found, unpacked or downloaded, and read."""

import os
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from datasets.pictures import Listing, read_pictures
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
# By the names of folders: the class's own, or in lower case.
CLASS_OF = {entry: name for name in CLASS_NAMES for entry in (name.lower(), name)}
IM_SIZE = 64
EUROSAT_SIZE = 27_000  # images
EUROSAT_FOLDERS = (".", "2750", "EuroSAT_RGB", "EuroSAT", "EuroSAT/2750", "eurosat/2750")
EUROSAT_ARCHIVES = ("EuroSAT.zip", "EuroSAT_RGB.zip")  # in any case
EUROSAT_CACHE = "eurosat_cache.pt"
ARCHIVE_LIMIT = 2 * 10**9  # bytes that an archive may unpack to


def load_eurosat(data_path):
    """All `Images` of EuroSAT below `data_path`, 64×64, sorted by class and name.

    Raises ReportedError if the data is unavailable, incomplete or damaged.
    """
    with files.locked(data_path, reader=True):  # one process unpacks, others wait for it
        folder = find_eurosat(data_path)
    paths, labels = [], []
    for label, name in enumerate(CLASS_NAMES):
        names = list_jpegs(folder, name)
        paths += names
        labels += [label] * len(names)
    if len(paths) != EUROSAT_SIZE:
        warnings.warn(f"{folder} holds {len(paths)} images, EuroSAT has {EUROSAT_SIZE}")
    listing = Listing(folder, paths, labels, CLASS_NAMES)
    return read_pictures(listing, data_path / EUROSAT_CACHE, IM_SIZE)


def find_eurosat(data_path):
    """The folder of EuroSAT's class folders below `data_path`, unpacked or downloaded first."""
    if folder := class_parent(data_path):
        return folder
    if archive := find_archive(data_path):
        unpack_eurosat(archive)
        return class_parent(data_path)
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
    """The folder that has class folders, if there is one."""
    for name in EUROSAT_FOLDERS:
        if class_folders(data_path / name):
            return data_path / name
    return None


def class_folders(folder):
    """The names of EuroSAT's class folders in a folder, by class."""
    return {name: entry for entry, name in CLASS_OF.items() if (folder / entry).is_dir()}


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
        os.replace(unpacked, archive.parent / "2750")  # whole or not at all


def unpack_jpegs(zipped, target):
    """Unpack JPEGs in class folders. Only the last two names of a path are used."""
    members = {}
    for member in zipped.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))  # some tools write backslashes
        if path.parent.name in CLASS_OF and is_jpeg(path.name):
            members[target / CLASS_OF[path.parent.name] / path.name] = member
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
    others = [entry.name for entry in os.scandir(folder / place)]
    names = sorted(f"{place}/{entry}" for entry in others if is_jpeg(entry))
    if not names:
        kinds = {Path(entry).suffix.lower() for entry in others}
        found = "holds no JPEG: unpack EuroSAT again"
        if kinds & {".tif", ".tiff"}:
            found = "holds TIFFs, as EuroSAT-MS with its 13 bands: fetch the RGB archive"
        elif ".png" in kinds:
            found = "holds PNGs: read them by --dataset=ImageFolder --im_size=64"
        raise ReportedError(f"class folder {folder / place} {found}")
    return names
