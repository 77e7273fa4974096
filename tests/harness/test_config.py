"""Configuration: which source wins, what is refused and how, and where each value is said to come from."""

from pathlib import Path
from typing import Any

import pytest

from flexllmgen.errors import UsageError
from harness.config import EvalConfig, Settings, cache_dir, parse_size, resolve, unknown_variables
from strategies.registry import strategy_names


def settled(
    options: dict[str, Any] | None = None,
    *,
    file: Path | None = None,
    assignments: list[str] | None = None,
    environ: dict[str, str] | None = None,
) -> Settings:
    return resolve(options or {}, config_file=file, assignments=assignments or [], environ=environ or {})


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write


def refusal(**given: Any) -> str:
    with pytest.raises(UsageError) as caught:
        settled(**given)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_defaults_of_the_common_options() -> None:
    config = settled().common
    assert (config.strategy, config.model) == ("accelerate", "facebook/opt-1.3b")
    assert (config.input_len, config.gen_len, config.batch_size) == (128, 32, 1)
    assert (config.dataset, config.prompt_mode, config.chat_template) == ("humaneval", "pad", "auto")
    assert (config.dtype, config.weights, config.device) == ("auto", "pretrained", "auto")
    assert config.log_file == Path("log.log")
    assert config.offload_dir == cache_dir() / "offload"
    assert (config.gpu_mem, config.cpu_mem, config.tracking_uri) == (None, None, None)
    assert config.context == 160


def test_option_beats_environment_beats_file_beats_default(file: Any) -> None:
    path = file("input_len = 10\ngen_len = 11\nbatch_size = 12\n")
    environ = {"HARNESS_INPUT_LEN": "20", "HARNESS_GEN_LEN": "21"}
    settings = settled({"input_len": "30"}, file=path, environ=environ)
    common, sources = settings.common, settings.sources
    assert (common.input_len, common.gen_len, common.batch_size, common.repeats) == (30, 21, 12, 3)
    assert sources["input_len"] == "option --input-len"
    assert sources["gen_len"] == "environment HARNESS_GEN_LEN"
    assert sources["batch_size"] == f"file {path}"
    assert sources["repeats"] == "default"


def test_the_strategys_keys_have_the_same_precedence(file: Any) -> None:
    path = file('enable_offload = false\nquantize = "int8"\nattn_implementation = "eager"\n')
    settings = settled(
        file=path,
        environ={"HARNESS_QUANTIZE": "int4", "HARNESS_ATTN_IMPLEMENTATION": "sdpa"},
        assignments=["attn_implementation=flash_attention_2"],
    )
    values = settings.strategy.model_dump()
    assert values == {
        "enable_offload": False,
        "enable_kv_offload": False,
        "quantize": "int4",
        "attn_implementation": "flash_attention_2",
    }
    assert settings.sources["attn_implementation"] == "option --set attn_implementation"
    assert settings.sources["quantize"] == "environment HARNESS_QUANTIZE"
    assert settings.sources["enable_offload"] == f"file {path}"
    assert settings.sources["enable_kv_offload"] == "default (accelerate.toml)"


def test_the_listing_has_every_key_once_with_its_source() -> None:
    listing = settled({"num_prompts": "3"}).listing()
    keys = [setting.key for setting in listing]
    assert len(keys) == len(set(keys))
    assert set(EvalConfig.model_fields) < set(keys)
    assert {"enable_offload", "enable_kv_offload", "quantize", "attn_implementation"} < set(keys)
    assert next(setting for setting in listing if setting.key == "num_prompts").value == 3


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GiB", 16 * 2**30), ("800MB", 800_000_000), ("1.5 GiB", 3 * 2**29), ("64kib", 65536), ("1000", 1000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert settled({"cpu_mem": text}).common.cpu_mem == size


@pytest.mark.parametrize("text", ["16GX", "big", "", "-1GiB", "GiB", "0", "0GiB", "1e400GiB", "nan"])
@pytest.mark.parametrize("option", ["gpu_mem", "cpu_mem"])
def test_what_is_no_size_is_refused(option: str, text: str) -> None:
    message = refusal(options={option: text})
    assert message.startswith("--" + option.replace("_", "-"))
    assert "16GiB" in message
    assert "800MB" in message


@pytest.mark.parametrize("value", ["true", "inf", "-3", "1.5", "[1]"])
def test_a_size_in_a_file_is_a_text_or_a_whole_number(file: Any, value: str) -> None:
    assert "--cpu-mem" in refusal(file=file(f"cpu_mem = {value}\n"))
    assert settled(file=file("cpu_mem = 4096\n")).common.cpu_mem == 4096


@pytest.mark.parametrize("option", ["num_prompts", "input_len", "gen_len", "batch_size", "repeats"])
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", ""])
def test_numbers_must_be_whole_and_above_zero(option: str, value: str) -> None:
    message = refusal(options={option: value})
    assert message.startswith("--" + option.replace("_", "-"))
    assert repr(value) in message
    assert message.endswith("must be 1 or more" if value in ("0", "-1") else "must be a whole number")


def test_no_warm_up_is_allowed_a_negative_one_is_not() -> None:
    assert settled({"warmup": "0"}).common.warmup == 0
    assert refusal(options={"warmup": "-1"}) == "--warmup '-1': must be 0 or more"


@pytest.mark.parametrize("value", ["-1", str(2**64), "9" * 40])
def test_a_seed_fits_every_generator(value: str) -> None:
    assert "--seed" in refusal(options={"seed": value})


