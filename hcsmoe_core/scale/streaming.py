"""Models that need not fit into memory: capture and merge decoder layer by decoder layer, and go on after an interruption.

A streamed model is transformers' own, built and loaded by ``from_pretrained``, but for the weights of its decoder layers,
which stay on the meta device until they are asked for. They are read by transformers' own loading, weight conversion and
dequantisation included, one layer at a time. In the capture, the model's own forward runs once a layer and batch: the layers
before the present one only give back what the last of them gave, so that masks, rotary tables and whatever else is passed to
a layer are the model's own.
"""

import contextlib
import ctypes
import json
import os
import re
import shutil
import sys
from collections.abc import MutableMapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hcsmoe_core._util import (
    InputError,
    check_absent,
    check_choice,
    folder_of,
    lock_file,
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
    check_report,
    device_of,
    exported,
    finish,
    hub_layout,
    load_model,
    load_skeleton,
    load_tokenizer,
    loading,
    merge_record,
    model_class,
    on_disk,
    opened,
    parts_of,
    readable,
    readable_config,
    set_experts,
    shard,
    target_of,
    without_bars,
    write_part,
)
from hcsmoe_core.collect import Tokens, forward_options
from hcsmoe_core.families import decoder_layers, find_moe_layers
from hcsmoe_core.merging import apply_layer, check_appliable
from hcsmoe_core.modeling_hcsmoe import named_alike
from hcsmoe_core.moe import check_loaded, fingerprint, source_of
from hcsmoe_core.replace import lay_experts, lift_experts, take_experts
from hcsmoe_core.scale import ranks
from hcsmoe_core.score.fidelity import Differences, comparing_blocks, first_tensor, lift, one_by_one
from hcsmoe_core.statistics import DEFAULT_NEEDS, SAMPLE, Statistics, load_statistics

LOADS = ("auto", "whole", "streamed")


# Peaks over what is held, as measured: a whole model beside its shards and then its merged experts, a layer beside its parts.
WHOLE, LAYER = 2.75, 2.5


