"""Nothing in a config file is run."""

import os

import pytest
from toys import config, distill_config

from d2kd.config import read_config
from d2kd.distillation import build_model
from d2kd.errors import UserError
from d2kd.model_zoo import resolve_config
from d2kd.safe_yaml import anchor_sizes, read_value, read_yaml

MERGES = [f"A{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40)]
ATTACKS = {
    "apply": "!!python/object/apply:os.system ['touch {mark}']",
    "new": "!!python/object/new:os.system ['touch {mark}']",
    "eval": "!!python/object/apply:eval [\"__import__('os').system('touch {mark}')\"]",
    "exec": "!!python/object/apply:exec [\"open('{mark}', 'w')\"]",
    "comprehension": "!!python/object/apply:eval [\"[open('{mark}', 'w') for x in [1]]\"]",
    "loop": "!!python/object/apply:eval [\"[x for x in [open('{mark}', 'w')]]\"]",
    "name": "!!python/name:os.system",
    "module": "!!python/module:os",
    "tuple": "!!python/tuple [1, 2]",
    "unknown": "!thing 3",
}


def refused(path):
    with pytest.raises(UserError) as error:
        config(str(path))
    message = str(error.value)
    assert "\n" not in message and "nothing in a config is run" in message
    return message


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("base", [False, True])
def test_a_config_is_data(tmp_path, attack, base):
    mark, evil, path = (tmp_path / name for name in ("mark", "evil.yaml", "config.yaml"))
    evil.write_text("SEED: 1\nMODEL:\n  WEIGHTS: " + attack.format(mark=mark) + "\n")
    path.write_text("_BASE_: evil.yaml\n" if base else evil.read_text())
    assert f"{evil if base else path}: line 3: the tag" in refused(path)
    assert not mark.exists()


def test_a_teachers_config_is_data(tmp_path):
    evil, mark = tmp_path / "evil.yaml", tmp_path / "mark"
    evil.write_text("MODEL: " + ATTACKS["apply"].format(mark=mark))
    cfg = distill_config(tmp_path, "FCOS", ["DISTILL.TEACHER.CONFIG", str(evil)])
    with pytest.raises(UserError, match="evil.yaml: line 1: the tag"):
        build_model(cfg)
    assert not mark.exists()


def test_detectron2s_own_anchor_sizes_are_read():
    cfg = config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes == [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)]


@pytest.mark.parametrize(
    "text",
    [
        "[x for x in y]",
        "[x for x in [1] if x]",
        "[x for x in [1] for z in [2]]",
        "[x() for x in [1]]",
        "[x.real for x in [1]]",
        "[9**9**9**9 for x in [1]]",
        "[1/0 for x in [1]]",
        "['a' for x in [1]]",
        "[[x] * 999999999 for x in [1]]",
        "[x for x in [[1]]][0]",
        "{x for x in [1]}",
        "1 + 1",
        "[x for x in " + "[" * 90 + "]" * 90 + "]" * 9,
        "[x for",
    ],
)
def test_other_expressions_are_not(text):
    with pytest.raises(ValueError):
        anchor_sizes(text)


def test_bases_in_every_form(tmp_path):
    (tmp_path / "a.yaml").write_text("SEED: 1\nSOLVER: {MAX_ITER: 7, STEPS: [3]}\n")
    (tmp_path / "b.yaml").write_text("SOLVER: {MAX_ITER: 8}\n")
    path = tmp_path / "c.yaml"
    path.write_text(f"_BASE_: [a.yaml, {tmp_path}/b.yaml]\nVERSION: 2\n")
    expected = {"SEED": 1, "SOLVER": {"MAX_ITER": 8, "STEPS": [3]}, "VERSION": 2}
    assert read_yaml(str(path)) == expected


@pytest.mark.parametrize("name", ["shapes/frs/fcos_tiny.yaml", "Base-RetinaNet.yaml"])
def test_bases_are_found_by_name(tmp_path, name):
    path = tmp_path / "mine.yaml"
    path.write_text(f"_BASE_: [{name}]\nSEED: 3\n")
    expected = {**read_yaml(resolve_config(name, "test")), "SEED": 3}
    assert read_yaml(str(path)) == expected
    folder = tmp_path / os.path.dirname(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / os.path.basename(name)).write_text("SEED: 1\nVERSION: 2\n")  # beside it comes first
    assert read_yaml(str(path)) == {"SEED": 3, "VERSION": 2}


