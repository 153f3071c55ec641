"""FastVideo's latents, converted: a file made to its layout, and files of others."""

import json
import math
import struct

import pyarrow
import pytest
import torch
from pyarrow import parquet

from minianyflow.support.cli import run
from minianyflow.wan.data.commands import prepare_latents
from minianyflow.wan.data.latents import LatentSet, verify


def rows_of(data, mean, std):
    """The rows of a set as FastVideo stores them: raw latents (C, F, H, W), prompts without padding."""
    for index in range(len(data)):
        clip, _ = data.read_clip(data.path(index))
        tensors = {
            "vae_latent": (clip["latents"] * std + mean).transpose(0, 1).contiguous(),
            "text_embedding": clip["prompt"],
        }
        row = {"id": str(index), "caption": data.captions([index])[0], "media_type": "video", "fps": 16.0}
        for name, tensor in tensors.items():
            row[f"{name}_bytes"], row[f"{name}_shape"] = tensor.numpy().tobytes(), [*tensor.shape]
            row[f"{name}_dtype"] = "float32"
        yield row


@pytest.mark.slow
def test_latents_of_fastvideo_become_the_set_that_encoding_makes(tiny, tmp_path, capsys):
    data, config = LatentSet(tiny / "latents"), json.loads((tiny / "vae/config.json").read_text())
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    rows, folder = [*rows_of(data, mean, std)], tmp_path / "parquet"

    def write(rows, name="b.parquet"):
        (folder / "deeper").mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)

    write(rows[:10], "a.parquet")
    write(rows[10:], "deeper/b.parquet")
    words = [f"--parquet={folder}", f"--base={tiny}", "--length=32", "--null=ugly", "--dtype=fp32", "--device=cpu"]
    call = lambda output: run(lambda: prepare_latents([*words, f"--output={tmp_path / output}"]))  # noqa: E731
    assert call("made") == 0
    made = LatentSet(tmp_path / "made")
    assert (len(made), made.shape, made.null_text) == (16, data.shape, "ugly")
    assert verify(made.folder) == []
    for ours, theirs in zip(made.rows(range(16)), data.rows(range(16)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.equal(made.null, data.null)
    assert made.captions(range(16)) == data.captions(range(16))
    (made.path(3)).unlink()
    assert call("made") == 0
    assert made.path(3).is_file()

    short = rows[0] | {"vae_latent_shape": [16, 5, 8, 4]}
    wide = rows[0] | {"vae_latent_shape": [16, 5, 4, 16]}
    other = rows[0] | {"text_embedding_shape": [len(rows[0]["text_embedding_bytes"]) // 4, 1]}
    renamed = {name.replace("vae_latent", "latent"): value for name, value in rows[0].items()}
    nan = rows[0]["vae_latent_bytes"][:-4] + struct.pack("f", math.nan)
    for number, (bad, message) in enumerate(
        (
            ([short], "vae_latent in row 0 of"),
            ([rows[1], wide], "expected (16, 5, 8, 8) as before: sort files by shape"),
            ([other], "expected at most 32 x 32"),
            ([rows[0] | {"vae_latent_bytes": nan}], "row 0 of"),
            ([rows[0] | {"caption": 3}], "has the caption 3; expected a text"),
            ([rows[0] | {"caption": "x", "vae_latent_dtype": "nn"}], "vae_latent in row 0 of"),
            ([rows[0] | {"vae_latent_shape": None}], "vae_latent in row 0 of"),
            ([renamed], "lacks vae_latent_bytes (3 columns of 7); expected FastVideo's layout"),
        )
    ):
        write(bad, "a.parquet")
        assert call(f"bad{number}") == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert message in line
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]).slice(0, 0), folder / "a.parquet")
    (folder / "deeper/b.parquet").rename(folder / "deeper/.b.parquet")  # hidden: never read
    assert call("none") == 2
    assert "have no rows" in capsys.readouterr().err
    (folder / "a.parquet").write_text("text")
    assert call("bad") == 2
    assert "a.parquet is no parquet file" in capsys.readouterr().err