UNITS = {
    "": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def open_model(model, *, dtype="auto", device="auto", load="auto", memory=""):
    """Load a model whole if it fits into memory, or to be streamed if it does not.

    Parameters
    ----------
    model, dtype, device
        As for :func:`hcsmoe_core.checkpoint.load_model`.
    load : {"auto", "whole", "streamed"}
    memory : str
        What this process may hold in all, such as ``"3GB"`` or ``"900 MiB"``; by default what is free.

    Returns
    -------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase or None

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`hcsmoe_core.checkpoint.load_model`; ValueError also if not even one decoder layer fits.
    """
    check_choice("load", load, LOADS)
    limit = _bytes_of(memory) if memory else free_memory("cpu") + _held()
    if load == "auto":
        spread = device in DEVICE_MAPS or merge_record(folder_of(model))
        load = "whole" if spread else _fitting(model, dtype, device, limit)
    if load == "whole":
        return load_model(model, dtype=dtype, device=device)
    streamed, tokenizer = stream_model(model, dtype=dtype, device=device)
    need = _held() + LAYER * source_of(streamed).largest()
    if memory and need > limit:
        raise InputError(
            f'The "memory" argument is {memory}, but with the largest decoder layer of {model} about {need / 1e9:.2f} GB are '
            "held; give more."
        )
    return streamed, tokenizer


def _fitting(model, dtype, device, limit):
    """ "whole" if a model fits into memory with what merging adds, else "streamed"."""
    parameters = load_skeleton(model, dtype=dtype).parameters()
    size = WHOLE * sum(p.numel() * p.element_size() for p in parameters)
    return "whole" if size + _held() <= limit and size <= free_memory(device_of(device)) else "streamed"


def _bytes_of(memory):
    """Bytes that a text such as ``"3GB"`` means."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(memory))
    if found is None or found[2].upper() not in UNITS:
        raise InputError(f'The "memory" argument must be a size such as 3GB, 500MB or 2GiB; not {memory!r}.')
    return int(float(found[1]) * UNITS[found[2].upper()])


def free_memory(device):
    """Bytes of memory that are free, of the system or of a GPU."""
    if str(device).startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def _held():
    """Bytes that this process holds: Python and its libraries take some hundred million."""
    import psutil

    return psutil.Process().memory_info().rss


def stream_model(model, *, dtype="auto", device="auto", experts_implementation=None):
    """Load a model of which the decoder layers stay on disk until they are asked for.

    Parameters
    ----------
    model, dtype, device, experts_implementation
        As for :func:`hcsmoe_core.checkpoint.load_model`; one device.

    Returns
    -------
    model : transformers.PreTrainedModel
        For :func:`stream_capture`, :func:`stream_merged` and :func:`hcsmoe_core.methods.planner.make_plan`.
    tokenizer : transformers.PreTrainedTokenizerBase or None

    Raises
    ------
    FileNotFoundError
        If the model is neither a folder here nor to be had from the hub.
    ValueError
        If the checkpoint is not readable, is merged already, lacks tensors, holds some of a wrong kind, or keeps MoE layers
        elsewhere than in one list of decoder layers.
    """
    folder = folder_of(model)
    if merge_record(folder):
        raise InputError(f"{model} is merged already; start from the original.")
    if device in DEVICE_MAPS:
        raise InputError(
            f'The "device" argument is {device}, but a streamed model is on one device; to use several GPUs, start a rank for '
            "each: torchrun --nproc-per-node GPUS -m hcsmoe_core.ui.cli …"
        )
    config = readable_config(folder, model)
    device = str(device_of(device))
    with readable(model):
        base = model_class(config)
        options = loading(dtype, None if device == "cpu" else {"": device})
        loaded, report = _streamed_class(base).from_pretrained(str(folder), config=config, **options)
        check_report(report, model)
    loaded.__class__ = base
    loaded.name_or_path = str(model)
    hub_layout(loaded, config)
    set_experts(loaded, experts_implementation)
    return loaded.eval(), load_tokenizer(folder)


def _streamed_class(base):
    """``base`` whose loading leaves the decoder layers on the meta device and remembers how to read them."""

    class Streamed(base):
        @staticmethod
        def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
            model._source = _Source(model, checkpoint_files, load_config)
            return model._source.read_outside(), None

    return named_alike(Streamed, base)


class _Source:
    """Reads the parts of one model from its shards, through transformers' own conversions."""

    def __init__(self, model, files, config):
        self.model, self.config = model, config
        self.prefix = decoder_layers(model)
        moe = [layer.name for layer in find_moe_layers(model)]
        if not self.prefix or not all(name.startswith(f"{self.prefix}.") for name in moe):
            raise InputError(
                f"its MoE layers are not all in one list of decoder layers ({moe[0]} to {moe[-1]}): load it whole"
            )
        self.layers = model.get_submodule(self.prefix)
        self.device = torch.device(next(iter((config.device_map or {"": "cpu"}).values())))
        self.shards = {str(file): _identity(file) for file in files}
        self.present = None  # place of the decoder layer that is in memory
        self.prints = {}
        self._find(files)

    def _find(self, files):
        """What each tensor on disk becomes in the model, and which part that belongs to."""
        held = self.model.state_dict()
        # Part 0 is what lies outside the decoder layers.
        self.names = parts_of(self.model, held)
        of_name = {name: place for place, names in enumerate(self.names) for name in names}
        self.keys = [{} for _ in self.names]
        self.found = set()
        for file, key, names in on_disk(self.model, files, self.config):
            self.found.update(names)
            self.keys[of_name[names[0]]][key] = str(file)

    def largest(self):
        """Bytes of the largest decoder layer as it is held."""
        sizes = (
            sum(t.numel() * t.element_size() for t in layer.state_dict().values()) for layer in self.layers
        )
        return max(sizes)

    def read_outside(self):
        """Everything but the decoder layers; transformers is told to be missing only what is nowhere on disk."""
        report = self._read(self.keys[0])
        report.missing_keys -= self.found
        return report

    def read_again(self):
        """Everything but the decoder layers, if :meth:`free_outside` let it go."""
        if any(tensor.is_meta for tensor in self.state(0).values()):
            self._read(self.keys[0])
            self.model.tie_weights(missing_keys=set(self.names[0]) - self.found, recompute_mapping=False)

    def read(self, place):
        """Bring one decoder layer into memory, and let the one before go."""
        if self.present != place:
            self.free()
            self._read(self.keys[place + 1], place)
            self.present = place

    def read_layer(self, name):
        """Bring the decoder layer that an MoE layer lies in into memory."""
        self.read(int(name[len(self.prefix) + 1 :].split(".")[0]))

    def free(self):
        """Let the decoder layer that is in memory go."""
        if self.present is not None:
            self._drop(self.names[self.present + 1])
            _give_back()
        self.present = None

    def free_outside(self):
        """Let everything outside the decoder layers go, tied tensors with what they are tied to."""
        self._drop(self.names[0], tied=set(self.model.all_tied_weights_keys))

    def free_head(self):
        """Let the language model head go, unless it is the embedding too: a capture does not come to it."""
        head, tied = self.model.get_output_embeddings(), self.model.all_tied_weights_keys
        if head is not None and not tied:
            self._drop([f"{name}.weight" for name, module in self.model.named_modules() if module is head])

    def _drop(self, names, tied=frozenset()):
        for name in (self.found | tied).intersection(names):
            path, _, own = name.rpartition(".")
            module = self.model.get_submodule(path)
            held = module._parameters if own in module._parameters else module._buffers
            held[own] = torch.empty_like(held[own], device="meta")
            if held is module._parameters:
                held[own] = torch.nn.Parameter(held[own], requires_grad=False)

    def _read(self, keys, place=None):
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        of_file = {}
        for key, file in keys.items():
            of_file.setdefault(file, []).append(key)
        with contextlib.ExitStack() as files, _one_by_one(), torch.no_grad():
            tensors = {}
            for file in of_file:
                self._check_unchanged(file)
            for file, wanted in of_file.items():
                handle = files.enter_context(opened(file))
                tensors |= {key: handle.get_slice(key) for key in wanted}
            try:
                report, _ = convert_and_load_state_dict_in_model(self.model, tensors, self.config)
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{' or '.join(of_file)} is not readable ({error}); copy it again."
                ) from None
            for file in of_file:
                self._check_unchanged(file)
        if self.config.hf_quantizer is not None and hasattr(self.model, "_weight_conversions"):
            del self.model._weight_conversions  # see hub_layout
        unread = []
        if place is not None:
            held = self.layers[place].state_dict(prefix=f"{self.prefix}.{place}.")
            unread = [name for name, tensor in held.items() if tensor.is_meta]
        check_conversion(report, self.model.name_or_path, unread)
        return report

    def _check_unchanged(self, file):
        if not Path(file).is_file() or _identity(file) != self.shards[file]:
            raise InputError(
                f"{file} was changed or removed since this run began; put it back, or start anew with one that stays."
            )

    def moe_layers(self, place):
        """MoE layers of one decoder layer, which must be in memory to be used."""
        inside = f"{self.prefix}.{place}."
        return [layer for layer in find_moe_layers(self.model) if layer.name.startswith(inside)]

    def fingerprint(self, name):
        """What :func:`hcsmoe_core.families.model_hash` looks at of one MoE layer."""
        if name not in self.prints:
            self.read_layer(name)
            self.prints |= {layer.name: fingerprint(layer) for layer in self.moe_layers(self.present)}
        return self.prints[name]

    def state(self, place):
        """Tensors of one part of the model as they are now: 0 for what lies outside the decoder layers, then layer by layer."""
        if place:
            return self.layers[place - 1].state_dict(prefix=f"{self.prefix}.{place - 1}.")
        held = self.model.state_dict()
        return {name: held[name] for name in self.names[0]}

    def about(self):
        """What tells this checkpoint from another, or from what it was before it changed."""
        return {Path(file).name: identity for file, identity in self.shards.items()}

    def push(self, place, outputs, tokens, collectors, bar):
        """Send every batch of this rank through one decoder layer, and keep what comes out."""
        model, layer, state = self.model, self.layers[place], {}

        def replay(*_, **__):
            return state["output"]

        def run(*inputs, **keywords):
            shared = {name: value for name, value in keywords.items() if isinstance(value, MutableMapping)}
            for (
                name,
                value,
            ) in shared.items():  # what earlier layers left for later ones, such as shared keys and values
                value.update(state["shared"].get(name, {}))
            output = type(layer).forward(layer, *inputs, **keywords)
            state["shared"] = {name: dict(value) for name, value in shared.items()}
            return output

        def stop(layer, inputs, output):
            state["output"] = output
            raise _Through

        self.read(place)
        handle = layer.register_forward_hook(stop)
        try:
            for before in self.layers[:place]:
                before.forward = replay
            layer.forward = run
            with torch.no_grad():
                for start in tokens.starts:
                    state |= outputs.read(place - 1, start, self.device) if place else {"shared": {}}
                    rows = tokens.begin(collectors, start)
                    with contextlib.suppress(_Through):
                        model(input_ids=rows.to(self.device), use_cache=False, **forward_options(model))
                    outputs.write(place, start, state)
                    bar.update(rows.numel())
        finally:
            handle.remove()
            for changed in self.layers[: place + 1]:
                changed.__dict__.pop("forward", None)

    @torch.no_grad()
    def logits(self, output, rows):
        """What the model says of a batch, given what left its last decoder layer."""
        try:
            for layer in self.layers:
                layer.forward = lambda *_, **__: output
            return self.model(input_ids=rows.to(self.device), use_cache=False).logits
        finally:
            for layer in self.layers:
                del layer.forward


