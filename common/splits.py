"""Label lists: published ones, where they are and that they are what they should be, and random ones.

Lists are downloaded by commit and verified by SHA-256. Only the labeled list and the full training list of a data set are needed: what is
learned from without labels is the full list minus the labeled one.
"""

import hashlib
import http.client
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.files import write_atomically
from common.runtime import UserError


@dataclass(frozen=True)
class PublishedList:
    """A list of a public repository, pinned by commit and content."""

    repository: str
    commit: str
    path: str
    lines: int
    sha256: str
    rooted: bool = False  # its paths start with a slash that means the data set's folder

    @property
    def url(self) -> str:
        return f"https://raw.githubusercontent.com/{self.repository}/{self.commit}/{self.path}"


def unimatch_list(path: str, lines: int, sha256: str) -> PublishedList:
    return PublishedList("LiheYoung/UniMatch", "0324f3dd4a22128105a5eb135d2586c0bb3cc647", path, lines, sha256)


def usrn_list(path: str, lines: int, sha256: str) -> PublishedList:
    return PublishedList("Dayan-Guan/USRN", "20ac4c1bd4646b7f68880778d83ee6a97ddd3def", path, lines, sha256, rooted=True)


def pascal_lists() -> dict[str, PublishedList]:
    """Name after --labeled -> list. 92 to 1464 are of VOC's own masks (classic); fractions are of the augmented set (blender)."""
    lists = {count: unimatch_list(f"splits/pascal/{count}/labeled.txt", int(count), sha256) for count, sha256 in {
        "92": "8a02aa6a1253178b105bd25b36f0a27daeedf6b3959f399aa47d24783f3a8306",
        "183": "de3f4680391cb15324402dae17ac0919933d0d9004c11a641c924f3f67147f9f",
        "366": "74f6bd1e459a8b46fc204529d70b603769f8a45aef4553df8a5c04b5698e77b7",
        "732": "02c8ec5b62e27364f5bc91eb95bccf54debaa721e9d31c50c07507aea258fd0f",
        "1464": "b20486876df309c57c8230e957b2957fff5392ff5cb11f225e8453ed6c50ba3e",
    }.items()}
    for name, lines, sha256 in (
        ("1/16", 662, "0f5e114e6504c8afec6523db91f05503f120d1365cf505e6f4ef99f316d5873b"),
        ("1/8", 1323, "c5ea9bb095158a137e4c1db739b07d54a89af697de24ffd9e576493a4189653f"),
        ("1/4", 2646, "a4573ca0fa8f97c4013dba5f8b233e77a1a8dc7877539b1eb18c8206d37227d0"),
        ("u2pl_1/16", 662, "a58cf5eda18c8e060c8fef0233b388b488e62e5903076fed90b5bd34cf6735d3"),
        ("u2pl_1/8", 1323, "cebe5f2fda695dd72ff3336d6bfef95967c903fe4d404d9827a42c5fbc1dfd8a"),
        ("u2pl_1/4", 2646, "b740bcf1ac91477ff0df913594ea70a00ced359a007a4050cac487f136470fa4"),
    ):
        lists[name] = unimatch_list(f"splits/pascal/{name.replace('/', '_')}/labeled.txt", lines, sha256)
    lists |= {count: lists[name] for name, count in (("1/16", "662"), ("1/8", "1323"), ("1/4", "2646"))}
    for count, sha256 in (("165", "dab31c0aad791376705cc86b3c6b0c16206b9a654666d0f1ce43b3893f3b9f77"),
                          ("331", "677b31ce94dcb3dfc650e3868d3ade4d18ea8eeffe3e3ad31c0bc5c3bd0d69a6"),
                          ("662", "501eb8d7e7e20f742f1dd8ec408adf14cd21ac0ff6fa0bb249114185de20bae4")):
        lists[f"usrn_{count}"] = usrn_list(f"dataloaders/voc_splits0/{count}_train_supervised.txt", int(count), sha256)
    return lists


