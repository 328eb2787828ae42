"""Chat templates: rendering prompts, and the special tokens that are not part of a text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from rlrt_lightning.runtime.errors import ConfigError, first_line
from rlrt_lightning.tasks.base import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED_TOKENS = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
"""The named special tokens of a tokenizer."""

ROLES = ("system", "user", "assistant", "tool")
"""Roles accepted for any chat template; other roles are accepted only if the template mentions them."""


class ChatTemplate:
    """A tokenizer's chat template with the user's system prompt and template variables.

    Args:
        tokenizer: The tokenizer.
        path: The model's path, for error messages.
        system_prompt: Added to each conversation as its system message; None adds none.
        kwargs: Variables passed to the template.

    Raises:
        ConfigError: If the template ignores the system prompt or one of the variables.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, path: str, system_prompt: str | None, kwargs: dict[str, Any]
    ) -> None:
        self.tokenizer = tokenizer
        self.path = path
        self.system_prompt = system_prompt
        self.kwargs = kwargs
        self._ignored_cache: dict[tuple[str, ...], str | None] = {}
        if kwargs:
            self.check_kwargs(kwargs, "model.policy.chat_kwargs")
        if system_prompt is not None:
            self._check_system_prompt()

    def render(self, messages: Messages, kwargs: dict[str, Any] | None = None) -> str:
        """Renders a conversation as text, up to the start of the response.

        Args:
            messages: The conversation.
            kwargs: Variables passed to the template, which override those of the constructor.

        Raises:
            ConfigError: If the template rejects the conversation or ignores one of its messages.
        """
        systems = sum(message["role"] == "system" for message in messages)
        if self.system_prompt is not None:
            if systems:
                raise ConfigError(
                    "model.policy.system_prompt is set, and the prompt has its own system message; remove one of them"
                )
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if systems > 1:
            rank_zero_warn("data.task has prompts with several system messages; merge them, as models expect only one")
        self._check_roles(messages)
        text = self._apply(messages, kwargs)
        if ignored := self._ignored_role(tuple(message["role"] for message in messages)):
            raise ConfigError(
                f"model.policy.path: the chat template of {self.path!r} ignores the message with the role {ignored} in "
                "such a conversation; move its text into the last user message"
            )
        return text

    def _apply(self, messages: Sequence[dict[str, str]], kwargs: dict[str, Any] | None = None) -> str:
        variables = {**self.kwargs, **(kwargs or {})}
        try:
            text: Any = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **variables
            )
        except Exception as error:  # a template may reject a conversation with any exception
            raise ConfigError(
                f"model.policy.path: the chat template of {self.path!r} rejects this prompt: {first_line(error)}"
            ) from error
        return str(text)

    def check_kwargs(self, kwargs: dict[str, Any], setting: str) -> None:
        """Refuses variables that the template does not read.

        Args:
            kwargs: The variables.
            setting: The setting that holds them, for the message.

        Raises:
            ConfigError: If the template ignores one of them.
        """
        read = template_variables(template_source(self.tokenizer, self.path))
        tokens = {f"{name}_token" for name in NAMED_TOKENS}
        settable = read - tokens - {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}
        if unknown := sorted(kwargs.keys() - settable):
            raise ConfigError(
                f"{setting} sets {', '.join(unknown)}, which the chat template of {self.path!r} does "
                f"not read; its variables: {', '.join(sorted(settable)) or 'none'}"
            )

    def _check_system_prompt(self) -> None:
        messages = [{"role": role, "content": self.system_prompt or ""} for role in ("system", "user")]
        reason = f"the chat template of {self.path!r} ignores the system message"
        try:
            self._apply(messages)
            ignored = self._ignored_role(("system", "user"))
        except ConfigError as error:
            ignored, reason = "system", str(error)
        if ignored:
            raise ConfigError(
                f"model.policy.system_prompt: {reason}; put it into the user message (data.task.prompt_template)"
            )

    def _check_roles(self, messages: Messages) -> None:
        for role in {message["role"] for message in messages} - set(ROLES):
            if not re.search(rf"['\"]{re.escape(role)}['\"]", template_source(self.tokenizer, self.path)):
                raise ConfigError(
                    f"a message has the role {role!r}, which the chat template of {self.path!r} does not know; it has "
                    "to be system, user or assistant"
                )

    def _ignored_role(self, roles: tuple[str, ...]) -> str | None:
        """The role of the first message whose content does not change the rendered text of a conversation with these
        roles; None if all messages are used."""
        if roles not in self._ignored_cache:
            self._ignored_cache[roles] = None
            messages = [{"role": role, "content": f"message {i}"} for i, role in enumerate(roles)]
            with suppress(ConfigError):  # a template may reject these placeholder contents
                text = self._apply(messages)
                for i, message in enumerate(messages):
                    if self._apply([*messages[:i], {**message, "content": "other"}, *messages[i + 1 :]]) == text:
                        self._ignored_cache[roles] = message["role"]
                        break
        return self._ignored_cache[roles]


