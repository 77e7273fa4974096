"""How a row becomes a prompt: a text with `{column}` fields.

    {question}                     a column
    {instruction}\\n\\n{context}     several; a column that is null gives nothing
    {turns[0]} {meta[author]}      an item of a list, a key of a mapping
    {messages}                     a conversation gives its first user turn

Braces meant literally are doubled. Knows nothing of where rows come from and of tokens.
"""

import difflib
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexllmgen.errors import UsageError

CONVERSATIONS = ("messages", "conversations", "turns")
# The columns that are taken for the prompt when neither the user nor the registry names one, in this order.
PROMPT_COLUMNS = ("prompt", "question", "instruction", "text", "input", *CONVERSATIONS)
USERS = {"user", "human", "prompter"}
STEPS = re.compile(r"\[([^\[\]]+)\]|\.([^.\[\]]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A template that fits rows of the given columns.

    Raises:
        UsageError: a field names no column, there is no field, or braces do not match.

    >>> Template(text="Q: {question}", columns=("question", "answer")).render({"question": "Why?"})
    'Q: Why?'
    """

    text: str
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        fields = self.fields
        if not fields:
            raise UsageError(
                f"the template {self.text!r} has no {{column}}; columns: {', '.join(self.columns)}"
            )
        for field in fields:
            if self._column(field) not in self.columns:
                raise self._missing(field)

    @property
    def fields(self) -> tuple[str, ...]:
        """What stands between the braces."""
        try:
            parsed = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise UsageError(
                f"the template {self.text!r} is malformed: {error}; double literal braces"
            ) from error
        return tuple(field for _, field, _, _ in parsed if field is not None)

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that the fields use."""
        return tuple(dict.fromkeys(self._column(field) for field in self.fields))

    def render(self, row: Mapping[str, Any]) -> str:
        """The prompt of one row.

        Raises:
            UsageError: an item or key does not exist in this row.
        """
        return _RowFormatter(self).vformat(self.text, (), row)

    def value(self, row: Mapping[str, Any], field: str) -> Any:
        """What a field stands for in a row."""
        column = self._column(field)
        value = row[column]
        for index, key in STEPS.findall(field[len(column) :]):
            try:
                value = value[int(index) if isinstance(value, list) else index or key]
            except (LookupError, ValueError, TypeError):
                raise self._missing(field) from None
        return value

    def _column(self, field: str) -> str:
        # A column may itself have a dot or a bracket in its name.
        return field if field in self.columns else re.split(r"[.\[]", field, maxsplit=1)[0]

    def _missing(self, field: str) -> UsageError:
        column = self._column(field)
        if column in self.columns:
            return UsageError(f"the template's {{{field}}} is not in every row; look into column {column!r}")
        near = difflib.get_close_matches(column, self.columns, n=1, cutoff=0.0)
        hint = f"; the nearest is {{{near[0]}}}" if near else ""
        return UsageError(
            f"the template's {{{field}}} is no column of the rows{hint}; columns: {', '.join(self.columns)}"
        )


def choose_template(columns: Sequence[str]) -> Template:
    """The template for rows whose prompt nobody named: the first known column there is.

    Raises:
        UsageError: none of PROMPT_COLUMNS is there.

    >>> choose_template(["id", "question", "text"]).text
    '{question}'
    """
    for column in PROMPT_COLUMNS:
        if column in columns:
            return Template(text=f"{{{column}}}", columns=tuple(columns))
    raise UsageError(
        f"which column is the prompt? Say so with --prompt-template '{{{columns[0]}}}'; "
        f"columns: {', '.join(columns)}"
    )


class _RowFormatter(string.Formatter):
    def __init__(self, template: Template) -> None:
        self._template = template

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        assert not args, "rows are mappings"
        return self._template.value(kwargs, field_name), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        try:
            return format(_text(value), format_spec)
        except ValueError as error:
            raise UsageError(f"the template has a bad format {format_spec!r}: {error}") from error


def _text(value: Any) -> str:
    """A value as prompt text; of a conversation, in any of the shapes in use, the first user turn."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        if value and all(isinstance(item, list) for item in value.values()):
            # The columnar form of a list of mappings.
            return _text([dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)])
        return _text(value.get("content", value.get("value", value.get("text"))))
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, Mapping)]
        users = [turn for turn in turns if turn.get("role", turn.get("from")) in USERS]
        return _text(next(iter(users or value), None))
    return str(value)
