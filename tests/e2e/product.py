"""What the end-to-end tests share: the program under test, its demo batches, and how its files are read.

A test file is run as `x_test.py PROGRAM READER [TestClass...]`: the certkv program, the folder of the
trained demo model, and the classes to run (all of them where none is named).
"""

import json
import os
import sys
import unittest

import harness

PROGRAM = READER = None
TIMED = {"created", "decode_seconds", "prefill_seconds", "phase_seconds", "seconds", "session",
         "tokens_per_second"}  # what two equal runs may differ in


def main(module="__main__"):
    global PROGRAM, READER  # the importing test file reads them as product.PROGRAM
    PROGRAM, READER = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
    unittest.main(module=module, argv=[sys.argv[0], "-v", *sys.argv[3:]])


def certkv(*arguments, ranks=0, timeout_s=100, **options):
    return harness.run(command(arguments), ranks=ranks, timeout_s=timeout_s, **options)


def start(*arguments, ranks=0, **options):
    return harness.start(command(arguments), ranks=ranks, **options)


def command(arguments):
    return [PROGRAM, *map(str, arguments)]


def run_job(folder, name, *arguments, model=None, input_file="batch.jsonl", ranks=0, threads=1,
            **options):
    """certkv run over folder/input_file into folder/name."""
    return certkv(*job_arguments(folder, name, *arguments, model=model, input_file=input_file,
                                 threads=threads), ranks=ranks, **options)


def job_arguments(folder, name, *arguments, model=None, input_file="batch.jsonl", threads=1):
    return ["run", "--model", model or READER, "--input", os.path.join(folder, input_file),
            "--output", os.path.join(folder, name), "--parallel.threads", threads, *arguments]


def demo_batch(folder, model, contexts, questions):
    certkv("demo-batch", "--model", model, "--contexts", ",".join(map(str, contexts)),
           "--questions", questions, "--output", folder).expect_exit(0)


def lines(*path):
    """The values of a JSON lines file."""
    with open(os.path.join(*path), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path, values):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def read_json(*path):
    with open(os.path.join(*path), encoding="utf-8") as file:
        return json.load(file)


def texts(*path):
    """custom_id -> text of the answer; None for a line that failed."""
    return {line["custom_id"]: line["response"]["body"]["choices"][0]["text"]
            if not line["error"] else None for line in lines(*path)}


def recorded(*path):
    """The lines of a results or steps file without what depends on the clock."""
    return [untimed(line) for line in lines(*path)]


def untimed(value):
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in TIMED}
    return [untimed(v) for v in value] if isinstance(value, list) else value
