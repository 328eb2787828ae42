"""Chat templates: prompts as the model reads them, and which special tokens are no part of a text."""

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
"""The special tokens that a tokenizer has a name for."""

ROLES = ("system", "user", "assistant", "tool")
"""Roles that any chat template may be given; others only where it names them."""


class ChatTemplate:
    """A tokenizer's chat template, with what the settings add to a conversation.

    Args:
        tokenizer: Whose template it is.
        path: Where the model is, for messages.
        system_prompt: Put before each conversation as the system's message; None for none.
        kwargs: Passed to the template.

    Raises:
        ConfigError: If the template has no use for one of the two.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, path: str, system_prompt: str | None, kwargs: dict[str, Any]
    ) -> None:
        self.tokenizer = tokenizer
        self.path = path
        self.system_prompt = system_prompt
        self.kwargs = kwargs
        self._unread: dict[tuple[str, ...], str | None] = {}
        if kwargs:
            self._check_kwargs()
        if system_prompt is not None:
            self._check_system_prompt()

    def render(self, messages: Messages) -> str:
        """Text of a conversation as the model reads it, up to where the response begins.

        Raises:
            ConfigError: If the template does not take the conversation, or leaves out a part of it.
        """
        systems = sum(message["role"] == "system" for message in messages)
        if self.system_prompt is not None:
            if systems:
                raise ConfigError(
                    "model.policy.system_prompt is set, and the prompt has a system message of its own; leave one out"
                )
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if systems > 1:
            rank_zero_warn("data.task has prompts with several system messages; models are trained with one: join them")
        self._check_roles(messages)
        text = self._apply(messages)
        if unread := self._unread_role(tuple(message["role"] for message in messages)):
            raise ConfigError(
                f"model.policy.path: the chat template of {self.path!r} leaves out the message of the role {unread} in "
                "such a conversation; put its words into the last user's message"
            )
        return text

    def _apply(self, messages: Sequence[dict[str, str]]) -> str:
        try:
            text: Any = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **self.kwargs
            )
        except Exception as error:  # a template refuses a conversation by raising whatever it likes
            raise ConfigError(
                f"model.policy.path: the chat template of {self.path!r} takes no such prompt: {first_line(error)}"
            ) from error
        return str(text)

    def _check_kwargs(self) -> None:
        read = template_variables(template_source(self.tokenizer, self.path))
        tokens = {f"{name}_token" for name in NAMED_TOKENS}
        settable = read - tokens - {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}
        if unknown := sorted(self.kwargs.keys() - settable):
            raise ConfigError(
                f"model.policy.chat_kwargs sets {', '.join(unknown)}, which is no variable of the chat template of "
                f"{self.path!r}; it reads {', '.join(sorted(settable)) or 'none'}"
            )

    def _check_system_prompt(self) -> None:
        messages = [{"role": role, "content": self.system_prompt or ""} for role in ("system", "user")]
        wrong = f"the chat template of {self.path!r} leaves out the system's message"
        try:
            self._apply(messages)
            unread = self._unread_role(("system", "user"))
        except ConfigError as error:
            unread, wrong = "system", str(error)
        if unread:
            raise ConfigError(
                f"model.policy.system_prompt: {wrong}; say it in the user's message (data.task.prompt_template)"
            )

    def _check_roles(self, messages: Messages) -> None:
        for role in {message["role"] for message in messages} - set(ROLES):
            if not re.search(rf"['\"]{re.escape(role)}['\"]", template_source(self.tokenizer, self.path)):
                raise ConfigError(
                    f"a message has the role {role!r}, which the chat template of {self.path!r} does not know; it has "
                    "to be system, user or assistant"
                )

    def _unread_role(self, roles: tuple[str, ...]) -> str | None:
        """The role of a message whose words make no difference to what is read in a conversation of these roles, None
        if there is none."""
        if roles not in self._unread:
            self._unread[roles] = None
            messages = [{"role": role, "content": f"message {i}"} for i, role in enumerate(roles)]
            with suppress(ConfigError):  # a template may want other words than these
                text = self._apply(messages)
                for i, message in enumerate(messages):
                    if self._apply([*messages[:i], {**message, "content": "other"}, *messages[i + 1 :]]) == text:
                        self._unread[roles] = message["role"]
                        break
        return self._unread[roles]


def template_source(tokenizer: PreTrainedTokenizerBase, path: str) -> str:
    """The chat template of a tokenizer, as Jinja source.

    Raises:
        ConfigError: If it has several, and none is the default.
    """
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(f"model.policy.path: {path!r}: {first_line(error)}") from error


def template_variables(source: str) -> set[str]:
    """The variables that a chat template reads and does not set itself.

    Raises:
        ConfigError: If it is no Jinja template.
    """
    from jinja2 import TemplateError
    from jinja2.meta import find_undeclared_variables
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)  # a tag that transformers adds to Jinja
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return find_undeclared_variables(environment.parse(source))
    except TemplateError as error:
        raise ConfigError(f"model.policy.path: the chat template cannot be read: {first_line(error)}") from error


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens of a tokenizer with their ids, whatever they are for."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content: id for id, token in added.items() if token.special}


def named_tokens(tokenizer: PreTrainedTokenizerBase, names: Iterable[str] = NAMED_TOKENS) -> set[int]:
    """Ids of the special tokens that a tokenizer has a name for."""
    ids = (getattr(tokenizer, f"{name}_token_id", None) for name in names)
    return {id for id in ids if id is not None}


def control_tokens(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int]) -> frozenset[int]:
    """Tokens that are no part of what a response says: those that end it, those that the tokenizer has a name for
    (padding, unknown, ...), and the special tokens that the chat template writes around messages.

    Other special tokens are text. So are tags in pairs, such as `<think>` and `</think>`, also where the chat template
    writes one: an answer may be looked for between them.

    Args:
        tokenizer: The tokenizer.
        ends: Tokens that end a response.
    """
    frame = ""
    if tokenizer.chat_template:
        said = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
        with suppress(Exception):  # a template may refuse this conversation; its source has most of its tokens
            frame += str(tokenizer.get_chat_template())
            frame += str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
    known = tokenizer.get_vocab()
    framing = {id for token, id in special_tokens(tokenizer).items() if token in frame and not is_tag(token, known)}
    return frozenset({*ends, *named_tokens(tokenizer), *framing})


def is_tag(token: str, known: dict[str, int]) -> bool:
    """Whether a token is one of a pair of tags that are both known."""
    found = re.fullmatch(r"<(/?)(\w[\w-]*)>", token)
    return found is not None and (found[2] == "think" or f"<{'' if found[1] else '/'}{found[2]}>" in known)
