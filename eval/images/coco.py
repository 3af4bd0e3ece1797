"""MS COCO as people download it: FOLDER/val2014/*.jpg and FOLDER/annotations/captions_val2014.json.

No paper fixes which captions its protocol uses. Our choice: for each image the caption with the lowest
annotation id, images in the order of sha256("SEED:IMAGE ID"). Anyone can repeat it in any language.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from d2g.core.errors import UserError
from d2g.core.json_files import parse_json
from d2g.core.machine_errors import raise_machine_error
from eval.images.folders import ImageFiles

SPLITS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {"coco2014-val": ("val2014", 40_504), "coco2017-val": ("val2017", 5_000)}
)
"""Reference set -> name of the split in COCO's files, and its number of images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coco:
    """One split: the folder of its images, image id -> file name, image id -> caption."""

    images: Path
    files: Mapping[int, str]
    captions: Mapping[int, str]


def read_coco(folder: str | Path, split: str) -> Coco:
    """Read `split` ("val2014") of a COCO folder. Raises UserError where a part is missing or damaged."""
    images, annotations = Path(folder) / split, Path(folder) / "annotations" / f"captions_{split}.json"
    for path, exists in ((images, images.is_dir()), (annotations, annotations.is_file())):
        if not exists:
            raise UserError(
                f"{path} is missing; expected COCO as downloaded: {split}/*.jpg and "
                f"annotations/captions_{split}.json in {folder}"
            )
    try:
        # Files and captions by image id.
        content = parse_json(annotations.read_bytes())
        files = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        lines = sorted((int(a["id"]), int(a["image_id"]), str(a["caption"])) for a in content["annotations"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise_machine_error(error)
        raise UserError(f"{annotations} is no COCO captions file ({error}); fetch it again") from error
    # The lines are sorted by annotation id; keep the first caption of each image.
    captions: dict[int, str] = {}
    for _, image, caption in lines:
        captions.setdefault(image, " ".join(caption.split()))
    if unknown := sorted(captions.keys() - files.keys()):
        raise UserError(f"{annotations} does not list image {unknown[0]}, which has captions; fetch it again")
    return Coco(images=images, files=files, captions=captions)


def chosen_images(coco: Coco, count: int, seed: int) -> list[int]:
    """The ids of `count` captioned images (0: all) in the order of sha256("SEED:ID").

    A smaller selection is the beginning of a larger one. Raises UserError when there are fewer images.
    """
    if count > len(coco.captions):
        raise UserError(
            f"{coco.images.name} has {len(coco.captions)} captioned images, the protocol draws {count}; "
            "fetch the whole split"
        )
    ordered = sorted(coco.captions, key=lambda image: hashlib.sha256(f"{seed}:{image}".encode()).digest())
    return ordered[:count] if count else ordered


def chosen_captions(coco: Coco, images: Sequence[int]) -> list[str]:
    """The captions of `images`, with each run of white space replaced by one blank."""
    return [coco.captions[image] for image in images]


def image_files(coco: Coco, images: Sequence[int]) -> ImageFiles:
    """The files of `images` and their captions, by name. Raises UserError naming the first missing one."""
    captions = {coco.images / coco.files[image]: coco.captions.get(image, "") for image in images}
    for file in sorted(captions):
        if not file.is_file():
            raise UserError(f"{file} is missing; fetch {coco.images.name} again")
    return ImageFiles(name=str(coco.images), pictures=sorted(captions), captions=captions)
