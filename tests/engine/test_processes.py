"""Runs in processes of their own: one that dies, and stopping, resuming and evaluating together."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from small_run import FCOS, TORCHRUN, TWO, finish, start
from toys import detector

LIMIT = 240  # seconds; a busy machine is slow
several = pytest.mark.processes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def lines(errors):
    return [line for line in errors.splitlines() if line.startswith("error: ")]


def children(process):
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def processes_of(process):
    """Those that a run of several has started, in the order of their ranks."""
    found = ["pgrep", "-P", str(process.pid), "-f", "multiprocessing.spawn"]
    return [
        int(pid) for pid in subprocess.run(found, capture_output=True, text=True).stdout.split()
    ]


def wait_for(path, process, seconds=LIMIT):
    deadline = time.monotonic() + seconds
    while not os.path.exists(path):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


def test_a_worker_that_is_killed(data, tmp_path):
    opts = ["SOLVER.MAX_ITER", 100000, "DATALOADER.NUM_WORKERS", 1]
    process = start(data, tmp_path / "run", *opts)
    wait_for(tmp_path / "run" / "model_0000002.pth", process)
    for child in children(process):
        os.kill(child, signal.SIGKILL)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    [line] = lines(err)
    assert "a process that loads data ended" in line and "--resume" in line
    assert "Traceback" not in out + err


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group(data, tmp_path, number, status):
    opts = ["SOLVER.MAX_ITER", 100000, "DATALOADER.NUM_WORKERS", 2]
    process = start(data, tmp_path / "run", *opts)
    wait_for(tmp_path / "run" / "model_0000002.pth", process)
    for pid in [*children(process), process.pid]:
        os.kill(pid, number)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == status and "Traceback" not in out + err, err
    assert "go on with: python" in out.splitlines()[-1]


@several
def test_a_process_that_dies_ends_the_run(data, tmp_path):
    process = start(data, tmp_path / "run", "SOLVER.MAX_ITER", 100000, flags=TWO)
    wait_for(tmp_path / "run" / "model_0000002.pth", process)
    os.kill(processes_of(process)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 137 and "Traceback" not in out + err
    assert any("ended or does not answer" in line for line in lines(err)), err
    assert lines(err)[-1].endswith("terminated with signal SIGKILL; add --resume to go on")


@several
def test_batches_of_a_step_and_average_in_two_processes(data, tmp_path):
    opts = ["SOLVER.MAX_ITER", 2, "SOLVER.ACCUMULATION_STEPS", 2, "SOLVER.EMA_DECAY", 0.5]
    status, out, err = finish(data, tmp_path / "run", *opts, flags=TWO)
    assert status == 0 and "2 iterations of 4 images" in out, err
    assert "ema/bbox/AP" in (tmp_path / "run" / "metrics.json").read_text().splitlines()[-1]
    average = torch.load(tmp_path / "run" / "model_ema.pth", weights_only=True)["model"]
    final = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"]
    assert average.keys() == final.keys()
    assert any(not torch.equal(average[name], value) for name, value in final.items())


@several
def test_processes_stop_together(data, tmp_path):
    process = start(data, tmp_path / "run", "SOLVER.MAX_ITER", 100000, flags=TWO)
    wait_for(tmp_path / "run" / "model_0000002.pth", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 143 and "Traceback" not in out + err
    assert out.count("Stopped by SIGTERM") == err.count("Stopping after this step") == 1


@several
def test_torchrun_stops_and_num_gpus_goes_on_exactly(data, tmp_path):
    opts = ["SOLVER.MAX_ITER", 40]
    process = start(data, tmp_path / "run", *opts, launcher=TORCHRUN)
    wait_for(tmp_path / "run" / "model_0000002.pth", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert out.count("Stopped by SIGTERM") == err.count("Stopping after this step") == 1
    assert "go on with: torchrun --nproc_per_node 2 " in out
    assert not os.path.exists(tmp_path / "run" / "model_final.pth")
    for name, flags in (("run", ["--resume", *TWO]), ("whole", TWO)):
        status, _, err = finish(data, tmp_path / name, *opts, flags=flags)
        assert status == 0, err
    ours, theirs = (final_model(tmp_path / name) for name in ("run", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def final_model(folder):
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    assert len(saved["run_state"]["ranks"]) == 2
    return saved["model"]


@several
@pytest.mark.parametrize("door", [{"flags": TWO}, {"launcher": TORCHRUN}], ids=["flag", "torchrun"])
def test_a_mistake_that_all_processes_find_is_told_once(data, tmp_path, door):
    status, out, err = finish(data, tmp_path / "run", "MODEL.WEIGHTS", "/no.pth", **door)
    [line] = lines(err)
    assert status == 1 and line.startswith("error: MODEL.WEIGHTS is '/no.pth'")
    assert "Traceback" not in out and not list(tmp_path.glob("run/model_*.pth"))


@several
def test_two_processes_evaluate_as_one(data, tmp_path):
    weights = tmp_path / "student.pth"
    torch.save(
        {"model": detector(FCOS, ["MODEL.FCOS.SCORE_THRESH_TEST", 0.0]).state_dict()}, weights
    )
    opts = ["MODEL.WEIGHTS", weights, "MODEL.FCOS.SCORE_THRESH_TEST", 0.0]
    found = []
    for name, flags in (("one", []), ("two", TWO)):
        flags = ["--eval-only", *flags]
        status, out, err = finish(data, tmp_path / name, *opts, config=FCOS, flags=flags)
        assert status == 0 and out.count("bbox on toy_val") == 1, err
        results = tmp_path / name / "inference" / "coco_instances_results.json"
        found.append(sorted(map(str, json.loads(results.read_text()))))
    assert found[0] == found[1] and found[0]
