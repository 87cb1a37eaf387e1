"""Conversations to the text of a prompt, through a tokenizer's chat template.

A template is a program that came with a checkpoint. transformers runs it in
Jinja's sandbox, where it reaches neither files nor Python's internals; here it
gets a time limit too, and whatever goes wrong in it is a sentence for the caller.
"""

import contextlib
import functools
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.parser
from jinja2 import nodes

from jaxllm.errors import RequestError

logger = logging.getLogger("jaxllm")

Message = dict[str, Any]
ContentFormat = Literal["auto", "string", "openai"]

CONTENT_FORMATS = ("auto", "string", "openai")

TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""Types of content parts that are text, and the key that holds it."""

MEDIA = ("image", "audio", "video")
"""What the type of a part that is no text speaks of."""

ARGUMENTS = {
    "messages",
    "conversation",
    "chat_template",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
}
"""What `chat_template_kwargs` may not set, as other arguments do."""

MAX_SECONDS = 10.0
"""Longest time for one conversation: a template needs milliseconds, unless it means harm."""


# -------------------------------------------------------------------- conversations


def parse_conversations(messages: Any) -> tuple[list[list[Message]], bool]:
    """Returns the conversations of a call, and whether it was one on its own.

    Raises:
        RequestError: Something in it is no message; the text says which and why.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise RequestError(
            "messages must be a conversation, which is a list of dicts with 'role' and 'content', "
            f"or a list of conversations; got {type(messages).__name__}."
        )
    if any(isinstance(message, Mapping) for message in messages):
        return [_parse(messages, "messages")], True
    return [_parse(each, f"messages[{i}]") for i, each in enumerate(messages)], False


def _parse(conversation: Any, where: str) -> list[Message]:
    if not isinstance(conversation, Sequence) or isinstance(conversation, (str, bytes)):
        raise RequestError(
            f"{where} must be a message, which is a dict with 'role' and 'content', or a list of "
            f"messages; it is {type(conversation).__name__}."
        )
    if not conversation:
        raise RequestError(f"{where} is a conversation without messages. Give it at least one.")
    return [_parse_message(message, f"{where}[{i}]") for i, message in enumerate(conversation)]


