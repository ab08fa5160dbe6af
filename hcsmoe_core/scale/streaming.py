"""Models that need not fit into memory: capture and merge layer by layer, resumable at any layer.

A streamed model is transformers' own, built and loaded by ``from_pretrained``, except that the weights of its
decoder layers stay on the meta device until they are asked for. transformers' own loading, with its weight
conversion and dequantisation, then reads them one layer at a time. A capture runs the model's own forward
once per layer and batch: the layers before the present one only return what the last of them returned before,
so that masks, rotary tables and whatever else a layer is passed are the model's own.
"""

import ast
import contextlib
import ctypes
import json
import os
import shutil
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path

import psutil
import torch
from accelerate.utils import convert_file_size_to_int, recursively_apply
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hcsmoe_core import _transformers
from hcsmoe_core._util import (
    InputError,
    check_absent,
    check_choice,
    folder_of,
    read_json,
    replacing,
    sha256_json,
    write_json,
)
from hcsmoe_core._version import __version__
from hcsmoe_core.checkpoint import (
    DEVICE_MAPS,
    WEIGHTS,
    check_conversion,
    device_of,
    exported,
    finish,
    load_model,
    load_skeleton,
    load_tokenizer,
    load_with,
    merge_record,
    on_disk,
    opened,
    parts_of,
    SHARD,
    target_of,
    without_bars,
    write_part,
)
from hcsmoe_core.collect import Tokens, forward_options, needs_of
from hcsmoe_core.families import decoder_layers, find_moe_layers
from hcsmoe_core.merging import apply_layer, check_applicable, restore
from hcsmoe_core.moe import check_loaded, fingerprint, source_of
from hcsmoe_core.scale import ranks
from hcsmoe_core.statistics import SAMPLE, Statistics, load_statistics

LOADS = ("auto", "whole", "streamed")

# Measured peaks of memory over bytes of weights: a whole model beside its shards and then its merged experts,
# and a decoder layer beside its tensors on disk.
WHOLE, LAYER = 2.75, 2.5


def open_model(model, *, dtype="auto", device="auto", load: str = "auto", memory: str = "") -> tuple:
    """Load a model whole if it fits into memory, or to be streamed if it does not.

    Parameters
    ----------
    model, dtype, device
        As for :func:`hcsmoe_core.checkpoint.load_model`.
    load : {"auto", "whole", "streamed"}
    memory : str
        Most memory that this process may use, such as ``"3GB"`` or ``"900 MiB"``; by default what is free.

    Returns
    -------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase or None

    Raises
    ------
    FileNotFoundError, InputError
        As :func:`hcsmoe_core.checkpoint.load_model`; InputError also if not even one decoder layer fits.
    """
    check_choice("load", load, LOADS)
    limit = _bytes_of(memory) if memory else free_memory("cpu") + _resident_memory()
    if load == "auto":
        spread = device in DEVICE_MAPS or merge_record(folder_of(model))
        load = "whole" if spread or _fits(model, dtype, device, limit) else "streamed"
    if load == "whole":
        return load_model(model, dtype=dtype, device=device)
    streamed, tokenizer = stream_model(model, dtype=dtype, device=device)
    need = _resident_memory() + LAYER * source_of(streamed).largest()
    if memory and need > limit:
        raise InputError(
            f'The "memory" argument is {memory}, but with the largest decoder layer of {model} in memory '
            f"this process takes about {need / 1e9:.2f} GB; give more."
        )
    return streamed, tokenizer


def _fits(model, dtype, device, limit):
    """Whether a model fits into memory, with what merging adds."""
    parameters = load_skeleton(model, dtype=dtype).parameters()
    peak = WHOLE * sum(p.numel() * p.element_size() for p in parameters)
    return peak + _resident_memory() <= limit and peak <= free_memory(device_of(device))


def _bytes_of(memory):
    try:
        return convert_file_size_to_int(str(memory).strip().upper())  # in lower case it would read bits
    except ValueError:
        raise InputError(
            f'The "memory" argument must be a size such as 3GB, 500MB or 2GiB; not {memory!r}.'
        ) from None


def free_memory(device) -> int:
    """Bytes of memory that are free, of the system or of a GPU."""
    if str(device).startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _resident_memory():
    return psutil.Process().memory_info().rss