def test_a_base_is_not_looked_for_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "base.yaml").write_text("SEED: 1\n")
    (tmp_path / "a" / "mine.yaml").write_text("_BASE_: base.yaml\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="mine.yaml: _BASE_ is 'base.yaml': no such file beside"):
        read_yaml("a/mine.yaml")


@pytest.mark.parametrize(
    "content, words",
    [
        ("_BASE_: config.yaml", "its _BASE_ leads back"),
        ("_BASE_: nowhere.yaml", "_BASE_ is 'nowhere.yaml': no such file"),
        ("_BASE_: [3]", "_BASE_ is 3: give a file"),
        ("_BASE_:", "_BASE_ is None: give a file"),
        ("", "holds None, expected config keys"),
        ("[1, 2]", "expected config keys"),
        ("MODEL: [", "line 1"),
        ("A: " + "[" * 3000, "config.yaml: nested too deeply"),
        ("A: &a [*a]", "nested too deeply"),
        (
            "\n".join(
                f"A{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(9)
            ),
            "holds 5e.08 values",
        ),
        ("\n".join(["A0: &a0 {x: 1}", *MERGES]), "values once"),
        ("A: 2026-13-45", "month must be"),
        ("A: !!timestamp abc", "a value cannot be read"),
        ("VERSION: two", "VERSION is 'two': Detectron2's are 1 and 2"),
        ("A: 1" + ":1" * 200 + ".5", "a value cannot be read"),
        ("SOLVER: {MAX_ITER: 1" + "0" * 400 + "}", "MAX_ITER is 10+: give a number below"),
        ('OUTPUT_DIR: "a\\0b"', "OUTPUT_DIR is 'a.*: give text in UTF-8"),
        ("SEED: 1\nSOLVER: {MAX_ITER: 1, MAX_ITER: 2}", "line 2: 'MAX_ITER' stands twice"),
        ("1: 2", "1 is no key"),
        ("MODEL: {BACKBONE: {3: 4}}", "3 is no key"),
    ],
)
def test_broken_files_get_one_line(tmp_path, content, words):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=words) as error:
        config(str(path))
    assert "\n" not in str(error.value)


def test_files_that_ask_for_each_other_many_times(tmp_path):
    """Two more of each at every step: 2^12 readings."""
    for i in range(12):
        (tmp_path / f"{i}.yaml").write_text(f"_BASE_: [{i + 1}.yaml, {i + 1}.yaml]\n")
    (tmp_path / "12.yaml").write_text("SEED: 1\n")
    with pytest.raises(UserError, match="its _BASE_ leads back .* or to more than 100 files"):
        read_yaml(str(tmp_path / "0.yaml"))


@pytest.mark.parametrize(
    "word", ["1" + "+1j" * 5000, "-" * 100_000 + "1", "(" * 100_000, "[!!timestamp abc]"]
)
def test_odd_words_on_the_command_line_get_one_line(word):
    with pytest.raises(UserError, match="^command line: ") as error:
        read_config("shapes/frs/fcos_tiny.yaml", ["SEED", word])
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"MODEL: \xff")
    with pytest.raises(UserError, match="config.yaml: is no text"):
        read_yaml(str(tmp_path / "config.yaml"))


def test_configs_of_the_first_version_are_upgraded(tmp_path):
    (tmp_path / "plain.yaml").write_text("MODEL: {WEIGHT: weights.pth}\n")
    cfg = config(str(tmp_path / "plain.yaml"))
    assert cfg.MODEL.WEIGHTS == "weights.pth" and cfg.VERSION == 2


@pytest.mark.parametrize(
    "word, value",
    [
        ("[FRS, PKD]", ["FRS", "PKD"]),
        ("[{json: a.json, images: b}]", [{"json": "a.json", "images": "b"}]),
        ("{MAX_ITER: 3}", "{MAX_ITER: 3}"),
        ("['FRS']", "['FRS']"),  # yacs reads what is Python
        ("[1, 2e-5]", "[1, 2e-5]"),
        ("FRS", "FRS"),
        ("[!!python/object/apply:os.system [ls]]", "[!!python/object/apply:os.system [ls]]"),
        ("[", "["),
        ("[" * 3000 + "a", "[" * 3000 + "a"),
        (["FRS"], ["FRS"]),
    ],
)
def test_lists_on_the_command_line(word, value):
    assert read_value(word) == value


def test_methods_are_named_as_in_a_yaml():
    cfg = read_config("shapes/frs/fcos_tiny.yaml", ["DISTILL.METHODS", "[FRS, PKD]"])
    assert list(cfg.DISTILL.METHODS) == ["FRS", "PKD"]


def test_files_of_proposals_are_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "MODEL: {LOAD_PROPOSALS: True}\nDATASETS: {PROPOSAL_FILES_TRAIN: ['proposals.pkl']}\n"
    )
    with pytest.raises(UserError, match="LOAD_PROPOSALS is True: .* can run code"):
        read_config(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("value", ["{MAX_ITER: 3}", "{'MAX_ITER': 3}", "3"])
def test_the_values_of_a_node_are_not_replaced_by_a_few(value):
    with pytest.raises(UserError, match="SOLVER holds keys, not a value: give one of them, SOLVER"):
        read_config("shapes/frs/fcos_tiny.yaml", ["SOLVER", value])