def _parse_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(
            f"{where} must be a dict with 'role' and 'content'; it is {type(message).__name__}."
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(
            f"{where} has the role {role!r}; it must be a string, as 'user' or 'assistant'."
        )
    found = dict(message)
    found["content"] = _parse_content(message.get("content"), where)
    if message.get("tool_calls") is not None:
        found["tool_calls"] = _parse_tool_calls(message["tool_calls"], where)
    return found


def _parse_content(content: Any, where: str) -> str | list[str] | None:
    """Returns the text of a message, or that of each of its parts."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RequestError(
            f"The content of {where} must be a string, a list of parts, or None; it is "
            f"{type(content).__name__}."
        )
    return [_text_of_part(part, f"part {i} of {where}") for i, part in enumerate(content)]


def _text_of_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RequestError(
            f"{where} must be a string or a dict with 'type'; it is {type(part).__name__}."
        )
    kind = part.get("type") or next((str(key) for key in part if key != "uuid"), None)
    key = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is not None and isinstance(part.get(key), str):
        return part[key]
    if key is not None:
        raise RequestError(f"{where} must have a string as {key!r}; it has {part.get(key)!r}.")
    medium = next((medium for medium in MEDIA if medium in str(kind)), None)
    if medium is not None:
        raise RequestError(
            f"{where} is of the type {kind!r}, and this model is text only. Leave out the {medium}."
        )
    raise RequestError(
        f"{where} is of the unknown type {kind!r}. Pass one of {list(TEXT_PARTS)}, or a string."
    )


def _parse_tool_calls(calls: Any, where: str) -> list[Any]:
    """Returns tool calls with the arguments as dicts, which is what templates read."""
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise RequestError(f"tool_calls of {where} must be a list; it is {type(calls).__name__}.")
    found = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(
                f"tool_calls[{i}] of {where} must be a dict with a 'function', which has a "
                f"'name' and 'arguments'; it is {call!r}."
            )
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise RequestError(
                    f"The arguments of tool_calls[{i}] of {where} are no JSON ({error}): "
                    f"{arguments!r}. Pass a dict, or a dict as JSON."
                ) from error
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found


# -------------------------------------------------------------------- rendering


def render(  # noqa: PLR0913
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    chat_template: str | Path | None = None,
    default_template: str | Path | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    content_format: str = "auto",
) -> str:
    """Returns the text of a conversation, special tokens included.

    Args:
        tokenizer: Any tokenizer of transformers.
        messages: One conversation.
        chat_template: A template, a file that holds one, or the name of one of the
            tokenizer's; by default the tokenizer's own.
        default_template: The same, where `chat_template` is None.
        add_generation_prompt: Whether the beginning of an answer is put at the end.
        continue_final_message: Whether the last message stays open.
        tools: Descriptions of functions, in OpenAI's form.
        chat_template_kwargs: More variables for the template; those that it does not
            mention are left out, with a warning.
        content_format: "string": a message's content is text; "openai": a list of parts;
            "auto": whichever the template reads.

    Raises:
        RequestError: Something in it is wrong, or the template says so.
    """
    if add_generation_prompt and continue_final_message:
        raise RequestError(
            "add_generation_prompt and continue_final_message cannot both be True: an answer is "
            "either begun or continued. Pass add_generation_prompt=False to continue the last one."
        )
    if content_format not in CONTENT_FORMATS:
        raise RequestError(
            f"chat_template_content_format={content_format!r} must be one of "
            f"{list(CONTENT_FORMATS)}."
        )
    conversation = _parse(messages, "messages")
    tools = _parse_tools(tools)
    template = _template(tokenizer, chat_template, default_template, tools)
    with _sentences():
        tree = _tree(template)
        is_openai = content_format == "openai" or (
            content_format == "auto" and _loops_over_content(tree)
        )
        variables = _variables(chat_template_kwargs, jinja2.meta.find_undeclared_variables(tree))
        with _time_limit():
            return tokenizer.apply_chat_template(
                [_for_template(message, is_openai, template) for message in conversation],
                tools=tools,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **variables,
            )


def doubled_bos(tokenizer: Any, token_ids: Sequence[int]) -> bool:
    """Whether a prompt begins twice: templates write the token that tokenizers add, too."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and list(token_ids[:2]) == [bos, bos]


def _parse_tools(tools: Any) -> list[Any] | None:
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError(
            "tools must be a list of dicts, as {'type': 'function', 'function': {'name': ...}}; "
            f"got {tools!r}."
        )
    return [dict(tool) for tool in tools]


def _for_template(message: Message, is_openai: bool, template: str) -> Message:
    content = message["content"]
    parts = [content] if isinstance(content, str) else content or []
    role = message["role"]
    if role == "developer" and "developer" not in template:
        role = "system"
    as_dicts = [{"type": "text", "text": part} for part in parts]
    return {**message, "role": role, "content": as_dicts if is_openai else "\n".join(parts)}


def _variables(given: Mapping[str, Any] | None, mentioned: set[str]) -> dict[str, Any]:
    """Returns the variables that the template mentions."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RequestError(f"chat_template_kwargs must be a dict, got {given!r}.")
    taken = sorted(ARGUMENTS & set(given))
    if taken:
        raise RequestError(
            f"chat_template_kwargs have {taken}, which chat() has arguments for. Pass those."
        )
    strange = sorted(str(name) for name in given if name not in mentioned)
    if strange:
        _warn_of_unmentioned(tuple(strange))
    return {name: value for name, value in given.items() if name in mentioned}


@functools.cache
def _warn_of_unmentioned(names: tuple[str, ...]) -> None:
    """Warns once: one call may have thousands of conversations."""
    logger.warning(
        "chat_template_kwargs %s are not in the chat template and will be ignored", list(names)
    )


# -------------------------------------------------------------------- templates


def _template(
    tokenizer: Any,
    chat_template: str | Path | None,
    default_template: str | Path | None,
    tools: list[Any] | None,
) -> str:
    own = getattr(tokenizer, "chat_template", None)
    named = own if isinstance(own, dict) else {}
    for given in (chat_template, default_template):
        if given is not None:
            return named.get(str(given)) or _read(given, sorted(named))
    if isinstance(own, str):
        return own
    for name in ("tool_use", "default") if tools else ("default",):
        if name in named:
            return named[name]
    if named:
        raise RequestError(
            f"The tokenizer has the chat templates {sorted(named)} and none of them is the "
            "default. Pass one of these names as chat_template=."
        )
    raise RequestError(
        "The tokenizer has no chat template, and transformers has no default chat template since "
        "its release 4.44. Pass chat_template=, a template or a file that holds one."
    )


def _read(given: str | Path, names: list[str]) -> str:
    """Returns a template that is given as it is, or as its file."""
    if isinstance(given, str) and any(sign in given for sign in "{}\n"):
        return given
    if isinstance(given, (str, Path)):
        with contextlib.suppress(OSError, ValueError):
            return Path(given).expanduser().read_text(encoding="utf-8")
    also = f", nor one of the tokenizer's templates {names}" if names else ""
    raise RequestError(
        f"chat_template={given!r} is no template, as it has no '{{' or line end, nor a file that "
        f"can be read{also}. Pass a Jinja template or a path."
    )


class _Generation(jinja2.ext.Extension):
    """The tag that transformers adds for training: here its body only."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        """Reads a `{% generation %}` block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _tree(template: str) -> nodes.Template:
    return jinja2.Environment(extensions=[_Generation, jinja2.ext.loopcontrols]).parse(template)


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether a template reads a message's content as a list of parts.

    It follows names that are set to messages or content, and macros that are called
    with them, and says yes where a loop runs over content.
    """
    names = {"messages": "messages"}
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    num_names = 0
    while num_names < len(names):
        num_names = len(names)
        for target, value in _assignments(tree, macros):
            kind = _kind(value, names)
            if kind is not None:
                names.setdefault(target, kind)
        for loop in tree.find_all(nodes.For):
            kind = _kind(loop.iter, names)
            if kind == "content":
                return True
            if kind == "messages" and isinstance(loop.target, nodes.Name):
                names.setdefault(loop.target.name, "message")
    return False


def _assignments(
    tree: nodes.Template, macros: Mapping[str, nodes.Macro]
) -> Iterator[tuple[str, nodes.Node]]:
    """Yields names and what they are set to, arguments of macros too."""
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name):
            yield assign.target.name, assign.node
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            for name, value in zip(macros[call.node.name].args, call.args, strict=False):
                yield name.name, value


def _kind(node: nodes.Node, names: Mapping[str, str]) -> str | None:
    """Returns which of "messages", "message" and "content" an expression is, if any."""
    if isinstance(node, nodes.Name):
        return names.get(node.name)
    if isinstance(node, nodes.Filter) and node.node is not None:
        return _kind(node.node, names)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        is_get = node.node.attr == "get" and node.args
        return _item(_kind(node.node.node, names), node.args[0]) if is_get else None
    if isinstance(node, nodes.Getattr):
        return _item(_kind(node.node, names), nodes.Const(node.attr))
    if isinstance(node, nodes.Getitem):
        return _item(_kind(node.node, names), node.arg)
    return None


def _item(kind: str | None, key: nodes.Node) -> str | None:
    """Returns what an item of such an expression is."""
    if kind == "messages":
        return "messages" if isinstance(key, nodes.Slice) else "message"
    if kind == "message" and isinstance(key, nodes.Const) and key.value == "content":
        return "content"
    return None


# -------------------------------------------------------------------- what templates do wrong


class _TooSlowError(Exception):
    """A template ran out of its time."""


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """Makes sentences for the caller of what a template raises."""
    try:
        yield
    except RequestError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"The chat template has an error in line {error.lineno}: {error.message}. "
            "Pass another as chat_template=."
        ) from error
    except (jinja2.TemplateError, ValueError) as error:
        # What the template says with raise_exception(), as "roles must alternate", is of this kind.
        raise RequestError(f"The chat template refuses the conversation: {error}") from error
    except _TooSlowError as error:
        raise RequestError(
            f"The chat template did not end within {MAX_SECONDS:g} seconds. Pass another as "
            "chat_template=."
        ) from error
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
    ) as error:
        raise RequestError(
            f"The chat template failed with {type(error).__name__}: {error}. Check that the "
            "messages have what it reads, or pass another as chat_template=."
        ) from error


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Ends a template's loops after `MAX_SECONDS`: Jinja has no limit for nested ones."""
    deadline = time.monotonic() + MAX_SECONDS

    def watch(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != "<template>":
            return None  # a function that the template calls runs at full speed
        if time.monotonic() > deadline:
            raise _TooSlowError
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
