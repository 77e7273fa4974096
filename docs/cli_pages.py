"""Writes docs/cli/<verb>.md from the command line itself, so that the pages cannot say what it does not do.

    python docs/cli_pages.py            # write the pages
    python docs/cli_pages.py --check    # say which are not current, exit code 1 if any

A verb that is added to the command needs nothing here: run this again. EXAMPLES may have lines for it.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

for _name in [name for name in os.environ if name.startswith("HARNESS_")]:
    del os.environ[_name]  # defaults are documented as they are without them
os.environ.pop("XDG_CACHE_HOME", None)

from rich.text import Text  # noqa: E402
from typer.main import get_command  # noqa: E402

from harness.cli import app  # noqa: E402

FOLDER = Path(__file__).parent / "cli"
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "eval": (
        "harness eval --model builtin --num-prompts 8 --batch-size 4",
        "harness eval --model builtin -b 4 -s flexgen --set w_gpu_percent=20 --set w_cpu_percent=20",
        "harness eval --model builtin --cpu-mem 200MB --tag machine=small --repeats 5",
    ),
    "plan": (
        "harness plan -m facebook/opt-30b --gpu-mem 16GiB -n 96 --input-len 512",
        "harness plan -m facebook/opt-30b --hardware benchmarks/h200/profile-float16.json --json",
    ),
    "benchmark": (
        "harness benchmark --model builtin -n 8 -b 4 --launches 3",
        "harness benchmark --suite smoke",
        "harness benchmark --model builtin -s flexgen -b 1 -b 4 -b 8 --fail-on parity",
        "harness benchmark --resume @latest",
    ),
    "compare": (
        "harness compare main HEAD",
        "harness compare @latest~1 @latest --metric generation_tok_s --markdown",
        "harness compare main HEAD --fail-on generation_tok_s:5%",
        "harness compare --strategies",
    ),
    "history": ("harness history --metric generation_tok_s --html history.html",),
    "profile": ("harness profile --model builtin", "harness profile --refresh --output here.json"),
    "doctor": ("harness doctor", "harness doctor --fix", "harness doctor --prune --older-than 0"),
    "sync": ("harness sync results",),
    "ui": ("harness ui", "harness ui --port 8080 --no-open"),
    "export": (
        "harness export > runs.csv",
        "harness export -o runs.parquet --experiment offload-eval -s flexgen -s autoflex",
        "harness export --results-dir results -o runs.json",
    ),
    "config show": ("harness config show", "harness config show -s autoflex --set objective=latency --json"),
}
EXIT_CODES = (
    "0 ok, 1 internal error, 2 usage, 3 a check failed, 4 measured but not delivered to MLflow, 5 does not fit or out of "
    "memory, 6 measured in part, 130 interrupted"
)
COMPLETION = """## Shell completion

    harness --install-completion       # for the shell you are in; then open a new one
    harness --show-completion          # print it instead, to put it where you like

Completed are verbs, options, and the values of options that are names: strategies, models, datasets, number formats.
It works in bash, zsh, fish and PowerShell.
"""
_GENERATED = "<!-- Made from the command line by docs/cli_pages.py; do not edit. -->\n\n"


def pages() -> dict[str, str]:
    """The text of each page by file name."""
    verbs = list(_verbs(get_command(app), ()))
    texts = {_file_name(name): _page(name, command) for name, command in verbs}
    return {**texts, "README.md": _index(verbs)}


def _verbs(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, inner in command.commands.items():
        if getattr(inner, "hidden", False):
            continue
        if hasattr(inner, "commands"):
            yield from _verbs(inner, (*path, name))
        else:
            yield " ".join((*path, name)), inner


def _file_name(verb: str) -> str:
    return f"{verb.replace(' ', '-')}.md"


def _page(verb: str, command: Any) -> str:
    lines = [f"# harness {verb}", "", *_paragraphs(command.help)]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    usage = " ".join([f"harness {verb}", "[OPTIONS]", *(_argument(one) for one in arguments)])
    lines += ["", f"    {usage}"]
    if examples := EXAMPLES.get(verb):
        lines += ["", "Examples:", "", *(f"    {example}" for example in examples)]
    if arguments:
        lines += ["", "| argument | meaning |", "|---|---|"]
        lines += [f"| `{_argument(one)}` | {_cell(getattr(one, 'help', ''))} |" for one in arguments]
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
    for panel, members in panels.items():
        title = [] if len(panels) == 1 else ["", f"## {panel}"]
        lines += [*title, "", "| option | meaning | default |", "|---|---|---|"]
        lines += [_row(option) for option in members]
    lines += ["", f"Exit codes: {EXIT_CODES}. See also the [list of verbs](README.md)."]
    return _GENERATED + "\n".join(lines) + "\n"


def _argument(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()).strip("[]")
    several = "..." if argument.nargs == -1 else ""
    return f"{name}{several}" if argument.required else f"[{name}]{several}"


def _row(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    metavar = (option.metavar or "").strip()
    if not metavar and not option.is_flag:
        metavar = "N" if isinstance(option.default, int | float) else "TEXT"
    if metavar:
        names += f" `{metavar}`"
    text = Text.from_markup(option.help or "").plain
    text, _, default = text.partition("[default: ")
    shown = default.rstrip("]") if default else _default(option)
    return f"| {_cell(names)} | {_cell(text.strip())} | {_cell(shown)} |"


def _default(option: Any) -> str:
    value = option.default
    if isinstance(value, bool):
        return ("on" if value else "off") if option.secondary_opts else ""
    if value is None or callable(value) or isinstance(value, list | tuple):
        return ""
    return str(value)


def _index(verbs: list[tuple[str, Any]]) -> str:
    lines = ["# The command line", "", "A page per verb, made from the command itself."]
    panels: dict[str, list[tuple[str, Any]]] = {}
    groups: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]
    for verb, command in verbs:
        top = groups[verb.partition(" ")[0]]
        panel = getattr(top, "rich_help_panel", None) or "Commands"
        panels.setdefault(str(panel), []).append((verb, command))
    for panel, members in panels.items():
        lines += ["", f"## {panel}", "", "| verb | what it does |", "|---|---|"]
        lines += [
            f"| [`harness {verb}`]({_file_name(verb)}) | {_cell(_paragraphs(command.help)[0])} |"
            for verb, command in members
        ]
    lines += ["", f"Exit codes: {EXIT_CODES}."]
    return _GENERATED + "\n".join(lines) + "\n\n" + COMPLETION


def _paragraphs(text: str | None) -> list[str]:
    blocks = [" ".join(block.split()) for block in Text.from_markup(text or "").plain.split("\n\n")]
    return "\n\n".join(block for block in blocks if block).split("\n")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def main() -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    wanted = pages()
    for verb, examples in EXAMPLES.items():
        assert _file_name(verb) in wanted, f"EXAMPLES names {verb}, which is no verb"
        named = [word for one in examples for word in shlex.split(one) if word.startswith("-")]
        page = wanted[_file_name(verb)].partition("| option |")[2]
        foreign = [word for word in named if f"`{word}`" not in page]
        assert not foreign, f"an example of {verb} has {foreign}, which it does not take"
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    stale = sorted(name for name in wanted | there if wanted.get(name) != there.get(name))
    if arguments.check:
        if stale:
            sys.stderr.write(f"not current in {folder}: {', '.join(stale)}; run make docs\n")
        return 1 if stale else 0
    folder.mkdir(parents=True, exist_ok=True)
    for name in stale:
        if name in wanted:
            (folder / name).write_text(wanted[name], encoding="utf-8")
        else:
            (folder / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
