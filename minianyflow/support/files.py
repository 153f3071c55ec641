"""Files and folders that are written whole or not at all, and folders that one run at a time writes to."""

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

from minianyflow.support.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK, UNFINISHED = ".lock", ".unfinished-"


def lock_folder(folder):
    """Make `folder`, and lock it until the file that is returned is closed, or its process ends.

    Raises InputError if another process has locked it, or it cannot be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as problem:
        raise InputError(f"cannot write to {folder} ({problem.strerror}); name one that you may write to") from None
    if _lock(file) is False:
        raise InputError(f"another run is at work in {folder}; wait for it, or name another folder")
    return file


def _lock(file):
    """Lock an open file for this process alone; False if another has. Some file systems have no locks: then None."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        return False if problem.errno == errno.EWOULDBLOCK else None
    return True if fcntl else None


@contextlib.contextmanager
def staging_folder(output):
    """A temporary folder to write files into; they are moved to `output` at the end, if no error was raised."""
    output = Path(output)
    with unfinished_folder(output, output) as folder:
        yield folder
        for file in sorted(folder.iterdir()):  # run.json and null.safetensors come last: they mark a complete folder
            place = output / file.name
            if file.is_dir() and place.is_dir():  # of a killed run; a rename replaces only an empty folder
                os.replace(place, Path(tempfile.mkdtemp(dir=folder, prefix="old-")))
            os.replace(file, place)


@contextlib.contextmanager
def new_folder(folder):
    """A temporary folder that is renamed to `folder`, new or empty until then, if no error was raised."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; expected a new one: name another")
    with unfinished_folder(folder.parent, folder) as parent:
        inside = parent / folder.name
        inside.mkdir()
        yield inside
        for file in inside.rglob("*.safetensors"):  # the library lets only their owner read them
            file.chmod(inside.stat().st_mode & 0o666)
        if folder.exists():
            folder.rmdir()
        inside.rename(folder)


@contextlib.contextmanager
def unfinished_folder(parent, target):
    """A locked folder in `parent`, removed at the end. Errors of the disk become an InputError with the file."""
    from safetensors import SafetensorError  # its full disk is no OSError

    folder = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent, surely=True)
        with contextlib.ExitStack() as stack:
            while not (folder and folder.exists()):  # another process may remove it before it is locked
                folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=parent))
                stack.enter_context(_locked(folder))
            yield folder
    except (OSError, SafetensorError) as problem:
        place = (folder and (getattr(problem, "filename2", None) or getattr(problem, "filename", None))) or target
        expected = "make room and run the same again, or name a folder you may write to"
        why = getattr(problem, "strerror", None) or problem
        raise InputError(f"cannot write to {place} ({why}); {expected}") from None
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def regular(path):
    """The path of a file. Raises InputError for a pipe, a socket or a device: one might wait for these for ever.

    What is not there, or a folder, is left to whoever opens it.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        mode = stat.S_IFREG
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{path} is a pipe, a socket or a device; expected a file: write it to one first")
    return Path(path)


def read_json(path, expected, schema=dict):
    """The content of a JSON file. schema: a type that `check_json` takes.

    Raises InputError, which says what is `expected`, for a file that cannot be read, and names the field that differs.
    """
    path = regular(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise InputError(f"{path} is nested too deeply; {expected}") from None
    except OSError as problem:
        raise InputError(f"{path} cannot be read ({problem.strerror}); {expected}") from None
    except ValueError as problem:
        raise InputError(f"{path} is not JSON ({problem}); {expected}") from None
    return check_json(content, schema, path, expected)


def check_json(content, schema, path, expected):
    """`content` of the file `path`, if it is of the type `schema`, like a TypedDict; other fields stay as they are.

    Raises InputError, which names file and field, if not.
    """
    if schema is dict and isinstance(content, dict):
        return content
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(schema).validate_python(content, strict=True)
    except ValidationError as problem:
        error = problem.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, error["loc"])) or "its content"
        raise InputError(f"{path}: {field}: {error['msg'].replace('Input', 'it')}; {expected}") from None
    return content


def open_picture(path):
    """The picture in a file, RGBA, upright, in sRGB; None for an animation. Raises what Pillow raises."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        if getattr(picture, "is_animated", False):
            return None
        picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("I", "F"):
            raise ValueError("its numbers have 32 bits; expected 8 or 16")
        if picture.mode.startswith("I;16"):  # which Pillow would clip to its lowest 8 bits
            deep, picture = picture, Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
            picture.info = deep.info
        return _to_srgb(picture)


def profile_of(path):
    """The name of the colour profile of a picture that is not sRGB, else None."""
    import io

    from PIL import Image, ImageCms

    try:
        with Image.open(path) as picture:
            name = ImageCms.getProfileDescription(io.BytesIO(picture.info["icc_profile"])).strip()
            return None if "sRGB" in name or getattr(picture, "is_animated", False) else name or "a profile"
    except ImageCms.PyCMSError:
        return "a broken profile"
    except (OSError, KeyError, ValueError, SyntaxError):  # no picture, or one without
        return None


def _to_srgb(picture):
    """RGBA. Telephones and editors store other colours and say so in a profile."""
    import io

    from PIL import ImageCms

    shown = picture.convert("RGBA")
    if profile := picture.info.get("icc_profile"):
        try:
            source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            mode = {"GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip(), "RGB")
            colours = ImageCms.profileToProfile(picture.convert(mode), source, target, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError) as problem:
            raise ValueError(f"its colour profile: {problem}; save it as sRGB") from None
        colours.putalpha(shown.getchannel("A"))
        return colours
    return shown


def remove_leftovers(folder, surely=False):
    """Remove the unfinished folders of killed processes from `folder`; those of living processes stay.

    surely: where there are no locks, remove none.
    """
    for leftover in Path(folder).glob(f"{UNFINISHED}*"):
        with _locked(leftover) as free:
            if free or (free is None and not surely):
                shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder):
    """Lock a folder, if no other process has, as long as this context lasts; yields what `_lock` says."""
    try:
        number = os.open(folder, os.O_RDONLY) if fcntl else None
    except OSError:  # removed meanwhile
        number = None
    try:
        yield number and _lock(number)
    finally:
        if number is not None:
            os.close(number)
