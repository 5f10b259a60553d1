import hashlib
import uuid
from types import SimpleNamespace

import pytest
from fakes import KEY, OTHER_KEY, request

from baton_connector.handoff import HandoffKey, RecentHandoffs, Role, prompt_digest, read_part

UUID = uuid.UUID("0123456789abcdef0123456789abcdef")


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": True}])
def test_parameters_of_others_are_none_of_ours(params) -> None:
    assert read_part(params) is None


@pytest.mark.parametrize("text", [str(UUID), UUID.hex])
def test_both_ways_to_write_a_uuid_name_the_same_handoff(text: str) -> None:
    part = read_part({"baton": {"role": "produce", "handoff": text, "generation": 3}})
    assert part is not None and part.role is Role.PRODUCE
    assert part.key == HandoffKey(UUID, 3)
    assert part.key.wire() == {"handoff": str(UUID), "generation": 3}


@pytest.mark.parametrize(
    "fields",
    [
        {"handoff": None},
        {"handoff": "zz"},
        {"handoff": 7},
        {"generation": -1},
        {"generation": 2**32},
        {"generation": "0"},
        {"generation": True},
        {"generation": None},
    ],
)
@pytest.mark.parametrize("role", list(Role))
def test_malformed_parts_keep_their_role_and_have_no_key(fields, role: Role) -> None:
    baton = {"role": role.value, "handoff": str(UUID), "generation": 0, **fields}
    part = read_part({"baton": baton})
    assert part is not None and part.role is role and part.key is None and part.fault


@pytest.mark.parametrize("baton", [None, 7, [], "consume", {}, {"role": "both"}])
def test_what_is_no_producer_is_a_consumer_that_will_fail(baton) -> None:
    part = read_part({"baton": baton})
    assert part is not None and part.role is Role.CONSUME and part.key is None


def test_the_digest_is_over_little_endian_token_ids() -> None:
    plain = request(prompt_token_ids=[1, 258])
    expected = hashlib.sha256(b"\x01\0\0\0\x02\x01\0\0").hexdigest()
    assert prompt_digest(plain) == expected


def test_the_digest_tells_adapter_media_and_salt_apart() -> None:
    feature = SimpleNamespace(mm_hash="x", identifier="i")
    same_text = [
        request(),
        request(lora_request=SimpleNamespace(lora_name="x")),
        request(mm_features=[feature]),
        request(mm_features=[feature, feature]),
        request(cache_salt="x"),
    ]
    assert len({prompt_digest(r) for r in same_text}) == len(same_text)


def test_recent_handoffs_forget_the_oldest() -> None:
    recent = RecentHandoffs(capacity=1)
    recent.add(KEY)
    recent.add(KEY)
    assert KEY in recent
    recent.add(OTHER_KEY)
    assert KEY not in recent and OTHER_KEY in recent