def template_source(tokenizer: PreTrainedTokenizerBase, path: str) -> str:
    """The Jinja source of a tokenizer's chat template.

    Raises:
        ConfigError: If the tokenizer has several templates and no default.
    """
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(f"model.policy.path: {path!r}: {first_line(error)}") from error


def template_variables(source: str) -> set[str]:
    """The undeclared variables of a chat template.

    Raises:
        ConfigError: If it is not a valid Jinja template.
    """
    from jinja2 import TemplateError
    from jinja2.meta import find_undeclared_variables
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)  # transformers' extension of Jinja
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return find_undeclared_variables(environment.parse(source))
    except TemplateError as error:
        raise ConfigError(f"model.policy.path: the chat template cannot be parsed: {first_line(error)}") from error


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """All special tokens of a tokenizer with their ids."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content: id for id, token in added.items() if token.special}


def named_tokens(tokenizer: PreTrainedTokenizerBase, names: Iterable[str] = NAMED_TOKENS) -> set[int]:
    """Ids of a tokenizer's named special tokens."""
    ids = (getattr(tokenizer, f"{name}_token_id", None) for name in names)
    return {id for id in ids if id is not None}


def control_tokens(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int]) -> frozenset[int]:
    """Tokens that are not part of a completion's text: end tokens, named special tokens (padding, unknown, ...), and
    the special tokens that the chat template writes around messages.

    Other special tokens are text. Paired tags, such as `<think>` and `</think>`, are text even if the chat template
    writes one, because verifiers may look for an answer between them.

    Args:
        tokenizer: The tokenizer.
        ends: Tokens that end a response.
    """
    markup = ""
    if tokenizer.chat_template:
        messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
        with suppress(Exception):  # a template may reject this conversation; its source contains most of its tokens
            markup += str(tokenizer.get_chat_template())
            markup += str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    vocabulary = tokenizer.get_vocab()
    in_template = {
        id for token, id in special_tokens(tokenizer).items() if token in markup and not is_tag(token, vocabulary)
    }
    return frozenset({*ends, *named_tokens(tokenizer), *in_template})


def is_tag(token: str, vocabulary: dict[str, int]) -> bool:
    """Whether a token is an opening or closing tag whose counterpart is in the vocabulary."""
    found = re.fullmatch(r"<(/?)(\w[\w-]*)>", token)
    return found is not None and (found[2] == "think" or f"<{'' if found[1] else '/'}{found[2]}>" in vocabulary)


MARKER = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>｜\s]+｜>|<(?:start|end)_of_\w+>")
"""How the markers of chat formats are written: <|im_start|>, <｜User｜>, <start_of_turn>."""


def unknown_markers(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Markers of a chat format in a text, such as <|im_start|>, that are neither tokens nor in the chat template.

    Args:
        text: A prompt or its template.
        tokenizer: The tokenizer.
    """
    known = str(tokenizer.chat_template or "")
    vocabulary = tokenizer.get_vocab()
    return [marker for marker in MARKER.findall(text) if marker not in vocabulary and marker not in known]
