"""From options and suites to cells: which there are, what they are called, and what is refused before anything runs."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flexllmgen.errors import UsageError
from harness.benchmark.grid import AXES, Asked, Grid, make_grid
from harness.benchmark.names import slug, unique_names
from harness.benchmark.suite import parse_duration, read_suite, shipped_suites
from harness.config import EvalConfig
from harness.job import Job


@pytest.fixture
def tiny(tiny_model: Path) -> str:
    return str(tiny_model)


def grid_of(options: Mapping[str, Any], environ: Mapping[str, str] | None = None, **asked: Any) -> Grid:
    # The tiny model's context is short.
    short = {} if "suite" in asked else {"input_len": ["16"]}
    return make_grid(Asked(options={**short, **options}, **asked), environ or {})


def names(grid: Grid) -> list[str]:
    return [cell.name for cell in grid.cells]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_default_is_the_seeds_three(tiny: str) -> None:
    grid = grid_of({"model": [tiny], "input_len": ["16"]})
    assert names(grid) == ["accelerate", "flexgen", "autoflex"]
    assert grid.baseline == "accelerate"
    flexgen = grid.cells[1].strategy_config
    assert (flexgen["w_gpu_percent"], flexgen["cache_gpu_percent"], flexgen["act_gpu_percent"]) == (
        100,
        100,
        100,
    )


def test_several_values_are_a_product_with_the_strategies_innermost(tiny: str) -> None:
    options = {
        "model": [tiny],
        "strategy": ["accelerate", "flexgen"],
        "batch_size": ["1", "4"],
        "gen_len": ["2", "3"],
    }
    grid = grid_of(options)
    assert names(grid) == [
        f"{strategy}-gen{gen}-b{size}"
        for gen in (2, 3)
        for size in (1, 4)
        for strategy in ("accelerate", "flexgen")
    ]
    assert grid.cells[0].axes == {"strategy": "accelerate", "gen_len": 2, "batch_size": 1}
    assert {cell.common["gen_len"] for cell in grid.cells} == {2, 3}
    assert grid.cells[0].sources["batch_size"] == "option --batch-size"


def test_every_repeatable_option_is_one_of_the_command_line() -> None:
    from harness.cli.benchmarking import AXES as SEVERAL

    assert set(SEVERAL) == set(AXES)
    assert set(AXES) <= set(EvalConfig.model_fields)


def test_what_is_said_twice_is_run_once(tiny: str) -> None:
    options = {"model": [tiny, tiny], "strategy": ["flexgen", "flexgen"], "batch_size": ["2", "2"]}
    assert names(grid_of(options)) == ["flexgen"]


def test_the_same_grid_has_the_same_names_and_every_cell_is_a_job(tiny: str) -> None:
    options = {"model": [tiny], "batch_size": ["1", "2"], "gpu_mem": ["1GiB", "200MB"]}
    grid = grid_of(options)
    assert names(grid) == names(grid_of(options))
    assert len({name.lower() for name in names(grid)}) == 12
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names(grid))
    assert {"gpu1GiB", "gpu200MB"} <= set("-".join(names(grid)).split("-"))
    from harness.results import Provenance

    for cell in grid.cells:
        Job(
            run_uuid="u",
            common=EvalConfig.model_validate(cell.common),
            strategy_config=cell.strategy_config,
            sources=cell.sources,
            provenance=Provenance(),
            process={},
        )


def test_a_cap_is_tagged_as_emulated(tiny: str) -> None:
    capped = grid_of({"model": [tiny], "gpu_mem": ["1GiB"], "tag": ["team=a"]})
    for cell in capped.cells:
        assert EvalConfig.model_validate(cell.common).tags() == {"team": "a", "emulated": "true"}


def test_policies_stand_beside_the_strategies(tiny: str, tmp_path: Path) -> None:
    half = write(tmp_path, "half.toml", 'strategy = "flexgen"\nw_gpu_percent = 50\nw_cpu_percent = 50\n')
    none = write(
        tmp_path, "none on it.toml", 'strategy = "flexgen"\nw_gpu_percent = 0\nw_cpu_percent = 100\n'
    )
    grid = grid_of({"model": [tiny], "strategy": ["accelerate"]}, policies=[half, none])
    assert names(grid) == ["accelerate", "flexgen-half", "flexgen-none-on-it"]
    assert [cell.strategy_config.get("w_gpu_percent") for cell in grid.cells] == [None, 50, 0]
    assert grid.cells[1].axes == {"strategy": "flexgen", "policy": "half"}
    assert names(grid_of({"model": [tiny]}, policies=[half])) == ["flexgen-half"]


def test_set_reaches_the_strategies_that_have_the_key(tiny: str) -> None:
    grid = grid_of({"model": [tiny]}, assignments=["calibrate=false", "flexgen.overlap=0"])
    by_name = {cell.name: cell.strategy_config for cell in grid.cells}
    assert by_name["autoflex"]["calibrate"] is False
    assert by_name["flexgen"]["overlap"] == 0
    assert "calibrate" not in by_name["flexgen"]


def test_what_goes_before_what(tiny: str, tmp_path: Path) -> None:
    suite = write(
        tmp_path,
        "s.toml",
        f'[common]\nmodel = "{tiny}"\ngen_len = 3\ninput_len = 8\n[[cells]]\nstrategy = "flexgen"\ngen_len = 4\n',
    )
    config = write(tmp_path, "c.toml", "gen_len = 5\nseed = 6\nrepeats = 7\nwarmup = 2\n")
    environ = {"HARNESS_SEED": "8", "HARNESS_INPUT_LEN": "9"}
    (cell,) = grid_of({"repeats": "1"}, environ, suite=str(suite), config_file=config).cells
    said = {name: cell.common[name] for name in ("gen_len", "input_len", "seed", "repeats", "warmup")}
    assert said == {"gen_len": 4, "input_len": 8, "seed": 8, "repeats": 1, "warmup": 2}
    assert cell.sources["repeats"] == "option --repeats"
    assert "number 1" in cell.sources["gen_len"]
    assert cell.sources["warmup"] == f"file {config}"


def test_a_suites_lists_are_axes_and_its_strategies_can_be_chosen(tiny: str, tmp_path: Path) -> None:
    suite = write(
        tmp_path,
        "s.toml",
        f"""
        baseline = "flexgen"
        launches = 3
        cell_timeout = "2m"
        [common]
        model = "{tiny}"
        input_len = 16
        batch_size = [1, 2]
        calibrate = false
        [[cells]]
        strategy = ["flexgen", "autoflex"]
        [[cells]]
        strategy = "flexgen"
        policy = "half"
        w_gpu_percent = 50
        w_cpu_percent = [50, 25]
        """,
    )
    grid = grid_of({}, suite=str(suite))
    assert names(grid) == [
        "flexgen-b1",
        "autoflex-b1",
        "flexgen-b2",
        "autoflex-b2",
        "flexgen-half-b1-w_cpu-50",
        "flexgen-half-b1-w_cpu-25",
        "flexgen-half-b2-w_cpu-50",
        "flexgen-half-b2-w_cpu-25",
    ]
    assert grid.suite is not None
    assert (grid.baseline, grid.suite.launches, grid.suite.cell_timeout_s) == ("flexgen", 3, 120.0)
    assert names(grid_of({"strategy": ["autoflex"]}, suite=str(suite), baseline="autoflex")) == [
        "autoflex-b1",
        "autoflex-b2",
    ]
    # An option replaces what the suite says of it; cells that became the same are one.
    assert len(grid_of({"batch_size": ["4"]}, suite=str(suite)).cells) == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[common]\nmodel = 'builtin'\n", "no [[cells]]"),
        ("modle = 'x'\n[[cells]]\nstrategy = 'flexgen'", "'modle'"),
        ("[common]\nbatch_sise = 1\n[[cells]]\nstrategy = 'flexgen'", "'batch_sise'"),
        ("[[cells]]\nstrategy = 'flexgen'\nw_gpu_percnt = 1", "did you mean 'w_gpu_percent'"),
        ("[[cells]]\nstrategy = 'accelerate'\nw_gpu_percent = 1", "key of flexgen"),
        ("[[cells]]\nstrategy = 'flexgn'", "did you mean 'flexgen'"),
        ("[[cells]]\nstrategy = 'flexgen'\nbatch_size = []", "empty list"),
        ("[[cells]]\nstrategy = 'flexgen'\nbatch_size = 0", "must be 1 or more"),
        ("launches = 0\n[[cells]]\nstrategy = 'flexgen'", "launches"),
        ("cell_timeout = 'soon'\n[[cells]]\nstrategy = 'flexgen'", "10m"),
        ("[[cells]\n", "not valid TOML"),
    ],
)
def test_a_mistake_in_a_suite_is_told(tmp_path: Path, tiny: str, text: str, words: str) -> None:
    suite = write(tmp_path, "s.toml", text)
    with pytest.raises(UsageError, match=re.escape(words)):
        grid_of({"model": [tiny]}, suite=str(suite))


def test_mistakes_are_told_before_anything_runs(tmp_path: Path, tiny: str) -> None:
    nameless = write(tmp_path, "n.toml", "w_gpu_percent = 50\n")
    refused: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"model": [tiny], "batch_size": ["1", "x"]}, {}, "--batch-size 'x'"),
        ({"model": [tiny], "strategy": ["flexgn"]}, {}, "did you mean 'flexgen'"),
        ({"model": [tiny, "./nowhere"]}, {}, "no such folder"),
        ({"model": [tiny], "input_len": ["16", "400"]}, {}, "lower one of them"),
        ({"model": [tiny]}, {"baseline": "nobody"}, "--baseline nobody"),
        ({"model": [tiny]}, {"assignments": ["nokey=1"]}, "nokey"),
        ({"model": [tiny]}, {"assignments": ["deepspeed.x=1"]}, "deepspeed"),
        ({"model": [tiny]}, {"assignments": ["batch_size=1"]}, "--batch-size"),
        ({"model": [tiny]}, {"assignments": ["flexgen.w_cpu_percent=50"]}, "150 %"),
        ({"model": [tiny]}, {"policies": [nameless]}, "name its strategy"),
        ({"model": [tiny]}, {"policies": [tmp_path / "none.toml"]}, "no such file"),
        ({"model": [tiny]}, {"policies": [nameless], "suite": "smoke"}, "--policy and --suite"),
        ({"model": [tiny]}, {"suite": "smok"}, "did you mean 'smoke'"),
        ({"model": [tiny], "tag": ["x"]}, {}, "KEY=VALUE"),
    ]
    for options, asked, words in refused:
        with pytest.raises(UsageError, match=re.escape(words)):
            grid_of(options, **asked)


def test_the_shipped_suites_are_whole_grids(builtin_model: Path) -> None:
    assert set(shipped_suites()) == {"smoke", "seed", "flexgen-paper"}
    assert all(shipped_suites().values())
    assert {"accelerate", "flexgen", "autoflex"} <= set(names(grid_of({}, suite="smoke")))
    # Only dimensions are looked at, which are known without a download.
    seed = grid_of({"weights": "random"}, suite="seed")
    assert len(seed.cells) == 12
    paper = grid_of({}, suite="flexgen-paper")
    assert len(paper.cells) == 9
    assert all(cell.common["gpu_mem"] == 16 << 30 for cell in paper.cells)
    assert all((cell.common["input_len"], cell.common["gen_len"]) == (512, 32) for cell in paper.cells)
    policies = {
        str(cell.common["model"]).rpartition("-")[2]: [
            cell.strategy_config[f"{kind}_{tier}_percent"]
            for kind in ("w", "cache", "act")
            for tier in ("gpu", "cpu")
        ]
        for cell in paper.cells
        if cell.axes["strategy"] == "flexgen"
    }
    assert policies == {
        "6.7b": [100, 0, 100, 0, 100, 0],
        "30b": [20, 80, 0, 100, 0, 100],
        "175b": [0, 50, 0, 0, 0, 100],
    }


def test_names_stay_apart_and_safe() -> None:
    axes: list[dict[str, Any]] = [
        {"strategy": "flexgen", "model": "a/x"},
        {"strategy": "flexgen", "model": "b/x"},
        {"strategy": "flexgen", "model": "/models/Ünï côde/x"},
        {"strategy": "FLEXGEN", "model": "a/x"},
    ]
    made = unique_names(axes)
    assert len({name.lower() for name in made}) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in made)
    long = [slug("m" * 200 + end) for end in "ab"]
    assert len(set(long)) == 2
    assert max(map(len, long)) <= 80
    assert slug("模型")
    assert slug("../..") not in ("..", "")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("0.5", 0.5), ("1.5m", 90)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text, "x") == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "10 minutes", "m", "1s2h"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="10m"):
        parse_duration(text, "--cell-timeout")


def test_a_suite_is_found_by_file_also_without_its_ending(tmp_path: Path) -> None:
    text = "[[cells]]\nstrategy = 'flexgen'\n"
    assert read_suite(str(write(tmp_path, "mine", text))).name == "mine"
    with pytest.raises(UsageError, match="no such file"):
        read_suite(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("strategies", "text", "told"),
    [
        (
            ["accelerate", "flexgen"],
            "overlp=1",
            "none of accelerate, flexgen has a key 'overlp'; did you mean 'overlap'?",
        ),
        (["flexgen"], "flexgen.overlp=1", "flexgen has no key 'overlp'; did you mean 'overlap'?"),
        (["accelerate"], "zzz=1", "accelerate has no key 'zzz'; known keys: attn_implementation, "),
    ],
)
def test_an_unknown_key_names_the_nearest(tiny: str, strategies: list[str], text: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--set {text}: {told}")):
        grid_of({"model": [tiny], "strategy": strategies}, assignments=[text])
