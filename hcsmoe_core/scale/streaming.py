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
import re
import shutil
import sys
import zlib
from collections.abc import Callable, MutableMapping
from pathlib import Path

import psutil
import torch
from accelerate.utils import convert_file_size_to_int, recursively_apply, set_module_tensor_to_device
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hcsmoe_core import _transformers, _util, checkpoint, families, merging, moe
from hcsmoe_core._util import (
    InputError,
    output_path,
    read_json,
    require,
    sha256_file,
    sha256_json,
    write_json,
)
from hcsmoe_core._version import __version__
from hcsmoe_core.collect import Tokens, needs_of
from hcsmoe_core.scale import ranks
from hcsmoe_core.statistics import SAMPLE, Statistics, load_statistics

LOADS = ("auto", "whole", "streamed")

# Measured peaks of memory over bytes of weights: a whole model beside its shards and then its merged experts,
# and a decoder layer beside its tensors on disk; and bytes of what is imported and compiled later.
WHOLE, LAYER, LATER = 3.3, 2.5, 300_000_000


def open_model(
    model,
    *,
    dtype="auto",
    device="auto",
    load: str = "auto",
    memory: str = "",
    work: dict | None = None,
    trust_remote_code=False,
) -> tuple:
    """Load a model whole if it fits into memory, or to be streamed if it does not.

    Parameters
    ----------
    model, dtype, device, trust_remote_code
        As for :func:`hcsmoe_core.checkpoint.load_model`.
    load : {"auto", "whole", "streamed"}
    memory : str
        Most memory that this process may use, such as ``"3GB"`` or ``"900 MiB"``; by default what is free.
    work : dict, optional
        What will be done with the model: tokens per ``batch``, ``rows`` of the sample, and tokens of each
        ``heldout`` sequence.

    Returns
    -------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase or None

    Raises
    ------
    FileNotFoundError, InputError
        As :func:`hcsmoe_core.checkpoint.load_model`; InputError also if ``memory`` does not do.
    """
    _util.check_choice("load", load, LOADS)
    limit = _bytes_of(memory) if memory else free_memory("cpu") + _resident_memory()
    if load == "auto":
        spread = device in checkpoint.DEVICE_MAPS or checkpoint.merge_record(_util.folder_of(model))
        fits = spread or _fits(model, dtype, device, limit, work, trust_remote_code)
        load = "whole" if fits else "streamed"
    options = dict(dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if memory:  # oneDNN keeps up to 1,024 kernels, one for each number of rows that an expert is given
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    if load == "whole":
        if memory and not checkpoint.merge_record(_util.folder_of(model)):
            _check_memory(
                memory, limit, sum(_needed(model, dtype, work, trust_remote_code)), f"all of {model}"
            )
        return checkpoint.load_model(model, **options)
    streamed, tokenizer = stream_model(model, **options)
    if memory:
        need = LAYER * moe.source_of(streamed).largest() + _work_bytes(streamed, **work or {})
        _check_memory(memory, limit, need, f"the largest decoder layer of {model}")
    return streamed, tokenizer


def _check_memory(memory, limit, need, what):
    need += _resident_memory()
    require(
        need <= limit,
        f'The "memory" argument is {memory}, but with {what} in memory this process takes about '
        f"{need / 1e9:.3f} GB; give more.",
    )


def _fits(model, dtype, device, limit, work, trust_remote_code):
    """Whether a model fits into memory, with what merging adds."""
    peak, beside = _needed(model, dtype, work, trust_remote_code)
    return peak + beside + _resident_memory() <= limit and peak <= free_memory(checkpoint.device_of(device))


def _needed(model, dtype, work, trust_remote_code):
    """Bytes of a whole model, and of what is done with it."""
    skeleton = checkpoint.load_skeleton(model, dtype=dtype, trust_remote_code=trust_remote_code)
    return WHOLE * skeleton.get_memory_footprint(return_buffers=False), _work_bytes(skeleton, **work or {})


def _work_bytes(model, *, batch=0, rows=0, heldout=0):
    """Bytes that a capture, its sample and fidelity take beside the weights, at most."""
    hidden, kept = [0], 0
    for layer in families.find_moe_layers(model):
        chosen, values = layer.top_k or layer.num_experts, layer.tensors()["down_proj"].element_size()
        hidden.append(chosen * (3 * layer.width + layer.hidden_size))
        kept += layer.hidden_size * values + 4 * layer.num_experts + 12 * chosen
    logits = 4 * heldout * model.get_input_embeddings().num_embeddings
    return LATER + 4 * batch * max(hidden) + 2 * rows * kept + 4 * logits


def _bytes_of(memory):
    try:
        return convert_file_size_to_int(str(memory).strip().upper())  # in lower case it would read bits
    except ValueError:
        raise InputError(
            f'The "memory" argument must be a size such as 3GB, 500MB or 2GiB; not {memory!r}.'
        ) from None


def free_memory(device) -> int:
    """Bytes of memory that are free, of the system or of a GPU."""
    on_gpu = str(device).startswith("cuda")
    return torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available


def _resident_memory():
    return psutil.Process().memory_info().rss


def stream_model(
    model,
    *,
    dtype="auto",
    device="auto",
    experts_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple:
    """Load a model whose decoder layers stay on disk until they are asked for.

    Parameters
    ----------
    model, dtype, device, experts_implementation, trust_remote_code
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
    folder = _util.folder_of(model)
    require(not checkpoint.merge_record(folder), f"{model} is merged already; start from the original.")
    require(
        device not in checkpoint.DEVICE_MAPS,
        f'The "device" argument is {device}, but a streamed model is on one device; to use several GPUs, '
        "start a rank for each: torchrun --nproc-per-node GPUS -m hcsmoe_core.ui.cli …",
    )
    device = str(checkpoint.device_of(device))
    device_map = None if device == "cpu" else {"": device}
    options = {"dtype": dtype, "device_map": device_map, "experts_implementation": experts_implementation}
    loaded = checkpoint.load_with(_read_outside, str(folder), trust_remote_code=trust_remote_code, **options)
    loaded.name_or_path = str(model)
    return loaded, checkpoint.load_tokenizer(folder, trust_remote_code)


def _read_outside(model, files, load_config, _):
    """In place of transformers' own loading: read all but the decoder layers, remember how to read those."""
    model._source = source = _Source(model, files, load_config)
    report = source.read_part(0)
    report.missing_keys -= source.stored  # transformers is told only of what is in no file
    return report, None


class _Source:
    """Reads a model from its shards by part: part 0 is all but the decoder layers, part i + 1 is layer i."""

    def __init__(self, model, files, load_config):
        self.model, self.load_config = model, load_config
        self.prefix = families.decoder_layers(model)
        names = [layer.name for layer in families.find_moe_layers(model)]
        require(
            self.prefix and all(name.startswith(f"{self.prefix}.") for name in names),
            f"its MoE layers are not all in one list of decoder layers ({names[0]} to {names[-1]}): load it "
            "whole",
        )
        self.layers = model.get_submodule(self.prefix)
        self.device = torch.device(_transformers.device_of_load(load_config))
        self.shards = {str(file): _identity(file) for file in files}
        self.present = None  # index of the decoder layer that is in memory
        self.known = {}  # digests by part
        self.names = checkpoint.parts_of(model)
        part_of = {name: part for part, names in enumerate(self.names) for name in names}
        self.keys = [{} for _ in self.names]  # of each part: names on disk by shard
        self.stored = set()  # names in the model of all that is on disk
        for file, key, names in checkpoint.on_disk(model, files, load_config):
            self.stored.update(names)
            self.keys[part_of[names[0]]].setdefault(str(file), []).append(key)

    def largest(self):
        """Bytes of the largest decoder layer in memory."""
        return max(sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in self.layers)

    def read_again(self):
        """Read all but the decoder layers, if :meth:`free_outside` or :meth:`free_head` let some of it go."""
        if any(tensor.is_meta for tensor in self.state(0).values()):
            self.read_part(0)
            _transformers.tie_again(self.model, set(self.names[0]) - self.stored)

    def read(self, index):
        """Bring one decoder layer into memory, and let the one before go."""
        if self.present != index:
            self.free()
            self.read_part(index + 1)
            self.present = index

    def read_layer(self, name):
        """Bring the decoder layer of an MoE layer into memory."""
        self.read(int(name[len(self.prefix) + 1 :].split(".")[0]))

    def free(self):
        """Let the decoder layer that is in memory go."""
        if self.present is not None:
            self._drop(self.names[self.present + 1], self.stored)
            with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed pages, more every layer
                ctypes.CDLL(None).malloc_trim(0)
        self.present = None

    def free_outside(self):
        """Let everything outside the decoder layers go, tied tensors with those they are tied to."""
        self._drop(self.names[0], self.stored | _transformers.tied_names(self.model))

    def free_head(self):
        """Let the language model head go, unless it is the embedding too: a capture does not reach it."""
        head = self.model.get_output_embeddings()
        if head is not None and not _transformers.tied_names(self.model):
            names = {f"{name}.weight" for name, module in self.model.named_modules() if module is head}
            self._drop(names, self.stored)

    def _drop(self, names, stored):
        for name in stored.intersection(names):
            set_module_tensor_to_device(self.model, name, "meta")

    def read_part(self, part):
        """Read one part of the model; returns transformers' report."""
        files = self.keys[part]
        self._check_unchanged(files)
        with contextlib.ExitStack() as shards, checkpoint.without_bars(), torch.no_grad():
            tensors = {}
            for file, keys in files.items():
                shard = shards.enter_context(checkpoint.opened(file))
                tensors |= {key: shard.get_slice(key) for key in keys}
            try:
                report = _transformers.load_tensors(self.model, tensors, self.load_config)
            except (SafetensorError, OSError) as error:
                names = " or ".join(files)
                raise InputError(f"{names} is not readable ({error}); copy it again.") from None
        self._check_unchanged(files)
        unread = [name for name, tensor in self.state(part).items() if part and tensor.is_meta]
        checkpoint.check_conversion(report, self.model.name_or_path, unread)
        return report

    def _check_unchanged(self, files):
        for file in files:
            require(
                Path(file).is_file() and _identity(file) == self.shards[file],
                f"{file} was changed or removed since this run began; put it back, or start anew with one "
                "that stays.",
            )

    def moe_layers(self, index):
        """MoE layers of one decoder layer, whose weights are in memory only after :meth:`read`."""
        layers = families.find_moe_layers(self.model)
        return [layer for layer in layers if layer.name.startswith(f"{self.prefix}.{index}.")]

    def digests(self):
        """What :func:`hcsmoe_core.moe.digests` gives of every weight, by name."""
        return {name: pair for part in range(len(self.names)) for name, pair in self.digest(part).items()}

    def digest(self, part):
        """:meth:`digests` of one part, which is read unless they are known."""
        if part not in self.known:
            self.read(part - 1) if part else self.read_again()
            self.known[part] = moe.digests(self.state(part))
        return self.known[part]

    def state(self, part):
        """Tensors of one part of the model as they are now, by name."""
        state = self.model.state_dict()
        return {name: state[name] for name in self.names[part]}

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
            state["output"] = type(layer).forward(layer, *inputs, **keywords)
            state["shared"] = {name: dict(value) for name, value in shared.items()}
            raise _LayerDone

        self.read(index)
        forwards = [lambda *_, **__: state["output"]] * index + [run]
        with replaced_forwards(self.layers, forwards):
            for start in tokens.starts:
                state |= outputs.read(index - 1, start, self.device) if index else {"shared": {}}
                with contextlib.suppress(_LayerDone):
                    tokens.run(self.model, collectors, start, self.device)
                outputs.write(index, start, state)
                bar.update(tokens.input_ids[start : start + tokens.batch_size].numel())

    @torch.no_grad()
    def logits(self, output, rows):
        """Logits ``[B, S, V]`` of a batch of tokens, given the output of the last decoder layer."""
        with replaced_forwards(self.layers, [lambda *_, **__: output] * len(self.layers)):
            return self.model(input_ids=rows.to(self.device), use_cache=False).logits


@contextlib.contextmanager
def replaced_forwards(modules, forwards):
    """The first modules compute other functions during the block."""
    with contextlib.ExitStack() as undo:
        for module, forward in zip(modules, forwards, strict=False):
            own = {name: value for name, value in vars(module).items() if name == "forward"}
            undo.callback(vars(module).update, own)  # that of a model which is spread over devices
            undo.callback(vars(module).pop, "forward")
            module.forward = forward
        yield


class _LayerDone(Exception):  # noqa: N818 (no error)
    """The layer that is looked at has run; those after it need not."""


def _identity(file):
    return [Path(file).stat().st_size, Path(file).stat().st_mtime_ns]


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
    source, work = moe.source_of(model), Path(work)
    settings = {"needs": needs_of(methods, needs), "sample": sample, "every": every, "batch_size": batch_size}
    tokens = Tokens(model, input_ids, domains=domains, ranks=ranks, **settings)
    settings |= {"dtype": str(model.dtype), "device": source.device.type, "checkpoint": source.identity()}
    settings["tokens"] = sha256_json([tokens.hashes, tokens.of_sequence])
    if ranks.rank() == 0:
        _begin(work, settings)
    source.read_again()
    source.digest(0)
    source.free_head()
    outputs = Outputs(work / "outputs")
    last = max(i for i in range(len(source.layers)) if source.moe_layers(i))
    files = [work / f"layer-{index:05d}.safetensors" for index in range(last + 1)]
    begun = _begun(files, outputs, tokens.starts)
    with tokens.bar(progress) as bar:
        bar.total *= len(files)
        bar.update(begun * bar.total // len(files))
        for index in range(begun, len(files)):
            _capture_layer(source, index, files[index], outputs, tokens, bar)
    source.free()
    layers = {}
    for stats in map(load_statistics, files):
        layers |= stats.layers
        source.known |= {int(part): pairs for part, pairs in stats.model["digests"].items()}
    ranks.barrier()  # every rank has read the files before one removes them
    return tokens.statistics(model, layers)


def _begun(files, outputs, starts):
    """Layers whose statistics are there, undamaged, with what the next one starts from; else 0."""
    missing = (i for i, file in enumerate(files) if resumed(file, load_statistics) is None)
    begun = ranks.first(next(missing, len(files)))
    lost = 0 < begun < len(files) and not outputs.sound(begun - 1, starts)
    return 0 if int(ranks.total(torch.tensor([int(lost)]))) else begun


def _capture_layer(source, index, file, outputs, tokens, bar):
    source.read(index)
    layers = source.moe_layers(index)
    for layer in layers:
        moe.check_loaded(layer)
    with tokens.collecting(layers) as collectors:
        source.push(index, outputs, tokens, collectors, bar)
    stats, sampled = tokens.finished(collectors), tokens.sampled if layers else None
    known = {str(index + 1): source.digest(index + 1)}
    ranks.barrier()  # every rank's outputs are there before the layer counts as done
    if ranks.rank() == 0:
        record = {"name": "", "class": "", "hash": "", "layers": {}, "digests": known}
        Statistics(stats, tokens.domains, record, tokens.hashes, sampled).save(file)
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
                tensors[str(len(tensors))] = value.detach().to("cpu", copy=True).contiguous()
                return str(len(tensors) - 1).encode()  # no plain value is bytes
            require(
                value is None or isinstance(value, bool | int | float | str),
                f"a decoder layer gives a {type(value).__name__}, which cannot be kept on disk: load the "
                "model whole.",
            )
            return value

        layout, file = (
            repr(recursively_apply(stored, state, test_type=lambda _: True)),
            self._file(index, start),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        with _util.writing(file):  # in place: what is cut short is found by its checksum
            save_file(tensors, file, metadata={"layout": layout, "crc32": _crc32(layout, tensors)})

    def read(self, index, start, device):
        """What :meth:`write` stored, with the tensors on a device."""
        file = self._file(index, start)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is gone, or not on a disk that all ranks share; remove {self.folder.parent} to "
                "start anew."
            )
        try:
            with safe_open(file, "pt", backend="pread") as handle:
                names, about = list(handle.keys()), handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in names}
        except SafetensorError:
            about = {}
        require(
            about.get("crc32") == _crc32(about.get("layout", ""), tensors if about else {}),
            f"{file} is damaged; give the same command again, which then makes it anew.",
        )
        return recursively_apply(
            lambda name: tensors[name.decode()].to(device),
            ast.literal_eval(about["layout"]),
            test_type=lambda value: isinstance(value, bytes),
        )

    def sound(self, index, starts):
        """Whether what some batches left after one layer is there and undamaged; says so if not."""
        try:
            for start in starts:
                self.read(index, start, "cpu")
        except (InputError, FileNotFoundError) as error:
            print(f"hcsmoe: {error}\nThe layers before it are run again.", file=sys.stderr)
            return False
        return True

    def drop(self, index, starts):
        """Remove what some batches left after one layer."""
        for start in starts:
            self._file(index, start).unlink(missing_ok=True)


def _crc32(layout, tensors):
    value = zlib.crc32(layout.encode())
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), value)
    return str(value)


