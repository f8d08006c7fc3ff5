"""The encoder's cache: bounded in bytes, the least recently used goes first."""

from hypothesis import given
from hypothesis import strategies as st

from darkroom.wire.tensors import RawTensor
from services.encoder.cache import CacheKey, EmbeddingCache, Embeddings

KEYS = st.builds(
    CacheKey, model_id=st.just("m"), prompt=st.text("ab", max_size=3), negative_prompt=st.just(""),
    guided=st.booleans(), deterministic=st.booleans(),
)  # fmt: skip


def key(prompt: str) -> CacheKey:
    return CacheKey("m", prompt, "", guided=False, deterministic=False)


def embeddings(size_bytes: int) -> Embeddings:
    return {"prompt_embeds": RawTensor("uint8", (size_bytes,), bytes(size_bytes))}


def test_what_was_put_is_there() -> None:
    cache = EmbeddingCache(limit_bytes=100)
    cache.put(key("a"), embeddings(10))
    assert cache.get(key("a")) == embeddings(10)
    assert cache.get(key("b")) is None


def test_prompts_count_as_four_bytes_a_character() -> None:
    cache = EmbeddingCache(limit_bytes=100)
    cache.put(CacheKey("m", "abc", "de", guided=True, deterministic=False), embeddings(10))
    assert cache.size_bytes == 10 + 4 * 5


def test_the_least_recently_used_goes_first() -> None:
    cache = EmbeddingCache(limit_bytes=30)
    cache.put(key("a"), embeddings(10))
    cache.put(key("b"), embeddings(10))
    assert cache.get(key("a"))
    cache.put(key("c"), embeddings(10))
    assert cache.get(key("b")) is None
    assert cache.get(key("a"))
    assert cache.get(key("c"))


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    cache = EmbeddingCache(limit_bytes=30)
    cache.put(key("a"), embeddings(31))
    assert cache.get(key("a")) is None
    assert cache.size_bytes == 0


def test_a_bound_of_nothing_keeps_nothing() -> None:
    cache = EmbeddingCache(limit_bytes=0)
    cache.put(key("a"), embeddings(1))
    assert cache.get(key("a")) is None


def test_keys_that_differ_in_any_part_are_different() -> None:
    cache = EmbeddingCache(limit_bytes=1000)
    first = key("a")
    others = [
        first._replace(model_id="n"), first._replace(prompt="b"), first._replace(negative_prompt="b"),
        first._replace(guided=True), first._replace(deterministic=True),
    ]  # fmt: skip
    cache.put(first, embeddings(1))
    assert [cache.get(other) for other in others] == [None] * 5


@given(st.lists(st.tuples(KEYS, st.integers(1, 40))))
def test_the_bytes_kept_never_pass_the_bound_and_are_counted_right(puts: list[tuple[CacheKey, int]]) -> None:
    cache = EmbeddingCache(limit_bytes=100)
    for one, size_bytes in puts:
        cache.put(one, embeddings(size_bytes))
        kept = {k: found for k, _ in puts if (found := cache._entries.get(k))}
        held = sum(4 * len(k.prompt) + len(value["prompt_embeds"].data) for k, value in kept.items())
        assert cache.size_bytes == held <= 100
