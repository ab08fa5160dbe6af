"""Text that a model writes itself, to calibrate on where there is no other: sampled, seeded and cached."""

import contextlib
import hashlib
import json
import math
import subprocess
import sys
import warnings
from collections import namedtuple
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from tqdm.auto import tqdm

from hcsmoe_core import families, moe
from hcsmoe_core._util import (
    InputError,
    check_choice,
    check_count,
    replacing,
    require,
    sha256_file,
    sha256_json,
)
from hcsmoe_core.scale import ranks
from hcsmoe_core.statistics import OWN_TEXT as NAME

STARTS = ("", "token", "bos", "chat")
LOOP, PERIOD = 64, 16  # a document whose last LOOP tokens repeat every PERIOD tokens or sooner is ended
GRAM, REPEATED = 8, 0.5  # warn if more than this share of the GRAM-grams is repetition
USER = "hcsmoe-writes-here"  # stands for the user's turn while a chat template is read
# A chat template is a stranger's program. It runs in transformers' sandbox, in a process of its own that may
# take so many seconds, bytes of memory and characters.
SECONDS, BYTES, CHARACTERS = 20, 1 << 31, 1 << 20
RENDER = """
import contextlib, json, sys
from transformers.utils.chat_template_utils import render_jinja_template
options = json.load(sys.stdin)
with contextlib.suppress(ImportError):  # on Windows, where the time alone is limited
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (options["bytes"], options["bytes"]))
texts, _ = render_jinja_template([options["chat"]], add_generation_prompt=True, **options["template"])
sys.stdout.write(json.dumps(texts[0][:options["characters"] + 1]))
"""


@dataclass(frozen=True)
class Writing:
    """How a model writes; see :func:`own_text`."""

    temperature: float = 0.7
    start: str = ""
    batch: int = 32

    def __post_init__(self):
        require(
            isinstance(self.temperature, (int, float)) and 0 < self.temperature < math.inf,
            f'The "temperature" argument must be a positive number; not {self.temperature!r}.',
        )
        check_choice("start", self.start, STARTS)
        check_count("batch", self.batch, 1)


def is_own(source: str | Path) -> bool:
    """Whether a calibration source is the model's own text."""
    return str(source).partition(":")[0] == NAME


def writing_of(source: str) -> Writing:
    """Settings of a source such as ``"self:temperature=1:start=chat"``."""
    settings = {}
    for item in filter(None, str(source).split(":")[1:]):
        name, _, value = item.partition("=")
        try:
            settings[name] = Writing.__annotations__[name](value)
        except (KeyError, ValueError):
            raise InputError(
                f'The "source" argument is {source!r}, of which {item!r} is no setting: write self, or self '
                f"with temperature=NUMBER, start={'|'.join(STARTS[1:])} and batch=NUMBER, each after a colon."
            ) from None
    return Writing(**settings)


def own_text(
    model,
    tokenizer=None,
    *,
    sequences: int = 32,
    length: int = 2048,
    seed: int = 42,
    temperature: float = Writing.temperature,
    start: str = Writing.start,
    batch: int = Writing.batch,
    folder: str | Path | None = "runs/own-text",
) -> torch.Tensor:
    """Token ids ``(sequences, length)`` that the model writes itself, int64.

    Each sequence is a stream of documents: where the model ends one, or repeats itself, the next begins. The
    checkpoint's generation settings are ignored. Streamed and merged models only have what is cached.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        For special tokens and the chat template; without it those of the configuration are used.
    seed : int
        Each sequence has its own random numbers, so that asking for more only adds.
    temperature : float
        Divides the logits; 1 samples the model's own distribution, 0.7 calibrated better.
    start : {"", "bos", "token", "chat"}
        How a document begins: as the tokenizer begins a text; the same and a token drawn evenly from the
        vocabulary; the chat template, whose user's turn the model writes too (Magpie, arXiv 2406.08464). By
        default ``"bos"``, or else ``"token"``, and every second sequence ``"chat"`` if there is a template.
    batch : int
        Sequences written side by side.
    folder : str or path, optional
        Cache, one file per batch, relative to the working directory; None writes none.

    Raises
    ------
    InputError
        If the model is streamed or merged, cannot generate, gives NaN, or lacks the ``start``.
    FileNotFoundError
        If ranks that share the work share no disk.
    """
    check_count("sequences", sequences, 1)
    check_count("length", length, 1)
    writing, rules = Writing(temperature, start, batch), _rules(model, tokenizer, start)
    hashes = [families.model_hash(model), sha256_file(__file__)]
    identity = sha256_json([seed, length, rules, asdict(writing), str(model.dtype), *hashes])
    name = f"{Path(str(model.name_or_path)).name or 'model'}-{identity[:12]}"
    cache = None if folder is None else Path(folder) / name
    batches = {first: _cached(cache, first) if cache else None for first in range(0, sequences, batch)}
    if any(ids is None for ids in batches.values()):
        _check_writes(model)
        _write(batches, cache, (batch, length), partial(_batch, model, rules, temperature, seed, length))
    ids = torch.cat(list(batches.values()))[:sequences]
    if (share := repetition(ids)) > REPEATED:
        warnings.warn(
            f"{share:.0%} of the {GRAM}-grams that {model.name_or_path} wrote are repetitions: its own text "
            "covers little. Write at a higher temperature (self:temperature=1), or calibrate on data.",
            stacklevel=2,
        )
    return ids


