#!/usr/bin/env python3
"""Prints "passed failed skipped" of the JUnit file that ctest wrote; exit code 1 if no test ran."""

import sys
import xml.etree.ElementTree


def count(path):
    passed = failed = skipped = 0
    for case in xml.etree.ElementTree.parse(path).getroot().iter("testcase"):
        # ctest's words: run (passed), fail, notrun (skipped, or the program is missing), disabled.
        if case.get("status") == "run":
            passed += 1
        elif case.find("skipped") is not None and case.find("failure") is None:
            reason = case.find("skipped").get("message", "")
            if reason.startswith("SKIP_") or case.get("status") == "disabled":
                skipped += 1
            else:
                failed += 1
        else:
            failed += 1
    return passed, failed, skipped


if __name__ == "__main__":
    try:
        counts = count(sys.argv[1])
    except (OSError, xml.etree.ElementTree.ParseError) as error:
        sys.exit(f"count_tests.py: {error}")
    print(*counts)
    sys.exit(0 if sum(counts) else 1)