@pytest.mark.parametrize("key", ["input_len", "batch_size", "seed", "warmup"])
def test_a_truth_value_is_no_number(file: Any, key: str) -> None:
    assert key.replace("_", "-") in refusal(file=file(f"{key} = true\n"))


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("prompt_mode", "padd", "fill"),
        ("chat_template", "yes", "auto"),
        ("dtype", "fp16", "float16"),
        ("weights", "none", "random"),
        ("device", "gpu", "cuda"),
    ],
)
def test_a_choice_names_what_there_is(option: str, value: str, allowed: str) -> None:
    assert allowed in refusal(options={option: value})


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("inputlen = 3", "input_len"),
        ("batch-size = 3", "batch_size"),
        ("enable_ofload = true", "enable_offload"),
        ('quantise = "none"', "quantize"),
    ],
)
def test_a_mistyped_key_of_a_file_names_the_nearest(file: Any, text: str, nearest: str) -> None:
    path = file(text)
    message = refusal(file=path)
    assert message.startswith(str(path))
    assert f"did you mean {nearest!r}" in message


def test_a_key_near_to_nothing_lists_the_known_ones(file: Any) -> None:
    message = refusal(file=file("zzzzzzzz = 1"))
    assert "input_len" in message
    assert "quantize" in message


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("quantise=none", "did you mean 'quantize'"),
        ("input_len=3", "--input-len"),
        ("quantize", "KEY=VALUE"),
        ("quantize=int9", "'int8'"),
        ("enable_offload=7", "must be true or false"),
    ],
)
def test_assignments_are_checked(assignment: str, expected: str) -> None:
    assert expected in refusal(assignments=[assignment])


@pytest.mark.parametrize("value", ["off", "false", "0", " false "])
def test_assignments_read_truth_values_as_people_write_them(value: str) -> None:
    assert settled(assignments=[f"enable_offload={value}"]).strategy.model_dump()["enable_offload"] is False


@pytest.mark.parametrize("text", ['input_len = "many"', "model = 3", "no_mlflow = 5", 'tag = "a=b"', "= 3"])
def test_a_value_of_the_wrong_type_names_the_file(file: Any, text: str) -> None:
    path = file(text)
    assert str(path) in refusal(file=path)
    assert "Input should" not in refusal(file=path)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert "no such file" in refusal(file=tmp_path / "none.toml")
    assert "cannot be read" in refusal(file=tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(file=tmp_path / "binary.toml")


def test_an_unknown_strategy_names_those_there_are() -> None:
    message = refusal(options={"strategy": "acelerate"})
    assert "did you mean 'accelerate'" in message


def test_tags_are_pairs() -> None:
    assert settled({"tag": ["team=a=b", " k = v "]}).common.tags() == {"team": "a=b", "k": "v"}
    assert settled(environ={"HARNESS_TAG": "a=1,b=2"}).common.tags() == {"a": "1", "b": "2"}


@pytest.mark.parametrize("cap", ["gpu_mem", "cpu_mem"])
def test_a_run_under_a_cap_is_tagged_as_emulated(cap: str) -> None:
    assert settled({cap: "1GiB", "tag": ["team=a"]}).common.tags() == {"emulated": "true", "team": "a"}
    assert settled().common.tags() == {}
    for bad in ("team", "=x"):
        assert "KEY=VALUE" in refusal(options={"tag": [bad]})


def test_a_home_folder_is_expanded_wherever_it_is_written(
    file: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = file('results_dir = "~/results"\nlog_file = "~/run.log"\noffload_dir = "~/offload"\n')
    config = settled(file=path).common
    assert config.results_dir == tmp_path / "results"
    assert config.log_file == tmp_path / "run.log"
    assert config.offload_dir == tmp_path / "offload"
    assert "--log-file" in refusal(options={"log_file": "~nobody-of-that-name/run.log"})


def test_variables_that_mean_nothing_are_told() -> None:
    environ = {
        "HARNESS_INPUT_LEM": "1",
        "HARNESS_INPUT_LEN": "1",
        "HARNESS_QUANTIZE": "none",
        "HARNESS_CACHE_DIR": "/x",
        "HARNESS_CONFIG": "run.toml",
        "OTHER": "1",
    }
    assert unknown_variables(environ, ["quantize"]) == ["HARNESS_INPUT_LEM"]


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HARNESS_CACHE_DIR", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("HARNESS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "offload-harness"


@pytest.mark.parametrize("name", strategy_names())
def test_a_copy_of_a_strategys_file_is_a_whole_config_file(name: str) -> None:
    path = Path(__file__).parents[2] / "strategies" / f"{name}.toml"
    settings = resolve({}, config_file=path, assignments=[], environ={})
    assert settings.common.strategy == name


def test_a_key_of_another_strategy_names_it() -> None:
    with pytest.raises(UsageError, match="it is a key of flexgen: add -s flexgen"):
        resolve({}, config_file=None, assignments=["w_gpu_percent=1"], environ={})


def test_sections_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[accelerate]\nenable_offload = false\n")
    with pytest.raises(UsageError, match="keys are flat"):
        resolve({}, config_file=path, assignments=[], environ={})


def test_the_tracking_uri_shown_is_the_one_in_effect() -> None:
    def shown(**environ: str) -> tuple[object, str]:
        listing = resolve({}, config_file=None, assignments=[], environ=environ).listing()
        (one,) = [setting for setting in listing if setting.key == "tracking_uri"]
        return one.value, one.source

    assert shown(MLFLOW_TRACKING_URI="http://h:1") == ("http://h:1", "environment MLFLOW_TRACKING_URI")
    assert shown(MLFLOW_TRACKING_URI="http://h:1", HARNESS_TRACKING_URI="http://i:1")[0] == "http://i:1"
    assert str(shown()[0]).endswith("mlruns/mlflow.db")
