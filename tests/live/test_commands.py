"""Commands with real workers: what they write, what is typed, when they wait, how they end, and that nothing of them is left."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from connections.runners.terminal import IDLE
from tests.conftest import until
from tests.live import services
from tests.live.commands import END, Commands, children, client, installation, processes

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """One installation for the tests that do not stop its processes."""
    with installation(tmp_path_factory.mktemp("commands")) as made:
        yield made


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Commands]:
    """An installation of this test alone, with a short lease."""
    with installation(tmp_path, LEASE_SECONDS="3") as made:
        yield made


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# ── Ends ──


def test_C16_C32_a_command_that_succeeds_is_completed_once_with_its_code(commands: Commands) -> None:
    task = commands.run("sh", "-c", "echo one; echo two >&2")
    ended = commands.wait(task)
    assert (ended["status"], ended["exit_code"], ended["error_code"]) == ("completed", 0, None)
    assert commands.output(task) == b"one\r\ntwo\r\n"
    assert commands.statuses(task) == ["running", "completed"]


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["sh", "-c", "exit 3"], {"exit_code": 3, "signal": None, "error_code": "exit_code"}),
        (["sh", "-c", "kill -SEGV $$"], {"exit_code": None, "signal": "SIGSEGV", "error_code": "signal"}),
        (["sh", "-c", "kill -KILL $$"], {"exit_code": None, "signal": "SIGKILL", "error_code": "signal"}),
        (["no-such-program"], {"error_code": "cannot_start", "exit_code": None}),
        (["/etc/passwd"], {"error_code": "cannot_start", "error": "/etc/passwd may not be executed."}),
        (["/etc"], {"error_code": "cannot_start", "error": "/etc is a folder, not a program."}),
        (["echo", "x" * 131_072], {"error_code": "cannot_start"}),
    ],
    ids=["3", "SIGSEGV", "SIGKILL", "no program", "not executable", "a folder", "too long"],
)  # fmt: skip
def test_C15_C32_every_other_end_is_told_apart(
    commands: Commands, argv: list[str], shown: dict[str, object]
) -> None:
    ended = commands.wait(commands.run(*argv))
    assert ended["status"] == "failed"
    assert {name: ended[name] for name in shown} == shown
    assert ended["error"]


def test_C15_a_folder_that_is_gone_and_one_that_leads_elsewhere_are_told(commands: Commands) -> None:
    gone = commands.folder / "gone"
    ended = commands.wait(commands.run("true", cwd=str(gone)))
    assert (ended["status"], ended["error_code"]) == ("failed", "missing_directory")
    assert "does not exist" in ended["error"]
    link = commands.folder / "link"
    link.symlink_to("/etc")
    ended = commands.wait(commands.run("ls", cwd=str(link)))
    assert (ended["error_code"], ended["output_bytes"]) == ("missing_directory", 0)
    inside = commands.folder / "inside"
    inside.mkdir()
    task = commands.run("pwd", cwd=str(inside))
    commands.wait(task)
    assert commands.output(task).decode().strip() == os.path.realpath(inside)


def test_a_command_that_takes_too_long_is_ended_and_says_so(commands: Commands) -> None:
    ended = commands.wait(commands.run("sleep", "600", timeout_seconds=1))
    assert (ended["status"], ended["error_code"], ended["signal"]) == ("failed", "timeout", "SIGTERM")


def test_C19_a_killed_command_is_killed_with_its_children_whether_they_listen_or_not(
    commands: Commands,
) -> None:
    stubborn = 'trap "" TERM HUP; echo ready; while :; do sleep 1000 & wait; done'
    task = commands.run("sh", "-c", f"(setsid sh -c '{stubborn}' &); {stubborn}")
    until(lambda: commands.output(task).count(b"ready") == 2, 30)
    assert len(processes(task)) >= 4
    assert commands.kill(task, "enough") == 202
    ended = commands.wait(task)
    assert (ended["status"], ended["signal"], ended["kill_reason"]) == ("killed", "SIGKILL", "enough")
    assert processes(task) == {}
    assert commands.kill(task) == 200


def test_C22_a_kill_that_comes_too_late_changes_nothing(commands: Commands) -> None:
    task = commands.run("true")
    ended = commands.wait(task)
    assert commands.kill(task) == 409
    assert commands.show(task) == ended


def test_what_a_command_leaves_behind_ends_with_it(commands: Commands) -> None:
    task = commands.run("sh", "-c", "(setsid sh -c 'trap \"\" TERM HUP; sleep 1000' &); sleep 0.1; echo bye")
    assert commands.wait(task)["status"] == "completed"
    assert processes(task) == {}


# ── What it is given ──


def test_a_command_gets_no_secret_of_the_server(tmp_path: Path) -> None:
    secret = "of the server " * 4
    with installation(
        tmp_path, SECRET_KEY=secret, METRICS_TOKEN="a-token-of-the-server", COMMAND_ENV="PATH,HOME"
    ) as commands:
        task = commands.run("sh", "-c", "umask; ls /proc/$$/fd | wc -w; cat /proc/$$/environ; sleep 1000")
        commands.says(task, b"SWITCHBOARD_TASK_ID")
        for pid in processes(task):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            names = {each.partition(b"=")[0].decode() for each in environment if each}
            assert names <= {"PATH", "HOME", "TERM", "SWITCHBOARD_TASK_ID", "PWD", "OLDPWD", "SHLVL", "_"}
        shown = commands.output(task)
        assert shown.startswith(b"0022\r\n")
        assert int(shown.split()[1]) <= 4
        keeper = next(pid for pid, words in processes("keeper.py").items() if str(tmp_path) not in words)
        assert b"server" not in Path(f"/proc/{keeper}/environ").read_bytes()
        commands.kill(task)
        commands.wait(task)


def test_signals_are_as_if_the_command_was_started_by_a_shell(commands: Commands) -> None:
    code = (
        "import signal\n"
        "print([s for s in signal.valid_signals() if signal.getsignal(s) == signal.SIG_IGN], signal.pthread_sigmask(0, []))"
    )
    task = commands.run(
        sys.executable, "-c", code.replace("import signal", "import signal, sys"), title="signals"
    )
    commands.wait(task)
    # Python itself ignores these two.
    assert commands.output(task) == b"[<Signals.SIGPIPE: 13>, <Signals.SIGXFSZ: 25>] set()\r\n"


# ── What it writes ──


def test_C50_C51_fifty_megabytes_of_any_bytes_are_kept_as_they_came(own: Commands) -> None:
    """Invalid UTF-8, characters cut anywhere, escape sequences, a line of ten megabytes; after the end, and after a restart."""
    code = (
        "import os, random, sys, tty\n"
        "tty.setraw(1)\n"
        "random.seed(5)\n"
        "out = os.fdopen(1, 'wb', 0)\n"
        "for n in range(40):\n"
        "    out.write(random.randbytes(1 << 20))\n"
        "out.write('ä€😀'.encode() * 1_165_084)\n"
        "out.write(b'\\x1b[31mred\\x1b[0m\\x1b]0;ti' + b'tle\\x07' + b'\\xff\\xfe\\xc3')\n"
    )
    task = own.run(*python(code))
    ended = own.wait(task, seconds=180)
    assert ended["status"] == "completed", ended
    dice = random.Random(5)
    expected = b"".join(dice.randbytes(1 << 20) for _ in range(40))
    expected += "ä€😀".encode() * 1_165_084
    expected += b"\x1b[31mred\x1b[0m\x1b]0;title\x07\xff\xfe\xc3"
    assert len(expected) > 50_000_000
    assert ended["output_bytes"] == len(expected)
    assert hashlib.sha256(own.output(task)).digest() == hashlib.sha256(expected).digest()
    own.running.stop("server")
    own.running.stop("worker")
    own.running.start("server")
    own.running.wait_until_up()
    assert hashlib.sha256(own.output(task)).digest() == hashlib.sha256(expected).digest()


def test_what_comes_after_the_limit_is_counted_and_the_program_goes_on(tmp_path: Path) -> None:
    with installation(tmp_path, COMMAND_OUTPUT_BYTES="100000") as commands:
        task = commands.run("sh", "-c", "head -c 300000 /dev/zero; exit 4")
        ended = commands.wait(task)
        assert (ended["exit_code"], ended["output_bytes"], ended["output_dropped"]) == (4, 100_000, 200_000)


def test_a_program_that_closes_its_terminal_and_opens_it_again_is_read_on(commands: Commands) -> None:
    task = commands.run("sh", "-c", "exec </dev/null >/dev/null 2>&1; sleep 1; echo still here >/dev/tty")
    assert commands.wait(task)["status"] == "completed"
    assert commands.output(task) == b"still here\r\n"


# ── What is typed ──

#: Reads in the ordinary mode of a terminal to the end of the input, and writes down exactly what it got.
READ_LINES = "import sys; print('ready', flush=True); open(sys.argv[1], 'wb').write(sys.stdin.buffer.read())"
#: Reads byte by byte as a program does that draws its own lines.
READ_RAW = (
    "import os, sys, tty\n"
    "tty.setraw(0)\n"
    "print('ready', flush=True)\n"
    "got = b''\n"
    "while not got.endswith(b'THE END'):\n"
    "    got += os.read(0, 65536)\n"
    "open(sys.argv[1], 'wb').write(got)\n"
)
NASTY = (
    "quotes ' \" ` $(touch pwned) ${HOME} && || ; | > < * ? ~ # ! \\ \\n %s\n"
    "ümläut 😀 \u202e\n"
    "controls \x01\x02\x03\x04\x05\x07\x08\x0b\x0c\r\x0e\x0f\x10\x11\x12\x13\x14\x15\x16\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f\x7f\n"
    "\x1b[31m\x1b[200~paste\x1b[A\x1bOA\x1b]0;title\x07\ttab\n"
)
MEGABYTE = "".join(f"{number:06} {'line ' * 20}\n" for number in range(10_000))[: 1 << 20]


@pytest.mark.parametrize(
    "text",
    [NASTY, MEGABYTE, "one line " * 100_000 + "\n", "x" * 4001 + "\n" + "y" * 8002 + "\n" + "z" * 4095],
    ids=["nasty", "a megabyte", "a line of 900 kB", "parts"],
)
@pytest.mark.parametrize("mode", ["lines", "raw"])
def test_C49_what_is_typed_arrives_byte_by_byte_in_every_mode_and_no_shell_sees_it(
    commands: Commands, tmp_path: Path, text: str, mode: str
) -> None:
    file = tmp_path / "got"
    program = READ_LINES if mode == "lines" else READ_RAW
    task = commands.run(*python(program), str(file))
    commands.says(task, b"ready")
    text += "THE END"
    for start in range(0, len(text), 600_000):
        commands.type(task, text[start : start + 600_000], submit=False)
    if mode == "lines":
        # The first hands over what there is of the line, the second is the end of the input.
        commands.type(task, keys=["ctrl-d", "ctrl-d"])
    assert commands.wait(task)["status"] == "completed"
    assert file.read_bytes() == text.encode()
    assert not (commands.folder / "pwned").exists()


def test_C47_typing_without_enter_changes_no_status(commands: Commands) -> None:
    task = commands.run("sh", "-c", "printf 'name: '; read x; echo got $x")
    commands.prompted(task, "name:")
    commands.type(task, "ali", submit=False)
    commands.prompted(task, "name: ali")
    commands.type(task, "ce")
    commands.wait(task, "completed")
    assert commands.output(task).endswith(b"got alice\r\n")
    assert commands.statuses(task) == ["running", "waiting_for_input", "running", "completed"]


def test_C46_the_same_input_sent_twice_is_typed_once(commands: Commands) -> None:
    task = commands.run("sh", "-c", "read x; echo one $x; read y; echo two $y")
    commands.wait(task, "waiting_for_input")
    for _ in range(2):
        commands.type(task, "first", client_message_id="m-1")
    commands.says(task, b"one first")
    commands.type(task, "second", client_message_id="m-2")
    commands.wait(task, "completed")
    assert commands.output(task).endswith(b"two second\r\n")


def test_C45_C48_keys_do_what_they_do_on_a_keyboard(commands: Commands) -> None:
    task = commands.run("sh", "-c", "trap 'echo interrupted; exit 7' INT; echo ready; sleep 1000 & wait")
    commands.says(task, b"ready")
    commands.type(task, keys=["ctrl-c"])
    assert commands.wait(task)["exit_code"] == 7
    commands.type(task, "late", status=409)


def test_the_size_of_the_terminal_can_be_changed(commands: Commands) -> None:
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGWINCH, lambda *_: print('now', *os.get_terminal_size(), flush=True))\n"
        "print('first', *os.get_terminal_size(), flush=True)\n"
        "input()\n"
    )
    task = commands.run(*python(code), rows=30, cols=100)
    commands.says(task, b"first 100 30")
    commands.type(task, rows=50, cols=132)
    commands.says(task, b"now 132 50")
    commands.type(task, keys=["enter"])
    commands.wait(task, "completed")


def test_C55_a_command_gets_its_initial_input_once_it_is_ready_and_not_before(commands: Commands) -> None:
    """It throws away what was typed while it started, as programs that take over the terminal do."""
    code = (
        "import sys, termios, time\n"
        "time.sleep(0.5)\n"
        "termios.tcflush(0, termios.TCIFLUSH)\n"
        "print('got', repr(input()), flush=True)\n"
        "print('then', repr(input('more? ')))\n"
    )
    task = commands.run(*python(code), input="do $(this)\tnow")
    commands.prompted(task, "more?")
    shown = commands.wait(task, "waiting_for_input", prompt_delivered=True)
    assert (shown["inputs_waiting"], shown["inputs"][0]["status"]) == (0, "delivered")
    commands.type(task, "that")
    commands.wait(task, "completed")
    said = commands.output(task)
    assert said.count(b"got 'do $(this)\\tnow'") == said.count(b"then 'that'") == 1
    # The first wait was for what was there already: it is not told to anybody.
    assert commands.statuses(task) == ["running", "waiting_for_input", "running", "completed"]


def test_C55_a_command_that_ends_with_its_initial_input_has_got_it(commands: Commands) -> None:
    task = commands.run("sh", "-c", "read line", input="only this")
    shown = commands.wait(task, "completed")
    assert shown["prompt_delivered"] is True


def test_C55_an_initial_input_that_gets_lost_is_typed_again_three_times_at_most(commands: Commands) -> None:
    """Both read keys: the first throws away one line, the second all of them, and neither shows anything of what it throws away."""
    code = (
        "import os, sys, tty\n"
        "tty.setraw(0)\n"
        "def line():\n"
        "    got = b''\n"
        "    while not got.endswith(b'\\r'): got += os.read(0, 100)\n"
        "    return got\n"
        "for _ in range(int(sys.argv[1])): line()\n"
        "print('got', line())\n"
    )
    once, always = (commands.run(*python(code), times, input="do this") for times in ("1", "3"))
    assert commands.wait(once, "completed")["prompt_delivered"] is True
    assert b"got b'do this\\r'" in commands.output(once)
    commands.wait(always, "waiting_for_input")
    # A fourth time would be before this.
    commands.type(always, "something else")
    assert commands.wait(always, "completed")["prompt_delivered"] is False
    assert b"got b'something else\\r'" in commands.output(always)


def test_C55_a_command_that_never_reads_its_terminal_has_not_got_its_initial_input(
    commands: Commands,
) -> None:
    task = commands.run("sleep", "2", input="do this")
    shown = commands.wait(task, "completed")
    assert (shown["prompt_delivered"], shown["inputs"][0]["status"]) == (False, "dropped")
    assert commands.output(task) == b""


# ── Whether it waits ──


def test_C17_C18_a_program_that_reads_waits_and_moves_on_by_input_and_by_output(commands: Commands) -> None:
    code = (
        "import signal, time\n"
        "def wake(*_): raise TimeoutError\n"
        "signal.signal(signal.SIGALRM, wake)\n"
        "signal.alarm(3)\n"
        "try: input('by itself ')\n"
        "except TimeoutError: print('moved', flush=True)\n"
        "time.sleep(0.6)\n"
        "print(input('by input '))\n"
    )
    task = commands.run(*python(code))
    commands.prompted(task, "by itself")
    commands.prompted(task, "by input")
    commands.type(task, "typed")
    commands.wait(task, "completed")
    assert commands.statuses(task) == [
        "running",
        "waiting_for_input",
        "running",
        "waiting_for_input",
        "running",
        "completed",
    ]


def test_C57_a_silent_program_that_is_busy_does_not_wait(commands: Commands) -> None:
    """Each would be told as waiting after a quarter of a second. Of two that read afterwards it is told, so the worker looked."""
    clock = "import time\nfor n in range(40):\n    print(f'\\r12:00:{n:02}', end='', flush=True); time.sleep(0.05)\n"
    polling = (
        "import select, sys, time\n"
        "end = time.monotonic() + 2\n"
        "while time.monotonic() < end: select.select([sys.stdin], [], [], 0.5)\n"
    )
    tasks = [
        commands.run("sh", "-c", "sleep 2"),
        commands.run(*python(clock)),
        commands.run(*python(polling)),
        commands.run(*python("import time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass")),
    ]
    for task in tasks:
        commands.wait(task, "completed")
        assert commands.statuses(task) == ["running", "completed"]


@pytest.mark.parametrize(
    "code",
    [
        "import select, sys; select.select([sys.stdin], [], [])",
        "import select; p = select.poll(); p.register(0, select.POLLIN); p.poll()",
        "import select; p = select.epoll(); p.register(0, select.EPOLLIN); p.poll()",
        "import os; fd = os.open('/dev/tty', os.O_RDONLY); os.read(fd, 10)",
        "import threading, sys, time\nt = threading.Thread(target=sys.stdin.readline); t.start(); t.join()",
    ],
    ids=["select", "poll", "epoll", "/dev/tty", "in a thread"],
)
def test_C17_every_way_of_reading_a_terminal_is_known(commands: Commands, code: str) -> None:
    task = commands.run(*python(code))
    shown = commands.wait(task, "waiting_for_input")
    assert shown["prompt"]["detected_by"] == "read"
    commands.kill(task)
    commands.wait(task, "killed")


def test_a_password_is_asked_for_and_neither_shown_nor_told(commands: Commands) -> None:
    task = commands.run(*python("import getpass; print(len(getpass.getpass('Passphrase: ')))"))
    prompt = commands.prompted(task, "Passphrase:")
    assert (prompt["kind"], prompt["replies"]) == ("password", [])
    commands.type(task, "hunter2-secret")
    commands.wait(task, "completed")
    assert commands.output(task) == b"Passphrase: \r\n14\r\n"
    database = b"".join(file.read_bytes() for file in commands.running.data_dir.glob("switchboard.sqlite3*"))
    assert b"hunter2-secret" not in database
    assert "hunter2-secret" not in commands.running.log("worker")


def test_C53_a_question_that_is_known_can_be_answered_with_a_click(commands: Commands) -> None:
    task = commands.run("bash", "-c", "read -p 'Overwrite? [y/N] ' x; echo got $x")
    prompt = commands.prompted(task, "Overwrite?")
    assert prompt["kind"] == "yes_no"
    yes = next(reply for reply in prompt["replies"] if reply["label"] == "Yes")
    commands.type(task, yes["text"])
    commands.wait(task, "completed")
    assert commands.output(task).endswith(b"got y\r\n")


# ── Programs that people know ──


def test_less_shows_pages_and_leaves_when_told(commands: Commands) -> None:
    (commands.folder / "long").write_text("".join(f"line {number}\n" for number in range(500)))
    task = commands.run("less", "long")
    commands.says(task, b"line 20")
    commands.wait(task, "waiting_for_input")
    commands.type(task, keys=["page-down"])
    commands.says(task, b"line 40")
    commands.type(task, "q", submit=False)
    assert commands.wait(task)["exit_code"] == 0


def test_vim_edits_and_saves(commands: Commands) -> None:
    editor = "vim.tiny" if os.path.exists("/usr/bin/vim.tiny") else "vim.basic"
    task = commands.run(editor, "-u", "NONE", "-n", "written")
    commands.wait(task, "waiting_for_input")
    commands.type(task, "ihello from afar", submit=False)
    commands.says(task, b"afar")
    commands.type(task, keys=["escape", "right"])
    commands.type(task, ":wq")
    assert commands.wait(task)["exit_code"] == 0
    assert (commands.folder / "written").read_text() == "hello from afar\n"


def test_a_python_prompt_answers_line_by_line(commands: Commands) -> None:
    task = commands.run(sys.executable, "-q", "-i", "-c", "x = 20")
    commands.prompted(task, ">>>")
    commands.type(task, "print(x + 22)")
    commands.says(task, b"\n42\r\n")
    commands.prompted(task, ">>>")
    commands.type(task, "exit(5)")
    assert commands.wait(task)["exit_code"] == 5


# ── Races ──


def test_C20_C21_C23_kill_against_natural_end_has_one_outcome_everywhere(tmp_path: Path) -> None:
    """200 times, two workers, ten readers all the while: row, event, report and GET agree, and there is one terminal event."""
    with installation(tmp_path, COMMAND_CONCURRENCY="4") as commands:
        commands.running.start("worker2")
        over = threading.Event()
        broken: list[str] = []

        def read() -> None:
            """Who has seen an end sees nothing else afterwards."""
            seen: dict[str, str] = {}
            with client(commands.running) as reader:
                # Fifty looks a second altogether: more would leave the server no time for what races.
                while not over.wait(0.2):
                    for row in reader.http.get("/api/tasks", params={"limit": 10}).json():
                        if seen.get(row["id"]) in END and row["status"] != seen[row["id"]]:
                            broken.append(f"{row['id']}: {seen[row['id']]} then {row['status']}")
                        seen[row["id"]] = row["status"]

        readers = [threading.Thread(target=read) for _ in range(10)]
        for reader in readers:
            reader.start()
        try:
            tasks = []
            for number in range(200):
                delay = (number % 20) / 200
                task = commands.run(
                    "sh", "-c", f"sleep {delay}; exit 0", hook_url="http://127.0.0.1:9/nobody"
                )
                if number % 3:
                    until(lambda task=task: commands.show(task)["status"] != "queued", 60)
                assert commands.kill(task) in (202, 409)
                tasks.append(task)
            ended = {task: commands.wait(task, seconds=90) for task in tasks}
        finally:
            over.set()
            for reader in readers:
                reader.join()
        assert broken == []
        printed = commands.running.shell(
            "import json\nfrom events.models import Event\nfrom connections.models import HookDelivery\n"
            "ends = {}\n"
            "for row in Event.objects.filter(name='task.status').order_by('id'):\n"
            "    if row.data['status'] in ('completed', 'failed', 'killed'):\n"
            "        ends.setdefault(row.object_id, []).append(row.data['status'])\n"
            "print('FOUND', json.dumps([ends, list(HookDelivery.objects.values_list('task_id', flat=True))]))",
        )  # fmt: skip
        ends, reports = json.loads(printed.split("FOUND", 1)[1])
        assert ends == {task: [shown["status"]] for task, shown in ended.items()}
        assert sorted(reports) == sorted(tasks)
        assert {shown["status"] for shown in ended.values()} == {"completed", "killed"}


# ── Survival ──

#: Two generations of children in sessions of their own that listen to nothing.
STUBBORN = (
    "trap '' TERM HUP; (setsid sh -c 'trap \"\" TERM HUP; sleep 1000 & sleep 1001' &); echo begun; sleep 1002"
)


def test_a_worker_that_is_killed_leaves_no_orphan_and_no_row_that_says_running(own: Commands) -> None:
    tasks = [own.run("sh", "-c", STUBBORN) for _ in range(3)]
    for task in tasks:
        own.says(task, b"begun")
        until(lambda task=task: len(processes(task)) >= 4, 30)
    pid = own.running.processes["worker"].pid
    below = children(pid)
    own.running.stop("worker", signal.SIGKILL)
    until(lambda: not any(processes(task) for task in tasks), 30, "orphans are left")
    until(lambda: not any(os.path.exists(f"/proc/{each}") for each in below), 30, "a supervisor is left")
    own.running.start("worker2")
    for task in tasks:
        ended = own.wait(task)
        assert (ended["status"], ended["error_code"]) == ("failed", "interrupted")
        assert own.output(task) == b"begun\r\n"
        assert own.statuses(task) == ["running", "failed"]


def test_a_supervisor_that_is_killed_takes_its_command_along_and_the_worker_says_so(own: Commands) -> None:
    task = own.run("sh", "-c", STUBBORN)
    own.says(task, b"begun")
    until(lambda: len(processes(task)) >= 4, 30)
    first = min(processes(task))
    supervisor = int(Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(supervisor, signal.SIGKILL)
    ended = own.wait(task)
    assert (ended["status"], ended["error_code"]) == ("failed", "interrupted")
    until(lambda: not processes(task), 30, "orphans are left")
    # The keeper goes on.
    assert own.wait(own.run("true"))["status"] == "completed"


def test_a_keeper_that_is_killed_is_replaced_and_what_ran_runs_on(own: Commands) -> None:
    running = own.run("bash", "-c", "read -p 'still there? ' x; echo $x")
    own.prompted(running, "still there?")
    worker = own.running.processes["worker"].pid
    keeper = next(
        pid for pid in children(worker) if b"keeper.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(keeper, signal.SIGKILL)
    assert own.wait(own.run("echo", "after"))["status"] == "completed"
    own.type(running, "yes")
    own.wait(running, "completed")
    assert own.output(running).endswith(b"yes\r\n")


def test_nothing_of_a_hundred_commands_is_left_in_the_worker(own: Commands) -> None:
    """No zombie, no descriptor, no process but the keeper and a few supervisors for the next commands."""
    own.wait(own.run("true"))
    worker = own.running.processes["worker"].pid
    keeper = next(iter(children(worker)))

    def descriptors() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (worker, keeper)]

    before = descriptors()
    for task in [own.run("sh", "-c", "echo hi; exit 1") for _ in range(90)]:
        own.wait(task)
    for _ in range(5):
        task = own.run("sleep", "1000")
        own.wait(task, "running")
        own.kill(task)
        own.wait(task, "killed")

    def tidy() -> bool:
        below = children(worker)
        return len(below) <= 1 + IDLE and set(below.values()) == {"S"}

    until(tidy, 60, "a zombie is left, or a supervisor that nobody needs")
    # A few are opened when they are first needed (files of the database); one for each command would be ninety.
    until(lambda: all(now <= then + 9 for now, then in zip(descriptors(), before, strict=True)), 20)


@pytest.mark.parametrize("how", ["finish", "interrupt", "handover"])
def test_a_worker_that_is_told_to_stop_does_with_its_commands_what_is_wanted(
    tmp_path: Path, how: str
) -> None:
    with installation(tmp_path, COMMAND_ON_STOP=how, COMMAND_STOP_SECONDS="20") as commands:
        code = (
            "import os, sys\n"
            "print('\\x1b[?2004h', end='')\n"
            "line = input('first? ')\n"
            "print('got', line, flush=True)\n"
            "open('go', 'w').close()\n"
            "print('then', input('second? '))\n"
        )
        task = commands.run(*python(code))
        prompt = commands.prompted(task, "first?")
        process = commands.running.processes["worker"]
        process.send_signal(signal.SIGTERM)
        if how == "finish":
            # It still listens to what is typed.
            commands.type(task, "a")
            commands.prompted(task, "second?")
            waiting = commands.run("true")
            commands.type(task, "b")
            assert commands.wait(task)["status"] == "completed"
            assert process.wait(30) == 0
            assert commands.show(waiting)["status"] == "queued"
        elif how == "interrupt":
            assert process.wait(30) == 0
            ended = commands.show(task)
            assert (ended["status"], ended["error_code"]) == ("failed", "interrupted")
            assert processes(task) == {}
        else:
            assert process.wait(30) == 0
            shown = commands.show(task)
            assert (shown["status"], shown["prompt"]) == ("waiting_for_input", prompt)
            commands.type(task, "a")
            commands.running.start("worker2")
            commands.prompted(task, "second?")
            commands.type(task, "b")
            assert commands.wait(task)["status"] == "completed"
            assert commands.output(task).endswith(b"then b\r\n")
            assert list((tmp_path / "run").iterdir()) == []
        assert "Traceback" not in commands.running.log("worker")


def test_what_is_written_and_typed_while_a_command_changes_hands_arrives_once(tmp_path: Path) -> None:
    """Two workers, which leave it to each other four times. It writes all the while, and reads a megabyte."""
    with installation(tmp_path, COMMAND_ON_STOP="handover", COMMAND_STOP_SECONDS="60") as commands:
        code = (
            "import sys, threading, time\n"
            "def write():\n"
            "    for n in range(2000):\n"
            "        print(n, 'x' * 200, flush=True); time.sleep(0.005)\n"
            "writer = threading.Thread(target=write); writer.start()\n"
            "got = sys.stdin.read()\n"
            "writer.join()\n"
            "open(sys.argv[1], 'w').write(got)\n"
        )
        task = commands.run("sh", "-c", 'stty -echo; exec "$@"', "sh", *python(code), str(tmp_path / "got"))
        commands.says(task, b"\r\n100 ")
        name = "worker"
        for turn in range(4):
            commands.type(task, MEGABYTE[turn * 200_000 : (turn + 1) * 200_000], submit=False)
            commands.running.start(f"worker{turn + 2}")
            assert commands.running.stop(name) == 0
            name = f"worker{turn + 2}"
            until(lambda turn=turn: commands.show(task)["attempts"] == turn + 2, 60)
        commands.type(task, keys=["ctrl-d", "ctrl-d"])
        assert commands.wait(task)["status"] == "completed"
        assert commands.output(task) == b"".join(b"%d %s\r\n" % (n, b"x" * 200) for n in range(2000))
        assert (tmp_path / "got").read_text() == MEGABYTE[:800_000]
        assert commands.show(task)["attempts"] == 5


def test_a_second_signal_does_not_wait_for_commands(tmp_path: Path) -> None:
    with installation(tmp_path, COMMAND_STOP_SECONDS="600") as commands:
        task = commands.run("sleep", "1000")
        commands.wait(task, "running")
        process = commands.running.processes["worker"]
        process.send_signal(signal.SIGINT)
        until(lambda: "waiting for 1 commands" in commands.running.log("worker"), 20)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert commands.show(task)["error_code"] == "interrupted"
        assert processes(task) == {}


def test_what_nobody_takes_over_is_ended_and_told(tmp_path: Path) -> None:
    with installation(
        tmp_path, COMMAND_ON_STOP="handover", COMMAND_STOP_SECONDS="1", LEASE_SECONDS="2"
    ) as commands:
        task = commands.run("sh", "-c", STUBBORN)
        commands.says(task, b"begun")
        process = commands.running.processes["worker"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        until(lambda: not processes(task), 30, "it runs on")
        commands.running.start("worker2")
        ended = commands.wait(task)
        assert (ended["status"], ended["error_code"]) == ("failed", "interrupted")
        assert commands.output(task) == b"begun\r\n"


def test_a_command_survives_a_restart_of_the_database(tmp_path: Path) -> None:
    with services.postgresql(tmp_path) as database:
        data_dir = tmp_path / "data"
        with installation(data_dir, DATABASE_URL=database.url, LEASE_SECONDS="60") as commands:
            code = (
                "import sys, time\n"
                "for n in range(400):\n"
                "    print(n, 'x' * 500, flush=True); time.sleep(0.01)\n"
                "print('last', input('done? '))\n"
            )
            task = commands.run(*python(code))
            commands.says(task, b"\r\n20 ")
            database.restart()
            commands.prompted(task, "done?")
            commands.type(task, "yes")
            ended = commands.wait(task)
            assert (ended["status"], ended["exit_code"]) == ("completed", 0)
            expected = b"".join(b"%d %s\r\n" % (n, b"x" * 500) for n in range(400))
            assert commands.output(task) == expected + b"done? yes\r\nlast yes\r\n"
