"""Conversations are rendered as vLLM renders them, and templates can do no harm."""

import pytest

from jaxllm import chat
from jaxllm.chat import doubled_bos, parse_conversations, render
from jaxllm.errors import RequestError
from tests.test_text_stream import byte_level

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}"
    "({{ part['text'] }}){% endfor %}{% endfor %}"
)
ROLES = "{% for message in messages %}{{ message.role }} {% endfor %}"
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello, "}


@pytest.fixture(scope="module")
def tokenizer():
    made = byte_level()
    made.chat_template = CHATML
    return made


@pytest.fixture
def bare():
    return byte_level()


# ---------------------------------------------------------------- conversations


def test_one_conversation_and_a_list_of_them_are_told_apart():
    assert parse_conversations([USER]) == ([[USER]], True)
    assert parse_conversations([[USER], [USER, ANSWER]]) == ([[USER], [USER, ANSWER]], False)
    assert parse_conversations([]) == ([], False)


def test_parsing_twice_changes_nothing_and_neither_do_the_callers_messages():
    given = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, "b"], "name": "me"},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
    ]
    before = repr(given)

    (once,), _ = parse_conversations(given)

    assert once[0] == {"role": "user", "content": ["a", "b"], "name": "me"}
    assert once[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert parse_conversations(once) == ([once], True)
    assert repr(given) == before


@pytest.mark.parametrize(
    "part",
    [
        "Hi",
        {"type": "text", "text": "Hi"},
        {"type": "input_text", "text": "Hi"},
        {"type": "output_text", "text": "Hi"},
        {"type": "refusal", "refusal": "Hi"},
        {"type": "thinking", "thinking": "Hi"},
        {"text": "Hi"},
    ],
)
def test_every_kind_of_text_part_is_text(part):
    assert parse_conversations([{"role": "user", "content": [part]}])[0][0][0]["content"] == ["Hi"]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ("Hi", r"messages must be a conversation, .* or a list of conversations; got str\."),
        (None, r"or a list of conversations; got NoneType\."),
        (USER, r"or a list of conversations; got dict\."),
        (["Hi"], r"messages\[0\] must be a message, .* or a list of messages; it is str\."),
        ([USER, "Hi"], r"messages\[1\] must be a dict with 'role' and 'content'; it is str\."),
        ([[USER], []], r"messages\[1\] is a conversation without messages. Give it at least one"),
        ([[USER], [USER, 5]], r"messages\[1\]\[1\] must be a dict with 'role' and 'content'"),
        ([{"content": "Hi"}], r"messages\[0\] has the role None; it must be a string"),
        ([{"role": 5, "content": "Hi"}], r"messages\[0\] has the role 5; it must be a string"),
        ([{"role": "user", "content": 5}], r"content of messages\[0\] must be a string, a list of"),
        ([{"role": "user", "content": [5]}], r"part 0 of messages\[0\] must be a string or a dict"),
        (
            [{"role": "user", "content": ["a", {"type": "text"}]}],
            r"part 1 of messages\[0\] must have a string as 'text'; it has None\.",
        ),
        (
            [{"role": "user", "content": [{"type": "smell", "text": "Hi"}]}],
            r"part 0 of messages\[0\] is of the unknown type 'smell'. Pass one of \['text', ",
        ),
        ([{"role": "user", "content": [{}]}], r"is of the unknown type None\."),
        (
            [{"role": "assistant", "tool_calls": "f()"}],
            r"tool_calls of messages\[0\] must be a list; it is str\.",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f"}]}],
            r"tool_calls\[0\] of messages\[0\] must be a dict with a 'function', which has a ",
        ),
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}],
                }
            ],
            r"arguments of tool_calls\[0\] of messages\[0\] are no JSON \(.*\): '{x'. Pass a dict",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_place(messages, text):
    with pytest.raises(RequestError, match=text):
        parse_conversations(messages)


