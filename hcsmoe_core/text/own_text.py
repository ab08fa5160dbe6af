"""Text that a model writes itself, to calibrate on where there is no other: sampled, seeded and cached."""

import contextlib
import hashlib
import math
import warnings
from collections import namedtuple
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from hcsmoe_core._util import InputError, check_choice, check_count, replacing, sha256_file, sha256_json
from hcsmoe_core.families import find_moe_layers, model_hash
from hcsmoe_core.moe import source_of
from hcsmoe_core.scale import ranks
from hcsmoe_core.statistics import OWN_TEXT as NAME

STARTS = ("", "token", "bos", "chat")
LOOP, PERIOD = 64, 16  # a document whose last LOOP tokens repeat every PERIOD tokens or sooner is ended
GRAM, REPEATED = 8, 0.5  # warn if more than this share of the GRAM-grams is repetition
USER = "hcsmoe-writes-here"  # stands for the user's turn while a chat template is read


@dataclass(frozen=True)
class Writing:
    """How a model writes; see :func:`own_text`."""

    temperature: float = 0.7
    start: str = ""
    batch: int = 32

    def __post_init__(self):
        if not (isinstance(self.temperature, (int, float)) and 0 < self.temperature < math.inf):
            raise InputError(
                f'The "temperature" argument must be a positive number; not {self.temperature!r}.'
            )
        check_choice("start", self.start, STARTS)
        check_count("batch", self.batch, 1)


def is_own(source: str | Path) -> bool:
    """Whether a calibration source is the model's own text."""
    return str(source).partition(":")[0] == NAME


def writing_of(source: str) -> Writing:
    """Settings of a source such as ``"self:temperature=1:start=chat"``."""
    types, settings = {"temperature": float, "start": str, "batch": int}, {}
    for item in filter(None, str(source).split(":")[1:]):
        name, _, value = item.partition("=")
        try:
            settings[name] = types[name](value)
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
    writing, shape = Writing(temperature, start, batch), (batch, length)
    rules = _rules(model, tokenizer, start)
    settings = dict(seed=seed, length=length, rules=rules, **asdict(writing))
    identity = [settings, model_hash(model), str(model.dtype), sha256_file(__file__)]
    name = f"{Path(str(model.name_or_path)).name or 'model'}-{sha256_json(identity)[:12]}"
    cache = None if folder is None else Path(folder) / name
    batches = {first: _cached(cache, first, shape) for first in range(0, sequences, batch)}
    if any(ids is None for ids in batches.values()):
        _write(model, batches, cache, shape, lambda *batch: _Writer(rules, temperature, length, seed, *batch))
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


def _cached(cache, first, shape):
    """The batch that begins with a sequence; None if it is absent, or damaged, which a warning says."""
    path = cache and cache / f"{first:06d}.safetensors"
    if path is None or not path.exists():
        return None
    with contextlib.suppress(OSError, SafetensorError, KeyError), safe_open(path, "pt") as file:
        ids, checksum = file.get_tensor("input_ids"), (file.metadata() or {}).get("sha256")
        if tuple(ids.shape) == shape and ids.dtype == torch.int64 and checksum == _checksum(ids):
            return ids
    warnings.warn(f"{path} was cut short or changed; the model writes this text again.", stacklevel=3)
    return None


def _checksum(ids):
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def _write(model, batches, cache, shape, writer):
    """Write the batches that are None; ranks share them where they are cached."""
    _check_writes(model)
    shared = cache is not None and ranks.size() > 1
    if shared:
        ranks.barrier()  # or what a quick rank has written is not on the list of a slow one
    absent = [first for first, ids in batches.items() if ids is None]
    todo = absent[ranks.rank() :: ranks.size()] if shared else absent
    total, hidden = len(todo) * math.prod(shape), True if ranks.rank() else None
    with tqdm(desc="writing own text", total=total, unit="token", unit_scale=True, disable=hidden) as bar:
        for first in todo:
            batches[first] = _generate(model, writer(range(first, first + shape[0]), bar))
            if cache is not None:
                with replacing(cache / f"{first:06d}.safetensors") as part:
                    checksum = {"sha256": _checksum(batches[first])}
                    save_file({"input_ids": batches[first]}, part, metadata=checksum)
    if shared:
        ranks.barrier()
        batches.update({first: _cached(cache, first, shape) for first in absent})
        if any(ids is None for ids in batches.values()):
            raise FileNotFoundError(
                f"{cache} lacks what another rank wrote; it is not on a disk that all ranks share."
            )


def _check_writes(model):
    """Raise InputError, with what to do, unless a model can write."""
    if source_of(model) is not None:
        raise InputError(
            f"{model.name_or_path} is streamed, and cannot write its own calibration text: all layers would "
            "be read from disk for every token. Write it where the model fits into memory and bring "
            "runs/own-text here, or give a data set or a file with --calibration."
        )
    if any(layer.merged for layer in find_moe_layers(model)):
        raise InputError(
            "This model is merged; let the original write its own text: restore(model), or load it again."
        )
    if not model.can_generate():
        raise InputError(
            f"{type(model).__name__} cannot generate text; give a data set or a file with --calibration."
        )