def stream_model(model, *, dtype="auto", device="auto", experts_implementation: str | None = None) -> tuple:
    """Load a model whose decoder layers stay on disk until they are asked for.

    Parameters
    ----------
    model, dtype, device, experts_implementation
        As for :func:`hcsmoe_core.checkpoint.load_model`; a single device.

    Returns
    -------
    model : transformers.PreTrainedModel
        For :func:`stream_capture`, :func:`stream_merged` and :func:`hcsmoe_core.make_plan`.
    tokenizer : transformers.PreTrainedTokenizerBase or None

    Raises
    ------
    FileNotFoundError
        If the model is neither a local folder nor available from the hub.
    InputError
        If the checkpoint is not readable, is merged already, lacks tensors, has tensors of a wrong type, or
        keeps its MoE layers elsewhere than in one list of decoder layers.
    """
    folder = folder_of(model)
    if merge_record(folder):
        raise InputError(f"{model} is merged already; start from the original.")
    if device in DEVICE_MAPS:
        raise InputError(
            f'The "device" argument is {device}, but a streamed model is on one device; to use several GPUs, '
            "start a rank for each: torchrun --nproc-per-node GPUS -m hcsmoe_core.ui.cli …"
        )
    device = str(device_of(device))
    device_map = None if device == "cpu" else {"": device}
    options = {"dtype": dtype, "device_map": device_map, "experts_implementation": experts_implementation}
    loaded = load_with(_read_outside, str(folder), **options)
    loaded.name_or_path = str(model)
    return loaded, load_tokenizer(folder)


def _read_outside(model, files, load_config, _):
    """In place of transformers' own loading: read all but the decoder layers, remember how to read those."""
    model._source = _Source(model, files, load_config)
    return model._source.read_outside(), None


