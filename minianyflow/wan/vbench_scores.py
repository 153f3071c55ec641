"""VBench's scores of folders of videos, from the Python that has its package and models; what is missing is said.

Its facts, as of vbench 0.1.5: a folder holds nothing but `{prompt}-{index}.mp4`, five of each of its own prompts; with
prompts of one's own ten of the sixteen dimensions can be asked for. Models lie in VBENCH_CACHE_DIR or ~/.cache/vbench,
and are never fetched here.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from subprocess import PIPE

from tqdm import tqdm

from minianyflow.support.errors import InputError, choose

WORKER, ANSWER = Path(__file__).with_name("vbench_worker.py"), "answer: "
VIDEOS = 5  # of each of VBench's own prompts
CLIP_B, CLIP_L, OBJECTS = "clip_model/ViT-B-32.pt", "clip_model/ViT-L-14.pt", "grit_model/grit_b_densecap_objectdet.pth"
MODELS = {  # dimension: the files it needs
    "subject_consistency": ("dino_model/facebookresearch_dino_main", "dino_model/dino_vitbase16_pretrain.pth"),
    "background_consistency": (CLIP_B,),
    "temporal_flickering": (),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": (CLIP_L, "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    "human_action": ("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",),
    "temporal_style": ("ViCLIP/ViClip-InternVid-10M-FLT.pth",),
    "overall_consistency": ("ViCLIP/ViClip-InternVid-10M-FLT.pth",),
    "object_class": (OBJECTS,),
    "multiple_objects": (OBJECTS,),
    "color": (OBJECTS,),
    "spatial_relationship": (OBJECTS,),
    "scene": ("caption_model/tag2text_swin_14m.pth",),
    "appearance_style": (CLIP_B,),
}
OWN_ONLY = ("object_class", "multiple_objects", "color", "spatial_relationship", "scene", "appearance_style")


class VBenchScores:
    """What can be scored: `dimensions`, those whose parts are all there, and `missing` {dimension: why not}.

    python: the interpreter that has the package. own: whether all `prompts` are VBench's; then they are scored as its
    standard asks, else as custom input. asked: dimensions, or None for all that the prompts allow.
    Raises InputError for an unknown dimension, for one that needs VBench's own prompts and, where dimensions were asked
    for, for the first part that is missing.
    """

    def __init__(self, python, prompts, asked=None):
        for dimension in asked or ():
            choose("VBench dimension", dimension, MODELS)
        self.python = python
        (state,) = self._call({"dimensions": list(asked or MODELS)})
        self.package = state["package"]
        self.own = bool(self.package) and set(prompts) <= _own_prompts(self.package)
        if not self.own and self.package and (wrong := [each for each in asked or () if each in OWN_ONLY]):
            expected = "prompts of its prompts/all_dimension.txt alone, or other dimensions"
            raise InputError(f"VBench's {wrong[0]} is for its own prompts; expected {expected}")
        wanted = [each for each in asked or MODELS if asked or self.own or each not in OWN_ONLY]
        self.missing = {each: why for each in wanted if (why := _missing(each, state, python))}
        self.dimensions = [each for each in wanted if each not in self.missing]
        if asked and self.missing:
            raise InputError(self.told())

    def told(self):
        """One line on what is missing, empty if nothing is."""
        if not self.missing:
            return ""
        if not self.package:
            return f"no package vbench in {self.python}, so there are no scores of it; docs/evaluation.md says how"
        first, why = next(iter(self.missing.items()))
        others = f" (and {len(self.missing) - 1} more dimensions)" if len(self.missing) > 1 else ""
        return f"VBench's {first}{others} cannot be scored: {why}; docs/evaluation.md says how"

    def score(self, folders, titles):
        """{dimension: score} of the clips in each folder, as they are ready.

        folders: {of videos: where VBench's own files go}. titles: {name of a video: its prompt}, for custom input.
        """
        jobs = [{"videos": str(Path(v).resolve()), "output": str(Path(o).resolve())} for v, o in folders.items()]
        asked = {"jobs": jobs, "dimensions": self.dimensions, "prompts": {} if self.own else titles}
        yield from tqdm(
            self._call(asked), total=len(jobs), desc="VBench", unit="folder", disable=None if jobs else True
        )

    def _call(self, asked):
        """What the worker answers, one after another."""
        if asked.get("jobs") == []:
            return
        command = [str(self.python), "-I", str(WORKER)]  # isolated: it must not find our modules for its own
        with tempfile.TemporaryFile("w+") as errors:
            try:
                worker = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=errors, text=True)
            except OSError as problem:
                raise InputError(f"{self.python} does not run ({problem.strerror}); expected one with vbench") from None
            with worker:
                try:
                    worker.stdin.write(json.dumps(asked))
                    worker.stdin.close()
                    yield from (json.loads(line.removeprefix(ANSWER)) for line in worker.stdout if ANSWER in line[:8])
                except BrokenPipeError:
                    pass  # it says below why it stopped
                except BaseException:
                    worker.kill()
                    raise
            if worker.returncode:
                errors.seek(0)
                why = next((line.strip() for line in reversed(errors.readlines()) if line.strip()), "without a word")
                raise InputError(f"VBench stopped ({why[:200]}); samples are kept: mend it, or go on with --no-vbench")


def _own_prompts(package):
    """The prompts of VBench's standard, as its package lists them."""
    return {each["prompt_en"] for each in json.loads((Path(package) / "VBench_full_info.json").read_text())}


def _missing(dimension, state, python):
    """What a dimension lacks, or None."""
    if not state["package"]:
        return f"{python} has no package vbench"
    if dimension in state["broken"]:
        return state["broken"][dimension]
    lacking = [each for each in MODELS[dimension] if not (Path(state["cache"]) / each).exists()]
    return f"no {lacking[0]} in {state['cache']}" if lacking else None
