"""EuroSAT: found, unpacked or downloaded, and read."""

import os
import tempfile
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from datasets.bands import ALL, RGB, SENTINEL_2, read_rasters
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
EUROSAT_CACHE = "eurosat_cache.pt"
LONG_PATH = "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"  # in EuroSATallBands.zip


@dataclass(frozen=True)
class Edition:
    """A form in which EuroSAT was published."""

    title: str
    bands: str  # --bands that reads it
    kind: str  # of its files
    suffixes: tuple
    folders: tuple  # below --data_path, of which one may have the class folders
    archives: tuple  # in any case
    unpacked: str  # the folder that an archive is unpacked to
    gigabytes: float  # of all images
    limit: int  # bytes that an archive may unpack to
    others: dict  # what a class folder holds instead, by suffix, with the remedy
    has_download: bool = False  # by torchvision

    def has(self, name):
        """Tell whether a name is an image's, unlike the `._*.jpg` that macOS leaves beside it."""
        return name.lower().endswith(self.suffixes) and not name.startswith(".")


TIFFS = "holds TIFFs, as EuroSAT-MS with its 13 bands: fetch the RGB archive, or give --bands=all"
RGB_EDITION = Edition(
    title="RGB",
    bands=RGB,
    kind="JPEG",
    suffixes=(".jpg", ".jpeg"),
    folders=(".", "2750", "EuroSAT_RGB", "EuroSAT", "EuroSAT/2750", "eurosat/2750"),
    archives=("EuroSAT.zip", "EuroSAT_RGB.zip"),
    unpacked="2750",
    gigabytes=0.1,
    limit=2 * 10**9,
    others={
        ".tif": TIFFS,
        ".tiff": TIFFS,
        ".png": "holds PNGs: read them by --dataset=ImageFolder --im_size=64",
    },
    has_download=True,
)
JPEGS = "holds JPEGs, as EuroSAT-RGB: fetch the archive EuroSAT_MS.zip, or give --bands=rgb"
BANDS_EDITION = Edition(
    title="multispectral",
    bands=ALL,
    kind="GeoTIFF",
    suffixes=(".tif", ".tiff"),
    folders=(".", "EuroSAT_MS", "EuroSATallBands", LONG_PATH, f"EuroSATallBands/{LONG_PATH}"),
    archives=("EuroSAT_MS.zip", "EuroSATallBands.zip"),
    unpacked="EuroSAT_MS",
    gigabytes=2.9,
    limit=5 * 10**9,
    others={".jpg": JPEGS, ".jpeg": JPEGS},
)


def load_eurosat(data_path):
    """All `Images` of EuroSAT below `data_path`, 64×64, sorted by class and name.

    data_path  a folder, or the archive in it. Raises ReportedError if the data is unavailable,
               incomplete or damaged.
    """
    listing = list_eurosat(data_path, RGB_EDITION)
    read = read_pictures(listing, place_of(data_path) / EUROSAT_CACHE, IM_SIZE)
    warn_of_changes(listing.folder, read)
    return read


def load_eurosat_bands(data_path, im_size, fill_nodata):
    """The same with all bands of `SENTINEL_2`, in the type of the files.

    Its pixels have no known digest, so only their number is compared with what was published.
    """
    listing = list_eurosat(data_path, BANDS_EDITION)
    cache = place_of(data_path) / "eurosat_bands_cache.pt"
    read = read_rasters(listing, cache, im_size, fill_nodata, len(SENTINEL_2))
    warn_of_count(listing.folder, read)
    return read


def band_names(data_path):
    """The names of Sentinel-2's bands in EuroSAT's order; `data_path` is not read."""
    return tuple(SENTINEL_2)


def place_of(data_path):
    """The folder of the caches, for --data_path: a folder, or the archive in it."""
    return data_path.parent if data_path.is_file() else data_path


def list_eurosat(data_path, edition):
    """The `Listing` of an edition of EuroSAT, unpacked or downloaded first."""
    archive = data_path if data_path.is_file() else None
    place = place_of(data_path)
    with files.locked(place, reader=True):  # one process unpacks, others wait for it
        folder = find_eurosat(place, archive, edition)
    paths, labels = [], []
    for label, name in enumerate(CLASS_NAMES):
        names = list_images(folder, name, edition)
        paths += names
        labels += [label] * len(names)
    return Listing(folder, paths, labels, CLASS_NAMES)


def find_eurosat(data_path, archive=None, edition=RGB_EDITION):
    """The folder of EuroSAT's class folders below `data_path`, unpacked or downloaded first."""
    folder = class_parent(data_path, edition)
    if folder and filled_classes(folder, edition):
        return folder
    archive = archive or find_archive(data_path, edition)
    if archive:
        return unpack_eurosat(archive, edition)
    if folder:
        return folder  # which `list_images` refuses
    where = (
        f"EuroSAT is not in --data_path={data_path}: looked for class folders "
        f"({CLASS_NAMES[0]}, ...) in {', '.join(edition.folders)} and for "
        f"{' or '.join(edition.archives)}"
    )
    (other,) = (each for each in (RGB_EDITION, BANDS_EDITION) if each is not edition)
    if class_parent(data_path, other) or find_archive(data_path, other):
        where += f"; the {other.title} edition is there, for --bands={other.bands}"
    if not edition.has_download:
        raise ReportedError(
            f"{where}. Put {edition.archives[0]} there (2 GB, from zenodo.org/records/7711810)"
        )
    print(f"EuroSAT is not in {data_path}; downloading it (90 MB)", flush=True)
    try:
        return download_eurosat(data_path)
    except Exception as error:  # torchvision passes on whatever the network raises
        raise ReportedError(
            f"{where}, and the download failed ({error}). Either unpack "
            "the data there, or put the archive there (EuroSAT_RGB.zip from "
            "zenodo.org/records/7711810), or run once with access to the network."
        ) from None


