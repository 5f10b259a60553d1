"""The official client against a running Baton, and beside it against one of its vLLMs, whose answers are
what an aggregated vLLM says: openai_client.py BASE_URL VLLM_BASE_URL MODEL"""

import json
import sys

import openai
from openai import OpenAI

base_url, vllm_url, model = sys.argv[1:]
client = OpenAI(base_url=base_url, api_key="unused", max_retries=0)
vllm = OpenAI(base_url=vllm_url, api_key="unused", max_retries=0)
messages = [{"role": "user", "content": "Name three colours of the rainbow."}]
greedy = {"model": model, "temperature": 0, "seed": 1}
checks = []


def check(function):
    checks.append(function)
    return function


def path(raw):
    return raw.headers["x-baton-path"]


def same_as_vllm(**arguments):
    """The split answer, after holding it against the aggregated one: text, tool calls, counts."""
    raw = client.chat.completions.with_raw_response.create(**arguments)
    assert path(raw) == "disaggregated", dict(raw.headers)
    split, whole = raw.parse(), vllm.chat.completions.create(**arguments)
    for a, b in zip(split.choices, whole.choices, strict=True):
        assert (a.message.content, a.finish_reason) == (b.message.content, b.finish_reason), (a, b)
        calls = [
            [call.function.model_dump() for call in choice.message.tool_calls or []] for choice in (a, b)
        ]
        assert calls[0] == calls[1], calls
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(split.usage, count) == getattr(whole.usage, count), (split.usage, whole.usage)
    return split


@check
def chat():
    raw = client.chat.completions.with_raw_response.create(messages=messages, max_tokens=12, **greedy)
    answer = raw.parse()
    assert path(raw) == "disaggregated", dict(raw.headers)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens == 12 and answer.usage.prompt_tokens > 5, answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


@check
def chat_stream_equals_chat():
    whole = client.chat.completions.create(messages=messages, max_tokens=12, **greedy)
    stream = client.chat.completions.create(
        messages=messages, max_tokens=12, stream=True, stream_options={"include_usage": True}, **greedy
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content, (text, whole)
    assert chunks[-1].usage.completion_tokens == 12, chunks[-1]
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


@check
def stream_without_usage():
    stream = client.chat.completions.create(messages=messages, max_tokens=4, stream=True, **greedy)
    assert all(chunk.usage is None for chunk in stream)


@check
def completion_and_its_stream():
    arguments = {"prompt": "The colours of the rainbow are", "max_tokens": 10, **greedy}
    whole = client.completions.create(**arguments)
    text = "".join(c.choices[0].text for c in client.completions.create(stream=True, **arguments))
    assert text == whole.choices[0].text and text


@check
def token_id_prompt():
    raw = client.completions.with_raw_response.create(prompt=[504, 19161, 282, 260], max_tokens=6, **greedy)
    assert path(raw) == "disaggregated" and raw.parse().usage.prompt_tokens == 4


@check
def two_answers():
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=messages, max_tokens=6, n=2, temperature=1, seed=3
    )
    assert len(raw.parse().choices) == 2
    assert path(raw) == "aggregated" and raw.headers["x-baton-reason"] == "n"


@check
def stop():
    arguments = {"prompt": "1, 2, 3, 4, 5, 6,", "max_tokens": 24, **greedy}
    text = client.completions.create(**arguments).choices[0].text
    word = text[3:6]
    stopped = client.completions.create(stop=[word], **arguments).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == text.split(word)[0], (text, stopped)


@check
def logprobs():
    answer = client.chat.completions.create(
        messages=messages, max_tokens=5, logprobs=True, top_logprobs=3, **greedy
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 5 and all(len(t.top_logprobs) == 3 and t.logprob <= 0 for t in tokens)
    legacy = client.completions.create(prompt="One, two,", max_tokens=4, logprobs=2, **greedy)
    assert len(legacy.choices[0].logprobs.token_logprobs) == 4


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@check
def tools():
    ask = [{"role": "user", "content": "What is the weather in Paris?"}]
    forced = {"type": "function", "function": {"name": "get_weather"}}
    answer = same_as_vllm(model=model, messages=ask, tools=[TOOL], tool_choice=forced, max_tokens=60, temperature=0)
    assert answer.choices[0].message.tool_calls[0].function.name == "get_weather"
    same_as_vllm(messages=ask, tools=[TOOL], max_tokens=20, **greedy)


@check
def json_schema():
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    answer = same_as_vllm(
        messages=messages,
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
        **greedy,
    )
    content = answer.choices[0].message.content
    assert json.loads(content)["colour"] in ("red", "green"), content


@check
def one_token():
    raw = client.chat.completions.with_raw_response.create(messages=messages, max_tokens=1, **greedy)
    assert raw.parse().usage.completion_tokens == 1
    assert raw.headers["x-baton-reason"] == "one_token"


@check
def seed():
    arguments = {"model": model, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 1.0}
    same = {client.completions.create(seed=5, **arguments).choices[0].text for _ in range(3)}
    others = {client.completions.create(seed=s, **arguments).choices[0].text for s in range(6, 12)}
    assert len(same) == 1 and len(others) > 1


@check
def errors_are_the_clients_own():
    for call, error in [
        (lambda: client.completions.create(model="nobody", prompt="x"), openai.NotFoundError),
        (lambda: client.completions.create(model=model, prompt="x", temperature=-1), openai.BadRequestError),
        (
            lambda: client.completions.create(
                model=model, prompt="x", extra_body={"kv_transfer_params": {}}
            ),
            openai.BadRequestError,
        ),
    ]:
        try:
            call()
        except error:
            continue
        raise AssertionError(f"{error.__name__} was expected")


@check
def models():
    assert [m.id for m in client.models.list()] == [model]


for function in checks:
    function()
    print(f"   {function.__name__}: ok")