class _Through(Exception):  # noqa: N818 (no error)
    """The layer that is looked at has run; those after it need not."""


def _give_back():
    """Return freed memory to the system: glibc keeps tensors' pages for itself, more of them with every layer."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _identity(file):
    found = Path(file).stat()
    return [found.st_size, found.st_mtime_ns]


@contextlib.contextmanager
def _one_by_one():
    """transformers reads a layer's tensors as they are converted, rather than all before, and without a bar for each layer."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with without_bars():
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def stream_capture(
    model,
    input_ids,
    folder,
    *,
    needs=DEFAULT_NEEDS,
    sample=SAMPLE,
    every=1,
    batch_size=8,
    domains=None,
    progress=True,
):
    """Statistics of every MoE layer of a streamed model: what :func:`hcsmoe_core.collect.capture` finds, layer by layer.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of :func:`stream_model`.
    input_ids, needs, sample, every, batch_size, domains, progress
        As for :func:`hcsmoe_core.collect.capture`.
    folder : path
        Where what comes out of each layer and its statistics are kept; with the same arguments a capture goes on after the
        last layer whose statistics are there.

    Returns
    -------
    Statistics
        On every rank, if there are several.

    Raises
    ------
    ValueError
        As :func:`hcsmoe_core.collect.capture`; also if the folder is of another capture, or the checkpoint cannot be read.
    """
    source, folder = source_of(model), Path(folder)
    tokens = Tokens(
        model, input_ids, needs=needs, sample=sample, every=every, batch_size=batch_size, domains=domains
    )
    settings = {
        "needs": list(needs),
        "sample": sample,
        "every": every,
        "batch_size": batch_size,
        "dtype": str(model.dtype),
    }
    settings |= {"tokens": sha256_json([tokens.hashes, tokens.of_sequence]), "device": source.device.type}
    if ranks.rank() == 0:
        _begin(folder, settings | {"checkpoint": source.about()})
    source.read_again()
    source.free_head()
    files, outputs = _layer_files(folder, source), _Outputs(folder / "outputs")
    begun = ranks.first(next((i for i, file in enumerate(files) if not file.exists()), len(files)))
    bar = tokens.bar(progress)
    bar.total *= len(files)
    with bar:
        bar.update(begun * bar.total // len(files))
        for place in range(begun, len(files)):
            _capture_layer(source, place, files[place], outputs, tokens, bar)
    source.free()
    parts = [load_statistics(file) for file in files]
    ranks.barrier()  # every rank has read them before one removes them
    for part in parts:
        source.prints |= {name: bytes.fromhex(text) for name, text in part.model["prints"].items()}
    return tokens.statistics(model, {name: sums for part in parts for name, sums in part.layers.items()})


def _layer_files(folder, source):
    """Where the statistics of each decoder layer go, up to the last that has MoE layers."""
    last = max(place for place in range(len(source.layers)) if source.moe_layers(place))
    return [folder / f"layer-{place:05d}.safetensors" for place in range(last + 1)]


def _capture_layer(source, place, file, outputs, tokens, bar):
    source.read(place)
    layers = source.moe_layers(place)
    for layer in layers:
        check_loaded(layer)
    with tokens.collecting(layers) as collectors:
        source.push(place, outputs, tokens, collectors, bar)
    sums = tokens.finished(collectors)
    prints = {layer.name: source.fingerprint(layer.name).hex() for layer in layers}
    ranks.barrier()  # every rank's outputs are there before the layer counts as done
    if ranks.rank() == 0:
        Statistics(
            sums, tokens.domains, {"prints": prints}, tokens.hashes, tokens.sampled if sums else None
        ).save(file)
    ranks.barrier()
    for start in tokens.starts:
        outputs.drop(place - 1, start)


class _Outputs:
    """What came out of each decoder layer, batch by batch, on disk: the page cache is the memory that is to spare."""

    def __init__(self, folder):
        self.folder = folder

    def _file(self, place, start):
        return self.folder / f"{place:05d}-{start:08d}.safetensors"

    def write(self, place, start, state):
        tensors = []
        layout = {key: _packed(value, tensors) for key, value in state.items()}
        named = {
            str(i): tensor.detach().to("cpu", copy=True).contiguous() for i, tensor in enumerate(tensors)
        }
        with replacing(self._file(place, start)) as part:
            save_file(named, part, metadata={"layout": json.dumps(layout)})

    def read(self, place, start, device):
        file = self._file(place, start)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is gone, or not on a disk that all ranks share; remove {self.folder.parent} to start anew."
            )
        with safe_open(file, "pt", backend="pread") as opened:
            layout = json.loads(opened.metadata()["layout"])
            return {
                key: _unpacked(value, lambda i: opened.get_tensor(str(i)).to(device))
                for key, value in layout.items()
            }

    def drop(self, place, start):
        self._file(place, start).unlink(missing_ok=True)