@pytest.mark.parametrize(
    ("kind", "medium"),
    [
        ("image_url", "image"),
        ("input_image", "image"),
        ("image_pil", "image"),
        ("audio_url", "audio"),
        ("input_audio", "audio"),
        ("video_url", "video"),
    ],
)
def test_parts_that_are_no_text_are_refused(kind, medium):
    for part in ({"type": kind, kind: {"url": "x"}}, {kind: {"url": "x"}, "uuid": "1"}):
        with pytest.raises(
            RequestError,
            match=rf"type '{kind}', and this model is text only. Leave out the {medium}",
        ):
            parse_conversations([{"role": "user", "content": [part]}])


# ---------------------------------------------------------------- rendering


def test_a_conversation_ends_with_the_beginning_of_an_answer(tokenizer):
    assert render(tokenizer, [USER]) == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert render(tokenizer, [USER], add_generation_prompt=False) == (
        "<|im_start|>user\nHi<|im_end|>\n"
    )


def test_the_last_message_can_stay_open(tokenizer):
    text = render(
        tokenizer, [USER, ANSWER], add_generation_prompt=False, continue_final_message=True
    )

    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello, "


def test_an_answer_cannot_be_both_begun_and_continued(tokenizer):
    with pytest.raises(
        RequestError, match=r"cannot both be True.* Pass add_generation_prompt=False"
    ):
        render(tokenizer, [USER], continue_final_message=True)


@pytest.mark.parametrize(("content", "text"), [(None, ""), (["a", "b"], "a\nb"), ("a", "a")])
def test_a_template_for_text_gets_the_parts_as_lines(tokenizer, content, text):
    rendered = render(tokenizer, [{"role": "user", "content": content}])

    assert rendered.startswith(f"<|im_start|>user\n{text}<|im_end|>")


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, ""), (["a", {"type": "text", "text": "b"}], "(a)(b)"), ("a", "(a)")],
)
def test_a_template_that_loops_over_parts_gets_them(tokenizer, content, text):
    rendered = render(tokenizer, [{"role": "user", "content": content}], chat_template=PARTS)

    assert rendered == f"[user]{text}"


LOOP = "{% for x in CONTENT %}{{ x.text }}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}" + LOOP.replace("CONTENT", "m.content") + "{% endfor %}",
        "{% for m in messages[1:] %}" + LOOP.replace("CONTENT", "m['content']") + "{% endfor %}",
        "{% for m in messages | list %}"
        + LOOP.replace("CONTENT", "m.get('content')")
        + "{%endfor%}",
        LOOP.replace("CONTENT", "messages[0].content"),
        LOOP.replace("CONTENT", "messages[0]['content'] | list"),
        "{% set all = messages %}{% for m in all %}{% set c = m.content %}"
        + LOOP.replace("CONTENT", "c")
        + "{% endfor %}",
        "{% macro show(c) %}" + LOOP.replace("CONTENT", "c") + "{% endmacro %}"
        "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
        "{% for m in messages %}{% generation %}"
        + LOOP.replace("CONTENT", "m.content")
        + "{% endgeneration %}{% endfor %}",
    ],
)
def test_loops_over_content_are_seen_in_all_their_forms(tokenizer, template):
    messages = [{"role": "user", "content": ["a", "b"]}] * 2

    assert render(tokenizer, messages, chat_template=template) in ("ab", "abab")


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{% for m in messages %}{% for x in m.content.split() %}{{ x }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for call in m.tool_calls %}{{ call }}{% endfor %}{% endfor %}",
        "{% macro content() %}{% endmacro %}{{ content() }}{% for x in tools %}{% endfor %}",
    ],
)
def test_other_loops_leave_content_as_text(template):
    assert not chat._loops_over_content(chat._tree(template))