def repetition(input_ids: torch.Tensor, n: int = GRAM) -> float:
    """Share of the n-grams of token ids ``(N, S)`` that occurred earlier in their sequence, 0 (none) to 1.

    :func:`own_text` warns if it is above one half.
    """
    if input_ids.shape[1] < n:
        return 0.0
    grams = input_ids.unfold(1, n, 1)  # (N, S - n + 1, n)
    distinct = sum(len(rows.unique(dim=0)) for rows in grams)
    return 1 - distinct / (grams.shape[0] * grams.shape[1])


def _cached(cache, first):
    """The batch that begins with a sequence; None if it is absent, or damaged, which a warning says."""
    path = cache / f"{first:06d}.safetensors"
    if not path.exists():
        return None
    with (
        contextlib.suppress(OSError, KeyError, safetensors.SafetensorError),
        safetensors.safe_open(path, "pt") as file,
    ):
        ids, checksum = file.get_tensor("input_ids"), (file.metadata() or {}).get("sha256")
        if checksum == _checksum(ids):
            return ids
    warnings.warn(f"{path} was cut short or changed; the model writes this text again.", stacklevel=3)
    return None


def _checksum(ids):
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def _check_writes(model):
    """Raise InputError, with what to do, unless a model can write."""
    require(
        moe.source_of(model) is None,
        f"{model.name_or_path} is streamed, and cannot write its own calibration text: all layers would be "
        "read from disk for every token. Write it where the model fits into memory and bring runs/own-text "
        "here, or give a data set or a file with --calibration.",
    )
    require(
        not any(layer.merged for layer in families.find_moe_layers(model)),
        "This model is merged; let the original write its own text: restore(model), or load it again.",
    )
    require(
        model.can_generate(),
        f"{type(model).__name__} cannot generate text; give a data set or a file with --calibration.",
    )


def _write(batches, cache, shape, write):
    """Write the batches ``(B, S)`` that are None; ranks share them where they are cached."""
    rank, size = (ranks.rank(), ranks.size()) if cache else (0, 1)
    if size > 1:
        ranks.barrier()  # or what a quick rank has written is not on the list of a slow one
    absent = [first for first, ids in batches.items() if ids is None]
    own, hidden = absent[rank::size], True if ranks.rank() else None
    total = len(own) * math.prod(shape)
    with tqdm(desc="writing own text", total=total, unit="token", unit_scale=True, disable=hidden) as bar:
        for first in own:
            batches[first] = write(range(first, first + shape[0]), bar)
            if cache:
                with replacing(cache / f"{first:06d}.safetensors") as part:
                    checksum = {"sha256": _checksum(batches[first])}
                    safetensors.torch.save_file({"input_ids": batches[first]}, part, metadata=checksum)
    if size > 1:
        ranks.barrier()
        batches.update({first: _cached(cache, first) for first in absent})
        if any(ids is None for ids in batches.values()):
            raise FileNotFoundError(
                f"{cache} lacks what another rank wrote; it is not on a disk that all ranks share."
            )


def _batch(model, rules, temperature, seed, length, rows, bar):
    """The sequences ``(B, S)`` of some row numbers: the loop and cache of transformers, to which each step
    leaves one token per row. Each row has a random number per position, so that it depends on no other row.
    """
    from transformers import GenerationConfig

    numbers = np.stack([np.random.default_rng([seed, row]).random(length) for row in rows])  # (B, S)
    written = [[] for _ in rows]
    texts = [_text(rules, *row) for row in zip(rows, numbers, written, strict=True)]

    def append(drawn):
        """Append to each row its next token, or the one drawn if it leaves that to the model; ``(B, 1)``."""
        for ids, text, own in zip(written, texts, drawn, strict=True):
            token = next(text)
            ids.append(own if token is None else token)
        bar.update(len(written))
        return torch.tensor([ids[-1:] for ids in written], device=model.device)

    def choose(input_ids, scores):
        tokens = append(_drawn(scores, temperature, numbers[:, input_ids.shape[1]]))
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.to(scores.device), 0.0)

    prompt = append([None] * len(rows))
    with contextlib.ExitStack() as undo:
        undo.callback(model.train, model.training)
        undo.callback(setattr, model, "generation_config", model.generation_config)
        # The checkpoint's own would fill in what is left out here.
        model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=length - 1 or None)
        if length > 1:
            mask = torch.ones_like(prompt)
            model.eval().generate(prompt, attention_mask=mask, logits_processor=[choose])
    return torch.tensor(written)


# How documents begin and end, in token ids: the tokens before a text; those of which one is drawn to follow
# them, if any; the chat template before and after the user's turn, if it is used; whether every second
# sequence alone is a chat; and the tokens that end a document, sorted.
_Rules = namedtuple("_Rules", "before first chat mixed ends")


