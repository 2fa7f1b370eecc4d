"""Where a process stands in its run, and what refuses it a place."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from toys import config

from d2kd.cli.main import train as main
from d2kd.engine import processes
from d2kd.engine.preflight import refuse_processes
from d2kd.engine.processes import Place, is_first_to_tell, join, leave, place_by_torchrun
from d2kd.engine.stopping import command_to_resume
from d2kd.errors import UserError

FRS = "shapes/frs/fcos_tiny.yaml"


def environment(rank=3, size=4, local_rank=1, local_size=2, **changed):
    """What torchrun sets in one process."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        **changed,
    }


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def torchrun(monkeypatch, store):
    """Makes this process the first one of two that torchrun has started."""
    given = environment(0, 2, 0, 2, MASTER_PORT=str(store.port))
    for name, value in {**given, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)


def error_of(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 1
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def test_the_place_that_torchrun_gives():
    assert place_by_torchrun(environment()) == Place(
        3, world_size=4, local_rank=1, local_world_size=2
    )
    assert place_by_torchrun({}) is None
    assert place_by_torchrun(environment(0, 1, 0, 1)) is None
    assert place_by_torchrun({"WORLD_SIZE": "2"}) is None  # some clusters set it for other ends


def test_a_place_given_by_half():
    half = environment(LOCAL_RANK="", MASTER_PORT="")
    with pytest.raises(UserError, match="but LOCAL_RANK, MASTER_PORT is missing there"):
        place_by_torchrun(half)


def test_machines_with_different_numbers_of_processes():
    with pytest.raises(UserError, match="5 processes, 2 of them on this machine"):
        place_by_torchrun(environment(size=5))


def test_torchrun_says_how_many_processes_there_are(capsys, torchrun):
    flags = ["--config-file", FRS, "--num-gpus", 2]
    assert "torchrun has started 2 processes already: leave out" in error_of(capsys, *flags)


def test_torchrun_starts_no_second_run(capsys, torchrun):
    names = ["--student", FRS, "--teacher", FRS, "--finetune-teacher"]
    assert "leave torchrun out and give --num-gpus" in error_of(capsys, *names)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:29500", "tcp://127.0.0.1", "tcp://host:port", "file:///x"]
)
def test_an_address_where_nobody_can_meet(capsys, tmp_path, url):
    words = ["--config-file", FRS, "--num-gpus", 2, "--dist-url", url]
    message = error_of(capsys, *words, "OUTPUT_DIR", tmp_path / "run")
    assert f"--dist-url is '{url}': give tcp://ADDRESS:PORT" in message


def test_a_port_that_another_program_has(capsys, tmp_path, store):
    url = f"tcp://127.0.0.1:{store.port}"
    words = ["--config-file", FRS, "--num-gpus", 2, "--dist-url", url]
    message = error_of(capsys, *words, "OUTPUT_DIR", tmp_path / "run")
    assert f"cannot meet at 127.0.0.1:{store.port}" in message and "give a free port" in message


def test_processes_need_images_and_gpus(monkeypatch):
    cfg = config(FRS, ["SOLVER.IMS_PER_BATCH", 4])
    refuse_processes(cfg, 2, 4, training=True)
    with pytest.raises(UserError, match="expected a positive multiple of .* processes, 3"):
        refuse_processes(cfg, 3, 3, training=True)
    refuse_processes(cfg, 3, 3, training=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cfg.MODEL.DEVICE = "cuda"
    refuse_processes(cfg, 2, 4, training=True)
    with pytest.raises(UserError, match="--num-gpus is 4, but torch sees 2: .*MODEL.DEVICE cpu"):
        refuse_processes(cfg, 4, 4, training=True)
    cfg.MODEL.DEVICE = "cuda:1"
    refuse_processes(cfg, 1, 1, training=True)
    with pytest.raises(UserError, match="MODEL.DEVICE is 'cuda:1', but 2 processes have a GPU"):
        refuse_processes(cfg, 2, 2, training=True)


def test_one_process_tells_what_ends_a_run(store):
    assert [is_first_to_tell(store) for _ in range(3)] == [True, False, False]


def test_a_process_tells_it_if_nobody_can_be_asked():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    del server
    assert is_first_to_tell(client)


def test_the_command_to_resume_is_torchruns(monkeypatch):
    argv = ("train_net.py", "--config-file", "x.yaml")
    assert command_to_resume(argv) == "python train_net.py --resume --config-file x.yaml"
    for name, value in environment(GROUP_WORLD_SIZE="1", TORCHELASTIC_RUN_ID="none").items():
        monkeypatch.setenv(name, value)
    once = "torchrun --nproc_per_node 2 train_net.py --resume --config-file x.yaml"
    assert command_to_resume(argv) == once
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    assert command_to_resume(argv).startswith("torchrun --nnodes 3 --nproc_per_node 2 ")


def test_release_0_6_and_main_make_the_local_group_each_in_its_way(monkeypatch):
    made = []
    monkeypatch.setattr(processes.comm, "create_local_process_group", made.append, raising=False)
    processes._make_local_group(2)
    assert made == [2]


def threads_of_gloo():
    names = (Path(x, "comm").read_text() for x in Path("/proc/self/task").iterdir())
    return sum("gloo" in name for name in names)


def test_no_thread_of_the_group_outlives_it(store):
    """One that lets go of a tensor while Python ends would abort the process."""
    join(Place(0, 1, 0, 1), store, config(FRS))
    dist.all_reduce(torch.ones(3), group=comm._get_global_gloo_group())
    assert threads_of_gloo()
    leave()
    assert not threads_of_gloo() and not dist.is_initialized()
