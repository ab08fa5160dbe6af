"""Text that a model writes itself, to calibrate on where there is no other: sampled, seeded, kept as it is written."""

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

from hcsmoe_core._util import InputError, check_choice, check_count, place, replacing, sha256_json
from hcsmoe_core._version import __version__
from hcsmoe_core.families import find_moe_layers, model_hash
from hcsmoe_core.moe import source_of
from hcsmoe_core.scale import ranks
from hcsmoe_core.statistics import OWN_TEXT

NAME = OWN_TEXT


STARTS = ("", "token", "bos", "chat")


LOOP, PERIOD = 64, 16  # a document whose last LOOP tokens repeat every PERIOD tokens or sooner is ended


GRAM, REPEATED = (
    8,
    0.5,
)  # of its own text a model is told when more than this share of GRAM-grams are repetitions


USER = "hcsmoe-writes-here"  # stands for the user's turn while a chat template is read


@dataclass(frozen=True)
class Writing:
    """How a model writes: what a source such as ``"self:temperature=1:start=chat"`` says.

    Attributes
    ----------
    temperature : float
        What logits are divided by; 1 is the model's own distribution. Nothing is cut off.
    start : {"", "token", "bos", "chat"}
        How a document begins; see :func:`own_text`.
    batch : int
        Sequences that are written side by side.
    """

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


def is_own(source):
    """Whether a calibration source is the model's own text."""
    return str(source).partition(":")[0] == NAME


def writing_of(source):
    """How a model writes by a source such as ``"self:temperature=1:start=chat"``.

    Returns
    -------
    Writing

    Raises
    ------
    ValueError
        If the source says what is no setting, or a value that it cannot have.
    """
    kinds, given = {"temperature": float, "start": str, "batch": int}, {}
    for item in str(source).split(":")[1:]:
        name, equals, value = item.partition("=")
        try:
            given[name] = kinds[name](value) if equals else None
        except (KeyError, ValueError):
            given[name] = None
        if given[name] is None:
            raise InputError(
                f'The "source" argument is {source!r}, of which {item!r} is no setting: write self, or self with '
                f"temperature=NUMBER, start={'|'.join(STARTS[1:])} and batch=NUMBER, each after a colon."
            )
    return Writing(**given)