def class_parent(data_path, edition):
    """The folder that has most class folders with pictures, the first if tied; None: there is none.

    An empty class folder may lie beside the complete data.
    """
    folders = [data_path / name for name in edition.folders]
    folders = [folder for folder in folders if class_folders(folder, edition)]
    return max(folders, key=lambda folder: filled_classes(folder, edition), default=None)


def class_called(name):
    """The class that a folder's name stands for; None: none."""
    return CLASS_OF.get("".join(filter(str.isalpha, name.lower())))


def class_folders(folder, edition):
    """EuroSAT's class folders in a folder, by class. Of two for a class, the one with pictures."""
    if not folder.is_dir():
        return {}
    places = [place for place in sorted(folder.iterdir()) if class_called(place.name)]
    places = [place for place in places if place.is_dir()]
    places.sort(key=lambda place: has_images(place, edition))
    return {class_called(place.name): place for place in places}


def filled_classes(folder, edition):
    """The number of class folders with pictures in a folder."""
    return sum(has_images(place, edition) for place in class_folders(folder, edition).values())


def has_images(folder, edition):
    with os.scandir(folder) as entries:
        return any(edition.has(entry.name) for entry in entries)


def find_archive(data_path, edition):
    """EuroSAT's archive in a folder; None: there is none."""
    wanted = [name.lower() for name in edition.archives]
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


def unpack_eurosat(archive, edition):
    """Unpack the images of EuroSAT's class folders, wherever they are; returns their new folder.

    Raises ReportedError for an archive that is damaged, too large, or not EuroSAT's.
    """
    with scratch_folder(archive.parent) as scratch:
        unpacked = Path(scratch) / edition.unpacked
        unpacked.mkdir()
        try:
            with zipfile.ZipFile(archive) as zipped:
                unpack_images(zipped, unpacked, edition)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise ReportedError(f"{archive} cannot be unpacked ({error}): fetch it again") from None
        missing = [name for name in CLASS_NAMES if not (unpacked / name).is_dir()]
        if missing:
            raise ReportedError(
                f"{archive} lacks {edition.kind}s of {len(missing)} of EuroSAT's "
                f"{len(CLASS_NAMES)} classes "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): is it the "
                f"complete {edition.title} archive, for --bands={edition.bands}? Nothing was "
                "unpacked"
            )
        folder = archive.parent / edition.unpacked
        os.replace(unpacked, folder)  # whole or not at all
    return folder


def unpack_images(zipped, target, edition):
    """Unpack images in class folders. Only the last two names of a path are used."""
    members = {}
    for member in zipped.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))  # some tools write backslashes
        name = class_called(path.parent.name)
        if name and edition.has(path.name):
            members[target / name / path.name] = member
    size = sum(member.file_size for member in members.values())  # zipfile reads no more than that
    if size > edition.limit:
        raise ReportedError(
            f"{zipped.filename} unpacks to {size / 1e9:.0f} GB, EuroSAT to {edition.gigabytes:g}: "
            "fetch it again"
        )
    for path, member in progress(members.items(), desc="unpacking EuroSAT", unit="images"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(zipped.read(member))


def list_images(folder, name, edition):
    """Sorted paths, relative to `folder`, of the images of class `name`."""
    place = class_folders(folder, edition).get(name)
    if not place:
        raise ReportedError(
            f"class folder {folder / name} is missing: EuroSAT has {len(CLASS_NAMES)}, unpack it "
            "again"
        )
    others = [entry.name for entry in os.scandir(place)]
    names = sorted(f"{place.name}/{entry}" for entry in others if edition.has(entry))
    if not names:
        kinds = {Path(entry).suffix.lower() for entry in others}
        found = next((edition.others[kind] for kind in edition.others if kind in kinds), None)
        found = found or f"holds no {edition.kind}: unpack EuroSAT again"
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
    if warn_of_count(folder, read) or read.digest == EUROSAT_DIGEST:
        return
    changed = [name for name, digest in class_digests(read) if digest != CLASS_DIGESTS[name]]
    warnings.warn(
        f"{folder}: pictures of {', '.join(changed)} are not those of EuroSAT as it was "
        "published: one may be damaged, in another folder, or under another name. Unpack it "
        "again to compare results"
    )


def warn_of_count(folder, read):
    """Warn, and return true, if there are not as many images as were published."""
    differs = len(read.images) != EUROSAT_SIZE
    if differs:
        warnings.warn(f"{folder} holds {len(read.images)} images, EuroSAT has {EUROSAT_SIZE}")
    return differs


def class_digests(read):
    """The `data_digest` of each class of these `Images`, in pairs with its name."""
    for label, name in enumerate(read.classes):
        of_class = read.labels == label
        yield name, data_digest(read.images[of_class], read.labels[of_class])
