"""`watch`: what a frame shows, that it fits, and that a real terminal is left as it was."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ledger_rows import NAME, claim, complete, make_ledger, report, study_config
from rich.console import Console

from search.cli_watch import frame, sparkline
from search.ledger import Ledger, TicketState
from search.report import StudyRows
from search.snapshot import Snapshot, take_snapshot

CONFIG = study_config(trials=24)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return make_ledger(tmp_path, CONFIG)


def look(ledger: Ledger) -> Snapshot:
    return take_snapshot(StudyRows.read(ledger, NAME), CONFIG)


def drawn(snapshot: Snapshot, width: int = 80, height: int | None = None) -> list[str]:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(frame(snapshot, width, height, hint=height is not None))
    return capture.get().splitlines()


@pytest.mark.parametrize(
    ("values", "width", "text"),
    [
        ((), 10, ""),
        ((0.0, 0.5, 1.0), 10, "▁▅█"),
        ((0.0, None, 1.0), 10, "▁ █"),
        ((0.0, 0.0, 1.0, 1.0), 2, "▁█"),
        ((0.5,), 0, ""),
        ((-1.0, 2.0), 5, "▁█"),
    ],
)
def test_sparkline_has_a_block_for_each_value(values: tuple[float | None, ...], width: int, text: str) -> None:
    assert sparkline(values, width, (0.0, 1.0)) == text


def test_sparkline_of_equal_values_is_flat() -> None:
    assert sparkline((0.3, 0.3), 5, (0.3, 0.3)) == "▁▁"


def test_frame_names_workers_slots_best_and_queue(ledger: Ledger) -> None:
    tickets = claim(ledger, "w", 4)
    complete(ledger, tickets[0], [0.1, 0.2])
    complete(ledger, tickets[1], [0.2, 0.4])
    report(ledger, tickets[2], [0.0, 0.2, 0.4])

    lines = drawn(look(ledger))

    assert lines[0] == "study rows"
    assert lines[1] == "20 waiting, 2 running, 2 complete"
    assert lines[2] == "best 0.4000 (trial 1) | base 0.2000 | +0.2000, unconfirmed"
    assert re.fullmatch(r"20 in the queue \| [\d.]+ epochs/min \| about .* left", lines[3])
    assert lines[4] == "best so far ▁█"
    assert lines[5] == "a-host:4000000  cpu bf16  slots 2/4  trains"
    assert lines[6] == "  trial 2    3/6    0.4000  ▁▅█"
    assert lines[7].rstrip() == "  trial 3    0/6"


def test_frame_base_that_still_trains_is_not_compared(ledger: Ledger) -> None:
    base, other = claim(ledger, "w", 2)
    report(ledger, base, [0.3])
    complete(ledger, other, [0.1, 0.2])

    assert drawn(look(ledger))[2] == "best 0.2000 (trial 1) | base 0.3000 so far"


def test_frame_of_a_study_that_nobody_works_on_says_how_to(ledger: Ledger) -> None:
    assert "no worker works on it: `yolosearch launch` or `worker` starts some" in drawn(look(ledger))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 12), (80, 8), (40, 10), (120, 60)])
def test_frame_fits_the_terminal_with_many_workers_and_failures(ledger: Ledger, width: int, height: int) -> None:
    tickets = [ticket for number in range(5) for ticket in claim(ledger, f"worker-{number}", 4)]
    for ticket in tickets[:4]:
        ledger.finish(ticket, TicketState.FAIL, None, "a reason that is longer than any terminal is wide " * 9)
    for ticket in tickets[4:]:
        report(ledger, ticket, [0.1, 0.2])

    lines = drawn(look(ledger), width, height)

    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert lines[-1].startswith("Ctrl-C ends watching")


def test_frame_without_room_puts_slots_side_by_side_then_leaves_workers_out(ledger: Ledger) -> None:
    for number in range(4):
        for ticket in claim(ledger, f"worker-{number}", 4):
            report(ledger, ticket, [0.1, 0.2])

    beside = drawn(look(ledger), 80, 14)
    short = drawn(look(ledger), 80, 6)

    assert sum(line.startswith("a-host") for line in beside) == 4
    assert any(re.match(r"  0 \S+ +0\.2000 +1 ", line) for line in beside)
    assert any(line.startswith("... and ") for line in short)


# ---- the command -----------------------------------------------------------------------------------------------------


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "search", "watch", NAME, "--runs-dir", str(folder / "runs"), *options]


def environment(**changes: str) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if key not in ("YOLOSEARCH_STORAGE_URL", "COLUMNS", "LINES")}
    return {**own, "TERM": "xterm-256color", "PYTHONUTF8": "1", **changes}


def output(folder: Path, *options: str, **changes: str) -> str:
    words = command(folder, *options)
    done = subprocess.run(words, env=environment(**changes), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_watch_once_and_json_show_the_same_study(ledger: Ledger, tmp_path: Path) -> None:
    report(ledger, claim(ledger, "w", 1)[0], [0.1, 0.2])

    text, data = output(tmp_path, "--once", COLUMNS="80"), json.loads(output(tmp_path, "--json"))

    assert "a-host:4000000  cpu bf16  slots 1/4  trains" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert data["workers"][0]["slots"][0]["curve"] == [0.1, 0.2]


def test_watch_terminal_without_unicode_draws_in_ascii(ledger: Ledger, tmp_path: Path) -> None:
    report(ledger, claim(ledger, "w", 1)[0], [0.1, 0.2])

    assert output(tmp_path, "--once", PYTHONIOENCODING="ascii", PYTHONUTF8="0").isascii()


class Terminal:
    """`yolosearch watch` on a pseudo-terminal of 80 columns and 24 lines."""

    def __init__(self, folder: Path) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        self.process = subprocess.Popen(
            command(folder), env=environment(), stdin=slave, stdout=slave, stderr=slave, preexec_fn=_own_terminal
        )
        self.text = ""

    def settings(self) -> list[object]:
        return termios.tcgetattr(self._slave)

    def read_until(self, condition: Callable[[str], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition(self.text):
            assert time.monotonic() < deadline, self.text
            if select.select([self.master], [], [], 0.1)[0]:
                self.text += os.read(self.master, 65536).decode(errors="replace")

    def press(self, key: bytes) -> None:
        os.write(self.master, key)

    def wait(self) -> int:
        code = self.process.wait(timeout=60)
        while select.select([self.master], [], [], 0.2)[0]:
            self.text += os.read(self.master, 65536).decode(errors="replace")
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self._slave)


def _own_terminal() -> None:
    """The child leads a session whose terminal is its standard input, so that Ctrl-C reaches it as in a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored, and inherited so, where the tests run in the background
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(ledger: Ledger, tmp_path: Path) -> Iterator[Terminal]:
    report(ledger, claim(ledger, "w", 1)[0], [0.1, 0.2])
    opened = Terminal(tmp_path)
    yield opened
    opened.close()