def own_text(
    model,
    tokenizer=None,
    *,
    sequences=32,
    length=2048,
    seed=42,
    temperature=Writing.temperature,
    start=Writing.start,
    batch=Writing.batch,
    folder="runs/own-text",
):
    """Blocks of token ids that the model writes itself.

    Every sequence is a stream of documents: when the model ends one (end of text, or end of turn), another is begun, as
    in packed text; so is it when the last 64 tokens repeat every 16 tokens or sooner. Tokens are drawn from the whole
    distribution that the model gives, at ``temperature``; the checkpoint's own generation settings (top-k, top-p,
    penalties, …) are set aside.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In memory and not merged; of one that is streamed or merged, there is only what the original wrote before.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Tells special tokens and the chat template; without it the configuration's beginning and end of text are known.
    sequences, length : int
        N and S, blocks and tokens in each.
    seed : int
        Each sequence has random numbers of its own, by ``seed`` and its place, so that asking for more only adds.
        ``batch`` and threads change what is written only as far as they change how logits are rounded.
    temperature : float
        What logits are divided by: 1 is the model's own distribution, errors included; below, text is cleaner and covers less.
        To calibrate on, 0.7 was better than 1 on the embedded models, half the loss where experts are unrelated; 0.5 and 0.85
        differ from it less than seeds do (``benchmarks/selfcal.py``).
    start : {"", "token", "bos", "chat"}
        What a document begins with:

        - ``"bos"``: the tokens that the tokenizer puts before a text; where there are none, the configuration's beginning of
          text, or its end: the model writes about each thing as often as it was taught to;
        - ``"token"``: the tokens before a text, if any, and a token of the vocabulary drawn evenly, none of the special or
          added ones;
        - ``"chat"``: the chat template up to the user's turn; the model writes that, and when it ends it, the template
          goes on and the model answers (as Magpie does, arXiv 2406.08464);
        - ``""``: ``"bos"``, or ``"token"`` for a model that has no such token; and where there is a chat template every
          second sequence ``"chat"``.
    batch : int
        Sequences that are written side by side.
    folder : str or path, optional
        Where what is written is kept, a file a batch, and read from by the next who asks; from the repository's root if
        it is relative. None keeps nothing.

    Returns
    -------
    (sequences, length) int64 tensor

    Raises
    ------
    ValueError
        If the model is streamed, merged or cannot generate, gives NaN, or a start is asked for that it cannot have.
    FileNotFoundError
        If ranks that share the work share no disk.

    Warns
    -----
    UserWarning
        If more than half of the text is repetition; see :func:`repetition`.
    """
    check_count("sequences", sequences, 1)
    check_count("length", length, 1)
    how = Writing(temperature, start, batch)
    rules = _rules(model, tokenizer, how.start)
    kept = None
    if folder is not None:
        key = asdict(how) | {
            "length": length,
            "seed": seed,
            "model": model_hash(model),
            "dtype": str(model.dtype),
        }
        key |= {"rules": rules.identity(), "core": __version__}
        kept = place(folder) / f"{Path(str(model.name_or_path)).name or 'model'}-{sha256_json(key)[:12]}"
    starts = list(range(0, sequences, batch))
    found = {first: _read(kept, first, (batch, length)) for first in starts}
    absent = [first for first in starts if found[first] is None]
    if absent:
        _check_writes(model)
        found |= _written(model, rules, how, absent, length=length, seed=seed, kept=kept)
    blocks = torch.cat([found[first] for first in starts])[:sequences]
    share = repetition(blocks)
    if share > REPEATED:
        warnings.warn(
            f"{share:.0%} of the {GRAM}-grams that {model.name_or_path} wrote are repetitions: its own text covers little. "
            "Write at a higher temperature (self:temperature=1), or calibrate on data.",
            stacklevel=2,
        )
    return blocks


def repetition(input_ids, n=GRAM):
    """Share of the n-grams of token ids that stood in the same sequence before, 0 (none) to 1.

    Parameters
    ----------
    input_ids : (N, S) int64 tensor
    n : int

    Returns
    -------
    float
        Of all n-grams of all sequences; 0 where there are none.
    """
    if input_ids.shape[1] < n:
        return 0.0
    grams = input_ids.unfold(1, n, 1)  # (N, S - n + 1, n)
    distinct = sum(len(rows.unique(dim=0)) for rows in grams)
    return 1 - distinct / (grams.shape[0] * grams.shape[1])


def _check_writes(model):
    """Raise ValueError, with what to do, unless a model can write."""
    instead = "give a data set or a file with --calibration"
    if source_of(model) is not None:
        raise InputError(
            f"{model.name_or_path} is streamed, and cannot write its own calibration text: all layers would be read from disk "
            f"for every token. Write it where the model fits into memory and bring runs/own-text here, or {instead}."
        )
    if any(layer.merged for layer in find_moe_layers(model)):
        raise InputError(
            "This model is merged; let the original write its own text: restore(model), or load it again."
        )
    if not model.can_generate():
        raise InputError(f"{type(model).__name__} cannot generate text; {instead}.")


def _read(kept, first, shape):
    """What was kept of the batch that begins with some sequence; None if that is nothing, or damaged."""
    if kept is None:
        return None
    try:
        ids = load_file(kept / f"{first:06d}.safetensors").get("input_ids")
    except (OSError, SafetensorError):
        return None
    return ids if ids is not None and tuple(ids.shape) == shape else None