def _text(rules, row, numbers, ids):
    """The tokens that follow the ``ids`` so far of a row, one by one; None where the model draws the next."""
    ending, written = [], 0  # tokens that end the document before, and how many of them are written
    while True:
        in_turn = bool(rules.chat) and (row % 2 == 1 or not rules.mixed)  # whether the user speaks
        drawn = [rules.first[int(numbers[len(ids)] * len(rules.first))]] if rules.first else []
        opening = rules.chat[0] if in_turn else rules.before + drawn
        # A token that both ends and begins a document is written once.
        yield from [*ending, *(opening[1:] if opening[:1] == ending else opening)][written:]
        while not _loops(ids):
            yield None
            if in_turn and ids[-1] == rules.chat[1][0]:
                in_turn = False
                yield from rules.chat[1][1:]
            elif ids[-1] in rules.ends:
                ending, written = ids[-1:], 1
                break
        else:
            ending, written = rules.ends[:1], 0


def _loops(ids):
    """Whether the last LOOP tokens repeat; looked for every PERIOD steps."""
    looked_for = len(ids) % PERIOD == 0 and len(ids) >= LOOP + PERIOD
    return looked_for and any(ids[-LOOP:] == ids[-LOOP - n : -n] for n in range(1, PERIOD + 1))


def _drawn(scores, temperature, numbers):
    """One token per row: the first whose cumulative probability exceeds the row's random number."""
    cumulative = (scores.double() / temperature).softmax(1).cumsum(1)
    total = cumulative[:, -1:]
    require(
        total.isfinite().all(),
        "The model gives NaN where it should predict a token; its checkpoint is damaged.",
    )
    thresholds = torch.tensor(numbers, device=scores.device)[:, None] * total
    return (
        torch.searchsorted(cumulative, thresholds, right=True)[:, 0].clamp(max=scores.shape[1] - 1).tolist()
    )


def _rules(model, tokenizer, start):
    """Rules of a model and its tokenizer for a ``start``."""
    size, config = model.get_input_embeddings().num_embeddings, model.config.get_text_config()
    bos, eos, pad = (_ids(getattr(config, f"{name}_token_id", None), size) for name in ("bos", "eos", "pad"))
    ends = {*eos, *_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None), size)}
    before, chat, special, vocabulary = bos, (), {*bos, *eos, *pad}, range(size)
    if tokenizer is not None:
        ends |= {*_ids(tokenizer.eos_token_id, size)}
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        vocabulary = tokenizer.get_vocab().values()
        before = _leading(tokenizer)
        chat = _chat(tokenizer, special) if start in ("", "chat") else ()
    require(
        chat or start != "chat",
        f'The "start" argument is "chat", but {model.name_or_path} has no chat template whose user\'s turn '
        'ends with a special token; use "token" or "bos".',
    )
    opening, first = before or bos or sorted(ends)[:1], []
    require(
        opening or start != "bos",
        f'The "start" argument is "bos", but {model.name_or_path} has no token that begins a text.',
    )
    if start == "token" or not opening:
        opening, first = before, sorted(i for i in {*vocabulary} - special if i < size)
    return _Rules(opening, first, chat, start == "", sorted(ends))


def _ids(value, size):
    """Token ids of a configuration's entry (None, one or a list) that are in the vocabulary."""
    return [int(i) for i in np.ravel([] if value is None else value) if i < size]


def _leading(tokenizer):
    """The tokens that a tokenizer puts before a text."""
    whole, text = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(text)] == text), [])


def _chat(tokenizer, special):
    """Tokens of the chat template before and after the user's turn; empty unless a special one ends it."""
    if not tokenizer.chat_template:
        return ()
    text = _rendered(tokenizer)
    encoded = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.partition(USER)[::2]]
    return tuple(encoded) if all(encoded) and encoded[1][0] in special else ()


def _rendered(tokenizer):
    """The chat template around the user's turn; empty if it refuses such a chat."""
    template = {"chat_template": tokenizer.get_chat_template(), **tokenizer.special_tokens_map}
    chat = [{"role": "user", "content": USER}]
    options = {"chat": chat, "template": template, "bytes": BYTES, "characters": CHARACTERS}
    command = [sys.executable, "-P", "-c", RENDER]
    try:
        run = subprocess.run(
            command, input=json.dumps(options).encode(), capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        reason = f"it is not done within {SECONDS} seconds"
    else:
        text = "" if run.returncode else json.loads(run.stdout)
        reason = f"it gives more than {CHARACTERS:,} characters" if len(text) > CHARACTERS else ""
        if run.returncode:
            reason = (run.stderr.decode(errors="replace").strip() or "its process died").splitlines()[-1]
    if reason.startswith("jinja2.exceptions."):
        return ""
    require(
        not reason,
        f"The chat template of {tokenizer.name_or_path} cannot be used: {reason}. Let the model write "
        f"without it ({NAME}:start=bos), or mend the template.",
    )
    return text
