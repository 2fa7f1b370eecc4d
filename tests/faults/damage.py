"""Checkpoints cut off and with flipped bits: refused, or read as they were."""

import pickle
import random

import numpy as np
import torch

from d2kd.checkpoint.files import Unreadable, read_file


def kinds(folder):
    """A checkpoint of every kind: (path, whether each of its bytes has a checksum)."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer{i}.weight": torch.randn(64, 32, generator=generator) for i in range(4)}
    state = {"model": tensors, "trainer": {"iteration": 3, "parameter_names": ["a"]}}
    torch.save(state, folder / "model_0000002.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    with open(folder / "zoo.pkl", "wb") as f:
        arrays = {k: v.numpy() for k, v in tensors.items()}
        pickle.dump({"model": arrays, "__author__": "somebody"}, f, protocol=2)
    return [(folder / "model_0000002.pth", True), (folder / "legacy.pth", False)] + [
        (folder / "zoo.pkl", False)
    ]


def same(one, other):
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[k], other[k]) for k in one)
        )
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return type(one) is type(other) and np.array_equal(np.asarray(one), np.asarray(other))
    return type(one) is type(other) and one == other


def outcome(path, content, expected):
    path.write_bytes(content)
    try:
        found, _ = read_file(str(path))
    except Unreadable:
        return "refused"
    return "the same" if same(expected, found) else "another"


def run_damage(folder, cuts, flips, seed):
    choose, wrong, figures = random.Random(seed), [], []
    for path, checked in kinds(folder):
        whole = path.read_bytes()
        expected, _ = read_file(str(path))
        counts = {"refused": 0, "the same": 0, "another": 0}
        for _ in range(cuts):
            result = outcome(path, whole[: choose.randrange(len(whole))], expected)
            if result == "another":
                wrong.append(f"{path.name} cut off is read as something else")
        for _ in range(flips):
            content = bytearray(whole)
            content[choose.randrange(len(whole))] ^= 1 << choose.randrange(8)
            counts[outcome(path, bytes(content), expected)] += 1
        if checked and counts["another"]:
            wrong.append(f"{path.name}: {counts['another']} flipped bits were not noticed")
        figures.append(
            f"{path.suffix[1:]} {path.stem}: {cuts} cut off; of {flips} flipped bits "
            f"{counts['refused']} refused, {counts['the same']} without effect, "
            f"{counts['another']} not noticed" + ("" if checked else " (it has no checksums)")
        )
    return "; ".join(figures), wrong