def _written(model, rules, how, absent, *, length, seed, kept):
    """Batches by their first sequence, written now; ranks share them where they are kept."""
    shared = kept is not None and ranks.size() > 1
    if shared:
        ranks.barrier()  # or what a quick rank has written is missing from the list of a slow one
    mine, found = absent[ranks.rank() :: ranks.size()] if shared else absent, {}
    options = dict(total=len(mine) * how.batch * length, unit="token", unit_scale=True)
    with tqdm(desc="writing own text", disable=True if ranks.rank() else None, **options) as bar:
        for first in mine:
            writer = _Writer(rules, range(first, first + how.batch), how.temperature, length, seed, bar)
            found[first] = _generated(model, writer, length)
            if kept is not None:
                with replacing(kept / f"{first:06d}.safetensors") as part:
                    save_file({"input_ids": found[first]}, part)
    if shared:
        ranks.barrier()
        found = {first: _read(kept, first, (how.batch, length)) for first in absent}
        if any(ids is None for ids in found.values()):
            raise FileNotFoundError(
                f"{kept} lacks what another rank wrote; it is not on a disk that all ranks share."
            )
    return found


def _generated(model, writer, length):
    """One batch: transformers' own loop with the family's own cache, where every next token is the writer's."""
    from transformers import GenerationConfig

    opening = writer.opening()
    if length == 1:
        return opening
    prompt = opening.to(model.device)
    usual, was_training = model.generation_config, model.training
    try:
        model.generation_config = (
            GenerationConfig()
        )  # or the checkpoint's settings fill in what ours leaves out
        how = GenerationConfig(do_sample=False, max_new_tokens=length - 1, use_cache=True)
        options = dict(attention_mask=torch.ones_like(prompt), logits_processor=[writer])
        return model.eval().generate(prompt, generation_config=how, **options).to("cpu", torch.int64)
    finally:
        model.generation_config = usual
        model.train(was_training)


class _Writer:
    """Chooses every next token of a batch, and leaves ``generate`` no other.

    Each row has a random number for each of its places, so that what it draws depends on no other row.
    """

    def __init__(self, rules, rows, temperature, length, seed, bar):
        self.rules, self.rows, self.temperature, self.bar = rules, list(rows), temperature, bar
        self.numbers = np.stack([np.random.default_rng([seed, row]).random(length) for row in rows])  # (B, S)
        self.given = [deque() for _ in rows]  # tokens that come next whatever the model thinks
        self.asking = [False] * len(rows)  # whether the user's turn is being written
        self.drawn = [False] * len(rows)  # whether the last token was the model's own

    def opening(self):
        """First token of each row, ``(B, 1)``."""
        for row in range(len(self.rows)):
            self._begin(row, 0)
        return torch.tensor([[given.popleft()] for given in self.given])

    def __call__(self, input_ids, scores):
        """Scores ``(B, V)`` that leave one token a row, given the ids ``(B, S)`` so far."""
        step = input_ids.shape[1]
        chosen = self._draw(scores, self.numbers[:, step]).tolist()
        looping = _looping(input_ids)
        for row, last in enumerate(input_ids[:, -1].tolist()):
            if self.drawn[row]:
                self._follow(row, last, step)
            if looping[row] and not self.given[row]:
                self._begin(row, step, self.rules.ending)
            self.drawn[row] = not self.given[row]
            if self.given[row]:
                chosen[row] = self.given[row].popleft()
        self.bar.update(len(chosen))
        return torch.full_like(scores, -torch.inf).scatter(
            1, torch.tensor(chosen, device=scores.device)[:, None], 0.0
        )

    def _draw(self, scores, numbers):
        """One token a row: the first whose cumulated probability is above the row's random number."""
        cumulated = (scores.double() / self.temperature).softmax(1).cumsum(1)
        total = cumulated[:, -1:]
        if not total.isfinite().all():
            raise InputError(
                "The model gives NaN where it should predict a token; its checkpoint is damaged."
            )
        wanted = torch.tensor(numbers, device=scores.device)[:, None] * total
        return torch.searchsorted(cumulated, wanted, right=True)[:, 0].clamp(max=scores.shape[1] - 1)

    def _begin(self, row, step, before=()):
        """A new document in a row, after the tokens that end the old one; those are not given twice."""
        self.asking[row] = self.rules.chats(self.rows[row])
        given = self.rules.document(self.asking[row], self.numbers[row, step])
        self.given[row].extend([*before, *(given[1:] if [*before] == given[:1] else given)])

    def _follow(self, row, last, step):
        """What comes after a token that the model has drawn, if that ended something."""
        if self.asking[row] and last == self.rules.chat[1][0]:
            self.asking[row] = False
            self.given[row].extend(self.rules.chat[1][1:])
        elif last in self.rules.ends:
            self._begin(row, step, (last,))
            self.given[row].popleft()  # it stands there already


