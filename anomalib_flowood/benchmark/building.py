# SPDX-License-Identifier: Apache-2.0
"""From the names and arguments of a configuration to detectors and data modules."""

from __future__ import annotations

import copy
import errno
import inspect
import json
import re
import traceback
from argparse import ArgumentError
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any
from urllib.error import HTTPError, URLError

import torch
from anomalib.data import AnomalibDataModule
from anomalib.models import AnomalibModule
from jsonargparse import ArgumentParser, Namespace

from anomalib_flowood.checks import no_shared_memory
from anomalib_flowood.features import fetching_at_once
from anomalib_flowood.models.components import FlowModule
from anomalib_flowood.names import check_known, subclasses, unknown_name

KINDS: dict[str, type] = {"model": AnomalibModule, "data": AnomalibDataModule}
"""What a configuration names, and what it has to be."""

_NAMES = {"model": "detector", "data": "data module"}

_NOT_SHARED = re.compile(r"shared memory\(shm\)|</?torch_\d+_|workers are out of shared memory")
"""What PyTorch says of batches for which there is no shared memory: the allocator, a file, a worker that was killed."""


def find_class(kind: str, name: str) -> type:
    """Find the class of a detector or a data module: ours, anomalib's, or any other that has been imported.

    Args:
        kind: ``"model"`` or ``"data"``.
        name: A class name (``PixelFlow``), the same in snake case (``pixel_flow``) or a dotted path
            (``anomalib_flowood.PixelFlow``).

    Raises:
        ValueError: If there is no such class; the message offers the nearest names.
    """
    base = KINDS[kind]
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError):
            found = None
        if isinstance(found, type) and issubclass(found, base):
            return found
    else:
        for cls in subclasses(base):
            if cls.__name__.lower() == name.replace("_", "").lower() and not inspect.isabstract(cls):
                return cls
    known = {cls.__name__.lower() for cls in subclasses(base) if not inspect.isabstract(cls)}
    error = unknown_name(_NAMES[kind], name.rpartition(".")[2], known)
    raise ValueError(str(error).replace(repr(name.rpartition(".")[2]), repr(name), 1))


def _parse(kind: str, entry: dict) -> tuple[ArgumentParser, Namespace]:
    """Check an entry's name and arguments without building anything."""
    cls = find_class(kind, entry["class_path"])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(KINDS[kind], kind, fail_untyped=False, required=True)
    config = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": entry.get("init_args") or {}}
    try:
        return parser, parser.parse_object({kind: copy.deepcopy(config)})
    except ArgumentError as error:
        message = readable(error)
        option = re.search(r"Option '(\w+)' is not accepted", message)
        if option and option[1] in config["init_args"]:
            inits = [vars(parent)["__init__"] for parent in cls.__mro__ if "__init__" in vars(parent)]
            names = {name for init in inits for name in inspect.signature(init).parameters} - {"self", "args", "kwargs"}
            better = unknown_name(f"argument of {cls.__name__}", option[1], names)
            raise better from None
        msg = f"{cls.__name__}: {message}"
        raise ValueError(msg) from None


def build(kind: str, entry: dict) -> Any:
    """Build a detector or a data module from an entry of a benchmark's configuration.

    Args:
        kind: ``"model"`` or ``"data"``.
        entry: ``class_path`` and ``init_args``, nested objects included.

    Raises:
        ValueError: If the class or an argument is unknown or an argument's value is refused.
        OSError: If weights of a detector are not there.
    """
    parser, config = _parse(kind, entry)
    try:
        with built_at_once(find_class(kind, entry["class_path"])):
            return parser.instantiate_classes(config)[kind]
    except ValueError as error:
        msg = readable(error)
        raise ValueError(msg) from error


def built_at_once(cls: type) -> AbstractContextManager[None]:
    """Let a detector of others be built without waiting for a model hub that is away; ours never do."""
    waits = issubclass(cls, AnomalibModule) and not issubclass(cls, FlowModule)
    return fetching_at_once(cls.__name__) if waits else nullcontext()


def check_entry(kind: str, entry: object) -> None:
    """Check an entry of a benchmark's configuration without building anything.

    Raises:
        ValueError: If it is no entry, or its class, an argument or an argument's value is refused.
    """
    if isinstance(entry, dict) and "class_path" not in entry:
        check_known(f"key in a {kind} entry", entry, ("class_path", "grid", "init_args", "name"))
    if not isinstance(entry, dict) or not isinstance(entry.get("class_path"), str):
        msg = f"A benchmark's {kind} entry needs a class_path, got {entry!r}."
        raise ValueError(msg)
    check_known(f"key in the {kind} entry {entry['class_path']}", entry, ("class_path", "init_args", "name"))
    _parse(kind, entry)