class _Source:
    """Reads a model from its shards by part: part 0 is all but the decoder layers, part i + 1 is layer i."""

    def __init__(self, model, files, load_config):
        self.model, self.load_config = model, load_config
        self.prefix = decoder_layers(model)
        moe = [layer.name for layer in find_moe_layers(model)]
        if not self.prefix or not all(name.startswith(f"{self.prefix}.") for name in moe):
            raise InputError(
                f"its MoE layers are not all in one list of decoder layers ({moe[0]} to {moe[-1]}): "
                "load it whole"
            )
        self.layers = model.get_submodule(self.prefix)
        self.device = torch.device(_transformers.device_of_load(load_config))
        self.shards = {str(file): _identity(file) for file in files}
        self.present = None  # index of the decoder layer that is in memory
        self.fingerprints = {}
        self.names = parts_of(model)
        part_of = {name: part for part, names in enumerate(self.names) for name in names}
        self.shard_of = [{} for _ in self.names]  # of each part: shard by name on disk
        self.stored = set()  # names in the model of all that is on disk
        for file, key, names in on_disk(model, files, load_config):
            self.stored.update(names)
            self.shard_of[part_of[names[0]]][key] = str(file)

    def largest(self):
        """Bytes of the largest decoder layer in memory."""
        states = [layer.state_dict().values() for layer in self.layers]
        return max(sum(tensor.numel() * tensor.element_size() for tensor in state) for state in states)

    def read_outside(self):
        """Read all but the decoder layers; as missing, transformers is told only what is in no file."""
        report = self._read(0)
        report.missing_keys -= self.stored
        return report

    def read_again(self):
        """Read all but the decoder layers, if :meth:`free_outside` or :meth:`free_head` let some of it go."""
        if any(tensor.is_meta for tensor in self.state(0).values()):
            self._read(0)
            _transformers.tie_again(self.model, set(self.names[0]) - self.stored)

    def read(self, index):
        """Bring one decoder layer into memory, and let the one before go."""
        if self.present != index:
            self.free()
            self._read(index + 1)
            self.present = index

    def read_layer(self, name):
        """Bring the decoder layer of an MoE layer into memory."""
        self.read(int(name[len(self.prefix) + 1 :].split(".")[0]))

    def free(self):
        """Let the decoder layer that is in memory go."""
        if self.present is not None:
            self._drop(self.stored.intersection(self.names[self.present + 1]))
            with contextlib.suppress(
                OSError, AttributeError
            ):  # glibc keeps freed pages, more with every layer
                ctypes.CDLL(None).malloc_trim(0)
        self.present = None

    def free_outside(self):
        """Let everything outside the decoder layers go, tied tensors with those they are tied to."""
        tied = _transformers.tied_names(self.model)
        self._drop((self.stored | tied).intersection(self.names[0]))

    def free_head(self):
        """Let the language model head go, unless it is the embedding too: a capture does not reach it."""
        head = self.model.get_output_embeddings()
        if head is not None and not _transformers.tied_names(self.model):
            names = {f"{name}.weight" for name, module in self.model.named_modules() if module is head}
            self._drop(self.stored & names)

    def _drop(self, names):
        for name in names:
            path, _, own = name.rpartition(".")
            module = self.model.get_submodule(path)
            empty = torch.empty_like(getattr(module, own), device="meta")
            is_parameter = own in module._parameters
            setattr(module, own, nn.Parameter(empty, requires_grad=False) if is_parameter else empty)

    def _read(self, part):
        keys_of = {}
        for key, file in self.shard_of[part].items():
            self._check_unchanged(file)
            keys_of.setdefault(file, []).append(key)
        with contextlib.ExitStack() as files, without_bars(), torch.no_grad():
            tensors = {}
            for file, keys in keys_of.items():
                handle = files.enter_context(opened(file))
                tensors |= {key: handle.get_slice(key) for key in keys}
            try:
                report = _transformers.load_tensors(self.model, tensors, self.load_config)
            except (SafetensorError, OSError) as error:
                names = " or ".join(keys_of)
                raise InputError(f"{names} is not readable ({error}); copy it again.") from None
        for file in keys_of:
            self._check_unchanged(file)
        unread = [name for name, tensor in self.state(part).items() if part and tensor.is_meta]
        check_conversion(report, self.model.name_or_path, unread)
        return report

    def _check_unchanged(self, file):
        if not Path(file).is_file() or _identity(file) != self.shards[file]:
            raise InputError(
                f"{file} was changed or removed since this run began; put it back, or start anew with one "
                "that stays."
            )

    def moe_layers(self, index):
        """MoE layers of one decoder layer, whose weights are in memory only after :meth:`read`."""
        inside = f"{self.prefix}.{index}."
        return [layer for layer in find_moe_layers(self.model) if layer.name.startswith(inside)]

    def fingerprint(self, name):
        """What :func:`hcsmoe_core.families.model_hash` hashes of one MoE layer."""
        if name not in self.fingerprints:
            self.read_layer(name)
            self.fingerprints |= {layer.name: fingerprint(layer) for layer in self.moe_layers(self.present)}
        return self.fingerprints[name]

    def state(self, part):
        """Tensors of one part of the model as they are now, by name."""
        if part:
            return self.layers[part - 1].state_dict(prefix=f"{self.prefix}.{part - 1}.")
        state = self.model.state_dict()
        return {name: state[name] for name in self.names[0]}

    def identity(self):
        """What tells this checkpoint from another, or from itself before it changed."""
        return {Path(file).name: identity for file, identity in self.shards.items()}

    @torch.no_grad()
    def push(self, index, outputs, tokens, collectors, bar):
        """Send every batch of this rank through one decoder layer, and store what comes out.

        Parameters
        ----------
        index : int
        outputs : Outputs
            What the layer before gave, and where this one's goes.
        tokens : hcsmoe_core.collect.Tokens
        collectors : list
            Of :meth:`hcsmoe_core.collect.Tokens.collecting`.
        bar : tqdm.tqdm
        """
        layer, state = self.layers[index], {}

        def run(*inputs, **keywords):
            shared = {name: value for name, value in keywords.items() if isinstance(value, MutableMapping)}
            for name, value in shared.items():  # earlier layers leave keys and values there for later ones
                value.update(state["shared"].get(name, {}))
            output = type(layer).forward(layer, *inputs, **keywords)
            state["shared"] = {name: dict(value) for name, value in shared.items()}
            return output

        def stop(layer, inputs, output):
            state["output"] = output
            raise _LayerDone

        self.read(index)
        forwards = [lambda *_, **__: state["output"]] * index + [run]
        with layer.register_forward_hook(stop), replaced_forwards(self.layers, forwards):
            for start in tokens.starts:
                state |= outputs.read(index - 1, start, self.device) if index else {"shared": {}}
                rows = tokens.begin(collectors, start)
                with contextlib.suppress(_LayerDone):
                    self.model(input_ids=rows.to(self.device), use_cache=False, **forward_options(self.model))
                outputs.write(index, start, state)
                bar.update(rows.numel())

    @torch.no_grad()
    def logits(self, output, rows):
        """Logits ``[B, S, V]`` of a batch of tokens, given the output of the last decoder layer."""
        with replaced_forwards(self.layers, [lambda *_, **__: output] * len(self.layers)):
            return self.model(input_ids=rows.to(self.device), use_cache=False).logits