HIDE, SHOW, ALTERNATE = "\x1b[?25l", "\x1b[?25h", "\x1b[?1049h"


def test_watch_on_a_terminal_renews_and_ctrl_c_leaves_it_clean(terminal: Terminal, ledger: Ledger) -> None:
    terminal.read_until(lambda text: "0.2000" in text)
    report(ledger, ledger.tickets(NAME)[0], [0.1, 0.2, 0.3333])
    terminal.read_until(lambda text: "0.3333" in text)
    terminal.press(b"\x03")

    assert terminal.wait() == 130
    assert ALTERNATE not in terminal.text
    assert terminal.text.count(HIDE) == 1
    assert terminal.text.rindex(SHOW) > terminal.text.index(HIDE)
    assert "Traceback" not in terminal.text
    assert terminal.settings() == terminal.before
    assert rows_left(terminal.text) == []
    assert ledger.tickets(NAME)[0].state is TicketState.RUNNING


def test_watch_on_a_terminal_ends_with_the_study_and_leaves_the_last_frame(terminal: Terminal, ledger: Ledger) -> None:
    terminal.read_until(lambda text: "0.2000" in text)
    while tickets := ledger.claim(NAME, "w", 30, 300.0):
        for ticket in tickets:
            complete(ledger, ticket, [0.5])
    complete(ledger, ledger.tickets(NAME)[0], [0.1, 0.2, 0.25])

    assert terminal.wait() == 0
    assert "24 complete" in rows_left(terminal.text)


def test_watch_on_a_terminal_sigterm_shows_the_cursor_again(terminal: Terminal) -> None:
    terminal.read_until(lambda text: "0.2000" in text)
    terminal.process.send_signal(signal.SIGTERM)

    assert terminal.wait() == 130
    assert terminal.text.rindex(SHOW) > terminal.text.rindex(HIDE)


def rows_left(text: str) -> list[str]:
    """What stands on the screen after such output: a terminal in small, for the codes that rich sends."""
    screen, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if token == "\r":
            column = 0
        elif token == "\n":
            row, column = row + 1, 0
            screen += [""] * (row + 1 - len(screen))
        elif match := re.fullmatch(r"\x1b\[(\d*)A", token):
            row = max(0, row - int(match[1] or 1))
        elif token == "\x1b[2K":
            screen[row] = ""
        elif not token.startswith("\x1b"):
            screen[row] = f"{screen[row][:column]:<{column}}{token}{screen[row][column + len(token) :]}"
            column += len(token)
    return [line.rstrip() for line in screen if line.strip() and line.strip() != "^C"]