def _looping(input_ids):
    """Rows of ids ``(B, S)`` whose last LOOP tokens each stand some 1 to PERIOD places before, too; looked for now and then."""
    count, size = input_ids.shape
    if size % PERIOD or size < LOOP + PERIOD:
        return [False] * count
    end = input_ids[:, -LOOP:]
    return (
        torch.stack([(end == input_ids[:, -LOOP - p : -p]).all(1) for p in range(1, PERIOD + 1)])
        .any(0)
        .tolist()
    )


@dataclass(frozen=True)
class _Rules:
    """How documents begin and end, in token ids."""

    before: list  # what is put before a text
    first: np.ndarray  # of which one is drawn; may be empty
    chat: tuple  # the template before and after the user's turn; empty if it is not used
    mixed: bool  # every second sequence is a chat, rather than all
    ends: frozenset

    @property
    def ending(self):
        """The token that ends a document which the model does not end; none where none ends one."""
        return tuple(sorted(self.ends)[:1])

    def identity(self):
        """What tells these rules from others, as a JSON value."""
        return [self.before, self.first.tolist(), self.chat, self.mixed, sorted(self.ends)]

    def chats(self, row):
        return bool(self.chat) and (row % 2 == 1 or not self.mixed)

    def document(self, chat, number):
        """Tokens that a document begins with, a drawn one by a random number from 0 to 1."""
        if chat:
            return list(self.chat[0])
        return self.before + [int(i) for i in self.first[int(number * len(self.first)) :][:1]]


def _rules(model, tokenizer, start):
    """Rules of a model and its tokenizer for a start."""
    size, config = model.get_input_embeddings().num_embeddings, model.config.get_text_config()
    named = {n: _ids(getattr(config, f"{n}_token_id", None), size) for n in ("bos", "eos", "pad")}
    ends = {
        *named["eos"],
        *_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None), size),
    }
    if tokenizer is None:
        before, chat = named["bos"], ()
        special, known = {i for ids in named.values() for i in ids}, range(size)
    else:
        ends |= {*_ids(tokenizer.eos_token_id, size)}
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        known = tokenizer.get_vocab().values()
        before = _leading(tokenizer)
        chat = _chat(tokenizer, special) if start in ("", "chat") else ()
    if start == "chat" and not chat:
        raise InputError(
            f'The "start" argument is "chat", but {model.name_or_path} has no chat template whose user\'s turn ends with a '
            'special token; use "token" or "bos".'
        )
    opening = before or named["bos"] or sorted(ends)[:1]
    if start == "bos" and not opening:
        raise InputError(
            f'The "start" argument is "bos", but {model.name_or_path} has no token that begins a text.'
        )
    first = []
    if start == "token" or not opening:
        opening, first = before, sorted(i for i in set(known) - special if i < size)
    return _Rules(opening, np.array(first, dtype=np.int64), chat, start == "", frozenset(ends))


def _ids(value, size):
    """Token ids of a configuration's entry, which may be none, one or a list; ids beyond the vocabulary are left out."""
    listed = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    return [int(i) for i in listed if i < size]


def _leading(tokenizer):
    """The tokens that a tokenizer puts before a text."""
    whole, text = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    places = [i for i in range(len(whole)) if whole[i : i + len(text)] == text]
    return [int(i) for i in whole[: places[0]]] if places else []


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
    parts = tuple(
        [int(i) for i in tokenizer(part, add_special_tokens=False)["input_ids"]] for part in (before, after)
    )
    return parts if all(parts) and parts[1][0] in special else ()
