"""Runs of seconds on a pretended GPU, each in a process of its own:

python tests/on_a_pretended_gpu.py step METHOD
python tests/on_a_pretended_gpu.py train DATA_FOLDER ARGUMENTS…
python tests/on_a_pretended_gpu.py mix
"""

import copy
import sys

import torch
from contract.cells import all_cells, build_cell, run_steps
from pretended_gpu import MixedDevices, pretended_gpu
from small_run import TOY

from d2kd.cli.main import train
from d2kd.data.builtin import register_shapes


def steps(method: str) -> None:
    """A step of the method on each kind of student is that on a CPU: losses and gradients."""
    with pretended_gpu() as gpu:
        for cell in all_cells():
            if cell.method != method:
                continue
            model = build_cell([cell])
            (found,) = run_steps(copy.deepcopy(model).to(gpu), count=1)
            (expected,) = run_steps(model, count=1)
            for ours, theirs in zip(found, expected):
                assert ours.keys() == theirs.keys()
                for name, value in ours.items():
                    assert value.device.type == gpu, (cell, name)
                    # Gradients are summed in another order
                    torch.testing.assert_close(value.cpu(), theirs[name], rtol=1e-4, atol=1e-5)
            print(cell)


def run(data: str, *arguments: str) -> None:
    """A whole run, with the arguments of ``train_net.py``."""
    register_shapes(TOY, data)
    with pretended_gpu() as gpu:
        train([*arguments, "MODEL.DEVICE", gpu])


def mix() -> None:
    """Tensors of both devices in one operation fail, but for what a GPU allows."""
    with pretended_gpu() as gpu:
        here, there = torch.ones(3), torch.ones(3, device=gpu)
        mixed = (
            lambda: there + here,
            lambda: here.mul_(there),
            lambda: torch.cat([there, here]),
            lambda: torch.stack([there[0], here[0]]),
            lambda: there.numpy(),
        )
        for operation in mixed:
            try:
                operation()
            except (MixedDevices, TypeError):
                continue
            raise AssertionError("an operation on both devices passed")
        assert (there + here[0]).device == there[torch.tensor([0, 2])].device == there.device
        assert there.tolist() == [1, 1, 1] and there.cpu().device == here.device


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    {"step": steps, "train": run, "mix": mix}[what](*arguments)
