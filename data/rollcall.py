"""Roll call: when a rank is lost, one of the others says which, and how to go on.

What      Ranks share a small table (torchrun's, which outlives them). One that ends notes there why: it has told its
          own mistake, it was asked to stop, its exchange with another rank broke off, or it is done. Who notes
          nothing was lost: killed, frozen, or its machine is gone.
Paper     Sec. 3.1 trains for two days on 8 GPUs; something will stop it on the way.
Run       ring.py joins and leaves; data/flags.py, through which every script runs, calls the roll.

Backends name an address, not a rank; torchrun names the rank that it saw end first, which is not the cause where
that one left with exit code 0 or hangs. Ranks answer from a thread, since the main one may compute for long, or wait
for a message that never comes; so all end within seconds, also on machines whose torchrun has noticed nothing.
"""

import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from typing import Any

POLL, PATIENCE = 0.5, 1.5  # seconds between looks at the table, and in which the living answer
TOLD, STOPPED, BROKEN, CALLED, DONE = "told", "stopped", "broken", "called", "done"  # what a rank notes
ROLL, SAID = "roll", "said"  # keys of the table, beside the ranks' numbers
BREAKS = re.compile(r"gloo/|NCCL|TCPStore|Connection (closed|reset|refused)|Timed out waiting|Broken pipe")


@dataclass
class Crew:
    """The ranks of this run as one of them sees it; alone, there is no `table`."""

    table: Any = None  # with set, get, check and add, as torch's stores
    rank: int = 0
    ranks: int = 1
    saved: Callable[[], list[int]] = list  # steps with a saved state, in order
    noted: bool = False
    lock: Lock = field(default_factory=Lock)


CREW = Crew()  # a process is a rank of one run


def join(table: Any, rank: int, ranks: int) -> None:
    """Take part from now on; called in the main thread. SIGTERM ends this rank at once, whatever it waits for."""
    CREW.table, CREW.rank, CREW.ranks, CREW.noted = table, rank, ranks, False
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # so that its number goes into the pipe
    signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)

    def listen() -> None:
        why = None
        while why is None:
            if select.select([ear], [], [], POLL)[0]:
                why = STOPPED if os.read(ear, 1)[0] == signal.SIGTERM else None
            elif called():
                why = CALLED
        call(why)
        os._exit(128 + signal.SIGTERM)  # as a shell counts it

    Thread(target=listen, daemon=True).start()


def resumable(saved: Callable[[], list[int]]) -> None:
    """Tell how to find the steps from which this run could go on."""
    CREW.saved = saved


def called() -> bool:
    """Whether another rank calls the roll, which our main thread may not know for long: it computes, or waits."""
    try:
        return not CREW.noted and CREW.table.check([ROLL])
    except RuntimeError:  # the table went with its machine; who is left there says so
        return False


def note(why: str) -> None:
    """Leave word for the others, the first time that it is called."""
    if CREW.table is not None and not CREW.noted:
        CREW.noted = True
        with suppress(RuntimeError):  # the table went with its machine
            CREW.table.set(str(CREW.rank), why)


def broken(error: BaseException) -> bool:
    """Whether an error is of an exchange with other ranks, and its cause with them."""
    return CREW.table is not None and isinstance(error, RuntimeError) and bool(BREAKS.search(str(error)))


def call(why: str) -> bool:
    """Note `why`, hear the others and print one sentence, on one rank; False if the living cannot explain the error."""
    with CREW.lock:
        if CREW.noted:  # our other thread has called, or there is no more to say
            return True
        note(why)
        try:
            CREW.table.set(ROLL, why)
            time.sleep(PATIENCE)
            heard = {r: CREW.table.get(str(r)).decode() for r in range(CREW.ranks) if CREW.table.check([str(r)])}
            first = TOLD not in heard.values() and CREW.table.add(SAID, 1) == 1
            missing = [str(r) for r in range(CREW.ranks) if r not in heard]
        except RuntimeError:
            heard, first, missing = {}, True, ["0, or its machine,"]  # where the table is
        if missing:
            what = f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)} lost: killed, frozen or cut off"
        else:
            what = "stopped from outside"
        if first and (missing or STOPPED in heard.values()):
            print(f"\n{Path(sys.argv[0]).name}: {what}. {how_to_go_on()}", file=sys.stderr, flush=True)
        return bool(missing) or TOLD in heard.values() or STOPPED in heard.values()


def how_to_go_on() -> str:
    """The sentence after a loss."""
    steps = CREW.saved()
    return "Run the same command again" + (f": it goes on from step {steps[-1]}." if steps else ".")
