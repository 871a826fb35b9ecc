"""The paper's benchmarks (Tables 4, 6 and 7) through lmms-eval, which has their questions, prompts and scores.

What      `LongVA` answers lmms-eval's questions about pictures, videos or neither with this project's decoder, UniRes
          and chat templates; a film asked about several times in a row is read once. `main` starts lmms-eval.
Paper     Sec. 4.2; data/README.md has the settings and the expected scores.
Run       python -m data.benchmarks --weights LongVA-7B --tasks videomme,nextqa_mc_test,mmmu_val --frames 32
          torchrun --nproc-per-node 8 -m data.benchmarks --weights LongVA-7B --tasks videomme --frames 3000 --together
Dimensions  T tokens   M tokens per grid   C colour channels   Y X pixels   N grids   D LM width   R ranks
Differs   A task's `until` ends an answer; the release ignored it. Ignored too is the empty line that lmms-eval adds
          where a task has none: descriptions have paragraphs. As in the release: always N frames, some twice if a film
          has fewer; the middle of each frame; greedy, with the repetition penalty of generation_config.json.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

import longva
import ring
import unires
from data import chat, config, runs, tokenizer, video
from data.flags import at_least, run, setting

try:
    from lmms_eval.api.model import lmms
except ImportError:  # all but `main` works without it
    lmms = object

ROOM = 2048  # tokens of a cache, after its film, for one question and its answer


def stop(message: str) -> NoReturn:
    """End the program with one sentence and exit code 2: lmms-eval would print a ValueError and exit with 0."""
    print(f"benchmarks.py: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class LongVA(lmms):
    """The model as lmms-eval makes it from --model_args; `unused`: batch sizes, and a hash for lmms-eval's cache."""

    torchrun: dict[str, str] = {}  # noqa: RUF012  --together: hidden from lmms-eval, which would spread the questions
    group: ring.World | None = None  # --together: where the ranks wait for the next question
    loglikelihood = generate_until_multi_round = None  # no task of the paper needs them

    def __init__(self, weights: str, frames: int, device: str, **unused: Any):
        super().__init__()
        self.device, self.frames, self.world = device, frames, ring.World(0, 1, torch.device(device))
        self.words, self.penalty = tokenizer.load_tokenizer(weights), config.read_sampling(weights).repetition_penalty
        self.stop_ids = {*self.words.stop_ids, *config.stop_ids(weights)}
        self.generator = torch.Generator().manual_seed(0)
        self.model, self.last = longva.load(weights, device), None  # last: (films it holds, cache, its length), or None

    def encode(self, visual: Any) -> tuple[Any, int]:
        """Visual tokens of a picture or a video file, in chunks x_TD for `longva.prefill_prompt`, and their number."""
        model, world, group = self.model, self.world, longva.BATCH
        if not isinstance(visual, str):
            if self.torchrun:
                stop("--together is for videos, and this task shows pictures; run it without")
            (chunks,), tokens = longva.encode_inputs(model, [visual], None, world)
            return chunks, tokens
        vision, M, R = model.config.vision, model.config.vision.tokens_per_grid, world.ranks
        keep, rounds = lambda n: n // group % R == world.rank, -(-self.frames // (group * R))
        frames = video.frames(visual, count=self.frames, shorter="repeat", keep=keep, gaps=True)
        grids = (picture and unires.frame(picture, vision.side, "crop") for _, picture in frames)
        local = longva.encode_video(model, video.prefetch(grids, 2 * group))
        return ring.gather_round_robin(local, model.lm_head.weight[:0], group * M, rounds, world), self.frames * M

    @torch.no_grad()
    def answer(self, text: str, visuals: list, wanted: dict[str, Any]) -> str:
        """The answer to `text`, `wanted` as a task's generation_kwargs; ValueError for a file that cannot be read."""
        text = text if text.count(chat.PLACEHOLDER) == len(visuals) else text.replace(chat.PLACEHOLDER, "")
        ids = chat.prompt(self.words, text, [1] * len(visuals), chat.default_template(self.words))
        seen = len(ids) - ids[::-1].index(chat.IMAGE) if visuals else 0  # ids up to the last visual
        most, model, ranks = int(wanted.get("max_new_tokens") or 1024), self.model, self.world.ranks
        key = (ids[:seen], visuals) if all(isinstance(visual, str) for visual in visuals) else None
        length = "length" if ranks == 1 else "lengths"  # what says how much of a cache is in use
        if key is None or self.last is None or self.last[0] != key or len(ids) + most > ROOM:
            self.last = None  # frees the old cache before there is a new one
            encoded = [self.encode(visual) for visual in visuals]
            room = model.model.rope_len = sum(tokens for _, tokens in encoded) + max(len(ids) + most, ROOM)
            shape = model.model.config, 1, room, model.lm_head.weight
            cache = longva.KVCache(*shape) if ranks == 1 else ring.ShardedCache(*shape, self.world)
            longva.prefill_prompt(model, ids, (chunks for chunks, _ in encoded), cache)
            self.last = key, cache, getattr(cache, length)
        _, cache, after_visuals = self.last
        setattr(cache, length, after_visuals)  # drops the question before, and its answer
        x_1TD = model.embed(torch.tensor([ids[seen:]], device=model.device))
        pick = partial(config.sample, sampling=sampling(wanted, self.penalty), generator=self.generator)
        choose = pick if self.group is None else lambda *x: int(ring.broadcast_text(lambda: str(pick(*x)), self.group))
        until, said = wanted.get("until") or [], ""
        until = [end for end in ([until] if isinstance(until, str) else until) if end not in ("", "\n\n")]
        for piece in self.words.stream(longva.generate(model, x_1TD, cache, self.stop_ids, most, choose)):
            said += piece
            if ends := [said.find(end) for end in until if end in said]:
                return said[: min(ends)].strip()
        return said.strip()

    def exchange(self, question: str) -> str:
        """Rank 0's question on all ranks, which join at the first one; "" ends them."""
        if self.torchrun and self.group is None:
            os.environ.update(self.torchrun)
            self.world = ring.start(self.world.device.type)
            self.group = ring.long_timeout_group(self.world)
        return ring.broadcast_text(lambda: question, self.group) if self.group else question

    def generate_until(self, requests: list) -> Iterator[str]:
        """Yield each answer as it comes: lmms-eval's cache stores it at once, so that a killed run loses one."""
        for request in requests:
            text, wanted, doc_to_visual, doc_id, task, split = request.args
            visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            try:
                self.exchange(json.dumps([text, visuals, wanted], default=str) if self.torchrun else "")
                yield self.answer(text, visuals, wanted)
            except ValueError as error:
                if self.torchrun:  # other ranks may wait for this one's frames
                    stop(f"{task}, question {doc_id}: {error}")
                print(f"WARNING: {task}, question {doc_id} has no answer and counts as wrong: {error}", file=sys.stderr)
                yield ""

    def clean(self) -> None:
        """Let the other ranks end, and free the model; lmms-eval calls it after the last answer."""
        self.exchange("")
        self.model = self.last = None


