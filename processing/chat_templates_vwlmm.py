# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
The prompts of the paper's four stages, and LaVIT's, as Jinja chat templates.

Rules that all share:

- An image part of a user message becomes the placeholder `<image>`, with a newline behind it when more of the message
  follows (not LaVIT's).
- The characters of a control token inside a message, such as `<image>` or `</s>`, are text. They are written with a
  mark behind the first, so that neither the processor nor the tokenizer takes them for the token; the tokenizer
  removes the mark again. `VWLMMProcessor.apply_chat_template` does so for any template. These do it, too, for who
  renders them without the processor, as vLLM does: `get_chat_template` writes the tokenizer's tokens in front.
- `{% generation %}` encloses what the model is trained to write: the answer and the token that closes it.
- A template starts with the text itself. `VWLMMProcessor.get_chat_template` puts `{{ bos_token }}` in front for the
  tokenizers that open a sequence with one.
"""

# Unicode noncharacters: reserved for use inside a program, so they never occur in real text. The first disappears in
# the tokenizer's normalizer, the second behind it, for tokens that are looked for in normalized text.
LITERAL_MARK = "\ufdd0"
NORMALIZED_LITERAL_MARK = "\ufdd1"

# `turns` is set in two steps, because vLLM reads from the template whether messages are lists of parts or strings: it
# follows `messages` through plain assignments and slices to the loop over a message's parts, but not through an inline
# `if`.
_CONTENT = r"""
{%- macro literal(text) -%}
    {%- set written = namespace(text=text) -%}
    {%- for token, hidden in control_tokens if token in text -%}
        {%- set written.text = written.text | replace(token, hidden) -%}
    {%- endfor -%}
    {{- written.text -}}
{%- endmacro -%}
{%- macro content_of(message) -%}
    {%- if message['content'] is string -%}
        {{- literal(message['content']) -}}
    {%- elif not message['content'] -%}
        {{- raise_exception(
            "a message of role '" ~ message['role'] ~ "' has no content, expected text or a list of parts."
        ) -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' and part['text'] is not string -%}
                {{- raise_exception(
                    "a message of role '" ~ message['role'] ~ "' has a part of type 'text' without text."
                ) -}}
            {%- elif part['type'] == 'text' -%}
                {{- literal(part['text']) -}}
            {%- elif part['type'] == 'image' and message['role'] == 'user' -%}
                {{- '<image>' if loop.last else '<image>\n' -}}
            {%- else -%}
                {{- raise_exception(
                    "a message of role '" ~ message['role'] ~ "' has a part of type '" ~ part['type']
                    ~ "', expected 'text'"
                    ~ (" or 'image'." if message['role'] == 'user' else ". Images belong in user messages.")
                ) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set system = messages[0] if messages[0]['role'] == 'system' -%}
{%- set turns = messages -%}
{%- if system -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- set is_document = messages | length == 1 and messages[0]['role'] == 'assistant' -%}
{%- for message in turns -%}
    {%- set expected = ['user', 'assistant'][loop.index0 % 2] -%}
    {%- if message['role'] != expected and not is_document -%}
        {{- raise_exception(
            "messages[" ~ (loop.index0 + (1 if system else 0)) ~ "] has role '" ~ message['role']
            ~ "', expected '" ~ expected
            ~ "': behind an optional 'system' message come 'user' and 'assistant' in turn."
        ) -}}
    {%- endif -%}
{%- endfor -%}
"""

_NO_DOCUMENT = r"""
{%- if is_document -%}
    {{- raise_exception(
        "one 'assistant' message alone is a text that answers nothing, which only the 'lavit' template has a form "
        ~ "for. Expected a 'user' message in front of it."
    ) -}}
{%- endif -%}
"""

_VICUNA_V1 = r"""
{%- if system -%}
    {{- content_of(system) -}}
{%- else -%}
    {{- "A chat between a curious user and an artificial intelligence assistant. " -}}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions." -}}
{%- endif -%}
{{- ' ' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' ~ content_of(message) -}}
    {%- else -%}
        {{- ' ASSISTANT:' -}}
        {%- generation -%}
            {{- ' ' ~ content_of(message) ~ eos_token -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- ' ASSISTANT:' -}}
{%- endif -%}
"""

# The authors' format has no place for a system message; Mistral's own convention puts it before the first question.
_MISTRAL = r"""
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST] ' ~ (content_of(system) ~ '\n\n' if system and loop.first else '') -}}
        {{- content_of(message) ~ ' [/INST]' -}}
    {%- else -%}
        {%- generation -%}
            {{- content_of(message) ~ eos_token -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""

_PLAIN = r"""
{%- if system or turns | length > 2 -%}
    {{- raise_exception(
        "the 'plain' template of stage I holds one caption, a 'user' message with the image and an 'assistant' "
        ~ "message with the caption; found " ~ messages | length ~ " messages. Use the 'vicuna_v1' or 'mistral' "
        ~ "template for conversations."
    ) -}}
{%- endif -%}
{%- set content = [] if turns[0]['content'] is string else turns[0]['content'] -%}
{%- set images = content | selectattr('type', 'equalto', 'image') | list -%}
{%- if not images -%}
    {{- raise_exception("the 'plain' template of stage I needs an image in the 'user' message, found none.") -}}
{%- endif -%}
{{- '<image>' * images | length -}}
{%- if turns | length == 2 -%}
    {%- generation -%}
        {{- content_of(turns[1]) ~ '\n' -}}
    {%- endgeneration -%}
{%- endif -%}
"""

# LaVIT's prompts: images and texts in the order of the parts. A question has its frame; a caption has none, nor has a
# document, one 'assistant' message alone.
_LAVIT = r"""
{%- for message in turns -%}
    {%- set content = message['content'] -%}
    {%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
    {%- if message['role'] == 'user' -%}
        {%- for part in parts -%}
            {%- if part['type'] == 'image' -%}
                {{- '<image>' -}}
            {%- elif message['is_caption'] -%}
                {%- generation -%}
                    {{- content_of({'role': 'user', 'content': [part]}) -}}
                {%- endgeneration -%}
            {%- else -%}
                {{- 'Question: ' ~ content_of({'role': 'user', 'content': [part]}) ~ ' Answer:' -}}
            {%- endif -%}
        {%- endfor -%}
        {%- if message['is_caption'] -%}
            {%- generation -%}
                {{- eos_token -}}
            {%- endgeneration -%}
        {%- endif -%}
    {%- else -%}
        {%- set asked = turns[loop.index0 - 1]['content'] -%}
        {%- set is_answer = asked is string or asked | selectattr('type', 'equalto', 'text') | list -%}
        {%- generation -%}
            {{- (' ' if is_answer and not is_document else '') ~ content_of(message) ~ eos_token -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""

CHAT_TEMPLATES = {
    **{
        name: (_CONTENT + _NO_DOCUMENT.strip() + template).strip()
        for name, template in {"vicuna_v1": _VICUNA_V1, "mistral": _MISTRAL, "plain": _PLAIN}.items()
    },
    "lavit": (_CONTENT + _LAVIT).strip(),
}
