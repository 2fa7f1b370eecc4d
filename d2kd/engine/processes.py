"""The processes of a run: started here for ``--num-gpus``, or by torchrun; how they meet, and what
they need of Detectron2. Those on GPUs talk over NCCL, those on a CPU over gloo."""

import argparse
import contextlib
import gc
import os
import pickle
import sys
from datetime import timedelta
from typing import Any, Callable, Mapping, NamedTuple, Optional, Tuple
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.config import CfgNode
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import nn

from d2kd.errors import UserError, reason
from d2kd.one_line import exit_on_user_error

# What torchrun tells every process that it starts, in the order of Place
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Keys of the store
_RUN, _TOLD = "run", "told"


class Place(NamedTuple):
    """Where a process stands among those of its run, which are counted machine by machine."""

    rank: int
    world_size: int  # processes of the run
    local_rank: int
    local_world_size: int  # processes of each machine


Work = Callable[[Place, dist.Store, argparse.Namespace, CfgNode], None]


def place_by_torchrun(environment: Mapping[str, str]) -> Optional[Place]:
    """None if this process is the only one of its run, or starts the others itself.

    Raises:
        UserError: if only a part of the place is there, or machines differ in their processes.
    """
    if "RANK" not in environment or environment.get("WORLD_SIZE", "1") == "1":
        return None
    missing = [x for x in (*_PLACE, "MASTER_ADDR", "MASTER_PORT") if not environment.get(x)]
    if missing:
        raise UserError(
            f"RANK is {environment['RANK']!r} in the environment, but {', '.join(missing)} is "
            "missing there: start d2kd with torchrun, which sets them all, or unset RANK"
        )
    place = Place(*(int(environment[name]) for name in _PLACE))
    if place.world_size % place.local_world_size:
        raise UserError(
            f"torchrun has started {place.world_size} processes, {place.local_world_size} of them "
            "on this machine: give every machine the same --nproc_per_node"
        )
    return place


def store_of_torchrun() -> dist.Store:
    """What the processes share that torchrun has started."""
    store, _, _ = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"d2kd/{attempt}", store)


def publish_run(store: dist.Store, args: argparse.Namespace, cfg: CfgNode) -> None:
    """Gives all processes the run that process 0 has set up."""
    store.set(_RUN, pickle.dumps((args, cfg)))


def receive_run(store: dist.Store) -> Tuple[argparse.Namespace, CfgNode]:
    """Waits for :func:`publish_run`."""
    return pickle.loads(store.get(_RUN))


def start_processes(work: Work, args: argparse.Namespace, cfg: CfgNode) -> None:
    """Starts the processes of this machine, and returns when all have ended.

    Args:
        work: called in each of them.
        args: with num_gpus, num_machines, machine_rank, dist_url.
        cfg: of the run.

    Raises:
        ProcessRaisedException, ProcessExitedException: if one of them failed.
        UserError: if the other machines cannot find this one.
    """
    host, port = _address(args.dist_url)
    if args.machine_rank == 0:  # the store outlives whichever process ends first
        server = _store(host, port, cfg, is_master=True)
        port = server.port
    mp.spawn(_started, (work, args, cfg, host, port), nprocs=args.num_gpus)


def _started(
    local_rank: int, work: Work, args: argparse.Namespace, cfg: CfgNode, host: str, port: int
) -> None:
    place = Place(
        args.machine_rank * args.num_gpus + local_rank,
        args.num_machines * args.num_gpus,
        local_rank,
        args.num_gpus,
    )
    with exit_on_user_error(args.debug, lambda: local_rank == 0):
        store = _store(host, port, cfg)
    work(place, store, args, cfg)


def _address(url: str) -> Tuple[str, int]:
    """Host and port; port 0 is any that is free."""
    if url == "auto":
        return "127.0.0.1", 0
    parts = urlsplit(url)
    with contextlib.suppress(ValueError):  # a port that is no number, or none of a machine
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return parts.hostname, parts.port
    raise UserError(f"--dist-url is '{url}': give tcp://ADDRESS:PORT of the first machine")


def _store(host: str, port: int, cfg: CfgNode, is_master: bool = False) -> dist.TCPStore:
    try:
        return dist.TCPStore(
            host, port, is_master=is_master, timeout=_timeout(cfg), wait_for_workers=False
        )
    except RuntimeError as e:
        raise UserError(
            f"--dist-url: the processes cannot meet at {host}:{port} ({reason(e):.80}): give a "
            "free port of the machine of --machine-rank 0, which starts the same command"
        ) from e


def _timeout(cfg: CfgNode) -> timedelta:
    return timedelta(seconds=cfg.RUN.TIMEOUT)


def _on_gpus(cfg: CfgNode) -> bool:
    return cfg.MODEL.DEVICE.startswith("cuda")


def join(place: Place, store: dist.Store, cfg: CfgNode) -> None:
    """Connects this process with the others, until :func:`leave`; all of them have to call it."""
    if _on_gpus(cfg):
        torch.cuda.set_device(place.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(torch.get_num_threads() // place.local_world_size, 1))
    dist.init_process_group(
        "nccl" if _on_gpus(cfg) else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=_timeout(cfg),
    )
    _make_local_group(place.local_world_size)
    comm.synchronize()


def leave() -> None:
    """The end of :func:`join`, with the threads of its groups. One that still lets go of a tensor
    while Python ends would abort the process."""
    # A group ends with the last that holds it: Detectron2, or a model in a cycle of references
    comm._get_global_gloo_group.cache_clear()
    comm._LOCAL_PROCESS_GROUP = None
    dist.destroy_process_group()
    gc.collect()


def run_joined(place: Place, store: dist.Store, cfg: CfgNode, work: Callable[[], Any]) -> Any:
    """Between :func:`join` and :func:`leave`, the second also where all processes stop together.

    Args:
        place, store, cfg: what :func:`join` takes.
        work: called once.

    Returns:
        what it returns.
    """
    join(place, store, cfg)
    status, result = None, None
    try:
        result = work()
    except SystemExit as stopped:
        status = stopped.code
    leave()  # here, where no traceback holds the model any more
    if status:
        sys.exit(status)
    return result


def run_with_torchrun(cfg: CfgNode, work: Callable[[], Any]) -> Any:
    """Calls what a script of one's own does: together with the other processes where torchrun has
    started several, as it is in the only one.

    Args:
        cfg: of the run; ``MODEL.DEVICE`` and ``RUN.TIMEOUT`` are read.
        work: called in each of the processes.

    Returns:
        what it returns.

    Raises:
        UserError: see :func:`place_by_torchrun`.
    """
    place = place_by_torchrun(os.environ)
    return work() if place is None else run_joined(place, store_of_torchrun(), cfg, work)


def _make_local_group(size: int) -> None:
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(size)
    else:  # release 0.6 has this variable set by whoever starts the processes
        comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(size)


def is_first_to_tell(store: dist.Store) -> bool:
    """Whether no other process of the run has told yet what ends it."""
    try:
        return store.add(_TOLD, 1) == 1
    except RuntimeError:  # it ended with the process that kept it
        return True


def wrap_ddp(model: nn.Module) -> nn.Module:
    """The model as all processes of a run train it together, wrapped if there are several."""
    # With a device named, the wrapper copies the images itself, and the host waits for each.
    return create_ddp_model(model, broadcast_buffers=False, device_ids=None)


def broadcast_statistics(model: nn.Module) -> None:
    """Gives all processes the running statistics of process 0, which are those that are saved.
    Each has its own from its share of the batches; in training nothing reads them."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
