"""Ctrl-C, exit, fork and garbage collection while an engine works: real signals, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

OPENING = """
import gc, os, random, signal, sys, threading, time, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
from tuili import LLM, SamplingParams
llm = LLM({model!r}, threads=1, max_num_seqs=4, max_num_batched_tokens=64, num_gpu_blocks_override=128)
prompts = [[5 + i] * (3 + 9 * i) for i in range(9)]
params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
def tokens():
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
"""


def run(model: str, work: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    script = OPENING.format(model=model) + textwrap.dedent(work)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=seconds)


def said(model: str, work: str) -> str:
    done = run(model, work)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize("depth", [1, 2])
def test_an_interrupt_at_any_moment_leaves_a_working_engine(tiny, depth):
    work = f"""
    llm.engine.client.engine.depth = {depth}
    expected = tokens()
    began = time.perf_counter()
    tokens()
    length, chance, caught = time.perf_counter() - began, random.Random({depth}), 0
    for round in range(40):
        timer = threading.Timer(length * chance.random(), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()  # it may fire before this returns
            tokens()
            time.sleep(60)
        except KeyboardInterrupt:
            now = llm.engine.snapshot()
            assert (now.num_running, now.num_waiting, now.kv_blocks_used) == (0, 0, 0), (round, now)
            llm.engine.client.engine.scheduler.check_integrity()
            caught += 1
        if round % 8 == 0:
            assert tokens() == expected, round
    assert tokens() == expected
    llm.close()
    print(caught)
    """
    assert said(str(tiny("llama")), work) == "40"


def test_an_interrupt_records_what_it_ended(tiny):
    work = """
    ended = []
    llm.engine.on_finish.append(lambda record: ended.append(record.finish_reason))
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        llm.generate(prompts, SamplingParams(max_tokens=150, ignore_eos=True))
        time.sleep(60)
    except KeyboardInterrupt:
        print(len(ended), set(ended) <= {"abort", "length"}, llm.engine.healthy())
    """
    assert said(str(tiny("llama")), work) == "9 True True"


def test_a_process_ends_while_another_thread_generates(tiny):
    """Neither a hang nor a crash: the engine's thread ends before the interpreter does."""
    work = """
    thread = threading.Thread(target=lambda: [tokens() for _ in range(10**6)], daemon=True)
    thread.start()
    time.sleep(0.3)
    print("leaving")
    """
    assert said(str(tiny("llama")), work) == "leaving"
    done = run(str(tiny("llama")), "os.kill(os.getpid(), signal.SIGINT) or tokens()")
    assert done.returncode == -signal.SIGINT, done.stderr[-3000:]


def test_an_engine_goes_with_its_last_user(tiny):
    work = """
    tokens()
    client = weakref.ref(llm.engine.client)
    thread = client()._thread
    del llm
    gc.collect()
    print(client(), thread.is_alive())
    """
    assert said(str(tiny("llama")), work) == "None False"


def test_a_forked_child_starts_an_engine_of_its_own(tiny):
    work = """
    expected = tokens()
    child = os.fork()
    if not child:
        os._exit(tokens() != expected)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tokens() == expected
    print("both")
    """
    assert said(str(tiny("llama")), work) == "both"


def test_a_child_forked_at_work_is_told(tiny):
    work = """
    from tuili.base.errors import EngineDead
    forked = []
    def fork(plan, result, stats):  # in the engine's thread, in the middle of a step
        if not forked:
            forked.append(os.fork())
            if not forked[0]:
                try:
                    tokens()
                except EngineDead as error:
                    os._exit("forked" not in str(error))
                os._exit(2)
    llm.engine.on_step.append(fork)
    tokens()
    assert os.waitstatus_to_exitcode(os.waitpid(forked[0], 0)[1]) == 0
    print("told")
    """
    assert said(str(tiny("llama")), work) == "told"


def test_several_threads_share_an_engine(tiny):
    work = """
    expected, found = tokens(), []
    threads = [threading.Thread(target=lambda: found.append(tokens())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6
    llm.close()
    assert not llm.engine.healthy()
    print("same")
    """
    assert said(str(tiny("llama")), work) == "same"
