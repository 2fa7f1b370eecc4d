"""Random kills over all methods: the run that was resumed after each is the one never killed."""

import collections
import random
import signal

from forked import PLACES, forked_run
from runs import assert_same_run, run_config

from d2kd.methods import DISTILLER_REGISTRY

# A student that a method works on; FCOS for the others
STUDENTS = {"GDetKD": "FasterRCNN", "DeFeat": "FasterRCNN", "LD": "GFL", "PKD": "RetinaNet"}
OPTS = {"GDetKD": ["DISTILL.GDETKD.QUEUE_SIZE", 100]}
MOST_IN_A_SERIES = 5


def series(folder, method, dataset, choose, kills):
    """One run, killed some times, and the same run in one go: (signals by place, differences)."""
    configs = []
    for name in ("whole", "killed"):
        opts = ["SOLVER.MAX_ITER", 9, *OPTS.get(method, [])]
        student = STUDENTS.get(method, "FCOS")
        cfg = run_config(folder / name, student, dataset, opts, methods=[method])
        path = folder / f"{name}.yaml"
        path.write_text(cfg.dump())
        configs.append((cfg, str(path)))
    # Only the weights of the teacher are at another place
    (whole, whole_path), (killed, killed_path) = configs
    assert forked_run(whole_path, folder / "whole.txt") == 0, (folder / "whole.txt").read_text()
    counts = collections.Counter()
    for i in range(kills):
        fault = (choose.choice(PLACES), 0, choose.choice((signal.SIGKILL, signal.SIGTERM)))
        most = {"data": 4, "forward": 60, "save": 2, "evaluation": 12}[fault[0]]
        fault = (fault[0], choose.randrange(most), fault[2])
        log = folder / f"{i}.txt"
        flags = ["--resume"] if i else []
        status = forked_run(killed_path, log, flags=flags, fault=fault)
        counts[fault[0], signal.Signals(fault[2]).name, status] += 1
        if status not in (0, -9, 143) or "Traceback" in log.read_text():
            return counts, [f"{method} {fault}: status {status}\n{log.read_text()[-1500:]}"]
    status = forked_run(killed_path, folder / "last.txt", flags=["--resume"])
    if status:
        return counts, [f"{method}: not resumed\n{(folder / 'last.txt').read_text()[-1500:]}"]
    try:
        assert_same_run(whole, killed)
    except AssertionError as e:
        return counts, [f"{method}: differs after kills: {e}"]
    return counts, []


def run_kills(folder, dataset, number, seed):
    """
    Returns:
        figures and differences.
    """
    choose = random.Random(seed)
    methods = sorted(name for name, _ in DISTILLER_REGISTRY)
    counts, wrong, n = collections.Counter(), [], 0
    while sum(counts.values()) < number and len(wrong) < 3:
        place = folder / str(n)
        place.mkdir()
        left = number - sum(counts.values())
        method = methods[n % len(methods)]
        kills = min(left, MOST_IN_A_SERIES)
        found, differences = series(place, method, dataset, choose, kills)
        counts, n = counts + found, n + 1
        wrong += differences
    ended = sum(count for (_, _, status), count in counts.items() if status)
    by_place = collections.Counter()
    for (where, name, status), count in counts.items():
        by_place[f"{name} in {where}"] += count if status else 0
    figures = f"{ended} kills in {n} runs of {min(n, len(methods))} methods: " + ", ".join(
        f"{count} {name}" for name, count in sorted(by_place.items())
    )
    return figures, wrong
