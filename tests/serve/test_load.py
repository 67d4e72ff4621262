"""Four times more clients than the server takes, for a while: nothing lost, mixed or leaked.

LINNET_LOAD_S=300 makes it five minutes.
"""

import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from linnet.infer.engine import EngineSettings

DURATION_S = int(os.environ.get("LINNET_LOAD_S", "60"))
SETTINGS = EngineSettings(
    max_sequences=4, max_model_len=512, memory_bytes=64 << 20, max_queued_requests=8
)
NUM_CLIENTS = 4 * (SETTINGS.max_sequences + SETTINGS.max_queued_requests)
WARM_UP_S = DURATION_S // 3
MOST_GROWTH_BYTES = 16 << 20


def body_of(index: int) -> dict:
    prompt = f"the cat number {index} " * (1 + index % 7)
    return {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 5 + index % 20,
        "temperature": index % 2,
        "seed": index,
        "ignore_eos": True,
    }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Client(threading.Thread):
    """Asks for known answers until told to stop."""

    def __init__(self, address, answers: dict[int, str], stop: threading.Event) -> None:
        super().__init__()
        self._address, self._answers, self._stop_event = address, answers, stop
        self.statuses: Counter[int] = Counter()
        self.problems: list[str] = []

    def run(self) -> None:
        choose = random.Random(id(self))
        with self._address.http() as http:
            while not self._stop_event.is_set():
                index = choose.choice(list(self._answers))
                answer = http.post("/v1/chat/completions", json=body_of(index))
                self.statuses[answer.status_code] += 1
                self._check(index, answer)

    def _check(self, index: int, answer) -> None:
        if answer.status_code == 503:
            wait_s = int(answer.headers["retry-after"])
            if wait_s < 1:
                self.problems.append(f"Retry-After is {wait_s}")
            time.sleep(0.05)
        elif answer.status_code != 200:
            self.problems.append(answer.text)
        elif answer.json()["choices"][0]["message"]["content"] != self._answers[index]:
            self.problems.append(f"another answer to {index}")


@pytest.mark.slow
@pytest.mark.timeout(DURATION_S + 120)
def test_overload_loses_mixes_and_leaks_nothing(make_engine, serve):
    with serve(make_engine(SETTINGS)) as address:
        with address.http() as http:
            answers = {
                index: http.post("/v1/chat/completions", json=body_of(index)).json()["choices"][0][
                    "message"
                ]["content"]
                for index in range(24)
            }
        stop = threading.Event()
        clients = [Client(address, answers, stop) for _ in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(WARM_UP_S)
        before = resident_bytes()
        time.sleep(DURATION_S - WARM_UP_S)
        growth = resident_bytes() - before
        stop.set()
        for client in clients:
            client.join()
        counters = address.engine.counters()
    statuses = sum((client.statuses for client in clients), Counter())
    assert [problem for client in clients for problem in client.problems] == []
    assert statuses.keys() == {200, 503} and statuses[200] > 100
    assert growth < MOST_GROWTH_BYTES
    assert counters.running == counters.waiting == 0
    assert sum(counters.finished_total.values()) == statuses[200] + len(answers)