def _packed(value, tensors):
    """A nest of tuples, lists, dictionaries, tensors and plain values as JSON, its tensors put aside in a list."""
    if torch.is_tensor(value):
        tensors.append(value)
        return ["tensor", len(tensors) - 1]
    if isinstance(value, MutableMapping):
        return ["dict", [[_packed(k, tensors), _packed(v, tensors)] for k, v in value.items()]]
    if isinstance(value, tuple | list):
        return ["tuple" if isinstance(value, tuple) else "list", [_packed(v, tensors) for v in value]]
    if value is None or isinstance(value, bool | int | float | str):
        return ["value", value]
    raise InputError(
        f"a decoder layer gives a {type(value).__name__}, which cannot be kept on disk: load the model whole."
    )


def _unpacked(packed, tensor):
    kind, value = packed
    if kind == "tensor":
        return tensor(value)
    if kind == "dict":
        return {_unpacked(k, tensor): _unpacked(v, tensor) for k, v in value}
    if kind in ("tuple", "list"):
        return {"tuple": tuple, "list": list}[kind](_unpacked(v, tensor) for v in value)
    return value


def stream_merged(
    model, plan, out, folder, *, stats=None, router="", tokenizer=None, heldout=None, about=None
):
    """Write a merged or pruned checkpoint of a streamed model: the files of :func:`hcsmoe_core.checkpoint.save_merged`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of :func:`stream_model`.
    plan, stats, router, tokenizer, heldout, about
        As for :func:`hcsmoe_core.checkpoint.save_merged`.
    out : path
        Must not exist.
    folder : path
        Where it is written, a part at a time, before it is renamed; with the same arguments writing goes on after the last
        part that is there. On the disk of ``out``.

    Returns
    -------
    dict
        As of :func:`hcsmoe_core.checkpoint.save_merged`.

    Raises
    ------
    FileExistsError
        If ``out`` exists.
    ValueError
        As :func:`hcsmoe_core.checkpoint.save_merged`; also if the plan factors experts over all layers at once, the folder
        is of another merge, or the checkpoint cannot be read.
    """
    if plan.compress:
        raise InputError(
            "MC-SMoE's second step chooses what it keeps among the merged experts of all layers at once, so that they must be "
            'in memory together: load the model whole (--load whole), or take a plan without "share".'
        )
    plan, router = exported(plan, router)
    check_absent(out)
    source, folder = source_of(model), Path(folder)
    layers = {layer.name: layer for layer in check_appliable(model, plan, stats)}
    target = target_of(model, plan, router)
    settings = {
        "plan": sha256_json([vars(p) for p in plan.layers]),
        "router": target.router,
        "dtype": str(model.dtype),
    }
    settings |= {"statistics": stats.identity() if plan.needs_sample else None, "checkpoint": source.about()}
    settings["heldout"] = None if heldout is None else sha256_json(heldout.tolist())
    _begin(folder, settings)
    lanes = None if heldout is None else _Lanes(source, plan, heldout, folder / "fidelity")
    part, count = folder / "model", len(source.layers) + 1
    part.mkdir(exist_ok=True)
    for place in range(0 if not (part / WEIGHTS).exists() else count, count):
        measured = not place or lanes is None or lanes.done(place - 1)
        if measured and (part / shard(place, count)).exists():
            continue
        if not place or not measured:
            source.read_again()
        if place:
            source.read(place - 1)
        inside = [p for p in plan.layers if place and p.name.startswith(f"{source.prefix}.{place - 1}.")]
        with _merging([(layers[layer_plan.name], layer_plan) for layer_plan in inside], stats):
            if not measured:
                lanes.push(place - 1, [layers[layer_plan.name] for layer_plan in inside])
            write_part(model, source.state(place), part, place, count, target)
        if place == 0 and lanes is None:
            source.free_outside()
        elif place == 0:
            source.free_head()
    source.free()
    found = None if lanes is None else lanes.result()
    written = finish(model, part, target, plan, tokenizer=tokenizer, measured=found, about=about)
    check_absent(out)
    os.replace(part, out)
    return written