def test_the_format_of_content_can_be_chosen(tokenizer):
    messages = [{"role": "user", "content": "a"}]

    as_parts = render(tokenizer, messages, content_format="openai")
    as_text = render(tokenizer, messages, chat_template="{{ messages }}", content_format="string")

    assert "[{'type': 'text', 'text': 'a'}]" in as_parts
    assert "'content': 'a'" in as_text
    with pytest.raises(
        RequestError,
        match=r"content_format='xml' must be one of \['auto', 'string', 'openai'\]\.",
    ):
        render(tokenizer, messages, content_format="xml")


def test_developers_are_systems_where_the_template_knows_none(tokenizer):
    messages = [{"role": "developer", "content": "a"}]

    assert render(tokenizer, messages, chat_template=ROLES) == "system "
    assert render(tokenizer, messages, chat_template=ROLES + "{# developer #}") == "developer "


def test_arguments_of_tool_calls_reach_the_template_as_dicts(tokenizer):
    calls = [
        {"function": {"name": "f", "arguments": '{"x": 1}'}},
        {"function": {"name": "g", "arguments": ""}},
    ]
    template = (
        "{% for c in messages[0].tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"
    )

    text = render(tokenizer, [{"role": "assistant", "tool_calls": calls}], chat_template=template)

    assert text == '{"x": 1}{}'


def test_tools_reach_the_template(tokenizer):
    template = "{% if tools %}{{ tools[0].function.name }}{% endif %}"
    tool = {"type": "function", "function": {"name": "f"}}

    assert render(tokenizer, [USER], chat_template=template, tools=[tool]) == "f"
    assert render(tokenizer, [USER], chat_template=template, tools=[]) == ""
    with pytest.raises(RequestError, match=r"tools must be a list of dicts, as .*; got \['f'\]\."):
        render(tokenizer, [USER], tools=["f"])


def test_more_variables_reach_the_template_and_others_are_left_out_with_one_warning(
    tokenizer, caplog
):
    given = {"enable_thinking": False, "colour": "red", "bos_token": "B"}
    template = "{{ enable_thinking }}{{ bos_token }}"

    with caplog.at_level("WARNING", "jaxllm"):
        texts = [
            render(tokenizer, [USER], chat_template=template, chat_template_kwargs=given)
            for _ in range(3)
        ]

    assert texts == ["FalseB"] * 3
    (record,) = caplog.records
    assert record.getMessage() == (
        "chat_template_kwargs ['colour'] are not in the chat template and will be ignored"
    )


def test_variables_that_have_arguments_of_their_own_are_refused(tokenizer):
    with pytest.raises(
        RequestError, match=r"have \['add_generation_prompt', 'tools'\], which chat\(\) has arg"
    ):
        render(tokenizer, [USER], chat_template_kwargs={"tools": [], "add_generation_prompt": True})
    with pytest.raises(RequestError, match=r"chat_template_kwargs must be a dict, got \[1\]"):
        render(tokenizer, [USER], chat_template_kwargs=[1])


# ---------------------------------------------------------------- which template


def test_an_argument_goes_before_the_default_and_that_before_the_tokenizers(tokenizer, bare):
    assert render(tokenizer, [USER], chat_template="{{1}}", default_template="{{2}}") == "1"
    assert render(tokenizer, [USER], default_template="{{2}}") == "2"
    assert render(bare, [USER], default_template="{{2}}") == "2"


def test_a_template_may_be_in_a_file(bare, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages[0].content }}!")

    assert render(bare, [USER], chat_template=path) == "Hi!"
    assert render(bare, [USER], chat_template=str(path)) == "Hi!"


def test_a_template_may_be_one_of_the_tokenizers_by_name(bare):
    bare.chat_template = {"default": "{{1}}", "tool_use": "{{2}}", "rag": "{{3}}"}
    tool = {"type": "function", "function": {"name": "f"}}

    assert render(bare, [USER]) == "1"
    assert render(bare, [USER], tools=[tool]) == "2"
    assert render(bare, [USER], chat_template="rag", tools=[tool]) == "3"
    assert render(bare, [USER], default_template="rag") == "3"
    with pytest.raises(
        RequestError, match=r"nor one of the tokenizer's templates \['default', 'rag', 'tool_use'\]"
    ):
        render(bare, [USER], chat_template="other")


