"""Chat templates: MiniMax-M1's format as our own template, and a sandbox for anyone's.

Templates arrive with checkpoints and are programs, so they run in Jinja's immutable sandbox.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

from linnet.errors import DataError

# `render_chat` gives it checked messages. It is also saved with the tokenizer, so it takes what
# other programs pass as well: content as a string, tool calls below `function`.
M1_TEMPLATE = """\
{%- macro texts(message) -%}
    {%- if message.content is string %}{{ message.content }}
    {%- else %}{% for part in message.content or [] %}{{ part.text }}{% endfor %}
    {%- endif -%}
{%- endmacro -%}
<begin_of_document>
{%- set system = messages | selectattr("role", "equalto", "system") | list -%}
{%- if system -%}
    {{- "<beginning_of_sentence>system ai_setting=assistant\\n" -}}
    {%- for message in system %}{{ texts(message) }}{% endfor -%}
    {{- "<end_of_sentence>\\n" -}}
{%- endif -%}
{%- if tools -%}
    {{- "<beginning_of_sentence>system tool_setting=tools\\n" -}}
    {{- "You are provided with these tools:\\n<tools>\\n" -}}
    {%- for tool in tools %}{{ tool | tojson }}{{ "\\n" }}{% endfor -%}
    {{- "</tools>\\n\\nIf you need to call tools, please respond with <tool_calls></tool_calls>" -}}
    {{- " XML tags, and provide tool-name and json-object of arguments, following the format" -}}
    {{- ' below:\\n<tool_calls>\\n{"name": <tool-name-1>, "arguments": <args-json-object-1>}\\n' -}}
    {{- "...\\n</tool_calls><end_of_sentence>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == "user" -%}
        {{- "<beginning_of_sentence>user name=user\\n" ~ texts(message) -}}
        {{- "<end_of_sentence>\\n" -}}
    {%- elif message.role == "assistant" -%}
        {%- set text = texts(message) -%}
        {{- "<beginning_of_sentence>ai name=assistant\\n" ~ text -}}
        {%- if message.tool_calls -%}
            {{- "\\n" if text and not text.endswith("\\n") }}{{ "<tool_calls>\\n" -}}
            {%- for call in message.tool_calls -%}
                {%- set call = call.function or call -%}
                {%- set arguments = call.arguments -%}
                {%- set arguments = arguments if arguments is string else arguments | tojson -%}
                {{- '{"name": ' ~ call.name | tojson ~ ', "arguments": ' ~ arguments ~ "}\\n" -}}
            {%- endfor -%}
            {{- "</tool_calls>" -}}
        {%- endif -%}
        {{- "<end_of_sentence>\\n" -}}
    {%- elif message.role == "tool" -%}
        {{- "<beginning_of_sentence>tool name=tools\\n" -}}
        {%- set whole = [{"text": message.content}] -%}
        {%- for part in (whole if message.content is string else message.content) -%}
            {{- "tool name: " ~ (part.name or message.name) -}}
            {{- "\\ntool result: " ~ part.text ~ "\\n\\n" -}}
        {%- endfor -%}
        {{- "<end_of_sentence>\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "<beginning_of_sentence>ai name=assistant\\n" }}{% endif -%}
"""


def render(template: str, variables: Mapping[str, object]) -> str:
    """Render a chat template the way transformers does, in a sandbox.

    Raises:
        DataError: the template is not valid Jinja, reaches outside the sandbox, or refuses.
    """
    import jinja2

    try:
        return _compile(template).render(**variables)
    except (jinja2.TemplateError, TypeError) as error:
        raise DataError(f"the chat template cannot be rendered: {error}") from None


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:  # Any: jinja2.Template, imported only here
    import jinja2
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes `<`, `>` and `&` for HTML; a prompt must not. The arguments are
    # those of transformers' filter, which published templates use.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