def resumed(path, load):
    """What ``load`` reads of a file of an interrupted run; None if there is none, or it is damaged."""
    try:
        return load(path) if path.exists() else None
    except InputError as error:
        print(f"hcsmoe: {error}\nIt is made again.", file=sys.stderr)
        path.unlink(missing_ok=True)
    return None


def write_checked(path, value):
    """Write a JSON value with its checksum."""
    write_json(path, [value, sha256_json(value)])


def read_checked(path):
    """The value that :func:`write_checked` wrote; InputError if the file was damaged."""
    content = read_json(path)
    paired = isinstance(content, list) and len(content) == 2
    require(paired and content[1] == sha256_json(content[0]), f"{path} is damaged.")
    return content[0]


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
        As for :func:`hcsmoe_core.save_merged`; so is what is returned.
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

    Raises
    ------
    FileExistsError
        If ``out`` exists.
    InputError
        As :func:`hcsmoe_core.save_merged`; also if the plan compresses the experts of all layers together,
        the folder is of another merge, or a shard cannot be read.
    """
    plan, router = checkpoint.exported(plan, router)
    out = output_path(out, folder=True)
    source, work = moe.source_of(model), Path(work)
    target, folder = _begin_merge(model, plan, work, stats, router, observer), work / "model"
    observed = observer and observer(source, plan, work / "observed")
    _write_parts(source, plan, folder, stats, target, observed)
    fidelity = observed and observed.result()
    options = dict(tokenizer=tokenizer, fidelity=fidelity, card=card)
    written = checkpoint.finish(model, folder, target, plan, **options)
    output_path(out, folder=True)
    _util.publish(folder, out)
    return written


def _begin_merge(model, plan, work, stats, router, observer):
    """Check what a merge is given, and begin or resume it in its work folder; what will be written."""
    require(
        not plan.compress,
        "MC-SMoE's second step chooses what it keeps among the merged experts of all layers at once, so that "
        "they must be in memory together: load the model whole (--load whole), or make a plan without "
        '"compress".',
    )
    merging.check_applicable(model, plan, stats)
    target = checkpoint.target_of(model, plan, router)
    settings = {
        "plan": sha256_json([vars(layer_plan) for layer_plan in plan.layers]),
        "router": target.result["router"],
        "dtype": str(model.dtype),
        "statistics": stats.identity() if plan.needs_sample else None,
        "checkpoint": moe.source_of(model).identity(),
        "observer": getattr(observer, "key", None),
    }
    _begin(work, settings)
    (work / "model").mkdir(exist_ok=True)
    checksums = _checksums(work)
    for file in (work / "model").iterdir():  # all but finished shards is written again
        if file.is_dir() or checksums.get(file.name) != sha256_file(file):
            if file.name in checksums:
                print(f"hcsmoe: {file} is damaged and written again.", file=sys.stderr)
            _discard(file)
    return target


def _checksums(work):
    """SHA-256 of the shards that are finished, by name."""
    return resumed(work / "shards.json", read_checked) or {}


def _write_parts(source, plan, folder, stats, target, observed):
    """Write, and observe, the parts that are not done yet."""
    plans, count = {layer_plan.name: layer_plan for layer_plan in plan.layers}, len(source.names)
    checksums = _checksums(folder.parent)
    for part in range(count):
        observing = part > 0 and observed is not None and not observed.done(part - 1)
        shard = folder / checkpoint.SHARD.format(part + 1, count)
        if shard.exists() and not observing:
            continue
        if part == 0 or observing:
            source.read_again()
        else:
            source.free_outside()
        try:
            if part:
                source.read(part - 1)
            layers = source.moe_layers(part - 1)
            for layer in layers:
                merging.apply_layer(layer, plans[layer.name], stats)
            if observing:
                observed.push(part - 1, layers)
            checkpoint.write_part(source.model, source.state(part), folder, part, count, target)
            checksums[shard.name] = sha256_file(shard)
            write_checked(folder.parent / "shards.json", checksums)
        finally:
            merging.restore(source.model)
    source.free()


@contextlib.contextmanager
def work_folder(out, model):
    """Folder beside ``out`` for unfinished work, kept if the block fails after a layer was done.

    It is None for a model that is in memory, for which nothing is kept.

    Raises
    ------
    InputError
        If another process is at work there.
    """
    work = None if moe.source_of(model) is None else work_of(out)
    own = work is not None and ranks.rank() == 0
    with _owned(work, out) if own else contextlib.nullcontext():
        ranks.barrier()
        yield work


@contextlib.contextmanager
def _owned(work, out):
    """Lock the work folder of a run that writes ``out``; remove it after the block unless it can go on."""
    _check_ours(work)
    work.mkdir(parents=True, exist_ok=True)
    _forget(done_of(work))
    owner = work / "pid"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(work / "lock", blocking=False))
        except Timeout:
            number = owner.read_text() if owner.exists() else "just started"
            raise InputError(
                f"Another process ({number}) is at work on {out}; wait for it, or give another output."
            ) from None
        owner.write_text(str(os.getpid()))
        try:
            yield
        except BaseException:
            if any(work.rglob("*.safetensors")):
                print(
                    f"hcsmoe: finished steps are in {work}; the same command goes on from there.",
                    file=sys.stderr,
                )
            else:
                with contextlib.suppress(OSError, InputError):
                    _remove(work)
            raise
        _remove(work)


def tidied(out) -> bool:
    """Whether ``out`` is complete and only what its run wrote beside it was left, which is then removed."""
    path = _util.resolved(out)
    work = work_of(path)
    renamed = (work / "run.json").is_file() and not (work / "model").exists()
    renamed = renamed or done_of(work).is_dir() or _util.was_killed(path)
    complete = bool(ranks.first(renamed and (path / "plan.json").is_file()))
    if complete and ranks.rank() == 0:
        _forget(done_of(work))
        if work.is_dir():
            _remove(work)
        with _util.unfinished(path):
            pass
    return complete


# Names of what is in a work folder, or is being written there.
OURS = r"\.*(lock|pid|(run|shards|plan-\w+)\.json|layer-\d+\.safetensors|model|capture|observed|outputs)"
OURS += r"(\.part)?(\.lock)?"


def _check_ours(folder):
    """Raise InputError if a work folder is a link, or has other files than ours."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    record = not names or any("run.json" in name or "lock" in name for name in names)
    foreign = next((name for name in names if not re.fullmatch(OURS, name) or not record), "")
    require(
        not foreign and not folder.is_symlink(),
        f"{folder} is {f'not of hcsmoe ({foreign})' if foreign else 'a link'}, but unfinished work goes to a "
        "folder of that name; move it, or give another output.",
    )