@contextlib.contextmanager
def replaced_forwards(modules, forwards):
    """The first modules compute other functions during the block."""
    own = [vars(module).get("forward") for module in modules]  # of a model that is spread over devices
    try:
        for module, forward in zip(modules, forwards, strict=False):
            module.forward = forward
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


class _LayerDone(Exception):  # noqa: N818 (no error)
    """The layer that is looked at has run; those after it need not."""


def _identity(file):
    status = Path(file).stat()
    return [status.st_size, status.st_mtime_ns]


def stream_capture(
    model,
    input_ids,
    work,
    *,
    methods=("hc-smoe",),
    needs=None,
    sample: int = SAMPLE,
    every: int = 1,
    batch_size: int = 8,
    domains=None,
    progress: bool = True,
) -> Statistics:
    """Statistics of every MoE layer of a streamed model, the same as :func:`hcsmoe_core.capture` gives.

    Under ``torchrun``, ranks share the batches, and each gets the statistics.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of :func:`stream_model`.
    input_ids, methods, needs, sample, every, batch_size, domains, progress
        As for :func:`hcsmoe_core.capture`.
    work : path
        Folder for each layer's outputs and statistics; with the same arguments a capture goes on after the
        last layer whose statistics are there.

    Raises
    ------
    InputError
        As :func:`hcsmoe_core.capture`; also if the folder is of another capture, or a shard cannot be read.
    """
    source, work = source_of(model), Path(work)
    settings = {"needs": needs_of(methods, needs), "sample": sample, "every": every, "batch_size": batch_size}
    tokens = Tokens(model, input_ids, domains=domains, ranks=ranks, **settings)
    settings |= {"dtype": str(model.dtype), "device": source.device.type, "checkpoint": source.identity()}
    settings["tokens"] = sha256_json([tokens.hashes, tokens.of_sequence])
    if ranks.rank() == 0:
        _begin(work, settings)
    source.read_again()
    source.free_head()
    outputs = Outputs(work / "outputs")
    last = max(i for i in range(len(source.layers)) if source.moe_layers(i))
    files = [work / f"layer-{index:05d}.safetensors" for index in range(last + 1)]
    begun = ranks.first(next((i for i, file in enumerate(files) if not file.exists()), len(files)))
    bar = tokens.bar(progress)
    bar.total *= len(files)
    with bar:
        bar.update(begun * bar.total // len(files))
        for index in range(begun, len(files)):
            _capture_layer(source, index, files[index], outputs, tokens, bar)
    source.free()
    layers = {}
    for file in files:
        stats = load_statistics(file)
        layers |= stats.layers
        source.fingerprints |= {name: bytes.fromhex(text) for name, text in stats.model["prints"].items()}
    ranks.barrier()  # every rank has read the files before one removes them
    return tokens.statistics(model, layers)


def _capture_layer(source, index, file, outputs, tokens, bar):
    source.read(index)
    layers = source.moe_layers(index)
    for layer in layers:
        check_loaded(layer)
    with tokens.collecting(layers) as collectors:
        source.push(index, outputs, tokens, collectors, bar)
    stats = tokens.finished(collectors)
    prints = {layer.name: source.fingerprint(layer.name).hex() for layer in layers}
    ranks.barrier()  # every rank's outputs are there before the layer counts as done
    if ranks.rank() == 0:
        sampled = tokens.sampled if stats else None
        Statistics(stats, tokens.domains, {"prints": prints}, tokens.hashes, sampled).save(file)
    ranks.barrier()
    outputs.drop(index - 1, tokens.starts)


class Outputs:
    """What comes out of each decoder layer, batch by batch, in files: the page cache serves as spare memory.

    Parameters
    ----------
    folder : path
        On a disk that all ranks share.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def _file(self, index, start):
        return self.folder / f"{index:05d}-{start:08d}.safetensors"

    def write(self, index, start, state):
        """Store nested tuples, lists, dictionaries, tensors and plain values of one batch."""
        tensors = {}

        def stored(value):
            if torch.is_tensor(value):
                name = str(len(tensors))
                tensors[name] = value.detach().to("cpu", copy=True).contiguous()
                return name.encode()  # no plain value is bytes
            if value is None or isinstance(value, bool | int | float | str):
                return value
            raise InputError(
                f"a decoder layer gives a {type(value).__name__}, which cannot be kept on disk: load the "
                "model whole."
            )

        layout = repr(recursively_apply(stored, state, test_type=lambda _: True))
        with replacing(self._file(index, start)) as part:
            save_file(tensors, part, metadata={"layout": layout})

    def read(self, index, start, device):
        """What :meth:`write` stored, with the tensors on a device."""
        file = self._file(index, start)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is gone, or not on a disk that all ranks share; remove {self.folder.parent} to "
                "start anew."
            )
        with safe_open(file, "pt", backend="pread") as handle:
            layout = ast.literal_eval(handle.metadata()["layout"])
            return recursively_apply(
                lambda name: handle.get_tensor(name.decode()).to(device),
                layout,
                test_type=lambda value: isinstance(value, bytes),
            )

    def drop(self, index, starts):
        """Remove what some batches left after one layer."""
        for start in starts:
            self._file(index, start).unlink(missing_ok=True)


def stream_merged(
    model,
    plan,
    out,
    work,
    *,
    stats: Statistics | None = None,
    router: str = "",
    tokenizer=None,
    observer: Callable | None = None,
    card: dict | None = None,
) -> dict:
    """Write a merged or pruned checkpoint of a streamed model: the files of :func:`hcsmoe_core.save_merged`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of :func:`stream_model`.
    plan, stats, router, tokenizer, card
        As for :func:`hcsmoe_core.save_merged`.
    out : path
        Must not exist.
    work : path
        Folder on the disk of ``out`` in which parts are written before it is renamed; with the same arguments
        writing goes on after the last part that is there.
    observer : callable, optional
        Measures what is written, as :func:`hcsmoe_core.score.fidelity.observer` does. Called with ``(source,
        plan, folder)``, it gives an object whose ``push(index, layers)`` is called while decoder layer
        ``index`` is in memory with its MoE layers merged, unless ``done(index)``, and whose ``result()`` is
        the fidelity. Its own attribute ``key`` is a JSON value that tells it from others.

    Returns
    -------
    dict
        As of :func:`hcsmoe_core.save_merged`.

    Raises
    ------
    FileExistsError
        If ``out`` exists.
    InputError
        As :func:`hcsmoe_core.save_merged`; also if the plan compresses the experts of all layers together,
        the folder is of another merge, or a shard cannot be read.
    """
    plan, router = exported(plan, router)
    check_absent(out)
    target = _begin_merge(model, plan, Path(work), stats, router, observer)
    source, folder = source_of(model), Path(work) / "model"
    observed = None if observer is None else observer(source, plan, Path(work) / "observed")
    _write_parts(source, plan, folder, stats, target, observed)
    fidelity = None if observed is None else observed.result()
    written = finish(model, folder, target, plan, tokenizer=tokenizer, fidelity=fidelity, card=card)
    check_absent(out)
    os.replace(folder, out)
    return written


def _begin_merge(model, plan, work, stats, router, observer):
    """Check what a merge is given, and begin or resume it in its work folder; what will be written."""
    if plan.compress:
        raise InputError(
            "MC-SMoE's second step chooses what it keeps among the merged experts of all layers at once, "
            "so that they must be in memory together: load the model whole (--load whole), or make a plan "
            'without "compress".'
        )
    check_applicable(model, plan, stats)
    target = target_of(model, plan, router)
    settings = {
        "plan": sha256_json([vars(layer_plan) for layer_plan in plan.layers]),
        "router": target.result["router"],
        "dtype": str(model.dtype),
        "statistics": stats.identity() if plan.needs_sample else None,
        "checkpoint": source_of(model).identity(),
        "observer": getattr(observer, "key", None),
    }
    _begin(work, settings)
    (work / "model").mkdir(exist_ok=True)
    return target


def _write_parts(source, plan, folder, stats, target, observed):
    """Write, and observe, the parts that are not done yet."""
    count = len(source.names)
    for part in range(0 if (folder / WEIGHTS).exists() else count):
        observing = part > 0 and observed is not None and not observed.done(part - 1)
        if (folder / SHARD.format(part + 1, count)).exists() and not observing:
            continue
        if part == 0 or observing:
            source.read_again()
        else:
            source.free_outside()
        with _merged(source, part - 1, plan, stats) as layers:
            if observing:
                observed.push(part - 1, layers)
            write_part(source.model, source.state(part), folder, part, count, target)
    source.free()


@contextlib.contextmanager
def _merged(source, index, plan, stats):
    """MoE layers of one decoder layer, merged during the block; none at −1, outside the decoder layers."""
    layers, plans = source.moe_layers(index), {layer_plan.name: layer_plan for layer_plan in plan.layers}
    try:
        if index >= 0:
            source.read(index)
        for layer in layers:
            apply_layer(layer, plans[layer.name], stats)
        yield layers
    finally:
        restore(source.model)


@contextlib.contextmanager
def work_folder(out, model):
    """Folder beside ``out`` for unfinished work, kept if the block fails after a layer was done.

    It is None for a model that is in memory, for which nothing is kept.

    Raises
    ------
    InputError
        If another process is at work there.
    """
    if source_of(model) is None:
        yield None
        return
    work = work_of(out)
    if ranks.rank():
        ranks.barrier()
        yield work
        return
    work.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(work / "lock", blocking=False), work / "pid"
    try:
        lock.acquire()
    except Timeout:
        number = owner.read_text() if owner.exists() else "just started"
        raise InputError(
            f"Another process ({number}) is at work on {out}; wait for it, or give another output."
        ) from None
    try:
        owner.write_text(str(os.getpid()))
        ranks.barrier()
        yield work
    except BaseException:
        if any(work.rglob("*.safetensors")):
            print(
                f"hcsmoe: finished steps are in {work}; the same command goes on from there.", file=sys.stderr
            )
        else:
            shutil.rmtree(work, ignore_errors=True)
        raise
    else:
        _remove(work)
    finally:
        lock.release()


def tidied(out) -> bool:
    """Whether ``out`` is complete and only the work folder of its run was left, which is then removed."""
    work = work_of(out)
    renamed = (work / "run.json").is_file() and not (work / "model").exists()
    complete = bool(ranks.first(renamed and (Path(out) / "plan.json").is_file()))
    if complete and ranks.rank() == 0:
        _remove(work)
    return complete


def _remove(work):
    """Remove a work folder; ``run.json``, which says what it is, goes last."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "run.json":
            path.unlink()
    shutil.rmtree(work)


def work_of(out) -> Path:
    """Folder for the unfinished work of a run that writes ``out``."""
    out = Path(out)
    return out.with_name(f".{out.name}.work")


def _begin(folder, settings):
    """Make a folder for a run with these settings, or go on in one with the same.

    Raises
    ------
    InputError
        If an unfinished run with other settings is there.
    """
    settings = json.loads(json.dumps(settings | {"version": __version__}))
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in sorted(folder.rglob("*.part"), reverse=True):  # written when a run was killed
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
    before = read_json(folder / "run.json") if (folder / "run.json").exists() else None
    other = [name for name in settings if before and before.get(name) != settings[name]]
    if other:
        changed = f"it has other {', '.join(other)}"
        if other == ["checkpoint"]:
            changed = "the checkpoint was changed meanwhile"
        raise InputError(f"{folder} holds an unfinished run, but {changed}; remove {folder} to start anew.")
    write_json(folder / "run.json", settings)
