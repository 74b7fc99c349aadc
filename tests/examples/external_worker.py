"""A worker in 60 lines of Python's standard library: it takes tasks of the kind ``greeting``, asks for a name, and greets.

SWITCHBOARD_URL=http://127.0.0.1:8000 SWITCHBOARD_KEY=sk_… python external_worker.py
"""

import contextlib
import json
import os
import threading
import time
import urllib.request

URL, KEY, NAME = os.environ["SWITCHBOARD_URL"], os.environ["SWITCHBOARD_KEY"], "example"


def call(path, body, kind="application/json"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": kind}
    with urllib.request.urlopen(urllib.request.Request(URL + path, data, headers), timeout=30) as answer:
        return json.loads(answer.read() or "null")


def inputs(task, hold):
    """What people send: (name of the event, its data), until the task is over or lost."""
    query = f"worker={hold['worker']}&attempt={hold['attempt']}"
    request = urllib.request.Request(
        f"{URL}/api/work/{task}/inputs?{query}", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request, timeout=30) as stream:  # it says something every 15 s at least
        name = ""
        for line in stream:
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                yield name, json.loads(value)


def work(claimed):
    task, hold = claimed["task"]["id"], {"worker": claimed["worker"], "attempt": claimed["attempt"]}
    place, over = 0, threading.Event()

    def write(text):
        nonlocal place
        query = f"worker={hold['worker']}&attempt={hold['attempt']}&at={place}"
        place = call(f"/api/work/{task}/output?{query}", text.encode(), "application/octet-stream")["next"]

    def live():
        while not over.wait(10):  # the lease is 30 s
            call(f"/api/work/{task}/heartbeat", hold)

    threading.Thread(target=live, daemon=True).start()
    write("Who is there? ")
    prompt = {"kind": "text", "text": "Who is there?", "replies": [{"label": "Nobody", "text": "nobody"}]}
    call(f"/api/work/{task}/status", {**hold, "status": "waiting_for_input", "prompt": prompt})
    for name, data in inputs(task, hold):
        if name == "input" and data["kind"] == "text":
            call(f"/api/work/{task}/heartbeat", {**hold, "inputs_taken": data["number"]})
            write(f"{data['text']}\r\n{claimed['task']['payload']['greeting']}, {data['text']}!\r\n")
        if name in ("input", "kill", "end"):
            break
    over.set()
    with contextlib.suppress(urllib.error.HTTPError):  # 409: somebody else has it by now
        call(f"/api/work/{task}/status", {**hold, "status": "completed", "exit_code": 0})


while True:
    claimed = call("/api/work/claim", {"kinds": ["greeting"], "worker": NAME})
    if claimed:
        work(claimed)
    else:
        time.sleep(1)