def _remove(work):
    """Remove a work folder; renamed first, so that what a kill leaves of it is no unfinished run."""
    _check_ours(work)
    done = done_of(work)
    os.replace(work, done)
    _empty(done)


def _forget(done):
    """Remove what a run that was killed left of its finished work."""
    if done.is_dir():
        _check_ours(done)
        with contextlib.suppress(Timeout, FileNotFoundError), FileLock(done / "lock", blocking=False):
            _empty(done)


def _empty(done):
    for path in sorted(done.iterdir(), key=lambda path: path.name == "lock"):
        _discard(path)
    done.rmdir()


def _discard(path):
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def work_of(out) -> Path:
    """Folder for the unfinished work of a run that writes ``out``."""
    out = _util.resolved(out)
    return out.with_name(f".{out.name}.work")


def done_of(work) -> Path:
    """Name that a work folder has while it is removed."""
    return work.with_name(f"{work.name.removesuffix('.work')}.done")


def _begin(folder, settings):
    """Make a folder for a run with these settings, or go on in one with the same.

    Raises
    ------
    InputError
        If an unfinished run with other settings is there, or files of something else.
    """
    settings = json.loads(json.dumps(settings | {"version": __version__}))
    _check_ours(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "run.json"
    before = resumed(record, read_checked)
    if before is None:  # without its record nothing there tells what it is of
        for path in folder.iterdir():
            if path.name in ("model", "observed", "outputs", "shards.json") or path.name.startswith("layer-"):
                _discard(path)
        before = settings
    other = [name for name in settings if before.get(name) != settings[name]]
    listed = f"it has other {', '.join(other)}"
    changed = "the checkpoint was changed meanwhile" if other == ["checkpoint"] else listed
    remedy = f"remove {folder} to start anew."
    require(not other, f"{folder} holds an unfinished run, but {changed}; {remedy}")
    write_checked(record, settings)