def cityscapes_lists() -> dict[str, PublishedList]:
    """Likewise. USRN's own lists of 186 and 372 are other pictures than UniMatch's."""
    lists = {name: unimatch_list(f"splits/cityscapes/{name.replace('/', '_')}/labeled.txt", lines, sha256) for name, lines, sha256 in (
        ("1/30", 100, "b11041fef70476fb5564af0ef006a8013622da9cf49c7faf4182f3e26eb32742"),
        ("1/16", 186, "64195914dce1231133c7dc611fece213bc3a87fe4e0b73fbd96add7dfa8a2f46"),
        ("1/8", 372, "97291dfc509a8c90ee94e1c5fd1f7668c21205b995f53b963ac133f0ed96ee8e"),
        ("1/4", 744, "8edd24ae817eed7b49d0a06c95b7bfaf769002c98387e4edeab5e221ab7791c3"),
        ("1/2", 1488, "90d8e29d4d182c3b3def3d1fac02e454868c4ca632f73696bb521aa05e937ee4"),
    )}
    lists |= {str(source.lines): source for source in list(lists.values())}
    for count, sha256 in (("93", "4b1c7e96aa787977881d8166da69d9aaddf7a1d278d110d61370d0664457f7dd"),
                          ("186", "52f10d9e34605e97786e72f373024c0223bff2be71d6c8b3d6f3d02f950c496e"),
                          ("372", "7843f7c2d174ab3e70838c21c584929773f9da9496fcb00f4d02e5bf9cdc6b0d")):
        lists[f"usrn_{count}"] = usrn_list(f"dataloaders/city_splits0/{count}_train_supervised.txt", int(count), sha256)
    lists["93"] = lists["usrn_93"]
    return lists


def coco_lists() -> dict[str, PublishedList]:
    """Likewise."""
    lists = {name: unimatch_list(f"splits/coco/{name.replace('/', '_')}/labeled.txt", lines, sha256) for name, lines, sha256 in (
        ("1/512", 232, "bd0ff85bf2d35b4641d08c2201257ad5b5f02f85ea0da457f44f0b97c4caeb37"),
        ("1/256", 463, "4cdf41b9d3b3afc3734057a605015860501199ed3680370ccb2c677fc159b127"),
        ("1/128", 925, "06067c0fb879b8e6ab8f4bdab3dfa641e8e4da2990200fa156daa33670329d79"),
        ("1/64", 1849, "622b84ccbb5dcba32f4f5bb4ffaf1a9cf3e3f1f460b55dc02605fd099ebf1337"),
        ("1/32", 3697, "781b5990914f7422ee9e1f6325a914f289e077621b77b9cd066c2d01d33a939e"),
    )}
    return lists | {str(source.lines): source for source in lists.values()}


def images_asked_for(labeled: str, total: int) -> int:
    """"92" or "1/16" (of `total`) -> how many images. Raises UserError for anything else."""
    above, slash, below = labeled.partition("/")
    if above.isdecimal() and (not slash or below.isdecimal() and int(below)):
        count = int(above) * total // int(below) if slash else int(above)
        if 1 <= count <= total:
            return count
    raise UserError(f"--labeled {labeled} with --split-seed takes a number of images from 1 to {total}, or a fraction such as 1/16")


def covering_choice(present: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
    """`count` rows of `present`, bool [N, C], drawn at random so that every class that occurs is in one; sorted.

    Rare classes choose first. Raises UserError if so few images cannot show every class.
    """
    order = rng.permutation(len(present))
    chosen: list[int] = []
    for label in np.argsort(present.sum(axis=0), kind="stable").tolist():
        holders = order[present[order, label]]
        if len(holders) and not present[chosen, label].any():
            chosen.append(int(holders[0]))
    if len(chosen) > count:
        raise UserError(f"{count} images are too few for every class to be among them: this seed needs {len(chosen)}")
    taken = set(chosen)
    chosen += [int(index) for index in order if index not in taken][: count - len(chosen)]
    return sorted(chosen)


def published_list(source: PublishedList, root: Path, download: bool) -> Path:
    """The list's file below `root`/splits, downloaded if asked for, and verified in any case."""
    path = root / "splits" / source.repository.replace("/", "_") / source.commit[:10] / source.path
    if not path.is_file():
        if not download:
            raise UserError(f"no list at {path}: --download fetches it from {source.url}, or fetch it yourself and put it "
                            f"there, or give your own with --labeled-list and --unlabeled-list FILE")
        try:
            with urllib.request.urlopen(source.url, timeout=60) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:  # the latter where the connection breaks off
            raise UserError(f"{source.url} could not be downloaded: {error}") from error
        verify(content, source, source.url)
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
    verify(path.read_bytes(), source, path)
    return path


def verify(content: bytes, source: PublishedList, where) -> None:
    if hashlib.sha256(content).hexdigest() != source.sha256:
        raise UserError(f"{where} is not the published list of {source.lines} images (SHA-256 {source.sha256[:12]}… expected, "
                        f"{hashlib.sha256(content).hexdigest()[:12]}… found): delete it and fetch it again")
