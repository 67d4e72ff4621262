"""MiniMax-M2's chat format as our own template, for models that are trained in it.

The text is that of the published template but for three things: system messages come first
wherever they stand, as in `M1_TEMPLATE`; without one the prompt names no model; and every part of
a tool's result is written like a result that is a string.
"""

M2_TEMPLATE = """\
{%- macro texts(message) -%}
    {%- if message.content is string %}{{ message.content }}
    {%- else %}{% for part in message.content or [] %}{{ part.text }}{% endfor %}
    {%- endif -%}
{%- endmacro -%}
{{- "]~!b[]~b]system\\n" -}}
{%- set system = messages | selectattr("role", "equalto", "system") | list -%}
{%- for message in system %}{{ texts(message) }}{% endfor -%}
{{- "You are a helpful assistant." if not system -}}
{%- if tools -%}
    {{- "\\n\\n# Tools\\nYou may call one or more tools to assist with the user query.\\n" -}}
    {{- "Here are the tools available in JSONSchema format:\\n\\n<tools>\\n" -}}
    {%- for tool in tools -%}
        {{- "<tool>" ~ tool | tojson ~ "</tool>\\n" -}}
    {%- endfor -%}
    {{- "</tools>\\n\\nWhen making tool calls, use XML format to invoke tools and pass" -}}
    {{- ' parameters:\\n\\n<minimax:tool_call>\\n<invoke name="tool-name-1">\\n' -}}
    {{- '<parameter name="param-key-1">param-value-1</parameter>\\n' -}}
    {{- '<parameter name="param-key-2">param-value-2</parameter>\\n' -}}
    {{- "...\\n</invoke>\\n</minimax:tool_call>" -}}
{%- endif -%}
{{- "[e~[\\n" -}}
{%- set turns = messages | rejectattr("role", "equalto", "system") | list -%}
{%- set last = namespace(user=-1) -%}
{%- for message in turns -%}
    {%- if message.role == "user" %}{% set last.user = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in turns -%}
    {%- if message.role == "user" -%}
        {{- "]~b]user\\n" ~ texts(message) ~ "[e~[\\n" -}}
    {%- elif message.role == "assistant" -%}
        {%- set text = texts(message) -%}
        {%- set reasoning = message.reasoning_content or "" -%}
        {%- if not reasoning and "</think>" in text -%}
            {%- set reasoning = text.split("</think>")[0].split("<think>")[-1].strip("\\n") -%}
            {%- set text = text.split("</think>")[-1].strip("\\n") -%}
        {%- endif -%}
        {{- "]~b]ai\\n" -}}
        {%- if reasoning and loop.index0 > last.user -%}
            {{- "<think>\\n" ~ reasoning ~ "\\n</think>\\n\\n" -}}
        {%- endif -%}
        {{- text -}}
        {%- if message.tool_calls -%}
            {{- "\\n<minimax:tool_call>\\n" -}}
            {%- for call in message.tool_calls -%}
                {%- set call = call.function or call -%}
                {{- '<invoke name="' ~ call.name ~ '">\\n' -}}
                {%- for name, value in call.arguments.items() -%}
                    {{- '<parameter name="' ~ name ~ '">' -}}
                    {{- (value if value is string else value | tojson) ~ "</parameter>\\n" -}}
                {%- endfor -%}
                {{- "</invoke>\\n" -}}
            {%- endfor -%}
            {{- "</minimax:tool_call>" -}}
        {%- endif -%}
        {{- "[e~[\\n" -}}
    {%- elif message.role == "tool" -%}
        {{- "]~b]tool" if loop.first or loop.previtem.role != "tool" -}}
        {%- set whole = [{"text": message.content}] -%}
        {%- for part in (whole if message.content is string else message.content) -%}
            {{- "\\n<response>" ~ part.text ~ "</response>" -}}
        {%- endfor -%}
        {{- "[e~[\\n" if loop.last or loop.nextitem.role != "tool" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "]~b]ai\\n<think>\\n" }}{% endif -%}
"""