def _generate(model, writer):
    """One batch ``(B, S)``: the loop and cache of transformers, where the writer draws every token."""
    from transformers import GenerationConfig

    opening, length = writer.opening(), writer.numbers.shape[1]
    if length == 1:
        return opening
    prompt = opening.to(model.device)
    original, was_training = model.generation_config, model.training
    try:
        model.generation_config = GenerationConfig()  # or the checkpoint's fills in what ours leaves out
        config = GenerationConfig(do_sample=False, max_new_tokens=length - 1, use_cache=True)
        options = dict(attention_mask=torch.ones_like(prompt), logits_processor=[writer])
        return model.eval().generate(prompt, generation_config=config, **options).to("cpu", torch.int64)
    finally:
        model.generation_config = original
        model.train(was_training)


# How documents begin and end, in token ids: the tokens before a text; those of which one is drawn to follow
# them, if any; the chat template before and after the user's turn, if it is used; whether every second
# sequence alone is a chat; and the tokens that end a document, sorted.
_Rules = namedtuple("_Rules", "before first chat mixed ends")


class _Writer:
    """Logits processor that draws the next token of each row of a batch, and leaves ``generate`` no other.

    Each row has a random number per position, so that what it draws depends on no other row.
    """

    def __init__(self, rules, temperature, length, seed, rows, bar):
        self.rules, self.temperature, self.rows, self.bar = rules, temperature, rows, bar
        self.numbers = np.stack([np.random.default_rng([seed, row]).random(length) for row in rows])  # (B, S)
        self.queues = [[] for _ in rows]  # tokens that come next whatever the model predicts
        self.in_turn = [False for _ in rows]  # whether the user's turn is being written
        self.drawn = [False for _ in rows]  # whether the last token was the model's own

    def opening(self):
        """First token of each row, ``(B, 1)``."""
        for row in range(len(self.rows)):
            self._new_document(row, 0)
        return torch.tensor([[queue.pop(0)] for queue in self.queues])

    def __call__(self, input_ids, scores):
        """Scores ``(B, V)`` that leave one token per row, given the ids ``(B, S)`` so far."""
        step = input_ids.shape[1]
        tokens = self._draw(scores, self.numbers[:, step]).tolist()
        looping = _looping(input_ids)
        for row, last in enumerate(input_ids[:, -1].tolist()):
            queue = self.queues[row]
            if self.drawn[row] and self.in_turn[row] and last == self.rules.chat[1][0]:
                self.in_turn[row] = False
                queue.extend(self.rules.chat[1][1:])
            elif self.drawn[row] and last in self.rules.ends:
                self._new_document(row, step, [last])
                queue.pop(0)  # it has been written
            if looping[row] and not queue:
                self._new_document(row, step, self.rules.ends[:1])
            self.drawn[row] = not queue
            if queue:
                tokens[row] = queue.pop(0)
        self.bar.update(len(tokens))
        index = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, index, 0.0)

    def _draw(self, scores, numbers):
        """One token per row: the first whose cumulative probability exceeds the row's random number."""
        cumulative = (scores.double() / self.temperature).softmax(1).cumsum(1)
        total = cumulative[:, -1:]
        if not total.isfinite().all():
            raise InputError(
                "The model gives NaN where it should predict a token; its checkpoint is damaged."
            )
        thresholds = torch.tensor(numbers, device=scores.device)[:, None] * total
        return torch.searchsorted(cumulative, thresholds, right=True)[:, 0].clamp(max=scores.shape[1] - 1)

    def _new_document(self, row, step, ending=()):
        """Queue the tokens that end a document and begin the next; one that does both is queued once."""
        rules = self.rules
        self.in_turn[row] = bool(rules.chat) and (self.rows[row] % 2 == 1 or not rules.mixed)
        drawn = [rules.first[int(self.numbers[row, step] * len(rules.first))]] if rules.first else []
        opening = rules.chat[0] if self.in_turn[row] else rules.before + drawn
        self.queues[row].extend([*ending, *(opening[1:] if opening[:1] == [*ending] else opening)])


def _looping(input_ids):
    """Rows of ids ``(B, S)`` whose last LOOP tokens repeat; looked for every PERIOD steps."""
    count, size = input_ids.shape
    if size % PERIOD or size < LOOP + PERIOD:
        return [False] * count
    end = input_ids[:, -LOOP:]
    repeats = [(end == input_ids[:, -LOOP - period : -period]).all(1) for period in range(1, PERIOD + 1)]
    return torch.stack(repeats).any(0).tolist()


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
    if start == "chat" and not chat:
        raise InputError(
            f'The "start" argument is "chat", but {model.name_or_path} has no chat template whose user\'s '
            'turn ends with a special token; use "token" or "bos".'
        )
    opening, first = before or bos or sorted(ends)[:1], []
    if start == "bos" and not opening:
        raise InputError(
            f'The "start" argument is "bos", but {model.name_or_path} has no token that begins a text.'
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
    starts = [i for i in range(len(whole)) if whole[i : i + len(text)] == text]
    return [int(i) for i in whole[: starts[0]]] if starts else []


def _chat(tokenizer, special):
    """Tokens of the chat template before and after the user's turn; empty unless a special one ends it."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return ()
    turns = [{"role": "user", "content": USER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError):
        return ()
    before, _, after = text.partition(USER)
    encoded = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    return tuple(encoded) if all(encoded) and encoded[1][0] in special else ()
