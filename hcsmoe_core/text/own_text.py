"""Text that a model writes itself, to calibrate on where there is no other: sampled, seeded and cached."""

import math
import warnings
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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
    """Settings of a source such as ``"self:temperature=1:start=chat"``; raises InputError if it is malformed."""
    types, settings = {"temperature": float, "start": str, "batch": int}, {}
    for item in filter(None, str(source).split(":")[1:]):
        name, _, value = item.partition("=")
        try:
            settings[name] = types[name](value)
        except (KeyError, ValueError):
            raise InputError(
                f'The "source" argument is {source!r}, of which {item!r} is no setting: write self, or self with '
                f"temperature=NUMBER, start={'|'.join(STARTS[1:])} and batch=NUMBER, each after a colon."
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

    Each sequence is a stream of documents, as in packed text: where the model ends one, or repeats itself, the next
    begins. The checkpoint's own generation settings (top-k, penalties, …) are set aside. Of a model that is streamed or
    merged, only cached text is available. Warns if more than half is repetition (:func:`repetition`).

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        For special tokens and the chat template; without it the configuration's beginning and end of text are used.
    seed : int
        Each sequence has its own random numbers, so that asking for more only adds.
    temperature : float
        Divides the logits; 1 samples the model's own distribution. 0.7 calibrates better on the embedded models.
    start : {"", "token", "bos", "chat"}
        How a document begins. ``"bos"``: as the tokenizer begins a text. ``"token"``: followed by a token drawn evenly
        from the vocabulary. ``"chat"``: the chat template; the model writes the user's turn, too, and answers (Magpie,
        arXiv 2406.08464). ``""``: ``"bos"`` if there is one, and every second sequence ``"chat"`` if there is one.
    batch : int
        Sequences written side by side; changes the text only through rounding.
    folder : str or path, optional
        Cache, one file per batch; None writes none.

    Raises
    ------
    InputError
        If the model is streamed, merged, cannot generate or gives NaN, or lacks the ``start``.
    FileNotFoundError
        If ranks that share the work share no disk.
    """
    check_count("sequences", sequences, 1)
    check_count("length", length, 1)
    writing = Writing(temperature, start, batch)
    writer = _Writer(_rules(model, tokenizer, start), writing, length, seed)
    cache = None if folder is None else Path(folder) / _cache_name(model, writer)
    batches = {first: _cached(cache, first, (batch, length)) for first in range(0, sequences, batch)}
    if any(ids is None for ids in batches.values()):
        _write(model, writer, batches, cache)
    ids = torch.cat(list(batches.values()))[:sequences]
    if (share := repetition(ids)) > REPEATED:
        warnings.warn(
            f"{share:.0%} of the {GRAM}-grams that {model.name_or_path} wrote are repetitions: its own text covers "
            "little. Write at a higher temperature (self:temperature=1), or calibrate on data.",
            stacklevel=2,
        )
    return ids


def repetition(input_ids: torch.Tensor, n: int = GRAM) -> float:
    """Share of the n-grams of token ids ``(N, S)`` that occurred earlier in their sequence, 0 (none) to 1."""
    if input_ids.shape[1] < n:
        return 0.0
    grams = input_ids.unfold(1, n, 1)  # (N, S - n + 1, n)
    distinct = sum(len(rows.unique(dim=0)) for rows in grams)
    return 1 - distinct / (grams.shape[0] * grams.shape[1])


def _cache_name(model, writer):
    """Folder name of all batches that a model writes with the same settings, by the code of this file."""
    settings = asdict(writer.writing) | {"length": writer.length, "seed": writer.seed}
    settings |= {"model": model_hash(model), "dtype": str(model.dtype)}
    settings |= {"rules": asdict(writer.rules), "code": sha256_file(__file__)}
    return f"{Path(str(model.name_or_path)).name or 'model'}-{sha256_json(settings)[:12]}"


def _cached(cache, first, shape):
    """The batch that begins with a sequence; None if it is absent or damaged."""
    try:
        ids = load_file(cache / f"{first:06d}.safetensors").get("input_ids") if cache else None
    except (OSError, SafetensorError):
        return None
    return ids if ids is not None and tuple(ids.shape) == shape else None


def _write(model, writer, batches, cache):
    """Write the batches that are None; ranks share them where they are cached."""
    _check_writes(model)
    shared = cache is not None and ranks.size() > 1
    if shared:
        ranks.barrier()  # or what a quick rank has written is not on the list of a slow one
    absent, shape = (
        [first for first, ids in batches.items() if ids is None],
        (writer.writing.batch, writer.length),
    )
    todo = absent[ranks.rank() :: ranks.size()] if shared else absent
    options = dict(desc="writing own text", total=len(todo) * math.prod(shape), unit="token", unit_scale=True)
    with tqdm(disable=True if ranks.rank() else None, **options) as bar:
        for first in todo:
            writer.begin(first, bar)
            batches[first] = _generate(model, writer)
            if cache is not None:
                with replacing(cache / f"{first:06d}.safetensors") as part:
                    save_file({"input_ids": batches[first]}, part)
    if shared:
        ranks.barrier()
        batches.update({first: _cached(cache, first, shape) for first in absent})
        if any(ids is None for ids in batches.values()):
            raise FileNotFoundError(
                f"{cache} lacks what another rank wrote; it is not on a disk that all ranks share."
            )


def _check_writes(model):
    """Raise InputError, with what to do, unless a model can write."""
    instead = "give a data set or a file with --calibration"
    if source_of(model) is not None:
        raise InputError(
            f"{model.name_or_path} is streamed, and cannot write its own calibration text: all layers would be read "
            "from disk for every token. Write it where the model fits into memory and bring runs/own-text here, or "
            f"{instead}."
        )
    if any(layer.merged for layer in find_moe_layers(model)):
        raise InputError(
            "This model is merged; let the original write its own text: restore(model), or load it again."
        )
    if not model.can_generate():
        raise InputError(f"{type(model).__name__} cannot generate text; {instead}.")


def _generate(model, writer):
    """One batch ``(B, S)``: the loop and cache of transformers, where the writer draws every token."""
    from transformers import GenerationConfig

    opening = writer.opening()
    if writer.length == 1:
        return opening
    prompt = opening.to(model.device)
    original, was_training = model.generation_config, model.training
    try:
        model.generation_config = (
            GenerationConfig()
        )  # or the checkpoint's settings fill in what ours leaves out
        config = GenerationConfig(do_sample=False, max_new_tokens=writer.length - 1, use_cache=True)
        options = dict(attention_mask=torch.ones_like(prompt), logits_processor=[writer])
        return model.eval().generate(prompt, generation_config=config, **options).to("cpu", torch.int64)
    finally:
        model.generation_config = original
        model.train(was_training)


@dataclass(frozen=True)
class _Rules:
    """How documents begin and end, in token ids."""

    before: list  # tokens before a text
    first: list  # tokens of which one is drawn to follow those; may be empty
    chat: tuple  # the template before and after the user's turn; empty if it is not used
    mixed: bool  # only every second sequence is a chat
    ends: list  # tokens that end a document, sorted


class _Writer:
    """Logits processor that draws the next token of each row of a batch, and leaves ``generate`` no other.

    Each row has a random number per position, so that what it draws depends on no other row.
    """

    def __init__(self, rules, writing, length, seed):
        self.rules, self.writing, self.length, self.seed = rules, writing, length, seed

    def begin(self, first, bar):
        """Begin the batch whose first sequence is ``first``."""
        self.bar, self.rows = bar, range(first, first + self.writing.batch)
        generators = [np.random.default_rng([self.seed, row]) for row in self.rows]
        self.numbers = np.stack([generator.random(self.length) for generator in generators])  # (B, S)
        self.queues = [deque() for _ in self.rows]  # tokens that come next whatever the model predicts
        self.in_turn = [False for _ in self.rows]  # whether the user's turn is being written
        self.drawn = [False for _ in self.rows]  # whether the last token was the model's own

    def opening(self):
        """First token of each row, ``(B, 1)``."""
        for row in range(len(self.rows)):
            self._new_document(row, 0)
        return torch.tensor([[queue.popleft()] for queue in self.queues])

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
                queue.popleft()  # it has been written
            if looping[row] and not queue:
                self._new_document(row, step, self.rules.ends[:1])
            self.drawn[row] = not queue
            if queue:
                tokens[row] = queue.popleft()
        self.bar.update(len(tokens))
        index = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, index, 0.0)

    def _draw(self, scores, numbers):
        """One token per row: the first whose cumulative probability exceeds the row's random number."""
        cumulative = (scores.double() / self.writing.temperature).softmax(1).cumsum(1)
        total = cumulative[:, -1:]
        if not total.isfinite().all():
            raise InputError("The model predicts NaN; its checkpoint is damaged.")
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
    """Rows of ids ``(B, S)`` whose last LOOP tokens repeat every 1 to PERIOD tokens; looked for every PERIOD steps."""
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
            f'The "start" argument is "chat", but {model.name_or_path} has no chat template whose user\'s turn ends '
            'with a special token; use "token" or "bos".'
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
    """Token ids of a configuration's entry, which may be None, one or a list; those beyond the vocabulary are dropped."""
    return [int(i) for i in np.ravel([] if value is None else value) if i < size]


def _leading(tokenizer):
    """The tokens that a tokenizer puts before a text."""
    whole, text = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    starts = [i for i in range(len(whole)) if whole[i : i + len(text)] == text]
    return [int(i) for i in whole[: starts[0]]] if starts else []


def _chat(tokenizer, special):
    """The chat template's tokens before and after the user's turn; empty unless a special token ends the turn."""
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