@contextlib.contextmanager
def _merging(layers, stats):
    """Merge some layers by their plans while the block lasts."""
    try:
        for layer, layer_plan in layers:
            apply_layer(layer, layer_plan, stats)
        yield
    finally:
        for layer, _ in layers:
            if layer.merged:
                take_experts(layer)


class _Lanes:
    """Held-out tokens on their way through the original and what it is merged to, side by side, layer by layer."""

    def __init__(self, source, plan, input_ids, folder):
        self.source, self.plan, self.folder = source, plan, folder
        folder.mkdir(exist_ok=True)
        self.tokens = Tokens(source.model, input_ids, needs=(), sample=1, batch_size=1, domains=None)
        kept = sorted(folder.glob("*.json"))
        self.found = Differences(source.model, plan, read_json(kept[-1]) if kept else None)
        self.outputs = {name: _Outputs(folder / name) for name in ("original", *self.found.names)}

    def _file(self, place):
        return self.folder / f"{place:05d}.json"

    def done(self, place):
        """Whether a decoder layer was measured."""
        return self._file(place).exists()

    def push(self, place, layers):
        """Go through one decoder layer, of which ``layers`` are merged, and compare what leaves it."""
        lifted = lift(layers, self.plan)
        own = self.found.names[0]
        with one_by_one(self.source.model, self.plan), self.tokens.bar(True) as bar:
            bar.set_description(f"fidelity, layer {place}")
            bar.total *= len(self.outputs)
            with comparing_blocks(layers, lifted, self.found):
                self.source.push(place, self.outputs["original"], self.tokens, [], bar)
            for name in reversed(self.found.names):  # the plan's own last: those experts are written next
                for layer in layers:
                    lay_experts(layer, lifted[name][layer.name])
                self.source.push(place, self.outputs[name], self.tokens, [], bar)
                for layer in layers if name != own else ():
                    lift_experts(layer)
        self._compare(place, layers)
        write_json(self._file(place), self.found.sums)
        for outputs in self.outputs.values():
            for start in self.tokens.starts:
                outputs.drop(place - 1, start)

    def _compare(self, place, layers):
        for start in self.tokens.starts if layers else ():
            left = {name: first_tensor(self._left(name, place, start)) for name in self.outputs}
            for name in self.found.names:
                for layer in layers:
                    self.found.add("hidden_error", name, layer.name, left[name], left["original"])

    def _left(self, name, place, start):
        return self.outputs[name].read(place, start, self.source.device)["output"]

    def result(self):
        """What :func:`hcsmoe_core.score.fidelity.fidelity` finds of a model that is in memory."""
        self.source.read_again()
        last = len(self.source.layers) - 1
        for start in self.tokens.starts:
            rows, logits = self.tokens.begin([], start), {}
            for name in ("original", *reversed(self.found.names)):
                made = self.source.logits(self._left(name, last, start), rows)[0]
                self.found.add_loss(name, rows[0].to(made.device), made, logits)
                logits[name] = made
        return self.found.result(self.tokens.input_ids.numel())