def config_key(config: object) -> str:
    """Return a text that is the same for equal pieces of configuration, and for no others."""
    return json.dumps(config, sort_keys=True, default=str)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up: Python's, NumPy's, or PyTorch's of any device."""
    refused = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in refused)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _out_of_shared_memory(error: BaseException) -> str:
    """What the system says of memory that the workers of a data loader cannot share; nothing of other errors."""
    if isinstance(error, RuntimeError):  # PyTorch's, of a batch, in the words of the worker that could not share it
        return next((line for line in reversed(str(error).splitlines()) if _NOT_SHARED.search(line)), "")
    if isinstance(error, OSError) and error.errno not in {errno.EMFILE, errno.ENFILE}:
        last = deque(traceback.walk_tb(error.__traceback__), maxlen=1)
        if last and last[0][0].f_globals.get("__name__") == "multiprocessing.synchronize":
            return str(error)
    return ""


_LEFT_ALONE = re.compile(
    r"gloo.*(Connection (closed|reset) by peer|Broken pipe)|NCCL.*remote process exited", re.DOTALL
)
"""What PyTorch says of several processes where one of the others is no longer there."""


def another_process_ended(error: BaseException) -> bool:
    """Whether a process waits in vain for another one, which has ended before it could answer."""
    return isinstance(error, RuntimeError) and bool(_LEFT_ALONE.search(str(error)))


def can_be_mended(error: BaseException) -> bool:
    """Whether a user can mend an error of a type that may as well be a mistake of ours: a machine that is full, say."""
    known = _is_of_the_machine(error) or _is_of_pandas_3(error) or another_process_ended(error)
    return known or str(error).startswith(_NOT_MONITORED)


def _is_of_the_machine(error: BaseException) -> bool:
    """Whether it says that the machine has no more to give, of memory or of what the system hands out."""
    cause = _unmasked(error)
    return out_of_memory(cause) or isinstance(cause, OSError) or bool(_out_of_shared_memory(cause))


def _is_of_pandas_3(error: BaseException) -> bool:
    """Whether anomalib's data module fails of what pandas 3 makes of masks that are missing."""
    return isinstance(error, TypeError) and any(said in str(error) for said in _NO_TEXT)


def _unmasked(error: BaseException) -> BaseException:
    """The error of a fit whose workers could not be started, in whose place Lightning raises one of its own."""
    masked = isinstance(error, RuntimeError) and "iter(combined_loader)" in str(error) and error.__context__
    return masked or error


_UNEQUAL = "Must have equal len keys and value"
_UNPAIRED = (
    "anomalib's data module finds another number of masks than of anomalous images. MVTecAD and its like take PNG "
    "images alone, and a mask below ground_truth for each of the anomalous ones. OneClass (--data FOLDER) reads "
    "folders of that layout with images of any kind, with or without masks."
)
"""What pandas says where anomalib lays masks beside images, and what is so then."""

_NOT_MONITORED = "Early stopping conditioned on metric"
"""How Lightning begins to say which metrics there are in the place of one that is not logged."""
_NO_TEXT = ("Invalid value for dtype 'str'", "Path must be None, a string, or Path object, got <class 'float'>")
_PANDAS_3 = (
    "anomalib's MVTecLOCO and MVTecAD2 fail with pandas 3, whatever the detector. OneClass (--data FOLDER) reads "
    "folders of both layouts, with their masks."
)
"""What is said where anomalib lists masks, or reads them, and what is so then."""

_NO_BACKBONE, _HOW_TO_WRITE_ONE = "Config file not found: ", "`flowood backbone NAME FOLDER` writes such a folder."
"""What timm says of a backbone's folder that is not there, to anomalib's detectors, and what helps."""


def readable(error: BaseException) -> str:
    """Say what is wrong, and what helps, where that is known, without jsonargparse's account of every type it tried.

    Of an error without a message it is the type's name.
    """
    error = _unmasked(error)
    if out_of_memory(error):
        said = str(error).strip() or type(error).__name__  # Python's own has no message
        return (
            f"Memory ran out: {said.splitlines()[0]}. Smaller batches (train_batch_size and "
            "eval_batch_size of the data), a smaller image_size, and less memory_limit_mib (data) and cache_gib "
            "(detector) take less."
        )
    if reason := _out_of_shared_memory(error):
        return no_shared_memory(reason.removeprefix("RuntimeError: "))
    if _is_of_pandas_3(error):
        return _PANDAS_3
    if another_process_ended(error):
        return f"Another process ended (killed? out of memory?): {str(error).strip().splitlines()[0]}"
    if isinstance(error, URLError) and not isinstance(error, HTTPError):  # of which an address answered
        return (
            f"What is not here cannot be downloaded: {error.reason}. Put it where it is looked for (`root` of a data "
            "module of anomalib's), or begin where there is a network."
        )
    outer = ('Parser key "model"', 'Parser key "data"')
    noise = (*outer, "Does not validate", "Subtypes:", "Errors:", "Given value", "- Expected a <class 'NoneType'>")
    message = str(error).strip()
    if "Does not validate" in message:
        lines = [line.strip() for line in message.splitlines()]
        message = "\n".join(line.removeprefix("- ") for line in lines if line and not line.startswith(noise))
    if message.startswith(_NO_BACKBONE) and not message.endswith(_HOW_TO_WRITE_ONE):
        return f"{message}. {_HOW_TO_WRITE_ONE}"  # a message may come here again within another error
    return _UNPAIRED if message.startswith(_UNEQUAL) else message or type(error).__name__
