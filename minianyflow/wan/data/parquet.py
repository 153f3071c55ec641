"""Latents of FastVideo's parquet files (its schema pyarrow_schema_t2v) to a folder of latents, without encoding a clip.

A row has `vae_latent` (C, F, H, W), raw, and `text_embedding` (L, D), each as bytes, shape and dtype, and a caption.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minianyflow.support.errors import InputError
from minianyflow.support.files import read_json, regular, staging_folder
from minianyflow.wan.data.latents import (
    MANIFEST,
    NULL,
    clip_name,
    file_bytes,
    manifest_bytes,
    read_manifest,
    without_padding,
)
from minianyflow.wan.data.options import DTYPES, Options
from minianyflow.wan.folders import embed, mean_and_spread

PARTS = [f"{name}_{part}" for name in ("vae_latent", "text_embedding") for part in ("bytes", "shape", "dtype")]
COLUMNS = {*PARTS, "caption"}


def convert_parquet(source: str | Path, base: str, output: str | Path, options: Options, device: str = "cpu") -> int:
    """Write the rows of all parquet files in `source` as a set in `output`; returns how many there are.

    base: the pipeline whose VAE and text encoder made them: its mean and spread normalise, its text encoder makes the
    null prompt of `options`. The same call goes on where one was broken off.
    Raises InputError for files of another layout, rows of several shapes, and a folder that holds other latents.
    """
    source, output, dtype = Path(source), Path(output), DTYPES[options.dtype]
    found = (path.relative_to(source) for path in source.rglob("*.parquet"))
    files = [source / path for path in sorted(found) if not any(part.startswith(".") for part in path.parts)]
    if not files:
        raise InputError(f"no parquet files in {source}; expected a folder of FastVideo's")
    counts = [_check(file) for file in files]
    if not sum(counts):
        raise InputError(f"the parquet files in {source} have no rows; expected a clip a row: fetch them again")
    codec = read_json(Path(base) / "vae/config.json", "expected a pipeline folder, as --base")
    mean, std = mean_and_spread(codec).float().view(2, 1, -1, 1, 1)
    made = {"parquet": hashlib.sha256(repr([(f.name, f.stat().st_size) for f in files]).encode()).hexdigest()[:12]}
    made |= {"dtype": options.dtype, "null": options.null, "length": options.length}
    found = read_manifest(output, unfinished=True)
    if found and found.get("made") != made:
        raise InputError(f"{output} holds other latents; name another output folder")
    null = embed(base, [options.null], options.length, torch.float32, device).cpu().to(dtype)
    head, shape = {"clips": sum(counts), "made": made}, None
    _write(output / MANIFEST, manifest_bytes(head, finished=False))
    _write(output / NULL, file_bytes({"prompt": null}, options.null))
    for number, (where, row) in enumerate(tqdm(_rows(files), total=sum(counts), unit="clip", disable=None)):
        latents, prompt = (_tensor(row, name, where) for name in ("vae_latent", "text_embedding"))
        shape = shape or latents.shape
        if latents.shape != shape or latents.ndim != 4 or len(latents) != mean.numel():
            expected = f"{tuple(shape)} as before" if latents.shape != shape else f"({mean.numel()}, F, H, W)"
            raise InputError(f"{where} has latents {tuple(latents.shape)}; expected {expected}: sort files by shape")
        if prompt.ndim != 2 or prompt.shape[1] != null.shape[2] or len(without_padding(prompt)) > options.length:
            expected = f"at most {options.length} x {null.shape[2]}"
            raise InputError(f"{where} has a prompt {tuple(prompt.shape)}; expected {expected}: see --base, --length")
        if not (latents.isfinite().all() and prompt.isfinite().all()):
            raise InputError(f"{where} holds numbers that are not finite; leave that row out, or make it again")
        if not isinstance(row["caption"], str | None):
            raise InputError(f"{where} has the caption {row['caption']!r}; expected a text")
        if not (output / clip_name(number)).exists():
            normalised = (latents.transpose(0, 1) - mean) / std
            tensors = {"latents": normalised.to(dtype), "prompt": without_padding(prompt).to(dtype)}
            _write(output / clip_name(number), file_bytes(tensors, row["caption"] or ""))
    frames, channels = shape[1], shape[0]
    _write(output / MANIFEST, manifest_bytes(head | {"skipped": [], "shape": [frames, channels, *shape[2:]]}, True))
    return sum(counts)


def _check(file) -> int:
    """Number of rows of a file. Raises InputError for another layout."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError("pyarrow is not installed here, which reads parquet: pip install pyarrow") from None
    try:
        opened = parquet.ParquetFile(regular(file))
    except (OSError, ArrowException) as problem:
        raise InputError(f"{file} is no parquet file ({problem}); fetch it again") from None
    if lacking := COLUMNS - {*opened.schema_arrow.names}:
        expected = "expected FastVideo's layout of text to video"
        raise InputError(f"{file} lacks {min(lacking)} ({len(lacking)} columns of {len(COLUMNS)}); {expected}")
    return opened.metadata.num_rows


def _rows(files) -> Iterator[tuple[str, dict]]:
    """(where it is, {column: value}) of every row; a few rows are in memory at a time."""
    from pyarrow import ArrowException, parquet

    for file in files:
        batches, index = parquet.ParquetFile(file).iter_batches(batch_size=4, columns=[*COLUMNS]), 0
        try:
            for row in (row for batch in batches for row in batch.to_pylist()):
                yield f"row {index} of {file}", row
                index += 1
        except (OSError, ArrowException, UnicodeDecodeError) as problem:
            raise InputError(f"{file} cannot be read after row {index} ({problem}); fetch it again") from None


def _tensor(row, name, where) -> Tensor:
    """A tensor of a row, float32."""
    kind = getattr(torch, str(row[f"{name}_dtype"]).removeprefix("torch."), None)
    shape = row[f"{name}_shape"] or []
    try:
        return torch.frombuffer(bytearray(row[f"{name}_bytes"]), dtype=kind).view(*shape).float()
    except (TypeError, ValueError, RuntimeError):
        found = f"{len(row[f'{name}_bytes'] or b'')} bytes of {row[f'{name}_dtype']} for {shape}"
        raise InputError(f"{name} in {where} is {found}; expected its shape's: fetch the file again") from None


def _write(path, data):
    with staging_folder(path.parent) as folder:
        (folder / path.name).write_bytes(data)