def sampling(wanted: dict[str, Any], penalty: float) -> config.Sampling:
    """Greedy, unless the task or --gen_kwargs asks for sampling; `penalty` on repetition, unless they give one."""
    named = {f.name: wanted[f.name] for f in fields(config.Sampling) if wanted.get(f.name) is not None}
    given = {"temperature": 1.0, "repetition_penalty": penalty, **named}
    if not wanted.get("do_sample", named.get("temperature")):  # some tasks name a top_p and want no sampling
        return config.Sampling(repetition_penalty=given["repetition_penalty"])
    return config.Sampling(**given)


@dataclass(frozen=True)
class Config:
    """Run lmms-eval's tasks with this project's model. Other flags go to lmms-eval: --limit 20, --gen_kwargs ..."""

    tasks: str = setting("longva_tiny", "tasks of lmms-eval, between commas (Table 4)")
    weights: Path = setting(chat.TINY_MODEL, "model folder (ours)")
    frames: int = setting(32, "frames taken evenly from each video (Table 4: 8 to 384)")
    together: bool = setting(False, "all ranks share the cache of each film, for thousands of frames (ours)")
    out: Path = setting(Path("runs/benchmarks"), "folder of scores, samples, and answers to resume from (ours)")


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """(our flags, lmms-eval's) of a command line, each with its values."""
    names, ours, theirs = {"-h", "--help", "--no-together", *(f"--{f.name}" for f in fields(Config))}, [], []
    part = ours
    for word in words:
        if word.startswith("-"):
            part = ours if word.split("=")[0] in names else theirs
        part.append(word)
    return ours, theirs


def main(cfg: Config, theirs: list[str]) -> None:
    """Run lmms-eval; with --together on rank 0 alone, while the others compute their part of each answer."""
    if lmms is object:
        raise ValueError("lmms-eval is not installed here; requirements-eval.txt says how to install it")
    at_least(cfg, frames=1)
    if not isinstance(config.read_config(cfg.weights), config.LongVAConfig):
        raise ValueError(f"{cfg.weights} is a language model and cannot see; give a LongVA folder as --weights")
    hidden = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    device = str(ring.start().device)  # this rank's; it does not join the others yet
    if cfg.together and hidden:
        LongVA.torchrun = hidden | {"LOCAL_RANK": os.environ.pop("LOCAL_RANK")}
        if hidden["RANK"] != "0":
            follower = LongVA(str(cfg.weights), cfg.frames, device)
            while question := follower.exchange(""):
                follower.answer(*json.loads(question))
            return
    else:
        os.environ.update(hidden)
    os.environ.setdefault("HF_HOME", str(Path.home() / ".cache/huggingface"))  # some tasks fail without it
    os.environ.setdefault("LMMS_CACHE_RUN_ID", "longva")  # by which a killed run's answers are found again
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest

    MODEL_REGISTRY_V2.register_manifest(ModelManifest("longva", f"{__name__}.LongVA"), overwrite=True)
    model = f"weights={cfg.weights},frames={cfg.frames},device={device},hash={runs.fingerprints({'': cfg.weights})['']}"
    flags = {"model": "longva", "model_args": model, "tasks": cfg.tasks, "include_path": runs.TINY / "benchmark"}
    flags |= {"output_path": cfg.out, "use_cache": cfg.out / "cache"}
    sys.argv[1:] = [*(f"--{name}={value}" for name, value in flags.items()), "--log_samples", *theirs]
    before = {*cfg.out.glob("**/*_results.json")}
    cli_evaluate()
    if before == {*cfg.out.glob("**/*_results.json")} and hidden.get("RANK", "0") == "0":
        stop("lmms-eval ended without a score; its messages above say why")


if __name__ == "__main__":
    run(partial(main, theirs=split(sys.argv[1:])[1]), Config, argv=split(sys.argv[1:])[0])
