"""A saved set for other tools: pictures in class folders, GeoTIFFs, and dd_ranking.pt."""

import json
from pathlib import Path

import utils
from datasets.bands import write_raster
from datasets.set_files import TILED, read_record
from run import report
from run.folder import run_flags
from system import files
from system.process import ReportedError

OF_THIS_MACHINE = {"device", "wandb_mode", "wandb_project", "wandb_entity"}


def exported_record(args, data):
    """The content of a `files.RunRecord` of an exported set, without what is of this machine.

    The flags are those of its run, if that is known, and so is what the images started from.
    """
    settings = {"data": data.settings["digest"], "classes": data.classes} | data.settings
    if args.split:
        settings["split"] = args.split.name
    flags = run_flags(args)
    record = read_record(args.evaluate, "--evaluate")
    if record:
        flags = record.flags
        settings["pix_init"] = record.settings.get("pix_init")
    left_out = {name for name in flags if isinstance(getattr(args, name), Path)}
    if flags.get("lr_teacher") is None:  # of a set without α
        left_out.add("lr_teacher")
    flags = {name: flags[name] for name in flags.keys() - left_out - OF_THIS_MACHINE}
    return {"settings": settings, "flags": flags | {"factor": args.factor}, "wandb_id": ""}


def check_free(folder):
    """Raise ReportedError if the folder already has an exported set."""
    for there in (folder / "images", folder / "bands", folder / "dd_ranking.pt"):
        if there.exists():
            raise ReportedError(
                f"--export={folder}: {there.name} is there already: remove it, or name another "
                "folder"
            )


def export_set(folder, saved, syn_lr, data, view, record):
    """Write a `saved_sets.SyntheticSet` into a folder.

    syn_lr  α, or None
    data    `preprocessing.Data` for which it was made
    view    `report.View`: the bands that pictures show
    record  of its run, a dictionary that JSON can hold

    The PNGs are for viewing: clipped and scaled, three of the bands. With --bands, bands/ has
    GeoTIFFs of them all, in the numbers of the data's own files. DD-Ranking's dictionary has what
    networks learn from, and the record of the run, so that --evaluate takes it as it was. Tiles are
    images of their own there; the images that hold them are beside them, for this project alone.
    Every class has a folder, so that `ImageFolder` numbers them alike.
    """
    factor = record["flags"]["factor"]
    images = utils.decode(saved.images, factor)
    pixels = data.to_pixels(images)
    shown = view.of_pixels(pixels)
    classes = saved.classes, data.classes
    for path, image in files_by_class(folder / "images", *classes, shown, ".png"):
        report.save_picture(path, report.draw_image(image, pixels=True))
    names = data.settings.get("bands")
    if names:
        unit = data.settings["unit"]
        for path, image in files_by_class(folder / "bands", *classes, pixels, ".tif"):
            write_raster(path, image * unit, names)
    content = {"image_tensor": images, "hard_labels": saved.classes, "syn_lr": syn_lr}
    if saved.labels.dim() == 2:
        content["soft_labels"] = saved.labels
    if saved.targets is not None:
        content["targets"] = saved.targets
    if factor > 1:
        content[TILED] = saved.images
    content["record"] = json.dumps(record)
    files.write_tensors(folder / "dd_ranking.pt", content)
    print(f"{len(images)} images exported to {folder}")


def files_by_class(folder, labels, classes, images, ending):
    """Make a folder for each class, and yield the file of each image in it, with the image."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(images[labels == label]):
            yield folder / name / f"{number:04d}{ending}", image