def test_named_templates_without_a_default_are_refused(bare):
    bare.chat_template = {"rag": "{{3}}"}

    with pytest.raises(RequestError, match=r"has the chat templates \['rag'\] and none of them is"):
        render(bare, [USER])


def test_a_tokenizer_without_a_template_is_refused(bare):
    with pytest.raises(
        RequestError, match=r"no default chat template since its release 4.44. Pass chat_template="
    ):
        render(bare, [USER])


@pytest.mark.parametrize("given", ["/no/such/file", "just words", 5, "\0"])
def test_what_is_neither_a_template_nor_a_file_is_refused(tokenizer, given):
    with pytest.raises(
        RequestError, match=r"is no template, as it has no '\{' or line end, nor a f"
    ):
        render(tokenizer, [USER], chat_template=given)


# ---------------------------------------------------------------- what templates do wrong


def test_what_a_template_says_reaches_the_caller(tokenizer):
    template = "{{ raise_exception('Roles must alternate user/assistant') }}"

    with pytest.raises(
        RequestError, match="The chat template refuses the conversation: Roles must alternate user"
    ):
        render(tokenizer, [USER], chat_template=template)


def test_an_error_in_a_template_is_told_with_its_line(tokenizer):
    with pytest.raises(RequestError, match="The chat template has an error in line 2: "):
        render(tokenizer, [USER], chat_template="a\n{% if %}")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 1 / 0 }}", "failed with ZeroDivisionError: division by zero"),
        ("{{ messages + 'a' }}", "failed with TypeError: "),
        ("{{ messages[0].nothing.more }}", "refuses the conversation: .* has no attribute"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed with RecursionError"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "failed with RecursionError"),
    ],
)
def test_a_template_that_fails_ends_with_a_sentence(tokenizer, template, text):
    with pytest.raises(RequestError, match=text):
        render(tokenizer, [USER], chat_template=template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ (messages | attr('__class__')).__base__ }}",
        "{{ raise_exception.__globals__['os'].system('true') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_cannot_reach_pythons_internals(tokenizer, template):
    with pytest.raises(RequestError, match=r"The chat template (refuses the conv|failed with )"):
        render(tokenizer, [USER], chat_template=template)


@pytest.mark.parametrize(
    "template",
    [
        "{% include '/etc/hostname' %}",
        "{% import '/etc/hostname' as x %}",
        "{% extends '/etc/hostname' %}",
        "{{ open('/etc/hostname').read() }}",
    ],
)
def test_a_template_cannot_read_files(tokenizer, template):
    with pytest.raises(RequestError, match=r"The chat template (refuses the conv|failed with )"):
        render(tokenizer, [USER], chat_template=template)


def test_a_template_cannot_make_huge_ranges(tokenizer):
    with pytest.raises(RequestError, match="failed with OverflowError: Range too big"):
        render(tokenizer, [USER], chat_template="{% for i in range(10 ** 9) %}{% endfor %}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) + f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_that_never_ends_is_ended(tokenizer, monkeypatch, template):
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.2)

    with pytest.raises(RequestError, match=r"template did not end within 0\.2 seconds. Pass anoth"):
        render(tokenizer, [USER], chat_template=template)


# ---------------------------------------------------------------- twice the beginning


@pytest.mark.parametrize(
    ("token_ids", "is_doubled"),
    [([1, 1, 5], True), ([1, 5, 1], False), ([1], False), ([], False), ((1, 1), True)],
)
def test_a_doubled_beginning_is_seen(tokenizer, token_ids, is_doubled):
    assert tokenizer.bos_token_id == 1

    assert doubled_bos(tokenizer, token_ids) is is_doubled


def test_without_a_beginning_nothing_is_doubled(bare):
    bare.bos_token = None

    assert not doubled_bos(bare, [1, 1])