@contextlib.contextmanager
def work_folder(out, model):
    """Folder beside ``out`` for what is not finished: kept if the block fails after a layer was done, else removed.

    Of a model that is in memory it is None, as nothing is kept.

    Raises
    ------
    ValueError
        If another process is at work there.
    """
    if source_of(model) is None:
        yield None
        return
    folder = work_of(out)
    if ranks.rank():
        ranks.barrier()
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as lock:
        if not lock_file(lock):
            number = (folder / "lock").read_text()
            raise InputError(
                f"Another process ({number}) is at work on {out}; wait for it, or give another output."
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))  # for whoever wonders which process that is
        lock.flush()
        ranks.barrier()
        try:
            yield folder
        except BaseException:
            if any(folder.rglob("*.safetensors")):
                print(
                    f"hcsmoe: what is done is in {folder}; the same command goes on from there.",
                    file=sys.stderr,
                )
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        _remove(folder)


def tidied(out):
    """Whether ``out`` is complete and only the work folder of the run that wrote it was left; it is then removed."""
    folder, out = work_of(out), Path(out)
    written = (folder / "run.json").is_file() and not (folder / "model").exists()
    left = ranks.first(written and (out / "plan.json").is_file())
    if left and ranks.rank() == 0:
        _remove(folder)
    return bool(left)


