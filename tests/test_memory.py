import platform
import subprocess
import sys

import pytest

BLOCKS = """
import resource, sys
from cache_pipeline.memory import retained_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    kept = [bytearray(48 << 20) for _ in range(4)]
    for block in kept:
        block[::4096] = b"1" * (len(block) // 4096)

def counted():
    work()
    before = faults()
    for _ in range(3):
        work()
    return faults() - before

found = [counted()]
with retained_memory():
    with retained_memory():
        found.append(counted())
    found.append(counted())
found.append(counted())
print(*found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to keep memory")
def test_memory_is_kept_within_and_given_back_after():
    done = subprocess.run([sys.executable, "-c", BLOCKS], capture_output=True, text=True, check=True)
    before, inner, outer, after = map(int, done.stdout.split())
    pages = 3 * 4 * (48 << 20) // 4096
    assert before > pages * 0.9
    assert inner < pages * 0.01
    assert outer < pages * 0.01
    assert after > pages * 0.9


def test_without_glibc_nothing_happens(monkeypatch):
    from cache_pipeline import memory

    memory._function.cache_clear()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with memory.retained_memory():
        assert memory._function("mallopt") is None
    memory._function.cache_clear()