def _remove(folder):
    """Remove a work folder; ``run.json``, which tells what it is, comes last."""
    for inside in folder.iterdir():
        if inside.is_dir():
            shutil.rmtree(inside)
        elif inside.name != "run.json":
            inside.unlink()
    shutil.rmtree(folder)


def work_of(out):
    """Where a run that writes ``out`` keeps what is not finished."""
    out = Path(out)
    return out.with_name(f".{out.name}.work")


def _begin(folder, settings):
    """Make a folder for a run with these settings, or go on in one with the same.

    Raises
    ------
    ValueError
        If an unfinished run with other settings is there.
    """
    settings = json.loads(json.dumps(settings | {"version": __version__}))
    folder.mkdir(parents=True, exist_ok=True)
    for left in sorted(folder.rglob("*.part"), reverse=True):  # what was being written when a run was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    before = read_json(folder / "run.json") if (folder / "run.json").exists() else None
    if before is None:
        write_json(folder / "run.json", settings)
    elif before != settings:
        other = [name for name in settings if before.get(name) != settings[name]]
        changed = (
            "the checkpoint was changed meanwhile"
            if other == ["checkpoint"]
            else f"it has other {', '.join(other)}"
        )
        raise InputError(f"{folder} holds an unfinished run, but {changed}; remove {folder} to start anew.")
